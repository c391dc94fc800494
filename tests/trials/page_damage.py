"""One page of the database damaged under two processes that use it: only what lay on it is lost.

python page_damage.py ROUNDS SEED [STEP] — `make pages` a thousand rounds, the suite a few.
Each round takes a copy of a good store, has two processes read and write it at full speed, and
damages one page in place: zeroed, filled with noise, or 64 bytes of it overwritten. In one of four
rounds the page is damaged before the processes open the store. Then every known entry is read three
times: by the processes, by them again after the salvage, and from the store opened anew. What was
written and charged is noted in a log outside the store.

The rounds have the seeds SEED, SEED + STEP and so on: a round that failed is run again alone with
`python page_damage.py 1 ITS_SEED`. Rounds of an even seed choose among all pages alike; the
others go through the kinds of pages by turns, so that the rare ones come up as well.
"""

import asyncio
import contextlib
import hashlib
import logging
import multiprocessing
import os
import random
import shutil
import sqlite3
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.key import FORMAT, Key, Namespace, keyring
from embedding_proxy.cache.ledger import By, LedgerKey, Usage
from embedding_proxy.cache.memory import Memory
from embedding_proxy.cache.record import Entry
from embedding_proxy.cache.tiers import Tiers
from embedding_proxy.providers.base import Space
from page_map import Damage, PageMap, damage, read_map

from tests.cache.fakes import entries_in

RINGS = (
    keyring(Space("trial/narrow", 96)),
    keyring(Space("trial/narrow", 96), Namespace("team", b"secret")),
    keyring(Space("trial/middle", 384)),
    keyring(Space("trial/wide", 1536)),
    keyring(Space("trial/long", 9000)),  # Longer than a page.
)
WRITTEN_RINGS = RINGS[:4]
SIZES = ((2000, 600, 0, 0, 4), (300, 100, 400, 150, 4), (100, 50, 50, 300, 8))
"""How many entries of each ring the good stores hold."""
THROWN_AWAY = 250
"""Entries of `trial/wide` that are deleted again, so that there are free pages."""
CLIENTS = (900, 40, 40)
"""So many lines have their ledgers; the first one's lie on several pages."""
LIMITS = (64 << 20, 1 << 30)
"""The write-ahead log of the first is merged under load, that of the second at the end."""
PROCESSES = 2
GROUPS_AFTER = 30
"""So many groups of entries are written after the damage."""
PATIENCE_S = 120.0
SIDECARS = ("client-keys.secret", "widths.json", "canaries.json")
LEDGER = (By.NAMESPACE, By.SPACE, By.MODEL, By.PROVIDER, By.CLIENT)

Sums = dict[tuple[str, ...], Usage]


def entry_of(key: Key, dimensions: int) -> Entry:
    """Return the entry that belongs to a key."""
    vector = hashlib.shake_128(key.digest).digest(4 * dimensions)
    return Entry(vector, tokens=7, counted=True, digest=key.digest)


def keys_of(ring: int, word: str, numbers: Iterable[int]) -> list[Key]:
    """Return keys of one ring; `word` says who wrote them."""
    return list(RINGS[ring].keys_at_once([f"{word} {number}" for number in numbers]))


async def put(tiers: Tiers, ring: int, keys: list[Key]) -> None:
    """Write the entries of some keys."""
    partition = RINGS[ring].partition
    entries = {key: entry_of(key, partition.dimensions) for key in keys}
    await tiers.put_many(entries, partition)


def line_of(ring: int, client: str) -> tuple[str, ...]:
    """Return what the ledger calls the charges of a client for a ring."""
    partition = RINGS[ring].partition
    return partition.namespace, partition.space, "model", "provider", client


def charge(store: Store, ring: int, client: str, count: int) -> None:
    """Count a charge for so many inputs."""
    heading = LedgerKey(RINGS[ring].partition, "model", "provider", client)
    store.count(heading, charge_of(count))


def charge_of(count: int) -> Usage:
    """Return the sums of a charge for so many inputs."""
    return Usage(misses=count, tokens_billed=7 * count, nanodollars_billed=140 * count)


class Good(NamedTuple):
    """A good store, and what is in it."""

    directory: Path
    pages: PageMap
    known: list[list[Key]]
    """By ring."""
    sums: Sums


async def prepare(folder: Path, sizes: tuple[int, ...], clients: int) -> list[Good]:
    """Return a store in two states.

    As a kill leaves it: a tenth of it, and the latest version of all pages that are written often,
    is still in the write-ahead log. And with the log merged, as it is in good order.
    """
    sums: Sums = {}
    made, good = folder / "made", folder / "good"
    known = [keys_of(ring, "known", range(size)) for ring, size in enumerate(sizes)]
    async with Store(made, LIMITS[1]) as store:
        tiers = Tiers(Memory(0), store)
        thrown = keys_of(3, "thrown away", range(THROWN_AWAY))
        await put(tiers, 3, thrown)
        for ring, keys in enumerate(known):
            await put(tiers, ring, keys[: len(keys) * 9 // 10])
        for number in range(clients):
            charge(store, 0, f"client {number}", number + 1)
            sums[line_of(0, f"client {number}")] = charge_of(number + 1)
        kept = await store.lookup([key.address for key in thrown])
        await store.delete_many({address: found.record for address, found in kept.items()})
    async with Store(made, LIMITS[1]) as store:
        tiers = Tiers(Memory(0), store)
        for ring, keys in enumerate(known):
            for start in range(len(keys) * 9 // 10, len(keys), 20):
                charge(store, ring, "in the log", 20)
                line = line_of(ring, "in the log")
                sums[line] = sums.get(line, Usage()).plus(charge_of(20))
                await put(tiers, ring, keys[start : start + 20])
        shutil.copytree(made, good)
    for shared in good.rglob("*-shm"):
        shared.unlink()
    for name in SIDECARS:
        (good / f"v{FORMAT}" / name).write_bytes(f"the content of {name}, 32 bytes".encode()[:32])
    merged = folder / "merged"
    shutil.copytree(good, merged)
    database = merged / f"v{FORMAT}" / "cache.db"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    pages = read_map(database)
    return [Good(directory, pages, known, sums) for directory in (good, merged)]


# What the processes do.


class Findings(NamedTuple):
    """What one reading of all that is known came to."""

    missed: set[bytes]
    wrong: int


async def read_some(tiers: Tiers, ring: int, keys: list[Key]) -> Findings:
    """Look up some keys that were written."""
    partition = RINGS[ring].partition
    found = await entries_in(tiers, keys, partition)
    wrong = sum(entry != entry_of(key, partition.dimensions) for key, entry in found.items())
    return Findings({key.address for key in keys if key not in found}, wrong)


async def read_all(tiers: Tiers, known: list[list[Key]]) -> Findings:
    """Look up everything."""
    all_missed, all_wrong = set(), 0
    for ring, keys in enumerate(known):
        for start in range(0, len(keys), 50):
            missed, wrong = await read_some(tiers, ring, keys[start : start + 50])
            all_missed |= missed
            all_wrong += wrong
    return Findings(all_missed, all_wrong)


async def salvaged(store: Store) -> None:
    """Wait until nothing of a file that was set aside is left to be salvaged."""
    # A version that salvages nothing by itself has nothing to wait for.
    wait = getattr(store, "salvaged", None)
    if wait is not None:
        await wait()


async def use(
    directory: Path, limit: int, number: int, known: list[list[Key]], log: int, *, pipe: Connection
) -> dict[str, Findings]:
    """Read and write until told to stop, then read everything twice; return what was found."""
    chance = random.Random(number)
    known, written, all_missed, all_wrong = [list(keys) for keys in known], 0, set(), 0
    async with Store(directory, limit) as store:
        tiers = Tiers(Memory(0), store)
        pipe.send("open")
        while not pipe.poll():
            await asyncio.sleep(0)
            ring = chance.randrange(len(RINGS))
            if known[ring] and chance.random() < 0.7:
                some = chance.choices(known[ring], k=chance.choice((1, 1, 5, 20)))
                missed, wrong = await read_some(tiers, ring, some)
                all_missed |= missed
                all_wrong += wrong
            elif RINGS[ring] in WRITTEN_RINGS:
                count = chance.choice((1, 1, 5, 20))
                new = keys_of(ring, f"process {number}", range(written, written + count))
                charge(store, ring, f"process {number}", count)
                await put(tiers, ring, new)
                os.write(log, f"{number} {ring} {written} {count}\n".encode())
                known[ring] += new
                written += count
        pipe.recv()
        found = {"under load": Findings(all_missed, all_wrong)}
        found["after the load"] = await read_all(tiers, known)
        await salvaged(store)
        found["after the salvage"] = await read_all(tiers, known)
    return found


def process(*arguments: Any, pipe: Connection) -> None:
    """Do this in a process of its own, and send what came of it."""
    try:
        pipe.send(asyncio.run(use(*arguments, pipe=pipe)))
    except BaseException:  # noqa: BLE001 - whatever it is, the parent tells it
        pipe.send(traceback.format_exc())


# One round.


@dataclass
class Outcome:
    """What came of one round."""

    seed: int
    damage: Damage | None = None
    problems: list[str] = field(default_factory=list)
    lost: int = 0
    """Entries that were missed at any time, on the page or not."""
    wrong: int = 0
    sums_too_high: int = 0

    def note(self, when: str, findings: Findings) -> None:
        """Note what a reading found."""
        self.lost = max(self.lost, len(findings.missed))
        self.wrong += findings.wrong
        if findings.wrong:
            self.problems.append(f"{when}: {findings.wrong} wrong vectors")
        others = findings.missed - self.damage.addresses
        if others:
            on_page = len(self.damage.addresses)
            self.problems.append(f"{when}: {len(others)} lost beside the {on_page} of the page")


class Noted(NamedTuple):
    """What the log outside the store says."""

    written: list[list[Key]]
    """By ring."""
    sums: Sums


def noted(log: bytes) -> Noted:
    """Read the log."""
    written: list[list[Key]] = [[] for _ in RINGS]
    sums: Sums = {}
    for line in log.decode().splitlines():
        number, ring, first, count = map(int, line.split())
        written[ring] += keys_of(ring, f"process {number}", range(first, first + count))
        name = line_of(ring, f"process {number}")
        sums[name] = sums.get(name, Usage()).plus(charge_of(count))
    return Noted(written, sums)


def _until(is_done: Any) -> bool:
    """Wait for other processes to do something; return whether they did."""
    end = time.monotonic() + PATIENCE_S
    while not is_done():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def run_round(folder: Path, goods: list[Good], seed: int) -> Outcome:
    """Damage a page of a copy of one of the good stores, and judge what comes of it."""
    chance = random.Random(seed)
    kinds = sorted({kind for good in goods for kind in good.pages.kinds.values()})
    kind = kinds[seed // 2 % len(kinds)] if seed % 2 else None
    good = chance.choice([one for one in goods if kind is None or one.pages.numbers(kind)])
    victim, log_path, outcome = folder / "victim", folder / "log", Outcome(seed)
    shutil.copytree(good.directory, victim)
    log_path.write_bytes(b"")
    (folder / "messages").touch()
    os.truncate(folder / "messages", 0)
    is_down, limit = chance.random() < 0.25, chance.choice(LIMITS)
    if is_down:
        outcome.damage = damage(victim, good.directory, good.pages, kind, chance)
    with _processes(victim, limit, good, log_path) as pipes:
        if _all_say_open(pipes, outcome):
            enough = chance.randrange(40)
            if not is_down and _until(lambda: log_path.read_bytes().count(b"\n") >= enough):
                outcome.damage = damage(victim, good.directory, good.pages, kind, chance)
            before = len(log_path.read_bytes())
            wanted = log_path.read_bytes().count(b"\n") + GROUPS_AFTER
            if not _until(lambda: log_path.read_bytes().count(b"\n") >= wanted):
                outcome.problems.append("nothing is written any more")
            _hear(pipes, outcome)
            log = log_path.read_bytes()
            asyncio.run(_check(victim, limit, good, (noted(log), noted(log[before:])), outcome))
    _check_sidecars(good, victim, outcome)
    if "Traceback" in (messages := (folder / "messages").read_text()):
        outcome.problems.append("there is a traceback in the messages")
    if outcome.problems:
        outcome.problems += messages.splitlines()[-12:]
    shutil.rmtree(victim)
    return outcome


@contextlib.contextmanager
def _processes(victim: Path, limit: int, good: Good, log_path: Path) -> Iterator[list[Connection]]:
    """Run the processes; give the pipe to each."""
    context = multiprocessing.get_context("fork")
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
    pipes, running = [], []
    for number in range(PROCESSES):
        here, there = context.Pipe()
        arguments = (victim, limit, number, good.known, log)
        one = context.Process(target=process, args=arguments, kwargs={"pipe": there})
        one.start()
        there.close()
        pipes.append(here)
        running.append(one)
    os.close(log)
    try:
        yield pipes
    finally:
        for pipe, one in zip(pipes, running, strict=True):
            pipe.close()
            one.join(1)
            one.kill()
            one.join()


def _all_say_open(pipes: list[Connection], outcome: Outcome) -> bool:
    told = [pipe.recv() if pipe.poll(PATIENCE_S) else "it hangs" for pipe in pipes]
    outcome.problems += [f"opening: {one}" for one in told if one != "open"]
    return told == ["open"] * len(pipes)


def _hear(pipes: list[Connection], outcome: Outcome) -> None:
    """Tell the processes to stop, and note what they found."""
    for pipe in pipes:
        # One that has failed has said why, and is gone.
        with contextlib.suppress(OSError):
            pipe.send("stop")
    for pipe in pipes:
        told = pipe.recv() if pipe.poll(PATIENCE_S) else "it hangs"
        if isinstance(told, str):
            outcome.problems.append(f"a process failed: {told}")
            continue
        for when, findings in told.items():
            outcome.note(when, findings)


async def _check(
    victim: Path, limit: int, good: Good, logs: tuple[Noted, Noted], outcome: Outcome
) -> None:
    """Open the store anew, read everything, and hold the ledger against the log."""
    log, log_after = logs
    async with Store(victim, limit) as store:
        tiers = Tiers(Memory(0), store)
        await salvaged(store)
        known = [keys + new for keys, new in zip(good.known, log.written, strict=True)]
        findings = await read_all(tiers, known)
        outcome.note("opened anew", findings)
        after = {key.address for keys in log_after.written for key in keys}
        lost_after = (findings.missed & after) - outcome.damage.addresses
        if lost_after:
            outcome.problems.append(f"{len(lost_after)} lost that were written after the damage")
        lines = await store.ledger(LEDGER)
    if lines is None:
        outcome.problems.append("the ledger cannot be read")
    _compare(dict(lines or ()), good.sums | log.sums, outcome)


def _compare(found: Sums, expected: Sums, outcome: Outcome) -> None:
    lower: Counter[str] = Counter()
    for line, usage in expected.items():
        for name, there, told in zip(Usage._fields, found.get(line, Usage()), usage, strict=True):
            outcome.sums_too_high += there > told
            if there < told:
                lower[name] += told - there
    if lower:
        told = ", ".join(f"{name} by {count}" for name, count in lower.items())
        outcome.problems.append(f"the ledger is lower than the log: {told}")


def _check_sidecars(good: Good, victim: Path, outcome: Outcome) -> None:
    for name in SIDECARS:
        path = victim / f"v{FORMAT}" / name
        if not path.exists():
            outcome.problems.append(f"{name} is gone")
        elif path.read_bytes() != (good.directory / f"v{FORMAT}" / name).read_bytes():
            outcome.problems.append(f"{name} is changed")


# All rounds.


def rounds(folder: Path, seeds: Iterable[int]) -> Iterator[Outcome]:
    """Yield what came of each round."""
    goods: list[Good] = []
    for number, (sizes, clients) in enumerate(zip(SIZES, CLIENTS, strict=True)):
        (folder / str(number)).mkdir()
        goods += asyncio.run(prepare(folder / str(number), sizes, clients))
    for seed in seeds:
        yield run_round(folder, goods, seed)


def report(outcomes: list[Outcome]) -> None:
    """Print what came of them, by kind of page."""
    by_kind: defaultdict[str, list[Outcome]] = defaultdict(list)
    for one in outcomes:
        by_kind[one.damage.kind if one.damage else "none"].append(one)
    print(f"{'page':40} rounds failed  worst: lost  on the page  seed")
    for kind, some in sorted(by_kind.items()):
        worst = max(some, key=lambda one: (bool(one.problems), one.lost))
        failed = sum(bool(one.problems) for one in some)
        on_page = len(worst.damage.addresses) if worst.damage else 0
        print(f"{kind:40} {len(some):6} {failed:6} {worst.lost:12} {on_page:12} {worst.seed:5}")
    total = Counter(failed=sum(bool(one.problems) for one in outcomes))
    total["wrong"] = sum(one.wrong for one in outcomes)
    total["high"] = sum(bool(one.sums_too_high) for one in outcomes)
    print(
        f"{len(outcomes)} pages damaged, {total['failed']} rounds failed,"
        f" {total['wrong']} wrong vectors, sums too high in {total['high']} rounds"
    )


def main() -> int:
    """Run the rounds, tell of each that failed, and return the exit code."""
    count, seed, step = (*map(int, sys.argv[1:]), 1)[:3]
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        logging.basicConfig(filename=Path(name, "messages"), level=logging.WARNING)
        for one in rounds(Path(name), range(seed, seed + step * count, step)):
            outcomes.append(one)
            if one.problems:
                what = f"page {one.damage.number} ({one.damage.kind}) {one.damage.how}"
                print(f"seed {one.seed}, {what}:", *one.problems, sep="\n  ", flush=True)
    report(outcomes)
    return any(one.problems for one in outcomes)


if __name__ == "__main__":
    sys.exit(main())
