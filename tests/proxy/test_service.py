"""EmbeddingService: what a configuration names, opened, and embedding without HTTP."""

import asyncio
import json
from array import array
from collections import deque
from contextlib import asynccontextmanager

import numpy as np
import pytest
from conftest import no_wait
from embedding_proxy.cache.disk.store import StoreError
from embedding_proxy.providers.base import Outcome
from embedding_proxy.providers.errors import InvalidRequest, NoRoute
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from embedding_proxy.proxy.service.model_registry import ModelUnknown
from fault_server import FaultServer, vector_of

SMALL = "text-embedding-3-small"
ADA = "text-embedding-ada-002"


@pytest.fixture
def opened(tmp_path, upstream, monkeypatch):
    """Give a function that opens a service in front of the upstream; the cache is kept."""
    monkeypatch.setenv("OPENAI_API_KEY", "openai-key")

    def settings(**sections) -> Settings:
        base = {"cache": {"directory": str(tmp_path)}, "providers": {"openai": _at(upstream)}}
        return Settings.model_validate(base | sections)

    @asynccontextmanager
    async def open_service(**sections):
        async with EmbeddingService(settings(**sections), sleep=no_wait) as service:
            yield service

    return open_service


def _at(server: FaultServer, **keys) -> dict[str, object]:
    return {"kind": "openai", "base_url": server.url, **keys}


async def test_a_configuration_file_is_all_it_takes(tmp_path, upstream, monkeypatch):
    """From a file to float32 vectors, in the order of the inputs, with usage and outcomes."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    file = tmp_path / "config.yaml"
    file.write_text(
        json.dumps({"cache": {"directory": str(tmp_path)}, "providers": {"openai": _at(upstream)}})
    )
    async with EmbeddingService.from_config(str(file)) as service:
        result = await service.embed(["one two", "three", "one two"], model=SMALL)
        again = await service.embed(["four", "three"], model=SMALL)
    right = np.stack([vector_of(SMALL, text) for text in ("one two", "three", "one two")])
    assert result.vectors.dtype == np.float32
    assert np.array_equal(result.vectors, right)
    assert result.outcomes == [Outcome.MISS, Outcome.MISS, Outcome.DUPLICATE]
    assert (result.tokens, result.tokens_billed) == (5, 3)
    assert (result.model.name, result.space.name) == (SMALL, f"openai/{SMALL}")
    assert again.outcomes == [Outcome.MISS, Outcome.HIT]
    assert np.array_equal(again.vectors[1], right[1])


def test_without_a_file_the_built_in_configuration_is_opened():
    """No path means the built-in configuration."""
    settings = EmbeddingService.from_config().settings
    assert settings.server.port == 8080
    assert settings.providers.keys() == {"openai", "openrouter", "local"}


async def test_a_service_that_is_not_open_knows_nothing():
    """Before it is opened a service has no models and has counted nothing."""
    service = EmbeddingService(Settings())
    assert service.counters.misses == 0
    assert not service.models
    with pytest.raises(RuntimeError, match="not open"):
        await service.embed(["a"], model=SMALL)


async def test_counters_say_what_the_tiers_saw(opened):
    """The service counts hits by tier, and misses, of distinct inputs."""
    async with opened() as service:
        await service.embed(["a", "b", "a"], model=SMALL)
        await service.embed(["a"], model=SMALL)
    async with opened() as service:
        await service.embed(["b", "c"], model=SMALL)
        counters = service.counters
    assert (counters.disk_hits, counters.misses, counters.mismatches) == (1, 1, 0)


@pytest.mark.parametrize("name", ["nope", "TEXT-EMBEDDING-3-SMALL", "x" * 300])
async def test_an_unknown_model_is_refused_by_name(name, opened, upstream):
    """A model that is not there is a 404 that names it, cut to a bearable length."""
    async with opened(server={"unknown_models": "reject"}) as service:
        with pytest.raises(ModelUnknown) as caught:
            await service.embed(["a"], model=name)
    error = caught.value
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")
    assert f"`{name[:200]}`" in str(error)
    assert not upstream.calls


@pytest.mark.parametrize(
    ("model", "dimensions"),
    [(SMALL, None), (SMALL, 1), (SMALL, 256), (SMALL, 1535), (SMALL, 1536), (ADA, None)],
)
async def test_widths_a_model_can_give(model, dimensions, opened):
    """A Matryoshka model gives any width up to its own: cut and of length 1."""
    async with opened() as service:
        result = await service.embed(["a"], model=model, dimensions=dimensions)
    head = vector_of(model, "a")[:dimensions].astype(np.float64)
    assert result.vectors.shape == (1, dimensions or 1536)
    assert np.abs(result.vectors[0] - head / np.linalg.norm(head)).max() < 1e-7


@pytest.mark.parametrize(
    ("model", "dimensions", "message"),
    [
        (SMALL, 1537, "'dimensions' = 1537"),
        (ADA, 256, "This model does not support specifying dimensions."),
        (ADA, 1536, "This model does not support specifying dimensions."),
        ("fixed", 7, "This model does not support specifying dimensions."),
    ],
)
async def test_widths_a_model_cannot_give(model, dimensions, message, opened, upstream):
    """An impossible width is refused before anyone is asked."""
    fixed = {"space": "x", "dimensions": 8, "routes": [{"provider": "openai", "model": "x"}]}
    async with opened(models={"fixed": fixed}) as service:
        with pytest.raises(InvalidRequest, match=message) as caught:
            await service.embed(["a"], model=model, dimensions=dimensions)
    assert (caught.value.status, caught.value.param) == (400, "dimensions")
    assert not upstream.calls


async def test_the_native_width_of_a_fixed_model_may_be_said(opened, upstream):
    """Asking a model that cannot be cut for its own width is no mistake."""
    upstream.widths["x"] = 8
    fixed = {"space": "x", "dimensions": 8, "routes": [{"provider": "openai", "model": "x"}]}
    async with opened(models={"fixed": fixed}) as service:
        result = await service.embed(["a"], model="fixed", dimensions=8)
    assert np.array_equal(result.vectors, [vector_of("x", "a", 8)])


async def test_parameters_make_a_space_of_their_own(opened, upstream):
    """Further fields are sent on and kept apart; their order and the user do not count."""
    async with opened() as service:
        asked = [
            await service.embed(["a"], model=SMALL, parameters=parameters, user=user)
            for parameters, user in [
                (None, "u"),
                ({"task": "q", "n": 1}, None),
                ({"task": "d", "n": 1}, None),
                ({"n": 1, "task": "q"}, "v"),
                ({}, None),
            ]
        ]
    outcomes = [result.outcomes[0] for result in asked]
    assert outcomes == [Outcome.MISS, Outcome.MISS, Outcome.MISS, Outcome.HIT, Outcome.HIT]
    assert asked[1].space.label == f"openai/{SMALL}?n=~f6fc42039fba3776&task=~12549ea7d2d841ef"
    sent = [{k: call.payload.get(k) for k in ("user", "task", "n")} for call in upstream.calls]
    assert sent == [
        {"user": "u", "task": None, "n": None},
        {"user": None, "task": "q", "n": 1},
        {"user": None, "task": "d", "n": 1},
    ]


async def test_both_names_of_a_model_share_what_was_bought(opened):
    """A model under OpenAI's name and under OpenRouter's is one space."""
    async with opened() as service:
        await service.embed(["a"], model=SMALL)
        result = await service.embed(["a"], model=f"openai/{SMALL}")
    assert result.outcomes == [Outcome.HIT]
    assert result.model.name == f"openai/{SMALL}"


@pytest.mark.parametrize("repeats", [1, 8100])
async def test_token_arrays_become_the_text_they_stand_for(repeats, opened, upstream):
    """Few or many ids, an array that stands for a text is that text, and hits its entry."""
    hello_world = (15339,) + (1917,) * repeats
    text = "hello" + " world" * repeats
    async with opened() as service:
        result = await service.embed([hello_world, (100257,) * 100], model=SMALL)
        again = await service.embed([text], model=SMALL)
    assert upstream.inputs == [text, [100257] * 100]
    assert result.outcomes == [Outcome.MISS] * 2
    assert again.outcomes == [Outcome.HIT]


class _Text(str):
    """A text of another class, which shows itself as another one."""

    __slots__ = ()

    def __str__(self) -> str:
        return "shown"


@pytest.mark.parametrize(
    "make",
    [
        lambda: "a",
        lambda: ["a"],
        lambda: ("a",),
        lambda: [(64,)],
        lambda: [[64]],
        lambda: np.str_("a"),
        lambda: [np.str_("a")],
        lambda: _Text("a"),
        lambda: np.array(["a"]),
        lambda: np.array(["a"], dtype=object),
        lambda: deque(["a"]),
        lambda: (text for text in "a"),
        lambda: map(str.lower, ["A"]),
        lambda: np.array("a"),
        lambda: np.array([[64]], dtype=np.uint32),
        lambda: np.array([64]),
        lambda: [np.array([64])],
        lambda: [(np.int64(64),)],
        lambda: range(64, 65),
        lambda: iter([iter([64])]),
    ],
)
async def test_inputs_come_in_any_sequence(make, opened, upstream):
    """Texts and token arrays in whatever holds them in order: the same entry each time."""
    async with opened() as service:
        result = await service.embed(make(), model=SMALL)
    assert np.array_equal(result.vectors, [vector_of(SMALL, "a")])
    assert upstream.inputs == ["a"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"inputs": []}, "must not be an empty array"),
        ({"inputs": ""}, "must not be an empty string"),
        ({"inputs": ["a", (1,)]}, r"'\$.input\[1\]' is invalid"),
        ({"inputs": [(1.5,)]}, "must be an integer token"),
        ({"inputs": ["a", "\ud800"]}, "half of a surrogate pair"),
        ({"inputs": "a", "parameters": {"task": object()}}, "cannot be sent on"),
        ({"inputs": b"a"}, "decode it to a string"),
        ({"inputs": bytearray(b"a")}, "decode it to a string"),
        ({"inputs": [b"a"]}, r"input\[0\]' is invalid: it is binary data; decode it"),
        ({"inputs": ["a", bytearray(b"a")]}, r"input\[1\]' is invalid: it is binary data"),
        ({"inputs": (text for text in [b"a"])}, "decode it to a string"),
        ({"inputs": [memoryview(b"a")]}, "decode it to a string"),
        ({"inputs": array("B", b"a")}, "decode it to a string"),
        ({"inputs": np.array([b"a"])}, "decode it to a string"),
        ({"inputs": {"a": 1}}, "is a dict; give a list"),
        ({"inputs": [{"a": 1}]}, r"input\[0\]' is invalid: it is a dict"),
        ({"inputs": [{64: 1}]}, r"input\[0\]' is invalid: it is a dict"),
        ({"inputs": {"a"}}, "is a set; give a list"),
        ({"inputs": [{64, 65}]}, r"input\[0\]' is invalid: it is a set"),
        ({"inputs": {"a": 1}.keys()}, "is a dict_keys; give a list"),
        ({"inputs": ["a", None]}, r"input\[1\]' is invalid: it must be a string"),
        ({"inputs": None}, "must be a string, an array of strings"),
        ({"inputs": 5}, "must be a string, an array of strings"),
        ({"inputs": object()}, "must be a string, an array of strings"),
        ({"inputs": [True]}, "must be a string or an integer token"),
        ({"inputs": [[64, True]]}, "must be an integer token"),
        ({"inputs": np.array([True])}, "must be a string or an integer token"),
        ({"inputs": np.array([0.5])}, "must be a string or an integer token"),
        ({"inputs": np.array([["a"]])}, "must be an integer token"),
        ({"inputs": [["a"]]}, "must be an integer token"),
        ({"inputs": [[[64]]]}, "must be an integer token"),
        ({"inputs": (text for text in ())}, "must not be an empty array"),
        *[
            ({"inputs": "a", "dimensions": wrong}, "must be an integer of at least 1")
            for wrong in (True, np.True_, "5", 0, -1, 2.5, np.float32(2), [5])
        ],
        ({"inputs": "a", "user": 5}, "'user' must be a string"),
        ({"inputs": "a", "namespace": None}, "'namespace' must be a string"),
        ({"inputs": "a", "client": b"me"}, "'client' must be a string"),
        ({"inputs": "a", "api_key": None}, "'api_key' must be a string"),
        ({"inputs": "a", "cache_control": ["no-store"]}, "'cache_control' must be a string"),
        ({"inputs": "a", "parameters": [("task", "x")]}, "'parameters' must be a mapping"),
        ({"inputs": "a", "parameters": {5: "x"}}, "'parameters' must be a mapping"),
        ({"inputs": "a", "model": b"m"}, "'model' must be a non-empty string"),
        ({"inputs": "a", "model": ""}, "'model' must be a non-empty string"),
        ({"inputs": "a", "model": None}, "'model' must be a non-empty string"),
    ],
)
async def test_python_gets_the_same_refusals_as_http(asked, message, opened, upstream):
    """What could not come over HTTP is refused just so when it comes from Python."""
    async with opened() as service:
        with pytest.raises(InvalidRequest, match=message):
            await service.embed(**{"model": SMALL, **asked})
    assert not upstream.calls


async def test_numbers_and_names_of_numpy_are_taken(opened, upstream):
    """A width and a model's name that come out of an array are what they show."""
    async with opened() as service:
        result = await service.embed("a", np.str_(SMALL), dimensions=np.int64(64))
    assert result.vectors.shape == (1, 64)
    assert type(result.model.name) is str
    assert upstream.inputs == ["a"]


async def test_a_list_that_is_changed_meanwhile_changes_no_request(opened, upstream):
    """What is embedded is what the list held when `embed` began."""
    texts = ["a", "b"]
    async with opened() as service:
        asked = asyncio.create_task(service.embed(texts, SMALL))
        await asyncio.sleep(0)
        texts[:] = ["changed", "changed"]
        result = await asked
        assert (await service.embed(["b", "a"], SMALL)).outcomes == [Outcome.HIT] * 2
    assert np.array_equal(result.vectors, [vector_of(SMALL, "a"), vector_of(SMALL, "b")])


@pytest.mark.parametrize(
    "ask",
    [
        lambda service: service.similarity("a", b"b", SMALL),
        lambda service: service.similarity("a", "b", SMALL, dimensions=True),
        lambda service: service.nearest("a", "letters", 2, SMALL),
        lambda service: service.nearest("a", {"b": 1}, 2, SMALL),
        lambda service: service.nearest("a", ["b", 5], 2, SMALL),
        lambda service: service.nearest(["a"], ["b"], 2, SMALL),
        lambda service: service.nearest("a", ["b"], 2.5, SMALL),
        lambda service: service.nearest("a", ["b"], k=True, model=SMALL),
        lambda service: service.preview("letters", SMALL),
        lambda service: service.preview([b"b"], SMALL),
    ],
)
async def test_a_question_that_is_not_well_formed_buys_nothing(ask, opened, upstream):
    """Similarities, searches and previews refuse what `embed` does, before they embed."""
    async with opened() as service:
        with pytest.raises(InvalidRequest, match=r"must be|binary data|is a dict"):
            await ask(service)
    assert not upstream.calls


async def test_what_is_near_is_found_among_the_texts_of_an_iterator(opened):
    """The texts are returned, though they can be read once only."""
    async with opened() as service:
        (found,) = await service.nearest("a", iter(["a"]), 2, SMALL)
    assert (found.place, found.text) == (0, "a")


async def test_python_is_held_to_openais_sizes_where_http_is(opened, upstream):
    """2,049 inputs are embedded, or refused where `allow_oversize` is off."""
    async with opened(server={"allow_oversize": False}) as service:
        with pytest.raises(InvalidRequest, match="a maximum of 2048"):
            await service.embed(["a"] * 2049, model=SMALL)
    assert not upstream.calls
    async with opened() as service:
        assert len((await service.embed(["a"] * 2049, model=SMALL)).outcomes) == 2049


@pytest.mark.parametrize(
    "sections",
    [
        {"models": {SMALL: {"truncate": "end", "max_input_tokens": 5}}},
        {"server": {"allow_oversize": False}},
    ],
)
async def test_no_unicode_is_refused_where_tokens_are_counted_first(sections, opened, upstream):
    """Half a surrogate pair is the same refusal when inputs are cut or counted before the cache."""
    async with opened(**sections) as service:
        with pytest.raises(InvalidRequest, match="half of a surrogate pair"):
            await service.embed(["a", "\ud800" * 400_000], model=SMALL)
    assert not upstream.calls


async def test_what_was_bought_is_served_without_a_provider(opened):
    """A vector in the cache outlives the key that bought it."""
    async with opened() as service:
        bought = await service.embed(["a"], model=SMALL)
    async with opened(providers={"openai": None}) as service:
        kept = await service.embed(["a"], model=SMALL)
    assert kept.outcomes == [Outcome.HIT]
    assert np.array_equal(kept.vectors, bought.vectors)


async def test_a_directory_that_cannot_be_used_is_a_store_error(opened, tmp_path):
    """Where a file is in the way the service does not open, and says where."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        async with opened(cache={"directory": str(tmp_path / "file")}):
            pass


async def test_a_flat_token_array_is_one_input(opened):
    """Python takes all four forms that HTTP takes."""
    async with opened() as service:
        assert len((await service.embed([64, 65], SMALL)).vectors) == 1


async def test_what_json_cannot_hold_is_refused(opened):
    """Half a surrogate pair as the user is an EmbeddingError like all others."""
    async with opened() as service:
        with pytest.raises(InvalidRequest):
            await service.embed("a", SMALL, user="\ud800")


async def test_a_variable_is_named_once(opened, monkeypatch):
    """Two routes over one provider need one key."""
    monkeypatch.delenv("OPENAI_API_KEY")
    routes = [{"provider": "openai", "model": name} for name in "ab"]
    async with opened(models={SMALL: {"routes": routes}}) as service:
        with pytest.raises(NoRoute) as caught:
            await service.embed("a", SMALL)
    assert str(caught.value).count("OPENAI_API_KEY") == 1
