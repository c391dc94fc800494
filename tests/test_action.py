"""The composite action: its script, run as the action runs it, and its description."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
import yaml

ACTION = Path(__file__).parents[1] / "action"
ASK = """
import json, os, urllib.request
body = json.dumps({"model": "text-embedding-3-small", "input": os.environ["TEXT"]}).encode()
headers = {"content-type": "application/json"}
url = os.environ["OPENAI_BASE_URL"] + "/embeddings"
print(urllib.request.urlopen(urllib.request.Request(url, body, headers)).headers["x-cache"])
"""


@pytest.fixture
def act(tmp_path, upstream):
    """Give what runs the script of the action in a folder, as on a fresh machine if told so."""
    program = tmp_path / "embedding-proxy"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m embedding_proxy "$@"\n')
    program.chmod(0o755)
    (tmp_path / "ask.py").write_text(ASK)
    config = {
        "cache": {"directory": "cache"},
        "providers": {"openai": {"base_url": upstream.url, "api_key_env": "MY_KEY"}},
    }
    (tmp_path / "embeddings.yaml").write_text(json.dumps(config))

    async def act(text, *, is_frozen, command=f'"{sys.executable}" ask.py', **environment):
        process = await asyncio.create_subprocess_exec(
            *("bash", str(ACTION / "run.sh"), str(program)),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={
                **{name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ},
                "COMMAND": command,
                "CONFIG": "embeddings.yaml",
                "EXPORT": "embeddings.emba",
                "FROZEN": str(is_frozen).lower(),
                "TEXT": text,
                **environment,
            },
        )
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    return act


async def test_what_one_run_records_another_replays(act, upstream, tmp_path):
    """With a key first; then on a machine that has the export alone, without a key."""
    code, out, err = await act("some text", is_frozen=False, MY_KEY="k")
    assert (code, "miss" in out) == (0, True), err
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file():
            path.unlink()
    await upstream.stop()
    code, out, err = await act("some text", is_frozen=True)
    assert (code, "hit" in out) == (0, True), err
    code, out, err = await act("another text", is_frozen=True)
    assert code != 0
    assert "1 from the cache" not in err
    assert len(upstream.inputs) == 1


async def test_what_was_bought_is_kept_when_the_command_fails(act, tmp_path):
    """Its exit code is that of the action."""
    command = f'"{sys.executable}" ask.py; exit 3'
    code, _, _ = await act("some text", is_frozen=False, command=command, MY_KEY="k")
    assert (code, (tmp_path / "embeddings.emba").exists()) == (3, True)


async def test_without_an_export_it_says_how_to_record_one(act):
    """Where nothing may be bought."""
    code, _, err = await act("some text", is_frozen=True)
    assert (code, "record it with `frozen: false`" in err) == (2, True)


def test_every_input_reaches_the_script():
    """Through the environment: a command may hold anything."""
    action = yaml.safe_load((ACTION / "action.yml").read_text(encoding="utf-8"))
    *_, step = action["runs"]["steps"]
    used = {value.removeprefix("${{ inputs.").removesuffix(" }}") for value in step["env"].values()}
    assert used == set(action["inputs"])
    assert "${{" not in step["run"]
