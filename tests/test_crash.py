"""A reply is a promise: what it held is on disk, whatever happens to the process next."""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import openai
from own_process import own_process
from pages import ROOT

MODEL = "text-embedding-3-small"


@asynccontextmanager
async def _process(tmp_path, upstream):
    """Run the proxy as a process of its own; give the process and a client."""
    async with (
        own_process(tmp_path, upstream) as (process, url),
        openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client,
    ):
        yield process, client


async def test_killed_right_after_a_reply(tmp_path, upstream):
    """A kill -9 right after a reply loses nothing: the same request is then a full hit."""
    told = []
    for i in range(5):
        async with _process(tmp_path, upstream) as (process, client):
            create = client.embeddings.with_raw_response.create
            for asked, vectors in told:
                again = await create(model=MODEL, input=asked)
                assert again.headers["x-cache"] == "hit"
                assert [item.embedding for item in again.parse().data] == vectors
            inputs = [f"round {i}, input {n}" for n in range(200)]
            reply = await create(model=MODEL, input=inputs)
            process.send_signal(signal.SIGKILL)
            assert reply.headers["x-cache"] == "miss"
            told.append((inputs, [item.embedding for item in reply.parse().data]))
    assert len(upstream.inputs) == 5 * 200


async def test_killed_amid_purchases(tmp_path, upstream):
    """A kill -9 while requests are in progress: each that was answered is a full hit afterwards."""
    answered = []

    async def ask(client, i):
        reply = await client.embeddings.create(model=MODEL, input=[f"{i}.{n}" for n in range(20)])
        answered.append((i, reply.data[0].embedding))
        if len(answered) == 10:
            enough.set()

    enough = asyncio.Event()
    async with _process(tmp_path, upstream) as (process, client):
        tasks = [asyncio.create_task(ask(client, i)) for i in range(40)]
        await enough.wait()
        process.send_signal(signal.SIGKILL)
        await asyncio.gather(*tasks, return_exceptions=True)
    bought = len(upstream.calls)
    async with _process(tmp_path, upstream) as (_, client):
        for i, vector in answered:
            reply = await client.embeddings.create(
                model=MODEL, input=[f"{i}.{n}" for n in range(20)]
            )
            assert reply.data[0].embedding == vector
    assert len(answered) >= 10
    assert len(upstream.calls) == bought


def _run_script(name, *arguments):
    """Run one of the long trials for a short time; return what it printed."""
    script = Path(__file__).parent / "trials" / name
    folders = (ROOT, ROOT / "tests", script.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_killed_amid_writes_of_two_processes():
    """A few rounds of `make torture`: nothing acknowledged is lost, wrong, or in a corrupt file."""
    assert ", 0 lost, 0 wrong," in _run_script("torture.py", "10", "7")


def test_flipped_bits_and_cut_files():
    """A few rounds of `make damage`: nothing wrong is served, and new writes are kept."""
    assert ", 0 wrong, 0 not written," in _run_script("damage.py", "40", "20", "7")
