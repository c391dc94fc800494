"""Texts and vectors that people already own, from files: JSONL, Parquet, LangChain's folder."""

import base64
import gzip
import json
import struct
import sys

import pyarrow as pa
import pytest
from embedding_proxy.cache.maintenance.import_source import (
    Pair,
    RejectedPair,
    SourceError,
    quote_names,
    to_pair,
)
from embedding_proxy.proxy.importers import open_source
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

JSONL = "pairs.jsonl"
LINE = b'{"text": "a", "embedding": [1, 2]}\n'
BASE64 = base64.b64encode(struct.pack("<2f", 1, 2)).decode()

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
NUMBERS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False))

# The names under which langchain-classic 1.0.8 keeps this text, as its CacheBackedEmbeddings with
# each of its `key_encoder`s wrote them to a LocalFileStore; sha1 is also that of all older ones.
TEXT = "Grüße, Welt"
NAMESPACE = "openai/text-embedding-3-small"
GOLDEN = {
    "sha1": "51fc2507-1440-5f22-832e-1a5105d075ea",
    "sha256": "45e64a7533b292937f12934f7731e464705fc6452c1a0c23366c21bf987b15d4",
    "blake2b": "9dbe308ac1de55860f1e6facee3af2a4fc9cc6bc373dbf92ba7ccd31b7c44298"
    "d04d28cdbc5cdfc76250ec78554df520a3dfd7879508beb4ea8cdb6c76fb12b5",
    "sha512": "aa590091e732bbd91cc4207384d843cb786254188a3e1db684ffd74bc555ebde"
    "2d48279eeabcacfed27fa086b0bc8684e53bdae9e47910f0ddacb99014f82402",
}
LINES = TEXT.encode()
VALUE = b"[0.1, -2.0, 11.0]"


def _pair(text, *numbers) -> Pair:
    return Pair(text, struct.pack(f"<{len(numbers)}f", *numbers))


def _read(location, content=None, **options) -> list:
    """Write the file if there is content, and read it twice, as the importer does."""
    if content is not None:
        location.write_bytes(content)
    source = open_source(str(location), **options)
    items = list(source)
    assert items == list(source)
    assert source.name == str(location)
    return items


def _table(path, text, vector, **options) -> list:
    parquet.write_table(pa.table({"text": text, "embedding": vector}), path, **options)
    return _read(path)


@pytest.fixture
def folder(tmp_path):
    """Give LangChain's folder, with a file of the given namespace for each given digest."""

    def make(*digests, namespace=NAMESPACE):
        for digest in digests:
            file = tmp_path / "folder" / (namespace + digest)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(VALUE)
        return tmp_path / "folder"

    return make


@pytest.fixture
def texts(tmp_path):
    """Give a function that writes the file of LangChain's texts."""

    def write(content=LINES, name="texts.txt"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(TEXTS, NUMBERS)), escaped=st.booleans(), packed=st.booleans())
def test_jsonl_gives_back_what_was_written(tmp_path, pairs, escaped, packed):
    """Any text and any float32 numbers come back as they were, from both forms of a vector."""
    written = [_pair(text, *numbers) for text, numbers in pairs]
    vectors = [
        base64.b64encode(pair.vector).decode() if packed else numbers
        for pair, (_, numbers) in zip(written, pairs, strict=True)
    ]
    lines = [
        json.dumps({"text": text, "embedding": vector}, ensure_ascii=escaped) + "\n"
        for (text, _), vector in zip(pairs, vectors, strict=True)
    ]
    assert _read(tmp_path / JSONL, "".join(lines).encode()) == written


@pytest.mark.parametrize(
    "content",
    [LINE, LINE.strip(), b"\xef\xbb\xbf" + LINE, LINE.replace(b"\n", b"\r\n"), b"\n \r\n" + LINE],
)
def test_lines_may_end_and_begin_in_any_way(tmp_path, content):
    """A mark at the start, Windows' line ends, blank lines and a last line without end are fine."""
    assert _read(tmp_path / JSONL, content) == [_pair("a", 1, 2)]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "not JSON: "),
        (b"\xff", "not JSON: "),
        (b'{"text": "\\ud800", "embedding": [1]}', "not JSON: "),
        (b'{"text": "a", "embedding": [NaN]}', "not JSON: "),
        (b"[1]", "not a JSON object"),
        (b'{"embedding": [1]}', "there is no field `text`"),
        (b'{"text": "a"}', "there is no field `embedding`"),
        (b'{"text": null, "embedding": [1]}', "the text is missing"),
        (b'{"text": 1, "embedding": [1]}', "the text is not a string"),
        (b'{"text": "", "embedding": [1]}', "the text is empty"),
        (b'{"text": "a", "embedding": null}', "the vector: is missing"),
        (b'{"text": "a", "embedding": "*"}', "the vector: not valid base64"),
        (b'{"text": "a", "embedding": [1, "2"]}', "the vector: holds something that is not a"),
    ],
)
def test_a_bad_line_is_refused_and_reading_goes_on(tmp_path, line, why):
    """Each mistake costs its own line, is told with its number, and no other line."""
    first, refused, last = _read(tmp_path / JSONL, LINE + line + b"\n" + LINE)
    assert first == last == _pair("a", 1, 2)
    assert refused.where == "line 2"
    assert refused.why.startswith(why)


def test_a_line_without_end_is_not_held_in_memory(tmp_path, monkeypatch):
    """A line longer than any pair is passed over, and the next one read."""
    monkeypatch.setattr("embedding_proxy.proxy.importers.jsonl._MAX_LINE_BYTES", len(LINE))
    long = RejectedPair("line 2", "longer than 16 MiB")
    assert _read(tmp_path / JSONL, LINE + b"-" * 1000 + b"\n" + LINE) == [
        _pair("a", 1, 2),
        long,
        _pair("a", 1, 2),
    ]


def test_the_fields_can_be_named_and_the_file_gzipped(tmp_path):
    """Other names than text and embedding are taken, and a compressed file as a plain one."""
    content = gzip.compress(b'{"page": "a", "v": "%s", "text": 1}' % BASE64.encode())
    options = {"text_field": "page", "vector_field": "v"}
    assert _read(tmp_path / "a.NDJSON.gz", content, **options) == [_pair("a", 1, 2)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (JSONL, b'{"b": 1, "a": 2}\n{"c": 3}', r"has no field `text`; fields: `a`, `b`, `c`$"),
        (JSONL, b"[\n" + LINE.strip() + b",\n]", r"is not JSONL: line 1: not JSON"),
        (JSONL, None, r"cannot be read: No such file or directory$"),
        ("a.jsonl.gz", LINE, r"cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(LINE * 9999)[:-9], r"cannot be read after line \d+: "),
        ("a.parquet", None, r"cannot be read as Parquet: .*No such file"),
        ("a.parquet", LINE, r"cannot be read as Parquet: "),
        ("a.json", LINE, r"say so with --format$"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_told(tmp_path, name, content, message):
    """What is wrong with a whole file is told in one line, with what is there instead."""
    with pytest.raises(SourceError, match=message) as told:
        _read(tmp_path / name, content)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.dictionary("int32", "string")])
@pytest.mark.parametrize(
    "vector",
    [
        pa.list_(pa.float32()),
        pa.list_(pa.float64()),
        pa.list_(pa.int64()),
        pa.large_list(pa.float32()),
        pa.list_(pa.float16(), 2),
        pa.list_(pa.float32(), 2),
        pa.list_(pa.float64(), 2),
    ],
)
def test_parquet_is_read_whatever_its_types(tmp_path, text, vector):
    """Texts and lists of any kind are read, in order, across row groups; nulls are refused."""
    numbers = [[n, 2] if n % 5 else None for n in range(1000)]
    texts = [str(n) if n % 7 else None for n in range(1000)]
    read = _table(
        tmp_path / "a.parquet",
        pa.array(texts).cast(text),
        pa.array(numbers, vector),
        row_group_size=300,
    )
    assert read == [
        RejectedPair(f"row {n + 1}", "the text is missing")
        if n % 7 == 0
        else RejectedPair(f"row {n + 1}", "the vector: is missing")
        if n % 5 == 0
        else _pair(str(n), n, 2)
        for n in range(1000)
    ]


def test_parquet_rows_are_refused_one_by_one(tmp_path):
    """An empty text, one that is not UTF-8 and a null among numbers cost their own rows."""
    text = pa.array([b"a", b"", b"\xff", b"b", b"c"]).view("string")
    vector = pa.array([[1.0], [1.0], [1.0], [1.0, None], []])
    assert _table(tmp_path / "a.parquet", text, vector) == [
        _pair("a", 1),
        RejectedPair("row 2", "the text is empty"),
        RejectedPair("row 3", "the text is not UTF-8"),
        RejectedPair("row 4", "the vector: holds something that is not a number"),
        _pair("c"),
    ]


def test_parquet_rounds_to_float32_as_json_does(tmp_path):
    """A float64 becomes the nearest float32, and what is too large infinity, for the check."""
    numbers = [0.1, 1e300, -1e-50]
    expected = to_pair("", "a", numbers)
    assert _table(tmp_path / "a.parquet", ["a"], [numbers]) == [expected]


@pytest.mark.parametrize(
    ("text", "vector", "message"),
    [
        ([1], [[1.0]], "column `text` holds int64, not text"),
        (["a"], [1.0], "column `embedding` holds double, not lists of numbers"),
        (["a"], [["1"]], "column `embedding` holds list<.*string>, not lists of numbers"),
    ],
)
def test_parquet_columns_of_other_types_are_told(tmp_path, text, vector, message):
    """A column that cannot be texts or vectors is told at once, with its type."""
    with pytest.raises(SourceError, match=message):
        _table(tmp_path / "a.parquet", text, vector)


@pytest.mark.parametrize(
    ("names", "message"),
    [(["id", "e"], "no column `text`; columns: `e`, `id`"), (["text"] * 2, "more than one column")],
)
def test_parquet_columns_that_are_not_there_are_told(tmp_path, names, message):
    """A wrong name is answered with the right ones; one that fits twice is not guessed at."""
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table([["a"], [[1.0]]], names=names), file)
    with pytest.raises(SourceError, match=message):
        open_source(str(file))


def test_damage_in_a_parquet_file_is_told(tmp_path):
    """A flipped bit under a page's checksum ends the reading, and no wrong vector comes of it."""
    file = tmp_path / "a.parquet"
    vectors = [[float(n)] for n in range(5000)]
    _table(file, ["a"] * 5000, vectors, write_page_checksum=True, compression="none")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    with pytest.raises(SourceError, match=r"a\.parquet cannot be read as Parquet: .*checksum"):
        _read(file, bytes(content))


@pytest.mark.parametrize(("module", "library"), [("pyarrow.parquet", "pyarrow>=21")])
def test_a_missing_library_is_told_with_its_remedy(tmp_path, monkeypatch, module, library):
    """Without the library, the message says what to install."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SourceError, match=f"pip install '{library}'"):
        open_source(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("namespace", [NAMESPACE, "", "ada", "a/b/"])
@pytest.mark.parametrize("encoder", GOLDEN)
def test_langchains_vectors_are_found(folder, texts, encoder, namespace):
    """Each of LangChain's key encoders is known, with any namespace, or none."""
    source = folder(GOLDEN[encoder], namespace=namespace)
    file = texts(f"{TEXT}\r\nother\n".encode())
    assert _read(source, texts=file) == [
        _pair(TEXT, 0.1, -2, 11),
        RejectedPair("line 2", "no vector in the folder"),
    ]


def test_langchains_files_are_counted(folder, texts):
    """The files that are vectors are known in number, to tell how many were not asked for."""
    source = folder(*GOLDEN.values(), "note.txt", "12ab")
    assert open_source(str(source), texts=texts()).files == 4


def test_langchains_texts_may_be_jsonl(folder, texts):
    """Texts with line breaks are given as JSONL, in a field of the given name."""
    file = texts(f'{{"t": "{TEXT}"}}\n{{"t": ""}}\n{{}}'.encode(), "texts.jsonl")
    assert _read(folder(GOLDEN["sha1"]), texts=file, text_field="t") == [
        _pair(TEXT, 0.1, -2, 11),
        RejectedPair("line 2", "the text is empty"),
        RejectedPair("line 3", "there is no field `t`"),
    ]


def test_one_of_langchains_namespaces_has_to_be_chosen(folder, texts):
    """Two namespaces may be two models: they are told, and read only when one is named."""
    folder(GOLDEN["sha1"], namespace="other")
    source = folder(GOLDEN["sha1"])
    with pytest.raises(SourceError, match=f"`{NAMESPACE}`, `other`; name one with --vector-field"):
        _read(source, texts=texts())
    with pytest.raises(SourceError, match=f"no namespace `x`; namespaces: `{NAMESPACE}`, `other`"):
        _read(source, texts=texts(), vector_field="x")
    assert _read(source, texts=texts(), vector_field="other") == [_pair(TEXT, 0.1, -2, 11)]


@pytest.mark.parametrize(
    ("value", "why"),
    [(b"[0.1", "its file is not JSON: "), (b"{}", "the vector: is missing")],
)
def test_what_is_no_vector_in_langchains_folder_is_refused(folder, texts, value, why):
    """A file with something else in it is refused with the text's line."""
    source = folder(GOLDEN["sha256"])
    (source / (NAMESPACE + GOLDEN["sha256"])).write_bytes(value)
    (refused,) = _read(source, texts=texts())
    assert refused.where == "line 1"
    assert refused.why.startswith(why)


def test_texts_of_langchain_are_read_as_lines(folder, texts, monkeypatch):
    """A line that is not UTF-8, or too long, is refused as such."""
    monkeypatch.setattr("embedding_proxy.proxy.importers.jsonl._MAX_LINE_BYTES", 20)
    file = texts(b"\xff\n" + b"a" * 50)
    assert _read(folder(GOLDEN["sha1"]), texts=file) == [
        RejectedPair("line 1", "the text is not UTF-8"),
        RejectedPair("line 2", "longer than 16 MiB"),
    ]


def test_a_folder_that_cannot_be_read_is_told(folder, texts):
    """A folder without vectors, none at all, and a folder in a vector's place are told."""
    source = folder("note.txt")
    with pytest.raises(SourceError, match="no file that is named as LangChain names"):
        _read(source, texts=texts())
    with pytest.raises(SourceError, match="nowhere cannot be read: No such file"):
        _read(source / "nowhere", texts=texts(), format="langchain")
    folder("0" * 64, GOLDEN["sha256"] + "/note.txt")
    with pytest.raises(SourceError, match=r"nothing\.txt cannot be read: No such file"):
        open_source(str(source), texts=source / "nothing.txt")
    with pytest.raises(SourceError, match="folder cannot be read: Is a directory"):
        _read(source, texts=texts())


@pytest.mark.parametrize(
    ("location", "options", "message"),
    [
        (
            "a.jsonl",
            {"format": "csv"},
            "no format `csv`; formats: jsonl, parquet, langchain, qdrant",
        ),
        ("a.jsonl", {"texts": "t.txt"}, "the texts of jsonl come with the vectors"),
        (".", {}, "name a file of them, --texts"),
        ("qdrant://host", {}, "not of the form"),
    ],
)
def test_what_does_not_fit_together_is_told(location, options, message):
    """Formats and options that cannot be meant so are refused before anything is read."""
    with pytest.raises(SourceError, match=message):
        open_source(location, **options)


def test_half_a_surrogate_pair_is_no_text():
    """A string that has no UTF-8 is refused, wherever it comes from."""
    refused = RejectedPair("here", "the text holds half of a surrogate pair")
    assert to_pair("here", "\ud800", [1]) == refused


def test_a_list_of_names_stays_short():
    """A message names a dozen names and says how many more there are."""
    assert quote_names(str(n) for n in range(20)).endswith("`18`, `19` and 8 more")
