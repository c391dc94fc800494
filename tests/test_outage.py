"""A few rounds of trials/outage.py: real sockets, fifty clients, providers that come and go."""

import outage


async def test_a_provider_that_comes_and_goes_fails_nobody(monkeypatch):
    """The first provider is killed and revived under load, and every request is answered."""
    monkeypatch.setattr(outage, "UP", (0.02, 0.4))
    monkeypatch.setattr(outage, "DOWN", (0.02, 0.2))
    _, seen = await outage.flap(4)
    assert seen.statuses.keys() == {200}
    assert seen.providers.keys() <= {"openai", "openrouter"}
    assert seen.providers["openrouter"]


async def test_an_outage_of_everything_adds_at_most_a_fifth(monkeypatch):
    """A crowd, a trickle and a burst: no window holds more than 1.2 calls a request, and a few."""
    for dark in (await outage.crowd(1.0), await outage.trickle(1.0), await outage.burst()):
        ratio, beyond = dark.excess()
        assert 200 not in dark.seen.statuses
        assert beyond <= 10
        assert ratio <= 1.2 + 5 / 50
