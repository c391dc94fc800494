"""How Qdrant fails, as a small tree: what passes by itself, and what does not."""


class QdrantFailure(Exception):
    """Qdrant did not do what it was asked for; the message is one line, without key and payload."""


class Unavailable(QdrantFailure):
    """It cannot be reached, is overloaded, or takes too long: the same call may succeed later."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """Seconds after which it said to come back; None where it said nothing."""


class ServerFault(Unavailable):
    """It failed in its own code (HTTP 500): perhaps over what it was sent."""


class InUse(Unavailable):
    """The folder of the embedded mode is open in another process, and only one may have it."""


class Denied(QdrantFailure):
    """The key is missing, or is not allowed this: somebody has to change something."""


class Rejected(QdrantFailure):
    """The call itself is wrong: it will fail in the same way each time."""


class Missing(Rejected):
    """There is no collection or alias of that name."""


class Exists(Rejected):
    """There is a collection or alias of that name already."""


class OtherSpace(QdrantFailure):
    """A collection holds vectors of another space or width, or of nobody knows which."""


class NotInstalled(QdrantFailure):
    """The package that speaks with Qdrant is not installed; the message holds the command."""

    def __init__(self) -> None:
        super().__init__("Qdrant needs more: pip install 'qdrant-client>=1.16'")


class Unusable(QdrantFailure):
    """The outbox cannot be opened, so nothing could be indexed."""
