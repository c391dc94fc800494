"""Paths of a configuration: relative to its file, expanded, and told as absolute ones."""

import os
from pathlib import Path

import pytest
from embedding_proxy.proxy.config.loader import ConfigError, load
from embedding_proxy.proxy.service.embedding_service import EmbeddingService

CA = Path(__file__).parents[1] / "data" / "tls" / "ca.pem"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Give a folder for a configuration; the working directory is another one."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", "/h")
    made = tmp_path / "made"
    made.mkdir()
    return made


def _written(folder, text):
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("store", "{folder}/store"),
        ("./store", "{folder}/store"),
        ("../store", "{folder.parent}/store"),
        (".", "{folder}"),
        ("/data/store", "/data/store"),
        ("~/store", "/h/store"),
        ("~", "/h"),
        ("$HOME/store", "/h/store"),
        ("${HOME}/store", "/h/store"),
        ("${NOWHERE_AT_ALL:-$HOME}/store", "/h/store"),
        ("data/$PART/x", "{folder}/data/part/x"),
        ("100$/x", "{folder}/100$/x"),
    ],
)
def test_a_path_is_below_the_folder_of_its_file(written, meant, folder, monkeypatch):
    """Wherever the command is started, and however the file is named, it is the same place."""
    monkeypatch.setenv("PART", "part")
    sections = f"cache: {{directory: '{written}'}}"
    if written != ".":
        sections += f"\nindex: {{qdrant: {{path: '{written}'}}}}"
    file = _written(folder, sections)
    expected = Path(meant.format(folder=folder.resolve()))
    for name in (file, Path(os.path.relpath(file))):
        settings = load(name)
        assert settings.cache.directory == expected
        assert settings.index.qdrant is None or settings.index.qdrant.path == expected


def test_a_linked_file_has_the_folder_of_its_link(folder, tmp_path):
    """As a mounted file of Kubernetes is a link into a folder whose name changes."""
    file = _written(folder, "cache: {directory: store}")
    link = tmp_path / "config.yaml"
    link.symlink_to(file)
    assert load(link).cache.directory == tmp_path / "store"


def test_every_path_of_a_configuration_is_relative_to_it(folder):
    """The CA of a provider, too: no key is left out."""
    (folder / "ca.pem").write_bytes(CA.read_bytes())
    text = "{providers: {openai: {ca_file: ca.pem}}, cache: {directory: c}}"
    settings = load(_written(folder, text))
    assert settings.providers["openai"].ca_file == folder / "ca.pem"
    assert settings.cache.directory == folder / "c"


@pytest.mark.parametrize("key", ["cache: {directory: X}", "index: {qdrant: {path: X}}"])
@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("''", "expected a "),
        ("'  '", "expected a "),
        ("$NOWHERE_AT_ALL/x", "the variable NOWHERE_AT_ALL is not set; set it, or write the path"),
        ("~nobody-of-that-name/x", "there is no such user: ~nobody-of-that-name"),
        ('"a\\0b"', "holds a NUL character"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(key, written, problem, folder):
    """Nothing that was meant to be a path becomes the working directory."""
    file = _written(folder, key.replace("X", written))
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}:1: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize("home", ["", "not/absolute"])
def test_a_home_that_is_none_is_refused(home, folder, monkeypatch):
    """The default folder would be a new one wherever the command is started."""
    monkeypatch.setenv("HOME", home)
    monkeypatch.delenv("XDG_DATA_HOME")
    for file in (None, _written(folder, "cache: {directory: ~/x}")):
        with pytest.raises(ConfigError, match=r"cache\.directory: HOME is no absolute path"):
            load(file)
    monkeypatch.setenv("XDG_DATA_HOME", "/d")
    assert load().cache.directory == Path("/d/embedding-proxy")


@pytest.mark.parametrize("text", ["server: {port: 1}", "cache: {directory: /d}"])
def test_a_file_in_no_folder_has_no_relative_paths(text, tmp_path):
    """Standard input and what a shell makes of `<(…)`: absolute paths are fine there."""
    for written, is_fine in ((text, True), ("cache: {directory: d}", False)):
        read, write = os.pipe()
        os.write(write, written.encode())
        os.close(write)
        try:
            if is_fine:
                load(Path(f"/dev/fd/{read}"))
            else:
                with pytest.raises(ConfigError, match="is a relative path, and this config"):
                    load(Path(f"/dev/fd/{read}"))
        finally:
            os.close(read)


def test_a_dash_names_the_file_of_standard_input():
    """There is no other way to say it, so that is told."""
    with pytest.raises(ConfigError, match="for standard input give /dev/stdin"):
        load(Path("-"))


async def test_a_start_from_elsewhere_finds_the_same_cache(folder, upstream, monkeypatch, tmp_path):
    """What was bought is not bought again, wherever the service is started."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    providers = f"providers: {{openai: {{base_url: '{upstream.url}'}}}}"
    file = _written(folder, f"cache: {{directory: store}}\n{providers}")
    for place, bought in ((folder, 1), (tmp_path, 0), (Path("/"), 0)):
        monkeypatch.chdir(place)
        before = len(upstream.calls)
        async with EmbeddingService.from_config(file) as service:
            await service.embed(["a text"], model="text-embedding-3-small")
        assert len(upstream.calls) - before == bought
    assert (folder / "store" / "v1").is_dir()


@pytest.mark.parametrize(
    "text",
    [
        "server: {keys: ['${NOWHERE_AT_ALL}', {key: '${NOWHERE_TOO}', name: n}], host: 0.0.0.0}",
        "providers: {openai: {headers: {X-Team: '${NOWHERE_AT_ALL}'}}}",
        "providers: {openai: {proxy: 'http://me:${NOWHERE_AT_ALL}@h:1'}}",
        "providers: {openai: {ca_file: /nowhere/at/all.pem}}",
    ],
)
def test_commands_that_open_no_port_do_without_what_is_for_others(text, folder, command, tmp_path):
    """The keys of clients, and what only providers are shown, do not stop a look at the cache."""
    file = _written(folder, f"cache: {{directory: store}}\n{text}")
    done = command("cache", "stats", "--config", file)
    assert (done.code, done.out) == (1, "")
    assert f"{folder}/store/v1: there is no store yet" in done.err
    assert command("config", "show", "--config", file).code == 0
    done = command("serve", "--port", "0", "--config", file)
    assert done.code == 2
    assert done.err.startswith(f"embedding-proxy: {file}:2: ")


def test_a_key_that_is_not_set_lets_nobody_in(folder):
    """In its place stands one that nobody knows, another one each time."""
    file = _written(folder, "server: {keys: ['${NOWHERE_AT_ALL}'], host: 0.0.0.0}")
    found = [load(file).server.keys[0].key for _ in range(2)]
    assert found[0] != found[1]
    assert all(len(key) >= 32 and "NOWHERE" not in key for key in found)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("$TEAM_KEY", "is the name of a variable, not expanded; write ${NAME}"),
        ("%TEAM_KEY%", "is the name of a variable, not expanded"),
        ("\u201cteam-key\u201d", "stands in quotes"),
        ("sk abc", "holds a blank"),
        ("Bearer team-key", "holds more than the key"),
        (" ", "holds nothing but blanks"),
    ],
)
def test_a_clients_key_that_nobody_can_send_is_refused(key, problem, folder, monkeypatch):
    """From the file and from a variable alike; the key is not shown."""
    monkeypatch.setenv("TEAM", key)
    for written in (key, "${TEAM}"):
        file = _written(folder, f"server: {{keys: ['{written}']}}")
        with pytest.raises(ConfigError) as caught:
            load(file)
        assert str(caught.value).startswith(f"{file}:1: server.keys.0.key: {problem}")
        assert "team-key" not in str(caught.value)


def test_a_clients_key_stands_there_once(folder):
    """Of two entries with one key only one could hold, with its namespace and its rights."""
    file = _written(folder, "server:\n  keys:\n  - {key: k, name: a}\n  - {key: k, admin: true}\n")
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}:4: server.keys.1.key: is the key of server.keys.0")


@pytest.mark.parametrize("place", ["/proc/nowhere", "file"])
def test_a_folder_that_cannot_be_made_is_said_in_words(place, folder, command):
    """The reason, and not the number of an error."""
    (folder / "file").write_text("")
    file = _written(folder, f"cache: {{directory: {place}}}\nserver: {{port: 0}}")
    done = command("serve", "--config", file)
    assert (done.code, done.out) == (1, "")
    assert "; name another cache.directory\n" in done.err
    assert "Errno" not in done.err
