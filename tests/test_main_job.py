"""The main job, end to end: the official client, the proxy, and an upstream on real sockets."""

import base64
import itertools

import numpy as np
import pytest
from embedding_proxy.providers import tokens
from fault_server import vector_of

TEXTS = ["Hello, world", "  hello, world ", "日本語のテキスト", "\x00 null \u200b"]
ENCODABLE = [tuple(tokens._tokenizer("cl100k_base").encode_ordinary(t)) for t in TEXTS]
ODD = ((100257,), (95000, 102), (1, 2, 3, 220))

FORMS = {
    "string": TEXTS[0],
    "strings": TEXTS,
    "tokens": list(ODD[0]),
    "token arrays": [list(item) for item in ODD],
}


def _expected(form: object) -> list[np.ndarray]:
    single = isinstance(form, str) or isinstance(form[0], int)
    items = [form] if single else form
    texts = [tokens.as_text(i if isinstance(i, str) else tuple(i)) for i in items]
    return [vector_of("text-embedding-3-small", t) for t in texts]


def _cut(vector: np.ndarray, dimensions: int) -> np.ndarray:
    head = vector[:dimensions].astype(np.float64)
    return head / np.linalg.norm(head)


@pytest.mark.parametrize("form", FORMS)
async def test_every_form_gets_the_upstreams_vectors(form, upstream, start_proxy):
    """All forms × encodings × widths give the upstream's vectors, bought once, over restarts."""
    asked = {"model": "text-embedding-3-small", "input": FORMS[form]}
    expected = _expected(FORMS[form])
    for attempt in range(3):
        proxy = await start_proxy(openai=upstream)
        for encoding, width in itertools.product((None, "float", "base64"), (None, 1536, 256, 1)):
            extra = {} if encoding is None else {"encoding_format": encoding}
            extra |= {} if width is None else {"dimensions": width}
            reply = await proxy.client.embeddings.create(**asked, **extra)
            assert [item.index for item in reply.data] == list(range(len(expected)))
            for item, right in zip(reply.data, expected, strict=True):
                got = item.embedding
                if isinstance(got, str):
                    got = np.frombuffer(base64.b64decode(got), dtype="<f4")
                got = np.array(got, dtype=np.float32)
                if width in (None, 1536):
                    assert got.tobytes() == right.tobytes()
                else:
                    assert np.abs(got - _cut(right, width)).max() < 1e-6
        assert len(upstream.calls) == 1, f"round {attempt}"
        await start_proxy.stop()
