"""Reads the content coding of a reply (RFC 9110, 8.4): gzip, deflate, and br and zstd if installed.

The bytes decide, not the header: servers and gateways label plain JSON as gzip, and gzip as
nothing. Decoding is incremental and bounded: `Decoder.feed` yields pieces of at most `PIECE` bytes,
so a caller can stop at a limit (a decompression bomb) and let the event loop run in between.
"""

import importlib
import zlib
from collections.abc import Iterator
from typing import Any, Protocol

PIECE = 1 << 18
"""Bytes decoded at a time, at most: well under a millisecond of work."""
MAX_MEMBERS = 1024
"""Members of a gzip stream, or frames of a zstd stream, in one reply."""

_SNIFFED = 16
"""Bytes that are looked at to tell plain JSON from compressed data."""
_GZIP, _ZSTD, _BOM = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xef\xbb\xbf"
_PRINTABLE = frozenset(range(0x20, 0x7F)) | {0x09, 0x0A, 0x0D}
_MAX_NAMES = 4
# Of the IANA's list of content codings, and what is said in their place.
_REGISTERED = frozenset({
    "aes128gcm", "br", "bzip2", "compress", "dcb", "dcz", "deflate", "exi", "gzip", "pack200-gzip",
    "snappy", "utf-8", "x-bzip2", "x-compress", "x-gzip", "zlib", "zstd",
})  # fmt: skip


class DecodeError(Exception):
    """The reply could not be decoded; the message names the content-encoding."""


class _Stream(Protocol):
    """One compressed stream, decoded piece by piece."""

    is_finished: bool
    rest: bytes
    """What follows the end of the stream."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what `data` decodes to, in pieces of at most PIECE bytes."""
        ...


class _Zlib:
    """gzip, zlib or raw deflate; `wbits` says which."""

    def __init__(self, wbits: int) -> None:
        self._zlib = zlib.decompressobj(wbits)
        self.is_finished = False
        self.rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        while not self.is_finished:
            piece = self._zlib.decompress(data, PIECE)
            data = self._zlib.unconsumed_tail
            self.is_finished, self.rest = self._zlib.eof, self._zlib.unused_data
            if piece:
                yield piece
            if not data and len(piece) < PIECE:
                return


class _Zstd:
    """Of the standard library (3.14), or of backports.zstd: both have the same interface."""

    def __init__(self) -> None:
        self._zstd = _zstd.ZstdDecompressor()
        self.is_finished = False
        self.rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        while True:
            piece = self._zstd.decompress(data, PIECE)
            data = b""
            if piece:
                yield piece
            if self._zstd.eof:
                self.is_finished, self.rest = True, self._zstd.unused_data
                return
            if self._zstd.needs_input:
                return


class _Brotli:
    """Of Brotli or brotlicffi, 1.2 or later: older ones cannot bound what they put out."""

    def __init__(self) -> None:
        self._brotli = _brotli.Decompressor()
        self.is_finished = False
        self.rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        while not self.is_finished:
            piece = self._brotli.process(data, output_buffer_limit=PIECE)
            data = b""
            self.is_finished = self._brotli.is_finished()
            if piece:
                yield piece
            if self._brotli.can_accept_more_data():
                return


def _module(*names: str) -> Any:  # noqa: ANN401 - a module that may not be installed
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def _is_bounded(brotli: Any) -> bool:  # noqa: ANN401
    return brotli is not None and hasattr(brotli.Decompressor, "can_accept_more_data")


_brotli = _module("brotlicffi", "brotli")
if not _is_bounded(_brotli):
    _brotli = None
_zstd = _module("compression.zstd", "backports.zstd")

_ERRORS: tuple[type[Exception], ...] = (
    zlib.error,
    *((_brotli.error,) if _brotli else ()),
    *((_zstd.ZstdError,) if _zstd else ()),
)

ACCEPT_ENCODING = ", ".join(
    ["gzip", "deflate", *(["br"] if _brotli else []), *(["zstd"] if _zstd else [])]
)
"""What is asked for: the content codings that can be read here."""


class Decoder:
    """Decodes one reply. Use `feed` for each chunk as it arrives, then `finish`."""

    def __init__(self, content_encoding: str = "") -> None:
        """`content_encoding` is the header's value; it decides only where the bytes do not."""
        names = [name.strip().lower() for name in content_encoding.split(",")]
        self._names = [name for name in names if name not in ("", "identity", "none")]
        self._head: bytes | None = b""
        self._is_plain = False
        self._stream: _Stream | None = None
        self._coding = ""
        self._members = 0
        self._between = b""

    @property
    def label(self) -> str:
        """The content-encoding as it may be shown: what the header says, else what was found.

        A name that is no content coding may be anything, and is not repeated.
        """
        named = [name if name in _REGISTERED else "unknown" for name in self._names]
        return ", ".join(named[:_MAX_NAMES]) or self._coding or "none"

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield what a chunk decodes to, in pieces. Raises DecodeError."""
        if self._head is not None:
            self._head += chunk
            if len(self._head) < _SNIFFED:
                return
            chunk = self._begin()
        yield from self._decode(chunk)

    def finish(self) -> Iterator[bytes]:
        """Yield what is left at the end of the reply. Raises DecodeError if it is cut short."""
        if self._head:
            yield from self._decode(self._begin())
        if self._stream is not None and not self._stream.is_finished:
            raise self._failure()

    def _begin(self) -> bytes:
        """Decide on the coding by the first bytes, and return them."""
        head, self._head = self._head or b"", None
        self._coding = self._coding_of(head)
        if self._coding == "identity":
            self._is_plain = True
        else:
            self._stream = self._open()
        return head

    def _coding_of(self, head: bytes) -> str:
        """Return the content coding of a reply that begins so. Raises DecodeError."""
        if head.startswith(_GZIP):
            return "gzip"
        if head.startswith(_ZSTD):
            return "zstd"
        if not self._names or _is_json(head):
            return "identity"
        name = self._names[0]
        if len(self._names) == 1:
            if name in ("gzip", "x-gzip", "deflate") and _is_zlib(head):
                return "zlib"
            if name in ("deflate", "br"):
                return name
        raise self._failure()

    def _open(self) -> _Stream:
        """Return a decoder of the next stream. Raises DecodeError for what is not installed."""
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise self._failure()
        if self._coding == "zstd" and _zstd:
            return _Zstd()
        if self._coding == "br" and _brotli:
            return _Brotli()
        wbits = {
            "gzip": zlib.MAX_WBITS | 16,
            "zlib": zlib.MAX_WBITS,
            "deflate": -zlib.MAX_WBITS,
        }
        if self._coding not in wbits:
            raise self._failure()
        return _Zlib(wbits[self._coding])

    def _decode(self, data: bytes) -> Iterator[bytes]:
        if self._is_plain:
            if data:
                yield data
            return
        while self._stream is not None:
            if self._stream.is_finished:
                # A further member may begin here; what else follows is padding.
                data = self._between + data
                magic = {"gzip": _GZIP, "zstd": _ZSTD}.get(self._coding)
                self._between = data if magic and len(data) < len(magic) else b""
                if self._between or not magic or not data.startswith(magic):
                    return
                self._stream = self._open()
            try:
                yield from self._stream.feed(data)
            except _ERRORS as error:
                raise self._failure() from error
            if not self._stream.is_finished:
                return
            data, self._stream.rest = self._stream.rest, b""

    def _failure(self) -> DecodeError:
        return DecodeError(f"reply could not be decoded (content-encoding {self.label})")


def _is_json(head: bytes) -> bool:
    """Tell whether a reply that begins so is JSON, not compressed data."""
    text = head.removeprefix(_BOM)
    return text.lstrip()[:1] in (b"{", b"[") and _PRINTABLE.issuperset(text)


def _is_zlib(head: bytes) -> bool:
    """Tell whether compressed data begins with the two bytes of RFC 1950."""
    return len(head) > 1 and head[0] & 0x0F == 8 and int.from_bytes(head[:2], "big") % 31 == 0
