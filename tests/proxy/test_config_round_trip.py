"""`config show` of what it has shown: it loads, comes to the same, and is shown alike."""

import re
from pathlib import Path

import pytest
import yaml
from embedding_proxy.providers import registry
from embedding_proxy.providers.model_catalog import CATALOGUE
from embedding_proxy.proxy.config import loader, show
from embedding_proxy.proxy.config.loader import ConfigError
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from pages import PAGES, fenced

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    pytest.param(snippet, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, snippet in enumerate(fenced(page.read_text(encoding="utf-8"), "yaml"))
    if "text_field:" not in snippet and "acme" not in snippet
]
SECRET = "sk-round-trip-0123456789"
VARIABLE = re.compile(r"\$\{(\w+)\}")


def _shown(file: Path, purpose="inspect") -> str:
    """Return what `config show` prints of a file, but for its comments."""
    found = loader.read_configuration(file, purpose=purpose)
    return loader.dump(show.values(found.settings, found.content, everything=False))


def _profiles(loaded):
    """Return what a configuration comes to: of providers, what they are asked with."""
    providers = {
        name: one and (one.as_profile() if one.kind != "local" else one, one.retries)
        for name, one in loaded.providers.items()
    }
    rest = {name: getattr(loaded, name) for name in type(loaded).model_fields}
    return {**rest, "providers": providers, "passthrough": loaded.passthrough_provider is not None}


def _round_trip(text: str, folder: Path, monkeypatch) -> None:
    """Show a configuration, what is shown, and load that with its variables set."""
    first, second = folder / "first.yaml", folder / "second.yaml"
    first.write_text(text, encoding="utf-8")
    shown = _shown(first)
    second.write_text(shown, encoding="utf-8")
    assert _shown(second) == shown
    assert SECRET not in shown
    known, made_up = set(VARIABLE.findall(text)), set(VARIABLE.findall(shown))
    made_up -= known
    with monkeypatch.context() as patch:
        for name in known:
            patch.setenv(name, f"a-{name}" if "PROXY" not in name else "http://me:pw@h:1")
        for name in made_up:
            patch.setenv(name, SECRET)
        one, other = (loader.load(file, purpose="serve") for file in (first, second))
    assert _profiles(other).keys() == _profiles(one).keys()
    if SECRET in text or not made_up:
        assert _profiles(other) == _profiles(one)


@pytest.mark.parametrize("text", EXAMPLES)
def test_each_example_is_shown_and_loads_again(text, tmp_path, monkeypatch):
    """With the environment as it is: no variable of the example is set."""
    _round_trip(text, tmp_path, monkeypatch)


def test_the_shipped_file_is_shown_and_loads_again(tmp_path, monkeypatch):
    """It names every key there is."""
    _round_trip((ROOT / "config.yaml").read_text(encoding="utf-8"), tmp_path, monkeypatch)


def test_what_is_shown_can_be_shown_again_and_says_what_is_to_be_set(tmp_path, command):
    """Literal secrets have become variables: they are listed, and serving waits for them."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    headers = {"headers": {"X-Team": SECRET}}
    server = {"keys": [SECRET, "${TEAM_KEY_NOWHERE}"], "port": 0}
    first.write_text(yaml.safe_dump({"server": server, "providers": {"mistral": headers}}))
    done = command("config", "show", "--config", first)
    assert (done.code, done.err) == (0, "")
    for name in ("CLIENT_KEY_1", "HEADER_MISTRAL_X_TEAM"):
        assert f"# {name} stands for a secret of that file; set this variable to" in done.out
    assert "server.keys.1: the variable TEAM_KEY_NOWHERE is not set" in done.out
    second.write_text(done.out)
    again = command("config", "show", "--config", second)
    assert (again.code, again.err) == (0, "")
    assert yaml.safe_load(again.out) == yaml.safe_load(done.out)
    assert SECRET not in done.out + again.out
    refused = command("serve", "--config", second)
    assert refused.code == 2
    assert refused.err.count("is not set; set it") == 3


NAMES = st.sampled_from([*registry.KINDS, "mine", "eu.west-1"])
WORDS = st.text(
    alphabet=st.characters(codec="utf-8", exclude_characters="\x00$", exclude_categories=["Cs"]),
    min_size=1,
    max_size=12,
)
NUMBERS = st.floats(1 / 1024, 2**20) | st.integers(1, 10**6)
COUNTS = st.integers(1, 10**6)
SECRETS = st.just(SECRET) | st.just("${SET_NOWHERE}")


def _some(**keys):
    """Return sections that have some of these keys, or none."""
    return st.fixed_dictionaries({}, optional=keys)


SERVER = _some(
    port=st.integers(0, 65535),
    workers=st.integers(1, 64),
    max_body_mib=st.integers(1, 10**5),
    allow_oversize=st.booleans(),
    request_timeout_s=NUMBERS,
    batch_window_ms=st.floats(0, 1000),
    unknown_models=st.sampled_from(["forward", "reject"]),
    drift_check_hours=st.none() | st.integers(1, 1000),
    keys=st.lists(
        st.fixed_dictionaries(
            {"key": SECRETS}, optional={"name": WORDS, "namespace": WORDS, "admin": st.booleans()}
        ),
        max_size=1,
    ),
    cors=st.lists(st.just("https://app.example.com"), max_size=1),
    honor_cache_control=st.sampled_from([True, False, "admin"]),
)
CACHE = _some(
    directory=st.sampled_from(["store", "/tmp/a cache", "~/x", "../y"]),
    size_limit_gib=NUMBERS,
    memory_mib=st.floats(0, 1e6),
    ttl_days=st.none() | NUMBERS,
    pinned_namespaces=st.lists(WORDS, max_size=2),
    mode=st.sampled_from(["normal", "frozen", "refresh", "off"]),
)
PROVIDER = _some(
    api_key_env=st.sampled_from(["MY_KEY", "OTHER_KEY"]),
    timeout_s=NUMBERS,
    retries=st.none() | st.integers(0, 100),
    trust_env=st.booleans(),
    first_byte_timeout_s=st.none() | NUMBERS,
    encoding_format=st.sampled_from([None, "float", "base64"]),
    accepts_tokens=st.booleans(),
    dimensions_field=st.none() | st.sampled_from(["dimensions", "width"]),
    extra_fields=st.none() | st.lists(st.sampled_from(["task", "truncate"]), max_size=2),
    unit_norm=st.booleans(),
    headers=st.dictionaries(st.sampled_from(["X-Team", "x-title"]), SECRETS, max_size=2),
    limits=_some(
        inputs=COUNTS,
        tokens=st.none() | COUNTS,
        concurrency=st.integers(1, 10_000),
        requests_per_minute=st.none() | COUNTS,
        from_headers=st.booleans(),
    ),
)
MODELS = st.dictionaries(
    st.sampled_from(list(CATALOGUE)[:6]),
    _some(
        price=st.floats(0, 100),
        routing_strategy=st.sampled_from(["listed", "cheapest", "fastest"]),
        hedge_after_s=st.none() | NUMBERS,
        dimension_policy=st.sampled_from(["strict", "truncate", "pad"]),
    ),
    max_size=3,
)
FILES = _some(
    server=SERVER,
    cache=CACHE,
    providers=st.dictionaries(NAMES, PROVIDER, max_size=3),
    models=MODELS,
    passthrough=st.sampled_from([None, "openai", "mistral"]),
    passthrough_auth=st.sampled_from(["provider", "client"]),
    index=_some(
        qdrant=st.none()
        | st.fixed_dictionaries(
            {"url": st.just("http://localhost:6333")},
            optional={
                "prefix": st.sampled_from(["", "docs_"]),
                "payload_indexes": st.sampled_from([{}, ["lang"], {"year": "integer"}]),
                "batch_mib": st.floats(0.25, 4.5),
            },
        )
    ),
)


@pytest.mark.parametrize(
    ("shared", "parts"),
    [
        ("redis://h", {"url": "redis://h"}),
        (
            f"rediss+sentinel://u:{SECRET}@a,b/main/2",
            {
                "url": "rediss+sentinel://a:26379,b:26379/main/2",
                "username": "u",
                "password_env": "REDIS_PASSWORD",
            },
        ),
        ({"url": "unix:///s?db=3", "username": "u", "password_env": "P"}, {"username": "u"}),
        ({"url": "${REDIS_URL}", "timeout_ms": 9}, {"url": "${REDIS_URL}", "timeout_ms": 9}),
    ],
)
def test_the_password_of_redis_is_not_shown(shared, parts, tmp_path, monkeypatch):
    """What is shown is the same address, with the variable of its password."""
    monkeypatch.setenv("REDIS_URL", f"redis://u:{SECRET}@h/2")
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"cache": {"shared": shared}}), encoding="utf-8")
    shown = _shown(file)
    assert SECRET not in shown
    assert yaml.safe_load(shown)["cache"]["shared"].items() >= parts.items()
    file.write_text(shown, encoding="utf-8")
    assert _shown(file) == shown


@given(content=FILES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_whatever_loads_is_shown_and_loads_again(content, tmp_path, monkeypatch):
    """Of all keys, with and without secrets, whichever providers there are."""
    for name, entry in content.get("providers", {}).items():
        if name in ("mine", "eu.west-1"):
            entry.update({"kind": "mistral", "api_key_env": "MINE"})
        elif registry.KINDS[name].profile.base_url is None:
            entry["base_url"] = "http://127.0.0.1:1/v1"
    text = yaml.safe_dump(content, allow_unicode=True)
    (tmp_path / "first.yaml").write_text(text, encoding="utf-8")
    try:
        loader.read_configuration(tmp_path / "first.yaml", purpose="inspect")
    except ConfigError:
        reject()
    _round_trip(text, tmp_path, monkeypatch)
