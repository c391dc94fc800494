"""The real clients, as people set them up, at the upstream itself and then twice at the proxy.

    python client_trial.py [NAME...]

Each is a script in tests/clients/ that knows only an address and a key. What it gets through the
proxy has to be what it gets from the upstream, to the last bit; the first time each distinct text
is bought once, the second time the upstream is not called. `tests/test_clients.py` does the same
with the clients that CI always tries.
"""

import asyncio
import base64
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import client_environments
import orjson
import splintr
from aiohttp import web
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http.app import build_app
from embedding_proxy.proxy.http.app_runner import Runner
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from fault_server import Call, FaultServer, Payload, status, vector_of

from tests.providers.many_texts import write_vocabulary

PATIENCE = 300
"""Seconds for one run of a script; a client may try again and again what will not work."""
MOST_TOKENS = 8192
CL100K = "cl100k_base"
_REFUSED = "invalid_request_error"


@dataclass(frozen=True)
class Client:
    """One script, and what is told to it."""

    environment: str
    script: str
    many: int
    """More texts than it sends at a time, where it has such a number."""
    token_arrays: bool = False
    """Whether it takes what OpenAI takes, token arrays as well."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Its variables, if not OPENAI_BASE_URL and OPENAI_API_KEY alone: {url} is the address, {root}
    the same without /v1, {folder} one of its own."""

    @property
    def name(self) -> str:
        """Return what it is called on the command line."""
        return f"{self.environment} {Path(self.script).stem.removeprefix('try_')}"


_KEY = "client-key"
_PLAIN = {"OPENAI_BASE_URL": "{url}", "OPENAI_API_KEY": _KEY}
_AZURE = {"AZURE_OPENAI_ENDPOINT": "{root}", "AZURE_OPENAI_API_KEY": _KEY}
_LLAMA = {"OPENAI_API_BASE": "{url}", "OPENAI_API_KEY": _KEY}
CLIENTS = [
    *(
        Client(version, "try_openai.py", 20, token_arrays=True, env=_PLAIN | _AZURE)
        for version in ("openai-1", "openai-2", "openai-3")
    ),
    # Its tokenizer's vocabulary is where it would have been downloaded to.
    Client("langchain", "try_langchain.py", 1100, env=_PLAIN | {"TIKTOKEN_CACHE_DIR": "{folder}"}),
    Client("llama-index", "try_llama_index.py", 130, env=_LLAMA),
    Client("llama-index", "try_llama_index_like.py", 130),
    Client("haystack", "try_haystack.py", 70),
    Client("chroma", "try_chroma.py", 60),
    Client("node", "try_openai.mjs", 20, token_arrays=True),
    Client("node", "try_langchain.mjs", 600),
    Client("node", "try_ai_sdk.mjs", 2100),
    Client("node", "try_openai_compatible.mjs", 2100),
    Client("go", "try_openai.go", 20, token_arrays=True),
    Client("java", "try_openai.java", 20, token_arrays=True),
]

# Clients strip, join, count or cut some of these before they send them.
ODD = [
    " ",
    "\n",
    "\t \r\n",
    "two\nlines",
    "two\n\nlines \n",
    "  around  ",
    "Größe, 東京, हिन्दी, \u200fעברית",
    "e\u0301 and \u00e9",
    "🤷🏽‍♀️ \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "a\u0000b\u200b\ufeff\u2028",
    '"\\u0041" \\n {"input": []}',
    "<|endoftext|>",
    "1.0",
    "true",
    "hello world",
]
# More than a model takes, and where a client cuts it by tokens, characters are cut in two.
LONG = "🤷🏽‍♀️ 東京 " * 1200


def cases(client: Client) -> dict[str, object]:
    """Return what the client is to embed, by the name of the case."""
    given: dict[str, object] = {
        "one": f"a text for {client.name}",
        "many": [f"text {i} for {client.name}" for i in range(client.many)],
        "odd": ODD,
        "lines": "two\nlines",
        "long": [LONG, "short"],
        "empty": "",
        "one of them empty": ["a text", ""],
    }
    if client.token_arrays:
        # Two stand for a text that is asked for as such; the last begins inside a character.
        given |= {"tokens": [15339, 1917], "token arrays": [[15339, 1917], [4438], [97, 223]]}
    return given


@cache
def _tokenizer() -> splintr.AnyTokenizer:
    return splintr.Tokenizer.from_pretrained(CL100K)


def _text(item: str | list[int]) -> str | tuple[int, ...]:
    """Return the text that an input is or stands for, if it stands for one."""
    if isinstance(item, str):
        return item
    try:
        return _tokenizer().decode_bytes(item).decode()
    except UnicodeDecodeError:
        return tuple(item)


def _size(item: str | tuple[int, ...]) -> int:
    return len(_tokenizer().encode_ordinary(item) if isinstance(item, str) else item)


class OpenAI(FaultServer):
    """The upstream: refuses what OpenAI refuses, and takes tokens for the text they stand for."""

    answered: list[object]

    def __init__(self) -> None:
        super().__init__(always=self._act)
        self.answered = []

    async def _act(self, request: web.Request, payload: Payload) -> web.StreamResponse:
        inputs = [_text(item) for item in Call("", {}, payload).inputs]
        if not all(inputs):
            return await status(400)(request, payload)
        if (longest := max(map(_size, inputs))) > MOST_TOKENS:
            message = f"This model's maximum context length is {MOST_TOKENS} tokens, however you "
            error = {"message": f"{message}requested {longest} tokens.", "type": _REFUSED}
            body = {"error": {**error, "param": None, "code": None}}
            return await status(400, body)(request, payload)
        self.answered += inputs
        body = orjson.dumps(self.reply({**payload, "input": inputs}))
        return web.Response(body=body, content_type="application/json")


class Broken(Exception):
    """A script failed, instead of saying what became of its cases."""


@dataclass
class Found:
    """What became of one client's trial."""

    versions: dict[str, str]
    texts: int
    """Distinct texts that the upstream answered when the client asked it directly."""
    first: int
    """Inputs bought the first time through the proxy."""
    second: int
    """Calls of the upstream the second time."""
    refused: dict[str, int | str]
    """The status of each case that was refused, or the name of the client's own error."""
    exact: bool
    """Whether the client's own way gives float32 as they are, not the decimals next to them."""
    wrong: list[str]
    """What differs, and where."""

    @property
    def good(self) -> bool:
        """Say whether all is as it should be."""
        return not self.wrong and self.texts == self.first and not self.second


@asynccontextmanager
async def _proxy(folder: Path, upstream: OpenAI) -> AsyncIterator[str]:
    """Open a proxy with an empty cache in front of an upstream; give its base URL."""
    os.environ["OPENAI_API_KEY"] = "upstream-key"
    settings = Settings.model_validate(
        {
            "cache": {"directory": str(folder / "cache")},
            "providers": {"openai": {"base_url": upstream.url}},
        }
    )
    app = build_app(settings, EmbeddingService(settings))
    runner = Runner(app, shutdown_timeout=0.01)
    await runner.setup()
    try:
        await runner.listen()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


async def run(client: Client, url: str, folder: Path, told: object, *arguments: str) -> Any:
    """Run a client's script at an address, in an environment that holds nothing else.

    `told` is what it reads. Raises Broken when the script itself fails, TimeoutError when it does
    not end.
    """
    settings = {
        name: value.format(url=url, root=url.removesuffix("/v1"), folder=folder)
        for name, value in (client.env or _PLAIN).items()
    }
    process = await asyncio.create_subprocess_exec(
        *client_environments.command(client.environment, client.script),
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=folder,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "ANONYMIZED_TELEMETRY": "False",
            "HAYSTACK_TELEMETRY_ENABLED": "False",
            **settings,
        },
    )
    try:
        async with asyncio.timeout(PATIENCE):
            out, err = await process.communicate(json.dumps(told).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise Broken(f"{client.script} failed:\n{err.decode()}")
    return json.loads(out)


Answers = Mapping[str, Mapping[str, Any]]


def _unlike(right: Answers, answers: Answers) -> list[str]:
    """Return the cases that came to something else."""
    said = [
        {case: answer.get("vectors", answer.get("refused")) for case, answer in one.items()}
        for one in (right, answers)
    ]
    return [case for case in right | answers if said[0].get(case) != said[1].get(case)]


def _unlike_the_upstream(client: Client, answers: Answers, model: str) -> list[str]:
    """Return the cases of plain texts whose vectors are not those that the upstream makes.

    Only of the first way, which is the client's own: a collection of Chroma's makes unit norm of
    what has it already, and the last bits differ.
    """
    given, wrong = cases(client), []
    way = next(iter(answers)).partition(": ")[0]
    for name, texts in (("one", [given["one"]]), ("many", given["many"])):
        right = [base64.b64encode(vector_of(model, text)).decode() for text in texts]
        case = f"{way}: {name}"
        wrong += [] if answers[case].get("vectors") == right else [case]
    return wrong


def prepare(client: Client, folder: Path) -> None:
    """Put into a client's folder what it would download."""
    if client.environment == "langchain":
        write_vocabulary(CL100K, folder)


async def trial(client: Client, folder: Path) -> Found:
    """Run a client three times: at the upstream, at a proxy with an empty cache, and again."""
    prepare(client, folder)
    async with OpenAI() as upstream, _proxy(folder, upstream) as url:
        told = cases(client)
        direct = await run(client, upstream.url, folder, told)
        if not upstream.calls:
            raise Broken(f"{client.script} called something else than its upstream")
        model = upstream.calls[0].payload["model"]
        texts, before = len(set(upstream.answered)), len(upstream.answered)
        first = await run(client, url, folder, told)
        bought, calls = len(upstream.answered) - before, len(upstream.calls)
        second = await run(client, url, folder, told)
        calls = len(upstream.calls) - calls
    right, answers = direct["answers"], second["answers"]
    wrong = [
        *(f"the first time: {case}" for case in _unlike(right, first["answers"])),
        *(f"the second time: {case}" for case in _unlike(right, answers)),
        *(f"not the upstream's: {case}" for case in _unlike_the_upstream(client, answers, model)),
    ]
    refused = {case: one["refused"] for case, one in answers.items() if "refused" in one}
    exact = next(iter(answers.values())).get("exact", False)
    return Found(second["versions"], texts, bought, calls, refused, exact, wrong)


async def _main(names: list[str]) -> int:
    """Try the clients whose names hold one of these; print the table, and return the exit code."""
    begun = time.perf_counter()
    clients = [one for one in CLIENTS if not names or any(name in one.name for name in names)]
    await client_environments.make(list(dict.fromkeys(one.environment for one in clients)))
    installed = time.perf_counter()
    row = "{:<34} {:<8} {:<14} {:>5} {:>13} {:>14}  {}".format
    print(row("library", "version", "with", "texts", "bought first", "bought second", "equal"))
    bad = 0
    for client in clients:
        try:
            with tempfile.TemporaryDirectory() as folder:
                found = await trial(client, Path(folder))
        except (Broken, TimeoutError) as error:
            print(f"{client.name}: {str(error) or 'did not end'}", flush=True)
            bad += 1
            continue
        (library, version), *others = found.versions.items()
        beside = ", ".join(f"{name} {number}" for name, number in others)
        equal = "no" if found.wrong else "yes" if found.exact else "yes, as float32"
        library += " (Node)" if client.environment == "node" else ""
        print(row(library, version, beside, found.texts, found.first, found.second, equal))
        for case in found.wrong:
            print(f"    {case}")
        sys.stdout.flush()
        bad += not found.good
    took = f"{installed - begun:.0f} s to install, {time.perf_counter() - installed:.0f} s to try"
    print(f"{len(clients)} clients, {bad} of them wrong; {took}")
    return 1 if bad or not clients else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_main(sys.argv[1:])))
