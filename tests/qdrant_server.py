"""A Qdrant on a real socket, faults on cue: the client's embedded engine under a server's rules.

With QDRANT_URL set (and QDRANT_API_KEY, if that server wants one) the same tests meet a real server
instead: the socket stays, and passes on what it is asked. There each test has collections of its
own, whose names begin with something drawn at random; it sees no others, and deletes them.

Of a server's rules these are kept, which the engine does not keep: an id is an unsigned integer of
64 bits or a UUID, a vector has the collection's width, a batch with one bad point is refused and
written up to that point, vectors of a cosine collection are scaled to length 1, a collection keeps
its configuration and its payload indexes, strict mode and keys have limits (see qdrant_limits), an
alias is of a collection, and what its version does not know yet is dropped in silence (metadata of
collections before 1.16, `update_mode` before 1.17).
`tests/test_qdrant_rules.py` asks for these rules, of a real server, too.
"""

import asyncio
import os
import time
import uuid
import warnings
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self
from urllib.parse import unquote

import aiohttp
import numpy as np
import orjson
from aiohttp import web
from leaks import WATCH
from ports import own_port
from pydantic import TypeAdapter, ValidationError
from qdrant_client import QdrantClient, models
from qdrant_extensions import extended, round_stored, unchanged
from qdrant_limits import denial, refusal

REAL = os.environ.get("QDRANT_URL")
REAL_KEY = os.environ.get("QDRANT_API_KEY")
"""Read before the fixtures hide the machine's keys from the tests."""
LARGEST_BODY = 32 << 20

Act = Callable[[web.Request], Awaitable[web.StreamResponse | None]]
"""Plays a fault; what returns None lets the request through."""


class Refusal(Exception):
    """An answer that is no 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def answer(status: int, message: str, **headers: str) -> Act:
    """Answer with an error as Qdrant words it."""

    async def act(_: web.Request) -> web.StreamResponse:
        return _json({"status": {"error": message}, "time": 0.0}, status, headers)

    return act


def overloaded(seconds: int | None) -> Act:
    """Answer 429, with the time to wait if one is given."""
    headers = {} if seconds is None else {"Retry-After": str(seconds)}
    return answer(429, "Too many requests", **headers)


@dataclass
class QdrantServer:
    """Use it with `async with`; address and points stay the same over `stop` and `start`."""

    script: deque[Act] = field(default_factory=deque)
    """What to play for the next requests, one each."""
    always: Act | None = None
    """What to play for every request after the script."""
    gate: asyncio.Event | None = None
    """When set, no request is answered before the event is: as slow as a test wants."""
    api_key: str | None = None
    """What clients must send; None = nothing."""
    rights: dict[str, str] | None = None
    """What that key may do; see qdrant_limits.denial. None = everything."""
    version: str = "1.17.0"
    """What it says it is, and behaves like."""
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    """Method, path and bytes of each request that was let through."""
    bodies: list[Any] = field(default_factory=list)
    """What the upserts among them held."""
    waits: list[str | None] = field(default_factory=list)
    """What they said of `wait`."""
    snapshots: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Those of each collection; they stay when it is deleted."""
    port: int = field(default_factory=own_port)
    _engine: "_Engine | None" = None
    _runner: web.AppRunner | None = None
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    _session: aiohttp.ClientSession | None = None
    _made: set[str] = field(default_factory=set)
    _prefix: str = field(default_factory=lambda: f"test-{uuid.uuid4().hex[:8]}-")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def knows(self, minor: int) -> bool:
        """Tell whether it is a version 1.minor at least."""
        return int(self.version.split(".")[1]) >= minor

    @property
    def upserts(self) -> int:
        """How many requests to write points were let through."""
        return sum(
            method == "PUT" and path.endswith("/points") for method, path, _ in self.requests
        )

    async def __aenter__(self) -> Self:
        if REAL:
            headers = {"api-key": REAL_KEY} if REAL_KEY else {}
            self._session = await self._stack.enter_async_context(
                aiohttp.ClientSession(headers=headers)
            )
        else:
            self._engine = _Engine(self)
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        if self._session is not None:
            for name in self._made:
                await self._session.delete(f"{REAL}/collections/{self._prefix}{name}")
        if self._engine is not None:
            self._engine.close()
        await self._stack.aclose()

    async def start(self) -> None:
        """Listen, on the same port as before."""
        app = web.Application(client_max_size=LARGEST_BODY)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        """Refuse connections from now on; the points stay."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def client(self) -> QdrantClient:
        """Return a blocking client; call it in a thread, and close it."""
        return QdrantClient(url=self.url, check_compatibility=False, api_key=self.api_key)

    async def points(self, collection: str) -> dict[Any, Any]:
        """Return all points of a collection by their ids, past every fault."""
        found: dict[Any, Any] = {}
        offset = None
        while True:
            asked = {"limit": 500, "with_payload": True, "with_vector": True, "offset": offset}
            body = orjson.dumps(asked)
            path = f"/collections/{collection}/points/scroll"
            try:
                page = orjson.loads(await self._answer("POST", path, body, path))["result"]
            except Refusal as refusal:
                if refusal.status == 404:
                    return {}
                raise
            found |= {point["id"]: point for point in page["points"]}
            offset = page["next_page_offset"]
            if offset is None:
                return found

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        WATCH.heard(request.headers)
        if self.gate is not None:
            await self.gate.wait()
        act = self.script.popleft() if self.script else self.always
        if act is not None and (played := await act(request)) is not None:
            return played
        if self.api_key is not None and request.headers.get("api-key") != self.api_key:
            return _json({"status": {"error": "Invalid API key or JWT"}, "time": 0.0}, 401)
        body = await request.read()
        path = request.rel_url.raw_path
        if (denied := denial(self.rights, request.method, path)) is not None:
            return _json({"status": {"error": denied}, "time": 0.0}, 403)
        self.requests.append((request.method, path, len(body)))
        if request.method == "PUT" and path.endswith("/points"):
            self.bodies.append(orjson.loads(body))
            self.waits.append(request.query.get("wait"))
        if request.method == "PUT" and path.count("/") == 2:
            self._made.add(path.rpartition("/")[2])
        try:
            content = await self._answer(request.method, path, body, str(request.rel_url))
        except Refusal as refusal:
            if not str(refusal):
                return web.Response(status=refusal.status)
            return _json({"status": {"error": str(refusal)}, "time": 0.0}, refusal.status)
        return web.Response(body=content, content_type="application/json")

    async def _pass_on(self, method: str, body: bytes, relative: str) -> bytes:
        """Ask the real server, in names of this test's own."""
        assert self._session is not None
        head, collections, rest = relative.partition("/collections/")
        if collections and rest != "aliases":
            relative = f"{head}{collections}{self._prefix}{rest}"
        elif collections:
            changes = orjson.loads(body)
            for change in changes["actions"]:
                for one in change.values():
                    one |= {key: f"{self._prefix}{name}" for key, name in one.items()}
            body = orjson.dumps(changes)
        headers = {"content-type": "application/json"}
        async with self._session.request(
            method, f"{REAL}{relative}", data=body, headers=headers
        ) as reply:
            content = _own(await reply.read(), self._prefix)
            if reply.status != 200:
                raise Refusal(reply.status, orjson.loads(content)["status"]["error"])
            return content

    async def _answer(self, method: str, path: str, body: bytes, relative: str) -> bytes:
        if self._session is not None:
            return await self._pass_on(method, body, relative)
        assert self._engine is not None
        if path == "/":
            return orjson.dumps({"title": "qdrant", "version": self.version})
        begun = time.perf_counter()
        result = self._engine.answer(method, path, orjson.loads(body) if body else {})
        told = {"result": result, "status": "ok", "time": time.perf_counter() - begun}
        return orjson.dumps(told)


def _own(content: bytes, prefix: str) -> bytes:
    """Return an answer of a real server without the prefix, and without what others have there."""
    told = orjson.loads(content)
    result = told.get("result") if isinstance(told, dict) else None
    for listed, name in (("collections", "name"), ("aliases", "alias_name")):
        if isinstance(result, dict) and isinstance(result.get(listed), list):
            result[listed] = [one for one in result[listed] if one[name].startswith(prefix)]
    return orjson.dumps(told).replace(prefix.encode(), b"")


def _json(
    content: object, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    return web.Response(
        status=status,
        body=orjson.dumps(content),
        content_type="application/json",
        headers=headers,
    )


class _Engine:
    """The embedded engine, asked as a server is."""

    def __init__(self, server: QdrantServer) -> None:
        self._server = server
        self._client = QdrantClient(":memory:")
        self._local: Any = self._client._client
        self._schemas: dict[str, dict[str, Any]] = {}
        self._configs: dict[str, dict[str, Any]] = {}

    def close(self) -> None:
        self._client.close()

    def answer(self, method: str, path: str, body: Any) -> Any:  # noqa: C901, PLR0911 - a table
        parts = [unquote(part) for part in path.strip("/").split("/")]
        with warnings.catch_warnings(action="ignore"):
            try:
                match parts:
                    case ["collections"]:
                        return _plain(self._local.get_collections())
                    case ["collections", "aliases"]:
                        return self._change_aliases(body)
                    case ["aliases"]:
                        return _plain(self._local.get_aliases())
                    case ["collections", name, *rest] if (
                        found := extended(self, method, name, rest, body)
                    ) is not None:
                        return found
                    case ["collections", name]:
                        return self._collection(method, name, body)
                    case ["collections", name, "exists"]:
                        return {"exists": self._local.collection_exists(name)}
                    case ["collections", name, "aliases"]:
                        return _plain(self._local.get_collection_aliases(self._real(name)))
                    case ["collections", name, "index"] if method == "PUT":
                        return self._index(self._real(name), body)
                    case ["collections", name, "index", one] if method == "DELETE":
                        self._schemas[self._real(name)].pop(one, None)
                        return _DONE
                    case ["collections", name, "points", *what]:
                        return self._points(method, self._real(name), what, body)
            except ValidationError as error:
                raise Refusal(400, f"Format error in JSON body: {error.errors()[0]}") from error
            except ValueError as error:
                raise Refusal(400, f"Wrong input: {error}") from error
        raise Refusal(404, "")

    def _real(self, name: str) -> str:
        """Return the collection that a name or an alias stands for."""
        name = self._local.aliases.get(name, name)
        if name not in self._local.collections:
            raise Refusal(404, f"Not found: Collection `{name}` doesn't exist!")
        return name

    def _collection(self, method: str, name: str, body: Any) -> Any:
        if method == "PUT":
            if self._local.collection_exists(name):
                raise Refusal(409, f"Wrong input: Collection `{name}` already exists!")
            asked = models.CreateCollection.model_validate(body)
            metadata = asked.metadata if self._server.knows(16) else None
            self._local.create_collection(
                name, asked.vectors, asked.sparse_vectors, metadata=metadata
            )
            # What is read becomes JSON at once: copying the payloads first is half of all work.
            made = self._local.collections[name]
            made._get_payload = partial(made._get_payload, return_copy=False)
            self._schemas[name], self._configs[name] = {}, body
            return True
        if method == "DELETE":
            self._schemas.pop(name, None)
            self._configs.pop(name, None)
            return bool(self._local.delete_collection(name))
        name = self._real(name)
        if method == "PATCH":
            asked = models.UpdateCollection.model_validate(body)
            metadata = asked.metadata if self._server.knows(16) else None
            self._configs[name]["strict_mode_config"] = {
                **(self._configs[name].get("strict_mode_config") or {}),
                **(body.get("strict_mode_config") or {}),
            }
            return self._local.update_collection(name, metadata=metadata)
        info = _plain(self._local.get_collection(name))
        count = info["points_count"]
        info["payload_schema"] = {
            field: {"points": count, **_schema(kind)}
            for field, kind in self._schemas.get(name, {}).items()
        }
        _configured(info["config"], self._configs[name])
        return info

    def _index(self, name: str, body: Any) -> Any:
        asked = models.CreateFieldIndex.model_validate(body)
        self._schemas[name][asked.field_name] = body.get("field_schema") or "keyword"
        return _DONE

    def _change_aliases(self, body: Any) -> bool:
        asked = models.ChangeAliasesOperation.model_validate(body)
        # Nobody sees what is between; but what was changed before one that is wrong, stays.
        for action in asked.actions:
            if isinstance(action, models.CreateAliasOperation):
                name = action.create_alias.collection_name
                if name not in self._local.collections:
                    raise Refusal(404, f"Not found: Collection `{name}` doesn't exist!")
                if action.create_alias.alias_name in self._local.collections:
                    taken = action.create_alias.alias_name
                    raise Refusal(409, f"Wrong input: Collection `{taken}` already exists!")
            self._local.update_collection_aliases([action])
        return True

    def _points(  # noqa: C901, PLR0911, PLR0912 - a table
        self, method: str, name: str, what: list[str], body: Any
    ) -> Any:
        local = self._local
        round_stored(local.collections[name])
        self._check_limits(method, name, "".join(f"/{one}" for one in what), body)
        match method, what:
            case "PUT", []:
                return self._upsert(name, body)
            case "PUT", ["vectors"]:
                return self._update_vectors(name, body)
            case "POST", ["batch"]:
                for operation in body["operations"]:
                    ((kind, one),) = operation.items()
                    method, ends = _OPERATIONS[kind]
                    self._points(method, name, ends, one)
                return [_DONE for _ in body["operations"]]
            case "POST", []:
                asked = models.PointRequest.model_validate(body)
                found = local.retrieve(
                    name, _ids(asked.ids), asked.with_payload, asked.with_vector or False
                )
                return [_plain(point) for point in found]
            case "POST", ["scroll"]:
                scroll = models.ScrollRequest.model_validate(body)
                limit = 10 if scroll.limit is None else scroll.limit
                payload = True if scroll.with_payload is None else scroll.with_payload
                offset = None if scroll.offset is None else _id(scroll.offset)
                points, after = local.scroll(
                    name, scroll.filter, limit, scroll.order_by, offset, payload,
                    scroll.with_vector or False,
                )  # fmt: skip
                return {"points": [_plain(one) for one in points], "next_page_offset": after}
            case "POST", ["count"]:
                count = models.CountRequest.model_validate(body)
                return _plain(local.count(name, count.filter))
            case "POST", ["delete"]:
                if "points" in body:
                    ids = [one for one in _ids(body["points"]) if local.retrieve(name, [one])]
                    if not ids:
                        return _DONE
                    selector: Any = models.PointIdsList(points=ids)
                else:
                    selector = models.FilterSelector.model_validate(body)
                local.delete(name, selector)
                return _DONE
            case "POST", ["query"]:
                query = models.QueryRequest.model_validate(body)
                self._check_query(name, query)
                with unchanged(local.collections[name]):
                    found = local.query_points(
                        name,
                        query=query.query,
                        using=query.using,
                        query_filter=query.filter,
                        limit=query.limit or 10,
                        with_payload=query.with_payload or False,
                        with_vectors=query.with_vector or False,
                        score_threshold=query.score_threshold,
                    )
                return _plain(found)
            case (("POST" | "PUT"), ["payload"]):
                setting = models.SetPayload.model_validate(body)
                put = local.set_payload if method == "POST" else local.overwrite_payload
                put(name, setting.payload, _selected(setting), key=setting.key)
                return _DONE
            case "POST", ["payload", "delete"]:
                deleting = models.DeletePayload.model_validate(body)
                local.delete_payload(name, deleting.keys, _selected(deleting))
                return _DONE
        raise Refusal(404, "")

    def _check_query(self, name: str, query: models.QueryRequest) -> None:
        params = self._local.get_collection(name).config.params.vectors
        if not isinstance(query.query, list):
            return
        if isinstance(params, models.VectorParams):
            _check_vector(query.query if not query.using else {query.using: query.query}, params)
        elif query.using not in params:
            raise Refusal(400, f"Wrong input: Not existing vector name error: {query.using or ''}")
        else:
            _check_vector(query.query, params[query.using])

    def _check_limits(self, method: str, name: str, what: str, body: Any) -> None:
        limits = self._configs[name].get("strict_mode_config") or {}
        points = self._local.count(name).count if limits else 0
        if (found := refusal(limits, method, what, body, points)) is not None:
            raise Refusal(*found)

    def _update_vectors(self, name: str, body: Any) -> Any:
        asked = models.UpdateVectors.model_validate(body)
        params = self._local.get_collection(name).config.params.vectors
        ready = [
            one.model_copy(update={"id": _id(one.id), "vector": _stored(one.vector, params)})
            for one in asked.points
        ]
        try:
            self._local.update_vectors(name, ready)
        except KeyError as error:
            raise Refusal(404, f"Not found: No point with id {error.args[0]} found") from error
        return _DONE

    def _upsert(self, name: str, body: Any) -> Any:
        asked = TypeAdapter(models.PointsBatch | models.PointsList).validate_python(body)
        if isinstance(asked, models.PointsBatch):
            points = self._local.collections[name]._materialize_points(asked.batch)
        else:
            points = asked.points
        params = self._local.get_collection(name).config.params.vectors
        mode = asked.update_mode if self._server.knows(17) else None
        # Point by point: those before a bad one are written.
        for point in points:
            ready = {"id": _id(point.id), "vector": _stored(point.vector, params)}
            self._local.upsert(
                name,
                [point.model_copy(update=ready)],
                update_filter=asked.update_filter,
                update_mode=mode,
            )
        return _DONE


_DONE = {"operation_id": 0, "status": "completed"}


_OPERATIONS = {
    "upsert": ("PUT", []),
    "update_vectors": ("PUT", ["vectors"]),
    "set_payload": ("POST", ["payload"]),
    "overwrite_payload": ("PUT", ["payload"]),
    "delete_payload": ("POST", ["payload", "delete"]),
    "delete": ("POST", ["delete"]),
}
"""What the operations of a batch are alone: method, and the path behind `points`."""


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json")


def _configured(config: Any, asked: dict[str, Any]) -> None:
    """Put what a collection was made with into what is told of its configuration."""
    config["quantization_config"] = asked.get("quantization_config")
    config["strict_mode_config"] = asked.get("strict_mode_config")
    parts = {"hnsw_config": "hnsw_config", "optimizers_config": "optimizer_config",
             "wal_config": "wal_config"}  # fmt: skip
    for given, told in parts.items():
        config[told] |= {k: v for k, v in (asked.get(given) or {}).items() if v is not None}
    for name in ("shard_number", "replication_factor", "write_consistency_factor",
                 "on_disk_payload"):  # fmt: skip
        if asked.get(name) is not None:
            config["params"][name] = asked[name]


def _schema(asked: Any) -> dict[str, Any]:
    """Return what is told of a payload index: its type, and its parameters if it has some."""
    if isinstance(asked, dict):
        return {"data_type": asked["type"], "params": asked}
    return {"data_type": asked}


def _stored(vector: Any, params: Any) -> Any:
    """Return a point's vectors as a cosine collection keeps the unnamed one; refuse bad ones."""
    if not isinstance(params, models.VectorParams):
        return vector
    if not isinstance(vector, dict) or "" not in vector:
        if isinstance(vector, dict) and any(isinstance(v, list) for v in vector.values()):
            _check_vector(vector, params)
        return vector if isinstance(vector, dict) else _scaled(vector, params)
    scaled = _scaled(vector[""], params)
    return {**vector, "": scaled} if len(vector) > 1 else scaled


def _selected(asked: Any) -> Any:
    if asked.points is not None:
        return models.PointIdsList(points=_ids(asked.points))
    return models.FilterSelector(filter=asked.filter)


def _ids(ids: list[Any]) -> list[Any]:
    return [_id(one) for one in ids]


def _id(one: Any) -> int | str:
    """Return an id as a server keeps it."""
    if type(one) is int and 0 <= one < 1 << 64:
        return one
    try:
        return str(uuid.UUID(str(one)))
    except ValueError:
        raise Refusal(
            400,
            f"Format error in JSON body: value {one} is not a valid point ID, valid values are"
            " either an unsigned integer or a UUID",
        ) from None


def _scaled(vector: Any, params: models.VectorParams) -> list[float]:
    _check_vector(vector, params)
    numbers = np.asarray(vector, dtype=np.float32)
    if params.distance is models.Distance.COSINE:
        length = np.float32(np.linalg.norm(numbers))
        if length and abs(length - 1) > 1e-6:
            numbers = (numbers / length).astype(np.float32)
    return [float(number) for number in numbers]


def _check_vector(vector: Any, params: models.VectorParams) -> None:
    if isinstance(vector, dict):
        raise Refusal(400, f"Wrong input: Not existing vector name error: {next(iter(vector))}")
    if len(vector) != params.size:
        raise Refusal(
            400,
            f"Wrong input: Vector dimension error: expected dim: {params.size}, got {len(vector)}",
        )
