"""What reads foreign bytes takes a time that grows with their number, not with its square."""

import ast
import importlib
import pkgutil
import re
import time
import tracemalloc
from collections import deque
from functools import cache
from pathlib import Path

import orjson
import pytest
from embedding_proxy.providers.redaction import QuotedInputs, Redactor, decodings
from embedding_proxy.providers.upstream.error_reply import refusal
from embedding_proxy.proxy import log
from embedding_proxy.proxy.config import references
from embedding_proxy.proxy.config import references as file_path
from embedding_proxy.proxy.config.errors import hide_keys
from embedding_proxy.proxy.http.target import may_be_embeddings
from embedding_proxy.proxy.service import cache_policy

ROOT = Path(__file__).parents[2]
PACKAGES = ("proxy", "index", "cache", "providers")
MEGABYTE = 1 << 20
KEY = "sk-canary-0123456789"

PIECES = {
    "blanks": " ",
    "one letter": "a",
    "one digit": "1",
    "quotes": '"',
    "base64": "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo0",
    "Japanese": "今日は朝から雨が降っているので、家で本を読みます。",
    "stars": "*",
    "keys": "sk-canary-***",
    "newlines": "\r\ncontent-length: 0",
}
TEXTS = tuple(PIECES.values())
METHODS = ("search", "match", "fullmatch", "sub", "split", "findall", "finditer")


def _used(tree):
    """Yield the pattern, or the name that holds it, and the method, of each use of `re`."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        holder, method = node.func.value, node.func.attr
        if method not in METHODS:
            continue
        if isinstance(holder, ast.Name) and holder.id == "re" and node.args:
            if isinstance(node.args[0], ast.Constant):
                yield node.args[0].value, method
        elif isinstance(holder, ast.Name):
            yield "=" + holder.id, method


def _held(module):
    """Yield the patterns that a module holds, alone or in a mapping, with their names."""
    for name, value in vars(module).items():
        for one in value.values() if isinstance(value, dict) else [value]:
            if isinstance(one, re.Pattern):
                yield name, one


@cache
def _patterns():
    """Return every pattern of the packages with the methods by which it is applied."""
    found = {}
    for package in PACKAGES:
        for info in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            if info.ispkg or info.name == "proxy.__main__":
                continue
            module = importlib.import_module(info.name)
            source = Path(module.__file__).read_text(encoding="utf-8")
            uses = list(_used(ast.parse(source)))
            for what, method in uses:
                if isinstance(what, bytes) or not what.startswith("="):
                    found.setdefault(re.compile(what), set()).add(method)
            for name, pattern in _held(module):
                methods = {method for what, method in uses if what == "=" + name}
                # One that is handed on is applied in every way.
                found.setdefault(pattern, set()).update(methods or {"search", "match"})
    return found


NOT_FOREIGN = {references._REFERENCE, file_path._VARIABLE}
"""What reads the operator's own files alone."""


def _seconds(work, text, runs=1):
    """Return the least processor time of some runs."""
    spent = []
    for _ in range(runs):
        begun = time.process_time()
        work(text)
        spent.append(time.process_time() - begun)
    return min(spent)


SCALES = (512, 64, 8)
"""A megabyte by each of these is read of every piece; then a megabyte of the slowest."""


def _is_linear(work, pieces=TEXTS, scales=SCALES):
    """Tell whether eight times the text takes less than 24 times as long, up to a megabyte.

    A quadratic reader takes 64 times as long. It is found out at a few kilobytes, so the test ends.
    What takes less than ten milliseconds is not compared; what seems slow is measured again. The
    last step may take 48 times as long: a megabyte does not lie in the processor's caches.
    """
    slowest = (0.0, pieces[0])
    for piece in pieces:
        text, spent = _text(piece, scales[0]), 0.0
        before = _seconds(work, text)
        for scale in scales[1:]:
            longer = _text(piece, scale)
            spent = _seconds(work, longer)
            if _is_too_slow(work, text, longer, before, spent, 24):
                return False
            text, before = longer, spent
        slowest = max(slowest, (spent, piece))
    shorter, longer = _text(slowest[1], scales[-1]), _text(slowest[1], 1)
    return not _is_too_slow(work, shorter, longer, slowest[0], _seconds(work, longer), 48)


def _text(piece, scale):
    return piece * (MEGABYTE // scale // len(piece) + 1)


def _is_too_slow(work, shorter, longer, before, spent, times):  # noqa: PLR0917 - two measures
    if spent <= max(0.01, times * max(before, 0.0002)):
        return False
    before, spent = _seconds(work, shorter, 3), _seconds(work, longer, 3)
    return spent > max(0.01, times * max(before, 0.0002))


def _applied(pattern, method):
    def work(text):
        text = text.encode() if isinstance(pattern.pattern, bytes) else text
        if method == "sub":
            pattern.sub(type(text)(), text)
        elif method == "finditer":
            for _ in pattern.finditer(text):
                pass
        else:
            getattr(pattern, method)(text)

    return work


def test_the_patterns_are_found():
    """There are some dozens, those of flags and bytes among them."""
    assert len(_patterns()) > 50
    assert any(isinstance(one.pattern, bytes) for one in _patterns())


def test_a_quadratic_pattern_is_found_out():
    """The measure tells the pattern that once froze the proxy from a linear one."""
    assert not _is_linear(_applied(re.compile(r"[^\s]*\*{3}"), "search"), ("a",), (2048, 256))
    assert _is_linear(_applied(re.compile(r"(?<!\S)\S*+\*{3}"), "search"))


@pytest.mark.untraced
def test_every_pattern_reads_a_megabyte_in_linear_time():
    """Each regular expression, applied as the code applies it, to each of the texts."""
    slow = {
        (pattern.pattern, method)
        for pattern, methods in _patterns().items()
        if pattern not in NOT_FOREIGN
        for method in methods
        if not _is_linear(_applied(pattern, method))
    }
    assert not slow


READERS = {
    "redaction": lambda text: Redactor(KEY).redact_text(text + KEY),
    "redaction of masks": lambda text: Redactor(KEY, every_mask=True).redact(text.encode()),
    "redaction of a stream": lambda text: Redactor(KEY).stream().feed(text.encode()),
    "an error as text": lambda text: refusal("acme", 400, {}, text.encode()),
    "an error as JSON": lambda text: refusal(
        "acme",
        422,
        {},
        orjson.dumps({"error": {"message": text, "code": text}}),
        redact=Redactor(KEY).redact_text,
    ),
    "decoding": lambda text: deque(decodings(text), maxlen=0),
    "a text that quotes": lambda text: QuotedInputs(["an input of the call"]).hide(text[:4096]),
    "a text that is quoted": lambda text: QuotedInputs([text]).hide("wrong: " + text[:400]),
    "a record of the log": lambda text: log.escape(log.hide_credentials(text)),
    "an error of the configuration": hide_keys,
    "Cache-Control": cache_policy.parse_cache_control,
    "a path": lambda text: may_be_embeddings("POST", "/v1/" + text),
}


@pytest.mark.untraced
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_reads_a_megabyte_in_linear_time(reader):
    """What is built from the expressions is linear as well."""
    assert _is_linear(READERS[reader])


@pytest.mark.untraced
def test_a_quotation_from_a_long_text_copies_little_of_it():
    """Of each place where a message quotes megabytes, no more is copied than it quotes."""
    quoted = QuotedInputs(["a" * 16 * MEGABYTE])
    assert quoted.hide("the first message prepares what is searched") != ""
    tracemalloc.start()
    try:
        assert "a" not in quoted.hide("a" * 4096)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEGABYTE


@pytest.mark.parametrize("encoded", ["%2525", "&amp;amp;", r"\\u0041", "QUFBQUFBQUFBQUFB", "41 "])
def test_what_is_encoded_over_and_over_is_read_in_linear_time(encoded):
    """Each layer of an encoding is read; of all together there is a bound."""
    assert _is_linear(lambda text: deque(decodings(text), maxlen=0), (encoded,))
    assert sum(map(len, decodings(encoded * 200_000))) < 8 * len(encoded) * 200_000
