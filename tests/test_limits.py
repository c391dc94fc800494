"""Limits before money: what is too large is refused, cut or divided before it is paid for."""

import asyncio
import base64

import numpy as np
import openai
import pytest
from embedding_proxy.providers import tokens
from embedding_proxy.proxy.config.loader import ConfigError, load
from embedding_proxy.proxy.config.schema import Settings
from fault_server import vector_of

MODEL = "text-embedding-3-small"
UNCOUNTED = "baai/bge-m3"
SAYS = (
    "This model's maximum context length is 8192 tokens, however you requested {0} tokens"
    " ({0} in your prompt; 0 for the completion). Please reduce your prompt; or completion length."
)


def _words(count: int, word: str = " word") -> str:
    """Return a text of so many tokens."""
    return word.strip() + word * (count - 1)


@pytest.mark.parametrize("form", ["text", "ids"])
async def test_an_input_over_the_context_is_openais_400(form, upstream, start_proxy):
    """8,192 tokens are served and 8,193 are not; the official client sees OpenAI's own words."""
    proxy = await start_proxy(openai=upstream)
    inputs = {"text": _words(8192), "ids": [100257] * 8192}
    over = {"text": _words(8193), "ids": [100257] * 8193}
    reply = await proxy.client.embeddings.create(model=MODEL, input=inputs[form])
    assert reply.usage.prompt_tokens == 8192
    with pytest.raises(openai.BadRequestError) as caught:
        await proxy.client.embeddings.create(model=MODEL, input=over[form])
    assert caught.value.body == {
        "message": SAYS.format(8193),
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
    assert len(upstream.calls) == 1


async def test_one_of_many_is_named_and_nothing_is_bought(upstream, start_proxy):
    """A request with one input too long is refused as a whole, naming the client's own place."""
    proxy = await start_proxy(openai=upstream)
    await proxy.post({"model": MODEL, "input": "known"})
    inputs = ["known", "a", "known", _words(8192), _words(9000), "b"]
    with pytest.raises(openai.BadRequestError) as caught:
        await proxy.client.embeddings.create(model=MODEL, input=inputs)
    assert caught.value.body["message"] == SAYS.format(9000) + " (input 4)"
    assert len(upstream.calls) == 1


async def test_bytes_alone_refuse_nothing(upstream, start_proxy):
    """A text of more bytes than the context has tokens is counted, in the script it is in."""
    proxy = await start_proxy(openai=upstream)
    texts = ["мир " * 2500, "hello " * 8000, " " * 20_000]
    assert all(len(text.encode()) > 8192 for text in texts)
    reply = await proxy.post({"model": MODEL, "input": texts})
    assert reply.status == 200
    assert (await reply.json())["usage"]["prompt_tokens"] == sum(tokens.count(texts))


async def test_those_who_were_gathered_with_it_are_served(upstream, start_proxy):
    """One client's input that is too long harms nobody whose inputs came at the same time."""
    proxy = await start_proxy(openai=upstream, server={"batch_window_ms": 50})
    texts = ["a", _words(8193), "b", "c"]
    asked = [proxy.post({"model": MODEL, "input": text}) for text in texts]
    replies = await asyncio.gather(*asked)
    assert [reply.status for reply in replies] == [200, 400, 200, 200]
    assert sorted(upstream.inputs) == ["a", "b", "c"]


async def test_what_is_cached_is_served_uncounted(upstream, start_proxy, monkeypatch):
    """The limit is on what would be bought: a known input is served, and nobody counts it."""
    proxy = await start_proxy(openai=upstream)
    await proxy.post({"model": MODEL, "input": _words(5000)})
    await start_proxy.stop()
    proxy = await start_proxy(openai=upstream, models={MODEL: {"max_input_tokens": 10}})
    refused = await proxy.post({"model": MODEL, "input": _words(11)})
    monkeypatch.setattr("embedding_proxy.providers.tokens.count", None)
    served = await proxy.post({"model": MODEL, "input": _words(5000)})
    assert (refused.status, served.status, served.headers["x-cache"]) == (400, 200, "hit")
    assert "maximum context length is 10 tokens" in (await refused.json())["error"]["message"]


@pytest.mark.parametrize("change", [{"max_input_tokens": None}, {"tokenizer": None}])
async def test_without_context_or_tokenizer_it_is_left_to_the_upstream(
    change, upstream, start_proxy
):
    """Where nothing exact can be said nothing is said, and the upstream decides."""
    proxy = await start_proxy(openai=upstream, models={MODEL: change})
    reply = await proxy.post({"model": MODEL, "input": _words(9000)})
    assert (reply.status, len(upstream.calls)) == (200, 1)


@pytest.mark.parametrize("batch_window_ms", [0, 1])
async def test_a_long_text_is_counted_once(batch_window_ms, upstream, start_proxy, monkeypatch):
    """From the check to the bill a text is encoded once, however many need its count."""
    encoded = []
    real = tokens._tokenizer(tokens.CL100K)

    class Spy:
        def encode_ordinary(self, text):
            encoded.append(text)
            return real.encode_ordinary(text)

    monkeypatch.setattr(tokens, "_tokenizer", lambda _: Spy())
    proxy = await start_proxy(openai=upstream, server={"batch_window_ms": batch_window_ms})
    # So many that the batcher has to know their tokens too.
    texts = [_words(8000, f" {word}") for word in ("one", "two", "red", "sun", "sky", "sea")]
    texts += [f"{text} again" for text in texts] + ["short"]
    reply = await proxy.post({"model": MODEL, "input": texts})
    assert (await reply.json())["usage"]["prompt_tokens"] == 6 * 8000 + 6 * 8001 + 1
    assert sum(map(len, encoded)) == sum(map(len, texts))


async def test_truncated_before_the_cache(upstream, start_proxy):
    """With `truncate: end` the first tokens are embedded, cached as their own text, and billed."""
    models = {MODEL: {"max_input_tokens": 5, "truncate": "end"}}
    proxy = await start_proxy(openai=upstream, models=models)
    long = "one two three four five six seven"
    reply = await proxy.client.embeddings.create(model=MODEL, input=[long, "short"])
    assert upstream.inputs == ["one two three four five", "short"]
    assert reply.usage.prompt_tokens == 6
    right = vector_of(MODEL, "one two three four five")
    assert np.array_equal(np.array(reply.data[0].embedding, dtype=np.float32), right)
    ids = list(tokens._tokenizer(tokens.CL100K).encode_ordinary(long))
    for same in ("one two three four five", long + " eight", [ids]):
        again = await proxy.post({"model": MODEL, "input": same})
        assert again.headers["x-cache"] == "hit"
        assert (await again.json())["usage"]["prompt_tokens"] == 5
    assert len(upstream.calls) == 1


@pytest.mark.parametrize(
    ("model", "ids", "says"),
    [
        (MODEL, 8193, "requested 8193 tokens"),
        ("wordllama-embed", 131_073, "No provider of this model takes token arrays"),
    ],
)
async def test_an_array_too_long_is_not_decoded(
    *, model, ids, says, upstream, start_proxy, monkeypatch
):
    """Nobody decodes what will be refused: a giant array costs its length and no more."""
    proxy = await start_proxy(openai=upstream)
    monkeypatch.setattr(tokens, "as_text", None)
    reply = await proxy.post({"model": model, "input": [15339] * ids})
    assert reply.status == 400
    assert says in (await reply.json())["error"]["message"]


async def test_truncated_at_a_whole_character(upstream, start_proxy):
    """A cut never leaves half a character, nor a sign in its place; ids without a text stay ids."""
    models = {MODEL: {"max_input_tokens": 5, "truncate": "end"}}
    proxy = await start_proxy(openai=upstream, models=models)
    await proxy.post({"model": MODEL, "input": ["お誕生日おめでとう" * 3, "👩‍👩‍👧‍👦" * 9]})
    await proxy.post({"model": MODEL, "input": [100257] * 9})
    *texts, ids = upstream.inputs
    assert ids == [100257] * 5
    for text, whole in zip(texts, ["お誕生日おめでとう" * 3, "👩‍👩‍👧‍👦" * 9], strict=True):
        assert whole.startswith(text)
        assert text
    assert max(tokens.count(texts)) <= 5


async def test_what_cannot_be_cut_to_a_character_is_refused(upstream, start_proxy):
    """A first character that is more than the context is left whole, and refused with its count."""
    models = {MODEL: {"max_input_tokens": 1, "truncate": "end"}}
    proxy = await start_proxy(openai=upstream, models=models)
    reply = await proxy.post({"model": MODEL, "input": "𒀀"})
    assert reply.status == 400
    assert "however you requested" in (await reply.json())["error"]["message"]
    assert not upstream.calls


@pytest.mark.parametrize(
    ("model", "missing"),
    [(UNCOUNTED, "tokenizer"), (MODEL, "max_input_tokens")],
)
def test_truncating_needs_a_tokenizer_and_a_context(model, missing, tmp_path):
    """Where nobody can count, nothing can be cut: file, key and remedy are named."""
    file = tmp_path / "config.yaml"
    file.write_text(f"models: {{{model}: {{truncate: end, {missing}: null}}}}")
    with pytest.raises(ConfigError) as caught:
        load(file)
    said = str(caught.value)
    assert said.startswith(f"{file}:1: models.{model}.truncate: needs the model's `{missing}`")
    assert "leave `truncate` out" in said


def test_every_catalogued_model_has_its_context():
    """What the catalogue knows of a model's context is what applies, and null can be said."""
    assert Settings().models[MODEL].max_input_tokens == 8192
    assert Settings().models["gemini-embedding-001"].max_input_tokens == 2048
    assert (
        Settings(models={MODEL: {"max_input_tokens": None}}).models[MODEL].max_input_tokens is None
    )


@pytest.mark.parametrize("encoding", ["base64", "float"])
async def test_more_inputs_than_openai_takes_are_served(encoding, upstream, start_proxy):
    """5,000 inputs in one request come back in order, bought once each, in calls of some 500."""
    upstream.widths[MODEL] = 8
    models = {MODEL: {"dimensions": 8, "space": "narrow"}}
    proxy = await start_proxy(openai=upstream, models=models)
    texts = [f"t{i}" for i in range(5000)]
    asked = {"model": MODEL, "input": texts, "encoding_format": encoding}
    reply = await proxy.post(asked)
    data = (await reply.json())["data"]
    assert [item["index"] for item in data] == list(range(5000))
    for i in (0, 2047, 2048, 4999):
        got = data[i]["embedding"]
        if encoding == "base64":
            got = np.frombuffer(base64.b64decode(got), dtype="<f4")
        assert np.array_equal(np.array(got, dtype=np.float32), vector_of(MODEL, texts[i], 8))
    assert sorted(upstream.inputs) == sorted(texts)
    assert max(len(call.inputs) for call in upstream.calls) <= 512
    assert (await proxy.post(asked)).headers["x-cache-hits"] == "5000"
    # Each lies under its own key, and on disk.
    await start_proxy.stop()
    proxy = await start_proxy(openai=upstream, models=models)
    reply = await proxy.post({"model": MODEL, "input": texts[4000:3000:-1]})
    assert reply.headers["x-cache"] == "hit"
    last = (await reply.json())["data"][-1]["embedding"]
    assert np.array_equal(np.array(last, dtype=np.float32), vector_of(MODEL, "t3001", 8))


TOO_MANY = "'$.input' is invalid: it is an array too long: 2049 items, and a maximum of 2048."
MANY_TOKENS = [_words(8000, f" {word}") for word in "abcdefghijklmnopqrs"] * 2
OVERSIZE = {
    "inputs": (["x"] * 2049, TOO_MANY, "invalid_request_error", "input", None),
    "ids alone": ([5] * 2049, TOO_MANY, "invalid_request_error", "input", None),
    "tokens": (
        MANY_TOKENS,
        "Requested 304000 tokens, max 300000 tokens per request",
        "max_tokens_per_request",
        None,
        "max_tokens_per_request",
    ),
}


@pytest.mark.parametrize(
    ("given", "message", "kind", "param", "code"), OVERSIZE.values(), ids=OVERSIZE
)
async def test_oversize_is_openais_400_when_it_is_not_allowed(
    *, given, message, kind, param, code, upstream, start_proxy
):
    """Without `allow_oversize` a request too large gets OpenAI's refusal; with it, it is served."""
    proxy = await start_proxy(openai=upstream, server={"allow_oversize": False})
    with pytest.raises(openai.BadRequestError) as caught:
        await proxy.client.embeddings.create(model=MODEL, input=given)
    assert caught.value.body == {"message": message, "type": kind, "param": param, "code": code}
    assert not upstream.calls
    await start_proxy.stop()
    proxy = await start_proxy(openai=upstream)
    reply = await proxy.client.embeddings.create(model=MODEL, input=given)
    assert len(reply.data) == (1 if given == [5] * 2049 else len(given))


async def test_known_texts_are_weighed_and_not_counted(upstream, start_proxy, monkeypatch):
    """Too many tokens are refused from memory and from disk, by what was counted when bought."""
    texts = [_words(8000, f" {a}{b}") for a in "aei" for b in "bcdfghklmnprst"][:38]
    server = {"allow_oversize": False}
    proxy = await start_proxy(openai=upstream, server=server)
    for start in range(0, 38, 10):
        asked = {"model": MODEL, "input": texts[start : start + 10]}
        assert (await proxy.post(asked)).status == 200
    bought = len(upstream.inputs)
    for tier in ("memory", "disk"):
        if tier == "disk":
            await start_proxy.stop()
            proxy = await start_proxy(openai=upstream, server=server)
        with monkeypatch.context() as patch:
            patch.setattr(tokens, "count", None)
            refused = await proxy.post({"model": MODEL, "input": texts})
            served = await proxy.post({"model": MODEL, "input": texts[:15]})
        assert (refused.status, served.status) == (400, 200)
        assert "max 300000 tokens" in await refused.text()
    assert len(upstream.inputs) == bought


async def test_openais_own_sizes_are_no_oversize(upstream, start_proxy):
    """2,048 inputs, and token arrays of 8,191 ids, are served where nothing more is."""
    proxy = await start_proxy(openai=upstream, server={"allow_oversize": False})
    many = await proxy.post({"model": MODEL, "input": ["x"] * 2048})
    long = await proxy.post({"model": MODEL, "input": [[5] * 8191]})
    full = await proxy.post({"model": MODEL, "input": MANY_TOKENS[:37]})
    assert [many.status, long.status, full.status] == [200, 200, 200]


async def test_a_chunk_that_ends_inside_a_character_keeps_its_ids(upstream, start_proxy):
    """LangChain's 8,191 tokens are bought as they are where a character is torn, else as a text."""
    proxy = await start_proxy(openai=upstream)
    phrase = [33334, 45918, 243, 21990, 9080, 33334, 62004, 16556, 78699]
    chunks = [[264] * 8189 + phrase[:2], phrase[2:], phrase]
    assert len(chunks[0]) == 8191
    reply = await proxy.post({"model": MODEL, "input": chunks})
    assert reply.status == 200
    assert upstream.inputs == [*chunks[:2], "お誕生日おめでとう"]


async def test_arrays_are_decoded_by_the_models_own_tokenizer(upstream, start_proxy):
    """A model of another encoding is sent arrays in it; one without a tokenizer is sent cl100k."""
    models = {MODEL: {"tokenizer": "o200k_base"}, "text-embedding-3-large": {"tokenizer": None}}
    upstream.widths["text-embedding-3-large"] = 3072
    proxy = await start_proxy(openai=upstream, models=models)
    await proxy.post({"model": MODEL, "input": [24912, 2375]})
    await proxy.post({"model": "text-embedding-3-large", "input": [15339, 1917]})
    assert upstream.inputs == ["hello world", "hello world"]
