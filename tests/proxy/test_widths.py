"""A width that a model does not have: refused, cut or padded, as the operator said."""

import numpy as np
import pytest
from embedding_proxy.providers import vector
from embedding_proxy.providers.dimensions import derive
from fault_server import vector_of

ADA = "text-embedding-ada-002"
SMALL = "text-embedding-3-small"


async def _ask(start_proxy, upstream, model, policy, dimensions):
    models = {model: {"dimension_policy": policy}}
    proxy = await start_proxy(openai=upstream, models=models)
    reply = await proxy.post({"model": model, "input": "a", "dimensions": dimensions})
    body = await reply.json()
    got = np.array(body["data"][0]["embedding"]) if reply.status == 200 else body["error"]
    return reply.status, got


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ((ADA, "strict", 512), "This model does not support specifying dimensions."),
        ((ADA, "strict", 1536), "This model does not support specifying dimensions."),
        ((ADA, "truncate", 1537), "at least 1 and at most 1536"),
        ((ADA, "pad", 512), "at least 1536 and at most 65536"),
        ((ADA, "pad", 65537), "at least 1536 and at most 65536"),
        ((SMALL, "strict", 1537), "at least 1 and at most 1536"),
        ((SMALL, "truncate", 1537), "at least 1 and at most 1536"),
        ((SMALL, "pad", 65537), "at least 1 and at most 65536"),
    ],
)
async def test_what_the_policy_does_not_give(asked, told, upstream, start_proxy):
    """A width that neither the model nor the policy gives is a 400 about `dimensions`, unbought."""
    status, error = await _ask(start_proxy, upstream, *asked)
    assert (status, error["param"]) == (400, "dimensions")
    assert told in error["message"]
    assert not upstream.calls


@pytest.mark.parametrize(
    ("model", "policy", "dimensions"),
    [(ADA, "truncate", 512), (ADA, "truncate", 1536), (SMALL, "truncate", 7), (SMALL, "pad", 256)],
)
async def test_cut_and_renormalised(model, policy, dimensions, upstream, start_proxy):
    """What is cut has length 1 again, and the native width is untouched."""
    status, got = await _ask(start_proxy, upstream, model, policy, dimensions)
    assert (status, len(upstream.calls)) == (200, 1)
    assert "dimensions" not in upstream.calls[0].payload
    head = vector_of(model, "a")[:dimensions].astype(np.float64)
    assert np.allclose(got, head / np.linalg.norm(head), atol=1e-7)


@pytest.mark.parametrize("model", [ADA, SMALL])
async def test_padded(model, upstream, start_proxy):
    """Zeros are appended and nothing else is changed, so cosines stay as they are."""
    status, got = await _ask(start_proxy, upstream, model, "pad", 2000)
    assert (status, got.shape) == (200, (2000,))
    assert np.array_equal(got[:1536].astype(np.float32), vector_of(model, "a"))
    assert not got[1536:].any()


def test_padding_keeps_the_cosine():
    """Two vectors padded alike have the cosine they had."""
    one, other = (vector_of("m", text, 8).tobytes() for text in "ab")
    wide = derive([one, other], 20)
    assert [len(v) for v in wide] == [80, 80]
    assert vector.cosine(*wide) == pytest.approx(vector.cosine(one, other), abs=1e-12)
