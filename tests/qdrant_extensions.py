"""More of what a Qdrant server does, for the simulated one: vectors of points, and snapshots."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from qdrant_client import models


def extended(engine: Any, method: str, name: str, rest: list[str], body: Any) -> Any:
    """Return the result of a call to `/collections/{name}/{rest}`; None of one unknown here."""
    done = {"operation_id": 0, "status": "completed"}
    match method, rest:
        case "POST", ["points", "vectors", "delete"]:
            removed = models.DeleteVectors.model_validate(body)
            selected = models.PointIdsList(points=removed.points or [])
            engine._local.delete_vectors(engine._real(name), removed.vector, selected)
            return done
        case "GET", ["snapshots"]:
            return engine._server.snapshots.get(engine._real(name), [])
        case "POST", ["snapshots"]:
            known = engine._server.snapshots.setdefault(engine._real(name), [])
            known.append({"name": f"{name}-{len(known)}.snapshot", "size": 1})
            return known[-1]
        case "DELETE", ["snapshots", one]:
            known = engine._server.snapshots[engine._real(name)]
            known[:] = [found for found in known if found["name"] != one]
            return True
    return None


@contextmanager
def unchanged(collection: Any) -> Iterator[None]:
    """Keep the vectors of a collection as they are: the engine scales them again as it searches."""
    kept = {name: numbers.copy() for name, numbers in collection.vectors.items()}
    yield
    collection.vectors.update(kept)


def round_stored(collection: Any) -> None:
    """Keep the numbers of dense vectors as their type holds them; the engine keeps float32."""
    params = collection.config.vectors
    named = params if isinstance(params, dict) else {"": params} if params else {}
    for name, one in named.items():
        if one.datatype == models.Datatype.FLOAT16 and name in collection.vectors:
            halves = collection.vectors[name].astype(np.float16)
            collection.vectors[name] = halves.astype(np.float32)
