"""The proxy as a process of its own, for tests that kill it."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fault_server import FaultServer


@asynccontextmanager
async def own_process(
    directory: Path, upstream: FaultServer, mode: str = "normal"
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Run the proxy with its cache in `directory`; give the process and its base URL."""
    config = directory / "config.yaml"
    config.write_text(
        f"cache: {{directory: {directory / 'cache'}, mode: '{mode}'}}\n"
        f"providers: {{openai: {{base_url: '{upstream.url}'}}}}\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "serve", "--port", "0", "--config", str(config)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "OPENAI_API_KEY": "k"},
    )
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode().strip()
        yield process, line.removeprefix("export OPENAI_BASE_URL=")
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
