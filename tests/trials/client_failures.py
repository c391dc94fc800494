"""How the real clients give up: directly at an upstream that fails as OpenAI does, or at the proxy.

    python client_failures.py [NAME...]

Each client makes one embeddings request with its default retries: once at the upstream itself, once
at a proxy in front of the same upstream. It has to give up or wait as it does directly, within
`TOLERANCE_S`; what it raises has to say the same; and the proxy may call the upstream no more often
than the client did. A name selects the clients, or the failures, that contain it.
"""

import asyncio
import logging
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import client_environments
from aiohttp import web
from client_trial import CLIENTS, Broken, Client, prepare, run
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http.app import build_app
from embedding_proxy.proxy.http.app_runner import Runner
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from fault_server import Act, FaultServer, Payload, reset, status

TOLERANCE_S = 2.0
AT_ONCE = 3
"""Clients that run at the same time: they wait most of the time."""
RETRY_AFTER_S = 2
OWN_RETRIES = 2
"""Attempts that the proxy makes by itself after its first, for one request."""
PATIENT_S = 3.0
"""How long a passing failure lasts for the clients that try for a minute and more."""
NO_KEY = "A_VARIABLE_THAT_IS_NOT_SET"
KEY = "CLIENT_FAILURES_KEY"

PATIENT = ("llama-index llama_index", "node langchain")
NAMES = (
    "openai-1 openai",
    "openai-2 openai",
    "openai-3 openai",
    "node openai",
    "go openai",
    "java openai",
    "langchain langchain",
    "node langchain",
    "llama-index llama_index",
    "node ai_sdk",
)
"""The clients with retries of their own, and those that set the official client's."""
UNTOLD = ("node ai_sdk",)
"""Clients that do not say that they retry by themselves: while a rate limit lasts, the proxy waits
and tries again for their first try, as for any client. In an outage they give up sooner, since
their own backoff is longer than the Retry-After of the proxy. Their time is not compared."""
TRIED = [client for client in CLIENTS if client.name in NAMES]


def _error(kind: str, code: str | None) -> dict[str, object]:
    message = f"made-up {code or kind}"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _late(seconds: float, act: Act) -> Act:
    """Play an answer that comes after so many seconds."""

    async def late(request: web.Request, payload: Payload) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return await act(request, payload)

    return late


@dataclass(frozen=True)
class Failure:
    """A way in which OpenAI fails, and what the proxy may make of it."""

    name: str
    act: Act | None
    """What the upstream answers; None = it refuses connections."""
    answers: tuple[tuple[int, str | None], ...]
    """The statuses and codes with which a client may give up at the proxy."""
    passes: bool = False
    """Whether it may pass by itself: for the clients of `PATIENT` it does."""
    fails: int | None = None
    """Calls that fail before the upstream is well; None = all."""
    provider: Mapping[str, object] = field(default_factory=dict)
    """What is configured of the provider."""


_LIMITED = _error("requests", "rate_limit_exceeded")
_WAIT = {"retry-after": str(RETRY_AFTER_S), "retry-after-ms": str(1000 * RETRY_AFTER_S)}
_DOWN = status(500, _error("server_error", None))
_NO_ACCESS = status(401, _error("invalid_request_error", "invalid_api_key"))
_QUOTA = ((429, "insufficient_quota"),)
_RATE = ((429, "rate_limit_exceeded"),)
_OUTAGE = ((502, "upstream_error"), (503, "upstream_unavailable"))
FAILURES = [
    Failure("key refused", _NO_ACCESS, ((403, "upstream_auth"),)),
    Failure(
        "client's key refused",
        _NO_ACCESS,
        ((401, "invalid_api_key"),),
        provider={"auth": "client"},
    ),
    Failure(
        "no key",
        status(401, _error("invalid_request_error", None)),
        ((403, "provider_not_configured"),),
        provider={"api_key_env": NO_KEY},
    ),
    Failure(
        "out of credit", status(429, _error("insufficient_quota", "insufficient_quota")), _QUOTA
    ),
    Failure("rate limit", status(429, _LIMITED, _WAIT), _RATE, passes=True),
    Failure("rate limit, once", status(429, _LIMITED, _WAIT), _RATE, fails=1),
    Failure("rate limit without Retry-After", status(429, _LIMITED), _RATE, passes=True),
    Failure("rate limit without Retry-After, once", status(429, _LIMITED), _RATE, fails=1),
    Failure("outage", _DOWN, _OUTAGE, passes=True),
    Failure("outage, once", _DOWN, _OUTAGE, fails=1),
    Failure(
        "connection refused",
        None,
        ((502, "upstream_unreachable"), (503, "upstream_unavailable")),
        passes=True,
    ),
    Failure(
        # The proxy's limit is just below that of the upstream's gateway.
        "time-out",
        _late(1.2, status(504, _error("server_error", None))),
        ((504, "upstream_timeout"), (503, "upstream_unavailable")),
        passes=True,
        provider={"timeout_s": 1},
    ),
    Failure("bad input", status(400, _error("invalid_request_error", None)), ((400, None),)),
]


@dataclass(frozen=True)
class Ending:
    """How one request of a client ended."""

    error: str | None
    """The class of the client's error; None = there was none."""
    status: int | None
    code: str | None
    seconds: float
    requests: int
    """HTTP requests of the client."""
    calls: int
    """Calls of the upstream."""

    def __str__(self) -> str:
        """Return it as it stands in the table."""
        said = f"{self.error} {self.status or ''}".strip() if self.error else "ok"
        return f"{said}, {self.seconds:.1f} s, {self.requests} -> {self.calls}"


@dataclass(frozen=True)
class Found:
    """One client at one failure, directly and at the proxy."""

    client: Client
    failure: Failure
    direct: Ending
    proxied: Ending

    @property
    def is_answered_only_by_proxy(self) -> bool:
        """Whether the proxy waited for what the client does not wait for directly."""
        return self.proxied.error is None and self.direct.error is not None

    def differences(self) -> list[str]:
        """Return what is not as it is directly."""
        if self.is_answered_only_by_proxy:
            return []
        late = self.proxied.seconds - self.direct.seconds
        return [*self._other_answers(), *([f"{late:+.1f} s"] if self._is_off(late) else [])]

    def _other_answers(self) -> list[str]:
        failure, direct, proxied = self.failure, self.direct, self.proxied
        found = []
        # In an outage the proxy makes further attempts by itself for the client's first try.
        is_outage = failure.passes and 429 not in dict(failure.answers)
        is_own = is_outage or (failure.passes and self.client.name in UNTOLD)
        own = OWN_RETRIES if is_own else 0
        if proxied.calls > direct.calls + own:
            found.append(f"{proxied.calls} calls of the upstream, directly {direct.calls}")
        if proxied.error is None:
            return found
        if direct.error is None:
            return [*found, "gave up where it directly does not"]
        # Some clients raise an error of their own, without the status or the code.
        if proxied.status is not None:
            answers = dict(failure.answers)
            if proxied.status not in answers:
                found.append(f"status {proxied.status}")
            elif proxied.code is not None and proxied.code != answers[proxied.status]:
                found.append(f"code {proxied.code}")
        if proxied.status == direct.status and proxied.error != direct.error:
            found.append(f"{proxied.error}, directly {direct.error}")
        return found

    def _is_off(self, late: float) -> bool:
        """Tell whether it took longer than directly, or gave up sooner, beyond the tolerance.

        To be answered sooner is well, and so is to learn sooner of what does not pass by waiting.
        """
        if self.failure.passes and self.client.name in UNTOLD:
            return False
        hasty = self.failure.passes and self.proxied.error is not None
        return late > TOLERANCE_S or (hasty and late < -TOLERANCE_S)

    def is_better(self) -> bool:
        """Tell whether the client was answered at the proxy alone, or sooner, or gave up sooner."""
        sooner = self.direct.seconds - self.proxied.seconds > TOLERANCE_S
        return sooner or self.is_answered_only_by_proxy


class _Upstream(FaultServer):
    """An upstream with a failure that lasts so many seconds from its first call."""

    def __init__(self, failure: Failure, lasts: float) -> None:
        super().__init__(always=self._act)
        self._lasts = lasts
        self._failing = failure.act
        if failure.act is None and lasts < float("inf"):
            # When a client is refused is not seen here, so its connections are reset instead.
            self._failing = reset()
        self._begun: float | None = None
        self._left = float("inf") if failure.fails is None else failure.fails

    async def __aenter__(self) -> Self:
        """Listen, unless connections are refused."""
        if self._failing is not None:
            await self.start()
        return self

    async def _act(self, request: web.Request, payload: Payload) -> web.StreamResponse:
        now = time.monotonic()
        self._begun = now if self._begun is None else self._begun
        if self._failing is None or not self._left or now - self._begun >= self._lasts:
            return web.json_response(self.reply(payload))
        self._left -= 1
        return await self._failing(request, payload)


@asynccontextmanager
async def _proxy(
    folder: Path, upstream: _Upstream, failure: Failure, counted: Callable[[], None]
) -> AsyncIterator[str]:
    """Open a proxy with an empty cache in front of an upstream; give its base URL."""
    os.environ[KEY] = "upstream-key"
    told = dict(failure.provider)
    if "auth" not in told:
        told.setdefault("api_key_env", KEY)
    settings = Settings.model_validate(
        {
            "cache": {"directory": str(folder / "cache")},
            "providers": {"openai": {"base_url": upstream.url, **told}},
            "passthrough": None,
        }
    )
    app = build_app(settings, EmbeddingService(settings))

    async def count(*_: object) -> None:
        counted()

    app.on_response_prepare.append(count)
    runner = Runner(app, shutdown_timeout=0.01)
    await runner.setup()
    try:
        await runner.listen()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


async def _ending(client: Client, url: str, folder: Path) -> dict[str, Any]:
    prepare(client, folder)
    found: dict[str, Any] = await run(client, url, folder, {"text": "a text"}, "give-up")
    ending: dict[str, Any] = found["ending"]
    ending.pop("outcome")
    return ending


def _lasts(client: Client, failure: Failure) -> float:
    return PATIENT_S if failure.passes and client.name in PATIENT else float("inf")


async def directly(client: Client, failure: Failure) -> Ending:
    """Let a client make one request at the upstream. Raises as `client_trial.run` does."""
    with tempfile.TemporaryDirectory() as folder:
        async with _Upstream(failure, _lasts(client, failure)) as upstream:
            told = await _ending(client, upstream.url, Path(folder))
    return Ending(**told, requests=len(upstream.calls), calls=len(upstream.calls))


async def proxied(client: Client, failure: Failure) -> Ending:
    """Let a client make one request at a proxy before such an upstream. Raises as `directly`."""
    requests = 0

    def counted() -> None:
        nonlocal requests
        requests += 1

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with (
            _Upstream(failure, _lasts(client, failure)) as upstream,
            _proxy(folder, upstream, failure, counted) as url,
        ):
            told = await _ending(client, url, folder)
    return Ending(**told, requests=requests, calls=len(upstream.calls))


async def _main(names: list[str]) -> int:
    """Try the clients and failures that hold one of these names; return the exit code."""
    clients = [one for one in TRIED if any(name in one.name for name in names)]
    failures = [one for one in FAILURES if any(name in one.name for name in names)]
    if names and not clients and not failures:
        print("none of these clients has retries of its own")
        return 0
    clients, failures = clients or TRIED, failures or FAILURES
    await client_environments.make(list(dict.fromkeys(one.environment for one in clients)))
    logging.disable()  # What the proxies log of the failures would stand amid the table.
    limit = asyncio.Semaphore(AT_ONCE)
    row = "{:<23} {:<36} {:<44} {:<44} {}".format
    print("How each ended: error and status, time, requests -> calls of the upstream.")
    print(row("client", "failure", "directly", "at the proxy", "as directly"))

    async def one(client: Client, failure: Failure) -> bool:
        async with limit:
            try:
                direct = await directly(client, failure)
                found = Found(client, failure, direct, await proxied(client, failure))
            except (Broken, TimeoutError) as error:
                print(f"{client.name}, {failure.name}: {str(error) or 'did not end'}", flush=True)
                return False
        wrong = found.differences()
        equal = "; ".join(wrong) or ("better" if found.is_better() else "yes")
        told = row(client.name, failure.name, str(found.direct), str(found.proxied), equal)
        print(told, flush=True)
        return not wrong

    begun = time.perf_counter()
    good = await asyncio.gather(*(one(client, fail) for client in clients for fail in failures))
    bad = good.count(False)
    print(f"{len(good)} trials, {bad} of them wrong; {time.perf_counter() - begun:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_main(sys.argv[1:])))
