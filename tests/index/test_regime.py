"""Whether vectors are copied, cut or bought."""

import pytest
from embedding_proxy.index.migration.runner import Regime, RegimeRefused, choose
from embedding_proxy.providers.base import Space

LARGE = Space("openai/large", 8, matryoshka=True)
PLAIN = Space("openai/plain", 8)
TASK = LARGE.with_parameters({"task": "query"})


@pytest.mark.parametrize(
    ("old", "widths", "new", "regime", "why"),
    [
        (LARGE, (8, 8), LARGE, "reuse", "both are openai/large, 8"),
        (LARGE, (4, 4), LARGE, "reuse", "4 numbers"),
        (LARGE, (8, 4), LARGE, "truncate", "from 8 to 4"),
        (LARGE, (4, 8), LARGE, "reembed", "fewer than 8"),
        (PLAIN, (8, 4), PLAIN, "reembed", "no Matryoshka"),
        (PLAIN, (8, 8), LARGE, "reembed", "two vector spaces"),
        (TASK, (8, 8), LARGE, "reembed", "two vector spaces"),
        (None, (8, 8), LARGE, "reembed", "name it with --from"),
    ],
)
def test_auto(old, widths, new, regime, why):
    """The cheapest regime that gives right vectors is chosen, with the reason."""
    old_width, new_width = widths
    found = choose(Regime.AUTO, old, old_width, new, new_width)
    assert found.regime == regime
    assert why in found.why
    assert choose(Regime(regime), old, old_width, new, new_width) == found
    assert choose(Regime.REEMBED, old, old_width, new, new_width).regime is Regime.REEMBED


@pytest.mark.parametrize(
    ("asked", "old", "old_width", "new_width"),
    [
        (Regime.REUSE, PLAIN, 8, 8),
        (Regime.REUSE, LARGE, 8, 4),
        (Regime.TRUNCATE, LARGE, 8, 8),
        (Regime.TRUNCATE, LARGE, 4, 8),
        (Regime.REUSE, None, 8, 8),
    ],
)
def test_what_would_be_wrong_is_refused(asked, old, old_width, new_width):
    """A regime that would give wrong vectors is refused with the reason."""
    with pytest.raises(RegimeRefused, match=f"--regime {asked}: "):
        choose(asked, old, old_width, LARGE, new_width)
