"""The sums of a damaged ledger: of two copies the better one counts, and nothing counts twice."""

import pytest
from embedding_proxy.cache.disk.carver import LAYOUT_1, USAGE, USAGE_COPY, CarvedLedger, LedgerPage
from embedding_proxy.cache.ledger import Usage

A = (20_000, 1, "a", "p", "c")
B = (20_000, 1, "b", "p", "c")
C = (20_000, 2, "c", "p", "c")
LOW, HIGH = Usage(misses=1, tokens_billed=5), Usage(misses=2, tokens_billed=9)


def _page(shape, *lines, is_sound=True):
    page = LedgerPage()
    rows = [(*line, *usage) if shape == USAGE else (*usage, *line) for line, usage in lines]
    for row in sorted(rows):
        page.add(shape, row)
    page.is_sound &= is_sound
    return page


def _merged(*pages):
    ledger = CarvedLedger()
    for page in pages:
        ledger.add(page)
    return dict(ledger.lines())


@pytest.mark.parametrize("shape", [USAGE, USAGE_COPY])
def test_one_copy_is_enough(shape):
    """Where the pages of the other are gone, the sums are those of the one that is left."""
    assert _merged(_page(shape, (A, LOW), (B, HIGH))) == {A: LOW, B: HIGH}


def test_both_copies_count_once():
    """A line that stands in both is one line; one of several pages of a copy is, too."""
    table, index = (
        [_page(shape, (A, LOW), (B, HIGH)), _page(shape, (C, LOW))] for shape in (USAGE, USAGE_COPY)
    )
    assert _merged(*table, *index, table[0]) == {A: LOW, B: HIGH, C: LOW}


def test_of_two_sums_the_higher_one_counts():
    """An older version of a page has lower sums."""
    assert _merged(_page(USAGE, (A, LOW)), _page(USAGE_COPY, (A, HIGH))) == {A: HIGH}
    assert _merged(_page(USAGE, (A, HIGH)), _page(USAGE, (A, LOW))) == {A: HIGH}


def test_what_stands_on_a_page_out_of_order_counts_for_want_of_another():
    """Noise in the place of a sum is no sum, and a line that noise has renamed is no line."""
    noise = Usage(misses=1 << 40)
    damaged = _page(USAGE, (A, noise), (C, noise), is_sound=False)
    assert _merged(damaged, _page(USAGE_COPY, (A, LOW), (B, LOW))) == {A: LOW, B: LOW}
    assert _merged(damaged, _page(USAGE_COPY, (A, LOW))) == {A: LOW, C: noise}
    assert _merged(damaged) == {A: noise, C: noise}


def test_order_tells_a_damaged_page():
    """Rows of a page are sorted, in the table by what they are about, in the copy by the sums."""
    page = LedgerPage()
    page.add(USAGE, (*B, *LOW))
    page.add(USAGE, (*C, *LOW))
    assert page.is_sound
    page.add(USAGE, (*A, *LOW))
    assert not page.is_sound


@pytest.mark.parametrize(
    "row",
    [(*A, -1, *[0] * 7), (*A, 1 << 60, *[0] * 7), (1 << 40, *A[1:], *LOW), (1, -1, *A[2:], *LOW)],
)
def test_what_can_be_no_sum_is_left_out(row):
    """Negative numbers, absurd ones, and days that never were."""
    page = LedgerPage()
    page.add(USAGE, row)
    assert (page.is_sound, _merged(page)) == (False, {})


def test_a_line_that_stands_on_a_page_twice_is_two():
    """Its row in the table was damaged, and counted from zero again."""
    assert _merged(_page(USAGE_COPY, (A, LOW), (A, HIGH))) == {A: LOW.plus(HIGH)}


def test_what_is_left_of_layout_1_counts_only_alone():
    """The sums of layout 1 were carried over into the ledger that there is."""
    page = LedgerPage()
    page.add(LAYOUT_1, (20_000, 1, 1, 2, 3, 4, 5, 6))
    line = (20_000, 1, "", "", "")
    assert _merged(page) == {line: Usage(1, 2, 3, 4, 5, 6)}
    assert _merged(page, _page(USAGE, (A, LOW))) == {A: LOW}
