"""Warns of a request field that makes a new embedding space of nearly every request.

A field that changes no number, but that the proxy does not know as such, belongs to the space. When
its value differs from request to request (an id, a time), no text is ever a cache hit, and each is
bought again without a word. So the distinct parameter sets of a model are counted over a short
time, and too many are warned of once. Only digests of values are kept, and only names are logged.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from embedding_proxy.providers.lru_cache import LRUCache

MAX_SETS = 20
"""Distinct parameter sets of one model within `WINDOW_S` that are nothing unusual."""
WINDOW_S = 600.0
MAX_FIELDS = 100
"""Fields of one request that are looked at."""
MAX_NAME = 100
"""Characters of a field's name that are kept."""
_MAX_MODELS = 256
"""Watched at a time; the one that was asked for longest ago is forgotten first."""

log = logging.getLogger("embedding_proxy.spaces")


@dataclass(slots=True)
class _Seen:
    """The parameter sets of one model."""

    sets: dict[bytes, tuple[float, dict[str, bytes]]] = field(default_factory=dict)
    """By digest: when it was last used, and the digest of each value. The newest is last."""
    is_told: bool = False


class SpaceWatch:
    """Counts distinct parameter sets by model. For one event loop.

    `clock` returns seconds; tests inject one that they move themselves.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._models = LRUCache[str, _Seen](_MAX_MODELS)

    def note(self, model: str, parameters: Sequence[tuple[str, bytes]]) -> None:
        """Take note of one request's parameters, (name, canonical JSON); warn if they are many."""
        if not parameters:
            return
        seen = self._models.get_or_make(model, _Seen)
        if seen.is_told:
            return
        now = self._clock()
        whole = _digest(b"".join(_digest(name.encode()) + _digest(one) for name, one in parameters))
        values = {name[:MAX_NAME]: _digest(value) for name, value in parameters[:MAX_FIELDS]}
        seen.sets[whole] = now, values
        seen.sets = {key: one for key, one in seen.sets.items() if one[0] >= now - WINDOW_S}
        if len(seen.sets) > MAX_SETS:
            seen.is_told = True
            self._warn(model, [one for _, one in seen.sets.values()])
            seen.sets.clear()

    @staticmethod
    def _warn(model: str, sets: Sequence[dict[str, bytes]]) -> None:
        names = sorted({name for one in sets for name in one})
        distinct = {name: len({one.get(name) for one in sets}) for name in names}
        field = max(names, key=lambda name: distinct[name])
        log.warning(
            "model %s: more than %d distinct sets of request fields within %d minutes; most differ"
            " in the field %r, so the same text is bought for each of its values. If it changes no"
            " vector, list it in providers.NAME.neutral_fields, or do not send it",
            model,
            MAX_SETS,
            WINDOW_S // 60,
            field,
        )


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
