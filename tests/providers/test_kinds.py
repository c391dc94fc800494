"""The kinds of provider, as a configuration names them."""

import pytest

from providers.kinds import HTTP_KINDS


def test_kinds_are_found_by_their_own_names():
    """Each kind stands under the name it gives itself, and these names are what users write."""
    assert {name: kind.kind for name, kind in HTTP_KINDS.items()} == {
        "openai": "openai",
        "openrouter": "openrouter",
    }


@pytest.mark.parametrize("kind", HTTP_KINDS.values(), ids=HTTP_KINDS)
def test_a_key_travels_encrypted_and_to_one_place(kind):
    """By default each kind speaks TLS, and no two kinds share an origin or a key."""
    others = [other for other in HTTP_KINDS.values() if other is not kind]
    assert kind.base_url.startswith("https://")
    assert kind.base_url not in [other.base_url for other in others]
    assert kind.api_key_env not in [other.api_key_env for other in others]


@pytest.mark.parametrize("kind", HTTP_KINDS.values(), ids=HTTP_KINDS)
def test_ids_without_a_text_can_be_sent(kind):
    """Both take token arrays as they are, which is where those go that stand for no text."""
    assert kind.accepts_tokens is True
