"""The command: what it prints, and with which code it exits."""

import asyncio
import contextlib
import gc
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
import typer
from aiohttp import web
from embedding_proxy.cache.disk.store import StoreError
from embedding_proxy.proxy.cli import main
from embedding_proxy.proxy.cli.demo import DemoFailed
from embedding_proxy.proxy.cli.imports import importing
from embedding_proxy.proxy.config.fields import MODES
from embedding_proxy.proxy.http.process import PortUnavailable, run_event_loop

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "embedding_proxy", "serve"]
GOOD = {"model": "text-embedding-3-small", "input": "a"}
# Without providers that want keys, nothing is said about keys that are absent.
QUIET = "providers: {openai: null, openrouter: null}"


def _environment(home: Path, **more: str) -> dict[str, str]:
    """Return all that a subprocess gets to know of this machine."""
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
    return {**kept, "HOME": str(home), "XDG_DATA_HOME": str(home / "data"), **more}


@asynccontextmanager
async def _served(tmp_path, upstream):
    """Run `serve` as a process in front of the upstream; give it and the URL it announced."""
    config = tmp_path / "config.yaml"
    config.write_text(f"providers: {{openai: {{base_url: '{upstream.url}'}}}}")
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *("--port", "0", "--config", str(config)),
        cwd=ROOT,
        env=_environment(tmp_path, OPENAI_API_KEY="k"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            line = (await process.stdout.readline()).decode()
            found = re.fullmatch(r"export OPENAI_BASE_URL=(http://127\.0\.0\.1:\d+/v1)\n", line)
            assert found, line
            yield process, found[1]
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynccontextmanager
async def _told_while_busy(number, tmp_path, upstream):
    """Send a signal amid a request; give the process, the request, and what lets it go on."""
    arrived, release = asyncio.Event(), asyncio.Event()

    async def hold(_, payload) -> web.Response:
        arrived.set()
        await release.wait()
        return web.json_response(upstream.reply(payload))

    async with _served(tmp_path, upstream) as (process, url), aiohttp.ClientSession() as session:
        async with session.post(f"{url}/embeddings", json=GOOD) as response:
            assert (response.status, response.headers["x-cache"]) == (200, "miss")
        upstream.script.append(hold)
        more = {**GOOD, "input": ["a", "b"]}
        request = asyncio.create_task(session.post(f"{url}/embeddings", json=more))
        await arrived.wait()
        process.send_signal(number)
        try:
            while b"stopping" not in await process.stderr.readline():
                assert not process.stderr.at_eof()
            yield process, request, release
        finally:
            # However it went, the upstream is not left waiting.
            release.set()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_serve_announces_answers_and_ends_in_good_order(number, code, tmp_path, upstream):
    """The process prints the line to paste, answers, and at a signal finishes what it began."""
    async with _told_while_busy(number, tmp_path, upstream) as (process, request, release):
        release.set()
        async with await request as response:
            assert (response.status, response.headers["x-cache"]) == (200, "partial")
            assert len((await response.json())["data"]) == 2
        out, err = await process.communicate()
    assert (process.returncode, out) == (code, b"")
    assert b"Traceback" not in err


async def test_a_second_signal_ends_it_at_once(tmp_path, upstream):
    """Told twice, the process does not wait for the request in progress."""
    async with _told_while_busy(signal.SIGTERM, tmp_path, upstream) as (process, request, _):
        process.terminate()
        assert await process.wait() == -signal.SIGTERM
        with pytest.raises(aiohttp.ClientError):
            await request


async def test_a_hangup_is_never_the_second_signal(tmp_path, upstream):
    """SIGHUP behind SIGTERM, as systemd may send it: what is in progress is answered."""
    async with _told_while_busy(signal.SIGTERM, tmp_path, upstream) as (process, request, release):
        process.send_signal(signal.SIGHUP)
        release.set()
        async with await request as response:
            assert (response.status, response.headers["x-cache"]) == (200, "partial")
        await process.communicate()
    assert process.returncode == 0


async def test_under_nohup_a_hangup_ends_nothing(tmp_path, upstream):
    """Where SIGHUP is ignored from the start, it stays ignored, and requests are answered."""
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        served = _served(tmp_path, upstream)
        process, url = await served.__aenter__()
    finally:
        signal.signal(signal.SIGHUP, ignored)
    try:
        process.send_signal(signal.SIGHUP)
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{url}/embeddings", json=GOOD) as response,
        ):
            assert response.status == 200
        process.terminate()
        assert await process.wait() == 0
    finally:
        await served.__aexit__(None, None, None)


FAILED_STARTS = {
    "unknown key": (f"{QUIET}\nserver: {{prot: 1}}", 2, "config.yaml:2: server.prot: unknown key"),
    "cache in a file": (f"{QUIET}\ncache: {{directory: config.yaml}}", 1, "config.yaml/v1: "),
    "port in use": (QUIET, 1, "cannot listen on 127.0.0.1:"),
    "no key in the variable": ("", 2, "OPENAI_API_KEY: its value is no key"),
}


@pytest.mark.parametrize(("text", "code", "message"), FAILED_STARTS.values(), ids=FAILED_STARTS)
def test_a_start_that_fails_is_one_line_and_an_exit_code(text, code, message, tmp_path):
    """Each foreseeable failure of a start is one line on stderr, no traceback, and its code."""
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1] if "cannot listen" in message else 0
        done = subprocess.run(
            [*COMMAND, "--config", str(config), "--port", str(port)],
            cwd=tmp_path,
            env=_environment(tmp_path, PYTHONPATH=str(ROOT), OPENAI_API_KEY="sk-a\nsk-b"),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stdout) == (code, "")
    assert re.fullmatch(r"embedding-proxy: [^\n]+\n", done.stderr)
    assert message in done.stderr


@pytest.fixture
def run(monkeypatch, capsys):
    """Give a function that runs the command in this process: its code, stdout and stderr."""
    # Wide enough that no message is broken into lines.
    monkeypatch.setenv("COLUMNS", "200")

    def run_command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["embedding-proxy", *arguments])
        with pytest.raises(SystemExit) as caught:
            main.main()
        return caught.value.code or 0, *capsys.readouterr()

    return run_command


def test_version(run):
    """--version prints the name and the version that is installed, and nothing else."""
    assert run("--version") == (0, f"embedding-proxy {version('embedding-proxy')}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["serve", "demo", "check", "--version"]),
        (["check", "--help"], ["--config", "--model", "--all", "--offline", "--json"]),
        (["serve", "--help"], ["--config", "--host", "--port", "--workers"]),
    ],
)
def test_help(arguments, words, run):
    """--help names the commands and their options, and is no failure."""
    code, out, _ = run(*arguments)
    assert code == 0
    assert all(word in out for word in words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage"),
        (["--nope"], "No such option: --nope"),
        (["nope"], "No such command 'nope'"),
        (["serve", "--nope"], "No such option: --nope"),
        (["serve", "--port", "x"], "Invalid value for '--port'"),
        (["serve", "--port", "-1"], "server.port: expected"),
        (["serve", "--workers", "0"], "server.workers: expected"),
        (["serve", "--host", "0.0.0.0"], "set server.keys, or host 127.0.0.1"),
        (["serve", "--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, message, run):
    """Unknown options and commands, and values that no configuration may have, are code 2."""
    code, out, err = run(*arguments)
    assert code == 2
    assert message in out + err


@pytest.fixture
def serving(monkeypatch):
    """Put a server that only notes its settings in place of the real one; end it as told."""
    noted = []

    def end_with(outcome: signal.Signals | Exception) -> list:
        async def serve(settings, _listening, announce, _load, *, channel=None, **_):
            noted.append(settings)
            if isinstance(outcome, Exception):
                raise outcome
            announce()
            return outcome

        monkeypatch.setattr("embedding_proxy.proxy.http.process.serve", serve)
        listening = SimpleNamespace(getsockname=lambda: ("h", 1))
        listen = contextlib.nullcontext(listening)
        monkeypatch.setattr("embedding_proxy.proxy.http.process.listen", lambda _: listen)
        monkeypatch.setattr("embedding_proxy.proxy.http.control.listen", lambda _: None)
        monkeypatch.setattr(
            "embedding_proxy.proxy.http.process.base_url", lambda _, **__: "http://h:1/v1"
        )
        return noted

    return end_with


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_options_stand_in_for_keys_of_the_configuration(number, run, serving, tmp_path):
    """What is given as an option counts more than the file; the rest is the file's."""
    noted = serving(number)
    config = tmp_path / "config.yaml"
    config.write_text("server: {host: 127.0.0.9, port: 1, max_body_mib: 2}")
    options = ("--port", "7", "--host", "localhost", "--workers", "1")
    code, out, _ = run("serve", "--config", str(config), *options)
    assert (code, out) == (
        130 if number is signal.SIGINT else 0,
        "export OPENAI_BASE_URL=http://h:1/v1\n",
    )
    server = noted[0].server
    assert (server.port, server.host, server.max_body_mib) == (7, "localhost", 2)


@pytest.mark.parametrize("error", [StoreError("d: full"), PortUnavailable("cannot listen on x")])
def test_what_fails_later_is_exit_code_1(error, run, serving):
    """A cache or a port that cannot be had is one line, and code 1."""
    serving(error)
    assert run("serve") == (1, "", f"embedding-proxy: {error}\n")


@pytest.mark.parametrize("mode", ["normal", "frozen", "refresh", "off", "'off'", "${MODE:-off}"])
def test_a_mode_that_is_not_the_usual_one_is_said(mode, run, serving, tmp_path, caplog):
    """Who starts with another mode reads in the log what it means; YAML's `off` is one of them."""
    noted = serving(signal.SIGTERM)
    config = tmp_path / "config.yaml"
    config.write_text(f"{QUIET}\ncache:\n  mode: {mode}")
    assert run("serve", "--config", str(config))[0] == 0
    meant = "off" if "off" in mode else mode
    assert noted[0].cache.mode == meant
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warned == [f"cache.mode is {meant}: {MODES[meant]}"] * (mode != "normal")


LATER = {
    "embedding_proxy.index.migration.runner",
    "numpy.testing",
    "embedding_proxy.proxy.cli.migrate",
    "embedding_proxy.proxy.diagnostics",
}
LATER |= {"openai", "qdrant_client", "redis", "rich", "wordllama"}
"""What takes long to import, and a proxy that has nothing to do with it does without."""


def _told_when_ready(folder: Path, what: str, **environment: str) -> list[str]:
    """Return what a proxy prints of itself, word by word, once it answers requests."""
    (folder / "config.yaml").write_text(QUIET)
    told = f"print({what}); os.kill(os.getpid(), signal.SIGTERM)"
    code = f"""
import gc, os, signal, sys, threading
import typer
typer.echo = lambda *_: exec({told!r})
sys.argv = ["embedding-proxy", "serve", "--port", "0", "--config", "config.yaml"]
from embedding_proxy.proxy.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=_environment(folder, PYTHONPATH=str(ROOT), **environment),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_it_is_ready_soon(tmp_path):
    """To serve, nothing is imported that only other commands or other configurations need.

    What is imported is no garbage, and is not looked through for it; what comes later is. There are
    no threads but Python's own, and no plugins are looked for.
    """
    what = "*sys.modules, gc.isenabled(), gc.get_freeze_count() > 10_000,"
    what += " len(os.listdir('/proc/self/task')) - threading.active_count(),"
    what += " os.environ['PYDANTIC_DISABLE_PLUGINS']"
    *modules, collects, frozen, others, plugins = _told_when_ready(tmp_path, what)
    assert "embedding_proxy.proxy.service.embedding_service" in modules
    assert not LATER & set(modules)
    assert (collects, frozen, others, plugins) == ("True", "True", "0", "__all__")


def test_who_wants_threads_and_plugins_has_them(tmp_path):
    """What the environment says of them stays as it is."""
    own = {"OPENBLAS_NUM_THREADS": "2", "PYDANTIC_DISABLE_PLUGINS": "theirs"}
    what = ", ".join(f"os.environ[{name!r}]" for name in own)
    assert _told_when_ready(tmp_path, what, **own) == [*own.values()]


@pytest.mark.parametrize("module", ["uvloop", "nothing"])
def test_it_runs_with_and_without_uvloop(module, monkeypatch):
    """Where uvloop is not installed the standard event loop is used."""
    monkeypatch.setitem(sys.modules, module, None)

    async def loop_module() -> str:
        return type(asyncio.get_running_loop()).__module__.partition(".")[0]

    assert run_event_loop(loop_module()) == ("asyncio" if module == "uvloop" else "uvloop")


HEAVY = {
    *(
        "aiohttp",
        "asyncio",
        "numpy",
        "orjson",
        "yaml",
        "uvloop",
        "embedding_proxy.proxy.config.loader",
    ),
    *("pydantic", "rich", "markdown_it"),
}
"""What takes long to import, and neither a version nor a list of commands needs."""
MAX_MODULES = 280
"""Of which some 200 are the interpreter's and typer's own."""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        *([name, "--help"] for name in ("cache", "migrate", "config", "serve", "demo")),
    ],
    ids=" ".join,
)
def test_what_says_only_what_there_is_imports_little(arguments, tmp_path):
    """Version and help are there in a fifth of a second: nothing is imported to do the work."""
    code = f"""
import sys
sys.argv = ["embedding-proxy", *{arguments!r}]
from embedding_proxy.proxy.__main__ import main
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=_environment(tmp_path, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=True,
    )
    modules = set(done.stderr.split())
    assert "embedding_proxy.proxy.cli.main" in modules
    assert not HEAVY & modules
    assert len(modules) < MAX_MODULES


def test_help_has_the_first_sentence_of_each_command():
    """What `--help` tells without importing a command is what its docstring begins with."""
    seen = 0
    root = typer.main.get_command(main.app)
    for lazy in (root, *(root.commands[name] for name in ("cache", "migrate", "config"))):
        for name, place in lazy.places.items():
            if name not in lazy.commands:
                assert lazy.get_command(None, name).help == place.help
            lazy.load(name)
            text = " ".join(lazy.get_command(None, name).help.partition("\n\n")[0].split())
            assert f"{text} ".startswith(f"{place.help} "), name
            assert lazy.get_command(None, name).name == name
            seen += 1
    assert seen > 14


INTERRUPTED = {
    "version": (["--version"], ["embedding_proxy.proxy.cli.main", "typer", "importlib.metadata"]),
    "stats": (
        ["cache", "stats"],
        ["numpy", "aiohttp", "diskcache", "embedding_proxy.proxy.cli.cache"],
    ),
    "serve": (
        ["serve", "--port", "0"],
        ["pydantic", "yaml", "embedding_proxy.proxy.http.process", "uvloop"],
    ),
    "demo": (["demo"], ["openai", "rich.table"]),
}


@pytest.mark.parametrize(
    ("arguments", "module"),
    [(arguments, one) for arguments, modules in INTERRUPTED.values() for one in modules],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_ctrl_c_amid_imports_is_130_without_a_word(arguments, module, tmp_path):
    """Whatever is being imported, the process ends at once; not even a library's error is shown."""
    code = f"""
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["embedding-proxy", *{arguments!r}]
from embedding_proxy.proxy.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=_environment(tmp_path, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def test_ctrl_c_at_the_very_end_shows_no_traceback(tmp_path):
    """What Python does after the work is interrupted in silence, too."""
    code = """
import atexit, os, signal, sys
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
sys.argv = ["embedding-proxy", "--version"]
from embedding_proxy.proxy.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=_environment(tmp_path, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "")


def test_where_ctrl_c_is_ignored_it_stays_so(monkeypatch):
    """A process that was begun in the background is not ended by it amid an import."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with importing():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with importing():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            assert not gc.isenabled()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def _raised(error: BaseException):
    def run() -> None:
        raise error

    return run


def test_the_demo_succeeds_quietly(run, monkeypatch):
    """A demo that shows what it promises is code 0."""
    monkeypatch.setattr("embedding_proxy.proxy.cli.demo.run", lambda: None)
    assert run("demo") == (0, "", "")


def test_a_demo_that_fails_is_exit_code_1(run, monkeypatch):
    """A demo that does not show what it promises says what is missing."""
    monkeypatch.setattr("embedding_proxy.proxy.cli.demo.run", _raised(DemoFailed("no hits")))
    assert run("demo") == (1, "", "embedding-proxy: demo: no hits\n")


def test_an_interrupted_demo_is_exit_code_130(run, monkeypatch):
    """Ctrl-C is code 130, without a traceback."""
    monkeypatch.setattr("embedding_proxy.proxy.cli.demo.run", _raised(KeyboardInterrupt()))
    code, out, err = run("demo")
    assert code == 130
    assert "Traceback" not in out + err


def test_a_demo_without_its_extra_says_how_to_install_it(run, monkeypatch):
    """Without the demo's packages the command says which extra brings them."""
    monkeypatch.delitem(sys.modules, "embedding_proxy.proxy.cli.demo", raising=False)
    monkeypatch.setitem(sys.modules, "openai", None)
    code, _, err = run("demo")
    assert code == 1
    assert err == (
        "embedding-proxy: the demo needs more:"
        " pip install 'wordllama>=0.4' 'openai>=1.60' 'rich>=13.9'\n"
    )
