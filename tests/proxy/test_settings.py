"""What a configuration means: defaults, the catalogue below it, and rules across keys."""

from dataclasses import fields
from pathlib import Path

import pytest
from embedding_proxy.providers.model_catalog import CATALOGUE
from embedding_proxy.proxy.config.models import RouteConfig
from embedding_proxy.proxy.config.schema import DEFAULT_PROVIDERS, Cache, ProviderConfig, Settings
from pydantic import ValidationError

ROUTES = [{"provider": "openai", "model": "m"}]
SMALL = "text-embedding-3-small"


def _settings(**sections) -> Settings:
    return Settings.model_validate(sections)


def test_without_a_word_the_default_providers_and_all_known_models_are_there():
    """The defaults hold OpenAI, OpenRouter and the local model, and the catalogue unchanged."""
    settings = _settings()
    assert {name: entry.kind for name, entry in settings.providers.items()} == {
        kind: kind for kind in DEFAULT_PROVIDERS
    }
    assert settings.models.keys() == CATALOGUE.keys()
    for name, entry in CATALOGUE.items():
        model = settings.models[name]
        for key in type(model).model_fields.keys() & {f.name for f in fields(entry)} - {"routes"}:
            assert getattr(model, key) == getattr(entry, key)
        assert [(route.provider, route.model) for route in model.routes] == list(entry.routes)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"openai": {}}, {"openai", "local"}),
        ({"mine": {"kind": "openai", "api_key_env": "MINE"}}, {"mine", "local"}),
        ({"openai": {}, "local": None}, {"openai"}),
        ({"openai": None, "openrouter": None}, {"local"}),
        ({}, {"local"}),
    ],
)
def test_a_list_of_providers_replaces_the_default_but_for_the_local_model(given, names):
    """Providers that are given are all there are; the local one stays unless it is made null."""
    providers = _settings(providers=given).providers
    assert {name for name, entry in providers.items() if entry is not None} == names


def test_a_provider_named_like_its_kind_may_say_another():
    """The name gives the kind only where the entry does not."""
    other = {"kind": "openrouter", "api_key_env": "OTHER"}
    providers = _settings(providers={"openai": other, "local": {}}).providers
    assert providers == {"openai": ProviderConfig(**other), "local": ProviderConfig(kind="local")}


@pytest.mark.parametrize(
    ("key", "value"),
    [("price", 9.5), ("tokenizer", None), ("routes", ROUTES), ("reject_dimensions", True)],
)
def test_one_key_of_a_known_model_may_be_replaced(key, value):
    """An entry under a known name changes the keys it gives, and the rest stays."""
    before = _settings().models[SMALL]
    after = _settings(models={SMALL: {key: value}}).models[SMALL]
    wanted = tuple(RouteConfig(**route) for route in ROUTES) if key == "routes" else value
    assert after == before.model_copy(update={key: wanted})


def test_a_model_may_be_added():
    """A model that no catalogue knows needs a space, a width and a route; the known ones stay."""
    models = _settings(models={"m": {"space": "s", "dimensions": 3, "routes": ROUTES}}).models
    added = models.pop("m")
    assert (added.matryoshka, added.reject_dimensions, added.tokenizer) == (False, False, None)
    assert models == _settings().models


def test_a_model_may_share_a_space_that_it_describes_alike():
    """A second name for a space is fine as long as both say the same of its vectors."""
    same = {"space": f"openai/{SMALL}", "dimensions": 1536, "matryoshka": True, "routes": ROUTES}
    assert _settings(models={"mine": same}).models["mine"].space == f"openai/{SMALL}"


def test_a_model_of_the_catalogue_may_lead_to_a_provider_that_is_not_configured():
    """Leaving a kind out is no mistake, though the catalogue's routes still name it."""
    settings = _settings(providers={"openai": {}})
    assert settings.models["baai/bge-m3"].routes[0].provider == "openrouter"


@pytest.mark.parametrize(
    ("sections", "kind"),
    [
        ({}, "openai"),
        ({"passthrough": "openrouter"}, "openrouter"),
        ({"passthrough": None}, None),
        ({"providers": {"openrouter": {}}}, None),
        ({"providers": {"openai": None}}, None),
        ({"passthrough": "mine", "providers": {"mine": {"kind": "ollama"}}}, "ollama"),
    ],
)
def test_other_calls_go_to_openai_unless_told_otherwise(sections, kind):
    """The default holds only where openai is configured; null is nobody, not the default."""
    entry = _settings(**sections).passthrough_provider
    assert (entry and entry.kind) == kind


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_a_loopback_host_needs_no_keys(host):
    """A host that only this machine reaches may be open."""
    assert _settings(server={"host": host}).server.keys == ()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "h.example", "127.0.0.1.example"])
def test_another_host_needs_keys(host):
    """A host that others reach is refused without keys, and fine with one."""
    with pytest.raises(ValidationError, match=r"set server\.keys"):
        _settings(server={"host": host})
    assert _settings(server={"host": host, "keys": ["k"]}).server.host == host


@pytest.mark.parametrize(
    ("home", "base"), [("/d/x", "/d/x"), ("", "/h/.local/share"), ("d/x", "/h/.local/share")]
)
def test_the_directory_follows_xdg(home, base, monkeypatch):
    """XDG_DATA_HOME says where data lie; an empty or relative one is ignored, as XDG wants it."""
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("XDG_DATA_HOME", home)
    assert Cache().directory == Path(base) / "embedding-proxy"


def test_a_tilde_in_the_directory_is_the_home(monkeypatch):
    """A directory under ~ is one under the home of whoever runs the proxy."""
    monkeypatch.setenv("HOME", "/h")
    assert _settings(cache={"directory": "~/c"}).cache.directory == Path("/h/c")


@pytest.mark.parametrize(
    "url", ["http://h", "https://h/", "https://h:1/v1", "http://[::1]:8/v1", "https://h/a/b"]
)
def test_addresses_of_upstreams(url):
    """Any HTTP address with a host, and a path or none, is an upstream's."""
    assert ProviderConfig(kind="openai", base_url=url).base_url == url


@pytest.mark.parametrize(
    "url", ["", "h/v1", "ftp://h", "http://", "http:///v1", "https://h/v 1", "https://h/v1\n"]
)
def test_what_is_no_address(url):
    """An address without scheme or host, or with white space in it, is refused."""
    with pytest.raises(ValidationError, match="expected an address"):
        ProviderConfig(kind="openai", base_url=url)


def test_keys_are_not_in_what_is_printed():
    """Printing settings, say into a log, does not print the clients' keys."""
    settings = _settings(server={"keys": ["sk-canary"]})
    assert "sk-canary" not in f"{settings!r} {settings.server}"


def test_settings_do_not_change():
    """Settings are fixed once they are read, and whatever is not a section stays refused."""
    with pytest.raises(ValidationError, match="frozen"):
        _settings().server.port = 1
    with pytest.raises(ValidationError, match="valid dictionary"):
        Settings.model_validate(["server"])


@pytest.mark.parametrize("namespace", ["embedding-proxy/other", "embedding-proxy/canary"])
def test_no_key_is_given_a_namespace_of_the_proxys_own(namespace):
    """A client would see what is not its own, and any purge would take what it has."""
    keys = [{"key": "k", "namespace": namespace}]
    with pytest.raises(ValidationError, match="are the proxy's own; choose another name"):
        _settings(server={"keys": keys})
    for other in ("other", "embedding-proxy", "embedding-proxy2"):
        _settings(server={"keys": [{"key": "k", "namespace": other}]})
