"""The sums of the ledger as people and scripts read them: plain values, dollars instead of nano."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from embedding_proxy.cache.ledger import By
from embedding_proxy.cache.usage import Usage
from embedding_proxy.providers.bill import NANO


def shown(usage: Usage) -> dict[str, Any]:
    """Return sums by name."""
    return {
        "hits": usage.hits,
        "joins": usage.joins,
        "misses": usage.misses,
        "duplicates": usage.duplicates,
        "tokens_saved": usage.tokens_saved,
        "tokens_billed": usage.tokens_billed,
        "hit_rate": round(usage.hit_rate, 4),
        "usd_saved": usage.nanodollars_saved / NANO,
        "usd_billed": usage.nanodollars_billed / NANO,
    }


def line(by: Sequence[By], names: Sequence[Any], usage: Usage) -> dict[str, Any]:
    """Return one line of the ledger, with what it is summed by; a day as a date of UTC.

    >>> line([By.DAY, By.CLIENT], [20_000, "ci"], Usage(hits=1))["day"]
    '2024-10-04'
    """
    told = {column.value: name for column, name in zip(by, names, strict=True)}
    if By.DAY in by:
        told["day"] = datetime.fromtimestamp(86_400 * told["day"], UTC).date().isoformat()
    return {**told, **shown(usage)}
