"""Who is let in: the keys that clients send against those that are configured."""

import hashlib

import pytest
from embedding_proxy.proxy.config.schema import ClientKey
from embedding_proxy.proxy.http.auth import Authenticator
from embedding_proxy.proxy.service.request import Client

FIRST = ClientKey(key="first-key", name="the first")
SECOND = ClientKey(key="zweiter-schlüssel", namespace="team")
ACCESS = Authenticator([FIRST, SECOND])

MISSING = "You didn't provide an API key"
WRONG = "Incorrect API key provided"


@pytest.mark.parametrize("authorization", [None, "", "Bearer anything", "nonsense"])
def test_without_keys_everyone_comes_in(authorization):
    """A proxy with no keys asks for none."""
    assert Authenticator([]).admit(authorization) == Client("", "", is_admin=True)


@pytest.mark.parametrize(
    "authorization",
    [
        "Bearer first-key",
        "Bearer zweiter-schlüssel",
        "bearer first-key",
        "BEARER first-key",
        "Bearer   first-key ",
    ],
)
def test_any_of_the_keys_opens(authorization):
    """Each key opens, whatever the case of the scheme and the white space around."""
    namespace = "team" if "zweiter" in authorization else ""
    assert ACCESS.admit(authorization).namespace == namespace


def test_a_client_has_the_name_of_its_key_or_a_label():
    """A key without a name is told from others by a part of its digest, always the same."""
    assert ACCESS.admit("Bearer first-key") == Client("", "the first")
    named = ACCESS.admit("Bearer zweiter-schlüssel").client
    digest = hashlib.sha256("zweiter-schlüssel".encode()).hexdigest()
    assert named == f"key-{digest[:8]}"


@pytest.mark.parametrize(
    ("authorization", "message"),
    [
        (None, MISSING),
        ("", MISSING),
        ("Bearer", MISSING),
        ("Bearer ", MISSING),
        ("Bearer \t ", MISSING),
        ("first-key", MISSING),
        ("Basic first-key", MISSING),
        ("Token first-key", MISSING),
        (" Bearer first-key", MISSING),
        ("Bearer first-keyx", WRONG),
        ("Bearer first-ke", WRONG),
        ("Bearer First-key", WRONG),
        ("Bearer first-key zweiter-schlüssel", WRONG),
        ("Bearer first-key,zweiter-schlüssel", WRONG),
        ("Bearer Bearer first-key", WRONG),
        ("Bearer zweiter-schl\udcfcssel", WRONG),
        ("Bearer \udcff\udcfe", WRONG),
        ("Bearer 鍵", WRONG),
        ("Bearer \x00", WRONG),
    ],
)
def test_everything_else_is_a_401_that_repeats_no_key(authorization, message):
    """A missing, wrong or odd header gets OpenAI's 401, which does not show what was sent."""
    refusal = ACCESS.admit(authorization)
    assert refusal.message.startswith(message)
    assert (refusal.status, refusal.kind) == (401, "invalid_request_error")
    assert (refusal.param, refusal.code) == (None, "invalid_api_key")
    assert refusal.retry_after is None
    assert "first" not in refusal.message


def test_keys_are_not_kept():
    """What is kept of a key is a digest, so that no dump of the process shows it."""
    assert b"first-key" not in repr(vars(ACCESS)).encode()
    assert len(ACCESS._admissions) == 2


def test_white_space_around_a_configured_key_does_not_count():
    """A key read from a file often ends in a line break."""
    assert (
        Authenticator([ClientKey(key=" secret\n", namespace="a")]).admit("Bearer secret").namespace
        == "a"
    )
