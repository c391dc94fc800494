"""Rejects an input that is longer than its model takes, before any upstream is asked.

An upstream would refuse it too, and with it all that shares its call.
"""

from collections.abc import Sequence
from dataclasses import replace

from embedding_proxy.providers import tokens
from embedding_proxy.providers.base import Context, Embedded, Embedder, Input, Space
from embedding_proxy.providers.errors import InvalidRequest


class ContextLengthCheck:
    """An Embedder that refuses as OpenAI does, and asks another for what it lets through.

    Only where the tokenizer of the space is known: elsewhere nobody but the upstream can count.
    """

    def __init__(self, inner: Embedder, max_tokens: int | None) -> None:
        """`max_tokens` may be in an input; None = any number."""
        self._inner = inner
        self._most = max_tokens

    async def embed(self, space: Space, inputs: Sequence[Input], context: Context) -> Embedded:
        """Return the answer of the wrapped embedder.

        Raises InvalidRequest, with its index, for the first input that is too long; EmbeddingError.
        """
        if self._most is not None and space.tokenizer is not None:
            long = [i for i, item in enumerate(inputs) if tokens.bound(item) > self._most]
            if long:
                suspects = [inputs[place] for place in long]
                counts = await tokens.count_inputs(suspects, space.tokenizer, context.counts)
                for place, number in zip(long, counts, strict=True):
                    if number > self._most:
                        raise context_length_exceeded(number, self._most, place)
                pairs = zip(suspects, counts, strict=True)
                texts = {item: number for item, number in pairs if isinstance(item, str)}
                context = replace(context, counts={**context.counts, **texts})
        return await self._inner.embed(space, inputs, context)


def context_length_exceeded(number: int, max_tokens: int, index: int) -> InvalidRequest:
    """Return OpenAI's refusal of an input of so many tokens."""
    return InvalidRequest(
        f"This model's maximum context length is {max_tokens} tokens, however you requested"
        f" {number} tokens ({number} in your prompt; 0 for the completion). Please reduce your"
        " prompt; or completion length.",
        index=index,
    )
