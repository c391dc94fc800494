"""What headers say of a rate limit: one reader of waits, and numbers that lock nobody out."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from embedding_proxy.providers.upstream.rate_limiter import allowance
from embedding_proxy.providers.upstream.retry_after import (
    MAX_TOLD_WAIT,
    MAX_WAIT,
    quantity,
    reset_after,
    retry_after,
    seconds_until,
)
from hypothesis import example, given
from hypothesis import strategies as st

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC).timestamp()
REQUESTS, TOKENS = "x-ratelimit-reset-requests", "x-ratelimit-reset-tokens"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("12ms", 0.012),
        ("1m2.5s", 62.5),
        ("0h2m3.5s", 123.5),
        ("250µs", 0.00025),
        ("250us", 0.00025),
        ("100ns", 1e-7),
        ("59.88", 59.88),
        ("0", 0.0),
        ("0s", 0.0),
        (" 1s ", 1.0),
        ("1h2m3.5s", 3723.5),
        ("1d", MAX_TOLD_WAIT),
        ("86400", MAX_TOLD_WAIT),
        ("99999999", MAX_TOLD_WAIT),
        (f"{NOW + 30:.0f}", 30.0),
        (f"{NOW + 30.5:.1f}", 30.5),
        (f"{NOW + 30:.0f}000", 30.0),
        (f"{NOW + 30:.0f}000000", 30.0),
        (f"{NOW + 30:.0f}000000000", 30.0),
        (f"{NOW - 30:.0f}", 0.0),
        (f"{NOW - 30:.0f}000", 0.0),
        ("1767225600", 0.0),
        ("4102444800", MAX_TOLD_WAIT),
        ("9" * 20, MAX_TOLD_WAIT),
        ("999999999999", MAX_TOLD_WAIT),
        ("2026-03-01T12:00:30Z", 30.0),
        ("2026-03-01T12:00:30.250Z", 30.25),
        ("2026-03-01T13:00:30+01:00", 30.0),
        ("2026-03-01 12:00:30", 30.0),
        ("2026-03-01T11:00:00Z", 0.0),
        ("2045-01-01T00:00:00Z", MAX_TOLD_WAIT),
        ("9999-12-31T23:59:59Z", MAX_TOLD_WAIT),
        ("Sun, 01 Mar 2026 12:00:30 GMT", 30.0),
        ("Sun, 01 Mar 2066 12:00:30 GMT", MAX_TOLD_WAIT),
        ("", None),
        ("s", None),
        ("1x", None),
        ("-1", None),
        ("-1s", None),
        ("1s2", None),
        ("1 s", None),
        ("nan", None),
        ("inf", None),
        ("1e9", None),
        ("soon", None),
        ("2026-13-01T00:00:00Z", None),
        ("2026-03-01", None),
        ("٣s", None),
        ("9" * 400, None),
    ],
)
def test_a_wait_is_read_in_all_its_forms(text, seconds):
    """Durations and points in time are read and bounded; whatever else stands there is no wait."""
    assert seconds_until(text, NOW) == (None if seconds is None else pytest.approx(seconds))


@given(st.text(max_size=40) | st.text(alphabet="0123456789.hmsuµn-:TZ +,", max_size=40))
@example("Mon, 99 Jan 99999 99:99:99 +9999")
@example("0001-01-01T00:00:00+23:59")
def test_no_wait_is_negative_or_endless(text):
    """Whatever stands in a header, its wait is a number of seconds within the bound, or none."""
    for seconds in (
        seconds_until(text, NOW),
        retry_after({"Retry-After": text}, NOW),
        retry_after({"retry-after-ms": text}, NOW),
        reset_after({REQUESTS: text}, None, NOW),
    ):
        assert seconds is None or 0 <= seconds <= MAX_TOLD_WAIT


@given(st.integers(0, 9), st.integers(0, 59), st.integers(0, 999))
def test_a_duration_is_the_sum_of_its_parts(minutes, seconds, millis):
    """Parts add up by their units; `m` is not taken for the `m` of `ms`."""
    wait = seconds_until(f"{minutes}m{seconds}s{millis}ms", NOW)
    assert wait == pytest.approx(minutes * 60 + seconds + millis / 1000)


@given(st.integers(0, 500), st.sampled_from(["iso", "http", "s", "ms"]))
def test_a_point_in_time_is_a_wait_from_now(seconds, form):
    """All ways to write the same moment give the same wait."""
    date = datetime.fromtimestamp(NOW, UTC) + timedelta(seconds=seconds)
    text = {
        "iso": date.isoformat(),
        "http": format_datetime(date, usegmt=True),
        "s": f"{date.timestamp():.0f}",
        "ms": f"{date.timestamp() * 1000:.0f}",
    }[form]
    assert seconds_until(text, NOW) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("500", 500.0),
        ("0", 0.0),
        (" 7 ", 7.0),
        ("1.5", 1.5),
        ("1s", None),
        ("-1", None),
        ("nan", None),
        ("1e9", None),
        ("9" * 16, None),
        ("500, 500;w=60", None),
        ("", None),
    ],
)
def test_a_quantity_is_a_plain_number(text, number):
    """A limit is no duration, is not negative, and is not without bounds."""
    assert quantity(text) == number


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
        ({REQUESTS: f"{NOW + 2:.0f}", TOKENS: "7s"}, "requests", 2),
        ({REQUESTS: "4102444800", TOKENS: "7s"}, "requests", MAX_TOLD_WAIT),
        ({"x-ratelimit-reset": f"{NOW + 5:.0f}000"}, None, 5),
        ({"ratelimit-reset": "5"}, None, 5),
        ({"x-ratelimit-reset": "5", REQUESTS: "2s"}, None, 2),
    ],
)
def test_the_limit_that_was_hit_is_the_one_to_wait_for(headers, kind, seconds):
    """The error's type tells, else what is used up; where nothing tells, the longer wait."""
    assert reset_after(headers, kind, NOW) == seconds


def told(limit: object, remaining: object, reset: object) -> dict[str, str]:
    """Return the headers of a limit of requests."""
    values = {"limit": limit, "remaining": remaining, "reset": reset}
    return {f"x-ratelimit-{what}-requests": str(value) for what, value in values.items()}


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (told(100, 40, "1m0s"), (100, 40, 1)),
        (told(100, 40, f"{NOW + 60:.0f}"), (100, 40, 1)),
        (told(100, 40, "2026-03-01T12:01:00Z"), (100, 40, 1)),
        (told(60, 0, "0s"), (60, 60, 1)),
        (told(60, 0, f"{NOW - 5:.0f}"), (60, 60, 1)),
        (told(60, 60, "1s"), (60, 60, 1)),
        (told(60, 61, "1s"), (60, 60, 1)),
        (told(60, 0, "4102444800"), (60, 0, 60 / MAX_WAIT)),
        (told(60, 59, "9d"), (60, 59, 60 / MAX_WAIT)),
        (told(0, 0, "1s"), None),
        (told(-5, 0, "1s"), None),
        (told(100, -1, "1s"), None),
        (told(100, "1s", "1s"), None),
        (told(100, 0, "soon"), None),
        (told("nan", 0, "1s"), None),
        ({"x-ratelimit-remaining-requests": "0"}, None),
        ({}, None),
    ],
)
def test_an_allowance_needs_all_three_numbers(headers, expected):
    """Limit, what remains, and growth are told; half a limit is none."""
    assert allowance(headers, "requests", NOW) == expected


@given(*[st.text(alphabet="0123456789.smhd", max_size=16)] * 3)
@example("60", "0", "999999999d")
@example("999999999999999", "0", "0.000000001ns")
def test_no_allowance_locks_out(limit, remaining, reset):
    """Whatever the headers say, an empty allowance is whole within the bound."""
    found = allowance(told(limit, remaining, reset), "requests", NOW)
    if found is not None:
        size, left, per_s = found
        assert 0 <= left <= size
        assert 0 < per_s < float("inf")
        assert size / per_s <= MAX_WAIT * 1.001
