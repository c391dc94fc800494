"""Numbers as people read them: money, counts with their nouns, shares, sizes and spans of time.

The only place that makes text of them, so that every command, the demo and every table show the
same number in the same way. JSON has the plain numbers instead. Pure.
"""

import math
from collections.abc import Iterable

CENT = 0.01


def money(usd: float) -> str:
    """Return US dollars: with cents, and with two significant digits where that is more exact.

    Nothing that costs something is shown as $0.00.

    >>> money(1234.5), money(0.0149), money(0.0000301), money(0)
    ('$1,234.50', '$0.015', '$0.00003', '$0.00')
    """
    sign, usd = ("-" if usd < 0 else ""), abs(usd)
    digits = 2
    if 0 < usd < 10 * CENT:
        digits = max(2, 1 - math.floor(math.log10(usd)))
    whole, _, part = f"{usd:,.{digits}f}".partition(".")
    # What two digits round to zeros says no more without them; cents are always there.
    return f"{sign}${whole}.{part[:2]}{part[2:].rstrip('0')}"


def price(usd: float) -> str:
    """Return a price in US dollars without its sign: four decimals, or two significant digits.

    >>> price(1.5), price(0.0125), price(0.00000312)
    ('1.5', '0.0125', '0.0000031')
    """
    if 0 < usd < 0.001:
        return money(usd).removeprefix("$")
    return f"{usd:,.4f}".rstrip("0").rstrip(".")


def count(number: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its noun, which may bring its verb; `many` is `one` and an s by default.

    >>> count(1, "entry", "entries"), count(2000, "record is", "records are"), count(0, "point")
    ('1 entry', '2,000 records are', '0 points')
    """
    return f"{number:,} {singular if number == 1 else plural or f'{singular}s'}"


def share(part: float, whole: float) -> str:
    """Return a share in percent; empty where there is no whole.

    Less than all is never shown as 100.0%, and more than nothing never as 0.0%.

    >>> share(1, 3), share(9_999_999, 10_000_000), share(0, 0)
    ('33.3%', '99.9%', '')
    """
    if not whole:
        return ""
    percent = 100 * part / whole
    if 0 < percent < 100:
        percent = min(max(percent, 0.1), 99.9)
    return f"{percent:.1f}%"


def savings(usd_saved: float, usd_billed: float) -> str:
    """Return what the cache has saved, and the share of all that would have been spent without it.

    >>> savings(0.75, 0.25), savings(0, 0)
    ('$0.75 saved (75.0%)', '$0.00 saved')
    """
    percent = share(usd_saved, usd_saved + usd_billed)
    return f"{money(usd_saved)} saved{percent and f' ({percent})'}"


def join_names(names: Iterable[str], max_names: int = 20) -> str:
    """Return names as a list for a message, cut where it would be long.

    >>> join_names("abc"), join_names("abc", 1)
    ('a, b, c', 'a and 2 more')
    """
    names = list(names)
    rest = f" and {len(names) - max_names:,} more" if len(names) > max_names else ""
    return ", ".join(names[:max_names]) + rest


def size(count: float) -> str:
    """Return a number of bytes for people.

    >>> size(999), size(6_184_000)
    ('999 B', '6.2 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def age(seconds: float) -> str:
    """Return a span of time for people.

    >>> age(30), age(3 * 3600), age(40 * 86_400)
    ('30 s', '3 h', '40 d')
    """
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
