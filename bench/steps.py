"""How long large requests hold the event loop in one step, and where. On demand.

python -m bench.steps [--inputs 50000,200000] — asks a service with `allow_oversize` for so many
short texts: all new, the same again, and half of each; in code, and over HTTP. Says the
longest step of the loop in processor time, and where steps of more than 20 ms were. The collector
of garbage is told by itself: what it takes grows with all that lives, and not with a request.
"""

import argparse
import asyncio
import asyncio.events
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from aiohttp import web
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http.app import build_app
from embedding_proxy.proxy.service.embedding_service import EmbeddingService

from .material import say
from .process import ROOT, Server, upstream

WIDTH = 64
"""Numbers in a vector: the bytes of vectors are not what is measured."""
MAX_STEP_S = 0.02
SAMPLE_S = 0.004
SHOWN = 6
MODEL = "steps"

_POST = """
import sys, urllib.request
body = open(sys.argv[2], "rb").read()
headers = {"Content-Type": "application/json", "Authorization": "Bearer k"}
with urllib.request.urlopen(urllib.request.Request(sys.argv[1], body, headers)) as reply:
    while reply.read(1 << 20):
        pass
"""


class Watch:
    """Times each step of the event loop, and looks into those that take long."""

    def __init__(self) -> None:
        self.longest = 0.0
        self.places: Counter[str] = Counter()
        """Milliseconds beyond MAX_STEP_S, by what was running."""
        self._since: float | None = None
        self._seen: Counter[str] = Counter()
        self._thread = threading.get_ident()
        self._is_over = False
        self._collecting = self._collected = 0.0
        self.collected = 0.0
        """The longest that the collector of garbage took: its time is that of all that lives."""

    def _collect(self, phase: str, _: dict[str, int]) -> None:
        if threading.get_ident() != self._thread:
            return
        now = time.thread_time()
        if phase == "start":
            self._collecting = now
        else:
            self._collected += now - self._collecting
            self.collected = max(self.collected, now - self._collecting)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch the steps of this thread's loop until the block ends."""
        run = asyncio.events.Handle._run  # noqa: SLF001 - each step of a loop goes through it
        sampler = threading.Thread(target=self._sample, daemon=True)

        def timed(handle: asyncio.Handle) -> None:
            self._seen.clear()
            self._collected = 0.0
            self._since = time.perf_counter()
            begun = time.thread_time()
            try:
                run(handle)
            finally:
                self._note(time.thread_time() - begun - self._collected)
                self._since = None

        asyncio.events.Handle._run = timed  # noqa: SLF001
        sampler.start()
        gc.callbacks.append(self._collect)
        try:
            yield
        finally:
            gc.callbacks.remove(self._collect)
            asyncio.events.Handle._run = run  # noqa: SLF001
            self._is_over = True
            sampler.join()

    def _note(self, seconds: float) -> None:
        self.longest = max(self.longest, seconds)
        if seconds > MAX_STEP_S:
            whole = self._seen.total() or 1
            for place, count in self._seen.items() if self._seen else [("not seen", 1)]:
                self.places[place] += round(1e3 * seconds * count / whole)

    def _sample(self) -> None:
        while not self._is_over:
            time.sleep(SAMPLE_S)
            since = self._since
            if since is not None and time.perf_counter() - since > SAMPLE_S:
                frame = sys._current_frames().get(self._thread)  # noqa: SLF001
                self._seen[_place(frame)] += 1


def _place(frame: FrameType | None) -> str:
    """Return the innermost of our own lines that is being run."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.name != "steps.py":
            name = frame.f_code.co_name
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} {name}"
        frame = frame.f_back
    return "outside"


async def measured(what: str, act: Callable[[], Awaitable[None]]) -> None:
    """Do something, and say how long its steps were."""
    watch, begun = Watch(), time.perf_counter()
    with watch.on():
        await act()
    took = time.perf_counter() - begun
    say(
        f"{what:32} {took:7.2f} s   longest step {1e3 * watch.longest:7.1f} ms"
        f"   garbage {1e3 * watch.collected:6.1f} ms"
    )
    for place, milliseconds in watch.places.most_common(SHOWN):
        say(f"    {milliseconds:6} ms  {place}")


async def measure(up: Server, folder: Path, numbers: Sequence[int]) -> None:
    """Ask a service for so many inputs at a time, in each way."""
    route = {"provider": "openai", "model": "m"}
    settings = Settings.model_validate(
        {
            "server": {"allow_oversize": True, "max_body_mib": 1000},
            "cache": {"directory": str(folder)},
            "providers": {"openai": {"base_url": f"http://127.0.0.1:{up.port}/v1"}},
            "models": {MODEL: {"space": "s", "dimensions": WIDTH, "routes": [route]}},
            "passthrough": None,
        }
    )
    service = EmbeddingService(settings)
    runner = web.AppRunner(build_app(settings, service), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    gc.freeze()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/embeddings"
    for number in numbers:
        texts = [f"{number} input {i}" for i in range(number)]
        mixed = [text if i % 2 else f"{text} new" for i, text in enumerate(texts)]

        async def ask(inputs: Sequence[str]) -> None:
            await service.embed(inputs, MODEL)

        async def post() -> None:
            body = folder / "body.json"
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _POST, url, str(body)), stderr=subprocess.STDOUT
            )
            await process.wait()

        for what, inputs in (("new", texts), ("hits", texts), ("half of them new", mixed)):
            await measured(f"{number} {what}", lambda inputs=inputs: ask(inputs))
        for what, inputs in (
            ("new, HTTP", [f"{text} by HTTP" for text in texts]),
            ("hits, HTTP", texts),
            ("hits again, HTTP", texts),
        ):
            form = {"model": MODEL, "input": inputs, "encoding_format": "base64"}
            (folder / "body.json").write_text(json.dumps(form))
            await measured(f"{number} {what}", post)
    await runner.cleanup()


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description="The longest steps of the event loop.")
    parser.add_argument("--inputs", default="50000,200000", help="default: %(default)s")
    numbers = [int(number) for number in parser.parse_args().inputs.split(",")]
    os.environ["OPENAI_API_KEY"] = "k"
    with tempfile.TemporaryDirectory() as folder, upstream("0", "0", str(WIDTH)) as up:
        asyncio.run(measure(up, Path(folder), numbers))


if __name__ == "__main__":
    main()
