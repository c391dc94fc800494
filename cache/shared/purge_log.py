"""What was purged on any node, as this node knows it: a file in the cache folder, and its rules.

Nodes do not delete at the same moment. So a purge is a rule as well: a record that it is about, and
that was stored before it, is not served, wherever it lies and whoever writes it again. What it says
holds on a node as soon as the node knows of it; the deletion of what is on disk may take its time.

The file holds each purge with whether this node has deleted its entries, so an interrupted deletion
goes on, and until when this node knows of all purges. Every node keeps all of them: a server that
was emptied gets them from the nodes. The oldest ones beyond MAX_PURGES are forgotten; a node that
was away for longer than that drops all that it stored before, up to a floor. The floor is about its
own disk alone: the shared tier holds nothing of what was forgotten.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import orjson
from embedding_proxy.cache import atomic_file
from embedding_proxy.cache.disk.lock import WriterLock
from embedding_proxy.cache.disk.purge import PurgeFilter
from embedding_proxy.cache.key import Partition
from embedding_proxy.providers.base import current_label

log = logging.getLogger("embedding_proxy.shared")

FILE_NAME = "purge-log.json"
_FLOOR = "floor-"
LOCK_NAME = "purge-log.lock"
"""Beside the folder: whoever holds it changes the file."""
MAX_PURGES = 10_000
_LOCK_S = 10.0
_MAX_PARTITIONS = 10_000


@dataclass(frozen=True, slots=True)
class LoggedPurge:
    """A purge that all nodes make."""

    id: str
    choice: PurgeFilter
    at: float
    """When it was asked for, in seconds since 1970: what was stored later stays."""
    is_done: bool = False
    """Whether this node has deleted what it is about."""
    is_told: bool = False
    """Whether the other nodes can know of it."""
    is_swept: bool = False
    """Whether the shared tier holds nothing of it any more."""

    @property
    def before(self) -> float | None:
        """The time before which all that is chosen is purged; None if that depends on its use."""
        if self.choice.used_before is not None:
            return None
        stored_before = self.choice.stored_before
        return self.at if stored_before is None else min(self.at, stored_before)

    @property
    def is_floor(self) -> bool:
        """Whether it is about the disk of this node alone; see `floor_purge`."""
        return self.id.startswith(_FLOOR)

    def encode(self) -> bytes:
        """Return it as JSON, without what holds for this node alone."""
        choice = self.choice
        fields = {
            "namespace": choice.namespace,
            "space": choice.space,
            "stored_before": choice.stored_before,
            "used_before": choice.used_before,
            "address": None if choice.address is None else choice.address.hex(),
        }
        given = {name: value for name, value in fields.items() if value is not None}
        return orjson.dumps({"id": self.id, "at": self.at, **given})


def floor_purge(floor: float) -> LoggedPurge:
    """Return the purge of all that this node stored before a time, in seconds since 1970.

    Purges up to then are forgotten, and this node may not have made all of them.
    """
    return LoggedPurge(f"{_FLOOR}{floor}", PurgeFilter(), floor, is_told=True)


def time_of_purge(now: float) -> float:
    """Return the `at` of a purge that is asked for now.

    The disk knows the times of entries in whole milliseconds; those of this one are purged, too.
    """
    return math.ceil(1000 * now) / 1000 + 0.0005


def decode(content: bytes) -> LoggedPurge:
    """Return a purge from its JSON. Raises ValueError."""
    try:
        fields = orjson.loads(content)
        address = fields.get("address")
        choice = PurgeFilter(
            namespace=_text(fields.get("namespace")),
            space=_text(fields.get("space")),
            stored_before=_number(fields.get("stored_before")),
            used_before=_number(fields.get("used_before")),
            address=None if address is None else bytes.fromhex(address),
        )
        at = float(fields["at"])
        return LoggedPurge(
            str(fields["id"]),
            choice,
            at,
            is_done=bool(fields.get("is_done")),
            is_told=bool(fields.get("is_told")),
            is_swept=bool(fields.get("is_swept")),
        )
    except (AttributeError, KeyError, TypeError, orjson.JSONDecodeError) as error:
        raise ValueError(f"no purge: {error}") from error


def _text(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _number(value: object) -> float | None:
    if value is not None and not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return value


@dataclass
class PurgeRecord:
    """What the file holds."""

    known_until: float = 0.0
    """The server's time when this node last knew all purges; 0 = never."""
    purges: dict[str, LoggedPurge] = field(default_factory=dict)
    """By id, the earliest first."""

    def add(self, purges: Iterable[LoggedPurge]) -> list[LoggedPurge]:
        """Add those that are new, and return them; the others learn how far they are."""
        new = []
        for one in purges:
            known = self.purges.get(one.id)
            if known is None:
                new.append(one)
                self.purges[one.id] = one
            else:
                is_told = one.is_told or known.is_told
                self.purges[one.id] = replace(known, is_told=is_told, is_swept=one.is_swept)
        return new

    def mark_done(self, purge: str) -> None:
        """Note that this node has deleted what a purge is about; a floor is forgotten then."""
        known = self.purges.get(purge)
        if known is not None and known.is_floor:
            del self.purges[purge]
        elif known is not None:
            self.purges[purge] = replace(known, is_done=True)

    def mark_swept(self, purges: Collection[str]) -> None:
        """Note what the server has forgotten: all that was told but these."""
        for one in self.purges.values():
            if one.is_told and one.id not in purges:
                self.purges[one.id] = replace(one, is_swept=True)

    def compact(self) -> None:
        """Forget the earliest beyond MAX_PURGES, of those that all know, and nothing is left of."""
        for one in list(self.purges.values()):
            is_over = one.is_done and one.is_told and one.is_swept
            if is_over and len(self.purges) > MAX_PURGES:
                del self.purges[one.id]


class PurgeRules:
    """Which records are purged, wherever they lie: no floor is among them. For one thread."""

    def __init__(self, purges: Iterable[LoggedPurge] = ()) -> None:
        self._addresses: dict[bytes, float] = {}
        self._rules: dict[tuple[str | None, str | None], float] = {}
        """By namespace and space, each None for all: the time before which entries are purged."""
        self._before: dict[Partition, float] = {}
        for one in purges:
            before, choice = one.before, one.choice
            if before is None or one.is_floor:
                continue
            if choice.address is not None:
                known = self._addresses.get(choice.address, before)
                self._addresses[choice.address] = max(known, before)
                continue
            space = None if choice.space is None else current_label(choice.space)
            rule = choice.namespace, space
            self._rules[rule] = max(self._rules.get(rule, before), before)

    def __bool__(self) -> bool:
        return bool(self._rules or self._addresses)

    def is_purged(self, partition: Partition, address: bytes, stored: float) -> bool:
        """Tell whether an entry of a partition that was stored at a time is purged."""
        if self._addresses and stored < self._addresses.get(address, -math.inf):
            return True
        return bool(self._rules) and stored < self.before(partition)

    def before(self, partition: Partition) -> float:
        """Return the time before which all entries of a partition are purged, whatever they are."""
        before = self._before.get(partition)
        if before is None:
            if len(self._before) >= _MAX_PARTITIONS:
                self._before.clear()
            model = partition.space.partition("?")[0]
            before = self._before[partition] = max(
                self._rules.get((namespace, space), -math.inf)
                for namespace in (None, partition.namespace)
                for space in (None, partition.space, model)
            )
        return before


class PurgeLog:
    """The file in `folder`, which is the store's. Any number of processes use it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self._lock_path = folder.parent / LOCK_NAME
        self._seen: tuple[int, int] | None = None
        self._latest: tuple[tuple[int, int] | None, PurgeRecord] = (None, PurgeRecord())
        self._held: tuple[LoggedPurge, ...] = ()
        self._set_rules(())

    def _set_rules(self, purges: Iterable[LoggedPurge]) -> None:
        all_purges = [*purges, *self._held]
        self.rules = PurgeRules(all_purges)
        self._floor = max((one.at for one in all_purges if one.is_floor), default=-math.inf)

    def is_purged(self, partition: Partition, address: bytes, stored: float) -> bool:
        """Tell whether an entry on disk is purged; of one in the shared tier, ask `rules`."""
        return stored < self._floor or self.rules.is_purged(partition, address, stored)

    def hold(self, purges: Iterable[LoggedPurge]) -> None:
        """Let purges hold in this process that cannot be written, in place of the former ones."""
        self._held = tuple(purges)
        if self._held:
            self._set_rules(self.peek().purges.values())

    def read(self) -> PurgeRecord:
        """Return what the file holds; of one that is damaged, nothing. Raises OSError."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return PurgeRecord()
        try:
            fields = orjson.loads(content)
            purges = [decode(orjson.dumps(one)) for one in fields["purges"]]
            return PurgeRecord(float(fields["known_until"]), {one.id: one for one in purges})
        except (KeyError, TypeError, ValueError) as error:
            log.warning("%s is damaged, and is learned anew: %s", self.path, error)
            return PurgeRecord()

    def peek(self) -> PurgeRecord:
        """Return the same, not to be changed; it is read only if it may have changed."""
        seen = self._stamp()
        if seen is None or seen != self._latest[0]:
            self._latest = seen, self.read()
        return self._latest[1]

    def _stamp(self) -> tuple[int, int] | None:
        """Return what changes with the file; None where there is none. Raises OSError."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_ino

    def mark_done(self, purge: str) -> None:
        """Note that this node has deleted what a purge is about. Raises OSError, TimeoutError."""
        self.change(lambda record: record.mark_done(purge))

    @contextlib.contextmanager
    def changing(self) -> Iterator[PurgeRecord]:
        """Give what the file holds, and write what it becomes. Raises OSError, TimeoutError."""
        with (
            contextlib.closing(WriterLock(self._lock_path, _LOCK_S)) as lock,
            lock,
        ):
            record = self.read()
            yield record
            record.compact()
            purges = [
                {
                    **orjson.loads(one.encode()),
                    "is_done": one.is_done,
                    "is_told": one.is_told,
                    "is_swept": one.is_swept,
                }
                for one in record.purges.values()
            ]
            fields = {"known_until": record.known_until, "purges": purges}
            atomic_file.write(self.path, orjson.dumps(fields))

    def change(self, change: Callable[[PurgeRecord], object]) -> PurgeRecord:
        """Change the file by a function, and return what it holds then. Raises OSError."""
        with self.changing() as record:
            change(record)
        return record

    def refresh(self) -> bool:
        """Read the rules anew if the file has changed; return whether it has. Never raises."""
        try:
            seen = self._stamp()
            if seen is None or seen == self._seen:
                return False
            self._set_rules(self.read().purges.values())
        except OSError as error:
            log.warning("%s cannot be read: %s", self.path, error)
            return False
        self._seen = seen
        return True
