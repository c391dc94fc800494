"""Checks request targets (RFC 9112, 3.2), and recognises the embeddings endpoint in them. Pure.

A target is a path with its query, or a whole address of http or https, as clients of a forward
proxy send it. Everything else that names a host, or that some server could read as a host, gets
a 400: a target decides where a passed-through call goes, and the provider's key goes with it.

Calls for embeddings go through the cache, or nowhere. An upstream may read a path more freely than
this proxy does: it may decode it twice, merge slashes, fold case, drop parameters. So a path that
any such reading leads to `embeddings` is never passed on with the provider's key; it gets a 404
that names the right path.
"""

import re
import unicodedata
from urllib.parse import unquote

from embedding_proxy.providers.errors import InvalidRequest

REMEDY = "embeddings are at POST /v1/embeddings"
_MAX_DECODINGS = 8
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_HTTP = re.compile(r"https?://([^/?#]*)", re.IGNORECASE)
_SCHEME_AND_HOST = re.compile(r"^[a-z][a-z0-9+.-]*://[^/?#\\]*", re.IGNORECASE)
_UNICODE_ESCAPE = re.compile(r"%u([0-9a-f]{4})", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_EDGES = re.compile(r"^[^a-z0-9]+|[^a-z0-9]+$")
_ENDPOINT = "embeddings"


def path_of(target: str) -> str:
    """Return the path and query of a target: that itself, or what follows the host.

    >>> path_of("/v1/files?a=1"), path_of("HTTP://host:1/v1/files")
    ('/v1/files?a=1', '/v1/files')
    """
    match = _HTTP.match(target)
    return target if match is None else target[match.end() :]


def check(method: str, target: str) -> None:
    """Raise InvalidRequest for a target that is neither a path nor an address of http or https.

    A spelling of the embeddings endpoint is let through: its 404 names the right path.
    """
    match = _HTTP.match(target)
    if match is None and _SCHEME.match(target):
        raise _refusal("its scheme is neither http nor https")
    if match is not None and ("@" in match[1] or "\\" in match[1]):
        raise _refusal("its host is preceded by a user name, or holds a backslash")
    if match is None and target == "*" and method == "OPTIONS":
        return
    path = path_of(target).partition("?")[0].partition("#")[0]
    if not path.startswith("/"):
        raise _refusal("it does not begin with a slash")
    if may_be_embeddings(method, target):
        return
    plain = decode_path(path)
    if "\\" in plain:
        raise _refusal("it holds a backslash")
    if plain.startswith("//"):
        raise _refusal("it begins with two slashes, as an address without its scheme does")


def _refusal(problem: str) -> InvalidRequest:
    return InvalidRequest(
        f"The request target is not valid: {problem}. Send a path such as /v1/embeddings."
    )


def may_be_embeddings(method: str, target: str) -> bool:
    """Tell whether a server could take a request for one to its embeddings endpoint.

    `target` is the request target as it was sent: a path and a query, or a whole address.
    OpenRouter lists its models at `GET /embeddings/models`; that does not count.

    >>> may_be_embeddings("POST", "/v1//%2565mbeddings;v=1"), may_be_embeddings("POST", "/v1/files")
    (True, False)
    """
    path = _SCHEME_AND_HOST.sub("", target).partition("?")[0].partition("#")[0]
    plain = decode_path(path)
    if _CONTROL.search(plain):
        # Where a server ends the path at such a character cannot be known.
        return True
    segments = [_plain_segment(segment) for segment in re.split(r"[/\\?#]", plain)]
    segments = [segment for segment in segments if segment]
    if _ENDPOINT not in segments:
        return False
    is_list = segments[-2:] == [_ENDPOINT, "models"] and segments.count(_ENDPOINT) == 1
    return not (is_list and method in ("GET", "HEAD"))


def decode_path(path: str) -> str:
    """Return a path with its percent-encoding undone, however often it was encoded."""
    for _ in range(_MAX_DECODINGS):
        further = _UNICODE_ESCAPE.sub(lambda match: chr(int(match[1], 16)), unquote(path))
        if further == path:
            break
        path = further
    return path


def _plain_segment(segment: str) -> str:
    """Return a segment without parameters, case, and what some servers strip at its ends."""
    name = unicodedata.normalize("NFKC", segment.partition(";")[0]).casefold()
    return _EDGES.sub("", name)
