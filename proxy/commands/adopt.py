"""Taking in vectors that were bought elsewhere: checked one by one, and as a whole by a sample.

A vector of another model with the same width looks right. So some texts are embedded anew, with the
model that they are said to be of, and what comes back must point the same way.
"""

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from embedding_proxy.cache import record
from embedding_proxy.cache.key import Keyring
from embedding_proxy.cache.maintenance.import_source import Pair, Refused, Source
from embedding_proxy.cache.record import Entry
from embedding_proxy.cache.row import Row
from embedding_proxy.providers import tokens, vector
from embedding_proxy.providers.base import Context, Embedder, Vector
from embedding_proxy.providers.probe import SAME

MOST_OFF_NORM = 0.01
_MOST_SHOWN = 5
_BATCH = 500
_BYTES_A_TOKEN = 4


@dataclass
class Survey:
    """What one pass over a source found."""

    pairs: int = 0
    refused: int = 0
    first_refused: list[Refused] = field(default_factory=list)
    sample: list[Pair] = field(default_factory=list)


class SampleDiffers(Exception):
    """The model gives other vectors for these texts; the message says how different."""


class Importer:
    """Pairs of text and vector -> rows of a partition."""

    def __init__(self, ring: Keyring, *, unit_norm: bool) -> None:
        """`unit_norm` says whether a vector of another length than 1 is refused."""
        self._ring = ring
        self._unit_norm = unit_norm

    def survey(self, source: Source, sample: int, chance: random.Random) -> Iterator[Survey]:
        """Read all pairs once, yielding what was found so far; draw a sample evenly from all."""
        found = Survey()
        for item in self.checked(source):
            if isinstance(item, Refused):
                found.refused += 1
                if len(found.first_refused) < _MOST_SHOWN:
                    found.first_refused.append(item)
            else:
                found.pairs += 1
                if len(found.sample) < sample:
                    found.sample.append(item)
                elif (place := chance.randrange(found.pairs)) < sample:
                    found.sample[place] = item
            yield found

    def checked(self, items: Iterable[Pair | Refused]) -> Iterator[Pair | Refused]:
        """Replace each pair whose vector cannot be one of this model by the reason."""
        for number, item in enumerate(items, start=1):
            why = None if isinstance(item, Refused) else self._objection(item.vector)
            yield item if why is None else Refused(f"pair {number}", f"the vector: {why}")

    def _objection(self, candidate: Vector) -> str | None:
        """Say why this is no vector of the model, if it is none."""
        try:
            vector.check(candidate, self._ring.space.dimensions)
        except vector.VectorError as error:
            return str(error)
        length = vector.length(candidate)
        if self._unit_norm and abs(length - 1) > MOST_OFF_NORM:
            return f"its length is {length:.3f}, and 1 in this model"
        return None

    async def compare(self, sample: list[Pair], embedder: Embedder) -> float:
        """Embed the sample's texts anew; return the smallest cosine with what is offered.

        Raises SampleDiffers, EmbeddingError.
        """
        texts = [pair.text for pair in sample]
        answer = await embedder.embed(self._ring.space, texts, Context())
        cosines = [
            vector.cosine(pair.vector, bought)
            for pair, bought in zip(sample, answer.vectors, strict=True)
        ]
        off = sum(cosine < SAME for cosine in cosines)
        if off:
            raise SampleDiffers(
                f"{off} of {len(cosines)} sampled texts have other vectors in this model"
                f" (cosine {min(cosines):.3f}, wanted {SAME}); nothing was taken in"
            )
        return min(cosines)

    def rows(self, source: Source) -> Iterator[Row]:
        """Yield the rows of the pairs that can be used. Raises SourceError."""
        batch: list[Pair] = []
        for item in self.checked(source):
            if isinstance(item, Pair):
                batch.append(item)
            if len(batch) == _BATCH:
                yield from self._rows_of(batch)
                batch = []
        yield from self._rows_of(batch)

    def _rows_of(self, pairs: list[Pair]) -> Iterator[Row]:
        texts = [pair.text for pair in pairs]
        encoding = self._ring.space.tokenizer
        if encoding is None:
            # Nobody said what they cost; a guess is marked as not counted.
            costs = [math.ceil(len(text.encode()) / _BYTES_A_TOKEN) for text in texts]
        else:
            costs = tokens.count(texts, encoding)
        for pair, cost in zip(pairs, costs, strict=True):
            key = self._ring.key(pair.text)
            entry = Entry(pair.vector, cost, encoding is not None, key.digest)
            yield Row(key.address, record.encode(entry), math.nan, self._ring.partition)
