"""A real Chromium without a window, told what to do over its DevTools protocol.

Every name below `.example` leads to this machine, so that pages of foreign origins can be served
here. Source of the protocol: https://chromedevtools.github.io/devtools-protocol/
"""

import asyncio
import itertools
import json
import os
import shutil
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import aiohttp

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PATH = next(filter(None, map(shutil.which, NAMES)), None)
"""Where it is; None if it is not installed."""

_OPTIONS = (
    "--headless",
    "--no-sandbox",  # It does not start as root else, and sees pages of ours only.
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-port=0",
    "--host-resolver-rules=MAP *.example 127.0.0.1",
)
_TOLD = b"DevTools listening on "


class PageFailed(Exception):
    """A script in a page raised something."""


class Browser:
    """Use it with `async with`."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}

    async def __aenter__(self) -> Self:
        assert PATH is not None
        self._profile = tempfile.mkdtemp(prefix="browser-")
        self._process = await asyncio.create_subprocess_exec(
            *(PATH, *_OPTIONS, f"--user-data-dir={self._profile}"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stderr is not None
        told = b""
        while not told.startswith(_TOLD):
            told = await self._process.stderr.readline()
            assert told, "Chromium did not start"
        self._session = aiohttp.ClientSession()
        url = told.removeprefix(_TOLD).decode().strip()
        self._socket = await self._session.ws_connect(url, max_msg_size=0)
        self._tasks = [
            asyncio.create_task(self._receive()),
            asyncio.create_task(_drop(self._process.stderr)),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        # With all the processes that it has started.
        os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        shutil.rmtree(Path(self._profile), ignore_errors=True)

    async def open(self, url: str) -> "Page":
        """Open a page, and return it when it is loaded."""
        target = await self.call("Target.createTarget", url="about:blank")
        given = {"targetId": target["targetId"], "flatten": True}
        attached = await self.call("Target.attachToTarget", **given)
        page = Page(self, attached["sessionId"])
        await page.go(url)
        return page

    async def call(self, method: str, session: str | None = None, **given: object) -> Any:
        """Call a method of the protocol, in a page if its session is given."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": given}
        await self._socket.send_json({**message, **({"sessionId": session} if session else {})})
        return await answer

    async def _receive(self) -> None:
        async for message in self._socket:
            told = json.loads(message.data)
            answer = self._answers.pop(told.get("id"), None)
            if answer is None or answer.done():
                continue
            if "error" in told:
                answer.set_exception(PageFailed(told["error"]["message"]))
            else:
                answer.set_result(told["result"])


class Page:
    """One page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    async def go(self, url: str) -> None:
        """Go to an address. Raises PageFailed."""
        done = await self._browser.call("Page.navigate", self._session, url=url)
        if "errorText" in done:
            raise PageFailed(done["errorText"])
        await self.arrived(url)

    async def arrived(self, url: str) -> None:
        """Wait until the page that is there is that of an address, and complete."""
        where = "location.href + ' ' + document.readyState"
        told = None
        while told != f"{url} complete":
            # Between two pages there is nothing to run a script in.
            with suppress(PageFailed):
                told = await self.run(where)
            await asyncio.sleep(0.01)

    async def run(self, script: str) -> Any:
        """Return what an expression comes to, awaited. Raises PageFailed."""
        done = await self._browser.call(
            "Runtime.evaluate",
            self._session,
            expression=script,
            awaitPromise=True,
            returnByValue=True,
        )
        if "exceptionDetails" in done:
            raise PageFailed(json.dumps(done["exceptionDetails"]))
        return done["result"].get("value")


async def _drop(reader: asyncio.StreamReader) -> None:
    while await reader.read(1 << 16):
        pass
