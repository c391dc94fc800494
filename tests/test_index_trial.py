"""trials/index_trial.py scaled down: the proxy killed twice, Qdrant away for a while, in CI."""

import index_trial
import pytest


@pytest.mark.parametrize("workers", [1, 2])
async def test_each_text_becomes_one_point_through_two_kills_and_an_outage(workers):
    """No request fails, and Qdrant ends with one point a text, each with the right vector."""
    found = await index_trial.trial(400, workers)
    assert (found.points, found.wrong, found.failed, found.kills) == (400, 0, 0, 2), found
