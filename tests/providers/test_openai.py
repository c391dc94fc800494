"""OpenAI's adapter: what it sends to api.openai.com, and how OpenAI's errors are read."""

import base64
from dataclasses import replace

import orjson
import pytest
from embedding_proxy.providers.base import Context, Space
from embedding_proxy.providers.errors import (
    AuthenticationError,
    InvalidRequest,
    ModelNotFound,
    QuotaExceeded,
    RateLimited,
    Unreachable,
    UpstreamError,
)
from embedding_proxy.providers.upstream.content_encoding import ACCEPT_ENCODING
from embedding_proxy.providers.vendors import OpenAI
from fault_server import vector_of

URL = "https://api.openai.com/v1/embeddings"
SPACE = Space("openai/text-embedding-3-small", 1536, matryoshka=True, tokenizer="cl100k_base")
MODEL = "text-embedding-3-small"


async def ask(inputs, base_url=OpenAI.profile.base_url):
    """Ask OpenAI once; no socket is opened."""
    profile = replace(OpenAI.profile, base_url=base_url)
    async with OpenAI("openai", profile, api_key="sk-made-up") as provider:
        return await provider.ask(MODEL, SPACE, inputs, Context(user="someone"))


def reply_to(*inputs, floats=False):
    """Return OpenAI's answer."""
    data = []
    for i, item in enumerate(inputs):
        vector = vector_of(MODEL, item)
        embedding = vector.tolist() if floats else base64.b64encode(vector.tobytes()).decode()
        data.append({"object": "embedding", "index": i, "embedding": embedding})
    return {
        "object": "list",
        "data": data,
        "model": MODEL,
        "usage": {"prompt_tokens": len(inputs), "total_tokens": len(inputs)},
    }


async def test_the_request_is_openais(mocked_http):
    """One POST to OpenAI with key, model, inputs, base64 and user; never a width."""
    mocked_http.post(URL, payload=reply_to("a", "b"))
    await ask(["a", "b"])
    ((key, (call,)),) = mocked_http.requests.items()
    assert (key[0], str(key[1])) == ("POST", URL)
    assert orjson.loads(call.kwargs["data"].decode()) == {
        "model": MODEL,
        "input": ["a", "b"],
        "encoding_format": "base64",
        "user": "someone",
    }
    assert call.kwargs["headers"] == {
        "Authorization": "Bearer sk-made-up",
        "Accept-Encoding": ACCEPT_ENCODING,
        "Content-Type": "application/json",
    }
    assert call.kwargs["allow_redirects"] is False


@pytest.mark.parametrize("floats", [False, True], ids=["base64", "floats"])
async def test_the_answer_has_every_bit_of_openais(floats, mocked_http):
    """Base64, and floats sent although base64 was asked, give the same float32 bytes."""
    mocked_http.post(URL, payload=reply_to("a", "b", floats=floats))
    got = await ask(["a", "b"])
    assert list(got.vectors) == [vector_of(MODEL, item).tobytes() for item in ("a", "b")]
    assert (list(got.tokens), got.counted, got.providers) == ([1, 1], True, ("openai",))


async def test_another_base_url_is_used_instead(mocked_http):
    """What speaks OpenAI's format elsewhere is asked there."""
    mocked_http.post("http://localhost:9/openai/v1/embeddings", payload=reply_to("a"))
    assert len((await ask(["a"], "http://localhost:9/openai/v1/")).vectors) == 1


@pytest.mark.parametrize(
    ("status", "kind", "code", "error"),
    [
        (401, "invalid_request_error", "invalid_api_key", AuthenticationError),
        (403, "invalid_request_error", "model_not_found", ModelNotFound),
        (404, "invalid_request_error", "model_not_found", ModelNotFound),
        (429, "insufficient_quota", "insufficient_quota", QuotaExceeded),
        (429, "tokens", "rate_limit_exceeded", RateLimited),
        (429, "requests", "rate_limit_exceeded", RateLimited),
        (400, "invalid_request_error", None, InvalidRequest),
        (400, "max_tokens_per_request", "max_tokens_per_request", InvalidRequest),
        (500, "server_error", None, UpstreamError),
    ],
)
async def test_openais_errors_are_told_apart(status, kind, code, error, mocked_http):
    """Type and code of OpenAI's error are kept, and with its status decide what follows."""
    body = {"error": {"message": "made up", "type": kind, "param": None, "code": code}}
    mocked_http.post(URL, status=status, payload=body, headers={"Retry-After": "2"})
    with pytest.raises(error) as caught:
        await ask(["a"])
    assert type(caught.value) is error
    said = caught.value if error is InvalidRequest else caught.value.refusal
    assert (said.status, said.kind, said.code) == (status, kind, code)
    assert error is InvalidRequest or caught.value.retry_after == 2


async def test_no_connection_is_a_failure_of_the_provider(mocked_http):
    """Whatever aiohttp raises becomes an error of our tree that names the provider alone."""
    with pytest.raises(Unreachable, match=r"^openai: connection failed$"):
        await ask(["a"])
