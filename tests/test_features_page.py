"""tests/features.md: every promised row is there once, and what it names as proof exists."""

import ast
import re
from functools import cache

import pytest
from pages import ROOT, unknown

PAGE = (ROOT / "tests" / "features.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| F")]
PROOFS = {row[0]: re.findall(r"`([^`]+)`|\]\(([^)]+)\)", row[-1]) for row in ROWS}


@cache
def _tests(path: str) -> set[str]:
    """Return the names of the tests in a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, kinds)}


def _missing(proof: str) -> str:
    """Return what of a proof is not there, or nothing."""
    if proof.startswith("embedding-proxy "):
        return unknown(proof)
    if proof.startswith("make "):
        targets = (ROOT / "Makefile").read_text(encoding="utf-8")
        return "" if f"\n{proof.removeprefix('make ')}:" in targets else proof
    path, _, test = proof.partition("::")
    if not (ROOT / path).is_file():
        return path
    return "" if not test or test in _tests(path) else test


def test_every_row_is_there_once():
    """F01 to F73, in order, each with three cells."""
    assert [row[0] for row in ROWS] == [f"F{number:02}" for number in range(1, 74)]
    assert {len(row) for row in ROWS} == {3}


@pytest.mark.parametrize("row", PROOFS)
def test_what_shows_a_row_exists(row):
    """Each test, command, target and file that a row names is there; each row names one."""
    proofs = [span or link.removeprefix("../") for span, link in PROOFS[row]]
    assert proofs
    assert [_missing(proof) for proof in proofs] == [""] * len(proofs)


@pytest.mark.parametrize(
    "proof",
    [
        "embedding-proxy compare --modle",
        "embedding-proxy copy",
        "make nothing",
        "docs/nothing.md",
        "tests/test_faults.py::test_nothing",
    ],
)
def test_what_does_not_exist_is_found(proof):
    """A proof of each sort that is not there is told from those that are."""
    assert _missing(proof)
