"""Paths that a server may take for its embeddings endpoint, however they are spelled. Pure.

Calls for embeddings go through the cache, or nowhere. An upstream may read a path more freely than
this proxy does: it may decode it twice, merge slashes, fold case, drop parameters. So a path that
any such reading leads to `embeddings` is never passed on with the provider's key; it gets a 404
that names the right path.
"""

import re
import unicodedata
from urllib.parse import unquote

REMEDY = "embeddings are at POST /v1/embeddings"

_MAX_DECODINGS = 8
_SCHEME_AND_HOST = re.compile(r"^[a-z][a-z0-9+.-]*://[^/?#\\]*", re.IGNORECASE)
_UNICODE_ESCAPE = re.compile(r"%u([0-9a-f]{4})", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_EDGES = re.compile(r"^[^a-z0-9]+|[^a-z0-9]+$")
_ENDPOINT = "embeddings"


def may_be_embeddings(method: str, target: str) -> bool:
    """Tell whether a server could take a request for one to its embeddings endpoint.

    `target` is the request target as it was sent: a path and a query, or a whole address.
    OpenRouter lists its models at `GET /embeddings/models`; that does not count.

    >>> may_be_embeddings("POST", "/v1//%2565mbeddings;v=1"), may_be_embeddings("POST", "/v1/files")
    (True, False)
    """
    path = _SCHEME_AND_HOST.sub("", target).partition("?")[0].partition("#")[0]
    plain = decoded(path)
    if _CONTROL.search(plain):
        # Where a server ends the path at such a character cannot be known.
        return True
    segments = [_plain(one) for one in re.split(r"[/\\?#]", plain)]
    segments = [one for one in segments if one]
    if _ENDPOINT not in segments:
        return False
    is_list = segments[-2:] == [_ENDPOINT, "models"] and segments.count(_ENDPOINT) == 1
    return not (is_list and method in ("GET", "HEAD"))


def decoded(path: str) -> str:
    """Return a path with its percent-encoding undone, however often it was encoded."""
    for _ in range(_MAX_DECODINGS):
        further = _UNICODE_ESCAPE.sub(lambda found: chr(int(found[1], 16)), unquote(path))
        if further == path:
            break
        path = further
    return path


def _plain(segment: str) -> str:
    """Return a segment without parameters, case, and what some servers strip at its ends."""
    name = unicodedata.normalize("NFKC", segment.partition(";")[0]).casefold()
    return _EDGES.sub("", name)
