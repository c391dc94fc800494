"""`python -m embedding_proxy` is the command `embedding-proxy`."""

from .proxy.__main__ import main

if __name__ == "__main__":
    main()
