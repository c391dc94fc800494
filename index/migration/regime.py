"""How a collection gets the vectors of another model: copied, cut, or made anew.

Pure. `auto` decides by what is known of the two models; copying and cutting are then proved on
sampled texts, since what is known may be wrong.
"""

from dataclasses import dataclass
from enum import StrEnum

from embedding_proxy.providers.base import Space


class Regime(StrEnum):
    """Where the new vectors come from."""

    AUTO = "auto"
    """Decided by `choose`."""
    REUSE = "reuse"
    """Copied: both models are one space, and of one width."""
    TRUNCATE = "truncate"
    """The first numbers of the old vectors, renormalised: one Matryoshka space, narrower."""
    REEMBED = "reembed"
    """From the texts, through the cache."""

    @property
    def copies(self) -> bool:
        """Whether nothing need be bought but the sample."""
        return self in (Regime.REUSE, Regime.TRUNCATE)


class RegimeRefused(ValueError):
    """The regime that was asked for would give wrong vectors; the message says why."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The regime, never `auto`, and the reason in words."""

    regime: Regime
    why: str


def choose(
    asked: Regime, old: Space | None, old_width: int, new: Space, new_width: int
) -> Decision:
    """Return the regime for vectors of `old_width` numbers of the space `old` (None = unknown).

    Raises RegimeRefused if the one that is asked for cannot give right vectors.
    """
    found = _fitting(old, old_width, new, new_width)
    if asked in (Regime.AUTO, found.regime):
        return found
    if asked is Regime.REEMBED:
        return Decision(asked, f"asked for, although `{found.regime}` would do: {found.why}")
    raise RegimeRefused(f"--regime {asked}: {found.why}")


def _fitting(old: Space | None, old_width: int, new: Space, new_width: int) -> Decision:
    """Return the cheapest regime that is right."""
    if old is None:
        return Decision(
            Regime.REEMBED,
            "nothing says which model made the old vectors; if it is known, name it with --from",
        )
    if (old.name, old.parameters) != (new.name, new.parameters):
        return Decision(Regime.REEMBED, f"{old.label} and {new.label} are two vector spaces")
    if old_width == new_width:
        return Decision(Regime.REUSE, f"both are {new.label}, {new_width} numbers wide")
    if old_width < new_width:
        return Decision(
            Regime.REEMBED, f"the old vectors have {old_width} numbers, fewer than {new_width}"
        )
    if not new.matryoshka:
        return Decision(Regime.REEMBED, f"{new.label} is no Matryoshka model: it cannot be cut")
    return Decision(
        Regime.TRUNCATE,
        f"both are {new.label}, whose vectors may be cut from {old_width} to {new_width} numbers",
    )
