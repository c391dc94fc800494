"""Some of `make shared`: replies are never crossed, and no fault of Redis fails a request."""

import shared_trial
from redis_server import needs_redis

pytestmark = needs_redis


async def test_no_reply_of_a_cancelled_exchange_is_another_ones():
    """Exchanges are cancelled, and given up as late, at any moment; every value is its key's."""
    seen = await shared_trial.cancel(300, seed=7)
    assert seen["cancelled"] >= 300
    assert seen["right"] > 0
    assert not seen["crossed"]


async def test_no_fault_of_redis_fails_a_request():
    """Stopped, killed, full, emptied, started anew, slow: every request is answered right."""
    told = await shared_trial.faults(0.3)
    assert told["failures"] == []
    assert told["requests"] > 0
    assert told["tier"]["opened"] >= 1
