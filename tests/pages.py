"""What is written in Markdown, for the tests that hold it against what there is."""

import re
from pathlib import Path

import typer
from embedding_proxy.proxy.cli import main
from embedding_proxy.proxy.cli.groups import LazyGroup
from embedding_proxy.proxy.config.loader import load
from embedding_proxy.proxy.config.schema import Settings
from typer.core import TyperGroup

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def fenced(text: str, language: str) -> list[str]:
    """Return the blocks of code in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """Return the commands `embedding-proxy …` in a shell's lines, without what follows them."""
    joined = text.replace("\\\n", " ")
    return [
        found.partition("#")[0].strip()
        for found in re.findall(r"^[^#\n]*?(embedding-proxy .*)", joined, re.MULTILINE)
    ]


def unknown(command: str) -> str:
    """Return the first word of a command that the command line does not know, or nothing.

    >>> unknown("embedding-proxy cache stats --by day --by model")
    ''
    >>> unknown("embedding-proxy cache stats --per day"), unknown("embedding-proxy cash stats")
    ('--per', 'cash')
    """
    # What stands after `--` is another program's.
    _, *words = command.partition(" -- ")[0].split()
    here = typer.main.get_command(main.app)
    while isinstance(here, TyperGroup) and words and not words[0].startswith("-"):
        if isinstance(here, LazyGroup):
            here.load(words[0])
        below = here.commands.get(words[0])
        if below is None:
            return words[0]
        here, words = below, words[1:]
    known = {name for one in here.params for name in (*one.opts, *one.secondary_opts)}
    known.add("--help")
    return next((word for word in words if word.startswith("-") and word not in known), "")


def taken(snippet: str, folder: Path) -> Settings:
    """Return what a configuration comes to, read from a file in this folder. Raises ConfigError."""
    file = folder / "config.yaml"
    file.write_text(snippet, encoding="utf-8")
    return load(file)
