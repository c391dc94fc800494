"""Migrations under way whose points are to be written to both collections at once.

`migrate run --dual-write` notes it in the state file. A proxy with the same cache directory reads
the state files, and so needs no word from the command: before the cutover it writes what it indexes
into the old collection to the new one as well, and after it the other way round, until `finalize`.
Each collection gets vectors of its own model, under the same ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .state import MigrationStateError, Phase, State, states_in


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
