"""`config show` and `config convert`: what applies, and what an older configuration comes to."""

import json
from pathlib import Path

import pytest
import yaml
from command import Done
from embedding_proxy.proxy.config.legacy import convert
from embedding_proxy.proxy.config.loader import ConfigError, load

ROOT = Path(__file__).parents[2]
SECRET = "sk-proj-abcdefgh12345678"

NESTED = """
llm:
  embedding:
    provider: "openai"
    model: "text-embedding-3-large"
    api_key_env: "OPENAI_API_KEY"
    base_url: null
    dimensions: null
    max_retries: 3
    timeout: 30
    fallback_providers: []
vector_store:
  qdrant_url: "http://localhost:6333"
  collection_prefix: "hephaestus"
  embedding_dimension: null
  allow_dynamic_dimensions: true
"""

PRODUCTION = """
llm:
  embedding:
    provider: "openrouter"
    model: "openai/text-embedding-3-large"
    api_key_env: "MY_ROUTER_KEY"
    base_url: "https://openrouter.ai/api/v1"
    max_retries: 5
    timeout: 60
    fallback_providers:
      - {provider: "openai", model: "text-embedding-3-large"}
      - {provider: "openrouter", model: "mistralai/mistral-embed-2312"}
      - {provider: "openai", model: "text-embedding-3-small"}
"""

FLAT = """
llm:
  provider: openai
  model: gpt-4o
  embedding_model: text-embedding-ada-002
  embedding_dimension: 1536
  api_key_env: EMBEDDING_KEY
  temperature: 0.2
"""


@pytest.fixture
def run(command):
    """Give a function that runs `config …`."""

    def run_command(*arguments) -> Done:
        done = command("config", *arguments)
        assert SECRET not in done.out + done.err
        return done

    return run_command


@pytest.fixture
def write(tmp_path):
    """Give a function that writes a file and returns its path."""

    def put(content, name="config.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return put


# config show


def _comparable(settings):
    """Return what a configuration comes to: of providers, what they are asked with."""
    profiles = {
        name: one and (one.as_profile() if one.kind != "local" else one, one.retries)
        for name, one in settings.providers.items()
    }
    rest = {name: getattr(settings, name) for name in type(settings).model_fields}
    return {**rest, "providers": profiles}


RICH = {
    "server": {
        "host": "0.0.0.0",
        "batch_window_ms": 2.5,
        "keys": ["${TEAM_KEY}", {"key": SECRET, "namespace": "n", "name": "nightly"}],
    },
    "cache": {
        "directory": "/tmp/a cache",
        "mode": "off",
        "ttl_days": 1,
        "pinned_namespaces": ["", "n"],
    },
    "providers": {
        "mistral": {},
        "eu": {"kind": "mistral", "api_key_env": "EU_KEY", "limits": {"inputs": 7}, "retries": 0},
        "openai": {"timeout_s": 5.5, "headers": {"X-Team": SECRET, "X-Other": "${OTHER}"}},
        "voyage": {"encoding_format": None, "extra_fields": ["input_type"]},
        "openrouter": {
            "options": {"provider": {"order": ["openai"]}},
            "headers": {"x-title": "me"},
        },
        "vllm": {"first_byte_timeout_s": 3},
        "local": None,
    },
    "models": {
        "text-embedding-3-small": {"truncate": "end", "fallback": ["mine"]},
        "mine": {"space": "mine", "dimensions": 1536, "routes": [{"provider": "eu", "model": "m"}]},
    },
}


@pytest.mark.parametrize("everything", [False, True])
def test_what_is_shown_loads_and_comes_to_the_same(everything, run, write, monkeypatch):
    """Every kind's own defaults among it, and hidden keys once their variables are set."""
    for name, value in {"TEAM_KEY": "team-key", "OTHER": "other"}.items():
        monkeypatch.setenv(name, value)
    file = write(RICH)
    done = run("show", "--config", file, *(["--all"] if everything else []))
    assert (done.code, done.err) == (0, "")
    again = write(done.out, "again.yaml")
    with pytest.raises(ConfigError, match="the variable CLIENT_KEY_2 is not set"):
        load(again, purpose="serve")
    variables = ("CLIENT_KEY_2", "HEADER_OPENAI_X_TEAM")
    for name in variables:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("HEADER_OPENROUTER_X_TITLE", "me")
    assert _comparable(load(again)) == _comparable(load(file))
    assert "team-key" not in done.out
    shown = yaml.safe_load(done.out)
    assert [entry["key"] for entry in shown["server"]["keys"]] == ["${TEAM_KEY}", "${CLIENT_KEY_2}"]
    assert shown["providers"]["openai"]["headers"]["X-Other"] == "${OTHER}"
    assert shown["providers"]["mistral"]["limits"]["tokens"] == 16_384
    assert (len(shown["models"]) > 30) is everything
    assert list(shown["models"])[-1:] == ["mine"]


def test_the_built_in_configuration_is_shown(run, write):
    """Without a file it is what applies; of a variable it is told whether it is set."""
    done = run("show")
    assert done.out.startswith("# What applies with the built-in configuration\n# and ")
    assert "# openai: OPENAI_API_KEY is not set: this provider is skipped\n" in done.out
    assert _comparable(load(write(done.out))) == _comparable(load())


def test_a_key_is_told_as_set_and_nothing_more(run, write, monkeypatch):
    """In words and in JSON; a variable of blanks is none."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("OPENROUTER_API_KEY", " ")
    file = write({"providers": {"openai": {}, "openrouter": {}}})
    assert "# openai: OPENAI_API_KEY is set\n# openrouter: OPENROUTER_API_KEY is not" in (
        run("show", "--config", file).out
    )
    found = json.loads(run("show", "--config", file, "--json").out)
    assert found["config"] == str(file)
    assert found["keys"] == {
        "openai": {"variable": "OPENAI_API_KEY", "set": True},
        "openrouter": {"variable": "OPENROUTER_API_KEY", "set": False},
    }
    assert found["settings"]["server"]["port"] == 8080
    assert found["settings"]["models"] == {}
    assert json.loads(run("show", "--json").out)["config"] is None


def test_a_reference_with_a_default_may_hide_a_key(run, write):
    """The default stands in the file, so it is as secret as a literal key."""
    keys = [f"${{NOT_THERE:-{SECRET}}}", f"x-${{NOT_THERE:-{SECRET}}}"]
    done = run("show", "--config", write({"server": {"keys": keys}}))
    shown = yaml.safe_load(done.out)
    assert [entry["key"] for entry in shown["server"]["keys"]] == [
        "${CLIENT_KEY_1}",
        "${CLIENT_KEY_2}",
    ]


def test_a_wrong_configuration_is_code_2(run, write):
    """As for every command."""
    done = run("show", "--config", write({"cache": {"directry": "x"}}))
    assert (done.code, done.out) == (2, "")
    assert "cache.directry: unknown key; did you mean directory?" in done.err


# config convert


def test_the_nested_form(run, write):
    """The owner's own example comes to what it meant, and each of its keys is accounted for."""
    done = run("convert", write(NESTED, "old.yaml"))
    assert done.code == 0
    assert yaml.safe_load(done.out) == {
        "providers": {"openai": {"api_key_env": "OPENAI_API_KEY", "timeout_s": 30, "retries": 3}},
        "models": {
            "text-embedding-3-large": {
                "routes": [{"provider": "openai", "model": "text-embedding-3-large"}]
            }
        },
        "index": {"qdrant": {"url": "http://localhost:6333", "prefix": "hephaestus_"}},
    }
    notes = dict(line.split(" -> ") for line in done.err.splitlines())
    old = yaml.safe_load(NESTED)
    paths = {f"llm.embedding.{key}" for key in old["llm"]["embedding"]}
    assert notes.keys() == paths | {f"vector_store.{key}" for key in old["vector_store"]}
    assert notes["llm.embedding.timeout"] == "providers.openai.timeout_s"
    assert notes["llm.embedding.dimensions"] == "left out: empty"
    assert notes["llm.embedding.max_retries"] == "providers.openai.retries"
    assert notes["vector_store.allow_dynamic_dimensions"].startswith("no counterpart: ")
    assert all(f"#   {line}\n" in done.out for line in done.err.splitlines())
    settings = load(write(done.out))
    assert settings.providers["openai"].timeout_s == 30
    assert [route.provider for route in settings.models["text-embedding-3-large"].routes] == [
        "openai"
    ]


def test_the_vector_store():
    """The section is written, and the variable of the key named."""
    old = yaml.safe_load(NESTED)
    old["vector_store"]["qdrant_api_key"] = "${QDRANT_KEY}"
    old["vector_store"]["type"] = "qdrant"
    done = convert(old, "old")
    assert done.qdrant == {
        "url": "http://localhost:6333",
        "prefix": "hephaestus_",
        "api_key_env": "QDRANT_KEY",
    }
    notes = dict(done.notes)
    assert notes["vector_store.qdrant_url"] == "index.qdrant.url"
    assert notes["vector_store.qdrant_api_key"] == "index.qdrant.api_key_env"
    assert notes["vector_store.type"] == "left out: Qdrant is the only store"


def test_a_prefix_without_an_address_is_a_configuration_all_the_same(run, write):
    """The old default is written down, with a warning."""
    old = yaml.safe_load(NESTED)
    del old["vector_store"]["qdrant_url"]
    done = run("convert", write(old, "old.yaml"))
    assert "warning: index.qdrant.url" in done.err
    assert load(write(done.out)).index.qdrant.url == "http://localhost:6333"


def test_what_is_said_of_the_store_alone_is_a_configuration(run, write):
    """It has no providers of its own, so the defaults apply."""
    old = {"vector_store": yaml.safe_load(NESTED)["vector_store"]}
    done = run("convert", write(old, "old.yaml"))
    assert load(write(done.out)).models == load().models


def test_fallbacks_become_routes_or_stand_ins(run, write):
    """The same model is another route; another one is a fallback of a named width, and told."""
    done = run("convert", write(PRODUCTION, "old.yaml"))
    assert done.code == 0
    found = yaml.safe_load(done.out)
    model = found["models"]["openai/text-embedding-3-large"]
    assert model["routes"] == [
        {"provider": "openrouter", "model": "openai/text-embedding-3-large"},
        {"provider": "openai", "model": "text-embedding-3-large"},
    ]
    assert model["fallback"] == [
        {"model": "mistralai/mistral-embed-2312", "dimension_policy": "pad"},
        {"model": "text-embedding-3-small", "dimension_policy": "pad"},
    ]
    assert found["providers"]["openrouter"]["api_key_env"] == "MY_ROUTER_KEY"
    assert found["providers"]["openai"] == {}
    warnings = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert "mistralai/mistral-embed-2312 is another space than openai/text-emb" in warnings[0]
    settings = load(write(done.out))
    assert settings.models["openai/text-embedding-3-large"].fallback[0].dimension_policy == "pad"


@pytest.mark.parametrize(
    ("first", "other", "width"),
    [
        ("text-embedding-3-small", "text-embedding-3-large", "strict"),
        ("text-embedding-3-small", "text-embedding-ada-002", "strict"),
        ("text-embedding-3-large", "text-embedding-ada-002", "pad"),
    ],
)
def test_a_stand_in_has_the_width_it_needs(first, other, width, run, write):
    """Cut where its model is made for it, as it is where widths are equal, else padded."""
    fallback = [{"provider": "openai", "model": other}]
    old = {"llm": {"embedding": {"provider": "openai", "model": first}}}
    old["llm"]["embedding"]["fallback_providers"] = fallback
    done = run("convert", write(old, "old.yaml"))
    assert load(write(done.out)).models[first].fallback[0].dimension_policy == width


def test_a_wider_model_that_cannot_be_cut_is_truncated_by_name(run, write):
    """It is written down that it is, for nobody would guess it."""
    embedding = {
        "provider": "openrouter",
        "model": "baai/bge-m3",
        "fallback_providers": [{"provider": "openai", "model": "text-embedding-ada-002"}],
    }
    done = run("convert", write({"llm": {"embedding": embedding}}, "old.yaml"))
    assert load(write(done.out)).models["baai/bge-m3"].fallback[0].dimension_policy == "truncate"


def test_the_flat_form(run, write):
    """The embedding's keys are told from those of a model that chats."""
    done = run("convert", write(FLAT, "old.yaml"))
    assert done.code == 0
    settings = load(write(done.out))
    assert settings.providers["openai"].api_key_env == "EMBEDDING_KEY"
    assert "text-embedding-ada-002" in yaml.safe_load(done.out)["models"]
    notes = dict(line.split(" -> ") for line in done.err.splitlines())
    assert notes == {
        "llm.provider": "providers.openai",
        "llm.embedding_model": "models.text-embedding-ada-002, asked for at openai",
        "llm.embedding_dimension": "left out: it is known of the model",
        "llm.api_key_env": "providers.openai.api_key_env",
        "llm.model": "left out: not of embeddings, or unknown",
        "llm.temperature": "left out: not of embeddings, or unknown",
    }


def test_the_keys_of_another_service_are_not_taken_for_embeddings(run, write):
    """Where a chat provider is named, only what begins with embedding_ counts."""
    llm = {"provider": "anthropic", "api_key_env": "CHAT_KEY", "base_url": "https://chat.example"}
    llm |= {"embedding_model": "m-1", "embedding_api_key_env": "OTHER_KEY"}
    done = run("convert", write({"llm": llm}, "old.yaml"))
    assert yaml.safe_load(done.out)["providers"] == {"openai": {"api_key_env": "OTHER_KEY"}}
    assert "warning: no provider is named: openai is taken" in done.err
    assert "llm.api_key_env -> left out: not of embeddings, or unknown\n" in done.err


@pytest.mark.parametrize(
    ("provider", "said", "retries", "note"),
    [
        ("openai", 0, 0, "providers.openai.retries"),
        ("openai", 2.0, 2, "providers.openai.retries"),
        ("openai", 1e9, 100, "providers.openai.retries"),
        ("local", 3, None, "left out: nobody is asked, so nobody is asked again"),
    ],
)
def test_old_retries_become_those_of_the_provider(  # noqa: PLR0917 - what is told, and what for
    provider, said, retries, note, run, write
):
    """Whatever number the old file says, ours says one that loads."""
    model = {"openai": "text-embedding-3-small", "local": "wordllama-embed"}[provider]
    old = {"llm": {"embedding": {"provider": provider, "model": model, "max_retries": said}}}
    done = run("convert", write(old, "old.yaml"))
    assert load(write(done.out)).providers[provider].retries == retries
    assert f"llm.embedding.max_retries -> {note}" in done.err.splitlines()


def test_a_provider_nobody_knows_needs_an_address(run, write):
    """With one it speaks as OpenAI does; without, the known ones are listed."""
    embedding = {"provider": "acme", "model": "m", "dimensions": 8, "api_key": "${ACME_KEY}"}
    old = write({"llm": {"embedding": embedding}}, "old.yaml")
    done = run("convert", old)
    assert (done.code, done.out) == (2, "")
    assert "llm.embedding.provider: there is no provider 'acme'; known: azure, " in done.err
    embedding["base_url"] = "https://acme.example/v1"
    done = run("convert", write({"llm": {"embedding": embedding}}, "old.yaml"))
    settings = load(write(done.out))
    assert settings.providers["acme"].kind == "openai_compatible"
    assert settings.providers["acme"].api_key_env == "ACME_KEY"
    assert (settings.models["m"].space, settings.models["m"].dimensions) == ("acme/m", 8)


def test_a_width_that_is_not_the_models_is_warned_of(run, write):
    """The original never sent it on, so what it did is not what it said."""
    for wanted, told in ((1024, "can be cut to it"), (4096, "has no other")):
        embedding = {"provider": "openai", "model": "text-embedding-3-large", "dimensions": wanted}
        old = {"llm": {"embedding": embedding}, "vector_store": {"embedding_dimension": wanted}}
        done = run("convert", write(old, "old.yaml"))
        assert f"is {wanted}, but text-embedding-3-large gives 3072 numbers" in done.err
        assert told in done.err
        assert f"embedding_dimension is {wanted}, but the model gives 3072 numbers" in done.err
        assert "dimensions" not in yaml.safe_load(done.out)["models"]["text-embedding-3-large"]


def test_a_stand_in_of_unknown_width_is_none(run, write):
    """It is a model all the same, and it is said why it does not stand in."""
    embedding = {"model": "text-embedding-3-small", "provider": "openai"}
    embedding["fallback_providers"] = [{"provider": "mistral", "model": "new-1"}]
    done = run("convert", write({"llm": {"embedding": embedding}}, "old.yaml"))
    settings = load(write(done.out))
    assert settings.models["text-embedding-3-small"].fallback == ()
    assert settings.models["new-1"].routes[0].provider == "mistral"
    assert "no fallback: the width of new-1 is not known" in done.err


def test_two_addresses_of_one_provider_are_told(run, write):
    """The first counts, the other is not lost in silence; another address is warned of."""
    embedding = {
        "provider": "openai",
        "model": "text-embedding-3-small",
        "base_url": "https://one.example/v1",
        "fallback_providers": [
            {"provider": "openai", "model": "m", "base_url": "https://two.example/v1"}
        ],
    }
    done = run("convert", write({"llm": {"embedding": embedding}}, "old.yaml"))
    assert load(write(done.out)).providers["openai"].base_url == "https://one.example/v1"
    assert "0.base_url -> left out: providers.openai has another base_url already" in done.err
    assert "warning: providers.openai asks https://one.example/v1: if that serves" in done.err


def test_unknown_keys_are_named(run, write):
    """Whatever is in the old file is accounted for."""
    old = {
        "llm": {"embedding": {"provider": "openai", "model": "m-1", "shape": 1}, "chat": {"a": 1}},
        "vector_store": {"color": "red"},
        "server": {"port": 1},
    }
    done = run("convert", write(old, "old.yaml"))
    assert "llm.embedding.shape -> left out: unknown key\n" in done.err
    assert "vector_store.color -> left out: unknown key\n" in done.err
    assert "llm.chat -> left out: not of embeddings, or older than llm.embedding\n" in done.err
    assert "server -> left out: no matter of this proxy\n" in done.err


@pytest.mark.parametrize(
    ("path", "old"),
    [
        ("llm.embedding.api_key", {"llm": {"embedding": {"model": "m", "api_key": "abc"}}}),
        ("llm.embedding.api_key_env", {"llm": {"embedding": {"api_key_env": SECRET}}}),
        ("llm.openai_api_key", {"llm": {"embedding_model": "m", "openai_api_key": SECRET}}),
        ("llm.embedding.model", {"llm": {"embedding": {"model": SECRET}}}),
        (
            "llm.embedding.fallback_providers.0.api_key",
            {"llm": {"embedding": {"fallback_providers": [{"api_key": SECRET}]}}},
        ),
        ("vector_store.qdrant_api_key", {"vector_store": {"qdrant_api_key": "abc"}}),
        ("vector_store.qdrant_url", {"vector_store": {"qdrant_url": f"http://u:{SECRET}@h"}}),
    ],
)
def test_a_key_that_lies_open_is_refused(path, old, run, write, tmp_path):
    """It is never copied nor shown; the message says where it is and what to do."""
    done = run("convert", write(old, "old.yaml"), "-o", tmp_path / "new.yaml")
    assert (done.code, done.out) == (2, "")
    assert f"old.yaml: {path}: holds a key; put that into a variable, write" in done.err
    assert not (tmp_path / "new.yaml").exists()


def test_all_keys_that_lie_open_are_told_at_once(run, write):
    """Each is a line of its own."""
    old = {"llm": {"embedding": {"api_key": SECRET}}, "vector_store": {"qdrant_api_key": SECRET}}
    done = run("convert", write(old, "old.yaml"))
    assert done.code == 2
    told = [line.partition("old.yaml: ")[2].partition(":")[0] for line in done.err.splitlines()]
    assert told == ["llm.embedding.api_key", "vector_store.qdrant_api_key"]


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ({}, "says nothing of embeddings"),
        ({"llm": {"model": "gpt"}}, "says nothing of embeddings"),
        ({"llm": []}, "llm: expected keys with values below it"),
        ({"llm": {"embedding": "m"}}, "llm.embedding: expected keys with values below it"),
        ({"llm": {"embedding": {"provider": "openai"}}}, "llm.embedding.model: is missing"),
        ({"llm": {"embedding": {"model": 7}}}, "llm.embedding.model: expected a string"),
        ({"llm": {"embedding": {"model": "m", "timeout": "x"}}}, "timeout: expected a number"),
        ({"llm": {"embedding": {"model": "m", "timeout": True}}}, "timeout: expected a number"),
        (
            {"llm": {"embedding": {"model": "m", "timeout": 0}}},
            "timeout_s: expected greater than 0",
        ),
        (
            {"llm": {"embedding": {"model": "m", "fallback_providers": "openai"}}},
            "fallback_providers: expected a list of `provider` and `model`",
        ),
        (
            {"llm": {"embedding": {"model": "m", "fallback_providers": [{"model": "x"}]}}},
            "fallback_providers.0: expected `provider` and `model`",
        ),
        (
            {
                "llm": {
                    "embedding": {
                        "model": "m",
                        "fallback_providers": [{"model": "", "provider": ""}],
                    }
                }
            },
            "fallback_providers: an entry is empty",
        ),
        ({"vector_store": {"embedding_dimension": "x"}}, "embedding_dimension: expected a number"),
        ("llm: [", "old.yaml:1: "),
    ],
)
def test_an_old_file_that_is_none_is_code_2(old, message, run, write):
    """One line that names the file and the key."""
    done = run("convert", write(old, "old.yaml"))
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "old.yaml" in done.err
    assert message in done.err


def test_a_file_is_written_and_never_overwritten(run, write, tmp_path):
    """-o writes what stdout would have got; a second time is code 1."""
    old, new = write(NESTED, "old.yaml"), tmp_path / "new.yaml"
    shown = run("convert", old).out
    done = run("convert", old, "-o", new)
    assert (done.code, done.out, new.read_text()) == (0, "", shown)
    done = run("convert", old, "-o", new)
    assert (done.code, done.out) == (1, "")
    assert done.err == f"embedding-proxy: {new} exists; it is not overwritten\n"


def test_the_guide_names_what_is_there():
    """Every key that is read of an old file stands in the guide."""
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    old = yaml.safe_load(NESTED)
    keys = {*old["llm"]["embedding"], *old["vector_store"]}
    assert not [key for key in sorted(keys) if f"`{key}`" not in page]
