"""Says in one line why a call over HTTP failed: which step, and which host.

Hosts and ports are shown. URLs, headers and credentials are not: the texts of aiohttp's own errors
hold them, so none of these is repeated.
"""

import errno
import socket
import ssl

import aiohttp

from .base_url import ForeignOrigin

PROXY_CREDENTIALS_REFUSED = "HTTP proxy: it refuses the credentials, or wants some (407)"

_NO_SUCH_HOST = {
    getattr(socket, name)
    for name in ("EAI_NONAME", "EAI_NODATA", "EAI_ADDRFAMILY")
    if hasattr(socket, name)
}
_NO_ROUTE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN}

# OpenSSL's X509_V_ERR_…: the reasons that an operator can do something about.
_CERTIFICATE = {
    9: "it is not valid yet",
    10: "it has expired",
    18: "it is self-signed",
    19: "its chain ends in a self-signed certificate that is not trusted",
    20: "its issuer is not known",
    21: "its issuer is not known",
    62: "it is for another host name",
    64: "it is for another IP address",
}
_UNKNOWN_ISSUER = {18, 19, 20, 21}


def reason(  # noqa: C901, PLR0911, PLR0912 - one case for each kind of failure
    error: BaseException, received: int | None = None
) -> str:
    """Return why a call failed, for people: one line without a final stop.

    `received` is how many bytes of the reply's body had arrived; None = not even its headers.
    """
    if received is not None:
        return f"reply broke off after {received:,} bytes"
    match error:
        case ForeignOrigin():
            return f"the call was not sent: {error}"
        case aiohttp.ClientConnectorCertificateError():
            return _certificate(error.certificate_error, _place(error))
        case aiohttp.ClientConnectorSSLError():
            return _tls(error, _place(error))
        case aiohttp.ClientConnectorDNSError():
            if error.os_error.errno in _NO_SUCH_HOST:
                return f"no such host: {error.host}"
            return f"the host name {error.host} could not be resolved"
        case aiohttp.ClientProxyConnectionError():
            return f"HTTP proxy: {_connect(error)}"
        case aiohttp.ClientConnectorError():
            return _connect(error)
        case aiohttp.ClientHttpProxyError(status=407):
            return PROXY_CREDENTIALS_REFUSED
        case aiohttp.ClientHttpProxyError():
            return f"HTTP proxy: the tunnel was refused with status {error.status}"
        case aiohttp.ClientResponseError():
            return _not_http(error.message)
        case aiohttp.ServerDisconnectedError():
            return "server disconnected without an answer"
        case ssl.SSLCertVerificationError():
            return _certificate(error, "")
        case ssl.SSLError():
            return _tls(error, "")
        case aiohttp.ClientPayloadError():
            return "reply broke off"
        case TimeoutError():
            return "timed out"
        case OSError():
            return _lost(error)
        case _:
            return "connection failed"


def is_final(error: BaseException) -> bool:
    """Tell whether the same call would fail again in the same way.

    So it is where the headers of a reply are larger than aiohttp takes (and each such reply is
    charged), where an HTTP proxy wants other credentials, and where a call would leave its origin.
    """
    if isinstance(error, ForeignOrigin):
        return True
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return error.status == 407
    return isinstance(error, aiohttp.ClientResponseError) and _is_oversize(error.message)


def _is_oversize(message: str) -> bool:
    return message.startswith(("Got more than", "Too many headers"))


def _place(error: aiohttp.ClientConnectorError) -> str:
    host = error.host
    return f"{f'[{host}]' if ':' in host else host}:{error.port}"


def _connect(error: aiohttp.ClientConnectorError) -> str:
    """Say why there is no TCP connection."""
    number, place = error.os_error.errno, _place(error)
    if number == errno.ECONNREFUSED or "refused" in str(error.os_error).lower():
        return f"connection refused by {place}"
    if number == errno.ETIMEDOUT:
        return f"connection timed out to {place}"
    if number in _NO_ROUTE:
        return f"no route to {place}"
    if number == errno.ECONNRESET:
        return f"connection reset by {place}"
    if number == errno.EMFILE:
        return f"no connection to {place}: too many open files (ulimit -n)"
    return f"no connection to {place}"


def _certificate(error: BaseException, place: str) -> str:
    code = getattr(error, "verify_code", None)
    why = _CERTIFICATE.get(code or 0) or getattr(error, "verify_message", "") or "it is not valid"
    remedy = "; name its CA in ca_file, if it is yours" if code in _UNKNOWN_ISSUER else ""
    where = f" ({place})" if place else ""
    return f"certificate not trusted: {why}{where}{remedy}"


def _tls(error: ssl.SSLError | aiohttp.ClientConnectorSSLError, place: str) -> str:
    source = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    why = str(getattr(source, "reason", None) or "").replace("_", " ").lower()
    to = f" with {place}" if place else ""
    if why in ("wrong version number", "record layer failure", "http request"):
        return f"TLS handshake failed{to}: the server does not speak TLS there"
    return f"TLS handshake failed{to}: {why}" if why else f"TLS handshake failed{to}"


def _not_http(message: str) -> str:
    """Say what is wrong with a reply that is no HTTP; what it holds is not quoted."""
    if _is_oversize(message):
        return "reply headers too large"
    first = (message.splitlines() or [""])[0].partition(":")[0].partition(" b'")[0].strip()
    if not first or first.startswith(("Bad status line", "Bad Request")):
        return "reply is not HTTP: bad status line"
    return f"reply is not valid HTTP: {first}"


def _lost(error: OSError) -> str:
    """Say how a connection that there was ended."""
    if isinstance(error, ConnectionResetError) or error.errno == errno.ECONNRESET:
        return "connection reset"
    if isinstance(error, BrokenPipeError) or error.errno == errno.EPIPE:
        return "connection closed while the request was sent"
    if error.errno == errno.ETIMEDOUT:
        return "connection timed out"
    return "connection lost"
