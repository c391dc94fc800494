"""Known texts through one route: the answer, the time, and what two answers have in common."""

import numpy as np
from clock import Clock
from embedding_proxy.providers.base import Context, Embedded, Space
from embedding_proxy.providers.errors import UpstreamError
from embedding_proxy.providers.route_check import SAME, TEXTS, agreement, probe
from embedding_proxy.providers.routing.route import Route

SPACE = Space("vendor/model", 4)


class Fake:
    """A provider that takes two seconds of the clock, and answers or fails."""

    name = "acme"
    accepts_tokens = True

    def __init__(self, clock, failure=None):
        self.clock = clock
        self.failure = failure

    async def ask(self, model, space, inputs, context):
        self.clock.now += 2
        if self.failure is not None:
            raise self.failure
        return Embedded([b"16 bytes of it.."] * len(inputs), [3] * len(inputs), counted=True)


async def test_an_answer_is_measured():
    """What came, how long it took and what it cost."""
    clock = Clock()
    route = Route(Fake(clock), "m")
    found = await probe(route, SPACE, Context(), clock)
    assert (found.route, found.seconds, found.failure) == (route, 2, None)
    assert (len(found.vectors), found.tokens) == (len(TEXTS), 3 * len(TEXTS))


async def test_a_failure_is_told_and_not_raised():
    """A provider that fails is a finding, with the time it took to fail."""
    clock = Clock()
    failure = UpstreamError("acme", "made up")
    found = await probe(Route(Fake(clock, failure), "m"), SPACE, Context(), clock)
    assert (found.failure, found.seconds, found.vectors) == (failure, 2, ())


async def test_other_texts_may_be_asked():
    """Whoever has texts of its own is answered for them, in their order."""
    found = await probe(Route(Fake(Clock()), "m"), SPACE, Context(), Clock(), ["one", "two"])
    assert (len(found.vectors), found.tokens) == (2, 6)


def test_agreement_is_that_of_the_worst_pair():
    """One text of four that is answered otherwise is enough to tell two models apart."""
    base = np.eye(4, dtype="<f4")
    other = base.copy()
    other[2] = [0, 0.1, 1, 0]
    same = agreement([row.tobytes() for row in base], [row.tobytes() for row in 3 * base])
    less = agreement([row.tobytes() for row in base], [row.tobytes() for row in other])
    assert same > 0.9999999
    assert abs(less - 1 / np.sqrt(1.01)) < 1e-6
    assert less < SAME
