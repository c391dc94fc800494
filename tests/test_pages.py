"""README.md and docs/: configurations load, commands and links exist, messages are real."""

import ast
import asyncio
import re
from functools import cache
from xml.etree import ElementTree as ET

import pytest
import yaml
from pages import PAGES, ROOT, commands, fenced, taken, unknown

CONFIGURATIONS = [
    pytest.param(snippet, id=f"{page.stem}-{number}")
    for page in PAGES
    if page.stem != "providers"  # its own test has the package that it tells of
    for number, snippet in enumerate(fenced(page.read_text(encoding="utf-8"), "yaml"))
    if "text_field:" not in snippet  # that is a file of `migrate --file`, with a test of its own
]
COMMANDS = {
    command: page.name
    for page in PAGES
    for block in fenced(page.read_text(encoding="utf-8"), "sh")
    for command in commands(block)
}
INNER_PAGES = [
    ROOT / "docs" / "architecture.md",
    ROOT / "docs" / "glossary.md",
    ROOT / "docs" / "performance.md",
    ROOT / "CONTRIBUTING.md",
]
"""Those that name files of the code."""
LINKED = [
    *PAGES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "tests" / "features.md",
]
PYTHON = fenced((ROOT / "README.md").read_text(encoding="utf-8"), "python")
TROUBLES = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = [
    message
    for row in TROUBLES.splitlines()
    if row.startswith("| ") and row.count(" | ") == 2
    for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])
    if " " in message and not message.startswith("x-")
]


@cache
def said() -> str:
    """Return all strings of the code, one a line, with … where something is put in."""
    strings = []
    for package in ("proxy", "index", "cache", "providers"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [
                        str(part.value) if isinstance(part, ast.Constant) else "…"
                        for part in node.values
                    ]
                    strings.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    strings.append(re.sub(r"%[.\d]*[sdrf]", "…", node.value))
    return "\n".join(string.replace("\n", " ").replace("`", "") for string in strings)


def test_there_is_something_to_look_at():
    """Snippets, commands and messages are found, so that nothing is proved of none."""
    assert len(CONFIGURATIONS) > 10
    assert len(COMMANDS) > 20
    assert len(MESSAGES) > 40
    assert len(PYTHON) == 3


@pytest.mark.parametrize("snippet", CONFIGURATIONS)
def test_every_configuration_loads(snippet, tmp_path, monkeypatch):
    """What is shown is taken as it stands, whatever the variables it names hold."""
    for name in re.findall(r"\$\{(\w+)\}", snippet):
        monkeypatch.setenv(name, f"a-{name}")
    settings = taken(snippet, tmp_path)
    for name in yaml.safe_load(snippet).get("models", {}):
        assert settings.models[name].routes


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists(command):
    """Each command of a shell's lines is known, with its options."""
    assert unknown(command) == ""


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_is_one_that_the_code_says(message):
    """What a user would search for is what the proxy says, word for word."""
    assert message in said()


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.stem)
def test_every_link_leads_to_a_file(page):
    """Relative links lead to what is there, and their anchors to a heading."""
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text)
    wrong = []
    for path, anchor in links:
        target = page.parent / path if path else page
        if not target.exists():
            wrong.append(path)
        elif anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            wrong += [] if anchor in slugs else [f"{path}#{anchor}"]
    assert wrong == []


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.stem)
def test_no_table_is_split(page):
    """Each block of rows begins with its titles and the line below them, and all rows are equal."""
    text = re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    for block in re.findall(r"(?:^ *\|.*\n?)+", text, re.MULTILINE):
        titles, line, *rows = [*block.splitlines(), ""]
        assert re.fullmatch(r" *\|( *:?-+:? *\|)+", line), f"no titles: {titles[:100]}"
        for row in rows:
            count = len(re.findall(r"(?<!\\)\|", titles))
            assert not row or len(re.findall(r"(?<!\\)\|", row)) == count, row[:100]


@pytest.mark.parametrize("code", PYTHON, ids=["client", "blocking", "service"])
async def test_the_python_of_the_readme_runs(code, upstream, start_proxy, monkeypatch):
    """The snippets do what they show, as they stand: the client's through a proxy."""
    proxy = await start_proxy(openai=upstream)
    monkeypatch.setenv("OPENAI_BASE_URL", proxy.url)
    names = {}
    compiled = compile(code, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if "await" in code:
        await eval(compiled, names)
    else:
        await asyncio.to_thread(eval, compiled, names)
    if "result" in names:
        assert names["result"].vectors.shape == (1, 128 if "await" in code else 256)
    else:
        names["client"].close()
        assert len(names["reply"].data) == len(upstream.calls) == 1


@pytest.mark.parametrize("page", INNER_PAGES, ids=lambda page: page.stem)
def test_every_file_that_a_page_names_is_there(page):
    """Paths in backquotes, from the root of the repository, are files or folders."""
    told = re.findall(r"`([a-z_]+/[\w./]*)`", page.read_text(encoding="utf-8"))
    assert [path for path in told if not (ROOT / path).exists()] == []


def test_the_architecture_names_every_folder():
    """The picture is on the page, and each folder of the packages has its row."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    ET.parse(ROOT / "docs" / "architecture.svg")
    assert "](architecture.svg)" in page
    assert len(re.findall(r"`[a-z_]+/[\w./]*`", page)) > 60
    for package in ("proxy", "index", "cache", "providers"):
        folders = {file.parent for file in (ROOT / package).rglob("*.py")} - {ROOT / "proxy"}
        names = [f"| `{folder.relative_to(ROOT).as_posix()}/` |" for folder in folders]
        assert [name for name in names if name not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_numbers_of_targets_stay_on_their_page(page):
    """Other pages give figures in words; only docs/performance.md numbers its targets."""
    numbers = re.findall(r"\bT\d+\b", page.read_text(encoding="utf-8"))
    assert bool(numbers) == (page.stem == "performance")


def test_links_of_the_readme_name_every_page():
    """A page that nobody finds is not read: the README links to each."""
    readme = PAGES[0].read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []
