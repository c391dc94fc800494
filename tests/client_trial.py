"""The real clients, as people set them up, at the upstream itself and then twice at the proxy.

    python tests/client_trial.py [NAME...]

Each is a script in tests/clients/ that knows only an address and a key. What it gets through the
proxy has to be what it gets from the upstream, to the last bit; the first time each distinct text is
bought once, the second time the upstream is not called. `tests/test_clients.py` does the same with
the clients that CI always tries.
"""

import asyncio
import base64
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import client_environments
import splintr
from aiohttp import web
from client_environments import HERE
from fault_server import Call, FaultServer, Payload, status, vector_of
from flow import serving

from providers import tokens

MOST_TOKENS = 8192
VOCABULARY = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
SIZE = 100_256


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
    """Its variables, where they are not OPENAI_BASE_URL and OPENAI_API_KEY; {url} is the address,
    {root} the same without /v1."""

    @property
    def name(self) -> str:
        """Return what it is called on the command line."""
        return f"{self.environment} {Path(self.script).stem.removeprefix('try_')}"


_AZURE = {"AZURE_OPENAI_ENDPOINT": "{root}", "AZURE_OPENAI_API_KEY": "client-key"}
_LLAMA = {"OPENAI_API_BASE": "{url}", "OPENAI_API_KEY": "client-key"}
_PLAIN = {"OPENAI_BASE_URL": "{url}", "OPENAI_API_KEY": "client-key"}
CLIENTS = [
    *(
        Client(environment, script, 100, token_arrays=True, env=env)
        for environment in ("openai-1", "openai-2", "openai-3")
        for script, env in (("try_openai.py", _PLAIN), ("try_azure.py", _AZURE))
    ),
    Client("langchain", "try_langchain.py", 1100),
    Client("llama-index", "try_llama_index.py", 130, env=_LLAMA),
    Client("llama-index", "try_llama_index_like.py", 130),
    Client("haystack", "try_haystack.py", 70),
    Client("chroma", "try_chroma.py", 100),
    Client("node", "try_openai.mjs", 100, token_arrays=True),
    Client("node", "try_langchain.mjs", 600),
    Client("node", "try_ai_sdk.mjs", 2100),
    Client("node", "try_openai_compatible.mjs", 2100),
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
        # The last begins inside a character, so that it stands for no text.
        given |= {"tokens": [15339, 1917], "token arrays": [[15339, 1917], [4438], [97, 223]]}
    return given


class OpenAI(FaultServer):
    """The upstream: it refuses what OpenAI refuses, and takes tokens for the text they stand for."""

    answered: list[object]

    def __init__(self) -> None:
        super().__init__(always=self._act)
        self.answered = []

    async def _act(self, request: web.Request, payload: Payload) -> web.StreamResponse:
        inputs = [
            tokens.as_text(item if isinstance(item, str) else tuple(item))
            for item in Call("", {}, payload).inputs
        ]
        if not all(inputs) or max(tokens.count(inputs)) > MOST_TOKENS:
            return await status(400)(request, payload)
        self.answered += inputs
        return web.json_response(self.reply({**payload, "input": inputs}))


@dataclass
class Found:
    """What became of one client's trial."""

    versions: dict[str, str]
    texts: int
    """Distinct texts that the upstream would have been asked for."""
    first: int
    """Inputs bought the first time through the proxy."""
    second: int
    """Calls of the upstream the second time."""
    refused: dict[str, object]
    exact: bool
    """Whether the client's numbers are float32, not merely next to them."""
    wrong: list[str]
    """What differs, and where."""

    @property
    def good(self) -> bool:
        """Say whether all is as it should be."""
        return not self.wrong and self.texts == self.first and not self.second


def write_vocabulary(folder: Path) -> None:
    """Put the vocabulary where tiktoken keeps what it has downloaded."""
    token = splintr.Tokenizer.from_pretrained(tokens.CL100K).decode_token_bytes
    lines = (b"%b %d\n" % (base64.b64encode(token(i)), i) for i in range(SIZE))
    (folder / hashlib.sha1(VOCABULARY.encode()).hexdigest()).write_bytes(b"".join(lines))


async def _run(client: Client, url: str, folder: Path) -> dict[str, Any]:
    """Run a client's script at an address, in an environment that holds nothing else."""
    settings = {
        name: value.format(url=url, root=url.removesuffix("/v1"))
        for name, value in (client.env or _PLAIN).items()
    }
    process = await asyncio.create_subprocess_exec(
        client_environments.program(client.environment),
        HERE / "clients" / ("node" if client.environment == "node" else "python") / client.script,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=folder,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "TIKTOKEN_CACHE_DIR": str(folder),
            "ANONYMIZED_TELEMETRY": "False",
            "HAYSTACK_TELEMETRY_ENABLED": "False",
            **settings,
        },
    )
    out, err = await process.communicate(json.dumps(cases(client)).encode())
    if process.returncode:
        raise RuntimeError(f"{client.name} failed:\n{err.decode()}")
    return json.loads(out)


def _differing(one: Mapping[str, object], other: Mapping[str, object], where: str) -> list[str]:
    return [f"{where}: {case}" for case in one | other if one.get(case) != other.get(case)]


def _unlike_the_upstream(client: Client, answers: Mapping[str, Any], model: str) -> Iterable[str]:
    """Yield the cases of plain texts whose vectors are not those that the upstream makes."""
    given = cases(client)
    for case, answer in answers.items():
        texts = given[case.partition(": ")[2]]
        if case.endswith((": one", ": many")):
            texts = [texts] if isinstance(texts, str) else texts
            right = [base64.b64encode(vector_of(model, one).tobytes()).decode() for one in texts]
            if answer.get("vectors") != right:
                yield f"not the upstream's: {case}"


async def trial(client: Client, folder: Path) -> Found:
    """Run a client three times: at the upstream, at a proxy with an empty cache, and again."""
    await asyncio.to_thread(write_vocabulary, folder)
    async with OpenAI() as upstream, serving(folder, upstream) as (_, url):
        direct = await _run(client, upstream.url, folder)
        model = upstream.calls[0].payload["model"]
        texts = len(set(upstream.answered))
        bought = len(upstream.answered)
        first = await _run(client, url, folder)
        bought, calls = len(upstream.answered) - bought, len(upstream.calls)
        second = await _run(client, url, folder)
        calls = len(upstream.calls) - calls
    wrong = [
        *_differing(direct["answers"], first["answers"], "the first time"),
        *_differing(direct["answers"], second["answers"], "the second time"),
        *_unlike_the_upstream(client, second["answers"], model),
    ]
    refused = {
        case: answer["refused"] for case, answer in second["answers"].items() if "refused" in answer
    }
    exact = all(answer.get("exact", True) for answer in second["answers"].values())
    return Found(second["versions"], texts, bought, calls, refused, exact, wrong)


async def _main(names: list[str]) -> int:
    """Try the clients whose names contain one of these, print the table, and say whether all is well."""
    begun = time.perf_counter()
    clients = [one for one in CLIENTS if not names or any(name in one.name for name in names)]
    made = dict.fromkeys(one.environment for one in clients)
    await client_environments.make([name for name in made if name != client_environments.OWN])
    installed = time.perf_counter()
    row = "{:<40} {:<9} {:<16} {:>6} {:>13} {:>14}  {}".format
    print(row("library", "version", "with", "texts", "bought first", "bought second", "equal"))
    bad = 0
    for client in clients:
        with tempfile.TemporaryDirectory() as folder:
            found = await trial(client, Path(folder))
        (library, version), *others = found.versions.items()
        beside = " ".join(f"{name} {number}" for name, number in others)
        kind = "" if client.script != "try_azure.py" else " (Azure)"
        equal = "yes" if found.exact else "yes, rounded to float32"
        said = "NO" if found.wrong else equal
        print(
            row(f"{library}{kind}", version, beside, found.texts, found.first, found.second, said),
            flush=True,
        )
        for line in found.wrong:
            print(f"    {line}")
        bad += not found.good
    took = time.perf_counter() - installed
    print(f"{len(clients)} clients, {bad} bad, in {took:.0f} s; {installed - begun:.0f} s to install")
    return 1 if bad or not clients else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_main(sys.argv[1:])))
