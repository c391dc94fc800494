"""`embedding-proxy demo`: real text, the real server, the official client; twice, and once more.

It starts the proxy as a process of its own with an empty cache, embeds the docstrings of Python's
standard library on the local model, restarts the proxy, and asks again. Nothing leaves the machine.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from embedding_proxy.providers import tokens, vector
from embedding_proxy.providers.model_catalog import CATALOGUE
from embedding_proxy.proxy.diagnostics.sample_texts import Docstring, standard_library

from .formatting import money, savings

try:
    import openai
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise ImportError(
        "the demo needs more: pip install 'wordllama>=0.4' 'openai>=1.60' 'rich>=13.9'"
    ) from error

MODEL = "wordllama-embed"
PAID_MODEL = "text-embedding-3-small"
INPUTS_A_REQUEST = 500
QUERIES = (
    "open a web page in the browser",
    "split a shell command into words",
)
_START_SECONDS = 30.0
_MIN_WIDTH = 60


class DemoFailed(Exception):
    """The demo did not show what it promises; the message says why."""


@dataclass(frozen=True, slots=True)
class Pass:
    """The result of one pass over all inputs."""

    title: str
    vectors: vector.Floats
    seconds: float
    computed: int
    hits: int


def run() -> None:
    """Run the demo and print its result. Raises DemoFailed."""
    console = Console(highlight=False)
    # A narrower one is never ready with a table.
    console.width = max(console.width, _MIN_WIDTH)
    console.print("Reading the docstrings of Python's standard library…")
    docs = standard_library()
    texts = list({doc.text: None for doc in docs})
    price = CATALOGUE[PAID_MODEL].price * sum(tokens.count(texts)) / 1e6
    with tempfile.TemporaryDirectory(prefix="embedding-proxy-demo-") as folder:
        config = Path(folder) / "config.yaml"
        settings = {"cache": {"directory": folder}, "providers": {"local": {}}}
        config.write_text(json.dumps(settings))  # JSON is YAML
        with _proxy(config) as client:
            first = _embed(client, "first pass", texts)
        # In a new process everything is served from disk.
        with _proxy(config) as client:
            second = _embed(client, "after a restart", texts)
            # In the client's default encoding, base64; floats take far longer to read.
            third = _embed(client, "cut to 128 wide", texts, 128)
            queries = _embed(client, "queries", list(QUERIES)).vectors
    passes = [first, second, third]
    console.print(_table(passes, len(texts), price))
    console.print(_summary(first, second, price))
    for query, near in zip(QUERIES, _nearest(queries, first.vectors), strict=True):
        console.print(f"\nNearest to [bold]{query}[/bold]")
        for i, cosine in near:
            console.print(
                f"  {cosine:.2f}  {_excerpt(docs, texts[i])}", markup=False, soft_wrap=True
            )
    _judge(passes, len(texts))


@contextmanager
def _proxy(config: Path) -> Iterator[openai.OpenAI]:
    """Run `embedding-proxy serve` on a free port, and give a client that points at it."""
    # -P: do not import a proxy.py in the current folder.
    command = [
        sys.executable,
        "-P",
        "-m",
        "embedding_proxy",
        "serve",
        "--port",
        "0",
        "--config",
        str(config),
    ]
    log = config.with_name("proxy.log")
    with (
        log.open("ab") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,  # noqa: S603
    ):
        late = threading.Timer(_START_SECONDS, process.kill)
        late.start()
        try:
            # The last line of a start is to be pasted into a shell.
            line = process.stdout.readline() if process.stdout else ""
            late.cancel()
            _, _, url = line.strip().partition("OPENAI_BASE_URL=")
            if not url:
                raise DemoFailed(
                    f"the proxy did not start: {log.read_text(errors='replace').strip()}"
                )
            with openai.OpenAI(base_url=url, api_key="none-is-needed") as client:
                yield client
        except openai.OpenAIError as error:
            log_text = log.read_text(errors="replace").strip()
            raise DemoFailed(
                f"a request failed: {error}; the log of the proxy: {log_text}"
            ) from error
        finally:
            late.cancel()
            process.terminate()


def _embed(
    client: openai.OpenAI,
    title: str,
    texts: list[str],
    dimensions: int | None = None,
) -> Pass:
    """Embed all texts, some hundred a request, and measure the time."""
    rows: list[list[float]] = []
    computations = hits = 0
    start = time.perf_counter()
    for i in range(0, len(texts), INPUTS_A_REQUEST):
        reply = client.embeddings.with_raw_response.create(
            model=MODEL,
            input=texts[i : i + INPUTS_A_REQUEST],
            dimensions=dimensions or openai.omit,
        )
        computations += int(reply.headers["x-cache-misses"])
        hits += int(reply.headers["x-cache-hits"])
        rows += (item.embedding for item in reply.parse().data)
    seconds = time.perf_counter() - start
    return Pass(title, np.array(rows, dtype=np.float32), seconds, computations, hits)


def _table(passes: list[Pass], inputs: int, price: float) -> Table:
    table = Table(title=f"Through the openai client, model {MODEL}")
    table.add_column("")
    for title in ("inputs", "computed", "hits", "seconds", "at OpenAI"):
        table.add_column(title, justify="right")
    for pass_ in passes:
        cost = price * pass_.computed / inputs
        row = (len(pass_.vectors), pass_.computed, pass_.hits)
        table.add_row(pass_.title, *(f"{n:,}" for n in row), f"{pass_.seconds:.2f}", money(cost))
    return table


def _summary(first: Pass, second: Pass, price: float) -> str:
    rate = len(second.vectors) / second.seconds
    return (
        f"Served again from disk at {rate:,.0f} inputs/s, client included"
        f" ({first.seconds / second.seconds:.1f} × as fast as the local model)."
        f" At OpenAI ({PAID_MODEL}) the three passes would have cost {money(3 * price)} without"
        f" the cache, {money(price)} with it: {savings(2 * price, price)}."
    )


def _nearest(
    queries: vector.Floats, vectors: vector.Floats, count: int = 3
) -> Iterator[list[tuple[int, float]]]:
    """Yield, for each query, the indices and cosines of the nearest inputs."""
    for cosines in queries @ vectors.T:
        best = np.argsort(-cosines)[:count]
        yield [(int(i), float(cosines[i])) for i in best]


def _excerpt(docs: list[Docstring], text: str) -> str:
    name = next(doc.name for doc in docs if doc.text == text)
    return f"{name}: {' '.join(text.split())[:70]}"


def _judge(passes: list[Pass], inputs: int) -> None:
    """Raise DemoFailed unless everything was computed once and then served from the cache."""
    first, *later = passes
    if first.computed != inputs:
        raise DemoFailed(f"the first pass computed {first.computed} of {inputs} inputs")
    for pass_ in later:
        if pass_.hits != inputs or pass_.computed:
            raise DemoFailed(f"{pass_.title}: {pass_.hits} hits of {inputs} inputs")
    if not np.array_equal(first.vectors, later[0].vectors):
        raise DemoFailed("the second pass gave other vectors than the first")
