"""LiteLLM's proxy with its cache on disk, measured like ours. `make bench PEERS=litellm`."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop

from .client import Client
from .environment import python
from .hits import BULK, CONNECTIONS, MEMORY_MIB
from .material import MODEL, asking, make, prove, say
from .misses import calls
from .process import CLIENT_KEY, SERVING, Server, memory, on, proxy, upstream
from .table import Row, compare

LITELLM = "1.106.*"
"""The version measured: another release may be quicker, or slower."""
PEERS = ("litellm",)
KNOWN, SINGLES, WARM_UPS, ROUNDS = 2_000, 100, 1, 3
START_SECONDS = 120.0
LOOK_SECONDS = 0.02
CASES = (
    ("T1", "one input, ours in memory", 1, "base64", 250.0),
    ("T3", "2,000 inputs base64, ours in memory", BULK, "base64", None),
    ("T4", "2,000 inputs float, ours in memory", BULK, "float", None),
)


def rows(folder: Path, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure LiteLLM where it can be installed."""
    try:
        interpreter = python(f"litellm[proxy]=={LITELLM}", "diskcache==5.6.3")
    except (subprocess.CalledProcessError, OSError) as error:
        say(f"LiteLLM cannot be installed, and is left out: {error}")
        return
    say("LiteLLM")
    made = uvloop.run(make(folder / "beside-litellm", KNOWN))
    with (
        upstream() as up,
        litellm(interpreter, folder, up) as peer,
        proxy(made.directory, memory_mib=MEMORY_MIB) as ours,
    ):
        started = time.perf_counter() - peer.since
        yield from cases((ours, peer), up, wanted)
        if wanted("T9"):
            yield Row(target="T9", what="start to ready, LiteLLM", value=started, unit="s")
        if wanted("T10"):
            resident = memory(peer, folder).resident
            yield Row(target="T10", what="resident, serving, LiteLLM", value=resident, unit="MB")


def cases(
    servers: tuple[Server, Server], up: Server, wanted: Callable[[str], bool]
) -> Iterator[Row]:
    """Compare hits; every reply of both is one, for nothing is asked upstream meanwhile."""
    ours, peer = servers
    prove(ours, range(KNOWN))
    for target, what, inputs, encoding, least in CASES:
        if not wanted(target):
            continue
        say(f"{target} {what}")
        connections, some = 1, [asking(range(inputs), encoding)]
        requests = some
        if inputs == 1:
            # Of those that LiteLLM answers in a second, a round would be over as soon as begun.
            connections, requests = CONNECTIONS, [asking(number) for number in range(KNOWN)]
            some = requests[:SINGLES]
        with Client(ours, connections) as first, Client(peer, connections, expects=b"") as second:
            for _ in range(WARM_UPS):
                first.load(requests), second.load(some)
            calls(up)
            taken = [(first.load(requests), second.load(some)) for _ in range(ROUNDS)]
        if bought := calls(up):
            raise RuntimeError(f"LiteLLM did not have everything cached: {sum(bought)} inputs")
        compared = compare(*zip(*taken, strict=True), "ms", "litellm")
        yield Row(
            target=target,
            what=f"{what}, against LiteLLM",
            value=1 / compared.wall,
            unit="× faster",
            least=least,
            figures={"by_cpu": 1 / compared.cpu, **compared.figures},
        )


@contextmanager
def litellm(interpreter: Path, folder: Path, up: Server) -> Iterator[Server]:
    """Run LiteLLM's proxy until the block ends."""
    model = {"model": f"openai/{MODEL}", "api_base": f"http://127.0.0.1:{up.port}/v1"}
    settings = {
        "model_list": [{"model_name": MODEL, "litellm_params": {**model, "api_key": "k"}}],
        "litellm_settings": {
            "cache": True,
            "cache_params": {
                "type": "disk",
                "disk_cache_dir": str(folder / "litellm-cache"),
                "supported_call_types": ["embedding", "aembedding"],
            },
        },
        "general_settings": {"master_key": CLIENT_KEY},
    }
    config = folder / "litellm.yaml"
    config.write_text(json.dumps(settings))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(interpreter.with_name("litellm")), "--config", str(config)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
    # Else it fetches a list of prices when it starts.
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with (folder / "litellm.log").open("w") as log, on(SERVING):
        since = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    with process:
        try:
            while not alive(port):
                late = time.perf_counter() - since > START_SECONDS
                if late or process.poll() is not None:
                    told = (folder / "litellm.log").read_text()[-2000:]
                    raise RuntimeError(f"LiteLLM did not start: {told}")
                time.sleep(LOOK_SECONDS)
            yield Server(port, process.pid, since)
        finally:
            process.terminate()


def alive(port: int) -> bool:
    """Return whether it answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveliness") as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False
