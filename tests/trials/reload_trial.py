"""Reloads, hand-overs and restarts under load: every request of every client is answered.

    PYTHONPATH=.:tests:tests/trials python reload_trial.py --reloads 100 --hand-overs 20 --workers 2

Clients keep their connections, and try nothing twice.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from embedding_proxy.proxy.http import control
from fault_server import FaultServer

MODEL = "text-embedding-3-small"


@dataclass
class Seen:
    """What clients have seen."""

    statuses: Counter[object] = field(default_factory=Counter)
    is_over: bool = False


async def client(url: str, number: int, seen: Seen) -> None:
    """Ask one text after the other, some known and some new, until it is over."""
    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(connector=connector) as session:
        for turn in range(10**9):
            if seen.is_over:
                return
            text = f"text {number % 7}" if turn % 3 else f"text {number} {turn % 50}"
            try:
                body = {"model": MODEL, "input": text}
                async with session.post(f"{url}/embeddings", json=body) as response:
                    await response.read()
                    seen.statuses[response.status] += 1
            except (aiohttp.ClientError, OSError) as error:
                seen.statuses[repr(error)] += 1


class Proxy:
    """The proxy as a process of its own, which may be replaced."""

    def __init__(self, folder: Path, upstream: FaultServer, workers: int) -> None:
        self.config = folder / "config.yaml"
        self.directory = folder / "cache"
        self._upstream = upstream
        self._workers = workers
        self.log = folder / "log"
        self.port = 0
        self.processes: list[asyncio.subprocess.Process] = []

    def configure(self, turn: int = 0) -> None:
        """Write a configuration that differs a little from turn to turn."""
        server = {"port": self.port, "workers": self._workers, "max_body_mib": 64 + turn % 2}
        settings = {
            "server": server,
            "cache": {"directory": str(self.directory)},
            "providers": {"openai": {"base_url": self._upstream.url}},
        }
        draft = self.config.with_suffix(".draft")
        draft.write_text(json.dumps(settings))
        draft.replace(self.config)

    async def start(self, *options: str) -> None:
        """Start a process, and wait until it answers."""
        with self.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "embedding_proxy", "serve", "--config", str(self.config)),
                *options,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OPENAI_API_KEY": "k"},
            )
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode().strip()
        assert line.startswith("export "), self.log.read_text()
        self.port = int(line.removesuffix("/v1").rpartition(":")[2])
        self.processes.append(process)

    async def hand_over(self) -> None:
        """Let a new process take over, and wait for the end of the old one."""
        await self.start("--take-over")
        old = self.processes.pop(0)
        assert await old.wait() == 0

    async def reload(self, turn: int) -> None:
        """Change the configuration, and let the process read it."""
        self.configure(turn)
        path = control.socket_path(self.directory, self.port)
        reply, _ = await asyncio.to_thread(control.ask, path, control.RELOAD)
        assert reply.code == 0, reply

    async def stop(self) -> None:
        """End the process in good order."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0


async def run(reloads: int, hand_overs: int, workers: int, clients: int) -> Seen:
    """Return what the clients have seen."""
    seen = Seen()
    with tempfile.TemporaryDirectory() as folder:
        async with FaultServer(widths={MODEL: 1536}) as upstream:
            proxy = Proxy(Path(folder), upstream, workers)
            proxy.configure()
            await proxy.start()
            proxy.configure()
            url = f"http://127.0.0.1:{proxy.port}/v1"
            async with asyncio.TaskGroup() as group:
                for number in range(clients):
                    group.create_task(client(url, number, seen))
                for turn in range(reloads):
                    await proxy.reload(turn)
                for _ in range(hand_overs):
                    await proxy.hand_over()
                seen.is_over = True
            await proxy.stop()
    return seen


def main() -> None:
    """Run the trial, and say what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reloads", type=int, default=100)
    parser.add_argument("--hand-overs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clients", type=int, default=50)
    given = parser.parse_args()
    seen = asyncio.run(run(given.reloads, given.hand_overs, given.workers, given.clients))
    sys.stdout.write(f"{dict(seen.statuses)}\n")
    sys.exit(set(seen.statuses) != {200})


if __name__ == "__main__":
    main()
