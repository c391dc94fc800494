"""Azure's adapter: a key in a header of its own, deployments in the path or in the body."""

from dataclasses import replace

import orjson
import pytest
from embedding_proxy.providers.base import Context, Space
from embedding_proxy.providers.upstream.content_encoding import ACCEPT_ENCODING
from embedding_proxy.providers.vendors import Azure
from fault_server import vector_of

SPACE = Space("openai/text-embedding-3-small", 1536, unit_norm=True)
HOST = "https://mine.openai.azure.com"


async def ask(base_url, **options):
    """Ask a deployment once; no socket is opened."""
    options = {**Azure.profile.options, **options}
    profile = replace(Azure.profile, base_url=base_url, options=options)
    async with Azure("azure", profile, api_key="made-up") as provider:
        return await provider.ask("my small one", SPACE, ["a"], Context())


REPLY = {
    "data": [{"index": 0, "embedding": vector_of("m", "a").tolist()}],
    "model": "text-embedding-3-small",
}


@pytest.mark.parametrize(
    ("base_url", "options", "url"),
    [
        (f"{HOST}/openai/v1", {}, f"{HOST}/openai/v1/embeddings"),
        (
            f"{HOST}/openai/",
            {"api_version": "2024-10-21"},
            f"{HOST}/openai/deployments/my%20small%20one/embeddings?api-version=2024-10-21",
        ),
    ],
)
async def test_both_addresses_of_azure_are_asked(base_url, options, url, mocked_http, caplog):
    """The deployment stands in the path or in the body; the reply's model is not compared."""
    mocked_http.post(url, payload=REPLY)
    got = await ask(base_url, **options)
    ((_, (call,)),) = mocked_http.requests.items()
    assert orjson.loads(call.kwargs["data"].decode()) == {
        "model": "my small one",
        "input": ["a"],
        "encoding_format": "base64",
    }
    assert call.kwargs["headers"] == {
        "Accept-Encoding": ACCEPT_ENCODING,
        "api-key": "made-up",
        "Content-Type": "application/json",
    }
    assert got.vectors[0] == vector_of("m", "a").tobytes()
    assert caplog.messages == []
