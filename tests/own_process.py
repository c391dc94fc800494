"""The proxy as a process of its own, for tests that kill it, or look at it from outside."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fault_server import FaultServer


@asynccontextmanager
async def own_process(
    directory: Path,
    upstream: FaultServer,
    mode: str = "normal",
    settings: Mapping[str, Any] | None = None,
    errors: Path | None = None,
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Run the proxy with its cache in `directory`; give the process and its base URL.

    `settings` replaces the configuration; `errors` is the file to write stderr to.
    """
    config = directory / "config.yaml"
    if settings is None:
        settings = {
            "cache": {"directory": str(directory / "cache"), "mode": mode},
            "providers": {"openai": {"base_url": upstream.url}},
        }
    config.write_text(json.dumps(settings))
    with (errors or Path(os.devnull)).open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                "-m",
                "embedding_proxy",
                "serve",
                "--port",
                "0",
                "--config",
                str(config),
            ),
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
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
