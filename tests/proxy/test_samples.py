"""What providers are compared on: the files that are read, and what is wrong with others."""

import gzip

import pytest
from embedding_proxy.cache.maintenance.import_source import SourceError
from embedding_proxy.proxy.diagnostics import sample_texts
from embedding_proxy.proxy.diagnostics.sample_texts import read


@pytest.fixture
def write(tmp_path):
    """Give a function that writes a file of that name and returns its path."""

    def put(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


def test_texts_are_lines_as_they_stand(write):
    """Blank lines and repetitions are left out, spaces within a line are not."""
    found = read(write("t.txt", "\ufeffone\r\n\n  two \nöne\n \none"), None)
    assert (found.inputs, found.texts, found.wanted) == (["one", "  two ", "öne"], 3, {})


@pytest.mark.parametrize("name", ["t.jsonl", "t.ndjson", "t.jsonl.gz"])
def test_texts_may_be_in_jsonl(name, write):
    """The field `text` of each object, other fields are no matter."""
    content = b'{"text": "a\\nb", "id": 1}\n{"id": 2, "text": "c"}\n{"text": " "}\n'
    content = gzip.compress(content) if name.endswith("gz") else content
    assert read(write(name, content), None).inputs == ["a\nb", "c"]


def test_pairs_bring_texts_and_queries(write):
    """Texts come first, queries after; a query may have several right texts, and be a text."""
    pairs = [("q1", "b"), ("q1", "c"), ("a", "c"), ("b", "b")]
    lines = [f'{{"query": "{query}", "text": "{text}"}}' for query, text in pairs]
    found = read(write("t", "a\nd"), write("p.jsonl", "\n".join(lines)))
    assert found.inputs == ["a", "d", "b", "c", "q1"]
    assert found.texts == 4
    assert found.wanted == {4: {2, 3}, 0: {3}}
    alone = read(None, write("p.jsonl", lines[0]))
    assert (alone.inputs, alone.texts, alone.wanted) == (["b", "q1"], 1, {1: {0}})


def test_without_a_file_there_are_texts_that_every_machine_has():
    """Prose, code and other scripts: enough for neighbours, few enough to cost nothing."""
    found = read(None, None)
    assert 40 <= found.texts == len({*found.inputs}) <= 80
    assert "Return True for leap years, False for non-leap years." in found.inputs
    assert sum(map(len, found.inputs)) < 6000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", " \n\n", "holds no text"),
        ("t.txt", b"a\n\xff\n", "line 2 is not UTF-8 text"),
        ("t.jsonl", '{"txt": "a"}', "has no field `text`; fields: `txt`"),
        ("t.jsonl", '{"text": "a"}\n{"text": 7}', "line 2: its `text` is no string"),
        ("t.jsonl", '{"text": "a"}\n{"text"', "line 2: not JSON"),
        ("t.jsonl", '{"text": ""}', "holds no text"),
    ],
)
def test_a_file_that_is_none_is_told_by_its_line(name, content, message, write):
    """Nothing is left out in silence: the texts of a comparison are those that were given."""
    with pytest.raises(SourceError, match=r"t\.\w+.*" + message):
        read(write(name, content), None)


def test_what_is_wrong_with_pairs_is_told(write, tmp_path):
    """A file that is not there, has no pairs, or none with both fields."""
    with pytest.raises(SourceError, match="cannot be read"):
        read(None, tmp_path / "none.jsonl")
    with pytest.raises(SourceError, match="holds no pair"):
        read(None, write("p.jsonl", ""))
    with pytest.raises(SourceError, match="has no field `query`"):
        read(None, write("p.jsonl", '{"text": "a"}'))


def test_too_many_texts_are_refused(write, monkeypatch):
    """Each text is compared with all others, so there is an end to it."""
    monkeypatch.setattr(sample_texts, "MAX_SAMPLES", 3)
    assert len(read(write("t", "a\nb\nc\nc"), None).inputs) == 3
    with pytest.raises(SourceError, match="4 different texts and queries are too many"):
        read(write("t", "a\nb\nc\nd"), None)
    monkeypatch.setattr("embedding_proxy.proxy.importers.jsonl._MAX_LINE_BYTES", 4)
    with pytest.raises(SourceError, match="line 1 is too long"):
        read(write("t", "abcdefgh\n"), None)
