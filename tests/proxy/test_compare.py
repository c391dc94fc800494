"""`compare` through real sockets: what it asks, what it finds, what it prints, and how it ends."""

import asyncio
import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from command import Done
from embedding_proxy.proxy.diagnostics import benchmark
from fault_server import hang, status

ROOT = Path(__file__).parents[2]
SMALL = "text-embedding-3-small"
MISTRAL = "mistralai/mistral-embed-2312"
KEYS = {"openai": "sk-openai-secret-key", "openrouter": "sk-openrouter-secret-key"}
TEXTS = [f"text number {i}" for i in range(12)]


def _at(openai=None, openrouter=None, /, **keys):
    servers = {"openai": openai, "openrouter": openrouter}
    return {**{name: one and {"base_url": one.url, **keys} for name, one in servers.items()}}


class Compared(Done):
    def route(self, provider, model=SMALL):
        """Return what is told of one route."""
        (one,) = [
            one
            for one in self.json["routes"]
            if (one["provider"], one["model"]) == (provider, model)
        ]
        return one


@pytest.fixture
def compare(tmp_path, monkeypatch, command):
    """Give a function that runs `compare` on TEXTS with these sections, both keys set."""
    config, texts = tmp_path / "config.yaml", tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    monkeypatch.setenv("COLUMNS", "200")
    for name, key in KEYS.items():
        monkeypatch.setenv(f"{name.upper()}_API_KEY", key)

    async def run(*arguments, texts=texts, **sections) -> Compared:
        sections = {"cache": {"directory": str(tmp_path / "cache")}, **sections}
        config.write_text(json.dumps(sections))
        if texts:
            arguments = (*arguments, "--texts", str(texts))
        done = await asyncio.to_thread(command, "compare", *arguments, "--config", config)
        assert not [key for key in KEYS.values() if key in done.out + done.err]
        assert not (tmp_path / "cache").exists(), "nothing goes into the cache"
        return Compared(*done)

    return run


def _charging(server, usd):
    """Let a server name its price for each call, as OpenRouter does."""
    server.always = server.altered(lambda reply: reply["usage"].update(cost=usd))


async def test_two_routes_and_another_model(compare, upstream, second):
    """Each route is asked for the same texts, once together and some alone in every round."""
    second.widths = {MISTRAL: 1024}
    arguments = ("--model", SMALL, "--model", MISTRAL, "--rounds", "2", "--json")
    done = await compare(*arguments, providers=_at(upstream, second))
    assert done.code == 0
    assert done.err.startswith("inputs: 12, routes: 3, calls of each: 23; about ")
    asked = [call.inputs for call in upstream.calls]
    alone = [[text] for text in TEXTS[:10]]
    assert asked == [[TEXTS[0]], TEXTS, *alone, TEXTS, *alone]
    for model in ("openai/" + SMALL, MISTRAL):
        mine = [call.inputs for call in second.calls if call.payload["model"] == model]
        assert mine == asked
    found = done.json
    assert (found["texts"], found["rounds"], found["batch"], found["k"]) == (12, 2, 12, 5)
    assert (found["ok"], found["problems"], found["left_out"]) == (True, [], [])
    here, there, other = found["routes"]
    providers = [one["provider"] for one in found["routes"]]
    assert providers == ["openai", "openrouter", "openrouter"]
    for one in (here, there, other):
        assert (one["complete"], one["calls"], one["failures"]) == (True, 23, {})
        assert 0 < one["p50_ms"] <= one["p95_ms"] < 60_000
        assert 0 < one["batch_p50_ms"] <= one["batch_p95_ms"] < 60_000
        assert one["charged"] is False
    assert (here["dimensions"], here["bytes_per_vector"]) == (1536, 6144)
    assert (other["dimensions"], other["bytes_per_million"]) == (1024, 4_096_000_000)
    assert here["usd_per_million_tokens"] == pytest.approx(0.02)
    assert other["usd_per_million_tokens"] == pytest.approx(0.1)
    # The upstream counts three words in each text.
    assert here["usd_per_million_inputs"] == pytest.approx(0.06)
    assert here["usd"] == pytest.approx(3 * 45 * 0.02e-6)
    same, *others = found["pairs"]
    assert (same["same_space"], same["agree"], same["overlap"]) == (True, True, None)
    assert same["least_cosine"] == pytest.approx(1)
    assert [one["same_space"] for one in others] == [False, False]
    assert all(0 <= one["overlap"] <= 1 and one["least_cosine"] is None for one in others)
    assert min(one["overhead_ms"] for one in found["routes"]) == 0
    assert found["fastest"] in {one["route"] for one in found["routes"]}
    assert found["cheapest"] != f"{MISTRAL} at openrouter"


async def test_json_is_documented(compare, upstream, second):
    """Every key of the report stands on the page."""
    done = await compare("--model", SMALL, "--json", providers=_at(upstream, second))
    page = (ROOT / "docs" / "comparing.md").read_text(encoding="utf-8")
    keys = {*done.json, *done.json["routes"][0], *done.json["pairs"][0]}
    assert not [key for key in sorted(keys) if f"`{key}`" not in page]


async def test_the_table_says_it_for_people(compare, upstream, second):
    """Figures in a table, then failures, likeness and advice, a line each."""
    second.always = status(503)
    done = await compare("--model", SMALL, providers=_at(upstream, second), models={SMALL: {}})
    assert done.code == 0
    rows = {line.split("  ")[0]: line.split() for line in done.out.splitlines()}
    assert rows["route"][1:4] == ["answered", "p50", "p95"]
    mine = rows[f"{SMALL} at openai"]
    assert mine[3] == "34/34"
    assert mine[-5:] == ["0.02", mine[-4], "1536", "6.1", "GB"]
    unknown = ["0/3", *["-"] * 4, "0.02", "?", "1536", "6.1", "GB"]
    assert rows[f"{SMALL} at openrouter"][3:] == unknown
    assert (
        f"  {SMALL} at openrouter: 3 x UpstreamError; the last: status 503: made-up 503\n"
        in done.out
    )
    assert "to choose" not in done.out, "there is nothing to choose from"


async def test_advice_is_given_where_there_is_a_choice(compare, upstream, second):
    """The cheapest, the fastest, who agrees with whom, and who is no better than another."""
    _charging(second, 1.0)
    done = await compare("--model", SMALL, "--k", "2", providers=_at(upstream, second))
    here, there = f"{SMALL} at openai", f"{SMALL} at openrouter"
    assert f"  {here} and {there} agree: cosine 1.000000 at least" in done.out
    assert f"  cheapest: {here}\n" in done.out
    assert "  fastest: " in done.out
    assert f"  {here} agrees with {there}: either stands in for the other\n" in done.out
    assert "agree: widths" not in done.out


async def test_what_an_upstream_charges_counts_more_than_the_list(compare, upstream, second):
    """Where a reply names its cost, that is what is told."""
    _charging(second, 0.001)
    done = await compare(
        "--model", SMALL, "--rounds", "1", "--json", providers=_at(upstream, second)
    )
    here, there = done.route("openai"), done.route("openrouter")
    assert (here["charged"], there["charged"]) == (False, True)
    assert there["usd"] == pytest.approx(0.001 * there["calls"])
    assert done.json["cheapest"] == here["route"]


async def test_the_price_of_a_route_counts_before_that_of_its_model(compare, upstream):
    """As on the bill."""
    routes = [{"provider": "openai", "model": SMALL, "price": 0.5}]
    models = {SMALL: {"routes": routes}}
    done = await compare("--rounds", "1", "--json", providers=_at(upstream), models=models)
    assert done.route("openai")["usd_per_million_tokens"] == pytest.approx(0.5)


async def test_models_of_two_spaces_are_told_by_their_neighbours(compare, upstream, tmp_path):
    """With what chance gives beside it; and who finds most where pairs are given."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"query": "the text with number 7", "text": "text number 7"}))
    models = ("--model", SMALL, "--model", "wordllama-embed", "--pairs", str(pairs))
    done = await compare(*models, "--k", "1", providers=_at(upstream))
    assert "% of the 1 nearest in common, 9% by chance\n" in done.out
    assert "agree" not in done.out.replace("agreement", "")
    assert "  finds most: wordllama-embed at local (l2_supercat_256)\n" in done.out


async def test_two_models_under_one_name_do_not_agree(compare, upstream, second):
    """Routes that are said to be one space and are not are told so."""
    routes = [{"provider": "openai", "model": "a"}, {"provider": "openrouter", "model": "b"}]
    mine = {"space": "mine", "dimensions": 1536, "routes": routes}
    sections = {"providers": _at(upstream, second), "models": {"mine": mine}}
    done = await compare("--model", "mine", **sections)
    assert "mine at openai (a) and mine at openrouter (b) DISAGREE: cosine " in done.out
    assert "agrees with" not in done.out
    mine.pop("dimensions")
    second.widths = {"b": 8}
    done = await compare("--model", "mine", **sections)
    assert "DISAGREE: widths 1536 and 8 in one space\n" in done.out


async def test_labelled_pairs_give_a_recall(compare, upstream, tmp_path):
    """A query of the same words finds its text; a plot then shows recall."""
    pairs, plot = tmp_path / "pairs.jsonl", tmp_path / "plot.svg"
    lines = [json.dumps({"query": f"query {i}", "text": text}) for i, text in enumerate(TEXTS)]
    pairs.write_text("\n".join(lines))
    answers = {f"query {i}": text for i, text in enumerate(TEXTS)}

    def find(reply):
        for item, asked in zip(reply["data"], upstream.calls[-1].inputs, strict=True):
            if asked in answers and asked != "query 3":
                right = {"model": SMALL, "input": [answers[asked]], "encoding_format": "float"}
                vector = upstream.reply(right)["data"][0]["embedding"]
                vector[0] += 0.001
                item["embedding"] = vector

    upstream.always = upstream.altered(find)
    arguments = ("--model", SMALL, "--pairs", str(pairs), "--plot", str(plot), "--k", "1", "--json")
    done = await compare(*arguments, texts=None, providers=_at(upstream))
    assert done.route("openai")["recall"] == pytest.approx(11 / 12)
    assert done.json["labelled_queries"] == 12
    words = {text.text for text in ET.parse(plot).iter("{http://www.w3.org/2000/svg}text")}
    assert "recall@1" in words
    table = await compare(*arguments[:4], texts=None, providers=_at(upstream))
    assert "recall@5" in table.out


async def test_the_plot_shows_cost_where_there_is_no_recall(compare, upstream, second, tmp_path):
    """One point a route that answered, each named below."""
    plot = tmp_path / "plot.svg"
    second.always = status(500)
    arguments = ("--model", SMALL, "--plot", str(plot))
    await compare(*arguments, providers=_at(upstream, second))
    root = ET.parse(plot).getroot()
    words = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "USD per million inputs" in words
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 1
    assert [word for word in words if word.startswith("2  ")] == [
        f"2  {SMALL} at openrouter: no answer, cost not known"
    ]


# What goes wrong


async def test_what_one_round_could_not_get_the_next_one_asks_for(compare, upstream):
    """Passing failures are counted by kind, and cost the comparison nothing."""
    right = upstream.altered(lambda reply: None)
    faults = [right, status(500), right, status(429), status(200, b"<html>")]
    upstream.script.extend(faults)
    done = await compare("--model", SMALL, "--json", providers=_at(upstream))
    one = done.route("openai")
    assert (done.code, one["complete"], one["calls"]) == (0, True, 34)
    assert one["failures"] == {"UpstreamError": 1, "RateLimited": 1, "MalformedResponse": 1}
    assert one["error"] == "the answer is not JSON"
    upstream.script.extend(faults)
    done = await compare("--model", SMALL, "--rounds", "1", "--json", providers=_at(upstream))
    assert (done.code, done.route("openai")["complete"]) == (1, False)


@pytest.mark.parametrize(
    ("act", "kind", "calls"),
    [
        (status(401), "AuthenticationError", 1),
        (status(402), "QuotaExceeded", 1),
        (status(404), "ModelNotFound", 1),
        (status(500), "UpstreamError", benchmark.MAX_FAILURES_IN_A_ROW),
    ],
)
async def test_a_route_that_fails_is_given_up(act, kind, calls, compare, upstream):
    """At once where no call can succeed; the others are compared, and the exit code is theirs."""
    upstream.always = act
    models = ("--model", SMALL, "--model", "wordllama-embed")
    done = await compare(*models, "--json", providers=_at(upstream))
    one = done.route("openai")
    assert (one["complete"], one["failures"]) == (False, {kind: calls})
    assert len(upstream.calls) == calls
    assert done.route("local", "wordllama-embed")["complete"] is True
    assert (done.code, done.json["fastest"]) == (1, done.json["routes"][1]["route"])


async def test_a_model_without_an_answer_is_code_1(compare, upstream, second):
    """The report is there all the same, and says which."""
    second.always = status(500)
    arguments = ("--model", SMALL, "--model", MISTRAL)
    done = await compare(*arguments, "--json", providers=_at(upstream, second))
    problems = [f"{MISTRAL}: no route answered for all inputs"]
    assert (done.code, done.json["problems"], done.json["ok"]) == (1, problems, False)
    done = await compare(*arguments, providers=_at(upstream, second))
    assert done.out.endswith(f"\nproblems:\n  {problems[0]}\n")


async def test_a_provider_without_a_key_is_left_out(compare, upstream, monkeypatch):
    """It is told why; a model that no provider can be asked for is code 1, before any call."""
    monkeypatch.delenv("OPENROUTER_API_KEY")
    done = await compare("--model", SMALL, "--json", providers=_at(upstream, upstream))
    assert done.json["left_out"] == [f"{SMALL} at openrouter: OPENROUTER_API_KEY is not set"]
    assert done.code == 0
    done = await compare("--model", MISTRAL, providers=_at(upstream, upstream))
    assert (done.code, done.out) == (1, "")
    assert "OPENROUTER_API_KEY" in done.err


async def test_an_answer_that_never_comes_is_cut_off(compare, upstream):
    """The provider's own limits end a call; three such calls end the trial."""
    upstream.always = hang()
    sections = {"providers": _at(upstream, None, timeout_s=0.05)}
    done = await compare("--model", SMALL, "--json", **sections)
    assert (done.code, done.route("openai")["failures"]) == (1, {"UpstreamTimeout": 3})


# What is chosen, and what it costs


async def test_only_the_chosen_providers_are_asked(compare, upstream, second):
    """--provider leaves the others alone, and an alias of the model adds no calls."""
    arguments = ("--model", SMALL, "--provider", "openrouter", "--rounds", "1", "--json")
    done = await compare(*arguments, providers=_at(upstream, second))
    assert (len(upstream.calls), len(second.calls)) == (0, 12)
    assert [one["provider"] for one in done.json["routes"]] == ["openrouter"]
    alike = {"space": f"openai/{SMALL}", "dimensions": 1536, "matryoshka": True}
    alike["routes"] = [{"provider": "openai", "model": "another"}]
    sections = {"providers": _at(upstream, second), "models": {"alike": alike}}
    await compare("--model", SMALL, "--rounds", "1", **sections)
    assert {call.payload["model"] for call in upstream.calls} == {SMALL}


async def test_without_a_model_those_of_the_configuration_are_compared(compare, upstream):
    """As `check` does it; where it names none, one must be said."""
    sections = {"providers": _at(upstream), "models": {SMALL: {}}}
    done = await compare("--json", "--rounds", "1", **sections)
    assert [one["model"] for one in done.json["routes"]] == [SMALL]
    done = await compare(providers=_at(upstream))
    assert (done.code, done.err) == (
        2,
        "embedding-proxy: --model: say which; the configuration names none\n",
    )


async def test_a_model_known_by_its_name_alone(compare, upstream):
    """Its width is learned from the first answer, and its cost is not made up."""
    upstream.widths = {"m-9": 24}
    done = await compare("--model", "m-9", "--json", providers=_at(upstream))
    one = done.route("openai", "m-9")
    assert (one["dimensions"], one["usd"], one["usd_per_million_inputs"]) == (24, None, None)
    assert "($1.00 a million for m-9 at openai, price not known)" in done.err
    assert done.json["cheapest"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", SMALL, "--provider", "nobody"), "--provider: there is no provider 'nobody'"),
        (
            ("--model", SMALL, "--provider", "local"),
            f"--provider: no route of {SMALL} leads to local",
        ),
        (("--model", "vendor/x-1", "--plot", "/nowhere/at/all.svg"), "--plot: /nowhere/at/all.svg"),
        (("--model", SMALL, "--rounds", "0"), "Invalid value for '--rounds'"),
    ],
)
async def test_wrong_usage_is_code_2(arguments, message, compare, upstream):
    """The message names the option, and nobody is asked."""
    done = await compare(*arguments, providers=_at(upstream))
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert not upstream.calls


async def test_a_file_of_texts_that_is_none_is_code_1(compare, upstream, tmp_path):
    """As everywhere: one line."""
    done = await compare("--model", SMALL, texts=tmp_path / "none.txt", providers=_at(upstream))
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "none.txt cannot be read" in done.err


async def test_what_costs_much_is_not_bought_unasked(compare, upstream):
    """Above a limit --yes is needed; --dry-run tells the cost of anything and asks nobody."""
    mine = {"space": "m", "price": 1000, "routes": [{"provider": "openai", "model": "m"}]}
    sections = {"providers": _at(upstream), "models": {"mine": mine}}
    done = await compare("--rounds", "1", **sections)
    assert (done.code, len(upstream.calls)) == (0, 12)
    told = "inputs: 12, routes: 1, calls of each: 12; about 92 tokens for $0.092"
    assert told in done.err
    upstream.calls.clear()
    done = await compare("--rounds", "2", **sections)
    assert (done.code, done.out) == (2, "")
    assert "\nembedding-proxy: that is more than $0.10: say --yes" in done.err
    assert not upstream.calls
    done = await compare("--dry-run", "--json", **sections)
    (route,) = done.json["routes"]
    assert (done.code, done.json["calls_each"], route["route"]) == (0, 34, "mine at openai (m)")
    assert route["usd"] == pytest.approx(route["tokens"] * 0.001)
    assert not upstream.calls
    done = await compare("--yes", "--rounds", "2", **sections)
    assert (done.code, len(upstream.calls)) == (0, 23)


async def test_a_text_that_is_too_long_is_named_before_any_call(compare, upstream, tmp_path):
    """A model's context is known, so nothing of the comparison is bought in vain."""
    long = tmp_path / "long.txt"
    long.write_text("short\n" + "many words " * 6000)
    done = await compare("--model", SMALL, texts=long, providers=_at(upstream))
    assert (done.code, len(upstream.calls)) == (2, 0)
    assert f"tokens, of which {SMALL} takes 8,192; shorten" in done.err
    assert "begins with 'many words" in done.err


async def test_the_local_model_costs_nothing(compare):
    """On one's own machine a price of nothing is known, and no key is needed."""
    done = await compare("--model", "wordllama-embed", "--json", providers={})
    one = done.route("local", "wordllama-embed")
    assert (one["usd"], one["usd_per_million_inputs"], one["dimensions"]) == (0.0, 0.0, 256)
    assert done.json["cheapest"] == one["route"]
