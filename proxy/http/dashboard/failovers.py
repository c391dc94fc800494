"""The timeline of failovers: when calls of providers failed, circuits opened, and routes stood in.

All processes append to one file in the cache folder, a JSON line for what was counted since the
last: [seconds since 1970, what, name, count]. A process writes a second after the first change, and
then every FLUSH_S at most, so a long outage stays small. A file that is too long loses its older
half; what another process appends at that moment may be lost with it.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import orjson
from embedding_proxy.cache import atomic_file, private_files

log = logging.getLogger("embedding_proxy.dashboard")

FILE = "failovers.jsonl"
MAX_BYTES = 1 << 20
FIRST_S, FLUSH_S = 1.0, 30.0
"""Seconds from a change until it is written: of the first one, and of those soon after it."""
SPAN_S = 86_400
"""The timeline shows the last day."""
SLOT_S = 900
"""In parts of a quarter of an hour."""
MAX_NAMES = 30
"""Names of one kind in the timeline, and in one writing: those with the largest counts."""
KINDS = ("failures", "openings", "failovers")
"""Failed calls by provider, circuits that opened by provider, failovers by model."""

Event: TypeAlias = tuple[str, str]
"""Kind and name."""


class FailoverLog:
    """What this process has to add, and a reader of what all have written. For one event loop."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives seconds since 1970."""
        self._path = path
        self._clock = clock
        self._before: dict[Event, float] | None = None
        self._new: Counter[Event] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        self._written = float("-inf")
        self._has_warned = False

    def note(self, counts: dict[Event, float]) -> None:
        """Take the counts since the start; what was added since the last call is an event now.

        The first call is the beginning. Who counts less than before has begun anew.
        """
        before, self._before = self._before, counts
        if before is None or counts == before:
            return
        for event, count in counts.items():
            added = count - before.get(event, 0)
            if added > 0:
                self._new[event] += int(added)
        if self._new and self._timer is None:
            loop = asyncio.get_running_loop()
            since = loop.time() - self._written
            self._timer = loop.call_later(max(FIRST_S, FLUSH_S - since), self.flush)

    def flush(self) -> None:
        """Write what is new. Never raises."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._new:
            return
        self._written = asyncio.get_running_loop().time()
        now = int(self._clock())
        kinds = {
            kind: [one for one in self._new.most_common() if one[0][0] == kind] for kind in KINDS
        }
        lines = [
            orjson.dumps([now, *event, count], option=orjson.OPT_APPEND_NEWLINE)
            for found in kinds.values()
            for event, count in found[:MAX_NAMES]
        ]
        self._new.clear()
        try:
            with open(self._path, "ab", opener=private_files.opener) as file:
                file.write(b"".join(lines))
                size = file.tell()
            if size > MAX_BYTES:
                content = self._path.read_bytes()[-MAX_BYTES // 2 :]
                atomic_file.write(self._path, content.partition(b"\n")[2])
        except OSError as error:
            if not self._has_warned:
                log.warning("the timeline of failovers cannot be written: %s", error.strerror)
            self._has_warned = True

    def read(self) -> "Timeline":
        """Return the timeline of the last day, of all processes. Blocks; never raises."""
        content = b""
        with contextlib.suppress(OSError):
            content = self._path.read_bytes()
        end = int(self._clock()) // SLOT_S + 1
        slots = SPAN_S // SLOT_S
        timeline = Timeline((end - slots) * SLOT_S, {kind: {} for kind in KINDS})
        for line in content.split(b"\n"):
            # The last line may be cut, and any may be damaged.
            with contextlib.suppress(orjson.JSONDecodeError, TypeError, ValueError):
                seconds, kind, name, count = orjson.loads(line)
                slot = int(seconds) // SLOT_S - (end - slots)
                if 0 <= slot < slots and kind in KINDS:
                    counts = timeline.events[kind].setdefault(str(name), [0] * slots)
                    counts[slot] += int(count)
        return timeline

    @property
    def stamp(self) -> tuple[int, int]:
        """Changes when the timeline does: by what is written, and as time goes by."""
        size = 0
        with contextlib.suppress(OSError):
            size = self._path.stat().st_size
        return size, int(self._clock()) // SLOT_S


class Timeline:
    """Counts by kind and name, in slots of SLOT_S."""

    def __init__(self, start: int, events: dict[str, dict[str, list[int]]]) -> None:
        self.start = start
        """When the first slot begins, in seconds since 1970."""
        self.events = events

    def as_json(self) -> dict[str, Any] | None:
        """Return it for the page; None if nothing happened."""
        if not any(self.events.values()):
            return None
        return {
            "start": self.start,
            "slot_s": SLOT_S,
            **{kind: _largest(names) for kind, names in self.events.items()},
        }


def _largest(names: Mapping[str, list[int]]) -> dict[str, list[int]]:
    ranked = sorted(names, key=lambda name: -sum(names[name]))
    return {name: names[name] for name in ranked[:MAX_NAMES]}
