"""The figures of this machine against their targets, as ratios of one run. `make bench`.

python -m bench [--rounds N] [--only T1,T3] [--peers litellm] [--json FILE] [--record]

A whole run is kept in `bench/results`. `--only` takes targets, and `workers` and `memory`; it runs
these and keeps nothing. `--record` puts the figures onto the pages.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from . import beside, hits, misses, peers, record, scale, shared
from .process import LOADING, PROC
from .table import Row, plain

ROUNDS = 7


def measured(asked: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Measure what was asked for."""
    only = set(_words(asked.only.upper()))

    def wanted(target: str) -> bool:
        return not only or target in only

    yield from hits.rows(folder, asked.rounds, wanted)
    if "litellm" in _words(asked.peers):
        yield from peers.rows(folder, wanted)
    yield from misses.rows(folder, asked.rounds, wanted)
    yield from scale.rows(folder, asked.rounds, wanted, asked.entries)
    yield from shared.rows(folder, asked.rounds, wanted)
    yield from beside.rows(folder, asked.rounds, wanted)


def _words(given: str) -> list[str]:
    return given.replace(",", " ").split()


def arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description="The figures of this machine, and their targets.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--only", default="", help="T1,T3 …, workers, memory; default: all")
    parser.add_argument("--peers", default="", help="litellm")
    parser.add_argument(
        "--entries", type=int, default=scale.ENTRIES, help="of the large store: %(default)s"
    )
    parser.add_argument("--json", type=Path, help="keep the run here, too")
    parser.add_argument("--record", action="store_true", help="put it onto the pages")
    asked = parser.parse_args()
    if asked.entries < scale.FEWEST:
        parser.error(f"--entries: at least {scale.FEWEST}")
    if asked.rounds < 1:
        parser.error("--rounds: at least 1")
    if unknown := set(_words(asked.peers)) - set(peers.PEERS):
        parser.error(f"--peers: {', '.join(unknown)} is none of {', '.join(peers.PEERS)}")
    if asked.only and asked.record:
        parser.error("--record: only a whole run goes onto the pages")
    if not PROC.exists():
        parser.error("the bench needs Linux's /proc")
    return asked


def main() -> None:
    """Measure, print, keep."""
    asked = arguments()
    machine = record.Machine()
    os.sched_setaffinity(0, LOADING)
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            for row in measured(asked, Path(name)):
                rows.append(row)  # noqa: PERF402 - what is there is shown, should the next one fail
    finally:
        rows.sort(key=lambda row: int(row.target.removeprefix("T") or 99))
        print(plain(rows))
    told = machine.told(asked.rounds)
    print(record.summary(told, rows))
    files = [asked.json] if asked.json else []
    if not asked.only:
        files.append(record.file_of(told))
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(record.as_json(told, rows), encoding="utf-8")
    if asked.record:
        record.write(told, rows)


if __name__ == "__main__":
    main()
