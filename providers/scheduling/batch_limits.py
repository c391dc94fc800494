"""The limits of one call at an upstream: as declared, or smaller ones that it has shown.

Limits are learned for each model. An upstream may name the limit ("batch size must be at most 10"):
that is read from a sentence, which may be misread or quote a client, so it is forgotten after some
calls, to be named again. Or it only refuses what is too large (413): then the largest call that it
takes is found by halving, one call at a time, and kept as long as the process runs.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from embedding_proxy.providers.base import Input
from embedding_proxy.providers.errors import InvalidRequest
from embedding_proxy.providers.profile import Limits

from .refusal import is_about_size, is_about_tokens, named_batch_limit

log = logging.getLogger("embedding_proxy.batch_limits")

MAX_MODELS = 1000
"""Models of a provider whose limits are remembered."""
SMALL_BODY = 1 << 16
"""Bytes; a smaller call that is refused as too large has too many inputs, and not too many bytes:
no server limits bodies to less."""


MAX_SMALL_CALLS = 10
"""Calls in a row within what is known to be taken, after which a limit is not looked for."""
MAX_NAMED_CALLS = 1000
"""Calls that are answered before a limit that was named is forgotten: a refusal for it is cheap."""


@dataclass(slots=True)
class Bound:
    """The largest number that is taken, found between one that was and one that was not."""

    precision: float = 0.0
    """The search ends when what was refused is larger than what was taken by no more than this
    part."""
    accepted: int = 0
    refused: int | None = None
    is_guess: bool = True
    """Whether the upstream did not name the limit."""
    is_void: bool = False
    """Whether the same number was taken once and refused once: something else decides."""

    @property
    def limit(self) -> int | None:
        """What to try, or to keep to; None where nothing was refused."""
        if self.refused is None or self.is_void:
            return None
        if not self.is_searching:
            return max(self.accepted, 1)
        return max((self.accepted + self.refused) // 2, 1)

    @property
    def is_searching(self) -> bool:
        """Whether the limit is not known well enough yet."""
        if self.refused is None or self.is_void:
            return False
        return self.refused - self.accepted > max(1, self.precision * self.accepted)

    def is_beyond(self, number: int) -> bool:
        """Tell whether so many are more than is known to be taken, while the limit is not."""
        return self.is_searching and number > self.accepted

    def accept(self, number: int) -> None:
        """Note that so many were taken."""
        if self.refused is not None and number >= self.refused:
            self.is_void = True
        elif self.refused is not None:
            self.accepted = max(self.accepted, number)

    def refuse(self, number: int) -> None:
        """Note that so many were refused."""
        if number <= self.accepted:
            self.is_void = True
        else:
            self.refused = min(self.refused or number, number)


@dataclass(slots=True)
class _Model:
    inputs: Bound = field(default_factory=Bound)
    bytes: Bound = field(default_factory=lambda: Bound(precision=0.25))
    has_told: bool = False
    is_single: bool = False
    """Whether several inputs in a call get one vector."""
    small_calls: int = 0
    """Answered in a row, none of them larger than what was known to be taken."""
    calls: int = 0
    """Answered since a limit was named."""


class BatchLimits:
    """The limits of one provider, by model."""

    def __init__(self, provider: str, declared: Limits) -> None:
        self._provider = provider
        self._declared = declared
        self._models: dict[str, _Model] = {}

    def of(self, model: str) -> Limits:
        """Return what is known to be taken; while a limit is searched for, one call at a time."""
        model_limits = self._models.get(model)
        if model_limits is None:
            return self._declared
        declared, inputs, size = self._declared, model_limits.inputs, model_limits.bytes
        # While calls are small, the limit is not being looked for, and they hold up nobody.
        is_wanted = model_limits.small_calls < MAX_SMALL_CALLS
        is_searching = is_wanted and (inputs.is_searching or size.is_searching)
        return replace(
            declared,
            inputs=min(declared.inputs, inputs.limit or declared.inputs),
            bytes=size.limit,
            concurrency=1 if is_searching else declared.concurrency,
        )

    def learn_refused(
        self, model: str, inputs: Sequence[Input], size: int, error: InvalidRequest
    ) -> None:
        """Take note of a call that was refused; `size` is the length of its body in bytes."""
        count = len(inputs)
        if not is_about_size(error) or is_about_tokens(error):
            return
        model_limits = self._models.get(model)
        if count == 1:
            if model_limits is not None and model_limits.inputs.is_guess:
                # It is this input that is too large; calls that held it have told nothing.
                self._models[model] = _Model(has_told=model_limits.has_told)
            return
        model_limits = self._known(model)
        model_limits.small_calls = 0
        named = named_batch_limit(error, count)
        if named is not None:
            if not model_limits.is_single:
                model_limits.inputs = Bound(accepted=named, refused=named + 1, is_guess=False)
                model_limits.calls = 0
        elif size < SMALL_BODY:
            model_limits.inputs.refuse(count)
        else:
            model_limits.bytes.refuse(text_bytes(inputs))
        self._tell(model, model_limits)

    def learn_accepted(self, model: str, inputs: Sequence[Input]) -> None:
        """Take note of a call that was answered."""
        model_limits = self._models.get(model)
        if model_limits is None:
            return
        count, size = len(inputs), text_bytes(inputs)
        is_beyond = model_limits.inputs.is_beyond(count) or model_limits.bytes.is_beyond(size)
        model_limits.small_calls = 0 if is_beyond else model_limits.small_calls + 1
        model_limits.inputs.accept(count)
        model_limits.bytes.accept(size)
        if not (model_limits.inputs.is_guess or model_limits.is_single):
            model_limits.calls += 1
            if model_limits.calls >= MAX_NAMED_CALLS:
                model_limits.inputs = Bound()
        self._tell(model, model_limits)

    def learn_single(self, model: str) -> None:
        """Take note that calls of several inputs get one vector for all of them."""
        model_limits = self._known(model)
        model_limits.is_single = True
        model_limits.inputs = Bound(accepted=1, refused=2, is_guess=False)
        self._tell(model, model_limits)

    def _known(self, model: str) -> _Model:
        """Return what is known of a model; of the one first learned of, nothing any more."""
        model_limits = self._models.get(model)
        if model_limits is None:
            if len(self._models) >= MAX_MODELS:
                del self._models[next(iter(self._models))]
            model_limits = self._models[model] = _Model()
        return model_limits

    def _tell(self, model: str, model_limits: _Model) -> None:
        """Say once what was learned."""
        inputs, size = model_limits.inputs, model_limits.bytes
        if model_limits.has_told or inputs.is_searching or size.is_searching:
            return
        if inputs.limit is None and size.limit is None:
            return
        model_limits.has_told = True
        what = f"{size.limit} bytes of text" if inputs.limit is None else f"{inputs.limit} inputs"
        log.warning(
            "%s: takes at most %s in one call for %s, which is less than is declared; set"
            " providers.%s.limits to have it known at the start",
            self._provider,
            what,
            model,
            self._provider,
        )


def text_bytes(inputs: Sequence[Input]) -> int:
    """Return about how many bytes inputs take in a body.

    >>> text_bytes(["abc", (1, 2)])
    17
    """
    return sum(map(input_bytes, inputs))


def input_bytes(item: Input) -> int:
    """Return about how many bytes one input takes in a body."""
    if not isinstance(item, str):
        return 7 * len(item)
    return len(item) if item.isascii() else len(item.encode(errors="surrogatepass"))
