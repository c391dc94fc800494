"""The command `embedding-proxy`; also `python -m proxy`."""

import gc


def main() -> None:
    """Import the command line, and run it."""
    # What is imported stays for good: to look it all through for garbage, again and again while it
    # grows, would be an eighth of the time it takes to start.
    gc.disable()
    from .cli import main as run  # noqa: PLC0415 - after that

    gc.freeze()
    gc.enable()
    run()


if __name__ == "__main__":
    main()
