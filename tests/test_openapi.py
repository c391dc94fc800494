"""/openapi.json is valid, and says what the code does: routes, fields, codes, headers."""

import json
import re
from importlib import resources

import pytest
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http.app import build_app
from embedding_proxy.proxy.request_fields import OWN_FIELDS, RULES, Group, rule_of
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from pages import ROOT
from schema_cases import description, operations

MODEL = "text-embedding-3-small"
EMBEDDINGS = ("/v1/embeddings", "post")
GROUPS = {
    "x-key-fields": Group.KEY,
    "x-neutral-fields": Group.NEUTRAL,
    "x-refused-fields": Group.REFUSED,
}


@pytest.fixture(scope="module")
def document():
    """Give the description."""
    return description()


def _fits(document, name, value):
    """Raise unless a value fits a schema of the description."""
    Draft202012Validator({**document, "$ref": f"#/components/schemas/{name}"}).validate(value)


def _responses(document, place):
    """Return the responses of an operation by status."""
    told = operations(document)[place]["responses"]
    shared = document["components"]["responses"]
    return {
        int(status): shared[one["$ref"].rpartition("/")[2]] if "$ref" in one else one
        for status, one in told.items()
    }


def test_it_is_valid_openapi(document):
    """It is an OpenAPI 3.1 document without an error."""
    assert document["openapi"].startswith("3.1.")
    assert not list(OpenAPIV31SpecValidator(document).iter_errors())


async def test_it_is_served_as_it_stands_and_without_a_key(start_proxy):
    """Everybody gets the file of the package, to the byte, though keys are set."""
    proxy = await start_proxy(server={"keys": ["k"]})
    async with proxy.http.get(proxy.url.replace("/v1", "/openapi.json")) as response:
        assert (response.status, response.content_type) == (200, "application/json")
        assert (
            await response.read()
            == resources.files("embedding_proxy.proxy.http").joinpath("openapi.json").read_bytes()
        )


def test_it_has_every_route_and_no_other(document):
    """The routes of the application, but for trailing slashes, are the operations described."""
    app = build_app(Settings.model_validate({"passthrough": None}))
    routes = {
        (route.resource.canonical.replace("{slash}", "").rstrip("/") or "/", route.method.lower())
        for route in app.router.routes()
        if route.method != "HEAD"  # it is answered wherever GET is
    }
    assert routes == operations(document).keys()
    assert len(routes) > 15


def test_its_request_has_the_fields_that_the_code_knows(document):
    """OpenAI's fields are properties; further ones are listed by what the proxy does with them."""
    request = document["components"]["schemas"]["EmbeddingRequest"]
    assert set(request["properties"]) == set(OWN_FIELDS)
    listed = [name for group in GROUPS for name in request[group]]
    assert len(listed) == len(set(listed))
    for name, group in GROUPS.items():
        assert {rule_of(field).group for field in request[name]} == {group}
    spellings_of_own = len(OWN_FIELDS)  # their rules refuse other spellings
    assert len(listed) == len(RULES) - spellings_of_own


def test_it_has_every_error_code_with_its_statuses(document):
    """Codes and statuses are those of docs/errors.md, and a response names each of its codes."""
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (none|`[a-z_]+`) \| ([0-9][0-9, ]+) \|", page, re.MULTILINE)
    error = document["components"]["schemas"]["Error"]["properties"]["error"]
    assert set(error["properties"]["code"]["examples"]) == {
        code.strip("`") for code, _ in rows if code != "none"
    }
    responses = _responses(document, EMBEDDINGS)
    for code, statuses in rows:
        for status in map(int, statuses.split(", ")):
            assert status in responses, (code, status)
        told = [responses[int(status)]["description"] for status in statuses.split(", ")]
        # Those for operators' pages are told where these are described; all share the text.
        assert code in ("none", "`max_tokens_per_request`") or any(code in one for one in told)


def test_every_error_has_the_shape_and_the_headers_of_one(document):
    """Each response but 200 is the shared error, with an id and the headers for another try."""
    for place in operations(document):
        for status, response in _responses(document, place).items():
            assert "x-request-id" in response["headers"]
            if status != 200:
                content = response["content"]["application/json"]["schema"]
                assert content == {"$ref": "#/components/schemas/Error"}
                assert "x-should-retry" in response["headers"]
                assert ("Allow" in response["headers"]) == (status == 405)


async def test_real_answers_fit_it(document, upstream, start_proxy):
    """What the proxy answers fits the schemas, and has the headers that are described."""
    proxy = await start_proxy(openai=upstream)
    for encoding in ("float", "base64"):
        body = {"model": MODEL, "input": ["a", encoding], "encoding_format": encoding}
        _fits(document, "EmbeddingRequest", body)
        response = await proxy.post(body)
        _fits(document, "EmbeddingResponse", await response.json())
        headers = {name.lower() for name in response.headers if name.lower().startswith("x-")}
        described = set(_responses(document, EMBEDDINGS)[200]["headers"])
        assert headers == described - {"x-embedding-fallback"}
    bad = await proxy.post({"model": MODEL, "input": ""})
    _fits(document, "Error", await bad.json())
    place = proxy.url.removesuffix("/v1")
    for path, name in {
        "/v1/models": "ModelList",
        f"/v1/models/{MODEL}": "Model",
        "/status": "Status",
        "/livez": "Alive",
        "/readyz": "Alive",
        "/nothing": "Error",
    }.items():
        async with proxy.http.get(place + path) as response:
            content = await response.json()
        _fits(document, name, content)
        if name == "Status":
            schema = document["components"]["schemas"][name]
            assert content.keys() == schema["properties"].keys()


def test_its_lines_can_be_read(document):
    """The file is written for people too: it is indented, and stays in one order."""
    text = (ROOT / "proxy" / "http" / "openapi.json").read_text(encoding="utf-8")
    assert json.loads(text) == document
    assert text.count("\n") > 500
