"""bench/scale_simulation.py against cases that are worked out by hand, and against real nodes."""

from dataclasses import replace

import numpy as np
import pytest
from redis_server import needs_redis

from bench import nodes
from bench.scale_simulation import (
    COSTS,
    MIB,
    PRICES,
    STORES,
    Fleet,
    Result,
    Workload,
    bill,
    draw,
    main,
    popularity,
    simulate,
    stores,
)

TEXTS = 1_000
UNIFORM = Workload(TEXTS, 50 * TEXTS, exponent=0.0)
ALL = 1e12
"""Bytes that hold every text."""


def test_an_lru_cache_of_equal_texts_hits_by_its_size():
    """If all texts are asked for alike, the hit rate is the share of them that the cache holds."""
    disk = TEXTS / 4 * COSTS.disk_bytes
    found = simulate(UNIFORM, Fleet(memory=0, disk=disk))
    assert found.rates[1] == pytest.approx(1 / 4, abs=0.01)
    assert sum(found.inputs) == UNIFORM.inputs
    assert found.disk_entries == TEXTS / 4


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_a_shared_tier_leaves_one_purchase_a_text(nodes):
    """With room for all, each text is bought once, and read once by each further node."""
    load = replace(UNIFORM, inputs=2 * TEXTS)
    requests = draw(load, nodes)
    distinct = len(np.unique(requests[:, 0]))
    by_node = len(np.unique(requests, axis=0))
    alone = simulate(load, Fleet(nodes, disk=ALL))
    shared = simulate(load, Fleet(nodes, disk=ALL, shared=ALL))
    assert alone.inputs[3] == by_node
    assert shared.inputs[2:] == (by_node - distinct, distinct)
    assert shared.shared_entries == distinct
    # What 2 a text, at random, leave out: (1 - 1/M) ** 2M of the M texts.
    assert distinct == pytest.approx(TEXTS * (1 - (1 - 1 / TEXTS) ** load.inputs), rel=0.01)


def test_what_a_node_drops_the_shared_tier_keeps():
    """A node without a cache asks the shared tier for all but the first of each text."""
    found = simulate(UNIFORM, Fleet(memory=0, disk=0, shared=ALL))
    assert found.inputs == (0, 0, UNIFORM.inputs - TEXTS, TEXTS)


@pytest.mark.parametrize("fleet", [Fleet(), Fleet(3), Fleet(3, 2, shared=1e7)])
def test_a_sample_of_the_texts_has_the_hit_rates_of_all(fleet):
    """Every tenth text of the tail, with tiers a tenth of the size, tells the same."""
    load = Workload(50_000, 250_000)
    fleet = replace(fleet, memory=2_500 * COSTS.memory_bytes, disk=10_000 * COSTS.disk_bytes)
    whole = simulate(load, fleet, sample=load.texts)
    some = simulate(load, fleet, sample=load.texts // 10)
    assert some.rates == pytest.approx(whole.rates, abs=0.01)
    assert some.disk_entries == pytest.approx(whole.disk_entries, rel=0.05)
    assert some.shared_entries == pytest.approx(whole.shared_entries, rel=0.05)


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.0, 1.3])
def test_popularity_is_the_sum_of_zipfs_law(exponent):
    """The integral beyond the first ranks agrees with the sum."""
    ranks = np.array([0, 1, 1_000, 200_000])
    summed = [(np.arange(1, n + 1.0) ** -exponent).sum() for n in ranks]
    assert popularity(ranks, exponent) == pytest.approx(summed, rel=1e-6)


def test_equal_arguments_give_equal_figures():
    """The seed decides the requests, and nothing else does."""
    load = Workload(TEXTS, TEXTS)
    assert simulate(load, Fleet(2)) == simulate(load, Fleet(2))
    assert (draw(load, 2) != draw(replace(load, seed=2), 2)).any()


def test_a_bill_by_hand():
    """Half of the inputs from memory, a quarter each from the shared tier and the provider."""
    costs = replace(COSTS, single_us=(100, 0, 400, 1_400), bulk_us=(10, 0, 40, 140))
    prices = replace(PRICES, million_tokens=1, tokens=100, core_month=10, memory_gb_month=5)
    fleet = Fleet(2, memory=0.3e9, disk=1e9, shared=4e9)
    load = Workload(100, 1_000_000)
    found = bill(load, fleet, Result((500_000, 0, 250_000, 250_000), 50, 60), costs, prices)
    assert found.singles_s == pytest.approx(2 * 1e6 / 500)
    assert found.bulk_s == pytest.approx(2 * 1e6 / 50)
    assert found.clients_mb_s == pytest.approx(4_000 * costs.reply_bytes / 1e6)
    assert found.shared_mb_s == pytest.approx(4_000 * costs.exchange_bytes / 2 / 1e6)
    assert (found.provider_usd, found.saved_usd) == (pytest.approx(25), pytest.approx(75))
    assert found.disk_gb == 50 * costs.disk_bytes / 1e9
    # Three cores; two workers of 0.2 + 0.3 GB and the tier; two disks.
    assert found.month_usd == pytest.approx(3 * 10 + (2 * 0.5 + 4) * 5 + 2 * prices.disk_gb_month)


def test_stores_by_hand():
    """What a billion texts take is what one takes, a billion times."""
    costs = replace(COSTS, shared_bytes=8_000, value_bytes=5_000)
    prices = replace(PRICES, memory_gb_month=2, object_gb_month=0.1, million_puts=3)
    found = dict(zip(STORES, stores(10**9, costs, prices), strict=True))
    assert (found["texts"], found["purchase, USD"]) == ("1e9", "3,000")
    assert (found["Redis, GB"], found["Redis, servers of 64 GB"]) == ("8,000", "125")
    assert found["Redis, USD a month"] == "16,000"
    assert (found["on disk, GB"], found["object store, USD a month"]) == ("5,500", "500")
    assert (found["writing it in packs, USD"], found["one by one, USD"]) == ("0.3", "3,000")


def test_the_table_has_a_line_for_each_fleet(capsys):
    """One node has no shared tier; the columns of the tiers add up to all inputs."""
    main(["--texts", "2e3", "--nodes", "1,2", "--shared-gb", "0,1"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:5]]
    assert [(line[1], line[3]) for line in lines] == [("1", "0"), ("2", "0"), ("2", "1")]
    assert [round(sum(map(float, line[4:8]))) for line in lines] == [100, 100, 100]


@needs_redis
@pytest.mark.slow
def test_real_nodes_do_what_the_simulation_says(tmp_path, monkeypatch):
    """Input by input: as many come from memory and from disk, and the rest from elsewhere."""
    monkeypatch.setattr(nodes, "SETTLE_SECONDS", 0.0)
    # Stored responses answer for some entries that memory has dropped.
    monkeypatch.setattr(nodes, "ADMIN", {**nodes.ADMIN, "fast_path": False})
    load = Workload(150, 300)
    fleet = Fleet(2, memory=MIB, disk=1e9, shared=1e9)
    found, said = nodes.run(tmp_path, load, fleet), simulate(load, fleet)
    assert found.inputs[:2] == said.inputs[:2]
    assert sum(found.inputs) == load.inputs
    # A node may ask before the other one has written.
    assert said.inputs[3] <= found.inputs[3] < said.inputs[2] + said.inputs[3]
    # What comes from the shared tier is written to disk a moment later.
    assert said.disk_entries - found.inputs[2] <= found.disk_entries <= said.disk_entries
