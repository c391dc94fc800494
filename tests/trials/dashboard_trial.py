"""The dashboard as people see it: thirteen months of figures, two workers, a load, real pictures.

    PYTHONPATH=.:tests:tests/trials python dashboard_trial.py --axe axe.min.js --pictures docs

A proxy with keys, budgets, two providers and Qdrant runs under a load; the first provider fails for
a while. In Chromium the figures on the page must be those of /status, the charts must move, the
console must stay empty and nothing may be requested elsewhere; axe-core must find nothing, in both
themes, on a desk and on a phone. What is seen is kept as pictures with --pictures.
"""

import argparse
import asyncio
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from browser import Browser, Page
from embedding_proxy.cache.disk.connection import opened
from fault_server import FaultServer, status
from own_process import own_process
from qdrant_server import QdrantServer

MODELS = {
    "text-embedding-3-small": (0.02, 0.55),
    "text-embedding-3-large": (0.13, 0.3),
    "voyage-3.5": (0.06, 0.15),
}
CLIENTS = {"search": 0.5, "nightly-index": 0.35, "ci": 0.15}
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
DAYS = 397
AXE_TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


def seed_ledger(directory: Path) -> None:
    """Write thirteen months of sums: more each month, less at weekends and at night."""
    chance = random.Random(7)
    now = int(time.time() // 3600)
    today = now // 24
    with opened(directory, 1 << 30, create=True) as file, file.transaction(1) as connection:
        connection.execute("INSERT INTO Partitions VALUES (1, '', 'm', 8)")
        for day in range(today - DAYS, today + 1):
            growth = 0.25 + 0.75 * (day - today + DAYS) / DAYS
            weekend = 0.35 if (day + 3) % 7 >= 5 else 1
            for hour in range(24 * day, min(24 * day + 24, now)):
                daily = 0.55 + 0.45 * math.sin((hour % 24 - 8) * math.pi / 12)
                for model, (price, part) in MODELS.items():
                    for client, share in CLIENTS.items():
                        scale = growth * weekend * daily * part * share * chance.uniform(0.6, 1.4)
                        inputs, hit_rate = int(26_000 * scale), chance.uniform(0.72, 0.9)
                        hits = int(inputs * hit_rate)
                        tokens = 310
                        saved, billed = hits * tokens, (inputs - hits) * tokens
                        sums = (
                            *(hits, 0, inputs - hits, 0, saved, billed),
                            *(int(saved * price * 1000), int(billed * price * 1000)),
                        )
                        rows = (("Usage", (day, 1, model, "openai", client)),)
                        if hour > now - 62 * 24:
                            rows += (("Hours", (hour, model, client)),)
                        for table, key in rows:
                            add(connection, table, (*key, *sums))


SUMS = ("hits", "joins", "misses", "duplicates", "tokens_saved", "tokens_billed",
        "nanodollars_saved", "nanodollars_billed")  # fmt: skip


def add(connection: Any, table: str, row: tuple[Any, ...]) -> None:
    """Add a row to the sums."""
    keys = {"Usage": "day, partition, model, provider, client", "Hours": "hour, model, client"}
    more = ", ".join(f"{name} = {name} + excluded.{name}" for name in SUMS)
    marks = ", ".join("?" * len(row))
    connection.execute(
        f"INSERT INTO {table} VALUES ({marks}) ON CONFLICT ({keys[table]}) DO UPDATE SET {more}",
        row,
    )


def add_key(config: Path, name: str, *options: str) -> str:
    """Make a key as people do."""
    command = [sys.executable, "-m", "embedding_proxy", "keys", "add", name, *options]
    done = subprocess.run(
        [*command, "--config", str(config)], check=True, capture_output=True, text=True
    )
    return done.stdout.split()[-1].rpartition("=")[2]


class Load:
    """Clients that ask for known and for new texts until it is over."""

    def __init__(self, url: str, keys: list[str]) -> None:
        self._url, self._keys = url, keys
        self.is_over = False
        self.texts = 0

    async def run(self) -> None:
        """Ask."""
        await asyncio.gather(*map(self._ask, self._keys))

    async def _ask(self, key: str) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        chance = random.Random(key)
        async with aiohttp.ClientSession(headers=headers) as session:
            while not self.is_over:
                is_new = chance.random() < 0.12
                self.texts += is_new
                text = f"text {self.texts}" if is_new else f"known {chance.randrange(40)}"
                body = {"model": chance.choice([*MODELS][:2]), "input": text}
                async with session.post(f"{self._url}/embeddings", json=body) as response:
                    await response.read()
                await asyncio.sleep(chance.uniform(0.005, 0.06))


async def log_in(page: Page, key: str) -> None:
    """Log in, by the keyboard alone."""
    await page.until("!document.getElementById('login').hidden")
    await page.call("Input.insertText", text=key)
    await page.press("Enter", "\r")
    await page.until("!document.getElementById('board').hidden")


async def compare(page: Page, url: str, key: str) -> None:
    """Check that the figures on the page are those of /status, while nothing is asked."""
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session,
        session.get(url.replace("/v1", "/status")) as response,
    ):
        told = (await response.json())["since_ever"]
    shown = await page.run(
        "({usd: document.getElementById('ever-usd').textContent,"
        " tokens: document.getElementById('ever-tokens').textContent})"
    )
    assert shown["usd"] == f"${told['usd_saved']:,.2f}", (shown, told["usd_saved"])
    assert shown["tokens"] == f"{told['tokens_saved']:,} tokens saved", shown
    print(f"page and /status: {shown['usd']} and {shown['tokens']}")


async def check_with_axe(page: Page, axe: str, name: str) -> None:
    """Have axe-core look at the page; it must find nothing."""
    await page.run(f"{axe}; true")
    options = json.dumps({"runOnly": {"type": "tag", "values": AXE_TAGS}})
    found = await page.run(
        f"axe.run(document, {options}).then((told) => ({{passes: told.passes.length, violations:"
        " told.violations.map((one) => [one.id, one.impact, one.nodes.map((n) => n.html"
        " + ' ' + n.failureSummary).slice(0, 3)])}))"
    )
    print(f"{name}: axe-core passes {found['passes']} rules")
    assert found["violations"] == [], json.dumps(found["violations"], indent=1)


async def trial(options: argparse.Namespace, folder: Path) -> None:
    """Run it."""
    async with FaultServer() as first, FaultServer() as second, QdrantServer() as qdrant:
        settings: dict[str, Any] = {
            "server": {"workers": 2},
            "cache": {"directory": str(folder / "cache"), "size_limit_gib": 1},
            "providers": {
                "openai": {"base_url": first.url},
                "openrouter": {"base_url": second.url, "api_key_env": "OPENAI_API_KEY"},
            },
            "index": {"qdrant": {"url": qdrant.url}},
        }
        seed_ledger(folder / "cache")
        for server in (first, second):
            server.widths = {f"{prefix}text-embedding-3-large": 3072 for prefix in ("", "openai/")}
        config = folder / "config.yaml"
        config.write_text(json.dumps(settings))
        admin = add_key(config, "ops", "--admin")
        budgets = {"search": ("--budget", "400/month"), "ci": ("--budget", "0.5/day")}
        keys = [add_key(config, name, *budgets.get(name, ())) for name in CLIENTS]
        async with (
            own_process(folder, first, settings=settings, errors=folder / "log") as (_, url),
            Browser() as browser,
        ):
            load = Load(url, keys)
            loading = asyncio.create_task(load.run())
            page = await browser.open("about:blank")
            await page.watch()
            await page.look(width=1280, height=800, scheme="light")
            await page.go(url.replace("/v1", "/dashboard"))
            await log_in(page, admin)
            await break_off(page, first)
            await asyncio.sleep(options.seconds)
            await look(page, options)
            load.is_over = True
            await loading
            # The other worker writes its hits within ten seconds.
            await asyncio.sleep(13)
            await compare(page, url, admin)
            check_silence(page, url.removesuffix("/v1"))


async def break_off(page: Page, first: FaultServer) -> None:
    """Let the first provider fail for some seconds; meanwhile the charts move."""
    await asyncio.sleep(6)
    first.always = status(503)
    label = "document.getElementById('rate-chart').getAttribute('aria-label')"
    before = await page.run(label)
    await asyncio.sleep(6)
    first.always = None
    after = await page.until(f"{label} !== {json.dumps(before)} && {label}")
    print(f"the charts move: {before}; {after}")


async def look(page: Page, options: argparse.Namespace) -> None:
    """Look at the page in all sizes and themes."""
    for scheme in ("light", "dark"):
        for name, (width, height) in SIZES.items():
            scale = 1.25 if name == "phone" else 1
            await page.look(width=width, height=height, scheme=scheme, scale=scale)
            await asyncio.sleep(1.5)
            if options.axe is not None:
                axe = options.axe.read_text(encoding="utf-8")
                await check_with_axe(page, axe, f"{name}, {scheme}")
            wide = await page.run("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, f"{name} is {wide} pixels too wide"
            if options.pictures is not None:
                picture = options.pictures / f"dashboard-{name}-{scheme}.webp"
                picture.write_bytes(await page.shoot(is_whole=True))


def check_silence(page: Page, origin: str) -> None:
    """Check that nothing was requested elsewhere, and the console has said nothing."""
    elsewhere = {one for one in page.requested if not one.startswith((origin, "blob:"))}
    assert elsewhere == set(), elsewhere
    # Before the log-in, the page learns by a 401 that it has to ask for the key.
    complaints = [one for one in page.complaints if "401" not in one]
    assert complaints == [], complaints
    print(f"{len(page.requested)} addresses, none elsewhere; the console is empty")


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--axe", type=Path, help="axe.min.js of axe-core, from npm")
    parser.add_argument("--pictures", type=Path, help="a folder for what is seen")
    parser.add_argument("--seconds", type=float, default=25, help="of load before it is looked at")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(trial(options, Path(folder)))


if __name__ == "__main__":
    main()
