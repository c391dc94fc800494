"""python -m bench [--rounds N] [--only T1,T3] [--json FILE] — or `make bench`, which see."""

import argparse
import os
import tempfile
from pathlib import Path

from . import beside, hits, misses, scale
from .process import LOADING
from .table import plain

ROUNDS = 7


def main() -> None:
    """Measure what was asked for, and print a table."""
    parser = argparse.ArgumentParser(description="The figures of this machine, and their targets.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", default="", help="T1,T3 …")
    parser.add_argument("--entries", type=int, default=scale.ENTRIES)
    asked = parser.parse_args()
    only = {name.strip().upper() for name in asked.only.split(",") if name.strip()}
    os.sched_setaffinity(0, LOADING)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        rows = []
        for room in (hits, misses, beside):
            rows += room.rows(Path(name), asked.rounds, lambda target: not only or target in only)
        rows += scale.rows(
            Path(name), asked.rounds, lambda target: not only or target in only, asked.entries
        )
    print(plain(rows))


if __name__ == "__main__":
    main()
