"""Assembles answers of several calls into one, in the order of the inputs."""

from collections.abc import Sequence
from dataclasses import replace

from embedding_proxy.providers.base import Embedded, Outcome, Vector, slices


def rows_of(part: Embedded, rows: Sequence[int]) -> Embedded:
    """Return the answers in some rows of a part."""
    return replace(
        part,
        vectors=[part.vectors[i] for i in rows],
        tokens=[part.tokens[i] for i in rows],
        outcomes=[part.outcomes[i] for i in rows] if part.outcomes else (),
    )


def assemble(parts: Sequence[tuple[Sequence[int], Embedded]]) -> Embedded:
    """Put the answers to all places of a request into their order.

    The places of one part may come in any order: parts that failed were put together anew.
    """
    if len(parts) == 1 and [*parts[0][0]] == sorted(parts[0][0]):
        return parts[0][1]
    whole = Assembler(sum(len(places) for places, _ in parts))
    for places, part in parts:
        whole.add(places, part.vectors, part.tokens, _outcomes(part))
    return whole.embedded(parts)


async def assemble_in_steps(parts: Sequence[tuple[Sequence[int], Embedded]]) -> Embedded:
    """Do the same for any number of places; others get their turn."""
    whole = Assembler(sum(len(places) for places, _ in parts))
    for places, part in parts:
        outcomes = _outcomes(part)
        async for rows in slices(range(len(places))):
            span = slice(rows[0], rows[-1] + 1)
            whole.add(places[span], part.vectors[span], part.tokens[span], outcomes[span])
    return whole.embedded(parts)


class Assembler:
    """The answer to `count` inputs, put together of parts; `outcome` is that of all others."""

    def __init__(self, count: int, outcome: Outcome = Outcome.MISS) -> None:
        self.vectors: list[Vector] = [b""] * count
        self.tokens = [0] * count
        self.outcomes = [outcome] * count

    def add(
        self,
        places: Sequence[int],
        vectors: Sequence[Vector],
        tokens: Sequence[int],
        outcomes: Sequence[Outcome],
    ) -> None:
        """Add the answers to some places."""
        for place, vector, number, outcome in zip(places, vectors, tokens, outcomes, strict=True):
            self.vectors[place] = vector
            self.tokens[place] = number
            self.outcomes[place] = outcome

    def embedded(self, parts: Sequence[tuple[Sequence[int], Embedded]]) -> Embedded:
        """Return it, when all parts are in it."""
        ordered = sorted(parts, key=lambda part: part[0][0])
        return Embedded(
            vectors=self.vectors,
            tokens=self.tokens,
            counted=all(part.counted for _, part in ordered),
            providers=tuple(dict.fromkeys(name for _, part in ordered for name in part.providers)),
            outcomes=self.outcomes,
        )


def _outcomes(part: Embedded) -> Sequence[Outcome]:
    return part.outcomes or [Outcome.MISS] * len(part.vectors)
