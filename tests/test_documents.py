"""What is written for people against what is: config.yaml and README.md hide and invent nothing."""

import re
import struct
import tomllib
from pathlib import Path
from typing import Any, get_origin

import pytest
import yaml
from embedding_proxy.cache.record import Entry, encode
from embedding_proxy.proxy.config.fields import Section
from embedding_proxy.proxy.config.index import Qdrant
from embedding_proxy.proxy.config.loader import load
from embedding_proxy.proxy.config.models import ModelConfig, RouteConfig
from embedding_proxy.proxy.config.providers import LimitsConfig
from embedding_proxy.proxy.config.schema import DEFAULT_PROVIDERS, ProviderConfig, Settings
from embedding_proxy.proxy.http import passthrough_upstream
from embedding_proxy.proxy.http.passthrough_upstream import PREFIXES
from fault_server import status

ROOT = Path(__file__).parents[1]
CLIENTS = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN: dict[str, Any] = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))

# Names that are the operator's to choose, and what stands below each.
NAMED = {"providers": ProviderConfig, "models": ModelConfig}


def _section(annotation: object) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _plain_keys(section: type[Section], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the paths of all keys whose names are fixed."""
    paths = []
    for name, field in section.model_fields.items():
        below = _section(field.annotation)
        if below is not None:
            paths += _plain_keys(below, (*path, name))
        elif name not in NAMED:
            paths.append((*path, name))
    return paths


def _at(tree: object, path: tuple[str, ...]) -> object:
    for part in path:
        tree = tree[part] if isinstance(tree, dict) else getattr(tree, part)
    return tree


def test_all_sections_are_known_to_this_test():
    """Every section of the settings is either walked into or one of those with free names."""
    fields = Settings.model_fields.items()
    free = {name for name, field in fields if get_origin(field.annotation) is dict}
    assert free == NAMED.keys()


def test_the_file_loads_as_it_stands():
    """config.yaml is a configuration that the proxy takes."""
    assert load(ROOT / "config.yaml").server.port == Settings().server.port


def test_the_file_holds_no_more_and_no_less_than_the_sections():
    """The sections of config.yaml are those of the settings."""
    assert SHOWN.keys() == Settings.model_fields.keys()


@pytest.mark.parametrize("path", _plain_keys(Settings), ids=".".join)
def test_every_key_is_shown_with_its_default(path, monkeypatch):
    """Each key stands in config.yaml, and what it says there is what applies without it."""
    monkeypatch.delenv("XDG_DATA_HOME")
    default, shown = _at(Settings(), path), _at(SHOWN, path)
    if isinstance(default, Path):
        shown = Path(str(shown)).expanduser()
    assert shown == (list(default) if isinstance(default, tuple) else default)


def test_every_key_of_qdrant_is_shown_with_its_default():
    """Qdrant has no default, so its keys stand in config.yaml as remarks; they are all there."""
    _, _, remarks = (ROOT / "config.yaml").read_text(encoding="utf-8").partition("\nindex:\n")
    lines = [line[5:] for line in remarks.splitlines() if line.startswith("  #   ")]
    shown = yaml.safe_load("\n".join(lines))
    default = Qdrant(url="http://h").model_dump()
    assert shown == {**default, "url": None}


def test_the_providers_shown_are_the_default_ones():
    """The default providers are shown under their own names, the first with every key it has."""
    assert tuple(SHOWN["providers"]) == DEFAULT_PROVIDERS
    for name, entry in SHOWN["providers"].items():
        shown, alone = ProviderConfig(**entry), ProviderConfig(kind=name)
        assert entry["kind"] == name
        if name != "local":
            assert shown.as_profile() == alone.as_profile()
            assert {"base_url", "api_key_env"} <= entry.keys()
    first = SHOWN["providers"]["openai"]
    assert first.keys() == ProviderConfig.model_fields.keys()
    assert first["limits"].keys() == LimitsConfig.model_fields.keys()


def test_the_defaults_of_a_providers_keys_are_openais():
    """What a key's type says is its default is what config.yaml shows, and what OpenAI declares."""
    shown = ProviderConfig(**SHOWN["providers"]["openai"])
    bare = ProviderConfig(kind="openai", base_url=shown.base_url, api_key_env=shown.api_key_env)
    assert shown == bare


def test_the_models_shown_are_what_the_catalogue_says():
    """The example shows every key of a model and of a route, and changes nothing."""
    assert SHOWN["models"]
    for name, entry in SHOWN["models"].items():
        assert entry.keys() == ModelConfig.model_fields.keys()
        assert all(route.keys() == RouteConfig.model_fields.keys() for route in entry["routes"])
        assert ModelConfig.model_validate(entry) == Settings().models[name]


def test_every_model_of_a_default_provider_is_in_the_readme():
    """The README names the models that need no configuration, by the names clients know."""
    models = Settings().models.items()
    plain = [
        name
        for name, model in models
        if "/" not in name and model.routes[0].provider in DEFAULT_PROVIDERS
    ]
    assert len(plain) == 4
    assert not [name for name in plain if f"`{name}`" not in README]


async def test_every_route_is_in_the_readme(start_proxy):
    """Each method and path stands in the README; other beginnings and ends of it are told."""
    bare = ("/livez", "/readyz", "/healthz", "/health", "/status", "/metrics", "/openapi.json")
    bare += ("/openai/deployments/{model}/embeddings", "/")
    proxy = await start_proxy()
    routes = set()
    for route in proxy.app.router.routes():
        path = route.resource.canonical.replace("{slash}", "").rstrip("/") or "/"
        for prefix in PREFIXES:
            path = path.removeprefix(prefix) if path not in bare else path
        path = path if path in bare else "/v1" + path
        # A GET route answers HEAD too, which goes without saying.
        routes |= {f"{route.method} {path}"} - {f"HEAD {path}"}
    assert len(routes) > 4
    assert not [route for route in sorted(routes) if f"`{route}`" not in README]


async def test_every_header_of_ours_is_in_the_readme(upstream, start_proxy):
    """Whatever header a reply has beyond HTTP's common ones, the README says what it means."""
    common = {"content-type", "content-length", "transfer-encoding", "date", "server"}
    proxy = await start_proxy(openai=upstream)
    asked = {"model": "text-embedding-3-small", "input": "a"}
    seen = set()
    replies = [await proxy.post(asked), await proxy.post(asked), await proxy.post({})]
    upstream.always = status(429)
    replies.append(await proxy.post({**asked, "input": "b"}))
    assert [reply.status for reply in replies] == [200, 200, 400, 429]
    for reply in replies:
        seen |= {name.lower() for name in reply.headers} - common
    assert {"x-cache", "x-request-id", "x-should-retry", "retry-after"} <= seen
    assert not [name for name in sorted(seen) if name not in README.lower()]


def test_the_decoder_in_the_documentation_reads_a_record():
    """The five lines in docs/storage.md give back the numbers that were stored."""
    text = (ROOT / "docs" / "storage.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    namespace = {}
    exec(code, namespace)
    vector = struct.pack("<3f", 0.5, -1.25, 3.0)
    record = encode(Entry(vector, tokens=7, counted=True, digest=bytes(16)))
    assert namespace["decode"](record) == (0.5, -1.25, 3.0)


def test_the_page_on_clients_names_every_header_that_is_kept_back():
    """docs/clients.md lists what is not passed on; for those of the connection, the rule."""
    text = CLIENTS.lower()
    unwanted = {
        *passthrough_upstream._NOT_FORWARDED,
        *passthrough_upstream._NOT_RETURNED,
    } - passthrough_upstream._HOP_BY_HOP
    beginnings = (
        *passthrough_upstream._NOT_FORWARDED_BEGINNINGS,
        *passthrough_upstream._NOT_RETURNED_BEGINNINGS,
    )
    assert len(unwanted) > 10
    assert not [name for name in (*unwanted, *beginnings) if f"`{name}" not in text]


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", CLIENTS, re.DOTALL))
def test_what_the_page_on_clients_shows_is_a_configuration(text, tmp_path, monkeypatch):
    """Each snippet of docs/clients.md is taken as it stands."""
    monkeypatch.setenv("TEAM_KEY", "k")
    monkeypatch.setenv("PROMETHEUS_KEY", "p")
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert load(file).passthrough_provider is not None


def _told_to_install() -> list[tuple[str, str]]:
    """Return each `pip install` of a library that code or a page names, and where it stands."""
    folders = ("proxy", "index", "cache", "providers")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    return [
        (library, str(path.relative_to(ROOT)))
        for path in (*sources, *pages)
        for line in path.read_text(encoding="utf-8").splitlines()
        if "pip install '" in line
        for library in re.findall(r"'([^']+)'", line.partition("pip install ")[2])
    ]


@pytest.mark.parametrize(("library", "place"), _told_to_install())
def test_what_is_told_to_install_is_what_an_extra_holds(library, place):
    """A library is named itself, with the bound of the extra, which works without a release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert library in {
        named
        for name in ("local", "demo", "parquet", "qdrant", "otel", "redis")
        for named in extras[name]
    }


def test_the_messages_about_extras_are_found():
    """The test above sees every extra."""
    assert {library.partition(">")[0] for library, _ in _told_to_install()} >= {
        "wordllama",
        "openai",
        "rich",
        "pyarrow",
        "qdrant-client",
    }
