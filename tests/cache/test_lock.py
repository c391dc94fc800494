"""One writer at a time, across processes."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from embedding_proxy.cache.disk.lock import WriterLock

ROOT = Path(__file__).parents[2]

HOLD = """
import sys
from pathlib import Path
from embedding_proxy.cache.disk.lock import WriterLock
with WriterLock(Path(sys.argv[1]), 1.0):
    print("held", flush=True)
    sys.stdin.read()
"""


def _holder(path):
    """Start a process that holds the lock until its standard input ends; return when it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_the_lock_is_one_process_at_a_time(tmp_path, end):
    """It is waited for with a limit, and free again when its holder is gone, however it went."""
    lock = WriterLock(tmp_path / "lock", patience_s=0.01)
    with _holder(tmp_path / "lock") as process:
        with pytest.raises(TimeoutError, match="another process"), lock:
            pytest.fail("two hold it")
        if end == "kill":
            process.kill()
        process.communicate()
    with lock:
        pass
    with lock:
        pass
    lock.close()


def test_a_thread_that_lets_go_does_not_free_another_threads_lock(tmp_path):
    """Closing in one thread amid a transaction of another leaves other processes outside."""
    lock = WriterLock(tmp_path / "lock", patience_s=0.01)
    refused = []

    def close():
        try:
            with lock:
                pass
        except TimeoutError as error:
            refused.append(str(error))

    with lock:
        other = threading.Thread(target=close)
        other.start()
        other.join()
        with pytest.raises(TimeoutError), WriterLock(tmp_path / "lock", patience_s=0.01):
            pytest.fail("two hold it")
    assert refused == ["another thread keeps writing to the store"]
    with WriterLock(tmp_path / "lock", patience_s=0.01):
        pass
    lock.close()
