"""No step of the event loop grows with the number of inputs in a request.

Steps are not timed: the lines of Python that each of them runs are counted, loops line by line.
"""

import asyncio
import asyncio.events
import sys
from contextlib import contextmanager

import pytest
from embedding_proxy.providers.base import Embedded, Outcome
from embedding_proxy.providers.charge import Charge
from embedding_proxy.providers.errors import InvalidRequest
from embedding_proxy.providers.profile import Limits
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service import embedding_service as service_module
from embedding_proxy.proxy.service.embedding_service import EmbeddingService

FEW, MANY = 2_048, 4 * 2_048
WIDTH = 4


class Provider:
    """Answers at once, in this process, as much as the largest of its calls takes in each step."""

    name = "openai"
    accepts_tokens = True
    limits = Limits(inputs=128)

    def __init__(self):
        self.asked = []
        self.bad = None

    async def ask(self, model, space, inputs, context):
        await asyncio.sleep(0)
        self.asked += inputs
        if self.bad in inputs:
            raise InvalidRequest("bad", param="input", index=inputs.index(self.bad))
        count = len(inputs)
        return Embedded(
            vectors=[repr(item).encode().ljust(4 * WIDTH, b"?")[-4 * WIDTH :] for item in inputs],
            tokens=[1] * count,
            counted=True,
            providers=(self.name,),
            outcomes=[Outcome.MISS] * count,
            charge=Charge(count),
        )


@pytest.fixture
async def opened(tmp_path, monkeypatch):
    """Give a service that takes requests of any size, and its provider."""
    provider = Provider()

    async def open_providers(*_):
        return {"openai": provider}

    monkeypatch.setattr(service_module, "open_providers", open_providers)
    route = {"provider": "openai", "model": "m"}
    entry = {"space": "s", "dimensions": WIDTH, "matryoshka": True, "routes": [route]}
    settings = Settings.model_validate(
        {
            "server": {"allow_oversize": True},
            "cache": {"directory": str(tmp_path)},
            "models": {"m": entry},
        }
    )
    async with EmbeddingService(settings) as service:
        yield service, provider


@contextmanager
def counted(monkeypatch):
    """Count the lines that each step of the loop runs in this thread; give the largest count."""
    largest, lines = [0], 0
    run = asyncio.events.Handle._run

    def trace(_frame, event, _argument):
        nonlocal lines
        lines += event == "line"
        return trace

    def step(handle):
        nonlocal lines
        lines = 0
        sys.settrace(trace)
        try:
            run(handle)
        finally:
            sys.settrace(None)
            largest[0] = max(largest[0], lines)

    with monkeypatch.context() as patched:
        patched.setattr(asyncio.events.Handle, "_run", step)
        try:
            yield largest
        finally:
            # This step goes on with what the test does next.
            sys.settrace(None)
            largest[0], lines = max(largest[0], lines), 0


def texts(count, name):
    """Return so many different texts."""
    return [f"{name} {i}" for i in range(count)]


KINDS = {
    "new": lambda count: (texts(count, "new"), None),
    "known": lambda count: (texts(count, "known"), None),
    "half known": lambda count: (texts(count // 2, "known") + texts(count // 2, "other"), None),
    "twice": lambda count: (texts(count // 2, "twice") * 2, None),
    "narrow": lambda count: (texts(count, "known"), WIDTH // 2),
    "tokens": lambda count: ([[i] for i in range(count)], None),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_steps_do_not_grow_with_a_request(kind, opened, monkeypatch):
    """Four times as many inputs make more steps, and none of them longer."""
    service, _ = opened
    largest = {}
    for count in (FEW, MANY):
        if kind in ("known", "half known", "narrow"):
            await service.embed(texts(count, "known"), "m")
        inputs, dimensions = KINDS[kind](count)
        with counted(monkeypatch) as lines:
            result = await service.embed(inputs, "m", dimensions=dimensions)
        assert len(result.embedded.vectors) == count
        largest[count] = lines[0]
    assert 0 < largest[MANY] <= 1.2 * largest[FEW], largest


def vector_of(text):
    """Return what the provider gives for a text."""
    return repr(text).encode().ljust(4 * WIDTH, b"?")[-4 * WIDTH :]


async def test_a_large_request_is_answered_as_a_small_one_would_be(opened):
    """Each input is bought once, equal ones in whichever part they stand, all in order."""
    service, provider = opened
    known, new = texts(1000, "known"), texts(4000, "new")
    await service.embed(known, "m")
    provider.asked.clear()
    inputs = new + known + new[::-1] + known[:500]
    result = await service.embed(inputs, "m")
    assert list(result.embedded.vectors) == [vector_of(text) for text in inputs]
    assert sorted(provider.asked) == sorted(new)
    kinds = [Outcome.MISS] * 4000 + [Outcome.HIT] * 1000 + [Outcome.DUPLICATE] * 4500
    assert list(result.outcomes) == kinds
    usage = result.usage
    assert (usage.misses, usage.hits, usage.duplicates) == (4000, 1000, 4500)
    assert (usage.tokens_billed, usage.tokens_saved) == (4000, 5500)
    again = await service.embed(new + known, "m")
    assert set(again.outcomes) == {Outcome.HIT}
    assert list(await again.embedded.cached_hit.vectors()) == list(again.embedded.vectors)
    counted = list(service.counted.values())
    assert sum(one.inputs for one in counted) == 1000 + len(inputs) + 2 * 5000
    assert sum(one.duplicates for one in counted) == 4500


async def test_a_bad_input_of_a_large_request_is_named_by_its_own_place(opened):
    """Nothing further is asked then, and what was asked before is kept."""
    service, provider = opened
    inputs = texts(2 * MANY, "text")
    provider.bad = inputs[3000]
    with pytest.raises(InvalidRequest, match=r"bad \(input 3000\)") as caught:
        await service.embed(inputs, "m")
    assert caught.value.index == 3000
    asked = [text for text in provider.asked if text != provider.bad]
    assert len(provider.asked) < len(inputs)
    provider.asked.clear()
    provider.bad = None
    result = await service.embed(asked[:128], "m")
    assert set(result.outcomes) == {Outcome.HIT}
    assert provider.asked == []


async def test_what_is_missing_of_a_large_request_is_counted_as_a_whole(opened):
    """Where nothing may be bought, the error says how many inputs are not cached, and the first."""
    service, provider = opened
    await service.embed(texts(2000, "known"), "m")
    provider.asked.clear()
    inputs = texts(2500, "known") + texts(1000, "new") + texts(2100, "known")
    with pytest.raises(
        InvalidRequest, match=r"1600 of 5600 inputs are not .*\(the first is input 2000"
    ):
        await service.embed(inputs, "m", cache_control="only-if-cached")
    assert provider.asked == []
