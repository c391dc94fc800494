"""Addresses and keys that an operator mistypes: each mistake with file, key and remedy."""

import pytest
import yaml
from embedding_proxy.proxy.config.fields import base_url
from embedding_proxy.proxy.config.loader import ConfigError, load
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

SECRET = "sk-canary-0123456789"

WRONG = {
    "no scheme": ("api.openai.com/v1", "expected an address like https://host/v1"),
    "another scheme": ("ftp://h/v1", "expected an address like https://host/v1"),
    "nothing": ("", "expected an address like https://host/v1"),
    "a bracket left open": ("http://[::1/v1", "an IPv6 address is written http://[::1]:8000/v1"),
    "a bracket too many": ("http://::1]/v1", "an IPv6 address is written"),
    "IPv6 without brackets": ("http://fe80::1:8000/v1", "an IPv6 address is written"),
    "no IPv6 address": ("http://[host]/v1", "an IPv6 address is written"),
    "a word behind the bracket": ("http://[::1]x/v1", "an IPv6 address is written"),
    "a port too large": ("http://host:99999", "its port is no number from 1 to 65535"),
    "a port of no number": ("https://api.openai.com:x/v1", "its port is no number from 1 to"),
    "an empty port": ("http://host:/v1", "its port is no number from 1 to 65535"),
    "port zero": ("http://host:0/v1", "its port is no number from 1 to 65535"),
    "a negative port": ("http://host:-1/v1", "its port is no number from 1 to 65535"),
    "a space in the host": ("http://my host/v1", "without spaces, line breaks and backslashes"),
    "a space at the end": ("http://host/v1 ", "without spaces, line breaks and backslashes"),
    "a line break": ("http://host/v1\n", "without spaces, line breaks and backslashes"),
    "backslashes": ("http:\\\\host\\v1", "expected an address like https://host/v1"),
    "no host": ("https:///v1", "its host is missing"),
    "a port alone": ("http://:8080/v1", "its host is missing"),
    "quotes": ("http://'host'/v1", "its host holds a sign that no host name has"),
    "two hosts": ("http://a,b/v1", "its host holds a sign that no host name has"),
    "credentials": (f"https://user:{SECRET}@h/v1", "without user and password; a key goes into"),
    "a user": (f"https://{SECRET}@h/v1", "without user and password"),
    "a query": (f"https://h/v1?key={SECRET}", "without a query string"),
    "a query at once": ("https://h?x", "without a query string"),
    "Azure's version": ("https://h/openai?api-version=2024-10-21", "options: {api_version: …}"),
    "a fragment": ("https://h/v1#x", "without a fragment"),
    "an endpoint": ("https://h/v1/embeddings", "ends in /embeddings, which is probably a mistake"),
    "another endpoint": (
        "https://h/v1/chat/completions/",
        "ends in /chat/completions, which is probably a mistake",
    ),
    "an endpoint of Azure's": (
        "https://h/openai/deployments/d/embeddings?api-version=1",
        "ends in /embeddings, which is probably a mistake",
    ),
}


def _written(tmp_path, **sections):
    file = tmp_path / "config.yaml"
    cache = {"directory": str(tmp_path / "cache")}
    file.write_text(yaml.safe_dump({"cache": cache, **sections}))
    return file


@pytest.mark.parametrize(("address", "remedy"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("passthrough", [None, "mine"])
def test_a_base_url_that_leads_nowhere_is_refused(address, remedy, passthrough, tmp_path, command):
    """One line on stderr, whoever is to be reached there; no value is shown, it may hold a key."""
    providers = {"mine": {"kind": "openai_compatible", "base_url": address}}
    file = _written(tmp_path, providers=providers, passthrough=passthrough)
    done = command("check", "--config", file)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"embedding-proxy: {file}:6: providers.mine.base_url: ")
    assert remedy in done.err
    assert done.err.count("\n") == 1
    assert SECRET not in done.err


@pytest.mark.parametrize(
    "address",
    [
        "https://api.openai.com/v1",
        "http://127.0.0.1:1",
        "http://[::1]:65535/v1/",
        "http://[fe80::1]/v1",
        "HTTPS://Host.example./a%20b/v1",
        "http://under_score:8000",
        "http://bücher.example/v1",
        "https://h/embeddings/v1",
        "https://h/my-embeddings",
        "https://h/v1beta/openai",
    ],
)
def test_an_address_that_may_be_one_is_taken(address):
    """Nothing is changed in it."""
    assert base_url(address) == address


@given(st.text(alphabet="htps:/[]@.?#%\\ 1a-é\n", max_size=20).map("http://".__add__))
def test_what_is_taken_has_a_host_and_a_port(address):
    """Whatever is written, it is refused with a ValueError, or leads somewhere."""
    try:
        taken = URL(base_url(address))
    except ValueError:
        return
    assert taken.host
    assert 1 <= taken.port <= 65535


def test_qdrants_address_is_checked_as_well(tmp_path):
    """The same mistakes get the same words."""
    file = _written(tmp_path, index={"qdrant": {"url": "http://host:99999"}})
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}:5: index.qdrant.url: expected an address")
    assert "its port is no number" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "mistake"),
    [
        (f"'{SECRET}'", "its value stands in quotes; set it without them"),
        (f'"{SECRET}"', "its value stands in quotes; set it without them"),
        (f'{SECRET}"', "its value stands in quotes; set it without them"),
        (f"Bearer {SECRET}", "its value begins with `Bearer`; set the key alone"),
        (f"bearer {SECRET}", "its value begins with `bearer`; set the key alone"),
        (f"Authorization: Bearer {SECRET}", "its value begins with `Authorization:`; set"),
        (f"OPENAI_API_KEY={SECRET}", "its value begins with OPENAI_API_KEY= itself; set what"),
        (f"export OPENAI_API_KEY={SECRET}", "its value begins with `export`; set the key alone"),
        ("$MY_KEY", "its value is the name of another variable, not expanded"),
        ("${MY_KEY}", "its value is the name of another variable, not expanded"),
        (f"{SECRET}\nx", "its value is no key: it holds a line break or the like"),
        (f"\u201c{SECRET}\u201d", "its value stands in quotes; set it without them"),
        (f"\u201e{SECRET}", "its value stands in quotes; set it without them"),
        (f"{SECRET}\u2019", "its value stands in quotes; set it without them"),
        (f"{SECRET} abc", "its value is no key: it holds a blank; set the key alone"),
        (f"{SECRET}\u00a0abc", "its value is no key: it holds a character that is not ASCII"),
    ],
)
@pytest.mark.parametrize("name", ["check", "serve"])
def test_a_key_that_is_mistyped_is_named_by_its_variable(  # noqa: PLR0917
    value, mistake, name, tmp_path, command, monkeypatch
):
    """What is probably wrong is said; the key is not shown."""
    monkeypatch.setenv("OPENAI_API_KEY", value)
    providers = {"openai": {"base_url": "http://127.0.0.1:1/v1"}, "local": None}
    file = _written(tmp_path, providers=providers, server={"port": 0})
    done = command(name, "--config", file)
    assert (done.code, done.out) == (2, "")
    assert f"OPENAI_API_KEY: {mistake}" in done.err
    assert SECRET not in done.err
