"""The state of a migration on disk: a small JSON file for each collection.

The file is replaced as a whole and is on disk before a write returns, so that a process that was
killed at any moment finds the last state it wrote. A second file has a line, a dead letter, for
each point that could not be carried.

`DualWriteStates` reads from these files which points go to both collections. `migrate run
--dual-write` enters it there, and a proxy with the same cache directory reads it. Before the
cutover the proxy writes what it indexes into the old collection to the new one as well, and after
it the other way round, until `finalize`. Each collection gets vectors of its own model, under the
same ids (`proxy.service.dual_writes`).
"""

import contextlib
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import orjson
from embedding_proxy.cache import atomic_file, private_files
from embedding_proxy.index.collection_reader import PointId

FOLDER = "migrations"
"""The folder of all states, inside the folder of the cache."""
FORMAT = 1
"""Version of the file; one of another version is not touched."""


class MigrationStateError(Exception):
    """The file cannot be used; the message names it, and says what can be done."""


class Phase(StrEnum):
    """The phases of a migration, in order."""

    COPYING = "copying"
    """`run` is under way, or was interrupted."""
    COPIED = "copied"
    """A whole pass found little difference, and repaired it."""
    SWITCHING = "switching"
    """The aliases may point to either collection: `cutover` was interrupted."""
    SWITCHED = "switched"
    """The aliases point to the new collection."""
    ROLLED_BACK = "rolled back"
    """The aliases point to the old collection again."""
    FINALIZED = "finalized"
    """The old collection is deleted."""


@dataclass(slots=True)
class Counts:
    """The counts of `run`, over all its starts."""

    points: int = 0
    """Points of the old collection that were read, or that existed at the last whole pass."""
    copied: int = 0
    """Written with the old vector, or a part of it."""
    embedded: int = 0
    """Written with a vector of the new model: bought, or found in the cache."""
    bought: int = 0
    """Inputs that were bought, with those of the sample."""
    updated: int = 0
    """Written again, because the old collection changed meanwhile."""
    deleted: int = 0
    """Deleted again, because they were deleted in the old collection."""
    dead: int = 0
    """Points that could not be carried; the dead letters say why."""
    without_vector: int = 0
    """Written without a vector of the new model, because they have no text and no old vector."""


@dataclass(slots=True)
class State:
    """The state of the migration of one collection. The names are those in the file."""

    place: str
    """The Qdrant: a URL or a folder."""
    collection: str
    """As the user names it: a collection, or an alias of one."""
    source: str
    """The old collection's own name."""
    target: str
    """The new collection's own name."""
    vector: str
    """The name of the vector that is migrated; "" is the unnamed one."""
    model: str
    """As the user names it."""
    space: str
    dimensions: int
    rule: str
    """Where the texts come from."""
    regime: str
    why: str
    phase: Phase = Phase.COPYING
    offset: PointId | None = None
    """Where the first pass continues."""
    first_pass_done: bool = False
    counts: Counts = field(default_factory=Counts)
    proof: float | None = None
    """The smallest cosine of the sampled texts; None before the check, and if there is none."""
    proved: list[PointId] = field(default_factory=list)
    """The points whose texts were the sample."""
    aliases: list[str] = field(default_factory=list)
    """Aliases that `cutover` moved from the old collection, or made."""
    names: list[str] = field(default_factory=list)
    """The aliases of the old collection when `run` began."""
    old_space: str | None = None
    """The label of the space of the old vectors; None if it is not known."""
    old_dimensions: int = 0
    dual_write: bool = False
    """Whether the proxy writes what it indexes to both collections."""
    snapshot: str | None = None
    """The server's snapshot of the old collection, if `finalize` made one."""
    format: int = FORMAT

    def fingerprint(self) -> str:
        """Return a digest of all that decides what the new collection holds."""
        parts = [self.source, self.vector, self.target, self.space, self.dimensions, self.rule]
        return hashlib.blake2b(orjson.dumps([*parts, self.regime]), digest_size=8).hexdigest()


class MigrationState:
    """The files of one migration: its state, its dead letters, and its snapshot."""

    def __init__(self, folder: Path, place: str, collection: str) -> None:
        digest = hashlib.blake2b(orjson.dumps([place, collection]), digest_size=6).hexdigest()
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", collection)[:80]
        self._set_path(folder / f"{readable}--{digest}.json")

    @classmethod
    def from_path(cls, path: Path) -> Self:
        """Return the state whose file is `path`."""
        state_file = cls.__new__(cls)
        state_file._set_path(path)  # noqa: SLF001 - of this class
        return state_file

    def _set_path(self, path: Path) -> None:
        self.path = path
        self.dead_letters = self.path.with_suffix(".dead.jsonl")
        self.snapshot = self.path.with_suffix(".seen.db")
        """See `Snapshot`; it exists during a cutover only."""

    def load(self) -> State | None:
        """Return the last state, None if there is none. Raises MigrationStateError."""
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise MigrationStateError(f"{self.path}: cannot be read: {error.strerror}") from error
        try:
            return _state(orjson.loads(raw))
        except (orjson.JSONDecodeError, TypeError, ValueError, KeyError) as error:
            raise MigrationStateError(
                f"{self.path} is not what this version writes ({error}); move it away, and begin"
                " anew with another name for the new collection: run --into NAME"
            ) from error

    def save(self, state: State) -> None:
        """Write a state; it is on disk when this returns. Raises MigrationStateError."""
        _replace(self.path, orjson.dumps(asdict(state), option=orjson.OPT_INDENT_2))

    def forget(self) -> None:
        """Delete the files that exist."""
        for path in (self.path, self.dead_letters, self.snapshot):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def replace_dead_letters(self, letters: Iterable[Mapping[str, object]]) -> None:
        """Replace all dead letters. Raises MigrationStateError."""
        _replace(self.dead_letters, _lines(letters))

    def append_dead_letters(self, letters: Iterable[Mapping[str, object]]) -> None:
        """Append dead letters. Raises MigrationStateError."""
        if lines := _lines(letters):
            try:
                private_files.make_folder(self.dead_letters.parent)
                atomic_file.append(self.dead_letters, lines)
            except OSError as error:
                raise MigrationStateError(f"{self.dead_letters}: {error.strerror}") from error


def states_in(folder: Path) -> list[MigrationState]:
    """Return all migration states in a folder, sorted by file name."""
    return [MigrationState.from_path(path) for path in sorted(folder.glob("*--*.json"))]


def _lines(letters: Iterable[Mapping[str, object]]) -> bytes:
    return b"".join(orjson.dumps(letter) + b"\n" for letter in letters)


def _state(content: Any) -> State:  # noqa: ANN401 - whatever is in the file
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']}")
    names = {field_.name for field_ in fields(State)}
    values = {name: value for name, value in content.items() if name in names}
    values["phase"] = Phase(values["phase"])
    values["counts"] = Counts(**values["counts"])
    return State(**values)


def _replace(path: Path, content: bytes) -> None:
    """Replace a file as a whole: a reader gets the old content or the new one."""
    try:
        private_files.make_folder(path.parent)
        atomic_file.write(path, content)
    except OSError as error:
        raise MigrationStateError(
            f"{path}: cannot be written: {error.strerror or error}"
        ) from error


@dataclass(frozen=True, slots=True)
class DualWrite:
    """A collection that gets points, and the partner collection that gets them too."""

    collection: str
    aliases: frozenset[str]
    """Further names of the collection."""
    space: str
    dimensions: int
    """The dimensions of its vectors."""
    vector: str
    """The name of the vector in both collections; "" for the unnamed one."""
    origin: str
    """The old collection of the migration."""
    is_switched: bool
    """Whether the collection is the new one."""
    partner: str
    partner_space: str
    partner_dimensions: int


class DualWriteStates:
    """The present dual writes of one Qdrant, from the state files in `folder`."""

    def __init__(self, folder: Path, place: str) -> None:
        """`place` is the URL of the server, or the folder."""
        self._folder = folder
        self._place = place.rstrip("/")
        self._stamps: object = None
        self._found: Sequence[DualWrite] = ()

    def read(self) -> Sequence[DualWrite]:
        """Return the dual writes of all migrations. Unchanged files are not read again.

        A file that cannot be read is ignored.
        """
        try:
            stats = [(file.path, file.path.stat()) for file in states_in(self._folder)]
        except OSError:
            return self._found
        stamps = [(path, stat.st_mtime_ns, stat.st_size, stat.st_ino) for path, stat in stats]
        if stamps != self._stamps:
            self._found = tuple(entry for state in self._states() if (entry := dual_write(state)))
            self._stamps = stamps
        return self._found

    def _states(self) -> Sequence[State]:
        states = []
        for file in states_in(self._folder):
            try:
                state = file.load()
            except MigrationStateError:
                continue
            if state is not None and state.place.rstrip("/") == self._place:
                states.append(state)
        return states


def dual_write(state: State) -> DualWrite | None:
    """Return the present dual write of a migration; None if there is none."""
    if not state.dual_write or state.old_space is None:
        return None
    old = (state.source, state.old_space, state.old_dimensions)
    new = (state.target, state.space, state.dimensions)
    if state.phase in (Phase.COPYING, Phase.COPIED, Phase.ROLLED_BACK):
        (collection, space, dimensions), partner = old, new
    elif state.phase in (Phase.SWITCHING, Phase.SWITCHED):
        (collection, space, dimensions), partner = new, old
    else:
        return None
    return DualWrite(
        collection,
        frozenset({*state.aliases, *state.names}),
        space,
        dimensions,
        state.vector,
        state.source,
        collection == state.target,
        *partner,
    )
