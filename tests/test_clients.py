"""Real clients through the proxy, in CI always; and what docs/clients.md says of them.

`make clients` tries the others as well.
"""

import json
import os
import re
from dataclasses import replace
from xml.etree import ElementTree as ET

import client_environments
import pytest
from client_environments import ALWAYS, GO, JAVA, OWN, PINS, folder_of
from client_failures import FAILURES, TRIED, Ending, Found, proxied
from client_trial import CLIENTS, trial
from pages import ROOT, fenced

PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
SCRIPTS = [
    [line.strip() for line in (folder_of(one.environment) / one.script).read_text().splitlines()]
    for one in {client.script: client for client in CLIENTS}.values()
]
SNIPPETS = [
    [line.strip() for line in snippet.splitlines() if line]
    for part in [PAGE.partition("## Per client")[2].partition("## Keys")[0]]
    for language in ("python", "js", "go", "java")
    for snippet in fenced(part, language)
]
# Texts in a case, so that the suite stays short; `make clients` goes beyond each client's batches.
MOST = 600
# The rows of the page's table, and where the versions in them are pinned.
SUITE = ROOT / "requirements" / "test.txt"
OPENAI = [(PINS / "openai-1.txt", "openai"), (PINS / "openai-2.txt", "openai"), (SUITE, "openai")]
NODE = folder_of("node") / "package.json"
ROWS = {
    "openai (Python)": OPENAI,
    "`AzureOpenAI`": OPENAI,
    "openai (Node)": [(NODE, "openai")],
    "openai (Go)": [(GO / "go.mod", "github.com/openai/openai-go/v3")],
    "openai (Java)": [(JAVA / "pom.xml", "openai-java")],
    "[langchain-openai]": [(PINS / "langchain.txt", "langchain-openai")],
    "`@langchain/openai`": [(NODE, "@langchain/openai")],
    "[llama-index-embeddings-openai]": [
        (PINS / "llama-index.txt", "llama-index-embeddings-openai")
    ],
    "[llama-index-embeddings-openai-like]": [
        (PINS / "llama-index.txt", "llama-index-embeddings-openai-like")
    ],
    "[haystack-ai]": [(PINS / "haystack.txt", "haystack-ai")],
    "[chromadb]": [(PINS / "chroma.txt", "chromadb")],
    "[Vercel AI SDK](#vercel-ai-sdk) (`ai`, `@ai-sdk/openai`)": [
        (NODE, "ai"),
        (NODE, "@ai-sdk/openai"),
    ],
    "[Vercel AI SDK](#vercel-ai-sdk) (`ai`, `@ai-sdk/openai-compatible`)": [
        (NODE, "ai"),
        (NODE, "@ai-sdk/openai-compatible"),
    ],
}


def _pinned(file, name):
    """Return the version that a file pins, without its last number."""
    text = file.read_text(encoding="utf-8")
    if file == NODE:
        version = json.loads(text)["dependencies"][name]
    elif file.name == "go.mod":
        version = re.search(rf"^require {re.escape(name)} v(\S+)", text, re.MULTILINE)[1]
    elif file.name == "pom.xml":
        artifact = ET.fromstring(text).find(f".//dependency[artifactId='{name}']")
        version = artifact.findtext("version")
    else:
        version = re.search(rf"^{re.escape(name)}==(\S+)", text, re.MULTILINE)[1]
    return ".".join(version.split(".")[:2])


@pytest.mark.parametrize(
    "client",
    [client for client in CLIENTS if client.environment in ALWAYS],
    ids=lambda client: client.name,
)
async def test_a_client_gets_the_upstreams_vectors_and_pays_once(client, tmp_path):
    """What comes through the proxy is what the upstream gives; the second time it is not asked."""
    if not client_environments.is_made(client.environment):
        # CI makes it beforehand: there a client that is not tried is a failure.
        assert os.environ.get("CI") != "true", f"{client.environment} is not made"
        pytest.skip("not installed: python tests/trials/client_environments.py")
    found = await trial(replace(client, many=min(client.many, MOST)), tmp_path)
    assert found.wrong == []
    assert found.first == found.texts > min(client.many, MOST)
    assert found.second == 0
    refusals = {case: said for case, said in found.refused.items() if case.endswith("empty")}
    assert len(refusals) >= 2
    assert set(refusals.values()) == {400}


@pytest.mark.parametrize(
    "failure",
    [failure for failure in FAILURES if not failure.passes and failure.fails is None],
    ids=lambda failure: failure.name,
)
async def test_a_client_gives_up_at_once_where_no_try_helps(failure):
    """The official client makes one request, and its error says what the proxy answered.

    `make clients` compares all clients and failures with what they do directly.
    """
    client = next(one for one in TRIED if one.environment == OWN)
    ending = await proxied(client, failure)
    assert ending.requests == 1
    assert (ending.status, ending.code) in failure.answers


LIMITED = next(failure for failure in FAILURES if failure.name == "rate limit")
REFUSED = next(failure for failure in FAILURES if failure.name == "key refused")
DIRECT = Ending("RateLimitError", 429, "rate_limit_exceeded", 4.0, requests=3, calls=3)
UNAUTHORIZED = Ending("AuthenticationError", 401, "invalid_api_key", 0.0, requests=1, calls=1)
FORBIDDEN = Ending("PermissionDeniedError", 403, None, 0.0, requests=1, calls=1)
ANSWERED = Ending(None, None, None, 4.0, requests=1, calls=3)


@pytest.mark.parametrize(
    ("failure", "direct", "proxied", "wrong"),
    [
        (LIMITED, DIRECT, DIRECT, []),
        (LIMITED, DIRECT, replace(DIRECT, calls=9), ["9 calls of the upstream, directly 3"]),
        (LIMITED, DIRECT, replace(DIRECT, status=503), ["status 503"]),
        (LIMITED, DIRECT, replace(DIRECT, code="other"), ["code other"]),
        (LIMITED, DIRECT, replace(DIRECT, error="Other"), ["Other, directly RateLimitError"]),
        (LIMITED, DIRECT, replace(DIRECT, seconds=6.1), ["+2.1 s"]),
        (LIMITED, DIRECT, replace(DIRECT, seconds=1.9), ["-2.1 s"]),
        (LIMITED, DIRECT, replace(ANSWERED, calls=4, seconds=9.0), []),
        (LIMITED, ANSWERED, replace(ANSWERED, seconds=1.0), []),
        (LIMITED, ANSWERED, replace(ANSWERED, seconds=9.0), ["+5.0 s"]),
        (LIMITED, ANSWERED, DIRECT, ["gave up where it directly does not"]),
        (LIMITED, ANSWERED, replace(ANSWERED, calls=4), ["4 calls of the upstream, directly 3"]),
        (REFUSED, UNAUTHORIZED, UNAUTHORIZED, ["status 401"]),
        (
            REFUSED,
            replace(UNAUTHORIZED, seconds=9),
            replace(UNAUTHORIZED, status=403, code=None),
            [],
        ),
    ],
)
def test_what_counts_as_giving_up_as_directly(failure, direct, proxied, wrong):
    """More calls, another answer, another error and another time are each seen as a difference."""
    client = next(one for one in TRIED if one.environment == OWN)
    assert Found(client, failure, direct, proxied).differences() == wrong


def _runs(script, snippet):
    """Say whether each line of the snippet stands in the script, in the same order."""
    rest = iter(script)
    return all(line in rest for line in snippet)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet[0])
def test_what_the_page_shows_is_what_is_tried(snippet):
    """Each line of a snippet stands in one of the scripts, in the same order."""
    assert any(_runs(script, snippet) for script in SCRIPTS)


def test_the_page_shows_every_script():
    """Nothing is tried that the page does not show, and nothing is proved of no snippets."""
    shown = [any(_runs(script, snippet) for snippet in SNIPPETS) for script in SCRIPTS]
    assert len(shown) == 12
    assert all(shown)


@pytest.mark.parametrize("client", ROWS)
def test_the_page_names_the_versions_that_are_tried(client):
    """The versions in the table are those of the pins."""
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {client}"))
    assert row.split(" | ")[1] == ", ".join(_pinned(*pin) for pin in ROWS[client])


def test_every_row_of_the_page_is_held_against_the_pins():
    """No version stands in the table that no pin is behind."""
    rows = [line for line in PAGE.splitlines() if re.search(r" \| \d+\.\d+", line)]
    assert len(rows) == len(ROWS)


def test_no_pin_names_where_packages_come_from():
    """The pins hold for whichever registry a machine has been given."""
    files = [*PINS.iterdir(), NODE, NODE.with_name("package-lock.json"), *GO.glob("go.*")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in (*files, JAVA / "pom.xml"))
    assert not re.search(r"resolved|index-url|find-links|registry|[rR]epositor|GOPROXY", text)


def test_every_version_of_java_is_pinned():
    """Maven has no lock file: each dependency and plugin has one version, and no range."""
    project = ET.fromstring((JAVA / "pom.xml").read_text(encoding="utf-8"))
    pinned = [*project.iter("dependency"), *project.iter("plugin")]
    assert len(pinned) >= 3
    for one in pinned:
        assert re.fullmatch(r"\d+(\.\d+)+", one.findtext("version", "")), one.findtext("artifactId")
