"""Some hundred of the malformed requests that `make fuzz` makes by the hundred thousand."""

import json

import fuzz
import pytest
from fuzz_cases import CLOSE, Case
from strict_http import Malformed, Response, exchange, parse

ERROR = {"error": {"message": "no", "type": "t", "param": None, "code": None}}
ID = ("x-request-id", "req_1")
JSON = ("Content-Type", "application/json")
CASE = Case("drawn", (b"GET /",), 1)


async def test_malformed_requests_get_errors_and_both_paths_agree():
    """No 5xx, no hang, no text/plain; with the fast path and without it the bytes are the same."""
    seen = await fuzz.run(fuzz.all_cases(700, seed=7))
    fuzz.check(seen)
    assert seen.requests >= 700
    assert {"drawn", "cut", "twice", "damaged", "split", "schema"} == seen.cases.keys()
    assert seen.statuses.keys() >= {200, 400, 404}


def _response(status=400, headers=(ID, JSON), body=ERROR) -> Response:
    return Response(status, headers, json.dumps(body).encode() if isinstance(body, dict) else body)


WRONG = {
    "5xx": _response(500),
    "no id": _response(headers=(JSON,)),
    "text": _response(headers=(ID, ("Content-Type", "text/plain")), body=b"no"),
    "not JSON": _response(body=b"no"),
    "another shape": _response(body={"detail": "no"}),
    "a key too few": _response(body={"error": {"message": "no", "type": "t", "param": None}}),
    "no message": _response(body={"error": {**ERROR["error"], "message": ""}}),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_trial_sees_a_wrong_answer(what):
    """Each fault of one answer is told from the right one."""
    assert fuzz.problem(CASE, [_response()]) is None
    assert fuzz.problem(CASE, [WRONG[what]])


def test_the_trial_sees_what_is_missing():
    """No answer, one behind the last, an undescribed status, and a client out of step are seen."""
    good, last = _response(200, body=b"{}"), _response(200, (ID, ("Connection", "close")), b"{}")
    live = Response(200, last.headers, b'{"status": "ok"}')
    assert fuzz.problem(CASE, []) == "no answer"
    assert fuzz.problem(CASE._replace(is_ended=True), []) is None
    assert fuzz.problem(CASE, [last, good])
    assert fuzz.problem(CASE._replace(statuses=frozenset({404})), [good])
    assert fuzz.problem(CASE._replace(is_well_formed=True), [good])
    assert fuzz.problem(CASE._replace(is_well_formed=True), [good, live]) is None


GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
NO_HTTP = {
    "a body too short": GOOD[:-1],
    "a body too long": GOOD + b"}",
    "no length": GOOD.replace(b"Content-Length: 2\r\n", b""),
    "two lengths": GOOD.replace(b"\r\n\r\n", b"\r\nContent-Length: 2\r\n\r\n"),
    "a length that is no number": GOOD.replace(b": 2", b": +2"),
    "another version": GOOD.replace(b"1.1", b"2.0"),
    "a control character": GOOD.replace(b"OK", b"O\x00"),
    "a header that is none": GOOD.replace(b"\r\n\r\n", b"\r\nx y: z\r\n\r\n"),
    "half a head": GOOD[:20],
    "two framings": GOOD.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "a bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}x0\r\n\r\n",
}


@pytest.mark.parametrize("what", NO_HTTP)
def test_the_client_is_strict(what):
    """What is no HTTP response is not taken for one."""
    assert [one.body for one in parse(GOOD + GOOD)] == [b"{}", b"{}"]
    with pytest.raises(Malformed):
        parse(NO_HTTP[what])


async def test_a_server_that_goes_on_waiting_is_seen(upstream):
    """Neither an answer nor a close is a failure of the server's, not of the trial."""
    with pytest.raises(TimeoutError):
        await exchange(("127.0.0.1", upstream.port), [CLOSE[:20]], timeout_s=0.05)


def test_differences_are_shown():
    """Which answer differs, and how, is told."""
    one, other = ([(200, False, [("x", value)], b"")] for value in "ab")
    assert "answer 0 differs" in fuzz.difference(one, other)
    assert fuzz.difference(one, one) == ""
