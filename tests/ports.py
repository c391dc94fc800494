"""Ports that stay one's own while nobody listens on them."""

import contextlib
import itertools
import os
import secrets
import socket

LOWEST, BEYOND = 10_000, 30_000
"""Below the ports that systems give to whoever takes any: Linux from 32,768 on, others later."""
SHARES = 10
"""Processes that run tests side by side choose from ranges of their own, as far as that goes."""

_WIDTH = (BEYOND - LOWEST) // SHARES
_turns = itertools.count(secrets.randbelow(_WIDTH))


def own_port() -> int:
    """Return a free port that nobody gets by chance.

    One of the system's choice, let go and wanted back, may by then be another test's. They are
    given in turn: drawn by lot, two servers of one test would now and then get the same one,
    for a server listens some time after it has got its port.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % SHARES
    while True:
        port = LOWEST + number * _WIDTH + next(_turns) % _WIDTH
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
