"""Durations as upstreams write them, and which of two limits is the one to wait for."""

import pytest

from providers.ratelimit import duration, reset_after


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("1s", 1),
        ("6m0s", 360),
        ("12ms", 0.012),
        ("1h2m3.5s", 3723.5),
        ("1d", 86400),
        ("9", 9),
        ("2.5", 2.5),
        ("0", 0),
        (" 3s ", 3),
        ("", None),
        ("soon", None),
        ("-1s", None),
        ("1s ago", None),
        ("s", None),
        ("1w", None),
        ("nan", None),
        ("٣s", None),
        ("1767225600", None),
        ("1767225600000", None),
        ("9" * 400, None),
    ],
)
def test_durations(value, seconds):
    """Go's form and plain seconds are read; a point in time is no duration."""
    assert duration(value) == (seconds if seconds is None else pytest.approx(seconds))


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
    ],
)
def test_the_limit_that_was_hit_is_the_one_to_wait_for(headers, kind, seconds):
    """The error's type tells, else what is used up; where nothing tells, the longer wait."""
    assert reset_after(headers, kind) == seconds
