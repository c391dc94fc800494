"""What the bench writes into pages: between marks, so that the words around are people's."""

import re
from pathlib import Path

from .process import ROOT

PERFORMANCE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
CHART = ROOT / "docs" / "performance.svg"


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of that name. Raises ValueError without them."""
    page.write_text(between(page.read_text(encoding="utf-8"), name, text), encoding="utf-8")


def between(page: str, name: str, text: str) -> str:
    r"""Return a page with new text between two marks.

    >>> between("a\n<!-- bench: x -->\nold\n<!-- end -->\nb", "x", "new")
    'a\n<!-- bench: x -->\nnew\n<!-- end -->\nb'
    """
    marks = re.compile(rf"(<!-- bench: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not marks.search(page):
        raise ValueError(f"no place for {name!r} on the page")
    return marks.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page, count=1)
