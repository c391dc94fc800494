"""Where a hit's processor time goes, part by part. On demand: `make profile`.

python -m bench.profile [--only T1,T3] [--record] — py-spy, in an environment of its own, looks at
the proxy under the load of `hits`, C code and all; what a request costs is measured without it, and
shared out by what was seen. The stacks stay in `.bench/profile-*.txt`, as a flame graph wants them.
`--record` puts the table of parts into docs/performance.md.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import uvloop

from . import pages
from .client import Client
from .environment import KEPT, python
from .hits import (
    AGAIN_AND_AGAIN,
    BULK,
    CASES,
    CONNECTIONS,
    KNOWN,
    MEMORY_MIB,
    Case,
    new_inputs,
    prepare,
)
from .material import Made, make, prove, say
from .process import LOADING, proxy
from .record import Machine

SECONDS, RATE = 15, 49
FILES = 8
LOADS = 7

# What a stack belongs to, told by its innermost frame that one of these knows: `function (file)`,
# with the line in Python. Of two that know a frame the first has it.
PARTS = (
    ("access, headers", r"proxy/http/(auth|middleware|cors)|_headers \(proxy/"),
    ("access, headers", r"proxy/service/request\.py"),
    (
        "fast path",
        r"proxy/http/(connection|framing|response_cache|runner)|\(cache/cached_hit",
    ),
    ("parse", r"\(proxy/http/openai_format\.py|\(proxy/service/inputs|parse\S* \(proxy/"),
    ("HTTP read", r"proxy/http/request_body"),
    ("HTTP read", r"aiohttp/(http_parser|_http_parser|streams|web_request)"),
    ("HTTP read", r"^(uv__read|__libc_recv|read|recv)\b|_http_parser|aiohttp/multipart"),
    ("key", r"\(cache/key\.py"),
    ("look-up", r"\(cache/(memory|tiers|record|embedder|in_flight|errors)\.py|\(cache/disk/"),
    ("accounting", r"\(cache/ledger\.py|proxy/http/(metrics|status)"),
    (
        "render",
        r"render\S* \(proxy/|\(proxy/http/openai_format/render|\(providers/(vector|dimensions)\.py",
    ),
    (
        "HTTP write",
        r"aiohttp/(web_response|http_writer|_http_writer|helpers)|^uv__?(try_)?write",
    ),
    ("HTTP write", r"^(write|writev|sendmsg|send)\b|UVStream_?_?(write|_exec_write|try_write)"),
    ("routing, handler", r"aiohttp/web_|aiohttp/"),
    # A pool is of those who keep something in it.
    ("routing, handler", r"\((proxy(?!/http/response_cache)|index|cache|providers)/"),
    ("event loop", r"loop\.c|_asynciomodule|asyncio/|^uv_|concurrent/futures|threading\.py"),
)
RENDERS = r"(render|_chunks?|_row|encode)\S* \(proxy/http/openai_format"
_WAITS = re.compile(r"^(epoll_p?wait|do_futex_wait|pthread_cond_\w+|select|poll) ")
_IDLE = re.compile(
    r"_worker \(concurrent/futures/thread\.py:\d+\);(_queue_SimpleQueue|PyThread_acq)"
)
_KNOWN = [(part, re.compile(known)) for part, known in (("render", RENDERS), *PARTS)]
_FILE = re.compile(r"\(((?:proxy|index|cache|providers|aiohttp|asyncio|concurrent)/[\w/]+\.py)")


class Profile(NamedTuple):
    """What one request costs, and what of it each part takes."""

    what: str
    micros: float
    parts: Mapping[str, float]
    """Shares of 1."""
    files: Mapping[str, float]
    samples: int


def part_of(frames: Sequence[str]) -> str:
    """Return the part that a stack, outermost frame first, belongs to."""
    for frame in reversed(frames):
        for part, known in _KNOWN:
            if known.search(frame):
                return part
    return "other"


def file_of(frames: Sequence[str]) -> str:
    """Return the innermost Python file of a stack."""
    return next((m[1] for f in reversed(frames) if (m := _FILE.search(f))), "(the loop itself)")


def shares(lines: Sequence[str]) -> tuple[dict[str, float], dict[str, float], int]:
    """Return what parts, and files, have of folded stacks in which something was done."""
    parts: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        if _IDLE.search(stack) or _WAITS.search(frames[-1]):
            continue
        parts[part_of(frames)] += int(count)
        files[file_of(frames)] += int(count)
    total = parts.total()
    if not total:
        raise RuntimeError("nothing was seen at work")
    part, file = ({name: n / total for name, n in of.most_common()} for of in (parts, files))
    return part, file, total


def taken(case: Case, made: Made) -> Profile:
    """Profile one case."""
    name = "-".join(case.what.replace(",", "").split())
    stacks = KEPT / f"profile-{case.target}-{name}.txt"
    with (
        proxy(made.directory, memory_mib=0 if case.disk else MEMORY_MIB) as running,
        Client(running, CONNECTIONS if case.inputs == 1 else 1) as client,
    ):
        for first in range(0, KNOWN, BULK):
            prove(running, range(first, first + BULK))
        prepare(case, client)
        client.load(case.requests(made))
        loads = [client.load(case.requests(made)) for _ in range(LOADS)]
        micros = 1e6 * median(load.cpu_seconds for load in loads)
        command = [str(python("py-spy==0.4.*").with_name("py-spy")), "record", "--native"]
        command += ["--rate", str(RATE), "--duration", str(SECONDS), "--format", "raw"]
        command += ["--pid", str(running.pid), "--output", str(stacks)]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as spy:
            while spy.poll() is None:
                client.load(case.requests(made))
            if spy.returncode:
                raise SystemExit(f"bench: py-spy failed: {spy.communicate()[1]}")
    return Profile(case.what, micros, *shares(stacks.read_text().splitlines()))


def by_part(profiles: Sequence[Profile]) -> str:
    """Return the table for the page: a row for each part, a column for each case."""
    names = [*dict.fromkeys(part for part, _ in _KNOWN), "other"]
    names.sort(key=lambda name: -profiles[0].parts.get(name, 0.0))
    parts = [[name, *(cell(p, p.parts.get(name, 0.0)) for p in profiles)] for name in names]
    parts.append(["all", *(cell(p, 1.0) for p in profiles)])
    return _table("part", profiles, parts)


def by_file(profiles: Sequence[Profile]) -> str:
    """Return the table for the terminal: a row for each file, a column for each case."""
    most = dict.fromkeys(file for p in profiles for file in list(p.files)[:FILES])
    files = [[f"`{f}`", *(f"{100 * p.files.get(f, 0.0):.0f} %" for p in profiles)] for f in most]
    return _table("file", profiles, files)


def _table(title: str, profiles: Sequence[Profile], rows: Sequence[Sequence[str]]) -> str:
    heads = [[title, *(profile.what for profile in profiles)], ["---"] * (len(profiles) + 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (*heads, *rows))


def cell(profile: Profile, share: float) -> str:
    """Return what a part costs, in µs or ms, and its share."""
    micros = profile.micros * share
    figure = f"{micros:.1f} µs" if profile.micros < 10_000 else f"{micros / 1000:.2f} ms"
    return f"{figure} ({100 * share:.0f} %)"


def profiled(folder: Path, only: set[str]) -> Iterator[Profile]:
    """Profile the cases of each target that is wanted."""
    made = uvloop.run(make(folder / "known", KNOWN))
    for case in CASES:
        # An input is new only once, and a profile takes long.
        is_long = case.what != AGAIN_AND_AGAIN and case.requests is not new_inputs
        if is_long and (not only or case.target in only):
            say(f"profiling {case.target} {case.what}")
            yield taken(case, made)


def main() -> None:
    """Profile, print and record."""
    parser = argparse.ArgumentParser(description="Where a hit's processor time goes.")
    parser.add_argument("--only", default="", help="T1,T2,T3,T4")
    parser.add_argument("--record", action="store_true", help="into docs/performance.md")
    asked = parser.parse_args()
    machine = Machine()
    os.sched_setaffinity(0, LOADING)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        profiles = list(profiled(Path(name), set(filter(None, asked.only.upper().split(",")))))
    about = machine.told(1)
    shown = (
        f"{about['date'][:10]}, commit {about['commit']}, {about['cpu']}, {about['cores']} cores"
        f" ({about['cores_used_by_others']} of them used by others).\n\n{by_part(profiles)}"
    )
    print(shown, by_file(profiles), sep="\n\n")
    if asked.record:
        pages.put(pages.PERFORMANCE, "profile", shown)


if __name__ == "__main__":
    main()
