"""A route put to the test: asked for the same inputs as others, past the cache, and measured.

One call at a time, whoever it goes to: no time is measured under the load of another. The routes
take turns, a round each, so that a slow minute is everybody's. Nothing is tried again at once: what
a round could not get, the next one asks for.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from embedding_proxy.providers import tokens
from embedding_proxy.providers.base import Context, Space, Vector
from embedding_proxy.providers.charge import NANO, Account, Bill, nanodollars
from embedding_proxy.providers.errors import (
    AuthenticationError,
    EmbeddingError,
    ModelNotFound,
    QuotaExceeded,
)
from embedding_proxy.providers.route_check import probe
from embedding_proxy.providers.routing.route import Route

from .routes import RouteResult

BATCH = 64
"""The most inputs of a batch, in as many calls as the provider needs."""
SINGLES = 10
"""Inputs that are sent alone in each round, one after the other."""
MAX_FAILURES_IN_A_ROW = 3
"""Failures in a row after which a route is given up: each may last as long as the limits allow."""

# No further call can succeed after one of these.
_FINAL = (AuthenticationError, ModelNotFound, QuotaExceeded)


@dataclass(frozen=True, slots=True)
class Plan:
    """The calls of every route."""

    inputs: Sequence[str]
    rounds: int

    @property
    def batches(self) -> list[range]:
        """The indices of the inputs of each batch: of equal size as far as possible."""
        count = len(self.inputs)
        parts = -(-count // BATCH)
        ends = [count * i // parts for i in range(parts + 1)]
        return [range(start, end) for start, end in pairwise(ends)]

    @property
    def singles(self) -> range:
        """The indices of the inputs that are sent alone in each round."""
        return range(min(SINGLES, len(self.inputs)))

    @property
    def calls(self) -> int:
        """The number of calls of a route that never fails."""
        return 1 + len(self.batches) + self.rounds - 1 + self.rounds * len(self.singles)

    def tokens(self, encoding: str | None) -> int:
        """Return the number of tokens for one route; an estimate without an encoding."""
        sizes = tokens.count(self.inputs, encoding or tokens.CL100K)
        repeated_tokens = (self.rounds - 1) * sum(sizes[i] for i in self.batches[0])
        return (
            sizes[0]
            + sum(sizes)
            + repeated_tokens
            + self.rounds * sum(sizes[i] for i in self.singles)
        )


@dataclass(slots=True, eq=False)
class RouteBenchmark:
    """The result of calling one route."""

    result: RouteResult
    route: Route
    space: Space
    price: float | None
    """USD per million tokens; None if it is not known."""
    calls: int = 0
    first_s: float | None = None
    """The time of the first call, which connects or loads a model. It is in no other figure."""
    singles_s: list[float] = field(default_factory=list)
    batches_s: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    """The numbers of failures, by kind."""
    why: str = ""
    """The last failure, in words."""
    vectors: dict[int, Vector] = field(default_factory=dict)
    """The vectors, by the indices of their inputs."""
    answers: Counter[int] = field(default_factory=Counter)
    """The number of answers for each input, by its index."""
    spent: Counter[int] = field(default_factory=Counter)
    """Nanodollars billed for each input, by its index."""
    tokens: int = 0
    """The tokens billed, with failed calls."""
    is_cost_reported: bool = True
    """Whether the upstream reported the cost of all its calls."""
    _in_a_row: int = 0
    _over: bool = False

    @property
    def width(self) -> int:
        """The dimensions of its vectors; 0 if not known yet."""
        return self.space.dimensions

    @property
    def usd(self) -> float | None:
        """The bill; None if the upstream did not report it and no price is known."""
        is_price_known = self.price is not None or (self.is_cost_reported and self.tokens > 0)
        return self.spent.total() / NANO if is_price_known else None

    @property
    def usd_an_input(self) -> float | None:
        """The average cost of an input, whatever the number of its calls; None as for `usd`."""
        if self.usd is None or not self.answers:
            return None
        each = [self.spent[index] / count for index, count in self.answers.items()]
        return math.fsum(each) / len(each) / NANO

    async def ask(self, plan: Plan, indices: Sequence[int], patience_s: float) -> float | None:
        """Send the inputs at these indices; return the seconds of a good answer, else None.

        A route that was given up is not called.
        """
        if self._over:
            return None
        clock = asyncio.get_running_loop().time
        account = Account(self.result.models[0], price=self.price or 0.0)

        def charge(bill: Bill) -> None:
            self.tokens += sum(bill.tokens)
            self.is_cost_reported &= bill.told
            for index, nano in zip(bill.places, bill.nanodollars, strict=True):
                self.spent[indices[index]] += nano

        context = Context(clock() + patience_s, account=account, on_charge=charge)
        inputs = [plan.inputs[index] for index in indices]
        self.calls += 1
        result = await probe(self.route, self.space, context, clock, inputs)
        if result.failure is not None:
            self._fail(result.failure)
            return None
        self._in_a_row = 0
        self.answers.update(indices)
        self.vectors |= zip(indices, result.vectors, strict=True)
        # The width is known now, and the other answers must have it.
        self.space = replace(self.space, dimensions=len(result.vectors[0]) // 4)
        return result.seconds

    def _fail(self, failure: EmbeddingError) -> None:
        self.failures[type(failure).__name__] += 1
        self.why = str(failure).removeprefix(f"{self.route.name}: ")
        self._in_a_row += 1
        self._over = isinstance(failure, _FINAL) or self._in_a_row >= MAX_FAILURES_IN_A_ROW


async def run(
    trials: Sequence[RouteBenchmark], plan: Plan, patience_s: float, tell: Callable[[float], None]
) -> None:
    """Call every route. `tell` gets the total number of calls made."""

    async def ask(trial: RouteBenchmark, indices: Sequence[int]) -> float | None:
        seconds = await trial.ask(plan, indices, patience_s)
        tell(sum(benchmark.calls for benchmark in trials))
        return seconds

    for trial in trials:
        trial.first_s = await ask(trial, [0])
    for _ in range(plan.rounds):
        for trial in trials:
            missing = [part for part in plan.batches if not trial.vectors.keys() >= {*part}]
            for part in missing or plan.batches[:1]:
                seconds = await ask(trial, part)
                if seconds is not None:
                    trial.batches_s.append(seconds)
            for index in plan.singles:
                seconds = await ask(trial, [index])
                if seconds is not None:
                    trial.singles_s.append(seconds)


def cost(trial: RouteBenchmark, plan: Plan, unknown: float) -> tuple[int, float]:
    """Return the approximate tokens and USD of a trial; `unknown` is the price if none is known.

    It is in USD per million tokens, as all prices are.
    """
    total = plan.tokens(trial.space.tokenizer)
    price = unknown if trial.price is None else trial.price
    return total, nanodollars(total, price) / NANO
