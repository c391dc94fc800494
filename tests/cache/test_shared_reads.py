"""Reads of the shared tier go together, and none waits for nobody; without a server."""

import asyncio

from embedding_proxy.cache.key import Keys, keyring
from embedding_proxy.cache.record import encode
from embedding_proxy.cache.shared.client import UNAVAILABLE
from embedding_proxy.cache.shared.tier import MAX_READS, SharedTier
from embedding_proxy.cache.shared.value import pack
from embedding_proxy.providers.base import Space

from tests.cache.fakes import entry_of, key_of

SPACE = Space("m", 3)
PARTITION = keyring(SPACE).partition
PATIENCE_S = 30.0


class Client:
    """Holds each exchange until it is let go."""

    is_available = True

    def __init__(self, values):
        self.values = values
        self.exchanges = []
        self.gate = asyncio.Event()

    def key(self, kind, name):
        return name

    async def get_many(self, keys):
        self.exchanges.append(keys)
        await self.gate.wait()
        return [self.values.get(key) for key in keys]

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass


def client_with(texts):
    entries = {key_of(t, SPACE).address: entry_of(t, SPACE) for t in texts}
    return Client({a: pack(encode(entry), 1.0, PARTITION) for a, entry in entries.items()})


async def look(tier, *texts):
    found = await tier.lookup(Keys.from_keys([key_of(t, SPACE) for t in texts]), 3)
    assert all(
        one is None or one.entry == entry_of(t, SPACE) for one, t in zip(found, texts, strict=True)
    )
    return [one is not None for one in found]


async def held(client, tier, *reads):
    """Return tasks of these reads, once all exchanges that may be under way are."""
    tasks = [asyncio.create_task(look(tier, *texts)) for texts in reads]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


async def test_reads_that_come_meanwhile_share_an_exchange():
    """What comes in one step goes together; at most MAX_READS are under way, and others wait."""
    texts = [f"text {n}" for n in range(100)]
    client = client_with(texts[::2])
    tier = SharedTier(client)
    tasks = await held(client, tier, *([text] for text in texts[:20]))
    assert len(client.exchanges) == 1
    for text in texts[20:]:
        tasks += await held(client, tier, [text])
    assert len(client.exchanges) == MAX_READS
    client.gate.set()
    assert await asyncio.gather(*tasks) == [[n % 2 == 0] for n in range(100)]
    assert len(client.exchanges) == MAX_READS + 1
    assert (tier.counters.hits, tier.counters.misses, tier.counters.errors) == (50, 50, 0)


async def test_who_reads_again_at_once_is_served():
    """A read that comes in the step in which all exchanges end waits for one of its own."""
    client = client_with(["a"])
    tier = SharedTier(client)

    async def read(times):
        return [await look(tier, "a") for _ in range(times)]

    tasks = []
    for times in (2, *[1] * (MAX_READS - 1)):
        tasks.append(asyncio.create_task(read(times)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    client.gate.set()
    async with asyncio.timeout(PATIENCE_S):
        assert await tasks[0] == [[True]] * 2
    await asyncio.gather(*tasks)


async def test_who_leaves_takes_nothing_from_the_others():
    """A read that is cancelled, waiting or under way, leaves the answers of the others in place."""
    client = client_with(["a", "b", "c"])
    tier = SharedTier(client)
    tasks = await held(client, tier, *([t] for t in "abcabcabc"))
    for gone in (tasks[0], tasks[5]):
        gone.cancel()
    client.gate.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [answer for answer in answers if answer == [True]] == [[True]] * 7


async def test_a_fault_of_the_client_is_no_answer_and_leaves_nobody_waiting():
    """Also what the client should not do ends the reads."""
    client = client_with(["a"])

    async def fail(keys):
        raise RuntimeError("a fault")

    client.get_many = fail
    tier = SharedTier(client)
    raised = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    assert await look(tier, "a", "b") == [False, False]
    assert tier.counters.errors == 2


async def test_the_end_lets_nobody_wait():
    """Reads under way when the tier is closed get no answer, and end."""
    client = client_with(["a"])
    tier = SharedTier(client)
    async with tier:
        tasks = await held(client, tier, *([t] for t in "aaaaaaaa"))
    assert await asyncio.gather(*tasks) == [[False]] * 8
    assert await look(tier, "a") == [False]
    assert UNAVAILABLE not in client.values
