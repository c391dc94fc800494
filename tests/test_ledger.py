"""The bill against the upstreams' own counters: over faults, restarts and two proxies at once."""

import asyncio
import random
from collections import Counter

import orjson
import pytest
from aiohttp import web
from embedding_proxy.cache.disk import connection, ledger_reader
from embedding_proxy.cache.ledger import By
from fault_server import FaultServer, cut, status, tokens_of
from splintr import Tokenizer

GIB = 1 << 30
KEYS = [
    {"key": "key-of-alpha", "name": "alpha"},
    {"key": "key-of-beta", "name": "beta", "namespace": "team"},
    {"key": "key-of-nobody", "namespace": "team"},
]
NAMES = {"key-of-alpha": "alpha", "key-of-beta": "beta", "key-of-nobody": "key-1f212100"}
BOTH = [{"provider": "openai", "model": "m"}, {"provider": "openrouter", "model": "o/m"}]
SPACE = {"space": "s/m", "dimensions": 8, "tokenizer": "cl100k_base", "price": 0.02}
MODELS = {
    "m": {**SPACE, "routes": BOTH},
    "alias": {**SPACE, "routes": BOTH[::-1]},
    "other": {"space": "s/n", "dimensions": 8, "price": 0.13, "routes": [
        {"provider": "openrouter", "model": "o/n"}]},
}  # fmt: skip
COST = 37
"""Nanodollars a token, as the second upstream charges it."""


class Upstream(FaultServer):
    """Answers, refuses or spoils its answers by chance, and counts what it charges for."""

    def __init__(self, seed: int, cost: int | None = None) -> None:
        super().__init__(widths=dict.fromkeys(("m", "o/m", "o/n"), 8), always=self._act)
        self.chance = random.Random(seed)
        self.cost = cost
        self.charged = 0
        self.wasted = 0
        self.bought: Counter[str] = Counter()

    async def _act(self, request: web.Request, payload: dict[str, object]) -> web.StreamResponse:
        if any("refused" in item for item in payload["input"]):
            return await status(400)(request, payload)
        fault = self.chance.choice(("good",) * 14 + ("500", "429", "cut", "error", *SPOILT))
        if fault in UNPAID:
            return await UNPAID[fault](request, payload)
        reply = self.reply(payload)
        tokens = reply["usage"]["prompt_tokens"]
        if self.cost is not None:
            reply["usage"]["cost"] = tokens * self.cost / 1e9
        if fault in SPOILT:
            SPOILT[fault](reply["data"])
        self.bought.update(KEPT.get(fault, lambda _: ())(payload["input"]))
        self.charged += tokens
        self.wasted += tokens * (fault in SPOILT)
        return web.Response(body=orjson.dumps(reply), content_type="application/json")


UNPAID = {
    "500": status(500),
    "429": status(429),
    "cut": cut(),
    "error": status(200, {"error": {"code": 502, "message": "m"}}),
}
SPOILT = {
    "one too few": lambda data: data.pop(),
    "no permutation": lambda data: data[0].update(index=len(data)),
    "zeros": lambda data: data[-1].update(embedding=[0.0] * 8),
    "wrong width": lambda data: data[0].update(embedding=[0.5] * 7),
}
KEPT = {
    "good": lambda inputs: inputs,
    "zeros": lambda inputs: inputs[:-1],
    "wrong width": lambda inputs: inputs[1:],
}
"""The inputs whose vectors are good, by what was played."""


async def _load(proxies, chance, told):
    """Ask for known and unknown texts, at the same time and as different clients."""

    async def ask(proxy, key, asked):
        response = await proxy.post(asked, Authorization=f"Bearer {key}")
        told["status", response.status] += 1
        if response.status == 200:
            told["inputs"] += len(asked["input"])
            told["saved", NAMES[key]] += int(response.headers["x-tokens-saved"])
            told["billed"] += int(response.headers["x-tokens-billed"])

    async def client(number):
        # All at once for the same text, each of them twice.
        await ask(proxies[0], "key-of-alpha", {"model": "m", "input": [f"for all {len(told)}"] * 2})
        for _ in range(8):
            key = chance.choice(tuple(NAMES))
            texts = [
                " ".join(["word"] * chance.randint(1, 5)) + f" {chance.randrange(150)}"
                for _ in range(chance.choice((1, 1, 2, 5, 20)))
            ]
            if chance.random() < 0.05:
                texts.append(f"refused {number}")
            asked = {"model": chance.choice(tuple(MODELS)), "input": texts}
            proxy = chance.choice(proxies)
            await ask(proxy, key, asked)

    await asyncio.gather(*map(client, range(6)))


def _bill(directory, *by):
    with connection.opened(directory, GIB) as file:
        return dict(ledger_reader.read(file.sql, by))


@pytest.mark.parametrize(("seed", "window_ms"), [(1, 0), (2, 2)], ids=["alone", "gathered"])
async def test_the_bill_is_the_upstreams_own_to_the_token(start_proxy, tmp_path, seed, window_ms):
    """After faults, restarts and two proxies at once, each provider is billed what it charged."""
    told, chance = Counter(), random.Random(seed)
    async with Upstream(seed) as first, Upstream(seed + 100, COST) as second:
        providers = {
            "openai": {"base_url": first.url, "limits": {"inputs": 7}, "encoding_format": "float"},
            "openrouter": {"base_url": second.url, "limits": {"inputs": 3}},
        }
        for _ in range(3):
            sections = {
                "providers": providers,
                "models": MODELS,
                "server": {"keys": KEYS, "batch_window_ms": window_ms},
            }
            proxies = [await start_proxy(first, second, **sections) for _ in range(2)]
            await _load(proxies, chance, told)
            await start_proxy.stop()
    bill = _bill(tmp_path / "cache", By.PROVIDER)
    assert set(bill) == {("",), ("openai",), ("openrouter",)}
    theirs = {("openai",): (first, 20), ("openrouter",): (second, COST)}
    for name, (server, price) in theirs.items():
        assert server.wasted > 0
        assert bill[name].tokens_billed == server.charged
        assert bill[name].nanodollars_billed == server.charged * price
        assert bill[name][:2] == (0, 0)
        assert 0 < bill[name].misses <= server.bought.total()
    nothing = bill["",]
    assert (nothing.misses, nothing.tokens_billed, nothing.nanodollars_billed) == (0, 0, 0)
    by_client = _bill(tmp_path / "cache", By.CLIENT)
    assert {client: usage.tokens_saved for (client,), usage in by_client.items()} == {
        name: told["saved", name] for name in NAMES.values()
    }
    # Requests that failed have no header; what they bought is in the bill all the same.
    assert 0 < told["billed"] <= first.charged + second.charged
    assert min(nothing[:2] + nothing[3:5]) > 0
    assert min(told["status", 200] - 50, told["status", 400]) > 0


async def test_four_kinds_of_clients_buy_a_thousand_texts_once(upstream, start_proxy, tmp_path):
    """In whatever form the same texts are asked for, each is bought once, and billed once."""
    texts = [f"Text number {i}: what is bought once is never bought again." for i in range(1000)]
    upstream.widths = {"m": 8}
    model = {**SPACE, "routes": BOTH[:1]}
    proxy = await start_proxy(openai=upstream, models={"m": model})

    async def ask(size, items, **fields):
        for start in range(0, len(items), size):
            asked = {"model": "m", "input": items[start : start + size], **fields}
            assert (await proxy.post(asked)).status == 200

    encode = Tokenizer.from_pretrained("cl100k_base").encode_ordinary
    await asyncio.gather(
        proxy.client.embeddings.create(model="m", input=texts),  # openai-python: base64
        ask(100, texts, encoding_format="base64"),  # Node
        ask(32, texts, encoding_format="float"),  # Haystack
        ask(250, [list(encode(text)) for text in texts]),  # LangChain
    )
    await start_proxy.stop()
    assert sorted(upstream.inputs) == sorted(texts)
    ((_, total),) = _bill(tmp_path / "cache").items()
    assert (total.misses, total.inputs) == (1000, 4000)
    assert total.tokens_billed == sum(map(tokens_of, texts))
    assert total.tokens_saved == 3 * sum(len(encode(text)) for text in texts)
