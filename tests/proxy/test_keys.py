"""Clients' keys in a file: made by a command, heeded without a restart, with budgets and ends."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from aiohttp import web
from clock import in_virtual_time
from embedding_proxy.cache import ledger
from embedding_proxy.cache.ledger import LedgerKey, LimitedLedgerKey
from embedding_proxy.providers.base import Context
from embedding_proxy.providers.charge import NANO, Account, SpendingLimit
from embedding_proxy.proxy.config import keys_file
from embedding_proxy.proxy.config.errors import ConfigError
from embedding_proxy.proxy.config.keys_file import KeysFile, StoredKey, digest, is_key, new_key
from embedding_proxy.proxy.config.schema import ClientKey
from embedding_proxy.proxy.http import auth
from embedding_proxy.proxy.http.auth import Authenticator
from embedding_proxy.proxy.service.budgets import BudgetCheck, Budgets
from embedding_proxy.proxy.service.request import Client
from fault_server import tokens_of
from leaks import WATCH, found_in
from ports import own_port

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
PAST = datetime(2020, 1, 1, tzinfo=UTC)
MODELS = {
    "m": {"space": "s/m", "dimensions": 8, "price": 1000, "routes": [
        {"provider": "openai", "model": "m"}]},
}  # fmt: skip
COST = 1_000_000
"""Nanodollars a token."""


def _stored(name="alice", key=None, **settings):
    return StoredKey(name, digest(key or new_key()), NOW, **settings)


def _write(path, *keys):
    KeysFile(path).change(lambda _: keys)


def _bearer(key):
    return {"Authorization": f"Bearer {key}"}


def _usd(tokens, period="ever"):
    return SpendingLimit(tokens * COST, period)


# The file


def test_a_key_is_256_random_bits_and_its_digest_is_what_is_written(tmp_path):
    """The file is its owner's alone, and holds no key; what was written is read again."""
    keys = [new_key() for _ in range(3)]
    assert all(is_key(key) and len(key) == 3 + 64 for key in keys)
    settings = {"namespace": "team", "is_admin": True, "limit": _usd(3, "day")}
    stored = [_stored(f"n{i}", key, expires=NOW, **settings) for i, key in enumerate(keys)]
    path = tmp_path / "folder" / "keys.yaml"
    _write(path, *stored, bare := _stored("bare"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert not [key for key in keys if key in path.read_text()]
    assert KeysFile(path).read() == (*stored, bare)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("keys: [", ": "),
        ("keys: 5", ":1: keys: expected a list"),
        ("[]", ": keys: expected a list"),
        ("keys:\n- 5", ":2: keys.0: expected keys with values"),
        ("keys: []\nkys: []", ":2: kys: unknown key"),
        ("keys:\n- {name: a}", ":2: keys.0: digest is missing"),
        ("keys:\n- name: a\n  digest: abc", ":3: keys.0.digest: expected the SHA-256"),
        ("keys:\n- name: a\n  digst: abc", ":3: keys.0.digst: unknown key"),
        (f"keys:\n- {{name: a, digest: '{'a' * 64}', admin: 1}}", "admin: expected true or false"),
        (f"keys:\n- {{name: a, digest: '{'a' * 64}', budget: 5/week}}", "budget: expected US"),
        (f"keys:\n- {{name: a, digest: '{'a' * 64}', expires: soon}}", "expires: expected a date"),
        (f"keys:\n- {{name: '', digest: '{'a' * 64}'}}", "name: expected a name"),
        (f"keys:\n- {{name: {new_key()}, digest: '{'a' * 64}'}}", "name: looks like a key"),
        (
            f"keys:\n- {{name: a, digest: '{'a' * 64}', namespace: embedding-proxy/x}}",
            "are the proxy's own",
        ),
        (
            f"keys:\n- {{name: a, digest: '{'a' * 64}'}}\n- {{name: b, digest: '{'a' * 64}'}}",
            ":3: keys.1.digest: is there twice",
        ),
    ],
)
def test_mistakes_are_told_with_file_and_line(text, told, tmp_path):
    """As those of a configuration are, and without a key."""
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        KeysFile(path).read()
    assert str(caught.value).startswith(f"{path}:")
    assert told in str(caught.value)
    assert "ep-" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "x", "-1", "1e9", "5/week", "5/", "1000001", "nan"])
def test_a_budget_is_dollars_and_a_period(text):
    """Nothing else is taken for one."""
    with pytest.raises(ValueError, match="expected US dollars"):
        keys_file.parse_limit(text)


def test_many_commands_at_once_lose_no_key(tmp_path):
    """Each reads what the one before has written."""
    path = tmp_path / "keys.yaml"
    keys = [_stored(f"n{i}") for i in range(20)]
    with ThreadPoolExecutor(8) as threads:
        jobs = [
            threads.submit(KeysFile(path).change, lambda known, key=key: [*known, key])
            for key in keys
        ]
        for job in jobs:
            job.result()
    assert {key.name for key in KeysFile(path).read()} == {key.name for key in keys}
    assert {one.name for one in tmp_path.iterdir()} == {"keys.yaml", "keys.yaml.lock"}


def test_a_rotation_keeps_settings_and_ends_the_old_keys():
    """The new key is as the newest was; an earlier end stays, and what has expired goes."""
    first = _stored(expires=NOW + timedelta(hours=1), limit=_usd(1))
    gone, other = _stored(expires=NOW), _stored("bob")
    keys = keys_file.rotate([first, gone, other], "alice", "ep-x", NOW, timedelta(hours=24))
    assert keys[:2] == [first, other]
    assert (keys[2].name, keys[2].digest, keys[2].limit) == ("alice", digest("ep-x"), first.limit)
    again = keys_file.rotate([other], "bob", "ep-y", NOW, timedelta(hours=2))
    assert again[0].expires == NOW + timedelta(hours=2)
    assert again[1].expires is None
    with pytest.raises(KeyError):
        keys_file.rotate(keys, "carol", "ep-z", NOW, timedelta())
    with pytest.raises(ValueError, match="alice"):
        keys_file.rotate([gone], "alice", "ep-z", NOW, timedelta())


# Who is let in


def test_keys_of_both_places_count_and_each_until_it_expires():
    """One that has expired is told so; an empty file lets nobody in."""
    now = [NOW.timestamp() - 1]
    stored = [_stored("a", "ep-a", expires=NOW), _stored("b", "ep-b", namespace="t", is_admin=True)]
    access = Authenticator([ClientKey(key="own", name="o")], stored, clock=lambda: now[0])
    assert access.admit("Bearer own") == Client("", "o")
    assert access.admit("Bearer ep-b") == Client("t", "b", is_admin=True)
    assert access.admit("Bearer ep-a") == Client("", "a")
    assert access.next_expiry(now[0]) == NOW.timestamp()
    now[0] += 1
    refused = access.admit("Bearer ep-a")
    assert (refused.status, refused.code) == (401, "invalid_api_key")
    assert "it has expired" in refused.message
    assert access.next_expiry(now[0]) == float("inf")
    assert Authenticator([], []).admit(None).status == 401
    assert Authenticator([], None).admit(None) == Client(is_admin=True)


def test_only_what_takes_something_away_voids_what_is_kept():
    """An added key does not; a removed or changed one does, and so does the end of openness."""
    a, b = _stored("a"), _stored("b")
    access = Authenticator([], [a])
    assert not access.replace_stored([a, b])
    assert access.replace_stored([a, StoredKey("b", b.digest, NOW, namespace="x")])
    assert access.replace_stored([a])
    assert not access.replace_stored([a])
    assert Authenticator([]).replace_stored([a])


def test_a_key_of_the_proxys_form_goes_to_no_provider():
    """Also one that was revoked: `auth: client` would send it to a stranger."""
    access = Authenticator([ClientKey(key="k")], [], "token-of-metrics")
    for key in (new_key(), "token-of-metrics", "k"):
        assert access.own_key({"Authorization": f"Bearer {key}"}) == ""
        assert access.is_ours(f"Bearer {key}")
    assert access.own_key({"Authorization": "Bearer sk-own"}) == "sk-own"


@pytest.fixture
def _quick(monkeypatch):
    """Have the file looked at again and again."""
    monkeypatch.setattr(auth, "WATCH_S", 0.001)


async def _until(proxy, wanted, body=None, **headers):
    """Ask until the status is the wanted one."""
    async with asyncio.timeout(60):
        while (response := await proxy.post(body or GOOD, **headers)).status != wanted:
            pass
    return response


GOOD = {"model": "m", "input": "a b"}


@pytest.mark.usefixtures("_quick")
async def test_what_is_done_to_keys_holds_while_requests_run(tmp_path, upstream, start_proxy):
    """Added, removed, expired: also for requests whose replies are kept; no restart."""
    upstream.widths = {"m": 8}
    path = tmp_path / "cache" / "keys.yaml"
    proxy = await start_proxy(openai=upstream, models=MODELS)
    assert (await proxy.post(GOOD)).status == 200
    alice, bob = new_key(), new_key()
    _write(path, _stored("alice", alice))
    # It was open; the same bytes had been answered.
    await _until(proxy, 401)
    response = await _until(proxy, 200, **_bearer(alice))
    assert response.headers["x-cache"] == "hit"
    assert (await proxy.post(GOOD, **_bearer(bob))).status == 401
    _write(path, _stored("alice", alice), _stored("bob", bob))
    await _until(proxy, 200, **_bearer(bob))
    _write(path, _stored("bob", bob))
    await _until(proxy, 401, **_bearer(alice))
    assert (await proxy.post(GOOD, **_bearer(bob))).status == 200
    # A moment that is about to pass: nothing changes in the file then.
    _write(path, _stored("bob", bob, expires=datetime.now(UTC) + timedelta(seconds=1)))
    refused = await _until(proxy, 401, **_bearer(bob))
    assert "it has expired" in (await refused.json())["error"]["message"]
    assert len(upstream.calls) == 1


@pytest.mark.usefixtures("_quick")
async def test_a_file_that_cannot_be_read_changes_nothing(tmp_path, upstream, start_proxy, caplog):
    """Wrong, no file, gone: the former keys stay, and it is told once."""
    upstream.widths = {"m": 8}
    path, key = tmp_path / "cache" / "keys.yaml", new_key()
    _write(path, _stored("alice", key))
    proxy = await start_proxy(openai=upstream, models=MODELS)
    await _until(proxy, 200, **_bearer(key))

    async def logged(words):
        async with asyncio.timeout(60):
            while words not in caplog.text:
                assert (await proxy.post(GOOD, **_bearer(key))).status == 200
                assert (await proxy.post(GOOD)).status == 401

    path.write_text("keys: 5")
    await logged("expected a list")
    path.unlink()
    await logged("is gone")
    path.mkdir()
    await logged("cannot be read")
    path.rmdir()
    for _ in range(20):
        assert (await proxy.post(GOOD, **_bearer(key))).status == 200
    assert caplog.text.count("expected a list") == caplog.text.count("cannot be read") == 1
    other = new_key()
    _write(path, _stored("bob", other))
    await _until(proxy, 401, **_bearer(key))


async def test_a_wrong_file_refuses_the_start(tmp_path, command):
    """There are no former keys to stay with; the line is that of the file."""
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"cache": {"directory": str(tmp_path)}, "server": {"port": 0}}))
    (tmp_path / "keys.yaml").write_text("keys: 5")
    done = await asyncio.to_thread(command, "serve", "--config", config)
    assert done.code == 2
    assert "keys.yaml:1: keys: expected a list" in done.err
    named = {"port": 0, "keys_file": "nowhere.yaml"}
    config.write_text(json.dumps({"cache": {"directory": str(tmp_path)}, "server": named}))
    done = await asyncio.to_thread(command, "serve", "--config", config)
    assert done.code == 2
    assert "server.keys_file: there is no such file" in done.err


def test_a_host_that_others_reach_needs_a_key_of_either_place(tmp_path, command):
    """The file will do; and the commands that make its first key ask for none."""
    config = tmp_path / "config.yaml"
    server = {"host": "0.0.0.0", "port": 0}
    config.write_text(json.dumps({"cache": {"directory": str(tmp_path)}, "server": server}))
    assert "keys add NAME" in command("compare", "--config", config).err
    added = command("keys", "add", "alice", "--config", config)
    assert (added.code, is_key(added.out.strip())) == (0, True)
    assert "can be reached" not in command("compare", "--config", config).err


# Budgets


@pytest.fixture
async def team(tmp_path, upstream, start_proxy):
    """Give a function that starts a proxy in front of an upstream, with these keys."""
    upstream.widths = {"m": 8, "n": 8, "open": 8}

    async def start(*keys, **sections):
        _write(tmp_path / "cache" / "keys.yaml", *keys)
        return await start_proxy(openai=upstream, **{"models": MODELS, **sections})

    return start


async def test_beyond_its_budget_a_client_gets_hits_alone(team, upstream):
    """A miss is 429 in OpenAI's shape; others buy on, and what they buy is a hit."""
    poor, rich = new_key(), new_key()
    proxy = await team(_stored("poor", poor, limit=_usd(4)), _stored("rich", rich))
    for text in ("a b", "c d"):
        assert (await proxy.post({**GOOD, "input": text}, **_bearer(poor))).status == 200
    refused = await proxy.post({**GOOD, "input": ["a b", "e f"]}, **_bearer(poor))
    error = (await refused.json())["error"]
    assert (refused.status, error["type"], error["code"], error["param"]) == (
        *(429, "insufficient_quota", "insufficient_quota"),
        None,
    )
    assert "0.004 USD in all" in error["message"]
    assert refused.headers["x-should-retry"] == "false"
    assert (await proxy.post(GOOD, **_bearer(poor))).headers["x-cache"] == "hit"
    assert (await proxy.post({**GOOD, "input": "e f"}, **_bearer(rich))).status == 200
    hit = await proxy.post({**GOOD, "input": "e f"}, **_bearer(poor))
    assert hit.headers["x-cache"] == "hit"
    assert [call.payload["input"] for call in upstream.calls] == [["a b"], ["c d"], ["e f"]]


async def test_many_requests_at_once_pass_a_budget_by_one_at_most(team, upstream):
    """What is under way is reserved; nobody is refused before the budget is spent."""
    key = new_key()
    proxy = await team(_stored("poor", key, limit=_usd(20)))
    asked = [proxy.post({**GOOD, "input": f"text {i}"}, **_bearer(key)) for i in range(40)]
    answers = await asyncio.gather(*asked)
    bought = sum(tokens_of(one) for call in upstream.calls for one in call.payload["input"])
    assert bought == 20
    assert sorted({one.status for one in answers}) == [200, 429]
    assert sum(one.status == 200 for one in answers) == 10


async def test_purchases_that_surely_fit_run_at_the_same_time(team, upstream):
    """A budget that is far away slows nobody down."""
    key, arrived, release = new_key(), asyncio.Event(), asyncio.Event()
    waiting = []

    async def hold(_, payload):
        waiting.append(payload)
        if len(waiting) == 3:
            arrived.set()
        await release.wait()
        return web.json_response(upstream.reply(payload))

    upstream.always = hold
    proxy = await team(_stored("rich", key, limit=_usd(1000)))
    bodies = [{**GOOD, "input": f"t {i}"} for i in range(3)]
    tasks = [asyncio.create_task(proxy.post(body, **_bearer(key))) for body in bodies]
    await arrived.wait()
    release.set()
    assert {(await task).status for task in tasks} == {200}


async def test_a_client_that_leaves_still_holds_what_it_has_begun(team, upstream):
    """A call that goes on without its client is paid for; so it stays reserved."""
    key, arrived, release = new_key(), asyncio.Event(), asyncio.Event()

    async def hold(_, payload):
        arrived.set()
        await release.wait()
        return web.json_response(upstream.reply(payload))

    upstream.script.append(hold)
    proxy = await team(_stored("poor", key, limit=_usd(2)))
    first = asyncio.create_task(proxy.post(GOOD, **_bearer(key)))
    await arrived.wait()
    first.cancel()
    second = asyncio.create_task(proxy.post({**GOOD, "input": "c d"}, **_bearer(key)))
    for _ in range(1000):
        await asyncio.sleep(0)
    assert not second.done()
    release.set()
    assert (await second).status == 429
    assert (await proxy.post(GOOD, **_bearer(key))).headers["x-cache"] == "hit"


async def test_who_waited_for_another_clients_purchase_buys_for_itself(team, upstream):
    """The budget of one is not that of the other, though they asked for the same text."""
    poor, rich = new_key(), new_key()
    proxy = await team(_stored("poor", poor, limit=_usd(0)), _stored("rich", rich))
    for i in range(10):
        body = {**GOOD, "input": f"the same {i}"}
        one, other = await asyncio.gather(
            proxy.post(body, **_bearer(poor)), proxy.post(body, **_bearer(rich))
        )
        assert (one.status, other.status) in {(429, 200), (200, 200)}
    assert len(upstream.calls) == 10


async def test_models_that_are_not_configured_are_within_the_budget_too(team, upstream):
    """Their first purchase learns a width, past the cache."""
    key = new_key()
    proxy = await team(_stored("poor", key, limit=_usd(0)))
    assert (await proxy.post({"model": "open", "input": "a"}, **_bearer(key))).status == 429
    assert upstream.calls == []


async def test_a_budget_counts_what_was_billed_before_a_restart(team, start_proxy):
    """The ledger is on disk; rotation and new keys of a name change nothing."""
    key, new = new_key(), new_key()
    limit = _usd(2, "month")
    proxy = await team(_stored("poor", key, limit=limit))
    assert (await proxy.post(GOOD, **_bearer(key))).status == 200
    await start_proxy.stop()
    proxy = await team(_stored("poor", key, limit=limit), _stored("poor", new, limit=limit))
    other = {**GOOD, "input": "c d"}
    assert (await proxy.post(other, **_bearer(new))).status == 429
    assert (await proxy.post(GOOD, **_bearer(new))).status == 200


def test_a_period_begins_with_its_first_day():
    """UTC's calendar."""
    leap_day = datetime(2028, 2, 29, 23, 59, tzinfo=UTC).timestamp()
    day = int(leap_day // 86_400)
    assert SpendingLimit(1, "day").first_day(leap_day) == day
    assert SpendingLimit(1, "month").first_day(leap_day) == day - 28
    assert SpendingLimit(1, "ever").first_day(leap_day) == 0
    assert SpendingLimit(1, "month").first_day(leap_day + 60) == day + 1


async def test_no_flood_of_names_hides_what_a_client_with_a_budget_spends(
    team, upstream, monkeypatch
):
    """Beyond the lines that a day has, its own sums stay its own."""
    for module in ("cache.disk.store", "cache.disk.bounds"):
        monkeypatch.setattr(f"embedding_proxy.{module}.MAX_LEDGER_KEYS", 2)
    key = new_key()
    proxy = await team(_stored("poor", key, limit=_usd(10)))
    for i in range(20):
        body = {**GOOD, "input": f"text {i}", "task": f"t{i}"}
        response = await proxy.post(body, **_bearer(key))
        assert response.status == (200 if i < 5 else 429)
    assert len(upstream.calls) == 5


def test_the_rest_of_a_client_with_a_budget_is_its_own():
    """It equals the key without one, and its rest is its own rest."""
    fields = (ledger.Partition("n", "s", 8), "m", "p", "poor")
    assert LimitedLedgerKey(*fields) == LedgerKey(*fields)
    assert LedgerKey(*fields).rest.client == ledger.OTHER
    rest = LimitedLedgerKey(*fields).rest
    assert (rest.client, rest.provider, rest.rest) == ("poor", "p", rest)


async def test_while_the_ledger_cannot_be_read_this_process_counts(team, monkeypatch):
    """A broken disk neither refuses a client that has spent nothing, nor lets it spend for ever."""
    key = new_key()
    proxy = await team(_stored("poor", key, limit=_usd(4)))

    async def fail(*_, **__):
        return None

    monkeypatch.setattr(proxy.service._storage.store, "ledger", fail)
    statuses = [
        (await proxy.post({**GOOD, "input": f"text {i}"}, **_bearer(key))).status for i in range(4)
    ]
    assert statuses == [200, 200, 429, 429]


# What a client is told


async def _get(proxy, path, key):
    url = proxy.url.removesuffix("/v1") + path
    async with proxy.http.get(url, headers=_bearer(key)) as response:
        return response.status, await response.read()


async def test_a_client_is_told_its_own_bill_and_nothing_of_others(team, upstream):
    """Name, namespace, sums, budget and what is left; an admin is told everything."""
    alice, bob, boss = new_key(), new_key(), new_key()
    proxy = await team(
        _stored("alice", alice, namespace="team", limit=_usd(6, "day")),
        _stored("bob", bob),
        _stored("boss", boss, is_admin=True),
    )
    await proxy.post(GOOD, **_bearer(alice))
    await proxy.post(GOOD, **_bearer(bob))
    code, told = await _get(proxy, "/status", alice)
    own = json.loads(told)
    assert code == 200
    assert own.keys() == {"name", "namespace", "since_ever", "budget"}
    assert (own["name"], own["namespace"]) == ("alice", "team")
    assert (own["since_ever"]["misses"], own["since_ever"]["tokens_billed"]) == (1, 2)
    budget = own["budget"]
    assert budget == {
        "usd": 6 * COST / NANO,
        "period": "day",
        "usd_billed": 2 * COST / NANO,
        "usd_left": 4 * COST / NANO,
    }
    for secret in ("bob", "openai", upstream.url, str(proxy.service.settings.cache.directory)):
        assert secret not in told.decode()
    assert json.loads((await _get(proxy, "/status", bob))[1])["budget"] is None
    assert (await _get(proxy, "/metrics", alice))[0] == 403
    code, told = await _get(proxy, "/status", boss)
    clients = json.loads(told)["since_ever"]["clients"]
    assert {name: one["misses"] for name, one in clients.items()} == {"alice": 1, "bob": 1}
    assert (await _get(proxy, "/metrics", boss))[0] == 200


async def test_the_token_of_metrics_reads_metrics_and_nothing_else(team):
    """It is no key; and no key is it."""
    token = "a-token-for-prometheus"
    proxy = await team(_stored("a"), server={"metrics_token": token})
    assert (await _get(proxy, "/metrics", token))[0] == 200
    assert (await _get(proxy, "/metrics", f"{token}x"))[0] == 401
    for path in ("/status", "/v1/models", "/metrics/", "/v1/metrics"):
        assert (await _get(proxy, path, token))[0] == 401
    assert (await proxy.post(GOOD, **_bearer(token))).status == 401


async def test_no_key_comes_out_anywhere(team, upstream, tmp_path, caplog):
    """Status, metrics, replies, log, files, whatever is done with a key; good, unknown or old."""
    good, unknown, old = (new_key() for _ in range(3))
    stored = [_stored("good", good, is_admin=True), _stored("old", old, expires=PAST)]
    proxy = await team(*stored, passthrough="openai", passthrough_auth="client")
    WATCH.secrets.update(dict.fromkeys((good, unknown, old)))
    told = []
    for key in (good, unknown, old):
        for body in (GOOD, b"{", {"model": key, "input": "a"}):
            if body == {"model": good, "input": "a"}:
                continue  # What a client puts into its own fields is its own to show.
            response = await proxy.post(body, **_bearer(key))
            told.append(await response.text())
        paths = ("/status", "/metrics", "/v1/files", "/nowhere", "/")
        told += [(await _get(proxy, path, key))[1].decode() for path in paths]
    assert not [one for call in upstream.calls for one in call.headers.values() if "ep-" in one]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    told += [caplog.text, *map(str, files), *(one.read_bytes().decode("latin-1") for one in files)]
    for key in (good, unknown, old):
        assert not [one for one in told if found_in(key, one)]


# Processes


@contextmanager
def _running(tmp_path, config, workers=2, *options):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "embedding_proxy", "serve"]
    command += ["--workers", str(workers), "--config", str(file), *(options or ("--port", "0"))]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OPENAI_API_KEY": "k"},
        ) as parent,
    ):
        try:
            yield parent, parent.stdout.readline().strip().removeprefix("export OPENAI_BASE_URL=")
        finally:
            parent.kill()


def _keys(tmp_path, *words):
    command = [sys.executable, "-m", "embedding_proxy", "keys", *words]
    command += ["--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _status(url, key, text):
    """Ask over a connection of its own, so that either worker may get it."""
    body = json.dumps({"model": "m", "input": text}).encode()
    try:
        with urlopen(Request(f"{url}/embeddings", body, _bearer(key)), timeout=60) as reply:
            return reply.status
    except HTTPError as error:
        with error:
            return error.code


def _until_all(url, key, text, wanted):
    """Ask until thirty requests in a row have the wanted status: each worker has had some."""
    row = 0
    while row < 30:
        row = row + 1 if _status(url, key, text) == wanted else 0


async def test_each_command_takes_effect_on_all_workers(tmp_path, upstream):
    """Add, use, budget, rotate, revoke, while two workers serve; no key is in log or folder."""
    upstream.widths = {"m": 8}
    config = {
        "cache": {"directory": str(tmp_path / "cache")},
        "providers": {"openai": {"base_url": upstream.url}},
        "models": MODELS,
        "server": {"keys": [{"key": "the-operators", "name": "operator"}]},
    }

    def play():
        with _running(tmp_path, config) as (parent, url):
            alice = _keys(tmp_path, "add", "alice", "--budget", f"{4 * COST / NANO:f}/day")
            _until_all(url, alice, "a b", 200)
            assert _status(url, alice, "c d") == 200
            _until_all(url, alice, "e f", 429)
            _until_all(url, alice, "a b", 200)
            new = _keys(tmp_path, "rotate", "alice", "--grace", "0")
            _until_all(url, alice, "a b", 401)
            _until_all(url, new, "a b", 200)
            _until_all(url, new, "e f", 429)
            guest = _keys(tmp_path, "add", "guest", "--expires", "30")
            _until_all(url, guest, "a b", 200)
            # As if the thirty days had passed.
            KeysFile(tmp_path / "cache" / "keys.yaml").change(
                lambda keys: [
                    replace(key, expires=datetime.now(UTC)) if key.name == "guest" else key
                    for key in keys
                ]
            )
            _until_all(url, guest, "a b", 401)
            _keys(tmp_path, "revoke", "alice")
            _until_all(url, new, "a b", 401)
            _until_all(url, "the-operators", "a b", 200)
            parent.send_signal(signal.SIGTERM)
            assert parent.wait(60) == 0
        return alice, new, guest

    keys = await asyncio.to_thread(play)
    bought = sorted(text for call in upstream.calls for text in call.payload["input"])
    assert set(bought) == {"a b", "c d"}
    for path in [one for one in tmp_path.rglob("*") if one.is_file()]:
        content = path.read_bytes().decode("latin-1")
        assert not [key for key in keys if found_in(key, content)], path


@pytest.mark.parametrize("workers", [1, 2])
def test_prometheus_has_an_address_of_its_own(workers, tmp_path):
    """Metrics and probes without a key, and nothing else; a start on a taken one says so."""
    port = own_port()
    server = {"keys": ["a-key-of-clients"], "metrics_listen": f"127.0.0.1:{port}"}
    config = {
        "cache": {"directory": str(tmp_path / "cache")},
        "server": server,
        "providers": {"openai": None},
    }
    place = f"http://127.0.0.1:{port}"
    with _running(tmp_path, config, workers) as (parent, url):
        assert _status(url, "a-key-of-clients", "a") in (403, 404)
        with urlopen(f"{place}/metrics", timeout=60) as reply:
            assert b"embedding_proxy_build_info" in reply.read()
        for path in ("/livez", "/readyz"):
            with urlopen(place + path, timeout=60) as reply:
                assert json.loads(reply.read()) == {"status": "ok"}
        for path in ("/status", "/v1/models", "/"):
            with pytest.raises(HTTPError) as caught:
                urlopen(place + path, timeout=60)
            caught.value.close()
            assert caught.value.code == 404
        with _running(tmp_path, config, workers) as (second, said):
            assert (second.wait(60), said) == (1, "")
        assert f"cannot listen on 127.0.0.1:{port}" in (tmp_path / "log").read_text()
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(60) == 0


def test_the_address_of_metrics_is_handed_over(tmp_path):
    """A new process takes it over with the port for clients; it is open all the time."""
    ports = own_port(), own_port()
    server = {"port": ports[0], "metrics_listen": f"127.0.0.1:{ports[1]}"}
    config = {"cache": {"directory": str(tmp_path / "cache")}, "server": server}

    def scrape():
        with urlopen(f"http://127.0.0.1:{ports[1]}/livez", timeout=60) as reply:
            return reply.status

    options = ("--port", str(ports[0]))
    with _running(tmp_path, config, 1, *options) as (first, url):
        assert (url, scrape()) == (f"http://127.0.0.1:{ports[0]}/v1", 200)
        with _running(tmp_path, config, 1, *options, "--take-over") as (second, other):
            assert other == url
            while first.poll() is None:
                assert scrape() == 200
            assert (first.returncode, scrape()) == (0, 200)
            second.send_signal(signal.SIGTERM)
            assert second.wait(60) == 0


# The configuration


@pytest.mark.parametrize(
    ("server", "told"),
    [
        ({"metrics_listen": "9100"}, "server.metrics_listen: expected an address like"),
        ({"metrics_listen": "h:99999"}, "server.metrics_listen: expected an address like"),
        ({"metrics_listen": "a/b:1"}, "server.metrics_listen: expected a host name"),
        ({"metrics_token": "Bearer x"}, "server.metrics_token: holds more than the key"),
        ({"metrics_token": "k", "keys": ["k"]}, "server.metrics_token: is the key of server.keys"),
    ],
)
def test_mistakes_of_the_configuration(server, told, tmp_path, command):
    """They are told with file, line and key."""
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"server": server}, indent=1))
    done = command("config", "show", "--config", file)
    assert done.code == 2
    assert re.search(rf"{re.escape(str(file))}:\d: {told}", done.err)


def test_the_token_of_metrics_is_shown_as_a_reference(tmp_path, command, monkeypatch):
    """As a key is; and commands that open no port do without its variable."""
    file = tmp_path / "config.yaml"
    for token, shown in (("a-token-in-the-file", "${METRICS_TOKEN}"), ("${PROM}", "${PROM}")):
        file.write_text(json.dumps({"server": {"metrics_token": token}}))
        told = command("config", "show", "--json", "--config", file)
        assert told.json["settings"]["server"]["metrics_token"] == shown
        assert "a-token-in-the-file" not in told.out
    assert command("keys", "list", "--config", file).code == 0
    done = command("serve", "--port", "0", "--config", file)
    assert (done.code, "the variable PROM is not set" in done.err) == (2, True)


async def test_a_purchase_reserves_the_highest_price_of_its_routes():
    """What a route costs may be far above the model's list price."""
    amounts = []

    class Noted(Budgets):
        @asynccontextmanager
        async def purchase(self, name, limit, amount):
            amounts.append(amount)
            yield lambda _: None

    class Inner:
        async def embed(self, space, inputs, context):
            return None

    limit = SpendingLimit(10**9, "day")
    for price, prices in ((0.02, (None,)), (0.02, (None, 1000.0)), (0.02, (0.01,)), (0.0, (5.0,))):
        check = BudgetCheck(Inner(), Noted(None), prices)
        context = Context(None, account=Account("m", "ci", price, limit))
        await check.embed(None, ["a" * 1000], context)
    listed, dear, cheap, unlisted = amounts
    assert dear == 50_000 * listed
    assert cheap == listed > 0
    # Nothing is known of the model's own price: such a purchase is made alone.
    assert unlisted == 0


@in_virtual_time
async def test_what_a_purchase_reserved_is_free_again_when_it_ends():
    """However many were made before, those that fit together run at the same time."""

    class Store:
        async def flush_counts(self):
            return True

        async def ledger(self, *_, **__):
            return []

    budgets, limit = Budgets(Store()), SpendingLimit(10)
    async with asyncio.timeout(1):
        for _ in range(3):
            async with budgets.purchase("ci", limit, 6):
                pass
        async with budgets.purchase("ci", limit, 4), budgets.purchase("ci", limit, 6):
            pass
