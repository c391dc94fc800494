"""Leaving alone what keeps failing, for longer each time, and no longer than it must be."""

from cache.disk.backoff import FAILURES_IN_A_ROW, LONGEST_SECONDS, SHORTEST_SECONDS, Rest


def test_rests_grow_and_end():
    """Three failures in a row begin a rest; each further one doubles it, up to the longest."""
    now = 0.0
    rest = Rest(lambda: now)
    for _ in range(FAILURES_IN_A_ROW - 1):
        rest.failed()
        assert not rest.resting
    expected = SHORTEST_SECONDS
    for _ in range(20):
        rest.failed()
        assert rest.resting
        now += expected - 0.01
        assert rest.resting
        now += 0.02
        assert not rest.resting
        expected = min(2 * expected, LONGEST_SECONDS)
    rest.succeeded()
    rest.failed()
    assert not rest.resting
