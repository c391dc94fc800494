"""GET /metrics: counters in Prometheus' text format.

The ledger's are the store's: every worker tells the same ones, and they survive restarts. What only
one worker knows carries its process id, so that each line grows as a counter has to.
"""

import os
from collections.abc import Iterator, Mapping

from aiohttp import web
from embedding_proxy.cache.ledger import By
from embedding_proxy.providers.billing import NANO
from embedding_proxy.providers.routing.circuit_breaker import State
from embedding_proxy.proxy.service.embedding_service import EmbeddingService

PREFIX = "embedding_proxy_"
_LEDGER = (By.MODEL, By.PROVIDER, By.CLIENT, By.NAMESPACE)
_OUTCOMES = ("hits", "joins", "misses", "duplicates")
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})

Sample = tuple[dict[str, str], float]
Family = tuple[str, str, str, list[Sample]]
"""Name, type, help, and the samples."""


class Metrics:
    """Tells the counters of a service."""

    def __init__(self, service: EmbeddingService) -> None:
        self._service = service

    async def get(self, _: web.Request) -> web.Response:
        """Answer with everything."""
        families = [*await self._bill(), *self._worker(), *await self._index()]
        text = "".join(line for family in families for line in _lines(*family))
        return web.Response(
            body=text.encode(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def _bill(self) -> list[Family]:
        """Return the ledger; nothing while it cannot be read."""
        inputs: list[Sample] = []
        tokens: list[Sample] = []
        dollars: list[Sample] = []
        for names, usage in await self._service.ledger(_LEDGER) or ():
            labels = {by.value: name or "" for by, name in zip(_LEDGER, names, strict=True)}
            outcomes = {name: getattr(usage, name) for name in _OUTCOMES}
            inputs += [({**labels, "outcome": name}, n) for name, n in outcomes.items()]
            for kind, count, nano in (
                ("billed", usage.tokens_billed, usage.nanodollars_billed),
                ("saved", usage.tokens_saved, usage.nanodollars_saved),
            ):
                tokens.append(({**labels, "kind": kind}, count))
                dollars.append(({**labels, "kind": kind}, nano / NANO))
        return [
            ("inputs_total", "counter", "Inputs answered, by how they were.", inputs),
            ("tokens_total", "counter", "Tokens billed and saved.", tokens),
            ("cost_usd_total", "counter", "US dollars billed and saved.", dollars),
        ]

    async def _index(self) -> list[Family]:
        """Return what waits for Qdrant, which all workers share, and what this one has done."""
        indexing = self._service.indexing
        snapshot = await indexing.indexer.snapshot() if indexing else None
        if snapshot is None:
            return []
        worker = {"worker": str(os.getpid())}
        points: list[Sample] = [
            ({**worker, "result": result}, count)
            for result, count in snapshot["since_start"].items()
            if result not in ("failures", "damaged")
        ]
        failures: list[Sample] = [(worker, snapshot["since_start"]["failures"])]
        damaged: list[Sample] = [(worker, snapshot["since_start"]["damaged"])]
        return [
            ("index_backlog_points", "gauge", "Points that wait for Qdrant.",
             [({}, snapshot["backlog_points"])]),
            ("index_backlog_bytes", "gauge", "Bytes of the points that wait for Qdrant.",
             [({}, snapshot["backlog_bytes"])]),
            ("index_backlog_age_seconds", "gauge", "How long the first of them has waited.",
             [({}, snapshot["backlog_age_s"])]),
            ("index_dead_letter_points", "gauge", "Points that Qdrant refuses, put aside.",
             [({}, snapshot["refused_points"])]),
            ("index_points_total", "counter", "Points, by what became of them.", points),
            ("index_failures_total", "counter", "Failed attempts to send points.", failures),
            ("index_outbox_corruptions_total", "counter", "Damage found in what waits on disk.",
             damaged),
        ]  # fmt: skip

    def _worker(self) -> list[Family]:
        worker = {"worker": str(os.getpid())}
        counters = self._service.counters
        counts = {
            "memory": counters.memory_hits,
            "disk": counters.disk_hits,
            "miss": counters.misses,
        }
        attempts: list[Sample] = []
        failed: list[Sample] = []
        ready: list[Sample] = []
        for name, state in self._service.upstreams.snapshot().items():
            labels = {**worker, "provider": name}
            attempts.append((labels, state["attempts"]))
            ready.append((labels, state["state"] == State.CLOSED))
            failed += [({**labels, "reason": e}, n) for e, n in sorted(state["failures"].items())]
        others: list[Sample] = [
            ({**worker, "provider": provider, "model": model}, n)
            for provider, models in self._service.other_models.items()
            for model, n in sorted(models.items())
        ]
        retries: list[Sample] = []
        failovers: list[Sample] = []
        hedges: list[Sample] = []
        for name, model in self._service.models.items():
            count = model.router.counts
            labels = {**worker, "model": name}
            retries.append((labels, count.retries))
            failovers.append((labels, count.failovers))
            hedges.append((labels, count.hedges))
        lookups: list[Sample] = [({**worker, "result": tier}, n) for tier, n in counts.items()]
        return [
            ("cache_lookups_total", "counter",
             "Inputs looked up, by the tier that had them.", lookups),
            ("cache_corrupt_records_total", "counter", "Records that did not verify.",
             [(worker, counters.mismatches)]),
            ("provider_attempts_total", "counter", "Calls of providers.", attempts),
            ("provider_failures_total", "counter", "Calls that failed, by reason.", failed),
            ("provider_model_mismatch_total", "counter",
             "Replies that named another model than was asked for, by that name.", others),
            ("model_drift_cosine_similarity", "gauge",
             "Known texts now against those bought first; below 0.999 the model has changed.",
             self._drift_cosines()),
            ("retries_total", "counter", "Further attempts at the same route.", retries),
            ("failovers_total", "counter", "Attempts at a further route.", failovers),
            ("hedged_requests_total", "counter",
             "Batches sent to a second route while the first had not answered.", hedges),
            ("provider_ready", "gauge", "Whether a provider is asked as usual.", ready),
        ]  # fmt: skip

    def _drift_cosines(self) -> list[Sample]:
        """Return what was found last of each route; the file is everyone's, so it has no worker."""
        drift_check = self._service.drift_check
        return [
            (
                {
                    "space": result["space"],
                    "provider": result["provider"],
                    "upstream_model": result["upstream_model"],
                },
                result["cosine"],
            )
            for result in (drift_check.results if drift_check else ())
        ]


def _lines(name: str, kind: str, help_text: str, samples: list[Sample]) -> Iterator[str]:
    r"""Yield a family of metrics line by line.

    >>> print(*_lines("x_total", "counter", "All x.", [({"a": 'b"'}, 2.5)]), sep="", end="")
    # HELP embedding_proxy_x_total All x.
    # TYPE embedding_proxy_x_total counter
    embedding_proxy_x_total{a="b\""} 2.5
    """
    yield f"# HELP {PREFIX}{name} {help_text}\n"
    yield f"# TYPE {PREFIX}{name} {kind}\n"
    for labels, value in samples:
        yield f"{PREFIX}{name}{{{_text(labels)}}} {float(value)!r}\n"


def _text(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items())
