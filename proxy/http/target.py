"""Checks request targets (RFC 9112, 3.2): what could be taken for another address is refused. Pure.

A target is a path with its query, or a whole address of http or https, as clients of a forward
proxy send it. Everything else that names a host, or that some server could read as a host, is a
400: a target decides where a passed-through call goes, and the provider's key goes with it.
"""

import re

from embedding_proxy.providers.base import InvalidRequest

from .paths import decoded, may_be_embeddings

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_HTTP = re.compile(r"https?://([^/?#]*)", re.IGNORECASE)


def path_of(target: str) -> str:
    """Return the path and query of a target: that itself, or what follows the host.

    >>> path_of("/v1/files?a=1"), path_of("HTTP://host:1/v1/files")
    ('/v1/files?a=1', '/v1/files')
    """
    found = _HTTP.match(target)
    return target if found is None else target[found.end() :]


def check(method: str, target: str) -> None:
    """Raise InvalidRequest for a target that is neither a path nor an address of http or https.

    A spelling of the embeddings endpoint is let through: its 404 names the right path.
    """
    found = _HTTP.match(target)
    if found is None and _SCHEME.match(target):
        raise _refusal("its scheme is neither http nor https")
    if found is not None and ("@" in found[1] or "\\" in found[1]):
        raise _refusal("its host is preceded by a user name, or holds a backslash")
    if found is None and target == "*" and method == "OPTIONS":
        return
    path = path_of(target).partition("?")[0].partition("#")[0]
    if not path.startswith("/"):
        raise _refusal("it does not begin with a slash")
    if may_be_embeddings(method, target):
        return
    plain = decoded(path)
    if "\\" in plain:
        raise _refusal("it holds a backslash")
    if plain.startswith("//"):
        raise _refusal("it begins with two slashes, as an address without its scheme does")


def _refusal(problem: str) -> InvalidRequest:
    return InvalidRequest(
        f"The request target is not valid: {problem}. Send a path such as /v1/embeddings."
    )
