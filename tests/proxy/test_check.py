"""`check`: what it asks, what it finds, what it prints, and how it ends."""

import asyncio
import json
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import Done
from embedding_proxy.index.client import Connection
from embedding_proxy.index.collection import Provenance, ensure
from embedding_proxy.providers import tokens
from embedding_proxy.providers.base import Space
from embedding_proxy.providers.route_check import TEXTS, Probe
from embedding_proxy.providers.routing.route import Route
from embedding_proxy.providers.vendors import OpenAI
from embedding_proxy.proxy.config.loader import ConfigError
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.diagnostics import check as checkup
from embedding_proxy.proxy.diagnostics.routes import ModelSelection, RouteResult, choose_models
from fault_server import hang, status
from qdrant_server import QdrantServer
from redis_server import needs_redis, redis_server

ROOT = Path(__file__).parents[2]
SMALL = "text-embedding-3-small"
SPACE = f"openai/{SMALL}"
KEYS = {"openai": "sk-openai-secret-key", "openrouter": "sk-openrouter-secret-key"}
TWO = {"openai": SMALL, "openrouter": f"openai/{SMALL}"}


def _model(space=SPACE, width=1536, /, **routes):
    return {
        "space": space,
        "dimensions": width,
        "routes": [{"provider": name, "model": model} for name, model in routes.items()],
    }


def _at(openai=None, openrouter=None, /, **keys):
    """Return the section `providers` for these upstreams, and no other provider."""
    servers = {"openai": openai, "openrouter": openrouter}
    urls = {name: one and {"base_url": one.url, **keys} for name, one in servers.items()}
    return {**urls, "local": None}


class Checked(Done):
    @property
    def problems(self):
        """What follows the last heading."""
        head, _, tail = self.out.rpartition("problem")
        assert head.rpartition("\n")[2].strip().isdigit(), self.out
        return [line.strip() for line in tail.splitlines()[1:]]


@pytest.fixture
def check(tmp_path, monkeypatch, command):
    """Give a function that runs `check` with these sections, both keys set unless `keys` are."""
    config = tmp_path / "config.yaml"
    monkeypatch.setenv("COLUMNS", "200")

    async def run(*arguments, keys=KEYS, **sections) -> Checked:
        for name, key in keys.items():
            monkeypatch.setenv(f"{name.upper()}_API_KEY", key)
        if sections:
            sections = {"cache": {"directory": str(tmp_path / "cache")}, **sections}
            config.write_text(json.dumps(sections))
            arguments = (*arguments, "--config", str(config))
        done = await asyncio.to_thread(command, "check", *arguments)
        assert not [key for key in KEYS.values() if key in done.out + done.err]
        return Checked(*done)

    return run


# Routes that answer, and whether they give the same


async def test_all_is_well(check, upstream, second, tmp_path):
    """Each route is bought from once, told with its figures, and the two of one space agree."""
    sections = {"providers": _at(upstream, second), "models": {SMALL: {}}}
    done = await check(**sections)
    assert (done.code, done.err) == (0, "")
    assert [call.inputs for call in upstream.calls + second.calls] == [list(TEXTS)] * 2
    for provider, model in TWO.items():
        row = next(line for line in done.out.splitlines() if line.startswith(f"  ok  {provider} "))
        assert f" {model} " in row
        assert " ms " in row
        assert row.endswith("width 1536  71 tokens")
    assert f"configuration: {tmp_path / 'config.yaml'}\n" in done.out
    assert f"cache: {tmp_path / 'cache'}: no store yet" in done.out
    assert f"{SMALL}, {SPACE}: space {SPACE}\n" in done.out
    assert f"openai ({SMALL}) and openrouter ({SPACE}) agree: cosine 1.000000\n" in done.out
    assert done.out.endswith("\nNo problem found.\n")
    assert not (tmp_path / "cache").exists()


async def test_json_is_one_object(check, upstream, second, tmp_path):
    """For scripts there is the whole report as one object, and nothing else."""
    mine = {**_model("mine", 1536, **TWO)}
    mine["routes"].append({"provider": "mistral", "model": "m"})
    done = await check("--json", providers=_at(upstream, second), models={"mine": mine})
    assert (done.code, done.err) == (0, "")
    found = done.json
    free, kind = (found["cache"].pop(key) for key in ("free_bytes", "file_system"))
    assert free > 0
    assert kind is None or isinstance(kind, str)
    times = [one.pop("latency_ms") for one in found["routes"]]
    assert [0 < time < 60_000 for time in times[:2]] == [True, True]
    assert times[2] is None
    page = (ROOT / "docs" / "providers.md").read_text(encoding="utf-8")
    keys = {*found, *found["cache"], *found["providers"]["openai"], *found["pairs"][0]}
    assert not [key for key in keys | {*found["routes"][0]} if f"`{key}`" not in page]
    route = {"model": "mine", "also": [], "space": "mine"}
    good = {"ok": True, "dimensions": 1536, "tokens": sum(len(t.split()) for t in TEXTS)}
    unasked = {"ok": None, "dimensions": None, "tokens": None}
    assert found == {
        "config": str(tmp_path / "config.yaml"),
        "cache": {
            "directory": str(tmp_path / "cache"),
            "exists": False,
            "entries": None,
            "file_bytes": None,
            "size_limit_bytes": 50 << 30,
            "network": False,
            "ok": True,
            "error": None,
        },
        "shared": None,
        "index": None,
        "providers": {
            "local": {"state": "disabled", "kind": None, "why": "null in the configuration"},
            "openai": {"state": "usable", "kind": "openai", "why": None},
            "openrouter": {"state": "usable", "kind": "openrouter", "why": None},
        },
        "routes": [
            {**route, "provider": "openai", "upstream_model": SMALL, **good, "error": None},
            {**route, "provider": "openrouter", "upstream_model": SPACE, **good, "error": None},
            {
                **route,
                "provider": "mistral",
                "upstream_model": "m",
                **unasked,
                "error": "the provider is not configured",
            },
        ],
        "pairs": [
            {
                "space": "mine",
                "one": f"openai ({SMALL})",
                "other": f"openrouter ({SPACE})",
                "cosine": 1.0,
                "ok": True,
            }
        ],
        "problems": [],
        "ok": True,
    }


@pytest.mark.parametrize("aliases", [False, True], ids=["two routes", "two models"])
async def test_routes_that_disagree_are_refused(aliases, check, upstream, second):
    """Two models behind one space, as routes of one name or under two, are named."""
    if aliases:
        models = {"a": _model("s", openai="m"), "b": _model("s", openrouter="other")}
    else:
        models = {"a": _model("s", openai="m", openrouter="other")}
    sections = {"providers": _at(upstream, second), "models": models}
    done = await check(**sections)
    assert done.code == 1
    assert "openai (m) and openrouter (other) DISAGREE: cosine -0.0" in done.out
    (problem,) = done.problems
    assert problem.startswith("s: openai (m) and openrouter (other) are refused as one space")
    for words in ("cosine", "0.999", "two spaces", "remove one of the routes", "space of its own"):
        assert words in problem
    found = (await check("--json", **sections)).json
    assert [one["ok"] for one in found["routes"]] == [True, True]
    assert [(pair["ok"], pair["cosine"] < 0.1) for pair in found["pairs"]] == [(False, True)]
    assert (found["ok"], found["problems"]) == (False, [problem])


async def test_each_route_is_compared_with_the_first(check, upstream, second):
    """Of three routes the one that differs is named, beside the one it should agree with."""
    models = {"a": _model("s", openai="m", openrouter="x/m"), "b": _model("s", openai="other")}
    found = (await check("--json", providers=_at(upstream, second), models=models)).json
    pairs = [(pair["one"], pair["other"], pair["ok"]) for pair in found["pairs"]]
    assert pairs == [
        ("openai (m)", "openrouter (x/m)", True),
        ("openai (m)", "openai (other)", False),
    ]


# Routes that fail


async def test_a_key_that_is_refused(check, upstream, second):
    """The reason and the variable are told; the key is not, though the upstream repeats it."""
    body = {"error": {"message": f"Incorrect API key: {KEYS['openai']}\n\x1b[2Kfine", "code": 401}}
    upstream.always = status(401, body)
    sections = {"providers": _at(upstream, second), "models": {SMALL: {}}}
    done = await check(**sections)
    assert done.code == 1
    (problem,) = done.problems
    assert problem.startswith(f"{SMALL} at openai ({SMALL}): status 401: Incorrect API key: ***")
    assert problem.endswith("(its key is that in OPENAI_API_KEY)")
    assert "\x1b" not in done.out
    assert f"  FAILED  openai      {SMALL} " in done.out
    assert "  ok      openrouter  " in done.out
    assert "agree" not in done.out
    first = (await check("--json", **sections)).json["routes"][0]
    assert (first["ok"], first["tokens"], first["dimensions"]) == (False, None, None)
    assert first["error"].startswith("status 401: Incorrect API key: ***")
    assert first["latency_ms"] > 0


@pytest.mark.parametrize(
    ("timeout_s", "server", "reason"),
    [
        (0.1, {}, r"no answer within \d\.\d s"),
        (60, {"request_timeout_s": 2}, "the time of the request was up"),
    ],
)
async def test_an_upstream_that_hangs(  # noqa: PLR0917 - fixtures
    timeout_s, server, reason, check, upstream, second
):
    """It is given up when an attempt's time is up, or a request's; the others are not harmed."""
    upstream.always = hang()
    providers = _at(upstream, second)
    providers["openai"]["timeout_s"] = timeout_s
    done = await check("--json", providers=providers, server=server, models={SMALL: {}})
    (problem,) = done.json["problems"]
    assert done.code == 1
    assert re.fullmatch(rf"{SMALL} at openai \({SMALL}\): {reason}", problem)
    assert done.json["routes"][0]["latency_ms"] >= 90
    assert len(second.calls) == 1


async def test_a_width_that_is_not_what_the_model_says(check, upstream):
    """A wrong `dimensions` is found by the check that every answer passes."""
    models = {"mine": _model("s", 1024, openai="m")}
    done = await check(providers=_at(upstream), models=models)
    assert done.problems == ["mine at openai (m): embedding 0: 1536 dimensions instead of 1024"]


async def test_code_of_a_package_that_fails(check, upstream, second, monkeypatch):
    """What a kind of one's own raises is told by its name, for its text may hold anything."""

    async def ask(*_):
        raise LookupError(KEYS["openai"])

    monkeypatch.setattr(OpenAI, "ask", ask)
    done = await check(providers=_at(upstream, second), models={SMALL: {}})
    problem = f"{SMALL} at openai ({SMALL}): its own code failed: LookupError"
    assert (done.code, done.problems) == (1, [problem])
    assert len(second.calls) == 1


@pytest.mark.parametrize("named", [True, False])
async def test_a_model_that_the_upstream_has_not(named, check, upstream):
    """Where the model was chosen from the catalogue, it is said how to check another one."""
    upstream.always = status(404)
    models = {"mistral-embed": {}} if named else {}
    providers = {"mistral": {"base_url": upstream.url, "api_key_env": "OPENAI_API_KEY"}}
    done = await check(providers={**providers, "local": None}, models=models)
    (problem,) = done.problems
    assert "made-up 404" in problem
    assert ("--model checks the one that you use" in problem) is not named


# What cannot be asked


async def test_offline_asks_nobody(check, upstream, second):
    """With --offline no call is made; what is wrong with the rest is told all the same."""
    sections = {"providers": _at(upstream, second), "models": {SMALL: {}}}
    done = await check("--offline", **sections)
    assert done.code == 0
    assert done.out.endswith("\nNo problem found; no provider was asked.\n")
    found = (await check("--offline", "--json", **sections)).json
    assert [(one["ok"], one["error"]) for one in found["routes"]] == [(None, "not asked")] * 2
    assert (found["pairs"], found["ok"]) == ([], True)
    assert upstream.calls + second.calls == []
    bad = {**sections, "cache": {"directory": str(Path(__file__) / "cache")}}
    assert (await check("--offline", **bad)).code == 1


async def test_a_named_provider_without_its_key_is_a_problem(check, upstream, second, tmp_path):
    """The file names it, so somebody counts on it, whichever other provider answers."""
    keys = {"openai": KEYS["openai"]}
    done = await check(keys=keys, providers=_at(upstream, second), models={SMALL: {}})
    assert (done.code, done.err, second.calls) == (1, "", [])
    (problem,) = done.problems
    assert problem.startswith(f"{tmp_path / 'config.yaml'}:1: providers.openrouter: this provider")
    assert problem.endswith("is skipped: OPENROUTER_API_KEY is not set")
    assert "skipped   openrouter  OPENROUTER_API_KEY is not set\n" in done.out
    assert f"  -   openrouter  {SPACE}  OPENROUTER_API_KEY is not set\n" in done.out


@pytest.mark.parametrize("how", ["in the file", "--model"])
async def test_a_named_model_without_any_key(how, check, upstream, second):
    """A model that somebody named and nobody can serve is a failure that says what to set."""
    arguments, models = ((), {SMALL: {}}) if how == "in the file" else ((how, SMALL), {})
    sections = {"providers": _at(upstream, second), "models": models}
    done = await check(*arguments, keys={}, **sections)
    assert done.code == 1
    assert f"`{SMALL}`" in done.problems[0]
    assert "set OPENAI_API_KEY or OPENROUTER_API_KEY" in done.problems[0]
    skipped = [one for one in done.problems if "this provider is skipped" in one]
    assert len(skipped) == (2 if how == "in the file" else 0)
    assert len(done.problems) == 1 + len(skipped)


async def test_the_built_in_configuration_without_a_key(check):
    """The local model works; that no other does is a problem, and one key of two solves it."""
    done = await check(keys={})
    assert (done.code, done.err) == (1, "")
    (problem,) = done.problems
    assert problem.startswith("no remote provider can be asked: every input that is not in the")
    assert "openai: OPENAI_API_KEY is not set; openrouter: OPENROUTER_API_KEY is not" in problem
    assert "configuration: built in\n" in done.out
    assert "  ok  local       l2_supercat_256 " in done.out
    found = (await check("--json", "--offline", keys={})).json
    assert (found["config"], found["ok"]) == (None, False)
    done = await check("--model", SMALL, "--offline", keys={})
    assert (done.code, len(done.problems)) == (1, 1)
    found = (await check("--json", "--offline", keys={"openrouter": "k"})).json
    assert (found["config"], found["ok"]) == (None, True)


@pytest.mark.parametrize("named", [True, False])
async def test_without_the_local_model(named, check, monkeypatch):
    """Whose extra is not installed is skipped, unless it is named: then it is a failure."""
    monkeypatch.setitem(sys.modules, "wordllama", None)
    done = await check(keys={}, providers={}, models={"wordllama-embed": {}} if named else {})
    assert "skipped  local  The local model is not installed; `pip install " in done.out
    assert done.code == 1
    *missing, problem = done.problems
    assert problem.startswith("no provider can be asked: every input that is not in the cache is")
    assert "(local: The local model is not installed; `pip install " in problem
    assert [one.startswith("The local model is not installed; ") for one in missing] == [
        True
    ] * named


async def test_a_provider_to_which_no_model_leads(check, upstream):
    """It is usable and of no use, which is a problem, unless other calls are passed to it."""
    providers = {"gateway": {"kind": "openai_compatible", "base_url": upstream.url}, "openai": {}}
    sections = {"providers": providers, "models": {"wordllama-embed": {}}}
    done = await check("--offline", **sections)
    assert done.code == 1
    (problem,) = done.problems
    assert problem.endswith(
        "providers.gateway: is never asked: no model has a route to it; add one to `models`"
    )
    assert "usable  gateway  no model has a route to it; add one to `models`\n" in done.out
    assert (await check("--offline", **sections, passthrough="gateway")).code == 0


@pytest.mark.parametrize(
    ("sections", "problems"),
    [
        ({"server": {"port": 1}}, 1),
        ({"providers": {"openai": {}}}, 1),
        ({"providers": {"openai": None, "openrouter": {}}}, 1),
        ({"providers": {"openai": None, "openrouter": None}}, 0),
        ({"providers": {"local": {}}}, 0),
        ({"providers": {"local": None}}, 1),
        ({"providers": {"openai": {"auth": "client"}}}, 0),
        ({"providers": {"ollama": {"base_url": "http://127.0.0.1:1/v1"}, "local": None}}, 0),
        ({"providers": {"openai": {}}, "cache": {"mode": "frozen"}}, 0),
    ],
)
async def test_a_configuration_under_which_misses_fail_is_a_problem(sections, problems, check):
    """Unless the file chooses the local model alone, clients bring keys, or nothing is bought."""
    found = (await check("--json", "--offline", keys={}, **sections)).json
    assert (len(found["problems"]), found["ok"]) == (problems, not problems)


async def test_what_serve_would_need_is_a_problem(check, upstream, tmp_path):
    """A key of clients whose variable is not set stops no check, and is told by it."""
    server = {"keys": [{"key": "${EMBEDDING_PROXY_NOWHERE}"}]}
    done = await check(providers=_at(upstream), models={SMALL: {}}, server=server)
    assert done.code == 1
    (problem,) = done.problems
    assert "server.keys.0.key: the variable EMBEDDING_PROXY_NOWHERE is not set" in problem
    assert problem.endswith("without it `serve` does not start")
    assert len(upstream.calls) == 1


# Which models are asked for


@pytest.mark.parametrize(
    ("usable", "named", "also", "models"),
    [
        # Two providers have a model in common; it is enough to ask for that.
        ("openai openrouter", (), "each provider", [SMALL, SPACE]),
        ("openrouter mistral", (), "each provider", [SMALL, "mistral-embed", SPACE]),
        ("openai local", ("mine",), "each provider", ["mine", SMALL, "wordllama-embed", SPACE]),
        ("openai", ("mine",), "nothing", ["mine"]),
        ("", ("mine",), "each provider", ["mine"]),
        ("", (), "all", []),
        ("mistral", ("mine",), "all", ["mine", "mistral-embed", "codestral-embed"]),
        # Who shares a space shares vectors, also with those that nobody named.
        ("openai", ("azure",), "nothing", ["azure", SMALL, SPACE]),
    ],
)
def test_as_few_models_are_chosen_as_will_do(usable, named, also, models):
    """The named ones, those of the same space, and one of each provider that is left."""
    mine = {"mine": _model("mine", 8, ollama="m"), "azure": _model(azure="m")}
    mine["azure"]["matryoshka"] = True
    providers = {"ollama": {}, "azure": {"base_url": "http://a/v1"}}
    settings = Settings.model_validate({"providers": providers, "models": mine})
    assert list(choose_models(settings, ModelSelection(named, also=also), usable.split())) == models


def test_a_model_that_there_is_not_is_wrong_usage():
    """The nearest names are suggested."""
    with pytest.raises(
        ConfigError, match=r"--model: there is no model 'text-embeding-3-small'; did"
    ):
        choose_models(Settings(), ModelSelection(["text-embeding-3-small"]), [])


async def test_all_models_are_asked_for_once_each(check, upstream):
    """--all asks for every model of the usable providers; two names of one route are one call."""
    upstream.widths = {"text-embedding-3-large": 3072}
    done = await check("--all", "--json", providers=_at(upstream))
    assert done.code == 0
    large, ada = "text-embedding-3-large", "text-embedding-ada-002"
    assert [call.payload["model"] for call in upstream.calls] == [SMALL, large, ada]
    asked = [one for one in done.json["routes"] if one["ok"]]
    assert [one["also"] for one in asked] == [[f"openai/{one}"] for one in (SMALL, large, ada)]


async def test_a_chosen_model_is_all_that_is_asked_for(check, upstream, second):
    """--model may be given several times, and no other model is bought from."""
    models = {"mine": _model("mine", openai="m"), "other": _model("other", openrouter="o")}
    sections = {"providers": _at(upstream, second), "models": models}
    assert (await check("--model", "mine", **sections)).code == 0
    assert (len(upstream.calls), len(second.calls)) == (1, 0)
    assert (await check("--model", "mine", "--model", "other", **sections)).code == 0
    assert (len(upstream.calls), len(second.calls)) == (2, 1)


async def test_providers_are_asked_side_by_side_and_each_in_turn(monkeypatch):
    """As many providers as allowed are asked at once, and none for two models at a time."""
    begun, loaded, gate = [], [], asyncio.Event()

    async def probe(route, space, context, clock):
        begun.append(route.name)
        loaded.append(tokens._tokenizer.cache_info().currsize)
        await gate.wait()
        return Probe(route, 0.0)

    monkeypatch.setattr(checkup, "probe", probe)
    names = [f"p{i}" for i in range(checkup.MAX_PROVIDERS_AT_ONCE + 2)]
    routes = [Route(SimpleNamespace(name=name), model) for model in "ab" for name in names]
    space = Space("s", 8, tokenizer="cl100k_base")
    results = [RouteResult(["m"], space, one.name, one.model, one) for one in routes]
    told = []
    tokens._tokenizer.cache_clear()
    task = asyncio.create_task(checkup._probe_routes(results, 1.0, told.append))
    for _ in range(10):
        await asyncio.sleep(0)
    assert begun == names[: checkup.MAX_PROVIDERS_AT_ONCE]
    gate.set()
    await task
    assert sorted(begun) == sorted(2 * names)
    assert told == [*range(1, len(routes) + 1)]
    assert all(one.ok for one in results)
    assert set(loaded) == {1}, "the time of a provider includes no loading of ours"


async def test_a_model_known_by_its_name_alone(check, upstream, second):
    """It is asked for as the proxy asks for it; routes of two widths are two models."""
    sections = {"providers": _at(upstream, second)}
    done = await check("--model", "m-9", **sections)
    assert (done.code, done.problems if done.code else []) == (0, [])
    assert "openai (m-9) and openrouter (openai/m-9) agree: cosine 1.000000\n" in done.out
    upstream.widths = {"m-9": 8}
    found = (await check("--model", "m-9", "--json", **sections)).json
    assert [one["dimensions"] for one in found["routes"]] == [8, 1536]
    assert [(pair["cosine"], pair["ok"]) for pair in found["pairs"]] == [(0.0, False)]


async def test_a_width_that_the_proxy_has_learned_holds(check, upstream, start_proxy):
    """What the proxy would refuse is a failure here, too."""
    upstream.widths = {"m-9": 8}
    proxy = await start_proxy(openai=upstream)
    assert (await proxy.post({"model": "m-9", "input": "a"})).status == 200
    upstream.widths = {"m-9": 16}
    done = await check("--model", "m-9", providers=_at(upstream))
    assert done.problems == ["m-9 at openai (m-9): embedding 0: 16 dimensions instead of 8"]


async def test_an_answer_of_several_widths_is_none(check, upstream):
    """Where no width is known, the vectors of one answer must still have the same."""

    def shorten(reply):
        reply["data"][1]["embedding"] = [1.0, 0.0]

    upstream.always = upstream.altered(shorten)
    done = await check("--model", "m-9", providers=_at(upstream))
    assert done.problems == ["m-9 at openai (m-9): its vectors are not of one width"]


async def test_what_stands_in_is_tried_too(check, upstream, second):
    """The models that `fallback` names are models that the file names."""
    models = {
        "mine": {**_model("mine", openai="m"), "fallback": "other"},
        "other": _model("other", mistral="o"),
    }
    done = await check("--model", "mine", providers=_at(upstream, second), models=models)
    assert done.code == 1
    assert done.problems == [
        "No provider for the model `other` is configured: add mistral to `providers`."
    ]


# The cache, the configuration, and being told to stop


async def test_a_store_in_use_is_not_harmed(check, start_proxy, upstream, tmp_path):
    """Beside a running proxy its entries are counted, and it goes on serving them."""
    proxy = await start_proxy(openai=upstream)
    asked = {"model": SMALL, "input": ["a", "b", "c"]}
    assert (await proxy.post(asked)).headers["x-cache"] == "miss"
    done = await check("--json", providers=_at(upstream))
    assert (done.code, done.json["cache"]["entries"]) == (0, 3)
    assert done.json["cache"]["file_bytes"] > 3 * 4 * 1536
    assert (await proxy.post(asked)).headers["x-cache"] == "hit"
    asked["input"].append("d")
    assert (await proxy.post(asked)).headers["x-cache-misses"] == "1"
    done = await check(providers=_at(upstream))
    assert f"cache: {tmp_path / 'cache'}: 4 entries, " in done.out


async def test_one_entry_is_one(check, start_proxy, upstream, tmp_path):
    """A number of one has its noun in the singular, as in every command."""
    proxy = await start_proxy(openai=upstream)
    await proxy.post({"model": SMALL, "input": "a"})
    done = await check(providers=_at(upstream))
    assert f"cache: {tmp_path / 'cache'}: 1 entry, " in done.out


async def test_a_cache_that_cannot_be_used(check, upstream, tmp_path):
    """It is a failure of its own, and the providers are asked all the same."""
    (tmp_path / "cache").write_text("in the way")
    done = await check(providers=_at(upstream))
    assert (done.code, len(upstream.calls)) == (1, 1)
    assert f"cache: {tmp_path / 'cache'}: cannot be used; " in done.out
    assert done.problems == [
        f"cache: {tmp_path / 'cache'} is no folder; name another cache.directory"
    ]
    found = (await check("--json", providers=_at(upstream))).json
    assert (found["cache"]["ok"], found["ok"]) == (False, False)
    assert found["problems"] == [f"cache: {found['cache']['error']}"]


async def test_a_cache_on_a_network_or_a_small_disk_is_told(check, upstream, tmp_path, monkeypatch):
    """Neither stops the proxy, so neither is a failure."""
    mounts = tmp_path / "mounts"
    mounts.write_text(f"host:/x {tmp_path} nfs4 rw 0 0\n")
    monkeypatch.setattr("embedding_proxy.cache.maintenance.location._MOUNTS", mounts)
    cache = {"directory": str(tmp_path / "cache"), "size_limit_gib": 1e6}
    done = await check(providers=_at(upstream), cache=cache)
    assert done.code == 0
    assert "  nfs4 is a network file system" in done.out
    assert re.search(
        r"  the disk has 10\S* \S+ less room than cache.size_limit_gib allows", done.out
    )
    done = await check("--json", providers=_at(upstream), cache=cache)
    assert (done.json["cache"]["network"], done.json["cache"]["file_system"]) == (True, "nfs4")


@pytest.mark.parametrize(
    ("arguments", "sections", "message"),
    [
        ((), {"cache": {"directry": "x"}}, "cache.directry: unknown key; did you mean directory?"),
        (("--model", "m-9"), {"server": {"unknown_models": "reject"}}, "no model 'm-9'; add it"),
        (("--model", "m-9"), {"providers": _at()}, "--model: there is no model 'm-9'; add it to"),
    ],
)
async def test_a_wrong_configuration_is_code_2(arguments, sections, message, check):
    """As everywhere: one line on stderr, and nothing is tried."""
    done = await check(*arguments, **sections)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1


async def test_a_key_that_is_no_key_is_code_2(check, upstream):
    """A variable that holds two lines is told by its name."""
    done = await check(keys={"openai": "sk-a\nsk-b"}, providers=_at(upstream))
    assert (done.code, done.out) == (2, "")
    assert "OPENAI_API_KEY: its value is no key" in done.err
    assert "sk-a" not in done.err


async def test_an_interrupted_check_is_code_130(upstream, tmp_path):
    """Ctrl-C amid a call ends it at once, without a traceback."""
    arrived = asyncio.Event()

    async def hold(*_):
        arrived.set()
        await asyncio.Event().wait()

    upstream.always = hold
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"providers": _at(upstream)}))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "embedding_proxy", "check", "--config", str(config)),
        cwd=ROOT,
        env={"HOME": str(tmp_path), "OPENAI_API_KEY": KEYS["openai"]},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        await arrived.wait()
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err


# Qdrant


async def test_qdrant_is_looked_at(check, upstream):
    """It is told when it can be reached; of a collection of another space, both are named."""
    async with QdrantServer() as qdrant:
        sections = {
            "providers": _at(upstream),
            "models": {SMALL: {"routes": [{"provider": "openai", "model": SMALL}]}},
            "index": {"qdrant": {"url": qdrant.url}},
        }
        done = await check(**sections)
        assert done.code == 0
        assert f"Qdrant: {qdrant.url}: ok, 0 collections\n" in done.out
        assert (await check("--json", **sections)).json["index"]["ok"] is True
        assert f"Qdrant: {qdrant.url}: not asked\n" in (await check("--offline", **sections)).out
        async with Connection(url=qdrant.url) as connection:
            await ensure(connection, f"{SMALL}-1536", Provenance("somebody/elses", 1536))
        done = await check(**sections)
        assert done.code == 1
        assert f"Qdrant: {qdrant.url}: FAILED\n" in done.out
        assert "index.qdrant: the collection" in done.out
        assert "somebody/elses" in done.out
        await qdrant.stop()
        done = await check(**sections)
        assert done.code == 1
        assert "index.qdrant: connection refused by 127.0.0.1:" in done.out
        assert "while listing collections" in done.out


@needs_redis
async def test_the_shared_tier_is_looked_at(check, upstream, tmp_path, monkeypatch):
    """Whether it can be written and read is found out, and what is wrong is named."""
    with redis_server() as server:
        shared = {"url": server.url}
        sections = {
            "providers": {"openai": {"base_url": upstream.url}},
            "models": {"text-embedding-3-small": {}},
            "cache": {"directory": str(tmp_path / "cache"), "shared": shared},
        }
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        told = f"shared tier: {server.url}"
        assert f"{told}: ok" in (await check(**sections)).out
        assert f"{told}: not asked\n" in (await check("--offline", **sections)).out
        assert server.keys("*") == []
        server.call("CONFIG", "SET", "maxmemory", "1gb")
        assert "its maxmemory-policy is noeviction" in (await check(**sections)).out
        server.call("CONFIG", "SET", "maxmemory", "1")
        done = await check(**sections)
        assert f"{told}: FAILED\n" in done.out
        assert "cache.shared: OOM command not allowed" in done.out
        server.call("CONFIG", "SET", "requirepass", "hunter2")
        assert "cache.shared: Authentication required" in (await check(**sections)).out
        monkeypatch.setenv("REDIS_PASSWORD", "hunter3")
        shared["password_env"] = "REDIS_PASSWORD"
        done = await check(**sections)
        assert "cache.shared: " in done.out
        assert "hunter" not in done.out + done.err
        assert done.code == 1
        server.kill()
        assert "cache.shared: Error 111 connecting" in (await check(**sections)).out


def _indexing(upstream, qdrant, **more):
    return {
        "providers": _at(upstream),
        "models": {SMALL: {"routes": [{"provider": "openai", "model": SMALL}]}},
        "index": {"qdrant": {"url": qdrant.url, **more}},
    }


async def _collections(qdrant):
    async with Connection(url=qdrant.url) as connection:
        found = await connection.ask(lambda client: client.get_collections())
    return [one.name for one in found.collections]


async def test_the_right_to_write_is_proved_and_nothing_is_left(check, upstream):
    """A point is written to a collection that is made for it."""
    async with QdrantServer() as qdrant:
        done = await check(**_indexing(upstream, qdrant, prefix="my_", payload_indexes=["lang"]))
        assert done.code == 0
        assert await _collections(qdrant) == []
        (written,) = [path for method, path, _ in qdrant.requests if path.endswith("/points")]
        assert written.startswith("/collections/my_embedding-proxy-check-")


@pytest.mark.parametrize(
    ("rights", "made", "code", "says"),
    [
        ({"*": "r"}, [], 1, "the collections of the models cannot be made, and no collection"),
        ({"*": "r"}, [f"{SMALL}-1536"], 1, f"points cannot be written to {SMALL}-1536: the key"),
        ({"docs": "r"}, ["docs"], 1, "no collection there can be written to"),
        ({"docs": "rw"}, ["docs"], 0, "the key makes no collections, it can write to docs alone"),
        ({f"{SMALL}-1536": "rw"}, [f"{SMALL}-1536"], 0, f"it can write to {SMALL}-1536 alone"),
    ],
)
async def test_what_a_key_may_not_do_is_named(  # noqa: PLR0917 - fixtures
    rights, made, code, says, check, upstream
):
    """A key to read with is a problem; one for some collections works for these."""
    async with QdrantServer() as qdrant:
        async with Connection(url=qdrant.url) as connection:
            for name in made:
                await ensure(connection, name, Provenance(f"openai/{SMALL}", 1536))
        qdrant.rights = rights
        done = await check(**_indexing(upstream, qdrant))
        assert (done.code, says in done.out) == (code, True), done.out
        qdrant.rights = None
        assert await _collections(qdrant) == made


async def test_a_collection_for_everything_must_take_points(check, upstream):
    """If the key makes no collections, it has to be there."""
    async with QdrantServer() as qdrant:
        async with Connection(url=qdrant.url) as connection:
            await ensure(connection, "other", Provenance(f"openai/{SMALL}", 1536))
        qdrant.rights = {"docs": "rw", "other": "rw"}
        done = await check(**_indexing(upstream, qdrant, collection="docs"))
        assert (done.code, "docs cannot be made" in done.out) == (1, True)
        done = await check(**_indexing(upstream, qdrant, collection="other"))
        assert (done.code, "it can write to other alone" in done.out) == (0, True)


async def test_an_address_with_a_path_too_much_is_told(check, upstream):
    """What was asked, and what is probably wrong; and the proxy does not start with it."""
    async with QdrantServer() as qdrant:
        sections = _indexing(upstream, qdrant)
        sections["index"]["qdrant"]["url"] += "/qdrant"
        done = await check(**sections)
        assert done.code == 1
        place = qdrant.url.removeprefix("http://")
        assert f"index.qdrant: HTTP 404 from {place} for GET /qdrant/collections" in done.out
        assert "or has a path too much" in done.out
        sections["index"]["qdrant"]["url"] = f"{qdrant.url}/dashboard"
        done = await check(**sections)
        assert (done.code, "is the address of Qdrant's dashboard" in done.err) == (2, True)


@pytest.mark.parametrize("key", ["two\nlines", "two\r\nlines"])
async def test_a_line_break_in_a_key_is_a_mistake_of_the_key(key, check, upstream, monkeypatch):
    """It names the variable and shows no key; nothing is asked."""
    monkeypatch.setenv("MY_KEY", key)
    async with QdrantServer() as qdrant:
        done = await check(**_indexing(upstream, qdrant, api_key_env="MY_KEY"))
        assert done.code == 1
        assert "index.qdrant: MY_KEY: its value is no key: it holds a line break" in done.out
        assert "lines" not in done.out
        assert qdrant.requests == []
