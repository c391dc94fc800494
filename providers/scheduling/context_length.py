"""Rejects an input that is longer than its model takes, before any upstream is asked.

An upstream would refuse it too, and with it all that shares its call.
"""

from collections.abc import Sequence
from dataclasses import replace

from embedding_proxy.providers import tokens
from embedding_proxy.providers.base import Context, Input, Space
from embedding_proxy.providers.errors import InvalidRequest


async def check_context_length(
    space: Space, inputs: Sequence[Input], max_tokens: int, context: Context
) -> Context:
    """Return the context with the tokens that were counted. Refuses as OpenAI does.

    Only where the tokenizer of the space is known: elsewhere nobody but the upstream can count.
    Raises InvalidRequest, with its index, for the first input of more than `max_tokens`.
    """
    if space.tokenizer is None:
        return context
    long = [i for i, item in enumerate(inputs) if tokens.bound(item) > max_tokens]
    if not long:
        return context
    suspects = [inputs[place] for place in long]
    counts = await tokens.count_inputs(suspects, space.tokenizer, context.counts)
    for place, number in zip(long, counts, strict=True):
        if number > max_tokens:
            raise context_length_exceeded(number, max_tokens, place)
    pairs = zip(suspects, counts, strict=True)
    texts = {item: number for item, number in pairs if isinstance(item, str)}
    return replace(context, counts={**context.counts, **texts})


def context_length_exceeded(number: int, max_tokens: int, index: int) -> InvalidRequest:
    """Return OpenAI's refusal of an input of so many tokens."""
    return InvalidRequest(
        f"This model's maximum context length is {max_tokens} tokens, however you requested"
        f" {number} tokens ({number} in your prompt; 0 for the completion). Please reduce your"
        " prompt; or completion length.",
        index=index,
    )
