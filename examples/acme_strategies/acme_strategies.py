"""Strategies of one's own, brought by a package: a way to narrow vectors, and a way to make texts.

Install it beside the proxy (`pip install ./examples/acme_strategies`).
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


class Projection:
    """Projects vectors at random: angles are nearly kept, also for models that cannot be cut.

    With `dimension_policy: acme_projection` a model of 1536 numbers gives 256 for
    `dimensions: 256`. A matrix that was fitted to one's own texts would be better; it is used in
    the same way.
    """

    # Goes into the name of the space: another one whenever the numbers change.
    version = "1"

    def can_give(self, native: int, dimensions: int) -> bool:
        """Tell whether vectors can be brought to a width."""
        return 16 <= dimensions < native

    def bring(self, vectors: npt.NDArray[np.float32], dimensions: int) -> npt.NDArray[np.float32]:
        """Return the vectors at that width, at length 1. The same input gives the same numbers."""
        native = vectors.shape[1]
        matrix = np.random.Generator(np.random.PCG64(native)).standard_normal((native, dimensions))
        narrow = vectors.astype(np.float64) @ matrix
        return (narrow / np.linalg.norm(narrow, axis=1, keepdims=True)).astype(np.float32)


class Ticket:
    """Makes the text of a ticket as the application does that wrote it: no template could.

    `embedding-proxy migrate run tickets --to mistral-embed --text-by acme_ticket`
    """

    # Another one whenever it makes other texts: a migration that is under way does not go on then.
    version = "1"

    def text(self, payload: Mapping[str, object]) -> str | None:
        """Return the text that a point's vector is made of; None if it has none."""
        title = str(payload.get("title", "")).upper()
        about = str(payload.get("description", ""))[:500]
        return f"{title}\n\n{about}" if title or about else None
