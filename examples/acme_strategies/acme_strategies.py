"""Two strategies in a package of their own: one shortens vectors, one makes texts.

Install it in the environment of the proxy: `pip install ./examples/acme_strategies`.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


class Projection:
    """A random projection of vectors. It nearly keeps angles, also for models that cannot be cut.

    With `dimension_policy: acme_projection` a model of 1536 dimensions answers `dimensions: 256`.
    A matrix that is fitted to your own texts is better; the code is the same.
    """

    # Part of the name of the space. Change it whenever the numbers change.
    version = "1"

    def can_give(self, native: int, dimensions: int) -> bool:
        """Tell whether vectors of `native` numbers can get `dimensions` numbers."""
        return 16 <= dimensions < native

    def bring(self, vectors: npt.NDArray[np.float32], dimensions: int) -> npt.NDArray[np.float32]:
        """Return vectors of `dimensions` numbers, of length 1; equal for equal input."""
        native = vectors.shape[1]
        matrix = np.random.Generator(np.random.PCG64(native)).standard_normal((native, dimensions))
        narrow = vectors.astype(np.float64) @ matrix
        return (narrow / np.linalg.norm(narrow, axis=1, keepdims=True)).astype(np.float32)


class Ticket:
    """Makes the text of a ticket as its application does. No template can do this.

    `embedding-proxy migrate run tickets --to mistral-embed --text-by acme_ticket`
    """

    # Change it whenever the texts change. A migration in progress then does not continue.
    version = "1"

    def text(self, payload: Mapping[str, object]) -> str | None:
        """Return the text of a point; None if it has none."""
        title = str(payload.get("title", "")).upper()
        about = str(payload.get("description", ""))[:500]
        return f"{title}\n\n{about}" if title or about else None
