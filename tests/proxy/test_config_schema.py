"""`config schema` and `config init`: what an editor, and somebody who begins, is given."""

import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from embedding_proxy.proxy.cli.config import STARTER
from embedding_proxy.proxy.config import json_schema
from embedding_proxy.proxy.config.loader import load
from embedding_proxy.proxy.config.schema import Settings
from pages import fenced

ROOT = Path(__file__).parents[2]
SNIPPETS = [
    pytest.param(snippet, id=f"{page.stem}-{number}")
    for page in sorted((ROOT / "docs").glob("*.md"))
    for number, snippet in enumerate(fenced(page.read_text(encoding="utf-8"), "yaml"))
    # Others are the configurations of other programs.
    if yaml.safe_load(snippet).keys() <= Settings.model_fields.keys()
]
SCHEMA = json_schema.build()
FILES = [*(ROOT / "deploy").rglob("config.yaml"), ROOT / "config.yaml"]


def _mistakes(content):
    found = jsonschema.Draft202012Validator(SCHEMA).iter_errors(content)
    return [f"{error.json_path}: {error.message}" for error in found]


def test_it_takes_an_address_in_place_of_a_section():
    """As the configuration does."""
    assert _mistakes({"cache": {"shared": "redis://localhost"}}) == []


def test_it_is_a_schema():
    """By the rules for schemas."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_it_takes_every_configuration_of_the_pages(snippet):
    """References to variables and short forms included."""
    assert _mistakes(yaml.safe_load(snippet)) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_it_takes_every_configuration_file(file):
    """The built-in one among them."""
    assert _mistakes(yaml.safe_load(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "content",
    [
        {"sever": {}},
        {"server": {"prot": 8080}},
        {"server": {"port": "many"}},
        {"cache": {"mode": "frosen"}},
        {"cache": {"size_limit_gib": -1}},
        {"providers": {"openai": {"base": "x"}}},
        {"models": {"m": {"routes": [{"provider": "openai", "modle": "x"}]}}},
        {"log": []},
    ],
)
def test_it_refuses_what_the_proxy_refuses(content):
    """Unknown keys, and values of another type or range."""
    assert _mistakes(content)


def test_keys_are_described_by_the_comments_of_the_built_in_file():
    """Nearly all of them; those that explain themselves have no comment."""
    definitions = SCHEMA["$defs"]
    port = definitions["Server"]["properties"]["port"]
    assert port["description"] == "0 = any free port; the start prints it"
    frozen = definitions["Cache"]["properties"]["mode"]["description"]
    assert "frozen: nothing is bought" in frozen
    assert "all is bought, nothing is read or stored" in frozen
    keys = definitions["Server"]["properties"]["keys"]["description"]
    assert keys.startswith("Keys that clients must send.")
    described = sum("description" in key for key in definitions["Server"]["properties"].values())
    assert described >= len(Settings.model_fields["server"].annotation.model_fields) - 4
    assert "Every other /v1 call" in SCHEMA["properties"]["passthrough"]["description"]


def test_a_new_configuration_is_valid_and_used(command, tmp_path, monkeypatch):
    """It is found in its folder, and changes nothing but what it says."""
    monkeypatch.chdir(tmp_path)
    done = command("config", "init")
    assert done.code == 0
    assert done.out == (
        "embedding-proxy.yaml is written; test it: embedding-proxy check --offline\n"
    )
    content = yaml.safe_load(Path("embedding-proxy.yaml").read_text())
    assert _mistakes(content) == []
    assert load(Path("embedding-proxy.yaml")).server == load().server
    shown = command("config", "show")
    assert "# What applies with embedding-proxy.yaml" in shown.out
    again = command("config", "init")
    assert (again.code, "exists; it is not overwritten" in again.err) == (1, True)


def test_a_new_configuration_names_keys_that_exist(tmp_path):
    """Also where it only shows them, in comments."""
    file = tmp_path / "embedding-proxy.yaml"
    lines = STARTER.splitlines()
    begin = lines.index("server:")
    uncommented = [re.sub("^( *)# ", r"\1", line) for line in lines[begin:]]
    file.write_text("\n".join(uncommented).replace("${PROXY_KEY}", "a-key-for-clients"))
    settings = load(file)
    assert settings.server.keys[0].key == "a-key-for-clients"
    assert set(settings.providers) == {"openai", "openrouter", "local"}
    assert settings.cache.directory == tmp_path / "embeddings"


def test_the_schema_is_printed(command):
    """As JSON."""
    assert command("config", "schema").json == SCHEMA


def test_the_file_is_found(command, tmp_path, monkeypatch):
    """Named by the variable; else in the working directory; else the user's; else built in."""
    here, users, named = (tmp_path / name for name in ("here", "xdg", "named.yaml"))
    here.mkdir()
    (users / "embedding-proxy").mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(users))

    def port():
        return command("config", "show", "--json").json["settings"]["server"]["port"]

    assert port() == 8080
    (users / "embedding-proxy" / "config.yaml").write_text("server: {port: 1}")
    assert port() == 1
    Path("embedding-proxy.yaml").write_text("server: {port: 2}")
    assert port() == 2
    named.write_text("server: {port: 3}")
    monkeypatch.setenv("EMBEDDING_PROXY_CONFIG", str(named))
    assert port() == 3
    (tmp_path / "option.yaml").write_text("server: {port: 4}")
    done = command("config", "show", "--json", "-c", tmp_path / "option.yaml")
    assert done.json["settings"]["server"]["port"] == 4
    named.unlink()
    done = command("config", "show")
    assert (done.code, str(named) in done.err) == (2, True)


def test_keys_are_replaced_on_the_command_line(command, tmp_path):
    """As YAML reads their values; mistakes are those of the command line."""
    file = tmp_path / "config.yaml"
    file.write_text("cache: {mode: refresh, ttl_days: 3}")
    options = ("--set", "cache.mode=off", "--set", "server.cors=[https://a.example]")
    model = ("--set", 'models."text-embedding-3-small".price=0.5')
    done = command("config", "show", "--json", "--config", file, *options, *model)
    settings = done.json["settings"]
    assert (settings["cache"]["mode"], settings["cache"]["ttl_days"]) == ("off", 3)
    assert settings["server"]["cors"] == ["https://a.example"]


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("cache.mod=off", "the command line: cache.mod: "),
        ("server.port=x", "the command line: server.port: "),
        ("cache.mode", "--set: expected a key and a value, as in cache.mode=frozen"),
        ("=1", "--set: expected a key and a value"),
        ("cache..mode=off", "--set: expected a key and a value"),
        ("server.cors=[", "--set server.cors: "),
        ("server.port.x=1", "the command line: server.port: "),
        ("logs.level=debug", "the command line: logs: "),
        ("passthrough=7", "the command line: passthrough: "),
    ],
)
def test_a_wrong_replacement_is_named(command, setting, problem):
    """With the key, as a mistake of a file is with its line."""
    done = command("config", "show", "--set", setting)
    assert (done.code, problem in done.err) == (2, True), done.err


@pytest.mark.parametrize("words", [["-h"], ["cache", "-h"], ["cache", "stats", "-h"]])
def test_help_has_a_short_name(command, words):
    """At every level."""
    assert command(*words).out == command(*words[:-1], "--help").out


def test_the_version_has_a_short_name(command):
    """As most programs have."""
    assert command("-V").out == command("--version").out
