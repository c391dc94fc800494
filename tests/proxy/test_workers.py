"""Several processes behind one port: they share a store, are replaced, and end together."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from aiohttp import web
from clock import until
from embedding_proxy.index.client import Connection
from embedding_proxy.index.collection import Provenance, ensure
from embedding_proxy.proxy.http.workers import WorkerFailed
from prometheus_client.parser import text_string_to_metric_families
from qdrant_server import QdrantServer

MODEL = "wordllama-embed"


@contextmanager
def _running(tmp_path, *options, config="", before="", **environment):
    """Run the proxy with two workers; give the parent process and the base URL.

    It has a process group of its own, as a shell gives to each job. `before` runs ahead of it.
    """
    file = tmp_path / "config.yaml"
    file.write_text(f"cache: {{directory: {tmp_path / 'cache'}}}\n{config}\n")
    code = f"{before}\nfrom embedding_proxy.proxy.__main__ import main; main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--config", str(file)]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(
            [*command, "--workers", "2", *options],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env={**os.environ, **environment},
        ) as parent,
    ):
        try:
            line = parent.stdout.readline().strip()
            yield parent, line.removeprefix("export OPENAI_BASE_URL=")
        finally:
            parent.kill()


def _children(parent) -> set[int]:
    path = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    return {int(pid) for pid in path.read_text(encoding="ascii").split()}


def _until_nobody_answers(url):
    while True:
        urlopen(url, timeout=60).close()


def _fresh(url, text, model=MODEL):
    """Ask over a connection of its own, so that either worker may get it."""
    body = json.dumps({"model": model, "input": text}).encode()
    with urlopen(Request(f"{url}/embeddings", body), timeout=60) as reply:
        return reply.headers["x-cache"]


def test_workers_share_what_one_of_them_bought(tmp_path):
    """What one worker stored is a hit at every other, and both end in good order."""
    with _running(tmp_path) as (parent, url):
        assert len(_children(parent)) == 2
        assert _fresh(url, "once") == "miss"
        assert {_fresh(url, "once") for _ in range(20)} == {"hit"}
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(60) == 0


def test_a_worker_that_dies_is_replaced(tmp_path):
    """The others go on meanwhile, and soon there are as many as before."""
    with _running(tmp_path) as (parent, url):
        before = _children(parent)
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        while len(_children(parent) - {victim}) < 2:
            assert _fresh(url, "text") in ("hit", "miss")
        parent.send_signal(signal.SIGINT)
        assert parent.wait(60) == 130
    assert "it is replaced" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_what_a_terminal_sends_to_all_ends_them_in_good_order(
    number, code, tmp_path, upstream
):
    """The signal reaches each worker twice, by the terminal and the parent; requests are answered.

    SIGHUP comes behind it, as systemd may send it.
    """
    arrived, release = asyncio.Event(), asyncio.Event()

    async def hold(_, payload):
        arrived.set()
        await release.wait()
        return web.json_response(upstream.reply(payload))

    upstream.script.append(hold)
    config = f"providers: {{openai: {{base_url: '{upstream.url}'}}}}"
    with _running(tmp_path, config=config, OPENAI_API_KEY="k") as (parent, url):
        with ThreadPoolExecutor() as threads:
            loop = asyncio.get_running_loop()
            request = loop.run_in_executor(threads, _fresh, url, "a", "text-embedding-3-small")
            await arrived.wait()
            os.killpg(parent.pid, number)
            await until(lambda: "stopping" in (tmp_path / "log").read_text())
            os.killpg(parent.pid, signal.SIGHUP)
            release.set()
            assert await request == "miss"
        assert await asyncio.to_thread(parent.wait, 60) == code


def test_a_second_signal_ends_the_workers_at_once(tmp_path):
    """The parent passes it on: a worker that does not end is not waited for."""
    stuck = "import asyncio, embedding_proxy.proxy.http.app_runner as c\n"
    stuck += "c.Runner.cleanup = lambda _: asyncio.Event().wait()\n"
    with _running(tmp_path, before=stuck) as (parent, _):
        parent.send_signal(signal.SIGINT)
        while (tmp_path / "log").read_text().count("stopping") < 2:
            pass
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(60) == -signal.SIGTERM


def test_workers_end_with_their_parent(tmp_path):
    """Nobody keeps the port when the parent was killed."""
    with _running(tmp_path) as (parent, url):
        parent.kill()
        parent.wait()
        with pytest.raises(OSError, match=r"refused|reset|closed"):
            _until_nobody_answers(url.removesuffix("/v1") + "/livez")


async def test_a_collection_of_another_space_is_one_line_and_code_2(tmp_path):
    """As with one process: the line names the key, and nothing is added to it."""
    async with QdrantServer() as server:
        async with Connection(url=server.url) as connection:
            await ensure(connection, f"{MODEL}-256", Provenance("vendor/else", 256))
        config = tmp_path / "config.yaml"
        cache = tmp_path / "cache"
        config.write_text(
            f"cache: {{directory: {cache}}}\nindex: {{qdrant: {{url: {server.url}}}}}\n"
        )
        serve = ("serve", "--port", "0", "--workers", "2", "--config", str(config))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "embedding_proxy", *serve), stdout=-1, stderr=-1
        )
        out, err = await asyncio.wait_for(process.communicate(), 60)
    said = [line for line in err.decode().splitlines() if line.startswith("embedding-proxy: ")]
    assert (process.returncode, out, len(said)) == (2, b"", 1)
    where = f"embedding-proxy: {config}:2: index.qdrant: the collection {MODEL}-256 holds"
    assert said[0].startswith(where)
    assert b"Traceback" not in err


@pytest.mark.parametrize(
    ("ended", "code", "has_said_why"),
    [(2, 2, True), (1, 1, True), (-9, 1, False), (None, 1, False)],
)
def test_what_a_worker_ended_with_is_what_the_start_ends_with(ended, code, has_said_why):
    """Only of one that was killed there is something left to say."""
    failed = WorkerFailed(ended)
    assert (failed.code, failed.has_said_why) == (code, has_said_why)
    assert str(failed) == f"a worker ended with {ended} before it had started"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_start_that_hangs(number):
    """Workers that never answer, say for a lock that another keeps, hold nobody up."""
    code = (
        "import os, signal\n"
        "from embedding_proxy.proxy.config.schema import Settings\n"
        "from embedding_proxy.proxy.http import workers\n"
        "def work(settings, ready, channel):\n"
        "    os.write(1, b'begun\\n')\n"
        "    signal.pause()\n"
        "settings = Settings(server={'workers': 2})\n"
        "supervisor = workers.Supervisor(settings, None, work, None)\n"
        "print(supervisor.run(lambda: print('announced')).name)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert [parent.stdout.readline() for _ in range(2)] == ["begun\n"] * 2
            parent.send_signal(number)
            assert parent.communicate(timeout=60)[0] == f"{number.name}\n"
        finally:
            parent.kill()


def test_workers_that_cannot_start_are_one_error(tmp_path):
    """A store that does not open ends the start with exit code 1, and says why."""
    (tmp_path / "cache").write_text("a file")
    with _running(tmp_path) as (parent, url):
        assert url == ""
        assert parent.wait(60) == 1
    log = (tmp_path / "log").read_text()
    assert "File exists" in log
    assert "Traceback" not in log


def _metrics(url) -> dict[str, float]:
    """Return the counters, of whichever worker answers, but for those of scrapes themselves."""
    with urlopen(f"{url.removesuffix('/v1')}/metrics", timeout=60) as reply:
        families = [*text_string_to_metric_families(reply.read().decode())]
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in families
        for sample in family.samples
        if family.type == "counter" and sample.labels.get("route") != "metrics"
    }


def test_every_worker_tells_the_same_counters_and_restarts_continue_them(tmp_path):
    """One scrape sees all; no label names a process; what a dead worker counted stays."""
    name = "embedding_proxy_requests_total[('route', 'embeddings'), ('status', '200')]"
    with _running(tmp_path) as (parent, url):
        for number in range(20):
            _fresh(url, f"text {number % 5}")
        while _metrics(url).get(name) != 20:
            pass
        told = [_metrics(url) for _ in range(8)]
        assert all(one == told[0] for one in told)
        victim = min(_children(parent))
        os.kill(victim, signal.SIGKILL)
        while len(_children(parent) - {victim}) < 2:
            pass
        assert _metrics(url)[name] == 20
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(60) == 0
    with _running(tmp_path) as (_, url):
        _fresh(url, "text 1")
        while (after := _metrics(url)).get(name) != 21:
            pass
    assert {key for key, value in told[0].items() if after.get(key, 0) < value} == set()
