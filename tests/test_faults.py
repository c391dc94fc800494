"""The table of faults: each in the first, middle or last part of a request, at either provider.

A request of six inputs goes out in three parts, side by side. One of them meets the fault: what is
asked then, what the client is told, what is kept and what is bought later is as the table says.
"""

import asyncio
import gzip
import itertools
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from embedding_proxy.providers.upstream.retry_after import FIRST_COOLDOWN
from fault_server import (
    Act,
    cut,
    hang,
    labelled,
    larger_than,
    one_vector,
    other_form,
    reset,
    spoilt,
    stale,
    status,
    succeeding,
    trickle,
    vector_of,
)

INPUTS = [f"text {i}" for i in range(6)]
PLACES = {"first": 0, "middle": 3, "last": 5}
"""Of the input that meets the fault; it goes out with its neighbour."""
LIMIT = "rate_limit_exceeded"


@dataclass(frozen=True)
class Row:
    """A fault, and what it gets."""

    act: Act
    status: int
    """What the client gets when no other provider answers; of 200, what it gets in any case."""
    code: str | None = None
    again: int = 0
    """How often the provider is asked again when it is alone; at most once where it is not."""
    wait: float | None = 1
    """Seconds in Retry-After; None: the client is told not to try again."""
    says: str = ""
    held: str = "open"
    """What the provider is after some more of such failures: open, resting or closed."""
    rest: float = 1
    """Seconds until it is asked again then."""
    of_input: bool = False
    """Whether it is the input that is refused, so that no other provider is asked."""
    of_vector: bool = False
    """Whether it is one vector that is bad, so that the others of the call are kept."""
    of_text: bool = False
    """Whether the provider fails with one input: halving finds it, and the others are kept."""
    of_size: bool = False
    """Whether one input is too large by itself: what was not asked for by then is not bought."""
    url: str = ""
    """The address of a provider all of whose calls fail."""
    options: Mapping[str, float] = field(default_factory=dict)
    """What is configured of the provider that fails."""


def limited(again, wait, act=None, **headers):
    act = act or status(429, headers={k.replace("_", "-"): v for k, v in headers.items()})
    rest = wait if headers else FIRST_COOLDOWN
    return Row(act, 429, LIMIT, again, wait, held="resting", rest=rest)


def spent(act, code):
    return Row(act, code, "insufficient_quota", wait=None, rest=300)


def auth(act):
    return Row(act, 403, "upstream_auth", wait=None, rest=30)


def denied(act):
    return Row(act, 403, "upstream_permission_denied", wait=None, held="closed", rest=0)


def unknown(act):
    return Row(act, 404, "model_not_found", wait=None, held="closed", rest=0)


def refused(act, code=400):
    """Return the row of a refused input, which is asked for once more, alone."""
    return replace(mended(act, 1), status=code, wait=None, says="refused", of_input=True)


def mended(act, again):
    """Return the row of what the client does not notice."""
    return Row(act, 200, again=again, held="closed", rest=0)


def failing(act, code=502, again=2, wait=1):
    return Row(act, code, "upstream_error", again, wait)


def invalid(act, says, again=1):
    return Row(act, 502, "upstream_invalid_answer", again, says=says)


def bad_vector(act, says):
    """Return the row of one bad vector: its input alone is asked for again."""
    return replace(invalid(act, says), of_vector=True, held="closed", rest=0)


def choking(act):
    """Return the row of an input with which the provider fails each time."""
    return replace(failing(act), of_text=True, held="closed", rest=0)


def late(act, says="no answer within", **options):
    return Row(act, 504, "upstream_timeout", says=says, options=options)


def lost(act, says="connection reset", url=""):
    return Row(act, 502, "upstream_unreachable", 1, says=says, url=url)


def unavailable(wait):
    """Return the row of a miss while no provider may be asked."""
    return Row(hang(), 503, "upstream_unavailable", wait=wait)


def error(code=None):
    return {"error": {"message": "refused", "type": "t", "param": None, "code": code}}


def inside(code):
    """Play an error in a reply with status 200."""
    return status(200, error(code))


def item(**fields):
    """Play the right answer but for some fields of one item."""
    return spoilt(lambda _, one: one.update(fields))


def data(change):
    """Play the right answer but for the list of items."""
    return spoilt(lambda reply, one: change(reply["data"], one))


def alike(items, one):
    for each in items:
        each.update(embedding=one["embedding"])


def literal(number):
    """Play an answer with a number that JSON does not know."""
    body = '{"data": [{"index": 0, "embedding": [%s]}, {"index": 1, "embedding": [1]}]}'
    return status(200, (body % number).encode())


BATCH_LIMIT = {"error": {"message": "batch size is invalid, it should not be larger than 1."}}
BOMB = gzip.compress(bytes(8 << 20), 1)

ARREARAGE = {"error": {"message": "Access denied.", "type": "Arrearage", "code": "Arrearage"}}
BAD_KEY = [
    {
        "error": {
            "code": 400,
            "message": "API key not valid. Please pass a valid API key.",
            "status": "INVALID_ARGUMENT",
            "details": [{"reason": "API_KEY_INVALID", "domain": "googleapis.com"}],
        }
    }
]


def unnumbered(reply, _):
    for one in reply["data"]:
        del one["index"]


UPSTREAMS_IN_THE_WILD = {
    "2-reset-epoch": replace(
        limited(0, 86_400, x_ratelimit_reset_requests="99999999999"), rest=3600
    ),
    "3-arrearage": replace(spent(status(400, ARREARAGE), 402), code="Arrearage"),
    "3-403-quota": spent(status(403, error("insufficient_quota")), 402),
    "4-400-key": auth(status(400, BAD_KEY)),
    "4b-403-model": replace(unknown(status(403, error("model_not_found"))), status=403),
    "4b-403-moderation": replace(
        refused(status(403, error("content_policy_violation")), 403),
        code="content_policy_violation",
    ),
    "9-object-error": failing(status(200, {"object": "error", "message": "out of memory"})),
    "28-201": mended(succeeding(201), 0),
    "28-bom": mended(succeeding(200, b"\xef\xbb\xbf"), 0),
    "28-no-index": mended(spoilt(unnumbered), 0),
    "28-no-index-of-0": mended(spoilt(lambda reply, _: reply["data"][0].pop("index")), 0),
    "28-204": invalid(status(204, b""), "is empty", again=2),
}
"""What upstreams were seen to answer beside what their documents say."""

ROWS = {
    "1-fits": limited(2, 2, Retry_After="2"),
    "1-fits-in-ms": limited(2, 1.5, retry_after_ms="1500"),
    "1-does-not-fit": limited(0, 90, Retry_After="90"),
    "2-429": limited(2, 1),
    "2-reset-fits": limited(2, 6, x_ratelimit_reset_tokens="6s"),
    "2-reset-does-not": limited(0, 90, x_ratelimit_reset_requests="1m30s"),
    "3-quota": spent(status(429, error("insufficient_quota")), 429),
    "3-402": spent(status(402), 402),
    "4-401": auth(status(401)),
    "4-403": denied(status(403)),
    "5-400": refused(status(400, error())),
    "6-400": mended(larger_than(1, status(400, error("max_tokens_per_request"))), 1),
    "6-413": mended(larger_than(1, status(413)), 1),
    "27-batch-limit": mended(larger_than(1, status(400, BATCH_LIMIT)), 1),
    "6-413-of-one": replace(refused(status(413, error()), 413), of_size=True),
    "7-404": unknown(status(404)),
    **{f"8-{code}": failing(status(code)) for code in (408, 409, 502, 524, 529)},
    "8-500": choking(status(500)),
    **{f"8-{code}": failing(status(code), code) for code in (503, 504)},
    **{f"8-{code}-final": failing(status(code), again=0, wait=None) for code in (405, 501)},
    "8-503-wait": failing(status(503, headers={"Retry-After": "3"}), 503, wait=3),
    "9-502": failing(inside(502)),
    "9-no-code": failing(status(200, {"error": "sorry"})),
    "9-429": limited(2, 1, inside(429)),
    "9-402": spent(inside(402), 402),
    "9-401": auth(inside(401)),
    "9-404": unknown(inside(404)),
    "9-400": refused(inside(400)),
    "10-html": invalid(status(200, b"<html>sorry</html>"), "JSON", again=2),
    "10-cut": invalid(status(200, b'{"object": "list", "data": [{"ind'), "JSON", again=2),
    "11-too-few": invalid(data(lambda items, one: items.remove(one)), "1 embeddings for 2"),
    "11-too-many": invalid(data(lambda items, one: items.append(one)), "3 embeddings for 2"),
    "11-empty": invalid(data(lambda items, _: items.clear()), "0 embeddings for 2"),
    "12-beyond": invalid(item(index=2), "permutation"),
    "12-twice": invalid(data(lambda items, _: items[1].update(items[0])), "permutation"),
    "13-null": bad_vector(item(embedding=[0.5, None] * 4), "not a number"),
    "13-nan": bad_vector(one_vector(lambda v: np.append(v[:-1], np.nan)), "not finite"),
    "13-inf": bad_vector(one_vector(lambda v: np.append(v[:-1], np.inf)), "not finite"),
    "13-nan-literal": invalid(literal("NaN"), "not a number"),
    "14-zeros": bad_vector(one_vector(np.zeros_like), "are zero"),
    "15-narrow": bad_vector(one_vector(lambda v: v[:-1]), "7 dimensions"),
    "15-wide": bad_vector(one_vector(lambda v: np.append(v, 0)), "9 dimensions"),
    "15-base64": bad_vector(item(embedding="AAAA"), "whole number"),
    "16-length": bad_vector(one_vector(lambda v: 1.1 * v), "length 1.1"),
    "16-alike": mended(data(alike), 1),
    "17-model": mended(spoilt(lambda reply, _: reply.update(model="other")), 0),
    "18-form": mended(other_form(), 0),
    "19-hang": late(hang(), timeout_s=0.2),
    "19-first-byte": late(hang(), first_byte_timeout_s=0.2),
    "20-total": late(trickle(), timeout_s=0.2),
    "20-rate": late(trickle(), "too slowly", min_bytes_per_s=1000, min_rate_window_s=0.2),
    "21-reset": lost(reset()),
    "21-stale": mended(stale(), 1),
    "21-cut": lost(cut(), "reply broke off after 20 bytes"),
    "22-dns": lost(hang(), "no such host: nowhere.invalid", "http://nowhere.invalid/v1"),
    "22-refused": lost(hang(), "connection refused by 127.0.0.1:1", "http://127.0.0.1:1/v1"),
    "22-tls": lost(hang(), "does not speak TLS", "https://127.0.0.1:{}/v1"),
    **UPSTREAMS_IN_THE_WILD,
    "24-huge": failing(
        spoilt(lambda reply, _: reply.update(more="x" * (2 << 20))), again=0, wait=None
    ),
    "24-bomb": failing(status(200, BOMB, {"Content-Encoding": "gzip"}), again=0, wait=None),
    "28-gzip-is-plain": mended(labelled("gzip"), 0),
    "28-plain-is-gzip": mended(labelled("identity", gzip.compress), 0),
    "28-unreadable": replace(
        failing(labelled("br", lambda body: b"\x80" + body), again=0, wait=None),
        says="reply could not be decoded (content-encoding br)",
    ),
    "28-loop": Row(
        status(508), 508, "loop_detected", wait=None, says=".base_url", held="closed", rest=0
    ),
    "24-redirect": failing(status(302, headers={"Location": "/elsewhere"}), again=0, wait=None),
}


class World:
    """Two upstreams, of which one has a fault with one input, and the proxies in front of them."""

    def __init__(self, start_proxy, directory, upstream, second):
        self.start_proxy = start_proxy
        self.directory = directory
        self.servers = {"openai": upstream, "openrouter": second}
        self.now = 1000.0
        for server in self.servers.values():
            server.widths = {"m": 8}

    def meet(self, name, at, place="last"):
        """Say which fault, where, and with which input."""
        self.case = f"{name}-{place}-{at}"
        self.row = ROWS[name]
        if at == "alone":
            del self.servers["openrouter"]
        self.name = "openrouter" if at == "second" else "openai"
        self.faulty = self.servers[self.name]
        self.bad = INPUTS[PLACES[place]]
        self.part = INPUTS[PLACES[place] // 2 * 2 :][:2]
        self.there = []
        self.others = [text for text in INPUTS if text not in self.part]

    async def start(self, *, faulty=True, inputs=2, options=None, **server):
        """Start a proxy, once the one before has stopped; its breakers' clock stands still."""
        await self.start_proxy.stop()
        providers = {
            name: {"base_url": server.url, "limits": {"inputs": inputs}}
            for name, server in self.servers.items()
        }
        if faulty:
            providers[self.name] |= {**self.row.options, **(options or {})}
            if self.row.url:
                providers[self.name]["base_url"] = self.row.url.format(self.faulty.port)
        routes = [{"provider": name, "model": "m"} for name in self.servers]
        model = {"space": self.case, "dimensions": 8, "unit_norm": True, "routes": routes}
        self.proxy = await self.start_proxy(
            **self.servers,
            cache={"directory": str(self.directory)},
            providers=providers,
            models={"m": model},
            server=server,
        )
        upstreams = self.proxy.service.upstreams
        real, upstreams.clock = upstreams.clock, lambda: self.now
        self.health = {name: upstreams.of(name) for name in self.servers}
        upstreams.clock = real

    async def prepare(self):
        """Start a proxy for which the fault, and nothing else, is in the way."""
        first = self.servers["openai"]
        if first is self.faulty and (self.row.url or self.row.options):
            # Nothing can be bought there, or only on a quick machine: the other parts are there.
            self.there = self.others
            await self.start(faulty=False)
            await right(await self.ask(self.others), self.others)
        await self.start()
        if self.row is ROWS["21-stale"]:
            first.always = None if first is self.faulty else status(404)
            await self.ask([f"other {text}" for text in INPUTS])  # Leaves three connections.
        self.mend()
        if first is not self.faulty:
            first.holding = dict.fromkeys(self.part, status(404))
        self.faulty.holding = {self.bad: self.row.act}

    async def ask(self, inputs):
        """Send one request."""
        return await self.proxy.post({"model": "m", "input": inputs})

    def good(self, failed):
        """Return the inputs that each upstream was asked for in other calls than these."""
        return {
            name: [
                text
                for call in server.calls
                if not any(call is one for one in failed)
                for text in call.inputs
            ]
            for name, server in self.servers.items()
        }

    def mend(self):
        """Let all upstreams be well; forget what they were asked."""
        for server in self.servers.values():
            server.holding, server.always = {}, None
            server.calls.clear()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Give one cache for all cases, since making one takes time; each has its own space in it."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def world(start_proxy, directory, upstream, second):
    return World(start_proxy, directory, upstream, second)


def holding(server, *inputs):
    """Return the calls that an upstream got with any of these inputs."""
    return [call for call in server.calls if {*inputs} & {*call.inputs}]


async def right(response, inputs):
    """Check that a reply holds the right vectors in the right order."""
    assert response.status == 200, await response.text()
    items = (await response.json())["data"]
    assert [one["index"] for one in items] == list(range(len(inputs)))
    for one, text in zip(items, inputs, strict=True):
        assert np.array_equal(np.array(one["embedding"], "<f4"), vector_of("m", text, 8))


async def told(response, row, index=None):
    """Check that a client is told what the table says, and which of its inputs is to blame."""
    said = (await response.json())["error"]
    assert (response.status, said["code"]) == (row.status, row.code), said
    assert said.keys() == {"message", "type", "param", "code"}
    assert row.says in said["message"]
    if index is not None:
        assert said["message"].endswith(f"(input {index})")
        assert said["param"] == "input"
    if row.wait is None:
        assert response.headers["x-should-retry"] == "false"
        assert "Retry-After" not in response.headers
    else:
        assert int(response.headers["Retry-After"]) == -(-row.wait // 1)
        assert int(response.headers["retry-after-ms"]) == round(row.wait * 1000)


@pytest.fixture(autouse=True)
def _no_names(monkeypatch):
    """Resolve no host name, whatever network the machine has."""

    async def nothing(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("asyncio.base_events.BaseEventLoop.getaddrinfo", nothing)


everywhere = pytest.mark.parametrize("place", PLACES)
at_either = pytest.mark.parametrize("at", ["first", "second"])


def _cases():
    """Return each fault at each provider, in each place where one input is to blame.

    Where a whole call fails, the kinds of faults take turns at the places.
    """
    for number, (name, row) in enumerate(ROWS.items()):
        is_anywhere = row.of_input or row.of_vector or row.of_text or row.of_size
        for turn, at in enumerate(("first", "second"), number):
            for place in PLACES if is_anywhere else [[*PLACES][turn % len(PLACES)]]:
                yield name, place, at


@pytest.mark.parametrize(("name", "place", "at"), [*_cases()])
async def test_a_fault_in_one_part(name, place, at, world, caplog):
    """Tries, route and reply are right; what was bought is kept; a retry buys what is missing."""
    world.meet(name, at, place)
    row, bad, (first, second) = world.row, world.bad, world.servers.values()
    await world.prepare()
    response = await world.ask(INPUTS)

    tries = holding(world.faulty, bad)
    failed = tries[: row.again] if row.status == 200 else [*tries]
    if row.url:
        assert world.health[world.name].failures == {"unreachable": 2}
    elif row.options:
        # On a slow machine the time may be up before the call arrives.
        assert world.health[world.name].attempts == 1
    else:
        assert len(tries) == min(row.again, 1) + 1 + (row.of_text and at == "second")
    if at == "second":
        failed += holding(first, *world.part)
        assert failed[-1] in first.calls
    elif row.of_input or row.status == 200:
        assert not second.calls
    else:
        assert [call.inputs for call in second.calls] == [[bad] if row.of_vector else world.part]
    good, missing = world.good(failed), []
    if row.status == 200 or (at == "first" and not row.of_input):
        await right(response, INPUTS)
        named = response.headers["x-embedding-provider"].split(", ")
        assert sorted(named) == [name for name, inputs in good.items() if inputs]
    else:
        is_named = row.of_input or row.of_vector or row.of_text
        missing = [bad] if is_named else world.part
        if row.of_size:
            missing = sorted({*INPUTS} - {*itertools.chain(*good.values())})
            assert bad in missing
        await told(response, row, INPUTS.index(bad) if is_named else None)
    kept = {*world.part} - {bad} if row.of_vector else set()
    bought = {*INPUTS} - {*missing} - {*world.there} - kept
    assert sorted(itertools.chain(*good.values())) == sorted(bought)
    assert ("KEY IS NOT ACCEPTED" in caplog.text) == (row.code == "upstream_auth")
    routes = world.proxy.service.models["m"].router.routes
    passed = [route.provider.other_models for route in routes]
    assert ({"other": 1} in passed) == (name == "17-model")

    await keeps(world, missing)


async def keeps(world, missing):
    """Check that the upstreams, well again, are asked for what is missing, and that all is kept."""
    world.mend()
    again = await world.ask(INPUTS)
    await right(again, INPUTS)
    assert sorted(itertools.chain(*world.good([]).values())) == missing
    assert int(again.headers["x-cache-hits"]) == len(INPUTS) - len(missing)
    for server in world.servers.values():
        await server.stop()
    await world.start(faulty=False)
    kept = await world.ask(INPUTS)
    await right(kept, INPUTS)
    assert kept.headers["x-cache"] == "hit"


def state(health):
    """Say whether the provider is asked for the model, and if not, what holds it back."""
    return "resting" if health.rest("m") else health.snapshot()["state"]


@pytest.mark.parametrize("name", [name for name in ROWS if name != "21-stale"])
async def test_a_fault_of_the_only_provider(name, world):
    """It is asked as often as the fault allows, and if it fails on, it is held back as it should.

    Then nobody is asked, and the client is told at once when to come again; or the same as before,
    where no second try would help.
    """
    world.meet(name, "alone")
    row = world.row
    world.faulty.holding = {world.bad: row.act}
    await world.start(options={k: 0.1 for k in row.options if k != "min_bytes_per_s"})
    response = await world.ask(world.part)
    health = world.health["openai"]
    tries = health.attempts if row.url or row.options else len(holding(world.faulty, world.bad))
    assert tries == row.again + 1 + row.of_text
    if row.status == 200:
        await right(response, world.part)
    else:
        await told(response, row)
    for _ in range(5):
        await world.ask(world.part)
    assert state(health) == row.held
    assert 0.8 * row.rest <= health.wait("m") <= row.rest + 1e-9
    if row.held != "closed":
        attempts = health.attempts
        if health.lasting is not None:
            expected = row
        elif row.held == "resting":
            expected = replace(row, wait=health.wait("m"))
        else:
            expected = unavailable(health.wait("m"))
        await told(await world.ask(world.part), expected)
        assert health.attempts == attempts


@at_either
@everywhere
async def test_5_one_bad_input_among_those_of_others(place, at, world):
    """Three clients' inputs are gathered into one call: only who sent the bad one is refused."""
    world.meet("5-400", at, place)
    world.case += "-gathered"
    world.faulty.holding = {world.bad: world.row.act}
    if at == "second":
        world.servers["openai"].always = status(404)
    await world.start(inputs=6, batch_window_ms=1000)
    clients = [INPUTS[i : i + 2] for i in (0, 2, 4)]
    replies = await asyncio.gather(*map(world.ask, clients))
    for response, inputs in zip(replies, clients, strict=True):
        if world.bad in inputs:
            await told(response, world.row, inputs.index(world.bad))
        else:
            await right(response, inputs)
    assert world.faulty.calls[0].inputs == INPUTS
    good = world.good(holding(world.faulty, world.bad))[world.name]
    assert sorted(good) == sorted({*INPUTS} - {world.bad})
    world.mend()
    await world.start()
    await keeps(world, [world.bad])


@at_either
@everywhere
async def test_23_an_outage_for_an_hour(place, at, world):
    """Hits go on; a miss goes to the other, or is told at once to come back; probes are few."""
    world.meet("8-500", at, place)
    world.case += "-outage"
    dark = [*world.servers.values()][: 1 if at == "first" else 2]
    await world.start()
    await right(await world.ask(world.others), world.others)
    for server in dark:
        server.always = world.row.act
    for i in range(20):
        await world.ask([f"unknown {i}"])
    for server in dark:
        server.calls.clear()
    for minute in range(60):
        world.now += 60
        inputs = [f"{text} at {minute}" if text in world.part else text for text in INPUTS]
        response = await world.ask(inputs)  # It may be the probe.
        calls = [len(server.calls) for server in dark]
        if at == "first":
            await right(response, inputs)
        else:
            wait = min(health.wait("m") for health in world.health.values())
            await told(await world.ask(inputs), unavailable(wait))
        await right(await world.ask(world.others), world.others)
        assert calls == [len(server.calls) for server in dark]
    for server in dark:
        assert 10 <= len(server.calls) <= 20
        assert {call.path for call in server.calls} == {"/v1/embeddings"}
        server.always = status(429)

    world.now += 300
    response = await world.ask(INPUTS)
    if at == "first":
        await right(response, INPUTS)
    else:
        await told(response, ROWS["2-429"])
    assert "resting" in {state(health) for health in world.health.values()}
    world.mend()
    world.now += 1
    await right(await world.ask(INPUTS), INPUTS)
    assert world.servers["openai"].inputs == (world.part if at == "second" else [])
