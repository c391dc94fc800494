"""Which of two limits is the one to wait for."""

import pytest

from providers.ratelimit import reset_after

REQUESTS, TOKENS = "x-ratelimit-reset-requests", "x-ratelimit-reset-tokens"


@pytest.mark.parametrize(
    ("headers", "kind", "seconds"),
    [
        ({}, "requests", None),
        ({REQUESTS: "2s", TOKENS: "7s"}, "requests", 2),
        ({REQUESTS: "2s", TOKENS: "7s"}, "tokens", 7),
        ({REQUESTS: "2s", TOKENS: "7s"}, None, 7),
        ({REQUESTS: "2s", TOKENS: "7s", "x-ratelimit-remaining-requests": "0"}, None, 2),
        ({REQUESTS: "2s", TOKENS: "7s", "x-ratelimit-remaining-tokens": "0"}, "other", 7),
        ({REQUESTS: "2s", TOKENS: "7s", "x-ratelimit-remaining-tokens": "5"}, None, 7),
        ({REQUESTS: "2s"}, "tokens", 2),
        ({REQUESTS: "never"}, "requests", None),
        ({REQUESTS: "1767225600"}, "requests", None),
        ({REQUESTS: "1767225600", TOKENS: "7s"}, "requests", 7),
    ],
)
def test_the_limit_that_was_hit_is_the_one_to_wait_for(headers, kind, seconds):
    """The error's type tells, else what is used up; where nothing tells, the longer wait."""
    assert reset_after(headers, kind) == seconds
