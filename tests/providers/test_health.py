"""What is known of a provider holds however long its trouble lasts."""

import pytest
from embedding_proxy.providers.errors import RateLimited, Refusal
from embedding_proxy.providers.routing.health import Health
from embedding_proxy.providers.upstream.retry_after import MAX_COOLDOWN


class Rig:
    """The health of one provider, over a clock that a test moves."""

    def __init__(self):
        self.now = 0.0
        self.health = Health("p", lambda: self.now, lambda: 0.0)

    def limit(self, lane, wait=None):
        """Let a call in a lane meet a rate limit, when the lane has rested."""
        self.now += self.health.rest(lane) + 1
        permit = self.health.acquire(lane)
        error = RateLimited("p", "too many", Refusal(429, "too many", retry_after=wait))
        self.health.failed(permit, error, lane)


@pytest.mark.parametrize("wait", [None, 1.0])
def test_a_rate_limit_that_lasts_for_days_is_one_all_the_same(wait):
    """The cooldown has a greatest length, however often the limit was met in a row."""
    rig = Rig()
    for _ in range(1200):
        rig.limit("m", wait)
    rig.limit("m")
    assert 0 < rig.health.rest("m") <= MAX_COOLDOWN


def test_a_rate_limit_may_be_met_at_the_very_end_of_a_rest():
    """The clock goes on while it is looked at; what a good answer has cleared is begun anew."""
    rig = Rig()
    rig.limit("m", 10.0)
    first, second = (rig.health.acquire("m", rested=True) for _ in range(2))
    rig.health.succeeded(first, "m")
    end = rig.now + rig.health.rest("m")
    moments = iter([end - 0.001, end - 0.001, end])
    rig.health.cooldowns._clock = lambda: next(moments, end)
    rig.health.failed(second, RateLimited("p", "too many", Refusal(429, "too many")), "m")
    assert rig.health.rest("m") <= MAX_COOLDOWN
