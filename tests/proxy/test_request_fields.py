"""Further fields of a request: part of the space, dropped, or refused; each as its table says."""

import asyncio
import logging

import pytest
from embedding_proxy.providers.errors import InvalidRequest
from embedding_proxy.proxy import request_fields
from embedding_proxy.proxy.request_fields import (
    MAX_FIELDS,
    MAX_NAME,
    MAX_SETS,
    OWN_FIELDS,
    RULES,
    WINDOW_S,
    Group,
    SpaceWatch,
    classify,
    rule_of,
)
from hypothesis import given
from hypothesis import strategies as st

SMALL = "text-embedding-3-small"
SPACE = f"openai/{SMALL}"
ELEMENT_TYPES = {
    "output_dtype": "int8",
    "Output_DType": "ubinary",
    "outputDtype": "uint8",
    "output-dtype": "binary",
    "embedding_types": ["int8"],
    "embedding_type": "binary",
    "embed_dtype": "float16",
    "dtype": "bfloat16",
    "output_data_type": "int8",
    "endianness": "big",
    "encoding_format": "bytes",
    "Encoding_Format": "base64",
}
WIDTHS = ("output_dimension", "output_dimensions", "outputDimensionality", "dimensionality", "dims")
CONNECTIONS = (
    *("api_key", "API_KEY", "apiKey", "api_base", "base_url", "baseURL", "api_version"),
    *("custom_llm_provider", "extra_headers", "extra_body", "headers", "organization"),
    *("aws_access_key_id", "aws_bedrock_runtime_endpoint", "vertex_project", "azure_ad_token"),
    *("vertex_credentials", "litellm_credential_name", "openai_api_key", "model_list", "s3_bucket"),
)
NEUTRAL = {
    "drop_params": True,
    "timeout": 30,
    "metadata": {"team": "search"},
    "num_retries": 2,
    "cache": {"no-cache": True},
    "caching": False,
    "mock_response": "never this",
    "tags": ["a"],
    "fallbacks": ["text-embedding-ada-002"],
    "litellm_trace_id": "t",
    "no-log": True,
    "s-maxage": 5,
    "service_tier": "flex",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "store": False,
    "allowed_openai_params": ["dimensions"],
}


async def _refused(proxy, **fields):
    """Return the error of a request that has to be a 400."""
    response = await proxy.post({"model": SMALL, "input": "a", **fields})
    assert response.status == 400, fields
    error = (await response.json())["error"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.fixture
def of_kinds(start_proxy, upstream, monkeypatch):
    """Give a function that starts a proxy whose model is at a provider of some kind."""

    async def start(kind, **settings):
        monkeypatch.setenv("SOME_KEY", "k")
        if kind == "local":
            return await start_proxy()
        some = {"kind": kind, "base_url": upstream.url, "api_key_env": "SOME_KEY", **settings}
        model = {
            "space": "v/m",
            "dimensions": 1536,
            "matryoshka": True,
            "routes": [{"provider": "p", "model": "m"}],
        }
        return await start_proxy(providers={"p": some}, models={SMALL: model})

    return start


KINDS = ("openai", "openrouter", "openai_compatible", "mistral", "voyage", "cohere", "vllm", "tei")


@pytest.mark.parametrize("kind", [*KINDS, "local"])
async def test_element_types_and_other_widths_are_refused_at_every_kind(kind, of_kinds, upstream):
    """Whoever would be asked, nothing is bought in another element type or by another width."""
    proxy = await of_kinds(kind)
    model = {"model": "wordllama-embed"} if kind == "local" else {}
    for name, value in ELEMENT_TYPES.items():
        error = await _refused(proxy, **model, **{name: value})
        assert error["param"] == name
        assert name in error["message"]
    for name in WIDTHS:
        error = await _refused(proxy, **model, **{name: 256})
        assert (error["param"], "by `dimensions`" in error["message"]) == (name, True)
    assert not upstream.calls


@pytest.mark.parametrize(
    "fields",
    [
        {"output_dtype": "float"},
        {"embedding_types": ["Float"]},
        {"embed_dtype": "float32", "endianness": "little"},
        {"stream": False},
    ],
    ids=str,
)
async def test_an_element_type_that_is_given_anyway_is_dropped(fields, start_proxy, upstream):
    """To ask for float32 numbers is to ask for what comes: one entry, and nothing is sent on."""
    proxy = await start_proxy(openai=upstream)
    first = await proxy.post({"model": SMALL, "input": "a"})
    again = await proxy.post({"model": SMALL, "input": "a", **fields})
    assert (first.status, again.headers["x-cache"]) == (200, "hit")
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("name", CONNECTIONS)
async def test_a_host_or_a_secret_in_a_body_is_refused(name, start_proxy, upstream, caplog):
    """Such a field gets a 400 that names it; its value is in no error, header, log or status."""
    proxy = await start_proxy(openai=upstream)
    with caplog.at_level(logging.DEBUG, "embedding_proxy"):
        error = await _refused(proxy, **{name: "sk-private-value"})
    assert error["param"] == name
    assert "private" not in f"{error} {caplog.text}"
    assert not upstream.calls


async def test_a_value_is_in_no_header_and_on_no_disk(start_proxy, upstream, tmp_path):
    """An unknown field is named in the space, and its value is nowhere in what is kept or shown."""
    proxy = await start_proxy(openai=upstream)
    response = await proxy.post({"model": SMALL, "input": "a", "note": "a-private-value"})
    label = response.headers["x-embedding-space"]
    assert label.startswith(f"{SPACE}?note=~")
    async with proxy.http.get(proxy.url.removesuffix("/v1") + "/status") as status:
        assert "private" not in await status.text()
    await start_proxy.stop()
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    kept = b"".join(file.read_bytes() for file in files)
    assert label.encode() in kept
    assert b"private" not in kept


async def test_neutral_fields_make_no_space(start_proxy, upstream):
    """Gateways' fields, whatever they hold, share one entry, and none of them is sent on."""
    proxy = await start_proxy(openai=upstream)
    for name, value in NEUTRAL.items():
        response = await proxy.post({"model": SMALL, "input": "a", name: value})
        assert response.status == 200, name
        assert response.headers["x-embedding-space"] == SPACE
    for number in range(3):
        await proxy.post({"model": SMALL, "input": "a", "request_id": f"r{number}"})
    (call,) = upstream.calls
    assert call.payload.keys() == {"model", "input", "encoding_format"}


async def test_a_neutral_field_goes_to_who_declares_it(of_kinds, upstream):
    """`neutral_fields` of a provider are sent to it, and make no space, unknown ones included."""
    proxy = await of_kinds("openai_compatible", neutral_fields=["tags", "trace"])
    for number in range(2):
        fields = {"tags": [f"t{number}"], "trace": number, "metadata": {}, "task": "q"}
        response = await proxy.post({"model": SMALL, "input": "a", **fields})
    assert response.headers["x-cache"] == "hit"
    (call,) = upstream.calls
    assert (call.payload["tags"], call.payload["trace"], call.payload["task"]) == (["t0"], 0, "q")
    assert "metadata" not in call.payload


async def test_a_neutral_field_among_the_extra_fields_is_sent(of_kinds, upstream):
    """A provider that is said to know a neutral field gets it; it makes no space all the same."""
    proxy = await of_kinds("openai_compatible", extra_fields=["task", "priority"])
    for priority in (1, 2):
        await proxy.post({"model": SMALL, "input": "a", "priority": priority})
    (call,) = upstream.calls
    assert call.payload["priority"] == 1


async def test_gathered_requests_keep_their_neutral_fields_apart(start_proxy, upstream):
    """Requests of different neutral fields are not put into one call with the fields of one."""
    proxy = await start_proxy(
        providers={"openai": {"base_url": upstream.url, "neutral_fields": ["tags"]}},
        openai=upstream,
        server={"batch_window_ms": 50},
    )
    bodies = [{"model": SMALL, "input": f"text {n}", "tags": [n]} for n in range(2)]
    replies = await asyncio.gather(*map(proxy.post, bodies))
    assert {reply.status for reply in replies} == {200}
    sent = [(call.inputs, call.payload["tags"]) for call in upstream.calls]
    assert sorted(sent) == [(["text 0"], [0]), (["text 1"], [1])]


async def test_other_forms_of_input_are_refused(start_proxy, upstream):
    """Chat messages, texts and images beside or in place of `input` are named, and not sent on."""
    proxy = await start_proxy(openai=upstream)
    for name in ("messages", "texts", "images"):
        for body in ({name: ["x"]}, {name: ["x"], "input": "a"}):
            response = await proxy.post({"model": SMALL, **body})
            error = (await response.json())["error"]
            assert (response.status, error["param"]) == (400, name)
            assert "only text and token ids are taken" in error["message"]
    assert not upstream.calls


@pytest.mark.parametrize("names", [["api_key"], ["input"], ["output_dtype"]], ids=str)
def test_no_provider_can_declare_what_is_refused(names):
    """A configuration cannot have a secret, an element type or the input passed on as neutral."""
    assert names[0] in request_fields.neutral_field_problem(names)
    assert request_fields.neutral_field_problem(["tags", "anything"]) is None


def test_the_table_says_why_and_never_contradicts_itself():
    """Each rule has a reason; each name has one place, and a refusal can be written."""
    assert all(rule.reason for rule in RULES.values())
    for name, rule in RULES.items():
        assert rule_of(name) == rule
        if rule.group is Group.REFUSED and name not in {one.replace("_", "") for one in OWN_FIELDS}:
            with pytest.raises(InvalidRequest, match="`"):
                classify({name: object()})


@given(st.sampled_from(sorted(RULES)), st.data())
def test_no_spelling_changes_the_place_of_a_field(name, data):
    """Upper case, hyphens and underscores anywhere leave a field where it is."""
    spelled = "".join(
        data.draw(st.sampled_from([c, c.upper(), f"_{c}", f"-{c.upper()}"])) for c in name
    )
    assert rule_of(spelled) == rule_of(name)


@given(st.dictionaries(st.text(max_size=12), st.integers() | st.text(max_size=4)))
def test_every_field_has_exactly_one_place(fields):
    """What is not refused is a parameter or neutral, with its value; nothing is lost unsaid."""
    try:
        parameters, neutral = classify(fields)
    except InvalidRequest as error:
        assert error.param in fields  # noqa: PT017 - either outcome is fine, each has its rule
        return
    dropped = fields.keys() - parameters.keys() - neutral.keys()
    assert not parameters.keys() & neutral.keys()
    assert all(rule_of(name).group is Group.REFUSED for name in dropped)
    assert {**parameters, **neutral} == {n: v for n, v in fields.items() if n not in dropped}


async def test_a_field_that_varies_is_told_of_once(start_proxy, upstream, caplog):
    """Many parameter sets of one model are warned of by the field's name, never by a value."""
    proxy = await start_proxy(openai=upstream)
    with caplog.at_level(logging.WARNING, "embedding_proxy"):
        for number in range(MAX_SETS + 5):
            body = {"model": SMALL, "input": "a", "task": "q", "nonce": f"private-{number}"}
            await proxy.post(body)
    told = [record.getMessage() for record in caplog.records if "distinct" in record.getMessage()]
    assert len(told) == 1
    assert SMALL in told[0]
    assert "'nonce'" in told[0]
    assert "neutral_fields" in told[0]
    assert "private" not in told[0]


class _Clock:
    """A clock that is moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_few_sets_and_sets_of_long_ago_are_nothing_unusual(caplog):
    """Twenty sets in ten minutes are silent, however often they come, and older ones are gone."""
    clock = _Clock()
    watch = SpaceWatch(clock)
    for _ in range(3):
        for number in range(MAX_SETS):
            watch.note("m", (("task", b"%d" % number),))
    clock.now += WINDOW_S + 1
    for number in range(MAX_SETS):
        watch.note("m", (("task", b"9%d" % number),))
        watch.note("other", (("task", b"9%d" % number),))
    assert caplog.text == ""
    watch.note("m", (("task", b"new"),))
    assert "model m: more than 20 distinct sets" in caplog.text


def test_of_large_requests_little_is_remembered(caplog):
    """Names as long as a request, and as many as fit in one, are cut short."""
    watch = SpaceWatch(_Clock())
    for number in range(MAX_SETS):
        fields = tuple((f"{i:04}{'x' * 10_000}", b"%d" % number) for i in range(200))
        watch.note("m", fields)
    seen = watch._models.peek("m")
    assert len(seen.sets) == MAX_SETS
    for _, values in seen.sets.values():
        assert len(values) == MAX_FIELDS
        assert max(map(len, values)) == MAX_NAME
    # Sets that differ beyond what is remembered are distinct all the same.
    watch.note("m", (*fields[:-1], (fields[-1][0], b"another")))
    assert "more than 20 distinct sets" in caplog.text
