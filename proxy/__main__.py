"""The command `embedding-proxy`; also `python -m proxy`."""

import gc
import os


def main() -> None:
    """Import the command line, and run it."""
    # Threads for numpy's products would only wait, each keeping a core busy while it does: what is
    # multiplied is a vector or a few, but in `compare`. And no plugin of pydantic is looked for in
    # all that is installed. Whoever says otherwise is heeded.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # What is imported stays for good: to look it all through for garbage, again and again while it
    # grows, would be an eighth of the time it takes to start.
    gc.disable()
    from .cli import main as run  # noqa: PLC0415 - after that

    gc.freeze()
    gc.enable()
    run()


if __name__ == "__main__":
    main()
