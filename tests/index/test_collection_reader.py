"""A Qdrant collection as a source: the embedded mode for real, a server by its answers."""

import gc
import struct
import sys
import threading
import uuid
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import orjson
import pytest
from embedding_proxy.cache.maintenance.import_source import Pair, RejectedPair, SourceError
from embedding_proxy.proxy.importers.qdrant import TextSource
from qdrant_client import QdrantClient
from qdrant_client.models import (
    Datatype,
    Distance,
    MultiVectorComparator,
    MultiVectorConfig,
    PointStruct,
    SparseVectorParams,
    VectorParams,
)

DOT = VectorParams(size=2, distance=Distance.DOT)
COSINE = VectorParams(size=2, distance=Distance.COSINE)
HALF = VectorParams(size=2, distance=Distance.DOT, datatype=Datatype.FLOAT16)
MANY = VectorParams(
    size=2,
    distance=Distance.DOT,
    multivector_config=MultiVectorConfig(comparator=MultiVectorComparator.MAX_SIM),
)
SCROLL = "/collections/my%20docs/points/scroll"


def _pair(text, *numbers) -> Pair:
    return Pair(text, struct.pack(f"<{len(numbers)}f", *numbers))


@pytest.fixture
def collection(tmp_path):
    """Give a function that makes a collection of the embedded mode and returns its location."""

    def make(points, vectors=DOT, **options) -> str:
        client = QdrantClient(path=str(tmp_path / "data"))
        client.create_collection("docs", vectors, **options)
        if points:
            client.upsert("docs", points)
        client.close()
        return f"qdrant+path:{tmp_path}/data/docs"

    return make


class Server(ThreadingHTTPServer):
    """A server that answers each request as it is told, and keeps what it was asked."""

    def __init__(self, answers) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = answers
        self.asked = []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.asked.append((self.path, self.headers, orjson.loads(body or "null")))
        status, answer = self.server.answers.pop(0)
        content = orjson.dumps(answer)
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET  # noqa: N815 - as the library wants it

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """Give a function that starts a server with its answers."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("QDRANT_API_KEY", raising=False)
    with_threads = []

    def start(*answers) -> Server:
        server = Server(list(answers))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        with_threads.append((server, thread))
        return server

    yield start
    for started, thread in with_threads:
        started.shutdown()
        thread.join()
        started.server_close()


def _info(vectors) -> tuple[int, dict]:
    hnsw = {"m": 16, "ef_construct": 100, "full_scan_threshold": 10000}
    optimizer = {"deleted_threshold": 0.2, "vacuum_min_vector_number": 1000}
    optimizer |= {"default_segment_number": 0, "flush_interval_sec": 5}
    config = {"params": {"vectors": vectors}, "hnsw_config": hnsw, "optimizer_config": optimizer}
    result = {"status": "green", "optimizer_status": "ok", "segments_count": 1, "config": config}
    return 200, {"result": result | {"payload_schema": {}}, "status": "ok", "time": 0}


def _page(*ids, after=None) -> tuple[int, dict]:
    points = [{"id": n, "payload": {"text": str(n)}, "vector": [n, 0.1]} for n in ids]
    page = {"points": points, "next_page_offset": after}
    return 200, {"result": page, "status": "ok", "time": 0}


def test_points_come_as_pairs_again_and_again(collection, monkeypatch):
    """All points come, in pages, each time anew, and nothing stays open or locked between."""
    monkeypatch.setattr("embedding_proxy.proxy.importers.qdrant.PAGE", 3)
    points = [PointStruct(id=n, vector=[n, 0.1], payload={"text": f"t{n}"}) for n in range(7)]
    location = collection(points)
    source = TextSource(location)
    expected = [_pair(f"t{n}", n, 0.1) for n in range(7)]
    assert list(source) == expected
    next(iter(source))
    assert list(source) == list(TextSource(location)) == expected
    assert source.name == location


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_folder_in_use_is_told(collection, tmp_path):
    """A folder that another client holds is not read behind its back."""
    location = collection([])
    holder = QdrantClient(path=str(tmp_path / "data"))
    with closing(holder), pytest.raises(SourceError, match="is open in another process"):
        TextSource(location)
    assert list(TextSource(location)) == []
    gc.collect()  # the library leaves the lock's file open, and it is closed here


def test_a_point_without_text_or_vector_is_refused(collection):
    """A point that is no pair is refused under its id, a number or a UUID, and the rest goes on."""
    identity = str(uuid.UUID(int=7))
    location = collection(
        [
            PointStruct(id=1, vector={"v": [1, 2]}, payload={"page": "a"}),
            PointStruct(id=2, vector={"v": [1, 2]}, payload={"page": ["a"]}),
            PointStruct(id=3, vector={"v": [1, 2]}),
            PointStruct(id=identity, vector={}, payload={"page": "b"}),
        ],
        {"v": DOT},
    )
    assert list(TextSource(location, "page")) == [
        _pair("a", 1, 2),
        RejectedPair("point 2", "the text is not a string"),
        RejectedPair("point 3", "the text is missing"),
        RejectedPair(f"point {identity}", "the vector: is missing"),
    ]


def test_a_named_vector_is_taken_by_its_name(collection):
    """Where there are several vectors one has to be named; where there is one, it is taken."""
    point = PointStruct(id=1, vector={"a": [1, 2], "b": [3, 4]}, payload={"text": "t"})
    location = collection([point], {"a": DOT, "b": DOT})
    assert list(TextSource(location, vector="b")) == [_pair("t", 3, 4)]
    for name, wanted in [(None, "unnamed vector"), ("c", "vector `c`")]:
        with pytest.raises(SourceError, match=f"has no {wanted}; .* vectors: `a`, `b`$"):
            TextSource(location, vector=name)


def test_the_unnamed_vector_is_found_beside_a_sparse_one(collection):
    """A sparse vector beside it does not hide the one that is meant."""
    point = PointStruct(id=1, vector=[1, 2], payload={"text": "t"})
    location = collection([point], sparse_vectors_config={"words": SparseVectorParams()})
    assert list(TextSource(location)) == [_pair("t", 1, 2)]


def test_a_folder_keeps_vectors_of_cosine_collections_as_given(collection):
    """The embedded mode scales vectors in memory only: what is read from its folder is the same."""
    location = collection([PointStruct(id=1, vector=[3, 4], payload={"text": "t"})], COSINE)
    assert list(TextSource(location)) == [_pair("t", 3, 4)]


def test_an_empty_collection_is_an_empty_source(collection):
    """A collection without points has no pairs, and that is no mistake."""
    assert list(TextSource(collection([]))) == []


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (HALF, "keeps its unnamed vector as float16"),
        ({"v": MANY}, "vector `v` of `docs` is a multivector"),
        ({}, "has no unnamed vector; pick one of its vectors: none"),
    ],
)
def test_vectors_that_are_not_as_they_were_are_not_read(collection, vectors, message):
    """Rounded vectors, several for one text, and none at all are told when it is opened."""
    with pytest.raises(SourceError, match=message):
        TextSource(collection([], vectors))


def test_a_missing_field_is_told_with_those_there_are(collection):
    """If no payload has the field, the message names the fields that they have."""
    location = collection([PointStruct(id=1, vector=[1, 2], payload={"page": "a", "n": 1})])
    with pytest.raises(SourceError, match=r"have no field `text`; fields: `n`, `page`$"):
        TextSource(location)


def test_an_unknown_collection_and_a_wrong_folder_are_told(collection, tmp_path):
    """Neither is made by looking for it."""
    location = collection([])
    with pytest.raises(SourceError, match=r"Collection docs2 not found$"):
        TextSource(location + "2")
    with pytest.raises(SourceError, match=r"no folder of Qdrant's embedded mode: no meta\.json$"):
        TextSource(f"qdrant+path:{tmp_path}/nothing/docs")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("qdrant://host:6333", "is not of the form qdrant://host:6333/collection"),
        ("qdrant://host/docs?api-key=k", "is not of the form"),
        ("qdrant:///docs", "is not of the form"),
        ("qdrant://host:x/docs", "Port could not be cast"),
        ("qdrant://me:secret@host/docs", "holds no key: set QDRANT_API_KEY instead"),
    ],
)
def test_a_location_of_another_form_is_refused(location, message):
    """A location names a host and a collection, and nothing that is secret."""
    with pytest.raises(SourceError, match=message) as told:
        TextSource(location)
    assert "secret" not in str(told.value)


def test_a_server_is_read_in_pages_with_the_key(server, monkeypatch):
    """Each page is asked for where the one before ended; the key goes along, no name is guessed."""
    vectors = {"size": 2, "distance": "Dot"}
    there = server(_info(vectors), _page(1), _page(1, 2, after=3), _page(3))
    monkeypatch.setenv("QDRANT_API_KEY", "key")
    source = TextSource(f"qdrant://127.0.0.1:{there.server_port}/gateway/my%20docs")
    assert list(source) == [_pair("1", 1, 0.1), _pair("2", 2, 0.1), _pair("3", 3, 0.1)]
    assert [path.partition("?")[0] for path, _, _ in there.asked[1:]] == ["/gateway" + SCROLL] * 3
    assert [body.get("offset") for _, _, body in there.asked[1:]] == [None, None, 3]
    assert {headers["api-key"] for _, headers, _ in there.asked} == {"key"}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            401,
            r"not accepted for reading .* of docs: HTTP 401: no \(QDRANT_API_KEY is not set\)$",
        ),
        (
            403,
            r"not accepted for reading .* of docs: HTTP 403: no \(QDRANT_API_KEY is not set\)$",
        ),
        (404, "HTTP 404: no$"),
        (500, "HTTP 500: no$"),
    ],
)
def test_a_servers_refusal_is_told_in_one_line(server, status, message):
    """What the server says becomes one line with the remedy."""
    there = server((status, {"status": {"error": "no"}, "time": 0}))
    with pytest.raises(SourceError, match=message) as told:
        TextSource(f"qdrant://127.0.0.1:{there.server_port}/docs")
    assert "\n" not in str(told.value)


def test_a_server_that_is_not_there_is_told(server, monkeypatch):
    """A refused connection is told at once, a failure amid reading after some tries."""
    monkeypatch.setattr("embedding_proxy.index.collection_reader.MAX_TRIES", 2)
    monkeypatch.setattr("embedding_proxy.index.collection_reader.MIN_WAIT_S", 0)
    failure = (500, {"status": {"error": "broken"}})
    there = server(
        _info({"size": 2, "distance": "Dot"}), _page(1), _page(1, after=2), failure, failure
    )
    source = TextSource(f"qdrant://127.0.0.1:{there.server_port}/docs")
    items = iter(source)
    assert next(items) == _pair("1", 1, 0.1)
    with pytest.raises(SourceError, match=r"HTTP 500: broken$"):
        next(items)
    there.shutdown()
    there.server_close()
    with pytest.raises(SourceError, match="connection refused by 127"):
        TextSource(source.name)


def test_what_passes_by_itself_is_waited_out(server, monkeypatch, caplog):
    """Amid reading a server that is busy is asked again for the same page; nothing is lost."""
    monkeypatch.setattr("embedding_proxy.index.collection_reader.MIN_WAIT_S", 0)
    vectors, busy = {"size": 2, "distance": "Dot"}, (503, {"status": {"error": "busy"}})
    there = server(_info(vectors), _page(1), _page(1, after=2), busy, busy, _page(2))
    source = TextSource(f"qdrant://127.0.0.1:{there.server_port}/docs")
    assert list(source) == [_pair("1", 1, 0.1), _pair("2", 2, 0.1)]
    assert [body["offset"] for _, _, body in there.asked[3:]] == [2, 2, 2]
    assert caplog.text.count("busy; trying again") == 2


def test_a_missing_library_is_told_with_its_remedy(monkeypatch):
    """Without the library, the message says what to install."""
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with pytest.raises(SourceError, match=r"pip install 'qdrant-client>=1\.16'"):
        TextSource("qdrant://host/docs")
