"""A key is taken out of what an upstream said, in a time that grows with the text alone."""

import pytest
from embedding_proxy.providers.client_credential import Credential
from embedding_proxy.providers.redaction import Redactor

KEY = "sk-anne-0123456789"
MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    "piece",
    [b"a", b"*", b"**a", b"a.", b"a..", b"ab...", b"-", b"'", b'"', b" *** ", b"sk-anne-", b"\xc3"],
)
def test_a_megabyte_is_read_in_linear_time(piece):
    """A quadratic reader takes hours for one of these: it would be tried anew at each character."""
    text = piece * (MEGABYTE // len(piece))
    told = Credential(KEY, "key-1").redacted(text + b" " + KEY.encode() + b".")
    assert b"0123456789" not in told
    assert b"0123456789" not in Redactor(KEY).redact(text + b" " + KEY.encode())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"no key at all", b"no key at all"),
        (b"a**b and a***b", b"a**b and ***"),
        (b"sk-ab...yz, and so on...", b"***, and so on..."),
        (b"(sk-ab...yz)", b"(***)"),
        (b"***", b"***"),
        (b"x****y z", b"*** z"),
        (b"sk-anne-...", b"***"),
    ],
)
def test_masked_keys_are_taken_out_whole(text, told):
    """As vendors show a key without telling it; two stars, or three points at an end, are none."""
    assert Credential(KEY, "key-1").redacted(text) == told
