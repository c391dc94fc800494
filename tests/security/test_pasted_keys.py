"""A key that is pasted where a name belongs is not repeated in the error."""

import pytest
import yaml
from embedding_proxy.providers.model_catalog import CATALOGUE
from embedding_proxy.providers.registry import KINDS
from embedding_proxy.proxy.config.errors import hide_keys, looks_like_key
from embedding_proxy.proxy.config.loader import ConfigError, load
from embedding_proxy.proxy.config.validation import known_keys
from hypothesis import given
from hypothesis import strategies as st

KEYS = {
    "OpenAI": "sk-proj-a1B2c3D4e5F6_g7H8-i9",
    "Anthropic": "sk-ant-api03-abcDEF-123",
    "OpenRouter": "sk-or-v1-0123456789abcdef0123456789abcdef",
    "Azure": "3f9a0c51b7e24d68a1f03f9a0c51b7e2",
    "Google": "AIzaSyD-abcdefGHIJKLmnopqrs",
    "Mistral": "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1dE",
    "Hugging Face": "hf_abcdefGHIJKLmnop",
    "Jina": "jina_0123456789abcdefABCDEF",
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJl",
    "base64": "k3Jx9+QbW1zP0/aLr8Tn5VcY2hMd7EuS6gFoRi4=",
    "UUID": "0a1b2c3d-4e5f-6789-abcd-ef0123456789",
}
PLACES = {
    "a provider": "providers: {KEY: {base_url: 'http://h/v1', api_key_env: K, nothing: 1}}",
    "a provider alone": "providers: {KEY: 5}",
    "a provider's kind": "providers: {p: {kind: KEY}}",
    "a provider's setting": "providers: {openai: {KEY: 1}}",
    "an option": "providers: {azure: {base_url: 'http://h/v1', options: {KEY: 1}}}",
    "a header": 'providers: {openai: {headers: {KEY: "a\\nb"}}}',
    "a header alone": "providers: {openai: {headers: {KEY: 1}}}",
    "a variable": "providers: {openai: {api_key_env: KEY}}",
    "a model": "models: {KEY: {dimensions: 0}}",
    "a route's provider": ("models: {m: {dimensions: 2, routes: [{provider: KEY, model: m}]}}"),
    "a fallback": "models: {text-embedding-3-small: {fallback: [KEY]}}",
    "a section": "KEY: {}",
    "a setting": "server: {KEY: 1}",
    "a setting without a value": "server:\n  KEY\n",
    "a reference": "server: {host: '${KEY}'}",
    "passthrough": "passthrough: KEY",
    "an anchor": "server: *KEY",
    "a tag": "server: !KEY {}",
    "a key twice": "server: {KEY: 1, KEY: 2}",
    "a date": "server: {host: 2020-99-99KEY, KEY: 2020-99-99}",
    "a model that is pinned": "cache: {pinned_namespaces: [KEY], KEY: 1}",
    "a namespace": "server: {keys: [{key: k, namespace: [KEY]}]}",
    "a collection": "index: {qdrant: {url: 'http://h', KEY: 1}}",
}


@pytest.mark.parametrize("vendor", KEYS)
@pytest.mark.parametrize("place", PLACES)
def test_no_error_repeats_a_pasted_name(place, vendor, tmp_path):
    """As the name of a provider, a model, a setting, a header, a variable, an anchor or a tag."""
    key = KEYS[vendor]
    file = tmp_path / "config.yaml"
    file.write_text(PLACES[place].replace("KEY", key))
    try:
        load(file)
    except ConfigError as error:
        message = str(error)
        assert message.startswith(f"{file}:")
        for part in key.replace("/", ".").replace("+", ".").split("."):
            assert part.strip("=") not in message


@pytest.mark.parametrize("name", [*CATALOGUE, *KINDS, *known_keys([])])
def test_names_of_models_kinds_and_sections_are_shown(name):
    """What is hidden is a key; what people name things is not."""
    assert not looks_like_key(name)
    assert hide_keys(f"models.{name}.routes: is missing") == f"models.{name}.routes: is missing"


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("https://sk-proj-abcdef123@h/v1", "https://***@h/v1"),
        ("https://me:geheim@h:8080/v1", "https://***@h:8080/v1"),
        ("https://h/v1?key=3f9a0c51b7e24d68a1f0", "https://h/v1?***"),
        ("https://h/v1#sk-proj-abcdef123", "https://h/v1#***"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
    ],
)
def test_a_key_in_an_address_is_hidden(address, told):
    """Its user, its query and its fragment are no address."""
    assert hide_keys(f"server: {address} is wrong") == f"server: {told} is wrong"


@given(st.text(max_size=60))
def test_no_message_is_lengthened_by_much_or_fails(text):
    """Whatever is written, the rest of a message stays."""
    assert hide_keys(f"server: {text} x").startswith("server: ")


def test_a_misspelt_name_is_still_shown(tmp_path):
    """The error names what can be no key, with its remedy."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"server": {"prot": 1}}))
    with pytest.raises(ConfigError, match=r"server\.prot: unknown key; did you mean port\?"):
        load(file)
