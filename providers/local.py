"""The local model: real semantics, 256 numbers, no network. The only importer of wordllama.

It is a model of its own in a space of its own, and is never used in place of another.
"""

import asyncio
import importlib.util
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from . import vector
from .base import Context, Embedded, Input, Outcome, Space, Vector
from .errors import InvalidAnswer, InvalidRequest, NoRoute

if TYPE_CHECKING:
    from wordllama.inference import WordLlamaInference

CONTEXT = 8192
"""The most tokens one input may have, as at OpenAI; the model itself knows no limit."""
_LONGEST_PIECE = 16
"""Characters of the longest token in the vocabulary: longer texts are refused unread."""


MISSING = "The local model is not installed; `pip install 'wordllama>=0.4'` adds it."


def is_installed() -> bool:
    """Tell whether the extra is there, without the half second that importing it takes."""
    return importlib.util.find_spec("wordllama") is not None


class Local:
    """WordLlama's bundled model (l2_supercat, 256 dimensions), run in a thread of its own.

    A vector is the mean of the input's token vectors, scaled to length 1, so it does not depend on
    what else is in the batch. Loading takes some 0.7 s and 70 MB, at the first input.
    """

    kind: ClassVar[str] = "local"
    accepts_tokens: ClassVar[bool] = False

    def __init__(self, name: str = "local") -> None:
        self.name = name
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="local-model")
        self._model: WordLlamaInference | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def ask(
        self,
        model: str,  # noqa: ARG002 - there is one model
        space: Space,
        inputs: Sequence[Input],
        context: Context,  # noqa: ARG002 - it takes milliseconds
    ) -> Embedded:
        """Embed texts. Raises InvalidRequest for token arrays, extra fields and overlong texts."""
        if space.parameters:
            names = ", ".join(name for name, _ in space.parameters)
            raise InvalidRequest(f"Unrecognized request argument supplied: {names}")
        texts = [item for item in inputs if isinstance(item, str)]
        if len(texts) != len(inputs):
            raise InvalidRequest("The local model takes texts, not token arrays.", param="input")
        loop = asyncio.get_running_loop()
        vectors, tokens = await loop.run_in_executor(self._thread, self._compute, texts)
        for i, numbers in enumerate(vectors):
            try:
                vector.check(numbers, space.dimensions)
            except vector.VectorError as error:
                raise InvalidAnswer(self.name, f"embedding {i}: {error}") from error
        return Embedded(
            vectors=vectors,
            tokens=tokens,
            counted=True,
            providers=(self.name,),
            outcomes=[Outcome.MISS] * len(inputs),
        )

    def _compute(self, texts: list[str]) -> tuple[list[Vector], list[int]]:
        model = self._model = self._model or _load()
        for i, text in enumerate(texts):
            if not text or not _encodable(text):
                raise InvalidRequest("An input is empty or no Unicode.", param="input", index=i)
            if len(text) > CONTEXT * _LONGEST_PIECE:
                raise _too_long(i)
        vectors, counts = [], []
        for i, encoded in enumerate(model.tokenizer.encode_batch(texts, add_special_tokens=False)):
            ids = encoded.ids
            if len(ids) > CONTEXT:
                raise _too_long(i)
            mean = model.embedding[ids].mean(axis=0, dtype=np.float64)
            with np.errstate(invalid="ignore"):  # 0/0 is found by the check of every answer
                vectors.append((mean / np.linalg.norm(mean)).astype("<f4").tobytes())
            counts.append(len(ids))
        return vectors, counts


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _too_long(index: int) -> InvalidRequest:
    return InvalidRequest(
        f"This model's maximum context length is {CONTEXT} tokens; an input has more.",
        param="input",
        index=index,
    )


def _load() -> "WordLlamaInference":
    """Load the weights that the wheel carries. Raises NoRoute when the extra is not installed."""
    root = logging.getLogger()
    guard = logging.NullHandler()
    # Importing wordllama calls logging.basicConfig, which leaves a configured root logger alone.
    root.addHandler(guard)
    try:
        import wordllama  # noqa: PLC0415 - an extra, and half a second of imports
    except ImportError as error:
        raise NoRoute(MISSING) from error
    finally:
        root.removeHandler(guard)
    # Its own search misses the tokenizer in its own package, unless that folder is the cache.
    model: WordLlamaInference = wordllama.WordLlama.load(
        cache_dir=Path(wordllama.__file__).parent, disable_download=True
    )
    model.tokenizer.no_padding()
    return model
