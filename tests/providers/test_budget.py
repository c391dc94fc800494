"""The retry budget: how many retries all requests together may make."""

from clock import Clock
from embedding_proxy.providers.routing.retry_budget import MAX_TOKENS, SUCCESS_TOKENS, RetryBudget
from hypothesis import given
from hypothesis import strategies as st


def made():
    """Return a full budget, and its clock."""
    clock = Clock()
    return RetryBudget(clock), clock


def spent(budget):
    """Retry until the budget allows no more; return how often."""
    count = 0
    while budget.can_retry:
        budget.take()
        count += 1
    return count


def test_ten_retries_are_made_in_any_case():
    """With all tokens there, half of them may be spent before retries stop."""
    budget, _ = made()
    assert spent(budget) == MAX_TOKENS / 2 + 1


def test_a_fifth_of_the_successes_pays_for_retries():
    """Where calls go well, one retry in five is paid for, however many there are."""
    budget, _ = made()
    spent(budget)
    for _ in range(100):
        for _ in range(round(1 / SUCCESS_TOKENS)):
            budget.give_back()
        assert spent(budget) <= 1


def test_tokens_return_with_time():
    """An outage that is over is forgotten, though nothing was asked meanwhile."""
    budget, clock = made()
    spent(budget)
    clock.now += 5
    assert spent(budget) == 5
    clock.now += 1000
    assert budget.tokens == MAX_TOKENS


@given(st.lists(st.sampled_from(["take", "give back", "wait"]), max_size=200))
def test_the_tokens_stay_within_bounds(events):
    """Neither failures nor successes carry them beyond empty and full."""
    budget, clock = made()
    for event in events:
        if event == "take":
            budget.take()
        elif event == "wait":
            clock.now += 0.3
        else:
            budget.give_back()
        assert 0 <= budget.tokens <= MAX_TOKENS
