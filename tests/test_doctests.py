"""The examples in docstrings hold."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("proxy", "index", "cache", "providers")
FILES = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
MODULES = {
    "embedding_proxy." + file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for file in FILES
    if ">>> " in file.read_text(encoding="utf-8")
}


def test_there_are_examples():
    """They are found where they are looked for."""
    assert len(MODULES) > 10


@pytest.mark.parametrize("name", sorted(MODULES))
def test_examples_hold(name):
    """Each prints what stands below it."""
    module = importlib.import_module(name.removesuffix(".__init__"))
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed
