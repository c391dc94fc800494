"""Processes that share a folder are asked for the same texts at once: each is bought once."""

import sys

import lease_trial
import pytest
from redis_server import needs_redis, redis_server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="such locks are Linux's own")


async def test_workers_buy_each_text_once(tmp_path):
    """Twice only those whose buyer was killed when its call had reached the upstream."""
    seen = await lease_trial.through_workers(tmp_path, rounds=6, kills=2, count=2)
    assert not seen.wrong
    assert len(seen.bought) == 6 * lease_trial.TEXTS
    assert seen.killed


async def test_processes_of_the_library_buy_each_text_once(tmp_path):
    """Also without a server: three programs with one cache folder."""
    seen = await lease_trial.through_services(tmp_path, rounds=6, count=3)
    assert not seen.wrong
    assert len(seen.bought) == 6 * lease_trial.TEXTS
    assert seen.outcomes["miss"] == 6 * lease_trial.TEXTS


@needs_redis
async def test_nodes_that_share_a_redis_buy_each_text_once(tmp_path):
    """Three nodes with folders of their own, each asked for what the others are buying."""
    with redis_server() as redis:
        # What is not answered in time decides each node for itself: here, nothing is.
        options = {"url": redis.url, "timeout_ms": 1000}
        seen = await lease_trial.through_nodes(tmp_path, 3, 60, options)
    assert not seen.wrong
    assert len(seen.bought) == 60
