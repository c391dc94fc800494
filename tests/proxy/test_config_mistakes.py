"""A configuration with several mistakes: each is told, with its line, in one go."""

import re

import pytest
from embedding_proxy.proxy.config import yaml_file
from embedding_proxy.proxy.config.loader import ConfigError, load
from embedding_proxy.proxy.config.yaml_file import YamlError
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from hypothesis import example, given
from hypothesis import strategies as st

MANY = """\
server:
  prot: 1
  host: [a]
cache:
  size_limit_gib: -1
  directory: "${EMBEDDING_PROXY_NOWHERE}/x"
providers:
  openai:
    timeout_s: soon
    timeout_s: 5
  mine:
    kind: openai
    base_url: http://h/v1
  mistral: {share_cache: true, options: {a: 1}}
models:
  m:
    space: s
    dimensions: 8
    routes:
      - {provider: opnai, model: m}
      - {provider: local, model: m}
  n: {space: s, dimensions: 9, routes: [{provider: local, model: n}]}
"""
# The line, the key and a part of the message.
TOLD = [
    (2, "server.prot", "did you mean port?"),
    (3, "server.host", "expected a string"),
    (5, "cache.size_limit_gib", "greater than 0"),
    (6, "cache.directory", "the variable EMBEDDING_PROXY_NOWHERE is not set"),
    (9, "providers.openai.timeout_s", "expected a number"),
    (10, "providers.openai.timeout_s", "is written twice, first in line 9"),
    (11, "providers.mine.api_key_env", "is missing; name the variable"),
    (14, "providers.mistral.share_cache", "is for auth: client"),
    (14, "providers.mistral.options.a", "unknown option"),
    (20, "models.m.routes.0.provider", "there is no provider 'opnai'"),
    (22, "models.n.dimensions", "9 here, but 8 in models.m"),
]


@pytest.fixture
def refused(tmp_path):
    """Give a function that loads a text, and returns what is wrong as (line, key, message)."""
    file = tmp_path / "config.yaml"

    def load_text(text: str) -> list[tuple[int, str, str]]:
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load(file)
        assert str(caught.value) == "\n".join(caught.value.problems)
        found = [
            re.fullmatch(rf"{re.escape(str(file))}:(\d+): (\S+): (.+)", line)
            for line in caught.value.problems
        ]
        return [(int(one[1]), one[2], one[3]) for one in found]

    return load_text


def test_all_mistakes_are_told_at_once(refused):
    """Unknown keys, types, values, references, duplicates, and what does not fit together."""
    found = refused(MANY)
    assert [one[:2] for one in found] == [one[:2] for one in TOLD]
    for (_, _, message), (_, _, part) in zip(found, TOLD, strict=True):
        assert part in message


def test_the_command_prints_a_line_for_each(command, tmp_path):
    """Each line can be read alone: the command's name, the file, the line, the key."""
    file = tmp_path / "config.yaml"
    file.write_text(MANY)
    for name in ("check", "serve"):
        done = command(name, "--config", file)
        assert (done.code, done.out) == (2, "")
        lines = done.err.splitlines()
        assert [
            line.partition(f"embedding-proxy: {file}:")[2].split(": ")[:2] for line in lines
        ] == [[str(line), key] for line, key, _ in TOLD]


WRONG_PROVIDER = """
providers: {mine: {kind: opnai}}
models: {m: {space: s, routes: [{provider: mine, model: m}]}}
passthrough: mine
"""
WRONG_MODEL = """
models:
  text-embedding-3-small: {fallback: m}
  m: {space: s, dimensions: x, routes: [{provider: local, model: m}]}
"""


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        # A provider that is wrong in itself is not also one that there is not.
        (WRONG_PROVIDER, ["providers.mine.kind"]),
        # A model that is wrong in itself is not also one that cannot stand in.
        (WRONG_MODEL, ["models.m.dimensions"]),
        # A misspelt key is not also missing, and a list whose entry is wrong is not also empty.
        (
            "models: {m: {spce: s, routes: [{provder: local, model: m}]}}",
            ["models.m.spce", "models.m.routes.0.provder"],
        ),
        # A variable that is not set has no wrong type, too.
        ("server: {port: '${EMBEDDING_PROXY_NOWHERE}'}", ["server.port"]),
        # Without its keys, nobody knows whether a host is open.
        ("server: {host: 0.0.0.0, keys: [{key: 7}]}", ["server.keys.0.key"]),
        ("providers: [a]\nmodels: {m: {space: s}}", ["providers", "models.m.routes"]),
    ],
)
def test_no_mistake_is_told_that_only_follows_from_another(text, keys, refused):
    """What is told is what has to be changed."""
    assert sorted(key for _, key, _ in refused(text)) == sorted(keys)


def test_what_is_missing_or_merged_has_the_nearest_line(refused):
    """A key that is not there has the line of its section, a merged one that of its anchor."""
    text = (
        "models:\n"
        "  a: &a\n"
        "    space: s\n"
        "    dimensions: 0\n"
        "    routes: [{provider: local, model: a}]\n"
        "  b:\n"
        "    <<: *a\n"
        "    space: t\n"
        "providers:\n"
        "  mine:\n"
        "    base_url: http://h/v1\n"
    )
    assert [one[:2] for one in refused(text)] == [
        (4, "models.a.dimensions"),
        (4, "models.b.dimensions"),
        (10, "providers.mine.kind"),
    ]


def test_very_many_mistakes_are_counted(refused, tmp_path):
    """A wrong file of another program does not fill a screen many times."""
    file = tmp_path / "many.yaml"
    file.write_text("".join(f"key_of_number_{i}: 1\n" for i in range(200)))
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert len(caught.value.problems) == 51
    assert caught.value.problems[-1] == f"{file}: and 150 more mistakes"


@pytest.mark.parametrize("section", ["llm: {embedding: {model: m}}", "vector_store: {}"])
def test_an_older_configuration_is_led_to_its_converter(section, refused):
    """Its sections are known, and so is what to do with them."""
    ((line, _, message),) = refused(f"#\n{section}")
    assert line == 2
    assert "`embedding-proxy config convert FILE`" in message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: !!int ''", 2),
        ("a: 1\nb: !!timestamp x", 2),
        ("a: 1\nb:\n  - 2024-13-45", 3),
        ("a: 1\nb: !!float {}", 2),
        ("a: 1\nb: \x07", 2),
        ("a: 1\nb: [", 2),
        ("a: 1\nb: !!python/name:os.system", 2),
    ],
)
def test_what_yaml_cannot_read_has_a_line(text, line):
    """No way in which PyYAML fails is a traceback."""
    with pytest.raises(YamlError) as caught:
        yaml_file.parse(text)
    assert caught.value.line == line


@given(st.text(alphabet="ab12:-[]{}&*!<>|'\"#,?% \n\t~é", max_size=60))
def test_any_text_is_read_or_refused(text):
    """Whatever stands in a file, it is values, or a mistake of YAML with its line."""
    try:
        found = yaml_file.parse(text)
    except YamlError:
        return
    assert found.line_of(()) is None


KEYS = st.text(alphabet="abcxyz_", min_size=1, max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


def _paths(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for part, below in items:
        yield from _paths(below, (*path, part))


@given(st.dictionaries(KEYS, VALUES, max_size=5))
@example({"a": "\x85", "b": "x\u2028y", "c": "\u2029\n"})
def test_what_is_dumped_is_read_and_each_key_has_its_line(content):
    """Lines grow with the place in the file, and hold the key."""
    text = yaml_file.dump(content)
    found = yaml_file.parse(text)
    assert (found.content or {}) == content
    assert found.duplicates == ()
    lines = text.splitlines()
    before = 0
    for path in list(_paths(content))[1:]:
        line = found.line_of(path)
        assert line >= before
        before = line
        if isinstance(path[-1], str):
            assert path[-1] in lines[line - 1]


def test_each_copy_of_what_is_written_twice_is_validated(refused):
    """The mistakes of the first copy are told with its own lines; sections are put together."""
    text = (
        "providers:\n"
        "  mine: {kind: openai, base_url: 'http://h', api_key_env: MINE}\n"
        "models:\n"
        "  m: {space: s, dimensions: 0, routes: [{provider: mine, model: m}]}\n"
        "  m: {space: s, routes: [{provider: yours, model: m}]}\n"
        "providers:\n"
        "  yours: {kind: openai, timeout_s: soon}\n"
        "server: {port: x}\n"
        "server: {port: 1, host: 0.0.0.0}\n"
        "server: {keys: [a]}\n"
    )
    assert [one[:2] for one in refused(text)] == [
        (4, "models.m.dimensions"),
        (5, "models.m"),
        (6, "providers"),
        (7, "providers.yours.timeout_s"),
        (7, "providers.yours.api_key_env"),
        (8, "server.port"),
        (9, "server"),
        (10, "server"),
    ]


@pytest.mark.parametrize("broken", ["openai: {timeout_s: x}", "openai: 7", "openai: {kind: x}"])
def test_a_broken_provider_is_a_known_one(broken, refused):
    """It is listed where another name is unknown, and the name that is meant is offered."""
    text = f"providers: {{{broken}, mine: {{kind: ollama}}}}\n" + WRONG_ROUTE
    told = {key: message for _, key, message in refused(text)}
    assert told["models.m.routes.0.provider"] == (
        "there is no provider 'opnai'; known: local, mine, openai; did you mean openai?"
    )
    assert len(told) == 2


WRONG_ROUTE = "models: {m: {space: s, routes: [{provider: opnai, model: m}]}}"


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("providers: {opnai: {}}", "openai"),
        ("providers: {a: {kind: mistrl}}", "mistral"),
        ("models: {text-embedding-3-smal: {price: 1}}", "text-embedding-3-small"),
        (
            "models: {text-embedding-3-small: {fallback: text-embedding-3-lrge}}",
            "embedding-3-large",
        ),
        ("models: {text-embedding-3-small: {dimension_policy: padd}}", "pad"),
        ("passthrough: opnrouter", "openrouter"),
        (WRONG_ROUTE, "openai"),
    ],
)
def test_a_misspelt_name_is_corrected(text, near, refused):
    """Wherever a name must be a known one."""
    assert any(re.search(rf"did you mean \S*{near}\?", one) for *_, one in refused(text))


def test_what_is_wrong_beside_the_file_is_told_at_once_too(command, tmp_path, monkeypatch):
    """Keys that cannot be sent, a variable that names no proxy, and the proxy's own address."""
    file = tmp_path / "config.yaml"
    file.write_text(
        "server: {port: 18080}\n"
        "providers:\n"
        "  openai: {}\n"
        "  mistral: {}\n"
        "  mine: {kind: ollama, trust_env: true, base_url: 'https://h/v1'}\n"
        "  own:\n"
        "    kind: ollama\n"
        "    base_url: http://127.0.0.1:18080/v1\n"
    )
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    monkeypatch.setenv("MISTRAL_API_KEY", "'quoted-key'")
    monkeypatch.setenv("HTTPS_PROXY", "nowhere")
    done = command("serve", "--config", file)
    assert done.code == 2
    own, openai, mistral, mine = done.err.splitlines()
    assert f"{file}:8: providers.own.base_url: is the address that this proxy listens on" in own
    key = "api_key_env"
    assert f"{file}:3: providers.openai.{key}: OPENAI_API_KEY: its value is no key" in openai
    assert f"{file}:4: providers.mistral.{key}: MISTRAL_API_KEY: its value stands in" in mistral
    assert f"{file}:5: providers.mine.trust_env: the variable HTTPS_PROXY holds no address" in mine


async def test_what_shows_when_a_service_opens_is_told_with_its_line(tmp_path, monkeypatch):
    """Also in Python: a variable that names no proxy, a key that cannot be sent."""
    file = tmp_path / "config.yaml"
    file.write_text(
        "cache: {directory: ./store}\nproviders:\n"
        "  mine: {kind: ollama, trust_env: true, base_url: 'https://h/v1'}\n"
    )
    monkeypatch.setenv("HTTPS_PROXY", "nonsense")
    line = rf"^{re.escape(str(file))}:3: providers\.mine\.trust_env: the variable HTTPS_PROXY holds"
    with pytest.raises(ConfigError, match=line):
        async with EmbeddingService.from_config(file):
            pytest.fail("the service opened")
    file.write_text("cache: {directory: ./store}\nproviders:\n  mistral: {}\n")
    monkeypatch.setenv("MISTRAL_API_KEY", "'quoted-key'")
    line = (
        rf"^{re.escape(str(file))}:3: providers\.mistral\.api_key_env: MISTRAL_API_KEY: its value"
    )
    with pytest.raises(ConfigError, match=line):
        async with EmbeddingService.from_config(file):
            pytest.fail("the service opened")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("Host", "it is the host of base_url: set that, and remove this"),
        ("Authorization", "a key goes into api_key_env"),
        ("Content-Length", "the proxy sets it itself: remove it"),
    ],
)
def test_a_header_that_is_not_to_be_set_has_a_remedy_of_its_own(name, remedy, refused):
    """What to do instead differs: a key, the host, and what the transport says itself."""
    found = refused(f"providers:\n  openai: {{headers: {{{name}: x}}}}\n")
    path = f"providers.openai.headers.{name}"
    assert found == [(2, path, f"{name} is not to be set here; {remedy}")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *[(name, "unknown key; known here: ") for name in ("e5", "a4", "llm_2", "embeddings-v2")],
        ("text-embedding-3-small", "unknown key; put it below `models:`"),
        ("openrouter", "unknown key; put it below `providers:`"),
        *[(name, "unknown key; known here: ") for name in ("gpt4", "acme/bge-m3", "all-mpnet")],
    ],
)
def test_a_name_that_is_no_secret_is_shown(name, message, refused):
    """Somebody who forgot a section reads which line is meant."""
    ((line, key, told),) = refused(f"cache: {{}}\n{name}: {{}}\n")
    assert (line, key) == (2, name)
    assert told.startswith(message)


def _aliases(levels: int, each: int) -> str:
    deeper = (f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * each)}]" for i in range(1, levels + 1))
    return "\n".join(["a0: &a0 [x]", *deeper])


@pytest.mark.parametrize(
    "text",
    [
        _aliases(10, 9),
        _aliases(40, 2),
        "a0: &a0 {x: 1}\n"
        + "\n".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40)),
    ],
)
def test_aliases_that_stand_for_billions_of_values_are_refused(text):
    """They are counted, and not written out; the line is where they become too many."""
    with pytest.raises(YamlError, match="aliases repeat more than 100,000 values here") as caught:
        yaml_file.parse(text)
    assert 1 < caught.value.line < 20


def test_ordinary_aliases_are_read():
    """An anchor for what several entries share is what aliases are for; merge keys, too."""
    limits = "&limits {inputs: 10, tokens: 20}"
    others = "\n".join(f"p{i}: {{<<: *limits, tokens: {i}}}" for i in range(1000))
    content = yaml_file.parse(f"p: {limits}\n{others}").content
    assert content["p999"] == {"inputs": 10, "tokens": 999}
