"""Paths of the embeddings endpoint in any spelling: answered here, or nowhere."""

import asyncio
import itertools
import json
from urllib.parse import quote, unquote, urlsplit

import pytest
from embedding_proxy.proxy.http.target import may_be_embeddings
from hypothesis import given
from hypothesis import strategies as st

SMALL = "text-embedding-3-small"
SECONDS = 60

SPELLINGS = (
    *(
        "embeddings",
        "Embeddings",
        "EMBEDDINGS",
        "%65mbeddings",
        "%2565mbeddings",
        "%252565mbeddings",
    ),
    *("embeddings;v=1", "embeddings%3Bv=1", "embeddings%20", "embeddings%09", "embeddings.", " "),
    *("embeddings%00", "embeddings%3Fa=1", "embeddings%23a", "e%u006dbeddings"),
    "%EF%BD%85mbeddings",
)
BEFORE = (
    "/",
    "//",
    "/./",
    "/x/../",
    "/v1/",
    "/api/v1/",
    "%2F",
    "/%2f",
    "\\",
    "%5C",
    "/%2e/",
    "/;/",
)
AFTER = ("", "/", "//", "%2F", "/.", "\\", ";", "?a=1", "#a", "/%20")
PLACES = ("", "/engines/m", "/deployments/m", "/openai")
PREFIXES = ("/v1", "/api/v1", "/openai/v1", "/%761", "/V1", "//v1")


def _is_taken_for_embeddings(target: str) -> bool:
    """Tell whether some server would: one that decodes at will, merges slashes and folds case."""
    path = target if target.startswith("/") else urlsplit(target).path
    readings = [path.partition("?")[0]]
    for _ in range(4):
        readings.append(unquote(readings[-1]))
    for reading in readings:
        path = reading.partition("#")[0].partition("?")[0].partition("\0")[0].replace("\\", "/")
        segments = [one.partition(";")[0].strip(" .\t").lower() for one in path.split("/")]
        segments = [one for one in segments if one]
        if segments and segments[-1] == "embeddings":
            return True
    return False


@pytest.fixture
async def ask(start_proxy, other):
    """Give a function that sends a request target as it is and returns the status and the body."""
    proxy = await start_proxy(openai=other, passthrough="openai")
    host, _, port = proxy.url.removeprefix("http://").removesuffix("/v1").partition(":")
    body = json.dumps({"model": SMALL, "input": "a"}).encode()

    async def ask(target, method="POST"):
        reader, writer = await asyncio.open_connection(host, port)
        head = f"{method} {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        head, _, content = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), content

    return ask


def _targets():
    """Yield each mutation alone with all the others' plain forms, and many in combination."""
    for prefix, place, before, name, after in itertools.product(
        PREFIXES, PLACES, BEFORE, SPELLINGS, AFTER
    ):
        odd = [
            (prefix, "/v1"),
            (place, ""),
            (before, "/"),
            (name, "embeddings"),
            (after, ""),
        ]
        if sum(one != plain for one, plain in odd) <= 2 and " " not in name:
            yield prefix + place + before + name + after


@pytest.mark.untraced
async def test_no_spelling_reaches_the_upstream_past_the_cache(ask, other):
    """Nothing that a server could take for its embeddings endpoint is passed on, by any method."""
    targets = [*_targets()]
    assert len(targets) > 500
    async with asyncio.timeout(10 * SECONDS):
        for number, target in enumerate(targets):
            method = ("POST", "GET", "PUT", "OPTIONS")[number % 4]
            await ask(target, method)
            whole = ("http://h", "HTTP://user@h:1")[number % 2]
            if target.startswith("/v1"):
                await ask(whole + target)
    # What went through the cache is one purchase, at the provider's own path.
    passed = {
        (one.method, one.target) for one in other.seen if _is_taken_for_embeddings(one.target)
    }
    assert passed == {("POST", "/v1/embeddings")}


@pytest.mark.parametrize(
    "target",
    [
        *("/v1//embeddings", "/v1/embeddings//", "/v1/v1/embeddings", "/v1/Embeddings"),
        *("/v1/embeddings;v=1", "/v1/%2565mbeddings", "/v1%2F%2Fembeddings", "/V1/embeddings"),
        *("/api/v1/v1/embeddings", "/openai/v1//embeddings", "/v1/engines/m/Embeddings"),
        *("/openai/deployments/m/Embeddings", "http://h/v1//embeddings", "/v1/x/%2e%2e/embeddings"),
        *("//v1/embeddings", "/v1/embeddings/x", "/v1/embeddings%20"),
    ],
)
@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_a_wrong_spelling_is_told_the_right_path(method, target, ask, other):
    """It is a 404 in OpenAI's shape that names the path, and nobody is asked."""
    status, content = await ask(target, method)
    error = json.loads(content)["error"]
    assert (status, error["code"]) == (404, "unknown_url")
    assert "embeddings are at POST /v1/embeddings" in error["message"]
    assert not other.seen


@pytest.mark.parametrize(
    "target", ["/v1/%65mbeddings", "/v1/embeddings/", "http://h/v1/embeddings"]
)
async def test_an_equal_spelling_is_served_from_the_cache(target, start_proxy, upstream, ask):
    """A path that decodes to ours once is ours: the second request of it is a hit."""
    proxy = await start_proxy(openai=upstream, passthrough="openai")
    assert (await proxy.post({"model": SMALL, "input": "a"})).status == 200
    host, _, port = proxy.url.removeprefix("http://").removesuffix("/v1").partition(":")
    reader, writer = await asyncio.open_connection(host, port)
    body = json.dumps({"model": SMALL, "input": "a"}).encode()
    head = f"POST {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    assert b"x-cache: hit" in answer
    assert len(upstream.calls) == 1


async def test_the_list_of_embedding_models_is_passed_on(ask, other):
    """OpenRouter lists its models below that path; a GET of it is no call for embeddings."""
    status, _ = await ask("/api/v1/embeddings/models", "GET")
    assert status == 200
    assert [call.target for call in other.seen] == ["/v1/embeddings/models"]
    assert (await ask("/api/v1/embeddings/models", "POST"))[0] == 404


async def test_an_encoded_prefix_is_not_passed_on(ask, other):
    """A prefix that is not spelled out would be sent below the base URL, where it is not meant."""
    status, _ = await ask("/%76%31/files", "GET")
    assert status == 404
    assert not other.seen


PIECES = st.sampled_from([*SPELLINGS[:-1], *BEFORE, *AFTER, "v1", "files", "/", "embeddings"])


@given(st.lists(PIECES, max_size=6).map("".join), st.integers(0, 3))
def test_whatever_a_server_may_take_is_known_here(rest, times):
    """Any mixture of mutations, encoded again or not, is recognised if a lenient server would."""
    for _ in range(times):
        rest = quote(rest, safe="/")
    target = f"/v1/{rest}"
    if _is_taken_for_embeddings(target):
        assert may_be_embeddings("POST", target)
        assert may_be_embeddings("GET", target)


@given(st.lists(st.from_regex(r"[a-z0-9_.~-]{1,9}", fullmatch=True), min_size=1, max_size=4))
def test_other_paths_are_let_alone(segments):
    """A path in which no segment is the endpoint's name is none of its spellings."""
    target = "/v1/" + "/".join(segments)
    names = {one.strip("_.~-") for one in segments}
    assert may_be_embeddings("POST", target) == ("embeddings" in names)
