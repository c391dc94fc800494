"""The kinds of provider: what ours declare, and how installed packages bring theirs."""

import sys
from dataclasses import replace

import pytest
from embedding_proxy.providers import plugins, registry
from embedding_proxy.providers.base import Context, Space
from embedding_proxy.providers.openai_compatible import HttpProvider
from embedding_proxy.providers.profile import Profile
from fault_server import vector_of

ALL = pytest.mark.parametrize("name", registry.KINDS)
SELF_HOSTED = {"ollama", "vllm", "tei", "infinity", "lm_studio", "llama_cpp", "openai_compatible"}
TELLING_NO_ADDRESS = {"azure", "openai_compatible", "tei", "llama_cpp"}


@ALL
def test_a_key_travels_encrypted_and_to_one_place(name):
    """Who needs a key is reached by TLS, and no two kinds share an origin or a key."""
    one = registry.KINDS[name].profile
    others = [kind.profile for other, kind in registry.KINDS.items() if other != name]
    assert (one.api_key_env is None) is (name in SELF_HOSTED)
    assert (one.base_url is None) is (name in TELLING_NO_ADDRESS)
    if one.api_key_env is not None:
        assert one.api_key_env not in [other.api_key_env for other in others]
        assert (one.base_url or "https://").startswith("https://")
    if one.base_url is not None:
        assert one.base_url not in [other.base_url for other in others]
        assert "127.0.0.1:8080" not in one.base_url  # this proxy would ask itself


def test_ids_go_only_where_they_are_understood():
    """Token arrays are cl100k ids, so nobody but OpenAI, Azure and OpenRouter gets them."""
    takers = {name for name, kind in registry.KINDS.items() if kind.profile.accepts_tokens}
    assert takers == {"openai", "azure", "openrouter"}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mistral", {"inputs": 256, "tokens": 16_384}),
        ("voyage", {"inputs": 1000}),
        ("cohere", {"inputs": 96}),
        ("gemini", {"inputs": 100}),
        ("dashscope", {"inputs": 10}),
        ("tei", {"inputs": 32}),
        ("openai", {"inputs": 2048, "tokens": 300_000}),
    ],
)
def test_known_limits_are_declared(name, fields):
    """What a vendor publishes of a call's size stands in its profile."""
    limits = registry.find(name).profile.limits
    assert {field: getattr(limits, field) for field in fields} == fields


@ALL
def test_late_chunking_is_nobodys_field(name):
    """A field that mixes the inputs of a call is never on a list of known ones."""
    known = registry.KINDS[name].profile.extra_fields
    assert known is None or "late_chunking" not in known


@ALL
async def test_what_each_kind_sends_is_what_it_declares(name, upstream):
    """Each kind is asked in its own form: format, user and width as declared, and nothing else."""
    upstream.widths["m"] = 8
    kind = registry.KINDS[name]
    profile = replace(kind.profile, base_url=upstream.url)
    space = Space("s", 8, send_dimensions=True)
    async with kind.adapter("mine", profile, api_key="made-up", sleep=None) as provider:
        got = await provider.ask("m", space, ["a"], Context(user="someone"))
    (call,) = upstream.calls
    wanted = {"model": "m", "input": ["a"]}
    if profile.encoding_format:
        wanted["encoding_format"] = profile.encoding_format
    if profile.dimensions_field:
        wanted[profile.dimensions_field] = 8
    if profile.forward_user:
        wanted["user"] = "someone"
    assert call.payload == wanted
    assert call.headers[profile.key_header] == f"{profile.key_prefix}made-up"
    assert len(got.vectors[0]) == 32


def test_an_unknown_kind_names_the_known_ones():
    """A name that is no kind's is answered with those that are, and not repeated."""
    with pytest.raises(registry.UnknownKind) as caught:
        registry.find("opnai")
    assert all(name in str(caught.value) for name in [*registry.KINDS, "local"])
    assert "opnai" not in str(caught.value)


BROUGHT = """
from embedding_proxy.providers.openai_compatible import HttpProvider
from embedding_proxy.providers.profile import Profile

data = Profile(base_url="http://h/v1")

class Own(HttpProvider):
    profile = Profile(base_url="http://own/v1", limits=data.limits)

    def path(self, model):
        return f"/{model}/embeddings"

neither = 7
class Bare: pass
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Give a function that puts a distribution with such entry points on the path."""

    def install(**points):
        (tmp_path / "acme_kinds.py").write_text(BROUGHT)
        info = tmp_path / "acme-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
        lines = [f"[{plugins.PROVIDERS}]", *(f"{name} = {value}" for name, value in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "acme_kinds", raising=False)

    return install


def test_a_package_may_bring_a_profile(installed):
    """An entry point that leads to data alone is a kind that speaks plain OpenAI."""
    installed(acme="acme_kinds:data")
    kind = registry.find("acme")
    assert (kind.profile.base_url, kind.adapter) == ("http://h/v1", HttpProvider)


async def test_a_package_may_bring_an_adapter(installed, upstream):
    """An entry point that leads to a class is used as ours are."""
    installed(acme="acme_kinds:Own")
    kind = registry.find("acme")
    profile = replace(kind.profile, base_url=upstream.url)
    async with kind.adapter("acme", profile) as provider:
        got = await provider.ask("m", Space("s", 1536), ["a"], Context())
    assert upstream.calls[0].path == "/v1/m/embeddings"
    assert got.vectors[0] == vector_of("m", "a").tobytes()


@pytest.mark.parametrize(
    ("leads_to", "problem"),
    [
        ("acme_kinds:neither", "acme_kinds:neither is neither a Profile nor a class that has one"),
        ("acme_kinds:Bare", "is neither a Profile nor"),
        ("acme_kinds:gone", "acme_kinds:gone cannot be loaded"),
        ("acme_gone:x", "acme_gone:x cannot be loaded"),
    ],
)
def test_a_package_that_brings_something_else_is_named(leads_to, problem, installed):
    """A broken entry point is told as what it is, before any request."""
    installed(acme=leads_to)
    with pytest.raises(registry.UnknownKind, match=problem):
        registry.find("acme")


def test_a_package_cannot_take_the_place_of_ours(installed):
    """A built-in kind is what it was, whatever is installed, and its key stays with it."""
    installed(openai="acme_kinds:Own")
    assert registry.find("openai").profile.base_url == "https://api.openai.com/v1"


def test_a_profile_without_an_address_makes_no_provider():
    """Nothing is sent to nowhere."""
    with pytest.raises(ValueError, match="has no base URL"):
        HttpProvider("acme", Profile())
