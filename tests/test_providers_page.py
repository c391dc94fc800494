"""docs/providers.md and the example package: every snippet loads, every kind and model is there."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from embedding_proxy.providers import registry
from embedding_proxy.providers.model_catalog import CATALOGUE
from example_package import install
from fault_server import FaultServer
from pages import fenced, taken

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "providers.md").read_text(encoding="utf-8")
SNIPPETS = fenced(PAGE, "yaml")
SECTIONS = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", PAGE, re.DOTALL | re.MULTILINE))


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Install the example package."""
    module = install("acme_provider", tmp_path / "site", monkeypatch)
    yield
    sys.modules.pop(module, None)


def test_the_page_has_snippets():
    """The snippets are found, so that nothing is proved of none."""
    assert len(SNIPPETS) > 20


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_every_snippet_is_a_configuration(snippet, example, tmp_path):
    """What is shown is taken as it stands, and each of its models leads to one of its providers."""
    settings = taken(snippet, tmp_path)
    shown = yaml.safe_load(snippet)
    for name in shown.get("models", {}):
        routes = {route.provider for route in settings.models[name].routes}
        assert routes <= shown["providers"].keys()


def test_every_kind_has_its_section_with_a_snippet():
    """No kind is missing and none is invented; each section shows a provider of its kind."""
    assert set(SECTIONS) == {*registry.KINDS, registry.LOCAL}
    for name, text in SECTIONS.items():
        (first, *_) = fenced(text, "yaml")
        shown = yaml.safe_load(first)["providers"]
        assert name in {key if not e else e.get("kind", key) for key, e in shown.items()}


def _kind_row(name: str) -> str:
    profile = registry.KINDS[name].profile
    tokens = profile.limits.tokens
    size = f"{profile.limits.inputs}" + (f", {tokens:,} tokens" if tokens else "")
    known = profile.extra_fields
    fields = "any" if known is None else ", ".join(f"`{f}`" for f in sorted(known)) or "none"
    cells = [
        f"`{name}`",
        profile.base_url or "to be given",
        f"`{profile.api_key_env}`" if profile.api_key_env else "none needed",
        profile.encoding_format or "not said",
        size,
        fields,
        "yes" if profile.forward_user else "dropped",
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", registry.KINDS)
def test_what_a_kind_declares_is_told(name):
    """The row of a kind says what its profile says."""
    assert _kind_row(name) in PAGE.splitlines()


def _model_row(name: str) -> str:
    entry = CATALOGUE[name]
    first = entry.routes[0][0]
    free = "nothing" if first in (registry.LOCAL, "ollama") else "not known"
    cells = [
        f"`{name}`",
        ", ".join(provider for provider, _ in entry.routes),
        f"{entry.dimensions}",
        "yes" if entry.matryoshka else "no",
        f"${entry.price:g}" if entry.price else free,
        f"{entry.max_input_tokens:,}",
        "yes" if entry.unit_norm else "",
    ]
    return f"| {' | '.join(cells)} |"


def test_every_model_is_told_as_it_is():
    """The table of models is the catalogue, row by row, and holds no other model."""
    table = PAGE.partition("| model | provider |")[2].partition("\n\n")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert rows == [_model_row(name) for name in CATALOGUE]


async def test_the_example_serves(example, start_proxy, monkeypatch):
    """A provider that a package brings is asked as it wants to be, through the whole proxy."""
    monkeypatch.setenv("ACME_API_KEY", "acme-secret")
    monkeypatch.setenv("PLAIN_KEY", "plain-secret")
    async with FaultServer() as acme:
        acme.widths = {"large/2": 8, "small": 8}
        model = {"dimensions": 8}
        proxy = await start_proxy(
            providers={
                "acme": {"base_url": acme.url, "options": {"project": "search"}},
                "plain": {"kind": "acme_plain", "base_url": acme.url, "api_key_env": "PLAIN_KEY"},
            },
            models={
                "large": {
                    **model,
                    "space": "acme/large-2",
                    "routes": [{"provider": "acme", "model": "large/2"}],
                },
                "small": {
                    **model,
                    "space": "acme/small",
                    "routes": [{"provider": "plain", "model": "small"}],
                },
            },
        )
        large = await proxy.post({"model": "large", "input": "a"})
        small = await proxy.post({"model": "small", "input": "a", "input_type": "query"})
        refused = await proxy.post({"model": "small", "input": "a", "late_chunking": True})
    assert (large.status, small.status, refused.status) == (200, 200, 400)
    assert large.headers["x-embedding-provider"] == "acme"
    first, second = acme.calls
    assert first.path == "/v1/models/large/2/embeddings"
    assert first.payload["project"] == "search"
    assert first.headers["X-Acme-Key"] == "acme-secret"
    assert "Authorization" not in first.headers
    assert second.headers["Authorization"] == "Bearer plain-secret"
    assert second.payload["input_type"] == "query"
    assert (await refused.json())["error"]["param"] == "late_chunking"
