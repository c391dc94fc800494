"""Importer: no vector is taken in that the model could not have given, and none is changed."""

import math
import random
import struct

import numpy as np
import pytest
from embedding_proxy.cache import record
from embedding_proxy.cache.key import Namespace, keyring
from embedding_proxy.cache.maintenance.import_source import Pair, RejectedPair
from embedding_proxy.providers.base import Embedded, Space
from embedding_proxy.providers.errors import ProviderError
from embedding_proxy.providers.vector import from_numbers
from embedding_proxy.proxy.cli.cache_import import Importer, SampleDiffers

SPACE = Space("a/space", 4, tokenizer="cl100k_base")
RING = keyring(SPACE, Namespace("tenant"))


class _Source(list):
    name = "a source"


class _Model:
    """An embedder that gives the vectors it was told to give."""

    def __init__(self, vectors) -> None:
        self.vectors = vectors
        self.asked = []

    async def embed(self, space, inputs, context):
        self.asked.append((space, inputs))
        if isinstance(self.vectors, Exception):
            raise self.vectors
        return Embedded([self.vectors[text] for text in inputs], [1] * len(inputs), counted=True)


def _unit(seed, scale=1.0):
    numbers = np.random.default_rng(seed).standard_normal(4)
    return (scale * numbers / np.linalg.norm(numbers)).astype("<f4").tobytes()


PAIRS = [Pair(f"text {i}", _unit(i)) for i in range(20)]


def _surveyed(source, sample=5, *, unit_norm=True, chance=None):
    adoption = Importer(RING, unit_norm=unit_norm)
    found = None
    for found in adoption.survey(_Source(source), sample, chance or random.Random(1)):  # noqa: B007
        pass
    return found


@pytest.mark.parametrize(
    ("vector", "why"),
    [
        (_unit(0)[:12], "the vector: 3 dimensions instead of 4"),
        (_unit(0) + _unit(1), "the vector: 8 dimensions instead of 4"),
        (b"", "the vector: 0 dimensions instead of 4"),
        (from_numbers([1, 0, 0, 1e39]), "the vector: holds a number that is not finite"),
        (struct.pack("<4f", math.nan, 0, 0, 0), "the vector: holds a number that is not finite"),
        (bytes(16), "the vector: all numbers are zero"),
        (_unit(0, 1.02), "the vector: its length is 1.020, and 1 in this model"),
        (_unit(0, 0.98), "the vector: its length is 0.980, and 1 in this model"),
        (_unit(0, 1e30), "the vector: its length is "),
    ],
    ids=range(9),
)
def test_what_cannot_be_a_vector_of_the_model_is_refused(vector, why):
    """Another width, numbers that are none and another length are named, with the pair's place."""
    found = _surveyed([PAIRS[0], Pair("b", vector), PAIRS[1]])
    ((refused,),) = (found.first_refused,)
    assert (refused.where, found.pairs, found.refused) == ("pair 2", 2, 1)
    assert refused.why.startswith(why)
    rows = Importer(RING, unit_norm=True).rows(_Source([Pair("b", vector), PAIRS[1]]))
    assert [row.address for row in rows] == [RING.key(PAIRS[1].text).address]


def test_the_length_counts_only_where_the_model_has_one():
    """Rounding to float32, and a model without a length of its own, are no reasons to refuse."""
    assert _surveyed([Pair("a", _unit(0, 1.009)), Pair("b", _unit(1, 0.991))]).refused == 0
    assert (
        _surveyed([Pair("a", _unit(0, 5)), Pair("b", _unit(1, 0.01))], unit_norm=False).pairs == 2
    )


def test_what_the_source_refuses_is_handed_on():
    """Its own places and reasons are shown, a few of them; all are counted."""
    refused = [RejectedPair(f"line {i}", "no") for i in range(7)]
    found = _surveyed([*PAIRS, *refused])
    assert (found.pairs, found.refused, found.first_refused) == (20, 7, refused[:5])


def test_progress_is_told_pair_by_pair():
    """The survey shows how far it is after every item, whatever the item was."""
    adoption = Importer(RING, unit_norm=True)
    source = _Source([PAIRS[0], RejectedPair("line 2", "no"), PAIRS[1]])
    steps = adoption.survey(source, 0, random.Random(1))
    assert [(s.pairs, s.refused) for s in steps] == [(1, 0), (1, 1), (2, 1)]


@pytest.mark.parametrize("sample", [0, 1, 5, 19, 20, 21])
def test_a_sample_has_the_asked_size_and_no_pair_twice(sample):
    """It holds pairs of the source, as many as asked for or as there are."""
    found = _surveyed([*PAIRS, Pair("bad", b"")], sample)
    assert len(found.sample) == min(sample, 20)
    assert set(found.sample) <= set(PAIRS)
    assert len(set(found.sample)) == len(found.sample)


def test_every_pair_has_the_same_chance_to_be_in_the_sample():
    """Neither the first nor the last pairs of a source are preferred."""
    drawn = dict.fromkeys(PAIRS, 0)
    chance = random.Random(7)
    for _ in range(2000):
        for pair in _surveyed(PAIRS, 5, chance=chance).sample:
            drawn[pair] += 1
    # 500 each on average, with a standard deviation of 19.
    assert all(400 < count < 600 for count in drawn.values())


async def test_a_sample_of_the_model_passes():
    """The texts are embedded in the model's space, in one call, and the worst cosine is told."""
    adoption = Importer(RING, unit_norm=True)
    near = np.frombuffer(PAIRS[1].vector, "<f4") + np.float32([1e-2, 0, 0, 0])
    model = _Model({pair.text: pair.vector for pair in PAIRS} | {"text 1": near.tobytes()})
    worst = await adoption.compare(PAIRS[:5], model)
    assert model.asked == [(SPACE, [pair.text for pair in PAIRS[:5]])]
    assert 0.999 <= worst < 1 - 1e-6
    assert await adoption.compare(PAIRS[2:4], model) == pytest.approx(1)


async def test_the_length_of_the_models_vector_does_not_count():
    """What points the same way is of the same model; the length was checked before."""
    model = _Model({PAIRS[0].text: _unit(0, 3)})
    assert await Importer(RING, unit_norm=True).compare(PAIRS[:1], model) == pytest.approx(1)


@pytest.mark.parametrize("wrong", [0, 2, 4])
async def test_one_other_vector_in_the_sample_is_enough(wrong):
    """Wherever it stands, a vector that points elsewhere fails the sample; the message says how."""
    vectors = {pair.text: pair.vector for pair in PAIRS[:5]}
    vectors[PAIRS[wrong].text] = struct.pack(
        "<4f", *(-x for x in struct.unpack("<4f", PAIRS[wrong].vector))
    )
    with pytest.raises(SampleDiffers, match=r"^1 of 5 .*cosine -1.000.*; nothing was taken in$"):
        await Importer(RING, unit_norm=True).compare(PAIRS[:5], _Model(vectors))


async def test_a_model_that_cannot_be_asked_proves_nothing():
    """A failure of the provider is raised, not taken for consent."""
    with pytest.raises(ProviderError):
        await Importer(RING, unit_norm=True).compare(PAIRS[:2], _Model(ProviderError("p", "no")))


@pytest.mark.parametrize("count", [1, 499, 500, 501, 1001])
def test_rows_are_what_the_proxy_would_have_kept(count):
    """Each pair is a record under its own key, with its very bytes and its exact cost."""
    pairs = [Pair(f"text {i}" + " more" * (i % 3), _unit(i)) for i in range(count)]
    rows = list(Importer(RING, unit_norm=True).rows(_Source(pairs)))
    assert len(rows) == count
    for i, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        key = RING.key(pair.text)
        entry = record.decode(row.record, key.digest, 4)
        tokens = len(str(i)) // 4 + 3 + i % 3  # "text", " ", the number, by three digits a token
        assert entry == record.Entry(pair.vector, tokens, counted=True, digest=key.digest)
        assert (row.address, row.partition) == (key.address, RING.partition)
        assert math.isnan(row.stored)


def test_a_guess_of_the_cost_is_marked_as_one():
    """Without the model's tokenizer a quarter of the bytes, rounded up, stands for the tokens."""
    ring = keyring(Space("b/space", 4))
    pairs = [Pair("a", _unit(0)), Pair("abcde", _unit(1)), Pair("üüü", _unit(2))]
    rows = Importer(ring, unit_norm=False).rows(_Source(pairs))
    entries = [
        record.decode(row.record, ring.key(pair.text).digest, 4)
        for row, pair in zip(rows, pairs, strict=True)
    ]
    assert [(entry.tokens, entry.counted) for entry in entries] == [
        (1, False),
        (2, False),
        (2, False),
    ]
