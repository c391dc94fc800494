"""What the dashboard is made of: rates, sessions, and the timeline of failovers."""

import asyncio
import hashlib

import pytest
from embedding_proxy.providers.histogram import BOUND_NAMES, BOUNDS_S
from embedding_proxy.proxy.http.dashboard import failovers, session
from embedding_proxy.proxy.http.dashboard.failovers import SLOT_S, SPAN_S, FailoverLog
from embedding_proxy.proxy.http.dashboard.samples import Reading, rates
from embedding_proxy.proxy.http.dashboard.session import SESSION_S, Sessions
from embedding_proxy.proxy.http.request_metrics import RequestMetrics

NOW = 1_800_000_000.0


def _buckets(**counts):
    return tuple(float(counts.get(f"b{place}", 0)) for place in range(len(BOUND_NAMES)))


def _reading(at, hits=(), misses=(), failures=0.0):
    none = _buckets()
    return Reading(NOW + at, hits or none, misses or none, failures, 2.0, 0.0)


def test_rates_are_of_the_time_between_two_readings():
    """Requests by second, and quantiles within their bucket; none where nothing was asked."""
    sample = rates(
        _reading(0, _buckets(b2=10), _buckets(b9=1)),
        _reading(2, _buckets(b2=10, b3=100), _buckets(b9=1), failures=3),
    )
    assert sample["hits_a_s"] == 50
    assert sample["misses_a_s"] == 0
    assert sample["failures_a_s"] == 1.5
    low, high = 1000 * BOUNDS_S[2], 1000 * BOUNDS_S[3]
    assert low < sample["hit_ms"][0] < sample["hit_ms"][1] <= high
    assert sample["miss_ms"] == [None, None]
    longest = rates(_reading(0), _reading(1, _buckets(b18=4)))
    assert longest["hit_ms"] == [1000 * BOUNDS_S[-1]] * 2


@pytest.mark.parametrize("seconds", [0, -1, 60])
def test_readings_that_do_not_follow_each_other_give_no_rate(seconds):
    """After a rest, or when the clock was set."""
    assert rates(_reading(0), _reading(seconds)) is None


def test_counters_that_begin_anew_are_no_negative_rate():
    """As when the folder of counters is deleted."""
    sample = rates(_reading(0, _buckets(b2=10), failures=4), _reading(1))
    assert sample["hits_a_s"] == sample["failures_a_s"] == 0


def _digest(key):
    return hashlib.sha256(key.encode()).digest()


def test_a_cookie_is_read_by_all_workers_until_it_ends(tmp_path):
    """They share the signing key, which is private; another installation's cookie is nothing."""
    now = NOW
    file = tmp_path / "secret"
    one, other = (Sessions(file, clock=lambda: now) for _ in range(2))
    cookie = one.sign(_digest("k"))
    assert file.stat().st_mode & 0o777 == 0o600
    read = other.read(cookie)
    assert read.tag == other.tag_of(_digest("k")) != other.tag_of(_digest("l"))
    assert _digest("k").hex() not in cookie
    for place in range(0, len(cookie), 7):
        changed = cookie[:place] + ("0" if cookie[place] != "0" else "1") + cookie[place + 1 :]
        assert other.read(changed) is None
    for nonsense in ("", "00", "x", cookie[:-2], cookie + "00", "é"):
        assert other.read(nonsense) is None
    assert Sessions(tmp_path / "another", clock=lambda: now).read(cookie) is None
    now += SESSION_S - 1
    assert other.read(cookie) is not None
    now += 1
    assert other.read(cookie) is None


def test_without_a_place_for_the_signing_key_a_process_has_its_own(tmp_path, caplog):
    """Its sessions survive a reload, which makes the routes anew."""
    file = tmp_path / "nowhere" / "secret"
    cookie = Sessions(file).sign(_digest("k"))
    assert Sessions(file).read(cookie) is not None
    assert "sessions of the dashboard end with this process" in caplog.text
    short = tmp_path / "short"
    short.write_bytes(b"")
    assert Sessions(short).read(cookie) is not None
    assert session._PROCESS_SECRET not in cookie.encode()


async def _noted(path, *counts, clock=lambda: NOW):
    log = FailoverLog(path, clock=clock)
    for one in counts:
        log.note(one)
    log.flush()
    return log


async def test_a_timeline_is_of_all_processes_and_of_the_last_day(tmp_path):
    """What is added between two looks, by slot; what was counted before the first is no event."""
    path = tmp_path / "log"
    failed, moved = ("failures", "openai"), ("failovers", "m")
    await _noted(path, {failed: 7}, {failed: 9, moved: 1}, {failed: 9, moved: 1})
    await _noted(path, {}, {failed: 5}, {failed: 1}, clock=lambda: NOW - SLOT_S)
    await _noted(path, {}, {failed: 5}, clock=lambda: NOW - SPAN_S)
    with path.open("ab") as file:
        file.write(b'nonsense\n[1]\n[1, "failures", "x", {}]\n["a", "failures", "x", 1]\n[18000')
    log = FailoverLog(path, clock=lambda: NOW)
    told = log.read().as_json()
    assert told["failures"]["openai"][-2:] == [5, 2]
    assert sum(told["failures"]["openai"]) == 7
    assert told["failovers"] == {"m": [0] * (SPAN_S // SLOT_S - 1) + [1]}
    assert told["openings"] == {}
    assert told["start"] + SPAN_S > NOW
    assert FailoverLog(tmp_path / "none", clock=lambda: NOW).read().as_json() is None


async def test_a_timeline_is_written_soon_and_then_seldom(tmp_path, monkeypatch):
    """The first change after a second; a long outage costs a line in half a minute."""
    delays = []
    loop = asyncio.get_running_loop()
    later = loop.call_later
    monkeypatch.setattr(
        loop, "call_later", lambda delay, *rest: delays.append(delay) or later(3600, *rest)
    )
    log = FailoverLog(tmp_path / "log", clock=lambda: NOW)
    for count in range(5):
        log.note({("failures", "p"): count})
    assert delays == [failovers.FIRST_S]
    log.flush()
    log.note({("failures", "p"): 9})
    assert failovers.FLUSH_S - 5 < delays[1] <= failovers.FLUSH_S
    log.flush()
    assert (tmp_path / "log").read_bytes().count(b"\n") == 2


async def test_a_timeline_stays_short(tmp_path, monkeypatch):
    """Its older half goes, in whole lines; and of many names the largest are told."""
    monkeypatch.setattr(failovers, "MAX_BYTES", 2000)
    path = tmp_path / "log"
    for count in range(100):
        await _noted(path, {}, {("failures", f"p{count}"): count + 1})
        assert path.stat().st_size <= 2000
    told = FailoverLog(path, clock=lambda: NOW).read().as_json()
    assert next(iter(told["failures"])) == "p99"
    many = {("failovers", f"m{count}"): count for count in range(1, 101)}
    path.unlink()
    await _noted(path, {}, many)
    told = FailoverLog(path, clock=lambda: NOW).read().as_json()
    assert [*told["failovers"]] == [f"m{count}" for count in range(100, 70, -1)]


async def test_a_timeline_that_cannot_be_written_is_told_once(tmp_path, caplog):
    """And holds up nothing."""
    log = FailoverLog(tmp_path / "nowhere" / "log", clock=lambda: NOW)
    for count in range(4):
        log.note({("failures", "p"): count})
        log.flush()
    assert caplog.text.count("the timeline of failovers cannot be written") == 1


def test_requests_are_counted_once_by_hit_and_miss():
    """A hit is one whoever has answered it; the sums by status and route have all."""
    requests = RequestMetrics()
    requests.observe_hit(0.001)
    for verdict, code in (("hit", 200), ("miss", 200), ("partial", 200), (None, 500), ("hit", 499)):
        requests.observe("embeddings", code, 0.01, verdict)
    requests.observe("passthrough", 200, 0.01, "hit")
    assert (requests.hits.count, requests.misses.count) == (2, 2)
    assert requests.by_status == {
        ("embeddings", 200): 4,
        ("embeddings", 500): 1,
        ("embeddings", 499): 1,
        ("passthrough", 200): 1,
    }
    assert requests.by_route["embeddings"].count == 6
    assert requests.by_route["passthrough"].count == 1
