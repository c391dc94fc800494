"""The catalogue is money and widths: what it says of OpenAI's models, and laws for every entry."""

import pytest
from embedding_proxy.providers.model_catalog import CATALOGUE
from embedding_proxy.providers.registry import KINDS, LOCAL

ENTRIES = pytest.mark.parametrize("name", CATALOGUE)


@pytest.mark.parametrize(
    ("name", "dimensions", "price", "matryoshka"),
    [
        ("text-embedding-3-small", 1536, 0.02, True),
        ("text-embedding-3-large", 3072, 0.13, True),
        ("text-embedding-ada-002", 1536, 0.10, False),
    ],
)
def test_openais_models(name, dimensions, price, matryoshka):
    """Width and price are OpenAI's; the old model cannot be cut and refuses `dimensions`."""
    entry = CATALOGUE[name]
    assert (entry.dimensions, entry.price, entry.matryoshka) == (dimensions, price, matryoshka)
    assert entry.reject_dimensions is not matryoshka
    assert entry.tokenizer == "cl100k_base"
    assert entry.routes == (("openai", name), ("openrouter", f"openai/{name}"))
    assert CATALOGUE[f"openai/{name}"] is entry


@ENTRIES
def test_every_model_can_be_bought_somewhere(name):
    """Each route names a provider that exists, and each provider at most once."""
    providers = [provider for provider, _ in CATALOGUE[name].routes]
    assert providers
    assert set(providers) <= {*KINDS, LOCAL}
    assert len(set(providers)) == len(providers)


@ENTRIES
def test_names_of_one_space_agree_on_everything(name):
    """Two names share vectors only if they are the same entry, so no width or price can differ."""
    same = [entry for entry in CATALOGUE.values() if entry.space == CATALOGUE[name].space]
    assert all(entry == CATALOGUE[name] for entry in same)


@ENTRIES
def test_numbers_are_of_the_right_size(name):
    """Widths, contexts and prices are of the magnitude such models have."""
    entry = CATALOGUE[name]
    assert 128 <= entry.dimensions <= 4096
    assert 256 <= entry.max_input_tokens <= 128_000
    assert 0 <= entry.price < 1
    assert (entry.price == 0) is (entry.routes[0][0] in {LOCAL, "ollama", "jina"})


@ENTRIES
def test_a_space_belongs_to_one_provider_but_for_openais(name):
    """What another provider serves under a like name may have other numbers: another space."""
    entry = CATALOGUE[name]
    if not entry.space.startswith("openai/"):
        assert len(entry.routes) == 1


@ENTRIES
def test_a_width_that_must_be_asked_for_can_be(name):
    """Where the native width is sent, the provider has a field for it."""
    entry = CATALOGUE[name]
    if entry.send_dimensions:
        assert all(KINDS[provider].profile.dimensions_field for provider, _ in entry.routes)
