"""How many extra attempts are granted, and when they are forgotten; the clock is ours."""

from clock import Clock
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.routing.budget import FLOOR, SHARE, WINDOW, Budget


def made():
    """Return a budget and its clock."""
    clock = Clock()
    return Budget(clock), clock


def granted(budget):
    """Spend all there is, and return how much that was."""
    count = 0
    while budget.affords():
        budget.spend()
        count += 1
    return count


def test_a_few_are_always_granted():
    """With no calls at all there is the floor, and no more."""
    budget, _ = made()
    assert granted(budget) == FLOOR


def test_a_fifth_of_the_calls_is_granted():
    """Beyond the floor, extras are bounded by the calls of the window."""
    budget, clock = made()
    for _ in range(200):
        budget.call()
        clock.now += 0.01
    assert granted(budget) == 40


def test_the_window_slides():
    """After ten seconds extras are forgotten, and so are the calls that paid for them."""
    budget, clock = made()
    for _ in range(100):
        budget.call()
    assert granted(budget) == 20
    clock.now += WINDOW - 0.5
    assert not budget.affords()
    clock.now += 0.5
    assert (budget.extras, budget.calls) == (0, 100)
    clock.now += 1
    assert (budget.calls, granted(budget)) == (0, FLOOR)


def test_a_refund_is_as_if_nothing_had_been_spent():
    """What is given back may be spent again; what is forgotten cannot be given back."""
    budget, clock = made()
    receipt = budget.spend()
    assert budget.extras == 1
    budget.refund(receipt)
    budget.refund(receipt)
    assert budget.extras == 0
    receipt = budget.spend()
    clock.now += WINDOW
    budget.refund(receipt)
    assert granted(budget) == FLOOR


def test_what_was_not_affordable_is_a_debt():
    """An extra that had to be made all the same counts against those that come after."""
    budget, _ = made()
    for _ in range(FLOOR + 3):
        budget.spend()
    for _ in range(5 * (FLOOR + 3)):
        budget.call()
    assert not budget.affords()
    for _ in range(5):
        budget.call()
    assert budget.affords()


@given(st.lists(st.tuples(st.sampled_from("cx"), st.floats(0, 3)), max_size=300))
@settings(deadline=None)
def test_no_window_holds_more_than_its_share(steps):
    """Whatever the sequence, the ten seconds before each extra keep the bound."""
    budget, clock = made()
    calls, extras = [], []
    for what, pause in steps:
        clock.now += pause / 10
        if what == "c":
            budget.call()
            calls.append(clock.now)
        elif budget.affords():
            budget.spend()
            extras.append(clock.now)
            start = clock.now - WINDOW
            paid = sum(1 for t in calls if t > start - 1e-9)
            assert sum(1 for t in extras if t > start) <= max(FLOOR, SHARE * paid)
