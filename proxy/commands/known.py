"""What is known of texts before anything is bought: their tokens, and whether they are cached."""

from collections.abc import Sequence
from typing import NamedTuple

from embedding_proxy.cache.key import Keys, Namespace, keyring
from embedding_proxy.cache.tiered import Tiers
from embedding_proxy.providers import tokens
from embedding_proxy.providers.base import CachePolicy
from embedding_proxy.proxy.embedding.inputs import prepare
from embedding_proxy.proxy.embedding.registry import Model


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
    found = (
        await tiers.lookup(Keys.of(distinct), ring.partition, CachePolicy(write=False))
    ).entries
    there = {key for key, entry in zip(distinct, found, strict=True) if entry is not None}
    counts = await tokens.counted(prepared, model.space.tokenizer or tokens.CL100K)
    return [CostPreview(key.digest, n, key in there) for key, n in zip(keys, counts, strict=True)]
