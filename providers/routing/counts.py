"""What a router counts of its turns."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counts:
    """What the turns of one router have done since the start."""

    attempts: int = 0
    retries: int = 0
    """Attempts at the provider that had just failed."""
    failovers: int = 0
    """Turns of a route after another's."""
    hedges: int = 0
    refused: int = 0
    """Requests for which no provider could be asked."""
    failures: Counter[str] = field(default_factory=Counter)
    """Failed attempts by class of the error; `Full` are those that were not made."""
