"""A real Chromium without a window, told what to do over its DevTools protocol.

Every name below `.example` leads to this machine, so that pages of foreign origins can be served
here. Source of the protocol: https://chromedevtools.github.io/devtools-protocol/
"""

import asyncio
import base64
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
        self.events: list[dict[str, Any]] = []
        """What pages have told of themselves, as far as they were asked to: see `Page.watch`."""

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
            if "method" in told:
                self.events.append(told)
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
        done = await self.call("Page.navigate", url=url)
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

    async def call(self, method: str, **given: object) -> Any:
        """Call a method of the protocol. Raises PageFailed."""
        return await self._browser.call(method, self._session, **given)

    async def watch(self) -> None:
        """Have the browser note in `events` what the page requests, and what goes wrong in it."""
        for domain in ("Network", "Runtime", "Log"):
            await self.call(f"{domain}.enable")

    @property
    def requested(self) -> set[str]:
        """The addresses that were requested since `watch`."""
        return {
            told["params"]["request"]["url"]
            for told in self._browser.events
            if told["method"] == "Network.requestWillBeSent" and told["sessionId"] == self._session
        }

    @property
    def complaints(self) -> list[str]:
        """What the page's console has said since `watch`: errors, warnings, what was not caught."""
        return [
            json.dumps(told["params"])
            for told in self._browser.events
            if told.get("sessionId") == self._session
            and (
                told["method"] == "Runtime.exceptionThrown"
                or (
                    told["method"] == "Runtime.consoleAPICalled"
                    and told["params"]["type"] in {"error", "warning", "assert"}
                )
                or (
                    told["method"] == "Log.entryAdded"
                    and told["params"]["entry"]["level"] in {"error", "warning"}
                )
            )
        ]

    async def look(self, *, width: int, height: int, scheme: str, scale: float = 1) -> None:
        """Take a size, in pixels of CSS, and a color scheme: "light" or "dark"."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale}
        await self.call("Emulation.setDeviceMetricsOverride", **size, mobile=width < 600)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def shoot(self, *, is_whole: bool = False) -> bytes:
        """Return a picture of the page as WebP: of what is seen, or of all of it."""
        form = {"format": "webp", "quality": 85}
        done = await self.call("Page.captureScreenshot", captureBeyondViewport=is_whole, **form)
        return base64.b64decode(done["data"])

    async def press(self, key: str, text: str = "") -> None:
        """Press a key, by its name; `text` is what it types."""
        codes = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}
        given = {"key": key, "windowsVirtualKeyCode": codes[key], "text": text}
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, **given)

    async def until(self, script: str) -> Any:
        """Wait until an expression is true, and return what it comes to then."""
        found = None
        while not found:
            # Between two pages there is nothing to run a script in.
            with suppress(PageFailed):
                found = await self.run(script)
            await asyncio.sleep(0.01)
        return found

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
