"""kill -9 at random moments of `migrate run` and `cutover`, and the same command again.

python migrate_kills.py KILLS [SEED] — the suite does a few, `make kills` twenty. A moment is
the arrival of a request, at Qdrant or at the provider; half of those then take effect, and half are
lost. Nothing may be bought twice: a process that outlives the kill keeps what is on its way.
"""

import asyncio
import logging
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from aiohttp import web
from embedding_proxy.index.migration.runner import DEFAULT
from fault_server import vector_of
from old_system import MISTRAL, SIZES, OldSystem, text_of

SHARE = 0.1
"""Of the 2,000 points, in each collection: the moments matter, not the size."""
PAGE = 16
MOST_MOMENTS = 220
"""About how many requests an undisturbed run makes."""


class Story(NamedTuple):
    """What came of it."""

    kills: int
    starts: int
    bought: int
    in_doubt: int
    """Inputs of the calls that were on their way, or had just been answered, at a kill."""


@dataclass
class _Killer:
    """Counts requests at all servers, and kills a process when it is time."""

    chance: random.Random
    process: asyncio.subprocess.Process | None = None
    left: int = 0

    def arrived(self) -> bool:
        """Tell of a request; return whether it is to be lost."""
        self.left -= 1
        if self.left != 0 or self.process is None:
            return False
        self.process.kill()
        return self.chance.random() < 0.5

    async def at_qdrant(self, _: web.Request) -> web.StreamResponse | None:
        return web.Response(status=503) if self.arrived() else None


async def kill_and_resume(folder: Path, kills: int, seed: int) -> Story:
    """Migrate to mistral-embed with so many kills of each step; assert that the end is right."""
    chance = random.Random(seed)
    killer = _Killer(chance)
    async with OldSystem(folder) as system:
        await system.fill(SHARE)

        bought: list[object] = []
        killed = 0

        async def at_provider(_: web.Request, payload: dict[str, Any]) -> web.Response:
            if killer.arrived():
                return web.Response(status=503)
            bought.extend(payload["input"])
            return web.json_response(system.mistral.reply(payload))

        system.mistral.always = at_provider
        system.qdrant.always = killer.at_qdrant
        said = folder / "said.txt"
        starts = in_doubt = 0
        steps = {
            "run": ("--file", str(system.mapping), "--to", MISTRAL, "--page", str(PAGE)),
            "cutover": ("--file", str(system.mapping)),
        }
        for step, arguments in steps.items():
            left = kills
            while True:
                starts += 1
                killer.left = chance.randrange(2, MOST_MOMENTS // 2) if left else 0
                seen = len(system.mistral.calls)
                with said.open("wb") as err:
                    killer.process = await asyncio.create_subprocess_exec(
                        *system.command(step, *arguments),
                        stdout=asyncio.subprocess.DEVNULL,
                        stderr=err,
                        env={**os.environ, **system.environment},
                    )
                # The next one begins at once, whatever of this one is still there.
                code = await killer.process.wait()
                calls = system.mistral.calls[seen:]
                if code == 0:
                    break
                assert code == -9, said.read_text()
                left -= 1
                in_doubt += sum(len(call.inputs) for call in calls[-DEFAULT.ahead :])
            assert left == 0 or step == "cutover"
            killed += kills - left
        system.qdrant.always = None
        assert len(bought) == len(set(bought)), [one for one in bought if bought.count(one) > 1]
        await _right(system)
        targets = {f"live_{name}": _target(system, name) for name in SIZES}
        assert await system.aliases() == targets
        return Story(killed, starts, len(bought), in_doubt)


def _target(system: OldSystem, name: str) -> str:
    return f"{name}__{MISTRAL}-{system.new_width}"


async def _right(system: OldSystem) -> None:
    """Assert that every new collection holds the old points with the right vectors."""
    for name in SIZES:
        before = await system.qdrant.points(name)
        after = await system.qdrant.points(_target(system, name))
        assert set(before) == set(after)
        for one, point in after.items():
            assert point["payload"] == before[one]["payload"]
            expected = vector_of(MISTRAL, text_of(name, point["payload"]), system.new_width)
            assert np.allclose(point["vector"], expected, atol=1e-6)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)  # of connections that are cut in the middle
    with tempfile.TemporaryDirectory() as made:
        told = asyncio.run(kill_and_resume(Path(made), int(sys.argv[1]), int(sys.argv[2])))
    print(
        f"{told.kills} kills, {told.starts} starts, {told.bought} inputs bought,"
        f" none twice (though {told.in_doubt} were on their way at a kill), all points right"
    )
