"""`embedding-proxy reload`: let the running proxy read its configuration anew."""

from typing import Annotated

import typer
from embedding_proxy.proxy.config import loader
from embedding_proxy.proxy.http import control

from .output import ConfigOption, WorkFailed, WrongUsage, path_text, say


def reload(
    config_file: ConfigOption = None,
    port: Annotated[
        int | None, typer.Option(help="Of the proxy, where several share the cache.")
    ] = None,
) -> None:
    """Let the running proxy read its configuration anew, without dropping a request.

    A configuration with mistakes is refused whole, and the former one stays.
    """
    settings = loader.load(config_file, purpose="serve")
    if not control.is_supported():
        raise WorkFailed("this system has no Unix sockets; stop the proxy and start it again")
    directory = settings.cache.directory
    ports = [port] if port is not None else [*control.running(directory)]
    if port is None and settings.server.port in ports:
        ports = [settings.server.port]
    if len(ports) > 1:
        names = ", ".join(map(str, ports))
        raise WrongUsage(f"several proxies use the cache {path_text(directory)}: --port {names}?")
    chosen = ports[0] if ports else settings.server.port
    try:
        reply, _ = control.ask(control.socket_path(directory, chosen), control.RELOAD)
    except control.NotRunning as error:
        raise WorkFailed(
            f"no proxy that uses the cache {path_text(directory)} answers"
            f"{'' if port is None else f' on port {port}'}; is it running, and as this user?"
        ) from error
    for line in reply.lines:
        say(line)
    raise typer.Exit(reply.code)
