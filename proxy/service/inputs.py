"""Prepares the inputs of a request before the cache looks them up, and previews what they cost.

Token arrays become the texts that they stand for. Inputs that are too long are cut where the
operator wants that. So the cache sees the input whose vector it keeps.

`preview_cost` tells the tokens of texts, and whether they are cached, before anything is bought.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from embedding_proxy.cache.key import Keys, Namespace, keyring
from embedding_proxy.cache.tiers import Tiers
from embedding_proxy.providers import tokens
from embedding_proxy.providers.base import CachePolicy, Input, TokenCheck
from embedding_proxy.providers.errors import InvalidRequest

from .model_registry import Model

MAX_TOKENS = 300_000
"""In all inputs of a request, at OpenAI."""
MAX_IDS = 1 << 17
"""A token array of more is never decoded: no model takes so many."""
# Up to this many token ids, or characters to be cut, preparing is quicker than a thread.
_INLINE = 8192
_INLINE_INPUTS = 512


class PreparedInputs(NamedTuple):
    """The inputs to embed, and who refuses them if they are too much together."""

    inputs: Sequence[Input]
    check_tokens: TokenCheck | None = None
    """See `Context.check_tokens`: to count them takes longer than to answer them from memory."""


async def prepare(inputs: Sequence[Input], model: Model, *, allow_oversize: bool) -> PreparedInputs:
    """Return the inputs as a model is asked for them.

    More tokens than OpenAI takes in a request are to be refused, unless `allow_oversize`; only
    where the model's tokenizer is known.
    """
    if model.truncate_to is None and set(map(type, inputs)) == {str}:
        return _check_token_limit(inputs, model, allow_oversize=allow_oversize)
    # Clients send cl100k ids, unless they know of another tokenizer.
    encoding = model.space.tokenizer or tokens.CL100K
    max_tokens = model.truncate_to

    # What is sure to be cut or refused is not worth decoding.
    longest = (model.space.tokenizer and model.max_input_tokens) or MAX_IDS

    def change() -> list[Input]:
        texts = [
            tokens.as_text(item, encoding) if len(item) <= longest else item for item in inputs
        ]
        return (
            texts
            if max_tokens is None
            else [tokens.cut(item, max_tokens, encoding) for item in texts]
        )

    work = accumulate(
        len(item) for item in inputs if max_tokens is not None or type(item) is not str
    )
    try:
        is_long = len(inputs) > _INLINE_INPUTS or any(so_far > _INLINE for so_far in work)
        changed = await asyncio.to_thread(change) if is_long else change()
    except UnicodeEncodeError:
        # Half a surrogate pair cannot be cut; the cache refuses it, and says so.
        return PreparedInputs(inputs)
    return _check_token_limit(changed, model, allow_oversize=allow_oversize)


def _check_token_limit(
    inputs: Sequence[Input], model: Model, *, allow_oversize: bool
) -> PreparedInputs:
    if allow_oversize or model.space.tokenizer is None:
        return PreparedInputs(inputs)
    if are_short_texts(inputs) or sum(map(tokens.bound, inputs)) <= MAX_TOKENS:
        return PreparedInputs(inputs)
    return PreparedInputs(inputs, partial(_count_tokens, inputs, model.space.tokenizer))


def are_short_texts(inputs: Sequence[Input]) -> bool:
    """Tell whether inputs are all texts, and too short to hold too many tokens.

    No token is shorter than a byte, and no character longer than four.
    """
    return set(map(type, inputs)) == {str} and 4 * sum(map(len, inputs)) <= MAX_TOKENS


async def _count_tokens(
    inputs: Sequence[Input], encoding: str, known: Sequence[int] | None
) -> dict[str, int]:
    counts = await tokens.count_inputs(inputs, encoding) if known is None else known
    total = sum(counts)
    if total > MAX_TOKENS:
        raise InvalidRequest(
            f"Requested {total} tokens, max {MAX_TOKENS} tokens per request",
            kind="max_tokens_per_request",
            code="max_tokens_per_request",
        )
    pairs = () if known is not None else zip(inputs, counts, strict=True)
    return {item: number for item, number in pairs if isinstance(item, str)}


class CostPreview(NamedTuple):
    """What is known of one text."""

    key: bytes
    """The same for two texts only if they are one purchase."""
    tokens: int
    """Exact where the model's tokenizer is known, else an estimate by cl100k."""
    cached: bool


async def preview_cost(
    model: Model, tiers: Tiers, inputs: Sequence[str], namespace: Namespace
) -> list[CostPreview]:
    """Return what is known of texts as a request would ask for them, cut where they would be.

    Nothing is bought, and no entry counts as used. Raises InputRefused.
    """
    prepared, _ = await prepare(inputs, model, allow_oversize=True)
    ring = keyring(model.space, namespace)
    keys = await ring.keys(prepared)
    distinct = list(dict.fromkeys(keys))
    entries = (
        await tiers.lookup(Keys.from_keys(distinct), ring.partition, CachePolicy(write=False))
    ).entries
    cached = {key for key, entry in zip(distinct, entries, strict=True) if entry is not None}
    counts = await tokens.count_inputs(prepared, model.space.tokenizer or tokens.CL100K)
    return [CostPreview(key.digest, n, key in cached) for key, n in zip(keys, counts, strict=True)]
