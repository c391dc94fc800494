"""What came of asking a route for known texts, and of holding two answers against each other."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from embedding_proxy.providers.base import Space
from embedding_proxy.providers.probe import SAME, Probe, agreement
from embedding_proxy.providers.routing.route import Route


@dataclass(slots=True)
class RouteResult:
    """A route in one space, the models that lead to it, and what came of asking it."""

    models: list[str]
    space: Space
    provider: str
    upstream_model: str
    route: Route | None
    """None where the provider cannot be used."""
    why: str = "not asked"
    """Why it was not asked, or failed; empty once it answered."""
    probe: Probe | None = None

    @property
    def ok(self) -> bool | None:
        """Whether it answered well; None if it was not asked."""
        return None if self.probe is None else self.probe.failure is None

    @property
    def width(self) -> int:
        """How many numbers its vectors have; 0 if it has given none."""
        return len(self.probe.vectors[0]) // 4 if self.probe and self.probe.vectors else 0

    def __str__(self) -> str:
        return f"{self.provider} ({self.upstream_model})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two routes of one space that answered, and the least cosine between their answers.

    It is 0 where their widths differ.
    """

    one: RouteResult
    other: RouteResult
    cosine: float

    @property
    def ok(self) -> bool:
        """Whether they are one model."""
        return self.cosine >= SAME


def compare(findings: Sequence[RouteResult]) -> Iterator[Comparison]:
    """Compare the answers of each space with the first of them; they are one model, or two."""
    answered: defaultdict[str, list[tuple[RouteResult, Probe]]] = defaultdict(list)
    for one in findings:
        if one.probe is not None and one.ok:
            answered[one.space.name].append((one, one.probe))
    for (first, base), *others in answered.values():
        for other, found in others:
            same = first.width == other.width
            cosine = agreement(base.vectors, found.vectors) if same else 0.0
            yield Comparison(first, other, cosine)
