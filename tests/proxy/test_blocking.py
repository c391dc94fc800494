"""`embedding_proxy.embed`: blocking, from any thread, with nothing lost at the end of a process."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from clock import until
from embedding_proxy.proxy.config.errors import ConfigError

import embedding_proxy

ROOT = Path(__file__).parents[2]
MODEL = "wordllama-embed"


@pytest.fixture
def config(tmp_path):
    """Give a configuration file with a cache of its own; services are closed afterwards."""
    file = tmp_path / "config.yaml"
    file.write_text("cache: {directory: ./store}\n")
    yield file
    embedding_proxy.close()


@pytest.fixture
def run(tmp_path, config):
    """Give a function that runs a script in a folder, as a user would."""

    def run(code, *arguments) -> subprocess.CompletedProcess[str]:
        (tmp_path / "script.py").write_text(code)
        inherited = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
        return subprocess.run(
            [sys.executable, *(arguments or ["script.py"])],
            cwd=tmp_path,
            env={**inherited, "HOME": str(tmp_path), "PYTHONPATH": f".{os.pathsep}{ROOT}"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return run


def test_every_public_name_is_there():
    """What `__all__` names can be imported, and nothing else is invented."""
    for name in set(embedding_proxy.__all__) - {"__version__"}:
        assert getattr(embedding_proxy, name).__name__ == name
    assert embedding_proxy.__version__ == metadata.version("embedding-proxy")
    assert set(dir(embedding_proxy)) >= {*embedding_proxy.__all__, "__name__"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = embedding_proxy.nothing


def test_vectors_of_several_inputs(config):
    """One float32 row an input, of length 1; the second time they come from the cache."""
    bought = embedding_proxy.embed(["a cat", "a dog"], model=MODEL, config=config)
    assert bought.vectors.shape == (2, 256)
    assert bought.vectors.dtype == np.float32
    assert np.linalg.norm(bought.vectors, axis=1) == pytest.approx([1, 1])
    assert bought.outcomes == ["miss", "miss"]
    cached = embedding_proxy.embed(["a dog", "a cat"], model=MODEL, config=str(config))
    assert cached.outcomes == ["hit", "hit"]
    assert np.array_equal(cached.vectors, bought.vectors[::-1])


def test_one_text_and_fewer_dimensions(config):
    """A text alone is one row; `dimensions` cuts it."""
    assert embedding_proxy.embed("a cat", MODEL, config=config).vectors.shape == (1, 256)
    cut = embedding_proxy.embed("a cat", MODEL, dimensions=64, config=config)
    assert cut.vectors.shape == (1, 64)


def test_a_result_shows_neither_texts_nor_numbers(config):
    """At a prompt, and in a log, a result takes one short line; so does what it is made of."""
    result = embedding_proxy.embed(["a cat", "a dog"] * 50, model=MODEL, config=config)
    assert repr(result) == (
        f"<Result: model '{MODEL}', vectors of shape (100, 256), 2 miss, 98 duplicate>"
    )
    assert "\\x" not in repr(result.embedded)


def test_an_iterator_is_read_in_the_thread_that_gives_it(config):
    """What makes the texts may be of use in one thread only: a cursor of SQLite."""
    rows = sqlite3.connect(":memory:").execute("VALUES ('a cat'), ('a dog')")
    result = embedding_proxy.embed((text for (text,) in rows), MODEL, config=config)
    expected = embedding_proxy.embed(["a cat", "a dog"], MODEL, config=config)
    assert expected.outcomes == ["hit", "hit"]
    assert np.array_equal(result.vectors, expected.vectors)


@pytest.mark.parametrize("inputs", [[b"hello"], b"hello", {"a": 1}, {"a"}, ["a", None], 5])
def test_what_is_no_text_is_refused(inputs, config):
    """Bytes are no token ids, and the keys of a mapping no texts: nothing is embedded or kept."""
    with pytest.raises(Exception, match=r"^'\$\.input.*is invalid: it ") as caught:
        embedding_proxy.embed(inputs, MODEL, config=config)
    assert type(caught.value).__name__ == "InvalidRequest"


def test_two_threads_share_a_service(config):
    """All threads get the right rows, from one service: what one bought is a hit for the others."""
    texts = ["a cat", "a dog"]
    barrier = threading.Barrier(2)

    def embed(text):
        barrier.wait()
        return embedding_proxy.embed([text, *texts], model=MODEL, config=config)

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(embed, texts))
    for text, result in zip(texts, results, strict=True):
        expected = embedding_proxy.embed(text, model=MODEL, config=config)
        assert expected.outcomes == ["hit"]
        assert np.array_equal(result.vectors[0], expected.vectors[0])
    assert sum(r.outcomes.count("miss") for r in results) == 2


async def test_inside_a_running_event_loop(config):
    """A notebook has a loop that runs; `embed` blocks it, and answers."""
    result = embedding_proxy.embed("a cat", model=MODEL, config=config)
    assert result.vectors.shape == (1, 256)
    embedding_proxy.close()


def test_after_close_the_next_call_opens_anew(config):
    """`close` may be repeated; the configuration is read again, the entries are still there."""
    embedding_proxy.embed("a cat", model=MODEL, config=config)
    embedding_proxy.close()
    embedding_proxy.close()
    config.write_text("cache: {directory: ./store, mode: frozen}\n")
    assert embedding_proxy.embed("a cat", model=MODEL, config=config).outcomes == ["hit"]


def test_no_thread_is_left(config):
    """`close` ends the thread of the service, and those that its work was given to."""
    before = set(threading.enumerate())
    embedding_proxy.embed(["a cat"] * 300, model=MODEL, config=config)
    assert set(threading.enumerate()) > before
    embedding_proxy.close()
    assert set(threading.enumerate()) <= before


def test_a_mistake_in_the_configuration_is_raised_each_time(config):
    """ConfigError tells file and line; a failed opening leaves nothing behind that answers."""
    before = threading.active_count()
    config.write_text("cache: {size: 3}\n")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"config\.yaml:1: cache\.size"):
            embedding_proxy.embed("a cat", model=MODEL, config=config)
    assert threading.active_count() == before


def test_a_store_that_cannot_be_opened_is_raised_each_time(config):
    """What opening raises is raised by `embed`, and the thread ends."""
    before = threading.active_count()
    (config.parent / "file").touch()
    config.write_text("cache: {directory: ./file/store}\n")
    for _ in range(2):
        with pytest.raises(Exception, match="file") as caught:
            embedding_proxy.embed("a cat", model=MODEL, config=config)
        assert type(caught.value).__name__ == "StoreError"
    assert threading.active_count() == before


def test_an_error_of_a_call_leaves_the_service_open(config):
    """An unknown width is an EmbeddingError of that call alone."""
    with pytest.raises(Exception, match="dimensions"):
        embedding_proxy.embed("a cat", MODEL, dimensions=5000, config=config)
    assert embedding_proxy.embed("a cat", MODEL, config=config).vectors.shape == (1, 256)


SCRIPT = """
import json
import cache, index, providers, proxy
import embedding_proxy

result = embedding_proxy.embed(["a cat", "a dog"], model="wordllama-embed", config="config.yaml")
mine = [module.MINE for module in (cache, index, providers, proxy)]
print(json.dumps([result.vectors.shape, result.outcomes, mine]))
"""


def test_a_users_own_modules_are_left_alone(run, tmp_path):
    """`cache.py` and so on beside a script are the script's, also with PYTHONPATH=. set.

    The end of the process closes the service: nothing is said, and the entries are kept.
    """
    for name in ("cache", "index", "providers", "proxy"):
        (tmp_path / f"{name}.py").write_text(f"MINE = '{name}'\n")
    mine = ["cache", "index", "providers", "proxy"]
    first = run(SCRIPT)
    assert (first.returncode, first.stderr) == (0, "")
    assert json.loads(first.stdout) == [[2, 256], ["miss", "miss"], mine]
    again = run(SCRIPT)
    assert (again.returncode, again.stderr) == (0, "")
    assert json.loads(again.stdout) == [[2, 256], ["hit", "hit"], mine]


def test_the_command_runs_beside_a_users_own_modules(run, tmp_path):
    """`python -m embedding_proxy --version`, too."""
    for name in ("cache", "index", "providers", "proxy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)\n")
    done = run("", "-m", "embedding_proxy", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("embedding-proxy ")


UNDER_WAY = """
import asyncio, threading
import embedding_proxy

begun = threading.Event()
ended = threading.Event()
blocking = embedding_proxy.embed  # Imported, so that what comes next runs before its own.
threading._register_atexit(ended.set)
embed = embedding_proxy.EmbeddingService.embed

async def held_back(*args, **kwargs):
    begun.set()
    while not ended.is_set():
        await asyncio.sleep(0)
    return await embed(*args, **kwargs)

def call():
    result = embedding_proxy.embed("a cat", model="wordllama-embed", config="config.yaml")
    print(*(outcome.value for outcome in result.outcomes))
    try:
        embedding_proxy.embed("a dog", model="wordllama-embed", config="config.yaml")
    except RuntimeError as error:
        print(error)

embedding_proxy.EmbeddingService.embed = held_back
threading.Thread(target=call).start()
begun.wait()
"""


def test_a_call_under_way_at_the_end_is_finished_and_kept(run, config):
    """The main thread ends amid a call of another: it is answered, and its entry is on disk."""
    done = run(UNDER_WAY)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["miss", "embed: the main thread has ended"]
    assert embedding_proxy.embed("a cat", model=MODEL, config=config).outcomes == ["hit"]


FORKED = """
import os
import embedding_proxy

embedding_proxy.embed("a cat", model="wordllama-embed", config="config.yaml")
child = os.fork()
result = embedding_proxy.embed(["a cat", "a dog"], model="wordllama-embed", config="config.yaml")
assert result.outcomes[0] == "hit"
embedding_proxy.close()
if child:
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_a_service_of_its_own(run):
    """The thread is not copied: the child opens the store anew, and both go on."""
    done = run(FORKED)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_ctrl_c_ends_the_wait_and_the_service_stays(config, monkeypatch):
    """KeyboardInterrupt reaches the caller at once; the next call is answered as ever."""
    embed = embedding_proxy.EmbeddingService.embed

    async def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    embedding_proxy.embed("a cat", model=MODEL, config=config)
    monkeypatch.setattr(embedding_proxy.EmbeddingService, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedding_proxy.embed("a dog", model=MODEL, config=config)
    monkeypatch.setattr(embedding_proxy.EmbeddingService, "embed", embed)
    assert embedding_proxy.embed("a cat", model=MODEL, config=config).outcomes == ["hit"]


TERMINATED = """
import sys
import embedding_proxy

embedding_proxy.embed("a cat", model="text-embedding-3-small", config=sys.argv[1])
"""


TERMINATED_EARLY = """
import os, signal, sys
import embedding_proxy
from embedding_proxy.proxy import blocking

submit = blocking._services.submit

def submit_and_terminate(*arguments):
    future = submit(*arguments)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGTERM)
    return future

blocking._services.submit = submit_and_terminate
embedding_proxy.embed("a cat", model="text-embedding-3-small", config=sys.argv[1])
"""


async def test_sigterm_before_the_main_thread_waits_ends_the_process_as_late(
    config, upstream, monkeypatch
):
    """The call may have reached the upstream by then: it is paid for, and kept."""
    provider = f"{{kind: openai, base_url: '{upstream.url}'}}"
    config.write_text(f"cache: {{directory: ./store}}\nproviders: {{openai: {provider}}}\n")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    upstream.gate = asyncio.Event()
    script = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", TERMINATED_EARLY, str(config)),
        stdin=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    await until(lambda: upstream.calls)
    upstream.gate.set()
    await script.communicate(b"\n")
    assert script.returncode == -signal.SIGTERM
    async with embedding_proxy.EmbeddingService.from_config(config) as service:
        result = await service.embed("a cat", "text-embedding-3-small")
    assert result.outcomes == ["hit"]
    assert len(upstream.calls) == 1


async def test_sigterm_amid_a_call_ends_the_process_when_its_entry_is_kept(
    config, upstream, monkeypatch
):
    """The process ends by the signal, as ever; what was bought then is a hit afterwards."""
    provider = f"{{kind: openai, base_url: '{upstream.url}'}}"
    config.write_text(f"cache: {{directory: ./store}}\nproviders: {{openai: {provider}}}\n")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    upstream.gate = asyncio.Event()
    script = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", TERMINATED, str(config)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    await until(lambda: upstream.calls)
    script.terminate()
    upstream.gate.set()
    assert await script.wait() == -signal.SIGTERM
    async with embedding_proxy.EmbeddingService.from_config(config) as service:
        result = await service.embed("a cat", "text-embedding-3-small")
    assert result.outcomes == ["hit"]
    assert len(upstream.calls) == 1


def test_the_programs_own_handling_of_sigterm_stays(config):
    """After a call, and during one, SIGTERM does what the program says."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        for own in (signal.SIG_IGN, signal.SIG_DFL, lambda *_: None):
            signal.signal(signal.SIGTERM, own)
            embedding_proxy.embed("a cat", model=MODEL, config=config)
            assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
