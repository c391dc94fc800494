"""The command `embedding-proxy`; also `python -m embedding_proxy`."""

import os
import signal
import sys

from embedding_proxy.proxy.cli.imports import EXIT_CODE, end_at_once, importing


def main() -> None:
    """Import the command line, and run it. Ctrl-C is EXIT_CODE at any moment, and no traceback."""
    # Threads for numpy's products would only wait, each keeping a core busy while it does: what is
    # multiplied is a vector or a few, but in `compare`. And no plugin of pydantic is looked for in
    # all that is installed. Whoever says otherwise is heeded.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        with importing():
            from embedding_proxy.proxy.cli.main import main as run  # noqa: PLC0415 - after what is set above
        run()
    except KeyboardInterrupt:
        sys.exit(EXIT_CODE)
    finally:
        # What is left is Python's own end, which would show a traceback.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            end_at_once()


if __name__ == "__main__":
    main()
