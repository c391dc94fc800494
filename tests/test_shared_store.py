"""Several processes use one store: what they count is exact, and nobody meets a lock."""

import mixed_load


async def test_two_workers_count_exactly(tmp_path):
    """Sums, entries and purchases agree with every reply, and nothing known is bought again."""
    came = await mixed_load.through_workers(tmp_path, 1500, seed=7)
    assert not came["wrong"]
    assert came["misses"] > 1000
    assert came["hits"] > 1000


def test_two_stores_count_exactly(tmp_path):
    """Processes that read and write without a pause fail at nothing, and say nothing."""
    came = mixed_load.through_stores(tmp_path, 3000, seed=7)
    assert not came["wrong"]
    assert came["records"] > 1000
    assert came["hits"] > 1000
