"""Late imports: in little time, and such that Ctrl-C ends the process amid one in good order.

Python raises KeyboardInterrupt wherever the program happens to be. Amid an import that is a
traceback, or an ImportError of a library written in C that takes it for its own failure. So there,
and after the work, the process ends at once: nothing is under way that needs an orderly end.
"""

import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

EXIT_CODE = 130
"""The exit code that a shell reports after SIGINT: 128 and the number of the signal."""


@contextmanager
def importing() -> Iterator[None]:
    """Import something within this block: Ctrl-C ends the process at once, with EXIT_CODE.

    This applies in the main thread only, and not if SIGINT is ignored or has another handler.
    """
    # Imported objects stay until the end. Without this, garbage collection would search them again
    # and again, an eighth of the time of a start.
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        with _ending_at_once():
            yield
    finally:
        gc.freeze()
        if is_collecting:
            gc.enable()


@contextmanager
def _ending_at_once() -> Iterator[None]:
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    end_at_once()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_at_once() -> None:
    """Let Ctrl-C end the process at once from now on."""
    signal.signal(signal.SIGINT, _end)


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    os._exit(EXIT_CODE)
