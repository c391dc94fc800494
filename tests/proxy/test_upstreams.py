"""One provider in a configuration: what may be said of it, and what then applies."""

from dataclasses import replace

import pytest
from embedding_proxy.providers import registry
from embedding_proxy.providers.profile import Limits, Timeouts
from embedding_proxy.proxy.config.providers import ProviderConfig
from embedding_proxy.proxy.config.schema import Settings
from pydantic import ValidationError

ADDRESS = "https://h.example/v1"


@pytest.mark.parametrize("name", registry.KINDS)
def test_what_is_not_said_is_as_the_kind_declares(name):
    """A provider of which nothing but the kind is said has its kind's profile, every field."""
    declared = registry.KINDS[name].profile
    address = {} if declared.base_url else {"base_url": ADDRESS}
    wanted = replace(declared, base_url=declared.base_url or ADDRESS)
    assert ProviderConfig(kind=name, **address).as_profile() == wanted


@pytest.mark.parametrize(
    ("said", "field", "value"),
    [
        ({"base_url": ADDRESS}, "base_url", ADDRESS),
        ({"api_key_env": "MINE"}, "api_key_env", "MINE"),
        ({"encoding_format": "base64"}, "encoding_format", "base64"),
        ({"encoding_format": None}, "encoding_format", None),
        ({"accepts_tokens": True}, "accepts_tokens", True),
        ({"dimensions_field": "width"}, "dimensions_field", "width"),
        ({"dimensions_field": None}, "dimensions_field", None),
        ({"forward_user": True}, "forward_user", True),
        ({"unit_norm": False}, "unit_norm", False),
        ({"extra_fields": ["a", "b"]}, "extra_fields", frozenset({"a", "b"})),
        ({"extra_fields": []}, "extra_fields", frozenset()),
        ({"extra_fields": None}, "extra_fields", None),
        ({"headers": {"X-A": "b"}}, "headers", {"X-A": "b"}),
        ({"limits": {"inputs": 3}}, "limits", Limits(inputs=3, tokens=16_384)),
        ({"limits": {"tokens": None}}, "limits", Limits(inputs=256, tokens=None)),
        ({"limits": {"from_headers": False}}, "limits", Limits(256, 16_384, from_headers=False)),
        (
            {"limits": {"concurrency": 1, "requests_per_minute": 2, "tokens_per_minute": 3}},
            "limits",
            Limits(256, 16_384, 1, 2, 3),
        ),
        ({"timeout_s": 5}, "timeouts", Timeouts(total_s=5)),
        (
            {
                "connect_timeout_s": 1,
                "first_byte_timeout_s": 2,
                "min_bytes_per_s": 3,
                "min_rate_window_s": 4,
            },
            "timeouts",
            Timeouts(60, 1, 2, 3, 4),
        ),
    ],
)
def test_each_fact_can_be_overridden_alone(said, field, value):
    """One key changes one field, null included, and the rest stays as the kind declares it."""
    declared = registry.KINDS["mistral"].profile
    assert ProviderConfig(kind="mistral", **said).as_profile() == replace(
        declared, **{field: value}
    )


def test_a_header_takes_the_place_of_the_kinds_own_whatever_its_case():
    """An operator's X-Title is the only one."""
    provider = ProviderConfig(
        kind="openrouter", headers={"x-title": "mine", "HTTP-Referer": "https://h"}
    )
    assert provider.as_profile().headers == {"x-title": "mine", "HTTP-Referer": "https://h"}


def test_options_are_the_kinds():
    """An option of the kind is handed to its adapter; the others keep their defaults."""
    routing = {"order": ["openai"]}
    assert ProviderConfig(
        kind="openrouter", options={"provider": routing}
    ).as_profile().options == {"provider": routing}


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (
            {"kind": "openai", "options": {"provider": {}}},
            "options.provider: .* known to this kind: none",
        ),
        ({"kind": "openrouter", "options": {"x": 1}}, "known to this kind: provider"),
        ({"kind": "azure"}, "base_url: is missing"),
        ({"kind": "openai_compatible"}, "base_url: is missing"),
        ({"kind": "local", "base_url": ADDRESS}, "the local model has no base_url"),
        ({"kind": "local", "limits": {}}, "the local model has no limits"),
        ({"kind": "openai", "headers": {"Authorization": "x"}}, "Authorization is not to be set"),
        ({"kind": "openai", "headers": {"API-Key": "x"}}, "API-Key is not to be set here"),
        ({"kind": "openai", "headers": {"host": "x"}}, "host is not to be set here"),
        ({"kind": "openai", "headers": {"a b": "x"}}, "no name of a header"),
        ({"kind": "openai", "headers": {"A": "x\r\nB: y"}}, "A: its value holds a line break"),
        ({"kind": "openai", "headers": {"A": "é"}}, "A: its value holds"),
        ({"kind": "openai", "limits": {"inputs": 0}}, "greater than or equal to 1"),
        ({"kind": "openai", "limits": {"input": 1}}, "Extra inputs are not permitted"),
        ({"kind": "openai", "encoding_format": "int8"}, "'base64' or 'float'"),
        ({"kind": "openai", "dimensions_field": ""}, "at least 1 character"),
    ],
)
def test_what_does_not_fit_is_refused(said, problem):
    """A mistake is named before anything is asked."""
    with pytest.raises(ValidationError, match=problem):
        ProviderConfig(**said)


def test_headers_are_not_printed():
    """Values of headers may be secret enough not to be in a log."""
    assert "canary" not in repr(ProviderConfig(kind="openai", headers={"X-A": "canary"}))


@pytest.mark.parametrize(
    ("entry", "fine"),
    [
        ({"kind": "openai"}, False),
        ({"kind": "mistral"}, False),
        ({"kind": "mistral", "api_key_env": "MINE"}, True),
        ({"kind": "ollama"}, True),
        ({"kind": "openai_compatible", "base_url": ADDRESS}, True),
        ({"kind": "azure", "base_url": ADDRESS}, False),
    ],
)
def test_a_key_has_a_name_of_its_own_under_another_name(entry, fine):
    """The kind's variable is for the provider of that name; who needs no key needs no variable."""
    if fine:
        assert Settings.model_validate({"providers": {"mine": entry}}).providers["mine"]
    else:
        with pytest.raises(ValidationError, match=r"providers\.mine\.api_key_env: is missing"):
            Settings.model_validate({"providers": {"mine": entry}})


def test_a_provider_named_like_a_kind_need_not_say_it():
    """Every kind can be had by its name alone, or by its name and address."""
    names = {
        n: {} if k.profile.base_url else {"base_url": ADDRESS} for n, k in registry.KINDS.items()
    }
    providers = Settings.model_validate({"providers": names}).providers
    assert {name: entry.kind for name, entry in providers.items()} == {
        name: name for name in [*registry.KINDS, registry.LOCAL]
    }


def test_a_model_tells_its_space_what_it_promises():
    """Length and width sent reach the space, and are no part of what it is compared by."""
    models = Settings().models
    assert models["mistral-embed"].as_space().unit_norm is True
    assert models["baai/bge-m3"].as_space().unit_norm is False
    assert models["codestral-embed"].as_space().send_dimensions is True
    assert models["mistral-embed"].as_space().send_dimensions is False
