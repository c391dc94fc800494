"""Reading the configuration anew, handing the port over, and saying so before the end."""

import asyncio
import fcntl
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import termios
from datetime import UTC, datetime

import aiohttp
import pytest
from aiohttp import web
from clock import until
from embedding_proxy.proxy.config.keys_file import KeysFile, StoredKey, digest, new_key
from embedding_proxy.proxy.config.loader import load
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http import control, systemd
from embedding_proxy.proxy.http import process as server
from embedding_proxy.proxy.http.process import Instance, base_url, listen
from fault_server import status
from pages import ROOT
from prometheus_client.parser import text_string_to_metric_families
from reload_trial import run

GOOD = {"model": "text-embedding-3-small", "input": "a"}
OTHER = {"model": "text-embedding-3-small", "input": "b"}


TLS = ROOT / "tests" / "data" / "tls"


class Running:
    """A proxy in this process, whose configuration file may be written anew."""

    def __init__(self, folder, upstream, **server_keys):
        self.folder, self.upstream = folder, upstream
        self.file = folder / "config.yaml"
        self.write(**server_keys)
        self.listening = listen(load(self.file, purpose="serve"))
        self.url = base_url(self.listening)
        self.instance = None

    def write(self, text=None, /, **server_keys):
        content = {
            "server": {"port": 0, **server_keys},
            "cache": {"directory": str(self.folder / "cache")},
            "providers": {"openai": {"base_url": self.upstream.url}},
        }
        self.file.write_text(text or json.dumps(content))

    def load(self) -> Settings:
        return load(self.file, purpose="serve")

    async def post(self, session, body=None, **headers):
        return await session.post(f"{self.url}/embeddings", json=body or GOOD, headers=headers)


@pytest.fixture
async def running(tmp_path, upstream, monkeypatch):
    """Give a proxy in this process."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    proxy = Running(tmp_path, upstream)
    async with Instance(proxy.load(), proxy.listening, proxy.load) as instance:
        proxy.instance = instance
        yield proxy


@pytest.fixture
async def session():
    """Give a client that keeps one connection."""
    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(connector=connector) as client:
        yield client


async def test_keys_change_on_an_open_connection(running, session):
    """A key that was added lets in, one that was removed does not; no connection is closed."""
    assert (await running.post(session)).status == 200
    running.write(keys=["ep-one"])
    assert (await running.instance.reload()).code == 0
    # The same bytes were answered before, without a key.
    assert (await running.post(session)).status == 401
    response = await running.post(session, Authorization="Bearer ep-one")
    assert (response.status, response.headers["x-cache"]) == (200, "hit")
    running.write(keys=["ep-two"])
    assert (await running.instance.reload()).code == 0
    assert (await running.post(session, Authorization="Bearer ep-one")).status == 401
    assert (await running.post(session, Authorization="Bearer ep-two")).status == 200
    assert len(running.instance._runner.connections) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("server: {port: 0, prot: 1}", "prot: unknown key"),
        ("server: [", "config.yaml:1"),
        ("server: {port: 0, host: 0.0.0.0}", "server.host: "),
        ("server: {port: 1}", "server.port: cannot change while the proxy runs"),
        ("server: {port: 0, workers: 2}", "server.workers: cannot change"),
        ("server: {port: 0}\ncache: {directory: /elsewhere}", "cache.directory: cannot change"),
    ],
)
async def test_a_wrong_configuration_changes_nothing(text, told, running, session, caplog):
    """It is refused whole, and the log says why."""
    assert (await running.post(session)).status == 200
    running.write(text)
    reply = await running.instance.reload()
    assert reply.code == 2
    assert any(told in line for line in reply.lines)
    assert told in caplog.text
    response = await running.post(session)
    assert (response.status, response.headers["x-cache"]) == (200, "hit")


async def test_a_purchase_that_is_under_way_is_joined(running, session, upstream):
    """A request after the reload waits for what one before it buys: one call, no vector twice."""
    arrived, release = asyncio.Event(), asyncio.Event()

    async def hold(_, payload) -> web.Response:
        arrived.set()
        await release.wait()
        return web.json_response(upstream.reply(payload))

    upstream.script.append(hold)
    async with aiohttp.ClientSession() as other:
        first = asyncio.create_task(running.post(session))
        await arrived.wait()
        running.write(max_body_mib=7)
        assert (await running.instance.reload()).code == 0
        second = asyncio.create_task(running.post(other))
        assert (await running.post(other, OTHER)).headers["x-cache"] == "miss"
        release.set()
        assert (await first).headers["x-cache"] == "miss"
        assert (await second).status == 200
    assert [call.payload["input"] for call in upstream.calls] == [["a"], ["b"]]


async def test_memory_stays_warm_and_counters_go_on(running, session):
    """The storage of an equal cache section is used on."""
    assert (await running.post(session)).headers["x-cache"] == "miss"
    running.write(max_body_mib=7)
    await running.instance.reload()
    assert (await running.post(session)).headers["x-cache"] == "hit"
    counters = running.instance._app[server.SERVICE].counters
    assert (counters.memory_hits, counters.disk_hits, counters.misses) == (1, 0, 1)


async def test_another_cache_section_is_opened_anew(running, session):
    """Memory of another size: the disk has what was bought."""
    assert (await running.post(session)).headers["x-cache"] == "miss"
    text = json.loads(running.file.read_text())
    text["cache"]["memory_mib"] = 5
    running.write(json.dumps(text))
    assert (await running.instance.reload()).code == 0
    assert (await running.post(session)).headers["x-cache"] == "hit"


async def test_a_stopping_proxy_says_so_and_still_answers(running, session):
    """/readyz is 503 for `server.drain_s`; connections are closed behind their next reply."""
    running.write(drain_s=600)
    await running.instance.reload()
    ready = running.url.removesuffix("/v1") + "/readyz"
    assert (await session.get(ready)).status == 200
    end = asyncio.create_task(running.instance.run())
    await running.instance.events.put(signal.SIGTERM)
    async with aiohttp.ClientSession() as new:
        while (response := await new.get(ready)).status != 503:
            pass
        assert response.headers["Connection"] == "close"
        assert (await running.post(new)).status == 200
        assert (await running.post(session)).status == 200
    assert await end is signal.SIGTERM


async def test_a_certificate_is_renewed_by_a_reload(tmp_path, upstream, session, monkeypatch):
    """New connections see the new one, open ones go on; a wrong pair changes nothing."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    shutil.copy(TLS / "server.crt", cert)
    shutil.copy(TLS / "server.key", key)
    proxy = Running(tmp_path, upstream, tls={"cert": str(cert), "key": str(key)})
    url = base_url(proxy.listening, is_encrypted=True)
    assert url.startswith("https://")

    def seen():
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with (
            socket.create_connection(proxy.listening.getsockname()) as plain,
            context.wrap_socket(plain) as encrypted,
        ):
            return encrypted.getpeercert(binary_form=True)

    async with Instance(proxy.load(), proxy.listening, proxy.load) as instance:
        trusted = ssl.create_default_context(cafile=TLS / "ca.pem")
        trusted.check_hostname = False
        for _ in range(3):
            response = await session.post(f"{url}/embeddings", json=GOOD, ssl=trusted)
            assert response.status == 200
        assert response.headers["x-cache"] == "hit"
        first = await asyncio.to_thread(seen)
        cert.write_text("no certificate")
        reply = await instance.reload()
        assert reply.code == 2
        assert "are no certificate and its key" in reply.lines[0]
        assert await asyncio.to_thread(seen) == first
        shutil.copy(TLS / "other.crt", cert)
        assert (await instance.reload()).code == 0
        assert await asyncio.to_thread(seen) != first
        assert (await session.post(f"{url}/embeddings", json=GOOD, ssl=trusted)).status == 200
        proxy.write()
        assert "server.tls: cannot change" in (await instance.reload()).lines[0]


async def test_slow_requests_are_all_answered_after_a_signal(running, upstream):
    """Two hundred at once, each of another text: all are answered, and all are kept."""
    release, arrived = asyncio.Event(), asyncio.Event()

    async def hold(_, payload) -> web.Response:
        arrived.set()
        await release.wait()
        return web.json_response(upstream.reply(payload))

    upstream.always = hold
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as client:
        bodies = [{**GOOD, "input": f"text {number}"} for number in range(200)]
        requests = [asyncio.create_task(running.post(client, body)) for body in bodies]
        await arrived.wait()
        await until(lambda: running.instance._runner.requests.in_flight >= len(bodies))
        await running.instance.events.put(signal.SIGTERM)
        assert await running.instance.run() is signal.SIGTERM
        cleaning = asyncio.create_task(running.instance._runner.cleanup())
        release.set()
        assert {response.status for response in await asyncio.gather(*requests)} == {200}
        await cleaning


async def test_the_control_socket(running, tmp_path):
    """Reload, the listening socket, an unknown word, and the end."""
    path = control.socket_path(tmp_path / "cache", 1)
    listener = control.listen(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [*control.running(tmp_path / "cache")] == [1]
    with server._control(running.instance.events, listener, None):
        end = asyncio.create_task(running.instance.run())

        def ask(command):
            return asyncio.to_thread(control.ask, path, command)

        assert (await ask("reload"))[0].code == 0
        assert (await ask("dance"))[0] == control.Reply(2, ("unknown command",))
        _, (inherited,) = await ask("socket")
        assert inherited.getsockname() == running.listening.getsockname()
        inherited.close()
        assert (await ask("stop"))[0].code == 0
        assert await end is signal.SIGTERM
    assert not path.exists()
    with pytest.raises(control.NotRunning):
        control.ask(path, "reload")
    assert not [*control.running(tmp_path / "cache")]


def test_a_successor_keeps_its_control_socket(tmp_path):
    """The one that was there before removes only what is its own."""
    path = control.socket_path(tmp_path, 1)
    first = control.listen(path)
    second = control.listen(path)
    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()


def test_a_long_path_has_its_socket_among_the_temporary_files(tmp_path):
    """Systems allow about a hundred bytes."""
    folder = tmp_path.joinpath(*["deep" * 10] * 3)
    path = control.socket_path(folder, 8080)
    assert folder not in path.parents
    assert path != control.socket_path(folder / "other", 8080)
    listener = control.listen(path)
    assert [*control.running(folder)] == [8080]
    listener.close()


def test_where_there_can_be_no_socket_the_proxy_runs(tmp_path):
    """A file in the place of the folder."""
    (tmp_path / "file").write_text("")
    assert control.listen(tmp_path / "file" / "control-1.sock") is None


def test_what_systemd_is_told(tmp_path, monkeypatch):
    """Its states, over its socket; and nothing where it asks for nothing."""
    systemd.notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        monkeypatch.chdir(tmp_path)  # A path of any length.
        told.bind("notify")
        monkeypatch.setenv("NOTIFY_SOCKET", "notify")
        with systemd.reloading():
            assert told.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert told.recv(100) == b"READY=1"
    assert systemd.watchdog_interval() is None
    monkeypatch.setenv("WATCHDOG_USEC", "4000000")
    assert systemd.watchdog_interval() == 2.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert systemd.watchdog_interval() is None


@pytest.mark.parametrize("workers", [1, 2])
async def test_reloads_and_hand_overs_fail_no_request(workers):
    """Clients that try nothing twice, over processes of their own."""
    seen = await run(reloads=3, hand_overs=1, workers=workers, clients=8)
    assert seen.statuses.keys() == {200}


def _serve(tmp_path, **options):
    file = tmp_path / "config.yaml"
    file.write_text(f"cache: {{directory: {tmp_path / 'cache'}}}\nserver: {{port: 0}}\n")
    command = [sys.executable, "-m", "embedding_proxy", "serve", "--config", str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def test_a_terminal_that_is_closed_ends_the_proxy(tmp_path):
    """The same signal from a terminal that is still there asks for a reload."""
    controller, terminal = os.openpty()

    def take_terminal():
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    process = _serve(tmp_path, stdin=terminal, stderr=terminal, preexec_fn=take_terminal)
    told = b""
    with process:
        try:
            assert process.stdout.readline().startswith("export ")
            process.send_signal(signal.SIGHUP)
            while b"read anew" not in told:
                told += os.read(controller, 4096)
            os.close(terminal)
            os.close(controller)
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_the_command_reload(tmp_path):
    """It reaches the proxy by its cache folder, and says what came of it."""
    with _serve(tmp_path) as process:
        try:
            assert process.stdout.readline().startswith("export ")

            def reload(*options):
                command = [sys.executable, "-m", "embedding_proxy", "reload", *options]
                command += ["--config", str(tmp_path / "config.yaml")]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                return done.returncode, done.stderr

            assert reload() == (0, f"embedding-proxy: {server.RELOADED}\n")
            code, said = reload("--port", "1")
            assert code == 1
            assert "no proxy that uses the cache" in said
            (tmp_path / "config.yaml").write_text("nonsense: 1")
            code, said = reload()
            assert code == 2
            assert "nonsense: unknown key" in said
        finally:
            process.kill()


def test_a_wrong_certificate_is_named_with_file_and_line(tmp_path):
    """As all mistakes of a configuration."""
    file = tmp_path / "config.yaml"
    file.write_text("server:\n  port: 0\n  tls:\n    cert: none.pem\n    key: none.key\n")
    command = [sys.executable, "-m", "embedding_proxy", "serve", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{file}:4: server.tls.cert: {tmp_path / 'none.pem'} cannot be read" in done.stderr


async def _metric(running, session, name, **labels):
    async with session.get(running.url.removesuffix("/v1") + "/metrics") as response:
        families = [*text_string_to_metric_families(await response.text())]
    return [
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == f"embedding_proxy_{name}" and labels.items() <= sample.labels.items()
    ]


async def test_reloads_count_nothing_twice(running, session):
    """The tiers go on counting: their counters are published by one at a time."""
    for _ in range(2):
        assert (await running.post(session)).status == 200
    for turn in range(3):
        running.write(max_body_mib=7 + turn)
        assert (await running.instance.reload()).code == 0
        assert await _metric(running, session, "cache_lookups_total", result="miss") == [1]
        assert await _metric(running, session, "cache_lookups_total", result="memory") == [1]
    assert (await running.post(session)).headers["x-cache"] == "hit"
    assert await _metric(running, session, "cache_lookups_total", result="memory") == [2]


async def test_a_gauge_without_a_value_is_not_zero(running, session):
    """Nothing is known of a provider before its first call; then it is ready."""
    assert await _metric(running, session, "provider_ready") == []
    assert (await running.post(session)).status == 200
    assert await _metric(running, session, "provider_ready", provider="openai") == [1]
    await running.instance.reload()
    assert 0 not in await _metric(running, session, "provider_ready")


async def test_a_cooldown_outlasts_a_reload(running, session, upstream):
    """A provider that has asked for a pause is not called before its end."""
    upstream.script.append(status(429, headers={"Retry-After": "600"}))
    assert (await running.post(session)).status == 429
    running.write(max_body_mib=7)
    assert (await running.instance.reload()).code == 0
    assert (await running.post(session, OTHER)).status == 429
    assert len(upstream.calls) == 1


async def test_a_refused_configuration_leaves_the_log_as_it_was(running, monkeypatch):
    """Level and form of the log are part of what is refused."""
    configured = []
    monkeypatch.setattr(
        "embedding_proxy.proxy.log.configure", lambda *given: configured.append(given)
    )
    running.write(json.dumps({"server": {"port": 1}, "log": {"format": "json"}}))
    assert (await running.instance.reload()).code == 2
    assert configured == []
    running.write(max_body_mib=7)
    assert (await running.instance.reload()).code == 0
    assert configured == [("info", "auto")]


async def test_keys_that_are_gone_do_not_open_the_proxy(running, session):
    """The file of clients' keys was taken away: a reload is refused, and the keys stay."""
    path = running.load().keys_path
    stored = StoredKey(digest=digest(new_key()), name="one", created=datetime.now(UTC))
    KeysFile(path).change(lambda keys: [*keys, stored])
    assert (await running.instance.reload()).code == 0
    assert (await running.post(session)).status == 401
    path.unlink()
    reply = await running.instance.reload()
    assert reply.code == 2
    assert "is gone" in reply.lines[0]
    assert (await running.post(session)).status == 401


async def test_a_silent_client_of_the_control_socket_holds_nobody_up(
    running, session, tmp_path, monkeypatch
):
    """It is waited for beside everything else."""
    monkeypatch.setattr(control, "PATIENCE_S", 0.5)
    path = control.socket_path(tmp_path / "cache", 1)
    listener = control.listen(path)
    with (
        server._control(running.instance.events, listener, None),
        socket.socket(socket.AF_UNIX) as silent,
    ):
        silent.connect(str(path))
        assert (await running.post(session)).status == 200
        end = asyncio.create_task(running.instance.run())
        assert (await asyncio.to_thread(control.ask, path, "stop"))[0].code == 0
        assert await end is signal.SIGTERM
