"""One purchase serves every form: all widths, both encodings, texts and token arrays."""

import base64

import numpy as np
import pytest
from fault_server import vector_of
from splintr import Tokenizer

LARGE = "text-embedding-3-large"
SMALL = "text-embedding-3-small"
WIDTHS = (1, 2, 3, 7, 64, 100, 128, 256, 511, 512, 768, 1024, 1536, 2047, 2048, 3071, 3072)


async def _vectors(proxy, encoding, **fields):
    reply = await proxy.post({"encoding_format": encoding, **fields})
    rows = [row["embedding"] for row in (await reply.json())["data"]]
    if encoding == "base64":
        return reply, [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    return reply, [np.array(row, dtype="<f4") for row in rows]


async def test_seventeen_widths_of_one_purchase(upstream, start_proxy):
    """Each width has length 1, and is what cutting and renormalising in float64 gives."""
    upstream.widths = {LARGE: 3072}
    texts = [f"text {i}" for i in range(20)]
    proxy = await start_proxy(openai=upstream)
    await _vectors(proxy, "float", model=LARGE, input=texts)
    assert len(upstream.calls) == 1
    for width in WIDTHS:
        for encoding in ("float", "base64"):
            fields = {"model": LARGE, "input": texts, "dimensions": width}
            reply, got = await _vectors(proxy, encoding, **fields)
            assert reply.headers["x-cache"] == "hit"
            for text, vector in zip(texts, got, strict=True):
                head = vector_of(LARGE, text, 3072)[:width].astype(np.float64)
                right = head / np.linalg.norm(head)
                assert vector.shape == (width,)
                assert np.abs(vector - right).max() <= 1e-7
                assert abs(np.linalg.norm(vector.astype(np.float64)) - 1) <= 1e-6
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("first", ["python", "node", "haystack", "langchain"])
async def test_a_thousand_texts_by_four_kinds_of_clients(first, upstream, start_proxy):
    """Whoever comes first pays for the others: a thousand inputs are billed in all."""
    upstream.widths = {SMALL: 24}
    models = {SMALL: {"dimensions": 24}, f"openai/{SMALL}": {"dimensions": 24}}
    proxy = await start_proxy(openai=upstream, models=models)
    encode = Tokenizer.from_pretrained("cl100k_base").encode_ordinary
    alphabets = ("plain words", "Größe für müßige Füße", "кириллица", "漢字かな交じり", "🙂 émoji")
    texts = [f"{alphabets[i % 5]} {i}" for i in range(1000)]
    right = [vector_of(SMALL, text, 24).tobytes() for text in texts]

    async def python():
        reply = await proxy.client.embeddings.create(model=SMALL, input=texts)
        return [np.array(row.embedding, "<f4").tobytes() for row in reply.data]

    async def node():
        # As openai-node sends it, unless it is told otherwise.
        body = {"model": SMALL, "input": texts}
        return [one.tobytes() for one in (await _vectors(proxy, "base64", **body))[1]]

    async def haystack():
        got = []
        for start in range(0, len(texts), 32):
            some = texts[start : start + 32]
            reply = await proxy.client.embeddings.create(
                model=SMALL, input=some, encoding_format="float"
            )
            got += [np.array(row.embedding, "<f4").tobytes() for row in reply.data]
        return got

    async def langchain():
        ids = [encode(text) for text in texts]
        reply = await proxy.client.embeddings.create(model=SMALL, input=ids)
        return [np.array(row.embedding, "<f4").tobytes() for row in reply.data]

    clients = {one.__name__: one for one in (python, node, haystack, langchain)}
    assert await clients.pop(first)() == right
    assert sorted(upstream.inputs) == sorted(texts)
    for client in clients.values():
        assert await client() == right
    assert len(upstream.inputs) == 1000
