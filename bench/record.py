"""A run as JSON, and what of it goes onto the pages.

python -m bench.record RESULT.json — writes the chart, and the tables of README.md and
docs/performance.md, anew from a run that was kept.
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import pages
from .chart import Bar, Panel, svg
from .process import CORES, ROOT, busy_seconds
from .table import Row, Verdict, cells, markdown, number

RESULTS = ROOT / "bench" / "results"
PANELS = (("One input", "T1"), ("2,000 inputs, base64", "T3"), ("2,000 inputs, floats", "T4"))


class Machine:
    """What a run was made on, and how much of it others had meanwhile."""

    def __init__(self) -> None:
        self._before = busy_seconds()
        self._load = os.getloadavg()[0]
        self._date = datetime.now(UTC)
        self._commit = _commit()

    def told(self, rounds: int) -> dict[str, Any]:
        """Return what is to be known of the run, which ends now."""
        passed, busy, own = (b - a for a, b in zip(self._before, busy_seconds(), strict=True))
        return {
            "date": self._date.isoformat(timespec="seconds"),
            "cpu": _cpu(),
            "cores": len(CORES),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()}",
            "commit": self._commit,
            "rounds": rounds,
            "seconds": round(passed),
            "load_before": round(self._load, 2),
            "cores_used_by_others": round(max(0.0, busy - own) / passed, 2),
        }


def _cpu() -> str:
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.machine()


def _commit() -> str:
    command = ("git", "describe", "--always", "--dirty", "--exclude=*")
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return told.stdout.strip()


def as_json(machine: dict[str, Any], rows: Sequence[Row]) -> str:
    """Return a run as it is kept."""
    return json.dumps({**machine, "rows": [row.as_json() for row in rows]}, indent=2) + "\n"


def read(kept: str) -> tuple[dict[str, Any], list[Row]]:
    """Return a run that was kept, and its rows."""
    machine = json.loads(kept)
    rows = machine.pop("rows")
    for row in rows:
        del row["verdict"]
    return machine, [Row(**row) for row in rows]


def file_of(machine: dict[str, Any]) -> Path:
    """Where a run is kept: by its day and the machine."""
    words = re.findall(r"[a-z0-9]+", machine["cpu"].lower().replace("(r)", "").replace("(tm)", ""))
    return RESULTS / f"{machine['date'][:10]}-{'-'.join(words)}-{machine['cores']}-cores.json"


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Return what the chart shows: the processor time of a request, the limit's, and the peer's.

    What a machine's one core takes for a request says how many it answers, whoever else was busy.
    """
    made = []
    for title, target in PANELS:
        own = [row for row in rows if row.target == target]
        limit = next((row for row in own if _figure(row, "bare")), None)
        disk = [row for row in own if row.what.endswith(", disk")]
        disk += [row for row in rows if row.target == "T2" and target == "T1"]
        peer = [row for row in own if _figure(row, "litellm")]
        if limit is not None:
            bars = [_bar("bare aiohttp: the limit", limit, "bare", "limit")]
            bars.append(_bar("embedding-proxy, memory", limit, "proxy", "ours"))
            bars += [_bar("embedding-proxy, disk", row, "proxy", "ours") for row in disk]
            bars += [_bar("LiteLLM, disk", row, "litellm", "peer") for row in peer]
            made.append(Panel(title, bars))
    return made


def _figure(row: Row, who: str) -> float | None:
    """Return milliseconds of processor time."""
    figures = row.figures
    if (micros := figures.get(f"{who}_cpu_µs")) is not None:
        return micros / 1e3
    return figures.get(f"{who}_cpu_ms")


def _bar(name: str, row: Row, who: str, kind: str) -> Bar:
    taken = _figure(row, who) or 0.0
    return Bar(name, taken, f"{number(taken)} ms", kind)


def summary(machine: dict[str, Any], rows: Sequence[Row]) -> str:
    """Return one line on the run."""
    verdicts = [row.verdict for row in rows]
    return (
        f"{machine['date'][:10]}, commit {machine['commit']}, {machine['cpu']}, {machine['cores']}"
        f" cores ({machine['cores_used_by_others']} of them used by others), Python"
        f" {machine['python']}: {verdicts.count(Verdict.MET)} targets met,"
        f" {verdicts.count(Verdict.NOT_MET)} not met."
    )


def headline(rows: Sequence[Row]) -> str:
    """Return the table for the README: of each target the row that keeps its bound the least.

    Rows against a peer stand at the end, whatever their bound.
    """
    peers = [row for row in rows if _figure(row, "litellm")]
    own: dict[str, Row] = {}
    for row in rows:
        if row.verdict and row not in peers:
            own[row.target] = max(own.get(row.target, row), row, key=lambda one: one.strain)
    lines = ["| figure | measured | target | result |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cells(row)[1:5])} |" for row in (*own.values(), *peers)]
    return "\n".join(lines)


def write(machine: dict[str, Any], rows: Sequence[Row]) -> None:
    """Put a run onto the pages."""
    title = f"Server's processor time for one request, all cached ({machine['cpu']})"
    pages.CHART.write_text(svg(title, panels(rows)), encoding="utf-8")
    told = summary(machine, rows)
    pages.put(pages.PERFORMANCE, "run", f"{told}\n\n{markdown(rows)}")
    pages.put(pages.README, "figures", f"{headline(rows)}\n\n{told}")


if __name__ == "__main__":
    write(*read(Path(sys.argv[1]).read_text(encoding="utf-8")))
