"""The local model itself, no fake: its semantics, its limits, and what loading it leaves behind."""

import inspect
import itertools
import logging
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import wordllama
from embedding_proxy.providers import local
from embedding_proxy.providers.base import Context, Outcome, Space
from embedding_proxy.providers.errors import InvalidAnswer, InvalidRequest, NoRoute
from embedding_proxy.providers.local import CONTEXT, Local
from hypothesis import given, settings
from hypothesis import strategies as st

SPACE = Space("wordllama/l2-supercat-256", 256, matryoshka=True)
NOBODY = Context()
TEXTS = [
    "the cat sleeps on the sofa",
    "a",
    " leading and trailing ",
    "日本語のテキスト",
    "\x00 \u200b 👩‍👩‍👧",
    "<s>",
    "word " * 700,
]


@pytest.fixture(scope="module")
def model():
    """Give a local model that is loaded once for all tests of this file."""
    provider = Local()
    yield provider
    provider._thread.shutdown()


@pytest.fixture(scope="module")
def oracle():
    """Give WordLlama as its own package loads it."""
    return wordllama.WordLlama.load(
        cache_dir=Path(wordllama.__file__).parent, disable_download=True
    )


async def embed(model, inputs, space=SPACE):
    """Ask the local model."""
    return await model.ask("l2_supercat_256", space, inputs, NOBODY)


async def vectors(model, texts):
    """Return the vectors of texts as an array."""
    got = await embed(model, texts)
    return np.stack([np.frombuffer(vector, dtype="<f4") for vector in got.vectors])


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        ("a cat sleeping on a sofa", "a kitten naps on the couch", "quarterly tax returns"),
        ("how to bake bread", "recipe for a loaf", "the engine of a car"),
        ("the doctor treated the patient", "a nurse in a hospital", "a guitar solo on stage"),
        ("stock prices fell", "the market lost value", "flowers in the garden"),
        ("sort a list in Python", "ordering arrays in code", "a storm at sea"),
    ],
)
async def test_related_texts_are_nearer_than_unrelated(text, near, far, model):
    """The vectors mean something: what people find related has the greater cosine, clearly."""
    it, related, unrelated = await vectors(model, [text, near, far])
    assert it @ related > it @ unrelated + 0.1


async def test_the_vectors_are_wordllamas_own(model, oracle):
    """Each vector is what WordLlama gives for the text with `norm=True`."""
    got = await vectors(model, TEXTS)
    right = np.concatenate([oracle.embed([text], norm=True) for text in TEXTS])
    assert np.abs(got - right).max() <= 1e-6


async def test_vectors_are_of_length_one(model):
    """Every vector has 256 numbers and unit norm."""
    got = (await vectors(model, TEXTS)).astype(np.float64)
    assert got.shape == (len(TEXTS), 256)
    assert np.abs(np.linalg.norm(got, axis=1) - 1).max() <= 1e-6


async def test_a_text_has_one_vector_whatever_the_batch(model):
    """To the last bit: alone, in any order, twice, beside a text a thousand times its length."""
    alone = {text: (await embed(model, [text])).vectors[0] for text in TEXTS}
    for batch in itertools.islice(itertools.permutations([*TEXTS, TEXTS[0]]), 0, 40_320, 4_001):
        got = await embed(model, list(batch))
        assert list(got.vectors) == [alone[text] for text in batch]


@given(st.lists(st.text(min_size=1, max_size=20), min_size=2, max_size=5))
@settings(deadline=None, max_examples=50)
async def test_neighbours_change_nothing(model, texts):
    """Any texts, embedded together or one by one, have the same vectors and counts."""
    together = await embed(model, texts)
    one_by_one = [await embed(model, [text]) for text in texts]
    assert list(together.vectors) == [one.vectors[0] for one in one_by_one]
    assert list(together.tokens) == [one.tokens[0] for one in one_by_one]


async def test_the_answer_is_exact_and_names_the_provider(model, oracle):
    """Tokens are those of the model's own tokenizer, counted, without padding."""
    got = await embed(model, TEXTS)
    right = [len(oracle.tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS]
    assert (list(got.tokens), got.counted) == (right, True)
    assert got.providers == ("local",)
    assert list(got.outcomes) == [Outcome.MISS] * len(TEXTS)


@pytest.mark.parametrize("inputs", [[(1, 2)], ["a", (1, 2)]])
async def test_token_arrays_are_refused(inputs, model):
    """The ids of another model's vocabulary stand for nothing here; the error is about `input`."""
    with pytest.raises(InvalidRequest, match="token arrays") as caught:
        await embed(model, inputs)
    assert (caught.value.status, caught.value.param) == (400, "input")
    assert model.accepts_tokens is False


async def test_further_fields_are_refused_by_name(model):
    """A field that would have no effect must not seem to have one."""
    with pytest.raises(InvalidRequest, match="input_type, task") as caught:
        await embed(model, ["a"], SPACE.with_parameters({"task": "q", "input_type": "query"}))
    assert caught.value.status == 400


async def test_the_context_is_8192_tokens(model):
    """The longest text that is taken has 8192 tokens; one more is refused, naming the input."""
    longest = "word" + " word" * (CONTEXT - 1)
    assert list((await embed(model, [longest])).tokens) == [8192]
    with pytest.raises(InvalidRequest, match="8192 tokens; an input has more") as caught:
        await embed(model, ["fine", f"{longest} word", "fine"])
    refused = caught.value
    assert (refused.status, refused.param, refused.index) == (400, "input", 1)


async def test_a_text_of_long_words_may_fill_the_context(model):
    """The limit in characters refuses no text that the limit in tokens would take."""
    vocabulary = (await _loaded(model)).tokenizer.get_vocab()
    longest = max(vocabulary, key=len)
    assert len(longest) <= local._LONGEST_PIECE
    words = " Representatives" * CONTEXT
    assert list((await embed(model, [words[1:]])).tokens) == [8192]


async def _loaded(model):
    """Return what the provider loaded, after its first use."""
    await embed(model, ["a"])
    return model._model


class Unread:
    """A tokenizer that must not be asked."""

    def __getattr__(self, name):
        raise AssertionError(f"the tokenizer was asked for {name}")


@pytest.mark.parametrize("length", [131_073, 20_000_000])
async def test_a_huge_text_is_refused_unread(length):
    """A text that cannot fit is refused by its length alone, so it costs no time."""
    async with Local() as provider:
        provider._model = SimpleNamespace(tokenizer=Unread())
        with pytest.raises(InvalidRequest, match="an input has more") as caught:
            await embed(provider, ["a", "x" * length])
    assert caught.value.index == 1


@pytest.mark.parametrize(
    ("number", "width", "space", "problem"),
    [
        (0, 256, SPACE, "embedding 0: .*not finite"),
        (1, 128, SPACE, "128 dimensions instead of 256"),
        (1, 256, Space("w", 64), "256 dimensions instead of 64"),
    ],
)
async def test_its_answers_are_checked_like_any_other(number, width, space, problem, model):
    """Damaged weights or a wrong width in the configuration give an error and no vector."""
    tokenizer = (await _loaded(model)).tokenizer
    async with Local("mine") as provider:
        table = np.full((32_000, width), number, np.float32)
        provider._model = SimpleNamespace(tokenizer=tokenizer, embedding=table)
        with pytest.raises(InvalidAnswer, match=f"mine: .*{problem}"):
            await embed(provider, ["a"], space)


async def test_the_model_is_loaded_once_and_off_the_loop(model, monkeypatch):
    """Loading waits for the first input, happens in the model's own thread, and only once."""
    ready = await _loaded(model)
    threads = []

    def load():
        threads.append(threading.current_thread())
        return ready

    monkeypatch.setattr(local, "_load", load)
    async with Local() as provider:
        assert threads == []
        await embed(provider, ["a"])
        await embed(provider, ["b"])
    (thread,) = threads
    assert thread is not threading.main_thread()
    assert not thread.is_alive()


async def test_without_wordllama_the_remedy_is_said(monkeypatch):
    """A missing extra is named with the command that adds it, and logging stays as it was."""
    monkeypatch.setitem(sys.modules, "wordllama", None)
    monkeypatch.setattr(local, "_load", inspect.unwrap(local._load))
    before = list(logging.getLogger().handlers)
    async with Local() as provider:
        with pytest.raises(NoRoute, match=r"pip install 'wordllama>=0\.4'"):
            await embed(provider, ["a"])
    assert logging.getLogger().handlers == before


def test_loading_leaves_logging_alone():
    """In a process of its own: no handler and no level of the root logger is changed."""
    script = """
import logging
from embedding_proxy.providers import local
root = logging.getLogger()
before = root.level, list(root.handlers)
local._load()
assert (root.level, root.handlers) == before == (logging.WARNING, []), root.handlers
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("text", ["", "\ud800"])
async def test_a_text_without_tokens_is_the_clients_mistake(text, model):
    """What has no vector is refused, and not retried."""
    with pytest.raises(InvalidRequest):
        await embed(model, [text])
