"""gRPC before the Qdrant of the tests: each call becomes one of its REST API."""

from dataclasses import dataclass, field
from typing import Any, Self

import grpc
import orjson
from ports import own_port
from qdrant_client import grpc as api
from qdrant_client import models
from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc
from qdrant_client.grpc import collections_service_pb2_grpc as collections
from qdrant_client.grpc import points_service_pb2_grpc as points
from qdrant_client.grpc import qdrant_pb2_grpc as root
from qdrant_server import QdrantServer, Refusal

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ALREADY_EXISTS,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
}


@dataclass
class QdrantGrpc:
    """Use it with `async with`; `failures` are the statuses and words of the next writes."""

    server: QdrantServer
    failures: list[tuple[int, str]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    port: int = field(default_factory=own_port)
    _grpc: Any = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, on the same port as before."""
        self._grpc = grpc.aio.server()
        collections.add_CollectionsServicer_to_server(_Collections(self), self._grpc)
        points.add_PointsServicer_to_server(_Points(self), self._grpc)
        root.add_QdrantServicer_to_server(_Root(), self._grpc)
        assert self._grpc.add_insecure_port(f"127.0.0.1:{self.port}") == self.port
        await self._grpc.start()

    async def stop(self) -> None:
        """Refuse connections from now on."""
        await self._grpc.stop(None)

    async def ask(self, context: Any, method: str, path: str, body: Any = None) -> Any:
        """Return what the REST API answers; its refusals become statuses of gRPC."""
        self.calls.append(f"{method} {path}")
        if self.failures and method == "PUT" and path.endswith("/points"):
            status, words = self.failures.pop(0)
            await context.abort(CODES[status], words)
        try:
            data = b"" if body is None else orjson.dumps(body)
            return orjson.loads(await self.server._answer(method, path, data, path))["result"]
        except Refusal as refusal:
            await context.abort(CODES[refusal.status], str(refusal))


def _json(model: Any) -> Any:
    return model.model_dump(mode="json", exclude_none=True)


class _Root(root.QdrantServicer):
    async def HealthCheck(self, request, context):  # noqa: N802 - gRPC's
        return api.HealthCheckReply(title="qdrant", version="1.17.0")


class _Collections(collections.CollectionsServicer):
    def __init__(self, front: QdrantGrpc) -> None:
        self._ask = front.ask

    async def Get(self, request, context):  # noqa: N802 - gRPC's
        told = await self._ask(context, "GET", f"/collections/{request.collection_name}")
        info = RestToGrpc.convert_collection_info(models.CollectionInfo.model_validate(told))
        return api.GetCollectionInfoResponse(result=info)

    async def List(self, request, context):  # noqa: N802 - gRPC's
        told = await self._ask(context, "GET", "/collections")
        names = [api.CollectionDescription(name=one["name"]) for one in told["collections"]]
        return api.ListCollectionsResponse(collections=names)

    async def ListAliases(self, request, context):  # noqa: N802 - gRPC's
        told = await self._ask(context, "GET", "/aliases")
        return api.ListAliasesResponse(
            aliases=[api.AliasDescription(**one) for one in told["aliases"]]
        )

    async def Create(self, request, context):  # noqa: N802 - gRPC's
        vectors = GrpcToRest.convert_vectors_config(request.vectors_config)
        body = {"vectors": _json(vectors), "metadata": GrpcToRest.convert_payload(request.metadata)}
        await self._ask(context, "PUT", f"/collections/{request.collection_name}", body)
        return api.CollectionOperationResponse(result=True)


class _Points(points.PointsServicer):
    def __init__(self, front: QdrantGrpc) -> None:
        self._ask = front.ask

    async def Upsert(self, request, context):  # noqa: N802 - gRPC's
        body = {"points": [_json(GrpcToRest.convert_point_struct(one)) for one in request.points]}
        await self._ask(context, "PUT", f"/collections/{request.collection_name}/points", body)
        done = api.UpdateResult(operation_id=0, status=api.UpdateStatus.Completed)
        return api.PointsOperationResponse(result=done)

    async def Query(self, request, context):  # noqa: N802 - gRPC's
        body = _json(GrpcToRest.convert_query_points(request))
        path = f"/collections/{request.collection_name}/points/query"
        told = await self._ask(context, "POST", path, body)
        hits = [models.ScoredPoint.model_validate(one) for one in told["points"]]
        return api.QueryResponse(result=[RestToGrpc.convert_scored_point(one) for one in hits])
