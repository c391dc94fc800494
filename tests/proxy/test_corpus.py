"""The demo's text: docstrings that every Python brings along."""

import pytest
from embedding_proxy.proxy.diagnostics import sample_texts
from embedding_proxy.proxy.diagnostics.sample_texts import Docstring, standard_library

MODULE = '''"""What this module is about, in words."""


class Thing:
    """A thing that has
        an indented line.
    """

    async def act(self):
        """Do what things do when asked."""

        def inner():
            """This one is hidden inside a function."""

    def short(self):
        """Too short."""


def plain():
    return "no docstring, only a string"
'''

FILES = {
    "pkg/__init__.py": '"""The package that holds it all."""',
    "pkg/mod.py": MODULE,
    "a.py": '"""The first of all the modules."""\nprint("\\d")\n',
    "pkg/test/x.py": '"""Tests are not about the library."""',
    "tests/y.py": '"""Tests are not about the library."""',
    "site-packages/z.py": '"""Not from the standard library at all."""',
    "broken.py": '"""Never closed, and never read',
    "null.py": '"""With a null byte inside it \0."""',
    "latin.py": '"""Not UTF-8, as it says: é."""',
    "notes.txt": '"""Not a Python file, this one."""',
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Give a standard library of a few files, some of them unreadable."""
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode("latin-1"))
    (tmp_path / "folder.py").mkdir()
    monkeypatch.setattr(sample_texts.sysconfig, "get_path", lambda _: str(tmp_path))


# An invalid escape is a SyntaxWarning from Python 3.12 on; before, one that is not shown.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_docstrings_are_found_by_name(library):
    """Modules, classes and methods are found, in order; tests, fragments and broken files not."""
    assert standard_library() == [
        Docstring("a", "The first of all the modules."),
        Docstring("pkg", "The package that holds it all."),
        Docstring("pkg.mod", "What this module is about, in words."),
        Docstring("pkg.mod.Thing", "A thing that has\nan indented line."),
        Docstring("pkg.mod.Thing.act", "Do what things do when asked."),
        Docstring(
            "pkg.mod.Thing.act.inner",
            "This one is hidden inside a function.",
        ),
    ]


def test_the_real_library_is_where_it_is_looked_for():
    """A module that every Python has gives its docstring, under its own name."""
    root = sample_texts.Path(sample_texts.sysconfig.get_path("stdlib"))
    docs = {doc.name: doc.text for doc in sample_texts._docstrings(root / "shlex.py", "shlex")}
    assert docs["shlex.quote"] == "Return a shell-escaped version of the string *s*."
