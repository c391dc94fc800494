"""Leaving alone what keeps failing, for longer each time, and no longer than it must be."""

import pytest
from embedding_proxy.providers.failure_backoff import MAX_SECONDS, MIN_SECONDS, THRESHOLD, Backoff


@pytest.mark.parametrize("threshold", [1, THRESHOLD])
def test_waits_grow_and_end(threshold):
    """So many failures in a row begin a wait; each further one doubles it, up to the longest."""
    now = 0.0
    backoff = Backoff(threshold=threshold, clock=lambda: now)
    for _ in range(2):
        for _ in range(threshold - 1):
            assert backoff.fail() == 0
            assert not backoff.is_waiting
        expected = MIN_SECONDS
        for _ in range(60):
            assert backoff.fail() == expected
            assert backoff.is_waiting
            now += expected - 0.01
            assert backoff.is_waiting
            now += 0.02
            assert not backoff.is_waiting
            expected = min(2 * expected, MAX_SECONDS)
        backoff.fail()
        backoff.succeed()
        assert not backoff.is_waiting


def test_the_bounds_of_a_wait():
    """The shortest and the longest wait are what they were asked to be."""
    backoff = Backoff(0.5, 3)
    assert [backoff.fail() for _ in range(5)] == [0.5, 1, 2, 3, 3]
