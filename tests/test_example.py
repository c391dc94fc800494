"""The scripts in examples/, run as they stand: an application on OpenAI's client, and a service."""

import asyncio
import json
import os
import sys
from pathlib import Path

from aiohttp import web
from any_server import AnyServer
from fault_server import FaultServer

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "ask_documents.py"


async def _openai(request: web.Request) -> web.StreamResponse:
    """Play both of OpenAI's routes; the chat repeats the document that it is given."""
    payload = await request.json()
    if request.path == "/v1/embeddings":
        return web.json_response(FaultServer().reply(payload))
    assert request.path == "/v1/chat/completions"
    document = payload["messages"][0]["content"].partition(": ")[2]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": payload["model"]}
    for word in document.split():
        chunk = {**head, "choices": [{"index": 0, "delta": {"content": f"{word} "}}]}
        await response.write(b"data: %b\n\n" % json.dumps(chunk).encode())
    await response.write(b"data: [DONE]\n\n")
    return response


async def _run(url: str, key: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        SCRIPT,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": key},
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


async def test_the_example_says_the_same_through_the_proxy(start_proxy):
    """Only OPENAI_BASE_URL differs; the second run buys no embedding, and both reach the chat."""
    async with AnyServer(_openai) as upstream:
        proxy = await start_proxy(openai=upstream, passthrough="openai")
        directly, through = await asyncio.gather(
            _run(upstream.url, "sk-own"), _run(proxy.url, "any")
        )
        found, answer = directly.splitlines()
        assert found == f"From: {answer.strip()}"
        assert through == directly == await _run(proxy.url, "any")
    seen = [call for call in upstream.seen if call.headers["Authorization"] != "Bearer sk-own"]
    targets = [call.target for call in seen]
    assert targets == ["/v1/embeddings", "/v1/chat/completions", "/v1/chat/completions"]
    assert {call.headers["Authorization"] for call in seen} == {"Bearer openai-secret-key"}


async def test_the_script_embeds_compares_and_searches(tmp_path):
    """It needs no key: the second time all is cached, and each query finds its document."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        ROOT / "examples" / "embed_compare_search.py",
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(tmp_path)},
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    _, cached, overlap, *found = out.decode().splitlines()
    assert cached == "the second time: 7 of 7 from the cache"
    assert overlap.startswith("64 of 256 numbers: ")
    assert [line.split("  ", 1)[1] for line in found] == [
        "When can I eat lunch?  The canteen serves lunch from noon until two.",
        "Where do I park my bicycle?  Bicycles are parked behind the north wing.",
    ]
