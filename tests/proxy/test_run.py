"""`embedding-proxy run`: a command with a proxy of its own."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

ASK = """
import json, os, sys, urllib.request
for text in sys.argv[1:]:
    body = json.dumps({"model": "text-embedding-3-small", "input": text}).encode()
    headers = {"content-type": "application/json",
               "authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/embeddings", body, headers)
    print(urllib.request.urlopen(request).headers["x-cache"])
"""
PROJECT = """
import openai

def test_it_embeds():
    with openai.OpenAI() as client:
        reply = client.embeddings.create(model="text-embedding-3-small", input=["one", "two"])
    assert [len(item.embedding) for item in reply.data] == [1536, 1536]
"""


class Running:
    """Runs `embedding-proxy run` as a process of its own, with an environment without keys."""

    def __init__(self, folder: Path, config: dict[str, object]) -> None:
        self.config = folder / "config.yaml"
        self.config.write_text(json.dumps(config))
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}

    async def start(self, *arguments, **environment):
        """Start it, with a pipe for each standard stream."""
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "embedding_proxy", "run", "--config", str(self.config)),
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**self.environment, **environment},
        )

    async def __call__(self, *arguments, **environment):
        """Run it to its end; return the exit code and what it printed, stdout and stderr."""
        process = await self.start(*arguments, **environment)
        out, err = await process.communicate()
        assert b"Traceback" not in err
        return process.returncode, out.decode(), err.decode()


@pytest.fixture
def run(tmp_path, upstream):
    """Give what runs commands in front of the upstream."""
    config = {
        "cache": {"directory": str(tmp_path / "cache")},
        "providers": {"openai": {"base_url": upstream.url, "api_key_env": "MY_KEY"}},
    }
    return Running(tmp_path, config)


async def test_a_command_embeds_through_the_proxy(run, upstream):
    """It is told what that has cost and saved, and a second run buys nothing."""
    ask = ("--", sys.executable, "-c", ASK)
    code, out, err = await run(*ask, "a", "b", "a", MY_KEY="k")
    assert (code, out.split()) == (0, ["miss", "miss", "hit"])
    assert "3 inputs: 1 from the cache (33.3%), 2 bought for $0.00000004; $0.00000002 saved" in err
    code, out, err = await run(*ask, "a", "b", MY_KEY="k")
    assert (code, out.split()) == (0, ["hit", "hit"])
    assert "2 inputs: 2 from the cache (100.0%), 0 bought for $0.00; $0.00000004 saved" in err
    assert len(upstream.inputs) == 2


async def test_what_was_recorded_is_served_frozen_without_a_key(run, upstream, tmp_path):
    """The tests of a project: once with a key, and then with none and no provider."""
    (tmp_path / "test_project.py").write_text(PROJECT)
    tests = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path)
    command = (*map(str, tests), str(tmp_path / "test_project.py"))
    code, out, err = await run("--", *command, MY_KEY="k")
    assert (code, "1 passed" in out) == (0, True), out + err
    await upstream.stop()
    code, out, err = await run("--frozen", "--", *command)
    assert (code, "1 passed" in out) == (0, True), out + err
    assert "2 inputs: 2 from the cache (100.0%), nothing bought" in err
    (tmp_path / "test_project.py").write_text(PROJECT.replace("two", "another"))
    code, out, err = await run("--frozen", "--", *command)
    assert (code, "1 failed" in out) == (1, True), out + err
    assert (
        "0 inputs: 0 from the cache, nothing bought; $0.00 saved; 1 request failed (404: 1)" in err
    )


@pytest.mark.parametrize(
    ("command", "code"),
    [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 128 + 15), ("kill -KILL $$", 128 + 9)],
)
async def test_the_exit_code_is_that_of_the_command(run, command, code):
    """As a shell tells it; and one that has embedded nothing is told how to."""
    returned, _, err = await run("sh", "-c", command)
    assert returned == code
    assert "the command has embedded nothing through the proxy" in err


async def test_a_command_that_cannot_be_run_ends_as_in_a_shell(run, tmp_path):
    """With one line that says why."""
    plain = tmp_path / "plain"
    plain.write_text("no program")
    code, _, err = await run("--", "no-such-command-anywhere")
    reason = "embedding-proxy: run: no-such-command-anywhere: No such file or directory\n"
    assert (code, err.endswith(reason)) == (127, True)
    code, _, err = await run("--", str(plain))
    assert (code, err.endswith(f"run: {plain}: Permission denied\n")) == (126, True)


async def test_options_after_the_command_are_its_own(run):
    """Also those that `run` has, without `--`."""
    code, out, _ = await run("echo", "--frozen", "--config", "x", "-v")
    assert (code, out) == (0, "--frozen --config x -v\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
async def test_signals_are_passed_on(run, number):
    """The command decides what they mean; the proxy stays as long as the command."""
    wait = (
        "import signal, sys; number = int(sys.argv[1]);"
        " signal.signal(number, lambda *_: sys.exit(9)); print('ready', flush=True);"
        " signal.pause()"
    )
    process = await run.start("--", sys.executable, "-c", wait, str(int(number)))
    assert await process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    await process.communicate()
    assert process.returncode == 9


async def test_the_command_finds_the_proxy_in_its_environment(run):
    """A key that is set stays; without one there is a placeholder, as libraries want one."""
    show = ("sh", "-c", 'echo "$OPENAI_BASE_URL $OPENAI_API_BASE $OPENAI_API_KEY"')
    _, out, _ = await run(*show)
    url, base, key = out.split()
    assert url.startswith("http://127.0.0.1:")
    assert url.endswith("/v1")
    assert (base, key) == (url, "embedding-proxy")
    _, out, _ = await run(*show, OPENAI_API_KEY="mine")
    assert out.split()[2] == "mine"


async def test_a_command_has_a_key_of_the_proxy(tmp_path, upstream):
    """Where clients need one, and the environment has none."""
    config = {
        "server": {"keys": ["a-key-for-clients-of-24-chars"]},
        "cache": {"directory": str(tmp_path / "cache")},
        "providers": {"openai": {"base_url": upstream.url, "api_key_env": "MY_KEY"}},
    }
    run = Running(tmp_path, config)
    code, out, err = await run("--", sys.executable, "-c", ASK, "a", MY_KEY="k")
    assert (code, out) == (0, "miss\n"), err


async def test_a_proxy_that_runs_is_not_in_the_way(run, tmp_path, upstream):
    """Two commands at once, with one cache: each has a port of its own."""
    first = await run.start("sh", "-c", "echo $OPENAI_BASE_URL; read line")
    url = (await first.stdout.readline()).decode()
    code, out, _ = await run("sh", "-c", "echo $OPENAI_BASE_URL")
    assert code == 0
    assert out != url
    await first.communicate(b"\n")
    assert first.returncode == 0


async def test_a_configuration_with_mistakes_starts_nothing(run):
    """They are told as `serve` tells them."""
    run.config.write_text("server: {nope: 1}")
    code, out, err = await run("echo", "started")
    assert (code, out) == (2, "")
    assert "server.nope" in err
