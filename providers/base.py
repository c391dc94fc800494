"""The shared types of embedding: inputs, vectors, spaces, request contexts, results and `Embedder`.

This module knows no provider, no cache and no wire format. `errors` defines how an embedder fails,
`billing` what a call is charged.
"""

import asyncio
import enum
import hashlib
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Protocol, TypeAlias, TypeVar
from urllib.parse import quote, unquote_to_bytes

import orjson

from .attempts import Attempt
from .charge import NOBODY, Account, Charge, OnCharge
from .client_credential import Credential
from .errors import InvalidRequest

Input: TypeAlias = str | tuple[int, ...]
"""One thing to embed: a string, or a token array (cl100k ids)."""

Vector: TypeAlias = bytes
"""The numbers of one input: float32, little-endian, 4 bytes a dimension."""

SLICE = 1024
"""Items in a slice (`slices`): with some microseconds of work for each, a few milliseconds."""

T = TypeVar("T")

_word = lru_cache(maxsize=1024)(partial(quote, safe="/:@+"))
# Longer parameters are named by one digest: header lines have limits.
_LONGEST_QUERY = 500
_ONE_DIGEST = re.compile(r"blake2b=[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Space:
    """Everything that decides the numbers of a vector. Vectors compare only within one space.

    Two spaces are the same when `name` and `parameters` are; the other fields describe the model
    and follow from its name. Neither the provider, nor an alias, nor the encoding is part of it,
    nor `dimensions` of a request: narrower vectors are derived from the native one.
    """

    name: str
    """The canonical model, whoever serves it: `openai/text-embedding-3-small`."""
    dimensions: int
    """The native width in numbers. An answer of another width is refused.

    0 where it is not known yet: then one input is asked for, and its answer tells.
    """
    matryoshka: bool = False
    """Whether a prefix of the vector, renormalised, is a vector of the same model."""
    tokenizer: str | None = None
    """The encoding that counts this model's tokens exactly; None where it is not known."""
    parameters: tuple[tuple[str, bytes], ...] = ()
    """Forwarded request fields that change the numbers: (name, canonical JSON), sorted by name."""
    unit_norm: bool = False
    """Whether every vector has length 1. An answer of another length is refused."""
    send_dimensions: bool = False
    """Whether an upstream gives the native width only when it is asked for it."""

    def with_parameters(self, fields: Mapping[str, object]) -> "Space":
        """Return the space of this model when called with the given extra request fields.

        Raises InvalidRequest for what JSON cannot hold, or holds too deep for us.

        >>> Space("m", 8).with_parameters({"b": 1, "a": {"y": 2, "x": 1}}).parameters
        (('a', b'{"x":1,"y":2}'), ('b', b'1'))
        """
        try:
            canonical = [(n, orjson.dumps(fields[n], option=orjson.OPT_SORT_KEYS)) for n in fields]
        except orjson.JSONEncodeError as error:
            raise InvalidRequest(f"A field of the request cannot be sent on: {error}.") from error
        return replace(self, parameters=tuple(sorted(canonical)))

    @property
    def label(self) -> str:
        """The space in one printable word, fit for an HTTP header, a log and a database.

        It names the parameters. Their values may be private, so only a digest of each is in it.

        >>> Space("m", 8).with_parameters({"task": "a b"}).label
        'm?task=~62b59ddfc5c4d697'
        """
        return current_label(self.former_label) if self.parameters else _word(self.name)

    @property
    def former_label(self) -> str:
        """The label as it was while it held values; names of Qdrant collections come from it.

        >>> Space("m", 8).with_parameters({"task": "a b"}).former_label
        'm?task=%22a%20b%22'
        """
        name = _word(self.name)
        if not self.parameters:
            return name
        query = "&".join(f"{quote(n, safe='')}={quote(v, safe='')}" for n, v in self.parameters)
        if len(query) > _LONGEST_QUERY:
            query = f"blake2b={hashlib.blake2b(query.encode(), digest_size=16).hexdigest()}"
        return f"{name}?{query}"


def current_label(label: str) -> str:
    """Return a space's label in its present form, for one that an earlier version wrote.

    A label of the present form comes back as it is.

    >>> current_label("m?task=%22a%20b%22") == current_label(current_label("m?task=%22a%20b%22"))
    True
    """
    name, mark, query = label.partition("?")
    if not mark or _ONE_DIGEST.fullmatch(query):
        return label
    return f"{name}?{'&'.join(map(_without_value, query.split('&')))}"


def _without_value(parameter: str) -> str:
    name, equals, value = parameter.partition("=")
    # JSON never begins with a tilde, so this one was written in the present form.
    if not equals or value.startswith("~"):
        return parameter
    return f"{name}=~{hashlib.blake2b(unquote_to_bytes(value), digest_size=8).hexdigest()}"


class Outcome(enum.StrEnum):
    """How one input of a request was answered; exactly one holds for each."""

    HIT = "hit"
    """Found in a tier."""
    JOIN = "join"
    """Waited for another request that was already buying it."""
    MISS = "miss"
    """Asked from a provider now, for this request."""
    DUPLICATE = "duplicate"
    """Equal to an earlier input of the same request, and answered with it."""


@dataclass(slots=True)
class Embedded:
    """What an embedder gives for n inputs: n of everything, in the order of the inputs."""

    vectors: Sequence[Vector] = field(repr=False)
    tokens: Sequence[int]
    """Prompt tokens of each input."""
    counted: bool
    """True when the token numbers are exact, False when a batch's total was apportioned."""
    providers: tuple[str, ...] = ()
    """Who computed what was computed now, by configured name; empty when all was at hand."""
    outcomes: Sequence[Outcome] = ()
    charge: Charge | None = None
    """What the upstream says it charged, in the answer to a single call of a provider."""


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """How a request may be answered: from which entries, with which trace, at what cost."""

    max_age: float = math.inf
    """Seconds since its purchase for which an entry will do; 0 = none will, however new."""
    write: bool = True
    """Whether anything of the request may stay: entries, uses, a purchase that others join."""
    frozen: bool = False
    """Whether nothing is bought, for anyone."""
    only_if_cached: bool = False
    """Whether the client wants an error rather than a purchase."""
    joins_same_key: bool = False
    """Whether a purchase under way with the same client's key will do, though no entry will."""

    @property
    def spend(self) -> bool:
        """Whether what is missing may be bought."""
        return not (self.frozen or self.only_if_cached)


NORMAL = CachePolicy()

TokenCheck: TypeAlias = Callable[[Sequence[int] | None], Awaitable[Mapping[str, int]]]
"""Takes the tokens of each input, or None if not all are known: then texts are counted, and their
counts returned. Raises InvalidRequest for more than an upstream takes."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a request brings along that does not change its vectors."""

    deadline: float | None = None
    """Point on the event loop's clock, in seconds, after which no answer is of use."""
    begun: float | None = None
    """Point on the same clock at which the time of the request began; None = not known. Then no
    provider is held to have failed when that time is up."""
    user: str | None = None
    """OpenAI's `user` field, passed on to providers that know it."""
    neutral: tuple[tuple[str, bytes], ...] = ()
    """Further request fields that change no number, as (name, JSON); for providers that declare
    them in `Profile.neutral_fields`."""
    namespace: str = ""
    """The part of the cache that the client may see."""
    terms: CachePolicy = NORMAL
    on_part: "OnPart | None" = None
    """Told of each part of a request that is answered before the rest, so that it can be kept."""
    counts: Mapping[str, int] = field(default_factory=dict, compare=False)
    """Tokens of texts that the space's tokenizer counted on the way; they are not counted again."""
    check_tokens: TokenCheck | None = field(default=None, compare=False)
    """Asked before anything is bought or given; None = all of it is not too long."""
    start_deadline: float | None = None
    """Point on the same clock by which a provider must have begun its call; else it raises
    LocalQueueFull."""
    account: Account = NOBODY
    """Who pays."""
    on_charge: OnCharge | None = None
    """Told what each call was charged."""
    credential: Credential | None = None
    """The client's own key, for the providers that are asked with that; None = it sent none."""
    on_begin: "OnBegin | None" = field(default=None, compare=False)
    """Told of inputs when the first call for them is about to be sent."""
    abandoned: "asyncio.Future[None] | None" = field(default=None, compare=False)
    """Done when nobody waits for the answer any more. What is queued then is dropped; a call that
    was begun is finished, its answer told to `on_part`, and no further one is made."""
    is_needed: Callable[[], bool] | None = field(default=None, compare=False)
    """Asked before any attempt after the first: whether an answer is still of use to anybody."""
    has_waiters: Callable[[], bool] | None = field(default=None, compare=False)
    """Tells at the deadline whether a client has waited until then; None = it has."""
    finishes_calls: bool = False
    """Whether a call that was begun goes on when the deadline passes: it is paid for, and kept."""
    attempt: Attempt | None = field(default=None, compare=False)
    """Told by the provider how far its call has got; see `attempts`."""
    client_retries: int | None = None
    """0 = the client repeats requests by itself, and this is its first try; 1 = a later one; None =
    it is not known to do so."""
    max_attempts: int | None = field(default=None, compare=False)
    """Attempts at each route, at most; None = as the policy of retries says."""


OnBegin: TypeAlias = Callable[[Sequence[int]], None]
"""Takes the indices of inputs. Never raises."""


class OnPart(Protocol):
    """Takes a part of an answer as soon as it is there."""

    async def __call__(self, places: Sequence[int], part: Embedded, /) -> None:
        """Keep the answer to the inputs at these places of the call. Never raises.

        What is there when the call ends need not be told; a place may be told of more than once.
        """
        ...


class Embedder(Protocol):
    """The one interface: a provider's route, the router, the cache around it, a fake in a test."""

    async def embed(self, space: Space, inputs: Sequence[Input], context: Context) -> Embedded:
        """Return one vector of `space.dimensions` numbers for each of 1…N inputs, in their order.

        Raises EmbeddingError and nothing else; then no vector of the call is to be used.
        Cancelling the call never harms another caller.
        """
        ...


async def slices(items: Sequence[T], size: int = SLICE) -> AsyncIterator[Sequence[T]]:
    """Yield the items in slices of at most `size`, in order; before each further one others run.

    A few items are one slice, and nothing else runs in between. Of none there is no slice.
    """
    for start in range(0, len(items), size):
        if start:
            await asyncio.sleep(0)
        yield items[start : start + size]
