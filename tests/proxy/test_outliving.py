"""What is paid for is kept, however the command that asked for it is stopped."""

import asyncio
import os
import signal

import pytest
from aiohttp import web
from embedding_proxy.proxy.cli import migrate_process
from embedding_proxy.proxy.cli.migrate_process import ShieldedTask
from embedding_proxy.proxy.cli.output import WorkFailed
from old_system import MISTRAL, OldSystem

COLLECTION = "hephaestus_project_context"


class Provider:
    """A provider that keeps its answers back until it is let."""

    def __init__(self, system):
        self.system = system
        self.asked = asyncio.Event()
        self.go_on = asyncio.Event()
        system.mistral.always = self._answer

    async def _answer(self, _, payload):
        self.asked.set()
        await self.go_on.wait()
        return web.json_response(self.system.mistral.reply(payload))


@pytest.fixture
async def system(tmp_path):
    """Give a small old system."""
    async with OldSystem(tmp_path) as old:
        await old.fill(0.1)
        yield old


@pytest.fixture
def provider(system):
    """Give the provider that the system migrates to."""
    return Provider(system)


async def _run(system):
    """Start a migration as users do."""
    return await asyncio.create_subprocess_exec(
        *system.command("run", COLLECTION, "--to", MISTRAL),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **system.environment},
    )


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
async def test_what_is_on_its_way_is_kept(system, provider, number, code):
    """A run that is stopped while the provider works on its call leaves the answer to the next."""
    first = await _run(system)
    await provider.asked.wait()
    first.send_signal(number)
    if number == signal.SIGKILL:
        assert await first.wait() == code
    second = await _run(system)
    provider.go_on.set()
    assert await first.wait() == code
    out, err = await second.communicate()
    assert (second.returncode, b"another process" in err) == (0, False), err
    assert b"10 points" in out
    assert len(system.bought) == len(set(system.bought)) == 10


async def test_a_second_signal_waits_for_nothing(system, provider):
    """Who presses Ctrl-C twice is not kept waiting, and told of it at the first."""
    run = await _run(system)
    await provider.asked.wait()
    run.send_signal(signal.SIGINT)
    assert await run.stderr.readline() == f"store: {system.folder / 'cache'}\n".encode()
    assert b"interrupt again" in await run.stderr.readline()
    run.send_signal(signal.SIGINT)
    assert await run.wait() == 130
    provider.go_on.set()


def test_a_worker_that_is_killed_is_told_of():
    """Where it is the second process that is killed, the first one says so."""

    def work():
        migrate_process.run_detached()
        os.kill(os.getpid(), signal.SIGKILL)

    before = {number: signal.getsignal(number) for number in migrate_process._TO_STOP}
    try:
        with pytest.raises(WorkFailed, match="killed by SIGKILL; run it again"):
            work()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def test_what_takes_too_long_is_called_off():
    """What has begun is waited for within a limit; then it is ended, and not left behind."""
    ended = []

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    shield = ShieldedTask()
    waiting = asyncio.ensure_future(shield(work()))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended == []
    await shield.wait(0)
    assert ended == [True]
