"""The same answer once more, without looking anything up: as long as nothing has changed."""

from collections.abc import Sequence
from dataclasses import dataclass

from .ledger import Heading
from .record import Entry
from .row import Partition
from .tiers import Tiers
from .usage import Usage


@dataclass(frozen=True, slots=True)
class Repeat:
    """An answer that came from the cache alone, to a request without terms of its own.

    Whoever keeps what was made of such an answer asks `again` before giving it out once more. So
    purges, expiry and newer purchases hold for it as they do for the entries themselves.
    """

    tiers: Tiers
    addresses: Sequence[bytes]
    entries: Sequence[Entry]
    partition: Partition
    heading: Heading
    usage: Usage

    def again(self) -> bool:
        """Tell whether the answer is still right; if so, count it as another request's."""
        if not self.tiers.holds(self.addresses, self.entries, self.partition):
            return False
        self.tiers.count(self.heading, self.usage)
        return True
