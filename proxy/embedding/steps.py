"""Asks for one input before the others: what its answer tells decides how they are asked for."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from embedding_proxy.cache.errors import name_input
from embedding_proxy.cache.ledger import Answered
from embedding_proxy.providers.base import Embedded, EmbeddingError, Input
from embedding_proxy.providers.batching import calls
from embedding_proxy.providers.slices import slices

EmbedSome: TypeAlias = Callable[[Sequence[Input]], Awaitable[Answered]]


async def embed_one_first(
    inputs: Sequence[Input], place: int, first: EmbedSome, others: EmbedSome
) -> Answered:
    """EmbedSome `first` for the input at a place, and its equals, then `others` for the rest, if any.

    Returns the answer to all of them. Raises EmbeddingError, with a place among all of them.
    """
    parts: list[tuple[Sequence[int], Embedded]] = []
    usages = []
    same: list[int] = []
    rest: list[int] = []
    others_inputs: list[Input] = []
    async for some in slices(range(len(inputs))):
        for at in some:
            if inputs[at] == inputs[place]:
                same.append(at)
            else:
                rest.append(at)
                others_inputs.append(inputs[at])
    for places, items, ask in (
        (same, [inputs[place]] * len(same), first),
        (rest, others_inputs, others),
    ):
        if not places:
            continue
        try:
            answer = await ask(items)
        except EmbeddingError as error:
            if error.index is None:
                raise
            raise name_input(error, places[error.index], len(inputs)) from error
        parts.append((places, answer))
        usages.append(answer.usage)
    if not rest:
        return answer
    whole = await calls.assembled_in_steps(parts)
    return Answered(
        vectors=whole.vectors,
        tokens=whole.tokens,
        counted=whole.counted,
        providers=whole.providers,
        outcomes=whole.outcomes,
        usage=usages[0].plus(usages[1]),
    )
