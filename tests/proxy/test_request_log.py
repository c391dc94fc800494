"""Each request has an id, its client's own if it brings one; the log names failed ones by it."""

import logging

import pytest
from fault_server import status

MODEL = "text-embedding-3-small"
LOGGER = "embedding_proxy.requests"
OWN = "9f1c:client/42"


def _lines(caplog):
    """Return what is said of requests that failed."""
    records = (record for record in caplog.records if record.name == LOGGER)
    return [record for record in records if hasattr(record, "data")]


async def test_the_log_names_a_failed_request_with_model_status_and_code(
    upstream, start_proxy, caplog
):
    """A line has id, method, path, model, status and code, and nothing of the input."""
    upstream.always = status(500, {"error": {"message": "a secret input", "code": None}})
    proxy = await start_proxy(openai=upstream)
    caplog.set_level(logging.INFO)
    response = await proxy.post({"model": MODEL, "input": "a secret input"})

    (line,) = _lines(caplog)
    assert line.levelno == logging.WARNING
    assert line.getMessage() == (
        f"request {response.headers['x-request-id']}: POST /v1/embeddings, model {MODEL}:"
        f" status {response.status}, code upstream_error"
    )


@pytest.mark.parametrize(
    ("path", "code"),
    [("/embeddings", "none"), ("/nowhere", "unknown_url"), ("/models/x", "model_not_found")],
)
async def test_a_mistake_of_the_client_is_a_line_of_information(
    path, code, upstream, start_proxy, caplog
):
    """A client's mistakes are told as well, before a model is known, and never as a warning."""
    proxy = await start_proxy(openai=upstream)
    caplog.set_level(logging.INFO)
    async with proxy.http.get(f"{proxy.url}{path}") as response:
        own = response.headers["x-request-id"]
        assert response.status in (404, 405)

    (line,) = _lines(caplog)
    assert line.levelno == logging.INFO
    assert f"request {own}: GET /v1{path}, model unknown: status {response.status}" in (
        line.getMessage()
    )
    assert f"code {code}" in line.getMessage()


@pytest.mark.parametrize("name", ["X-Request-Id", "x-client-request-id"])
async def test_the_clients_own_id_is_taken_over(name, upstream, start_proxy, caplog):
    """It stands in the reply and in the log, however often the same request comes."""
    proxy = await start_proxy(openai=upstream)
    body = b'{"model": "text-embedding-3-small", "input": "some text"}'
    for _ in range(4):
        response = await proxy.post(body, **{name: OWN})
        assert response.status == 200
        assert response.headers["x-request-id"] == OWN

    caplog.set_level(logging.INFO)
    response = await proxy.post(b"{}", **{name: OWN})
    assert response.headers["x-request-id"] == OWN
    assert f"request {OWN}: " in _lines(caplog)[0].getMessage()


async def test_one_that_comes_again_without_an_id_gets_a_new_one(upstream, start_proxy, repeated):
    """A repeated reply never has the id of an earlier request."""
    proxy = await start_proxy(openai=upstream)
    body = b'{"model": "text-embedding-3-small", "input": "some text"}'
    await proxy.post(body, **{"X-Request-Id": OWN})
    ids = {(await proxy.post(body)).headers["x-request-id"] for _ in range(4)}
    assert len(ids) == 4
    assert OWN not in ids
    assert repeated


@pytest.mark.parametrize("own", ["", " ", "a b", "x" * 129, "é", "a\tb", '"quoted"', "<a>"])
async def test_an_id_that_is_not_well_formed_is_replaced(own, upstream, start_proxy):
    """What could break a line, or is long, is no id."""
    proxy = await start_proxy(openai=upstream)
    response = await proxy.post({"model": MODEL, "input": "some text"}, **{"X-Request-Id": own})
    assert response.headers["x-request-id"].startswith("req_")


async def test_the_second_header_counts_where_the_first_is_no_id(upstream, start_proxy):
    """The first well-formed id is taken."""
    proxy = await start_proxy(openai=upstream)
    headers = {"X-Request-Id": "not an id", "X-Client-Request-Id": OWN}
    response = await proxy.post({"model": MODEL, "input": "some text"}, **headers)
    assert response.headers["x-request-id"] == OWN


@pytest.mark.parametrize(
    "fields",
    [{"input": []}, {"input": "a", "dimensions": 0}, {"input": "a", "output_dtype": "int8"}, {}],
    ids=str,
)
async def test_a_request_that_is_not_valid_is_told_with_its_model(
    fields, upstream, start_proxy, caplog
):
    """The model is known as soon as the body is read."""
    proxy = await start_proxy(openai=upstream)
    caplog.set_level(logging.INFO)
    assert (await proxy.post({"model": MODEL, **fields})).status == 400
    assert f", model {MODEL}: status 400" in _lines(caplog)[0].getMessage()
