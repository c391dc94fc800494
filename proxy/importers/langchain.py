"""Pairs from the folder of LangChain's CacheBackedEmbeddings over a LocalFileStore.

There is one file a vector, a JSON list of numbers, whose path in the folder is a namespace (often
the model's name) and right after it a digest of the text. The texts themselves are not there and
must be given. Both stores, of documents and of queries, are of this form; a namespace is taken for
one model, so where there are several, one has to be chosen.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid5

import orjson
from embedding_proxy.cache.maintenance.import_source import (
    Pair,
    RejectedPair,
    SourceError,
    quote_names,
    to_pair,
    to_text,
)

from .jsonl import TOO_LONG, is_jsonl, lines, need_fields, objects

_UUID_SPACE = UUID(int=1985)
_HEX = "[0-9a-f]"
_DIGEST = re.compile(
    f"(?:{_HEX}{{128}}|{_HEX}{{64}}|{_HEX}{{8}}-{_HEX}{{4}}-5{_HEX}{{3}}-{_HEX}{{4}}-{_HEX}{{12}})$"
)


def _uuid(text: bytes) -> str:
    return str(uuid5(_UUID_SPACE, hashlib.sha1(text, usedforsecurity=False).hexdigest()))


_ENCODERS: dict[int, tuple[Callable[[bytes], str], ...]] = {
    36: (_uuid,),
    64: (lambda text: hashlib.sha256(text).hexdigest(),),
    128: (
        lambda text: hashlib.blake2b(text).hexdigest(),
        lambda text: hashlib.sha512(text).hexdigest(),
    ),
}
"""LangChain's own key encoders, by the length of a digest; once, the first was the only one."""


class LangChain:
    """The vectors in a folder of those texts that are given, in the order of the texts.

    `texts` is a file: JSONL with the text in a field, if its name ends so, else one text a line,
    which then cannot hold a line break.
    """

    def __init__(
        self, folder: Path, texts: Path, text: str = "text", namespace: str | None = None
    ) -> None:
        self.name = str(folder)
        self._folder = folder
        self._texts = texts
        self._field = text
        counts = self._scan()
        namespaces = {name for name, _ in counts}
        if not counts:
            raise SourceError(f"{folder} holds no file that is named as LangChain names a vector's")
        if namespace is None and len(namespaces) > 1:
            raise SourceError(
                f"{folder} holds vectors of several namespaces: {quote_names(namespaces)}; "
                "name one with --vector-field"
            )
        self._namespace = namespaces.pop() if namespace is None else namespace
        sizes = {size: n for (name, size), n in counts.items() if name == self._namespace}
        if not sizes:
            raise SourceError(
                f"{folder} has no namespace `{namespace}`; namespaces: {quote_names(namespaces)}"
            )
        self.files = sum(sizes.values())
        """How many vectors of the namespace there are; texts may be missing for some."""
        self._encoders = [encoder for size in sorted(sizes) for encoder in _ENCODERS[size]]
        if is_jsonl(texts):
            need_fields(texts, text)
        else:
            next(lines(texts), None)

    def __iter__(self) -> Iterator[Pair | RejectedPair]:
        for item in self._each_text():
            if isinstance(item, RejectedPair):
                yield item
                continue
            where, text = item
            if (content := self._look_up(text)) is None:
                yield RejectedPair(where, "no vector in the folder")
            else:
                try:
                    yield to_pair(where, text, orjson.loads(content))
                except orjson.JSONDecodeError as error:
                    yield RejectedPair(where, f"its file is not JSON: {error}")

    def _scan(self) -> Counter[tuple[str, int]]:
        """Count the files by namespace and length of the digest; names are not kept."""
        counts: Counter[tuple[str, int]] = Counter()
        folders = [""]
        try:
            while folders:
                inside = folders.pop()
                with os.scandir(self._folder / inside) as entries:
                    for entry in entries:
                        name = inside + entry.name
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(f"{name}/")
                        elif digest := _DIGEST.search(name):
                            counts[name[: digest.start()], len(digest[0])] += 1
        except OSError as error:
            raise SourceError(f"{self.name} cannot be read: {error.strerror}") from error
        return counts

    def _look_up(self, text: str) -> bytes | None:
        data = text.encode()
        for encode in self._encoders:
            try:
                return (self._folder / (self._namespace + encode(data))).read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise SourceError(f"{self.name} cannot be read: {error.strerror}") from error
        return None

    def _each_text(self) -> Iterator[tuple[str, str] | RejectedPair]:
        for item in self._read_texts():
            if isinstance(item, RejectedPair):
                yield item
            else:
                where, text = item[0], to_text(*item)
                yield text if isinstance(text, RejectedPair) else (where, text)

    def _read_texts(self) -> Iterator[tuple[str, object] | RejectedPair]:
        if is_jsonl(self._texts):
            for item in objects(self._texts, self._field):
                yield item if isinstance(item, RejectedPair) else (item[0], item[1][self._field])
            return
        for number, line in lines(self._texts):
            where = f"line {number}"
            try:
                yield RejectedPair(where, TOO_LONG) if line is None else (where, line.decode())
            except UnicodeDecodeError:
                yield RejectedPair(where, "the text is not UTF-8")
