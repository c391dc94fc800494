"""Reading a configuration: what may be written, and how each mistake is named."""

import re
from pathlib import Path

import pytest
from embedding_proxy.proxy.config import loader
from embedding_proxy.proxy.config.loader import ConfigError, load

CANARY = "sk-canary-0123456789"

TWO_WIDTHS = """
models:
  m: &m {space: s, dimensions: 3, routes: &r [{provider: local, model: m}]}
  also: *m
  n: {space: s, dimensions: 4, routes: *r}
"""
TWO_NATURES = """
models:
  baai/bge-m3: {matryoshka: true}
  m: {space: baai/bge-m3, dimensions: 1024, routes: [{provider: openai, model: m}]}
"""

# What is written, the key that must be named (or the place), and the remedy that must be offered.
MISTAKES = {
    "unknown section": ("sevrer: {}", "sevrer", "did you mean server?"),
    "unknown key": ("server: {prot: 1}", "server.prot", "did you mean port?"),
    "unknown key in a provider": (
        "providers: {openai: {bas_url: x}}",
        "providers.openai.bas_url",
        "did you mean base_url?",
    ),
    "unknown key in a model": (
        "models: {text-embedding-3-small: {dimension: 3}}",
        "models.text-embedding-3-small.dimension",
        "did you mean dimensions?",
    ),
    "unknown key in a route": (
        "models: {wordllama-embed: {routes: [{provider: local, model: m, modle: n}]}}",
        "models.wordllama-embed.routes.0.modle",
        "did you mean model?",
    ),
    "unknown key like no other": (
        "index: {zzz: 1}",
        "index.zzz",
        "unknown key; known here: qdrant",
    ),
    "qdrant is nowhere": ("index: {qdrant: {}}", "index.qdrant", "either url"),
    "qdrant is in two places": (
        "index: {qdrant: {url: 'http://h', path: /x}}",
        "index.qdrant",
        "either url",
    ),
    "qdrant is no address": ("index: {qdrant: {url: h}}", "index.qdrant.url", "https://host"),
    "qdrant is no folder": ("index: {qdrant: {path: .}}", "index.qdrant.path", "a folder"),
    "a folder has no key": (
        "index: {qdrant: {path: /x, api_key_env: K}}",
        "index.qdrant.api_key_env",
        "a folder has no key",
    ),
    "a name that qdrant refuses": (
        "index: {qdrant: {url: 'http://h', collection: a/b}}",
        "index.qdrant.collection",
        "cannot hold '/'",
    ),
    "batches too large": (
        "index: {qdrant: {url: 'http://h', batch_mib: 5}}",
        "index.qdrant.batch_mib",
        "4.5",
    ),
    "section is a text": ("server: x", "server", "expected keys with values below it"),
    "section is a list": ("cache: []", "cache", "expected keys with values below it"),
    "providers are a list": ("providers: [openai]", "providers", "expected keys with values below"),
    "models are a list": ("models: [m]", "models", "expected keys with values below it"),
    "a model is nothing": ("models: {m: null}", "models.m", "expected keys with values below it"),
    "key name is a number": (
        "models: {1: {space: s, routes: [{provider: local, model: m}]}}",
        "models.1",
        "expected a string; put it in quotes",
    ),
    "text for a whole number": ("server: {port: 80a}", "server.port", "expected a whole number"),
    "fraction for a whole number": (
        "server: {port: 1.5}",
        "server.port",
        "expected a whole number",
    ),
    "list for a whole number": ("server: {port: []}", "server.port", "expected a whole number"),
    "yes for a number": ("server: {port: true}", "server.port", "expected a number"),
    "text for a number": ("cache: {memory_mib: x}", "cache.memory_mib", "expected a number"),
    "list for a number": ("cache: {memory_mib: []}", "cache.memory_mib", "expected a number"),
    "not a number": ("server: {max_body_mib: .nan}", "server.max_body_mib", "a finite number"),
    "number for a text": ("server: {host: 127}", "server.host", "expected a string; put it in"),
    "number for a path": ("cache: {directory: 3}", "cache.directory", "expected a path"),
    "number for a yes": (
        "models: {wordllama-embed: {matryoshka: 7}}",
        "models.wordllama-embed.matryoshka",
        "expected true or false",
    ),
    "list for a yes": (
        "models: {wordllama-embed: {matryoshka: []}}",
        "models.wordllama-embed.matryoshka",
        "expected true or false",
    ),
    "text for a list": ("server: {keys: abc}", "server.keys", "expected a list"),
    "empty text": ("server: {host: ''}", "server.host", "expected something, not an empty string"),
    "empty list": (
        "models: {wordllama-embed: {routes: []}}",
        "models.wordllama-embed.routes",
        "expected at least one entry",
    ),
    "too large": ("server: {port: 65536}", "server.port", "less than or equal to 65535"),
    "too small": ("cache: {memory_mib: -1}", "cache.memory_mib", "greater than or equal to 0"),
    "zero time": ("providers: {openai: {timeout_s: 0}}", "providers.openai.timeout_s", "than 0"),
    "more workers than there may be": ("server: {workers: 65}", "server.workers", "equal to 64"),
    "no mode": (
        "cache: {mode: on}",
        "cache.mode",
        "'normal', 'frozen', 'refresh' or 'off'",
    ),
    "feature of a later version": (
        "cache: {shared: 'redis://h'}",
        "cache.shared",
        "expected null; this version has nothing else",
    ),
    "missing kind": (
        "providers: {mine: {base_url: 'http://h'}}",
        "providers.mine.kind",
        "is missing; add it",
    ),
    "missing space": (
        "models: {m: {dimensions: 3, routes: [{provider: local, model: m}]}}",
        "models.m.space",
        "is missing; add it",
    ),
    "provider with a space in its name": (
        "providers: {my own: {kind: openai}}",
        "providers.my own",
        "expected a name of letters, digits and the like",
    ),
    "unknown kind": (
        "providers: {a: {kind: opnai}}",
        "providers.a.kind",
        "expected one of azure, cohere, dashscope",
    ),
    "address of another scheme": (
        "providers: {openai: {base_url: 'ftp://h'}}",
        "providers.openai.base_url",
        "expected an address like https://host/v1",
    ),
    "key in the file": (
        "providers: {openai: {api_key: abc}}",
        "providers.openai.api_key",
        "name its variable in api_key_env",
    ),
    "route to nowhere": (
        "models: {m: {space: x, dimensions: 3, routes: [{provider: opnai, model: m}]}}",
        "models.m.routes.0.provider",
        "no provider 'opnai'; known: local, openai, openrouter",
    ),
    "two widths in one space": (
        TWO_WIDTHS,
        "models.n.dimensions",
        "4 here, but 3 in models.m, of the same space s; make them equal",
    ),
    "two natures in one space": (
        TWO_NATURES,
        "models.m.matryoshka",
        "or give this model a space of its own",
    ),
    "passed to nobody": (
        "passthrough: opnai",
        "passthrough",
        "there is no such provider to pass calls to; known: openai, openrouter; null = nobody",
    ),
    "passed to a provider that was removed": (
        "passthrough: openai\nproviders: {openai: null}",
        "passthrough",
        "known: none; null = nobody",
    ),
    "passed to the local model": ("passthrough: local", "passthrough", "no such provider"),
    "passed with a key of nobody": (
        "passthrough_auth: both",
        "passthrough_auth",
        "expected 'provider' or 'client'",
    ),
    "an origin that is an address": (
        "server: {cors: [a://b, 'https://app.example/']}",
        "server.cors.1",
        "expected an origin like https://app.example.com, or *",
    ),
    "open to a network": (
        "server: {host: 0.0.0.0}",
        "server.host",
        "set server.keys, or host 127.0.0.1",
    ),
    "open to a network, by name": (
        "server: {host: h.example}",
        "server.host",
        "set server.keys, or",
    ),
    "variable not set": (
        "server: {keys: [a, 'x${EMBEDDING_PROXY_NOWHERE}']}",
        "server.keys.1",
        "set it, or write ${EMBEDDING_PROXY_NOWHERE:-default}",
    ),
    "key written twice": (
        "server:\n  port: 1\n  port: 2\n",
        "server.port",
        "is written twice, first in line 2; remove one",
    ),
    "key written twice, deep": (
        "providers:\n  local: {kind: local}\n  local: null\n",
        "providers.local",
        "is written twice, first in line 2; remove one",
    ),
    "bracket not closed": ("server: {keys: [a}", "", "correct the YAML there"),
    "tab for indentation": ("server:\n\thost: h\n", "", "cannot start any token"),
    "code in a tag": (
        "server: !!python/object/apply:os.getcwd []",
        "",
        "could not determine a constructor for the tag",
    ),
    "list as a key": ("server:\n  [a]: 1\n", "", "found unhashable key"),
}


def _written(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "config.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def _refused(file: Path | None, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file, **options)
    return str(caught.value)


@pytest.mark.parametrize(("text", "key", "remedy"), MISTAKES.values(), ids=MISTAKES)
def test_each_mistake_is_one_line_with_file_key_and_remedy(text, key, remedy, tmp_path):
    """A mistake of any kind is told in one line: the file, the key, and what to write instead."""
    file = _written(tmp_path, text)
    message = _refused(file, purpose="serve")
    assert re.match(rf"{re.escape(str(file))}:\d+: {re.escape(key)}{': ' if key else ''}", message)
    assert remedy in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"server: {host: \xff}", ": is not UTF-8 text; save it as UTF-8"),
        (b"#\nserver: \x07", ":2: is not valid YAML; correct the YAML there"),
        (b"- server", ": expected keys such as `server:`, found something else"),
        (b"server", ": expected keys such as `server:`, found something else"),
        (b"false", ": expected keys such as `server:`, found something else"),
        (b"{}\n---\n{}\n", ":2: but found another document; correct the YAML there"),
    ],
)
def test_a_file_that_holds_no_configuration_is_named(content, problem, tmp_path):
    """A file that cannot be understood as a whole is named, with the reason, in one line."""
    file = _written(tmp_path, content)
    assert _refused(file) == f"{file}{problem}"


@pytest.mark.parametrize(
    ("name", "problem"), [("nothing.yaml", "No such file or directory"), (".", "Is a directory")]
)
def test_a_file_that_cannot_be_read_is_named(name, problem, tmp_path):
    """A path that leads to no file is named, with the system's reason."""
    file = tmp_path / name
    assert _refused(file) == f"{file}: cannot be read: {problem}"


@pytest.mark.parametrize(
    "text",
    [
        f"server: {{keys: {CANARY}}}",
        f"server: {{keys: [[{CANARY}]]}}",
        f"server: {{keys: {{{CANARY}: null}}}}",
        f"server: {{keys: [{CANARY}], prot: 1}}",
        f"server: {{keys: [{CANARY}, '']}}",
        f"server: {{keys: [{CANARY}}}",
        f"server: {{keys: [{CANARY}]: {CANARY}}}",
        f"server: {{port: {CANARY}}}",
        f"server: {{port: '${{EMBEDDING_PROXY_NOWHERE:-{CANARY}}}'}}",
        "server: {port: '${EMBEDDING_PROXY_CANARY}'}",
        "server: {keys: '${EMBEDDING_PROXY_CANARY}'}",
        f"providers: {{openai: {CANARY}}}",
        f"providers: {{openai: {{api_key: {CANARY}}}}}",
        f"providers: {{openai: {{api_key_env: [{CANARY}]}}}}",
        f"providers: {{openai: {{base_url: 'https://user:{CANARY}@h/v1'}}}}",
        f"providers: {{openai: {{base_url: 'https://h/v1?key={CANARY}'}}}}",
        f"providers: {{openai: {{kind: {CANARY}}}}}",
        f"providers: {{openai: {{timeout_s: {CANARY}}}}}",
        f"cache: {{shared: 'redis://:{CANARY}@h'}}",
        f"index: {{qdrant: {{api_key: {CANARY}}}}}",
        f"passthrough: [{CANARY}]",
        f"passthrough: {CANARY}",
        f"server: {{cors: {CANARY}}}",
    ],
)
def test_no_error_repeats_a_value_that_may_be_a_key(text, tmp_path, monkeypatch):
    """Wherever a key is pasted by mistake, the error does not show it."""
    monkeypatch.setenv("EMBEDDING_PROXY_CANARY", CANARY)
    assert CANARY not in _refused(_written(tmp_path, text))


@pytest.mark.parametrize("text", ["", "# only a remark\n", "{}", "\ufeff{}", "server:\ncache:\n"])
def test_what_is_not_said_has_its_default(text, tmp_path):
    """An empty file, and sections with nothing below them, mean the defaults."""
    assert load(_written(tmp_path, text)) == load(_written(tmp_path, "{}"))


@pytest.mark.parametrize(
    ("text", "variable", "host"),
    [
        ("${PROXY_HOST}", "127.0.0.9", "127.0.0.9"),
        ("127.0.0.${PROXY_HOST}", "7", "127.0.0.7"),
        ("${PROXY_HOST:-127.0.0.2}", "127.0.0.9", "127.0.0.9"),
        ("${PROXY_HOST:-127.0.0.2}", None, "127.0.0.2"),
        ("${PROXY_HOST:-127.0.0.2}", "", "127.0.0.2"),
        ("127.${PROXY_HOST:-0.0}.${PROXY_HOST:-3}", None, "127.0.0.3"),
        ("127.0.0.1${PROXY_HOST:-}", None, "127.0.0.1"),
    ],
)
def test_variables_are_put_in_place(text, variable, host, tmp_path, monkeypatch):
    """${NAME} and ${NAME:-default} stand for the environment's value; empty counts as unset."""
    monkeypatch.delenv("PROXY_HOST", raising=False)
    if variable is not None:
        monkeypatch.setenv("PROXY_HOST", variable)
    assert load(_written(tmp_path, f"server: {{host: '{text}'}}")).server.host == host


def test_an_empty_variable_without_a_default_counts_as_unset(tmp_path, monkeypatch):
    """${NAME} of an empty variable is refused, so that a key cannot be empty by accident."""
    monkeypatch.setenv("PROXY_KEY", "")
    message = _refused(_written(tmp_path, "server: {keys: ['${PROXY_KEY}']}"), purpose="serve")
    assert "server.keys.0: the variable PROXY_KEY is not set" in message


def test_a_variable_gives_any_type_and_is_read_once(tmp_path, monkeypatch):
    """A variable may hold a number; what it holds is not searched for variables again."""
    monkeypatch.setenv("PROXY_PORT", "8123")
    monkeypatch.setenv("PROXY_KEY", "${PROXY_PORT}")
    text = "server: {port: '${PROXY_PORT}', keys: ['${PROXY_KEY}'], max_body_mib: 2}"
    server = load(_written(tmp_path, text)).server
    assert (server.port, server.max_body_mib) == (8123, 2)
    assert [(key.key, key.namespace) for key in server.keys] == [("${PROXY_PORT}", "")]


@pytest.mark.parametrize("text", ["", "server:", "server: {port: 1, host: localhost}"])
def test_overrides_replace_keys_of_the_server(text, tmp_path):
    """What the command line says counts more than the file, key by key."""
    server = load(
        _written(tmp_path, text), overrides={("server", "port"): 9, ("server", "host"): "127.0.0.5"}
    ).server
    assert (server.port, server.host, server.workers) == (9, "127.0.0.5", 1)


def test_overrides_are_checked_like_the_file(tmp_path):
    """An option out of range is refused, and so is a server section that holds no keys."""
    file = _written(tmp_path, "{}")
    assert _refused(file, overrides={("server", "port"): -1}).startswith(
        "the command line: server.port: "
    )
    assert _refused(_written(tmp_path, "server: x"), overrides={("server", "port"): 1}).startswith(
        f"{file}:1: server: expected keys"
    )


def test_without_a_file_the_built_in_one_applies(monkeypatch, tmp_path):
    """No file means the file at the root of the repository, but for XDG_DATA_HOME."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    settings = load()
    shipped = load(Path(loader.__file__).parents[2] / "config.yaml")
    assert settings.cache.directory == tmp_path / "embedding-proxy"
    same = {"cache": settings.cache, "providers": settings.providers}
    assert settings == shipped.model_copy(update=same)
    assert _profiles(settings) == _profiles(shipped)


def _profiles(settings):
    """Return what providers are asked with."""
    named = settings.providers.items()
    return {name: one.kind != "local" and one.as_profile() for name, one in named}


def test_an_installation_reads_the_copy_beside_the_package(monkeypatch, tmp_path):
    """The wheel carries config.yaml inside the package, and that copy comes first."""
    package = tmp_path / "proxy"
    package.mkdir()
    (tmp_path / "config.yaml").write_text("{cache: {directory: x}, server: {port: 1}}")
    monkeypatch.setattr(loader, "__file__", str(package / "config" / "loader.py"))
    assert load().server.port == 1
    (package / "config.yaml").write_text("{cache: {directory: x}, server: {port: 2}}")
    assert load().server.port == 2


@pytest.mark.parametrize(
    "text",
    [
        "server: {host: 2024-13-45}",
        "server: {port: !!int abc}",
        "server: {port: !!float abc}",
        "server: {port: !!bool abc}",
        "server: {port: 1" + "0" * 5000 + "}",
        "server: &a {host: *a}",
        "models: &a [*a]",
        "server: " + "[" * 1000,
        "cache: {directory: ~nobody-of-that-name/x}",
        "server: {max_body_mib: 1e308}",
        "cache: {size_limit_gib: 1e300}",
        "cache: {memory_mib: 1e308}",
        'cache: {directory: "a\\0b"}',
        "providers: {openai: {api_key_env: sk-canary-0123456789}}",
        "providers: {mine: {kind: openai, base_url: 'http://h'}}",
        '"a\\nb": 1',
        'models: {"a\\nb": {}}',
        'providers: {"a\\nb": {}}',
        'server: {host: "0.0.0.0\\nx"}',
    ],
    ids=lambda text: text[:40],
)
def test_even_odd_mistakes_are_whole_lines_and_show_no_key(text, tmp_path):
    """Whatever YAML makes of it, and wherever a key was pasted, each line names the file."""
    message = _refused(_written(tmp_path, text))
    lines = message.splitlines()
    assert all(line.startswith(f"{tmp_path / 'config.yaml'}:") for line in lines)
    assert "canary" not in message


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("providers: {mine: {knid: openai}}", "providers.mine.knid"),
        (
            "models: {m: {spce: s, dimensions: 3, routes: [{provider: local, model: m}]}}",
            "models.m.spce",
        ),
        (
            "models: {m: {space: s, dimensions: 3, routes: [{provder: local, model: m}]}}",
            "models.m.routes.0.provder",
        ),
    ],
)
def test_a_misspelt_required_key_is_named(text, key, tmp_path):
    """The key that is there and unknown says more than the one that is missing for it."""
    assert f"{key}: unknown key; did you mean" in _refused(_written(tmp_path, text))


def test_merge_keys_work(tmp_path):
    """An entry may take over another's keys as YAML lets it."""
    text = (
        "models:\n  m: &m {space: s, dimensions: 3, routes: [{provider: local, model: m}]}\n"
        "  n: {<<: *m, price: 2}\n"
    )
    assert load(_written(tmp_path, text)).models["n"].price == 2
