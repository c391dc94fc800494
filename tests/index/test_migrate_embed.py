"""Asking with patience: what passes is waited for, what is one text's fault is told of it alone."""

import pytest
from embedding_proxy.index.migration.embedding import (
    MAX_ATTEMPTS,
    MAX_WAIT_S,
    Rejection,
    RetryingEmbedder,
)
from embedding_proxy.providers.base import Space
from embedding_proxy.providers.errors import (
    InvalidRequest,
    NoProviderAvailable,
    QuotaExceeded,
    RateLimited,
    Refusal,
    Unreachable,
)


class FakeModel:
    """Gives each text's own bytes for a vector; `refuse` says what is wrong with some texts."""

    name = asked = "m"
    space = Space("m", 8)
    dimensions = 8

    def __init__(self, *failures, refuse=lambda texts: None):
        self.failures = list(failures)
        self.refuse = refuse
        self.calls = []

    async def embed(self, texts, *, anew=False):
        self.calls.append(list(texts))
        if self.failures:
            raise self.failures.pop(0)
        if (error := self.refuse(texts)) is not None:
            raise error
        return [text.encode() for text in texts], len(texts)

    async def look(self, texts):
        raise NotImplementedError


@pytest.fixture
def waits():
    return []


def _patient(waits, *failures, **options):
    async def sleep(seconds):
        waits.append(seconds)

    return RetryingEmbedder(FakeModel(*failures, **options), sleep)


def _with_index(texts):
    bad = next((i for i, text in enumerate(texts) if "bad" in text), None)
    return None if bad is None else InvalidRequest("too long", index=bad, param="input")


def _without_index(texts):
    return InvalidRequest("bad request") if any("bad" in text for text in texts) else None


async def test_what_passes_is_waited_for(waits):
    """Each wait is what was asked for, or longer than the last, and never too long."""
    asked = Refusal(429, "slow", retry_after=7)
    failures = (
        RateLimited("p", "slow", asked),
        NoProviderAvailable("rest", 500),
        Unreachable("p", "cut"),
    )
    patient = _patient(waits, *failures)
    assert await patient.embed(["a", "b"]) == [b"a", b"b"]
    assert waits == [7, MAX_WAIT_S, 4]
    assert patient.bought == 2


async def test_patience_has_an_end(waits):
    """What does not pass ends the run after so many tries."""
    patient = _patient(waits, *[Unreachable("p", "cut")] * 99)
    with pytest.raises(Unreachable):
        await patient.embed(["a"])
    assert len(patient.model.calls) == MAX_ATTEMPTS
    assert len(waits) == MAX_ATTEMPTS - 1


async def test_what_does_not_pass_is_not_waited_for(waits):
    """Without credit there is nothing to wait for."""
    with pytest.raises(QuotaExceeded):
        await _patient(waits, QuotaExceeded("p", "empty")).embed(["a"])
    assert waits == []


@pytest.mark.parametrize("refuse", [_with_index, _without_index])
async def test_a_refused_text_keeps_no_other_back(waits, refuse):
    """All others have their vectors, in their places, also where nobody names the text."""
    patient = _patient(waits, refuse=refuse)
    texts = ["a", "b", "bad 1", "c", "bad 2", "d"]
    found = await patient.embed(texts)
    assert [one if isinstance(one, bytes) else one.why for one in found] == [
        b"a",
        b"b",
        str(refuse(["bad"])),
        b"c",
        str(refuse(["bad"])),
        b"d",
    ]


async def test_a_refusal_of_everything_is_no_dead_letter(waits):
    """Where no text has been answered, and none is named, the model or the key may be wrong."""
    patient = _patient(waits, refuse=lambda _: InvalidRequest("bad request"))
    with pytest.raises(InvalidRequest):
        await patient.embed(["a", "b"])
    patient.answered = True
    assert await patient.embed(["a"]) == [Rejection("bad request")]


async def test_a_refusal_of_the_model_is_raised_at_once(waits):
    """An error about `model` or `dimensions` buries no point."""
    patient = _patient(waits, refuse=lambda _: InvalidRequest("unknown", param="model"))
    patient.answered = True
    with pytest.raises(InvalidRequest):
        await patient.embed(["a", "b"])
    assert len(patient.model.calls) == 1


async def test_no_texts_ask_nobody(waits):
    """Nothing is asked for nothing."""
    patient = _patient(waits)
    assert await patient.embed([]) == []
    assert patient.model.calls == []
