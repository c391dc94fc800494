"""TLS for clients: a certificate and its key from files, which a reload reads anew."""

import logging
import ssl

from embedding_proxy.proxy.config.errors import ConfigError
from embedding_proxy.proxy.config.schema import Tls


def make_context(tls: Tls) -> ssl.SSLContext:
    """Return what connections are encrypted with. Raises ConfigError."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    # TLS has no half-closed connections. asyncio warns of each where plain ones may be half closed.
    logging.getLogger("asyncio").addFilter(_is_of_use)
    load(context, tls)
    return context


def _is_of_use(record: logging.LogRecord) -> bool:
    return "returning true from eof_received()" not in record.getMessage()


def load(context: ssl.SSLContext, tls: Tls) -> None:
    """Take a certificate and its key; open connections keep theirs. Raises ConfigError.

    The pair is tried first, so that a wrong one does not replace a right one.
    """
    found = problem(tls)
    if found is not None:
        key, message = found
        raise ConfigError(f"server.tls{key and '.'}{key}: {message}")
    context.load_cert_chain(tls.cert, tls.key, _no_passphrase)


def problem(tls: Tls) -> tuple[str, str] | None:
    """Return what is wrong with the files: the key of the section, "" for both, and a message."""
    for key, path in (("cert", tls.cert), ("key", tls.key)):
        try:
            path.read_bytes()
        except OSError as error:
            reason = f"{path} cannot be read: {error.strerror}"
            return key, f"{reason}; name a PEM file that this user may read"
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(tls.cert, tls.key, _no_passphrase)
    except (ssl.SSLError, OSError) as error:
        reason = str(getattr(error, "reason", "") or error).replace("_", " ").lower()
        return "", (
            f"{tls.cert} and {tls.key} are no certificate and its key ({reason}); give PEM files"
            " that belong together, the key without a passphrase"
        )
    return None


def _no_passphrase() -> str:
    """Keep OpenSSL from asking for a passphrase on the terminal."""
    return ""
