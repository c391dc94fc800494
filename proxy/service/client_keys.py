"""Which models are asked for with the client's own key, and what the configuration says of it.

The secret with which the digests of clients' keys are keyed: made once, kept beside the store.

With it, and with nothing else, a digest can be held against a key. All workers share the file.

What is known of clients' keys: which the provider has accepted, and when; which it has refused.

Kept under digests, in memory and as empty files whose time is that of the proof: so workers share
them, and a restart amid an outage forgets none. Failure licence: what the disk does not take is
known to this process alone.

Models that are bought with the client's own key: whose cache it is, and who may look into it.

What a key has bought is served to that key alone: it lies in a namespace of its own, named by a
digest. Where the operator says `share`, it lies where everybody's does. In both cases nothing is
served to a key that the provider has not accepted: its first request begins past the cache, with
one input that is bought with the key, and kept like any other.

A client without a key is served by the other routes of the model, if it has any, and so is one
whose key cannot be proved just now. One whose key is refused is told so.
"""

import asyncio
import contextlib
import enum
import hashlib
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias
from weakref import WeakValueDictionary

from embedding_proxy.cache import atomic_file
from embedding_proxy.cache.disk.store import StoreError
from embedding_proxy.cache.key import part
from embedding_proxy.cache.ledger import CountedEmbeddings, Reusable
from embedding_proxy.providers.base import Context, Input, Vector
from embedding_proxy.providers.billing import Bill
from embedding_proxy.providers.client_credential import Credential
from embedding_proxy.providers.errors import (
    ClientKeyRefused,
    DeadlineExceeded,
    InvalidRequest,
    NoProviderAvailable,
    ProviderError,
    RateLimited,
    TransientError,
)
from embedding_proxy.providers.lru_cache import LRUCache
from embedding_proxy.proxy.config.models import ModelConfig
from embedding_proxy.proxy.config.schema import Settings

from .learned_dimensions import embed_one_first
from .request import Client


@dataclass(frozen=True, slots=True)
class ByClient:
    """That a model is asked for with the client's own key."""

    model: str
    space: str
    providers: tuple[str, ...]
    """Those that are asked with it; all of one origin."""
    origin: str
    share: bool
    """Whether what one key has bought is served to others."""
    others: bool
    """Whether the model has routes that need no client's key."""


def by_client(
    settings: Settings, name: str, entry: ModelConfig, usable: Container[str]
) -> ByClient | None:
    """Return how a model is asked for with clients' keys; None if it is not.

    `usable` are the names of the providers that can be asked.
    """
    routes = {route.provider: settings.providers.get(route.provider) for route in entry.routes}
    asked = {name: one for name, one in routes.items() if one is not None and one.by_client}
    if not asked:
        return None
    return ByClient(
        model=name,
        space=entry.space,
        providers=tuple(asked),
        origin=next(one.origin for one in asked.values()),
        share=all(one.share for one in asked.values()),
        others=any(provider in usable for provider in routes if provider not in asked),
    )


FILE = "client-keys.secret"
"""The name of the file, in the folder of the store."""
SIZE = 32
"""Bytes."""

log = logging.getLogger("embedding_proxy.keys")


def load(folder: Path) -> bytes:
    """Return the secret, made now if there is none. Raises StoreError for one that is damaged.

    Where it cannot be kept it is this process's own: what is bought then is found by nobody later.
    """
    file = folder / FILE
    try:
        if not file.exists():
            _make(file)
        secret = file.read_bytes()
    except OSError as error:
        log.warning(
            "%s: cannot be kept (%s): what is bought with clients' keys will be bought anew after"
            " a restart",
            *(file, error.strerror),
        )
        return secrets.token_bytes(SIZE)
    if len(secret) != SIZE:
        raise StoreError(
            f"{file}: is damaged: bring it back from a backup; or delete it, and what was bought"
            " with clients' keys is bought anew"
        )
    return secret


def _make(file: Path) -> None:
    """Write a new secret, whole or not at all; if another process is first, its own stays."""
    with contextlib.suppress(FileExistsError):
        atomic_file.write(file, secrets.token_bytes(SIZE), exclusive=True)


FRESH_S = 3600.0
"""So long after a proof nothing is asked."""
STALE_S = 86_400.0
"""So long after a proof a key is still served while the provider cannot be asked. Beyond it, or as
soon as the provider refuses it, it is not."""
AGAIN_S = 60.0
"""So long after an attempt that told nothing another is made."""
REFUSED_S = 60.0
"""So long a refused key is refused here, and nobody is asked."""
RENEW_S = 300.0
"""A newer proof is not renewed by an answer."""
MOST = 10_000
"""Keys that are remembered, of either sort; those noted longest ago are forgotten."""

SWEEP_EVERY = 1000
"""New files after which the old ones are looked for, and those beyond MOST."""


class KeyStatus(enum.Enum):
    """What a key may have from the cache."""

    PROVED = "proved"
    """All that is its own to see."""
    DUE = "due"
    """The same, if a new proof cannot be had now."""
    UNKNOWN = "unknown"
    """Nothing."""


class Proofs:
    """Proofs by name: a digest of a key and what it was accepted for. `clock` is Unix time."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock
        self._proved = LRUCache[str, float](MOST)
        self._refused = LRUCache[str, tuple[float, ClientKeyRefused]](MOST)
        self._deferred = LRUCache[str, float](MOST)
        self._written = 0
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
        self._sweep()

    def standing(self, name: str) -> KeyStatus:
        """Return what is known. Raises ClientKeyRefused for a key that was refused just now."""
        now = self._clock()
        at, refusal = self._refused.peek(name) or (-REFUSED_S, None)
        if refusal is not None and 0 <= now - at < REFUSED_S:
            raise _again(refusal)
        age = now - (self._proved.peek(name) or 0.0)
        if not 0 <= age < FRESH_S:
            # Another worker may have proved it since.
            age = now - self._on_disk(name)
        if not 0 <= age < STALE_S:
            return KeyStatus.UNKNOWN
        deferred = 0 <= now - (self._deferred.peek(name) or -AGAIN_S) < AGAIN_S
        return KeyStatus.PROVED if age < FRESH_S or deferred else KeyStatus.DUE

    def accepted(self, name: str) -> None:
        """Note that the provider has answered to a key."""
        now = self._clock()
        if 0 <= now - (self._proved.peek(name) or -RENEW_S) < RENEW_S:
            return
        self._refused.pop(name)
        self._proved[name] = now
        with contextlib.suppress(OSError):
            file = self._folder / name
            file.touch(mode=0o600)
            os.utime(file, (now, now))
        self._written += 1
        if self._written % SWEEP_EVERY == 0:
            self._sweep()

    def refused(self, name: str, refusal: ClientKeyRefused) -> None:
        """Note that the provider does not accept a key: from now on nothing is served to it."""
        self._proved.pop(name)
        self._refused[name] = (self._clock(), _again(refusal))
        with contextlib.suppress(OSError):
            (self._folder / name).unlink(missing_ok=True)

    def defer(self, name: str) -> None:
        """Note that a new proof of a known key is being asked for: that will do for a while."""
        self._deferred[name] = self._clock()

    def _on_disk(self, name: str) -> float:
        """Return when a key was proved last by any worker; 0 = never."""
        try:
            at = (self._folder / name).stat().st_mtime
        except OSError:
            return 0.0
        self._proved[name] = at
        return at

    def _sweep(self) -> None:
        """Delete the files that prove nothing any more, and all but the newest MOST."""
        before = self._clock() - STALE_S
        try:
            with os.scandir(self._folder) as files:
                ages = sorted(((file.stat().st_mtime, file.path) for file in files), reverse=True)
            for place, (at, path) in enumerate(ages):
                if at < before or place >= MOST:
                    Path(path).unlink(missing_ok=True)
        except OSError as error:
            log.info("%s: proofs of clients' keys are not kept: %s", self._folder, error.strerror)


def _again(refusal: ClientKeyRefused) -> ClientKeyRefused:
    """Return the same refusal, to be raised once more."""
    return ClientKeyRefused(
        str(refusal), status=refusal.status, kind=refusal.kind, code=refusal.code
    )


FOLDER = "client-keys"
"""The name of the folder of proofs, in that of the store."""
AT_ONCE = 16
"""Keys that are proved at a time: bad ones cannot flood a provider, however many come."""
RETRY_S = 1.0
"""When to try again to prove a key, where nobody named a time."""
PROOF_S = 5.0
"""Seconds that a request waits for a proof of its key at most, its turn for it included. A call
that was sent goes on, and proves the key when its answer comes."""
LONGEST = 4096
"""Characters of a key."""


Ask: TypeAlias = Callable[[Sequence[Input], Context], Awaitable[CountedEmbeddings]]
"""Asks the cache, and behind it the routes."""


class ClientKeys:
    """Answers those who come with keys of their own. Raises StoreError, see `client_secret`."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        """`folder` is that of the store."""
        self._frozen = settings.cache.mode == "frozen"
        self._asks_keys = bool(settings.server.keys)
        self._secret = load(folder)
        self.proofs = Proofs(folder / FOLDER)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._places = asyncio.Semaphore(AT_ONCE)

    async def embed(
        self, how: ByClient, caller: Client, inputs: Sequence[Input], context: Context, ask: Ask
    ) -> tuple[CountedEmbeddings, str]:
        """Answer from what the caller's key may see, and buy the rest with it.

        Also returns the namespace that it was. Raises EmbeddingError: ClientKeyRefused for a key
        that is not accepted, and for none; NoProviderAvailable for one that cannot be proved now.
        """
        if not caller.api_key:
            if not how.others:
                raise self._missing(how)
            return await ask(inputs, context), context.namespace
        credential = self._credential(how, caller.api_key)
        namespace = context.namespace
        if not how.share:
            namespace = "/".join(filter(None, (namespace, credential.name)))
        account = context.account
        if not account.client:
            account = replace(account, client=credential.name)
        own = replace(context, credential=credential, namespace=namespace, account=account)
        answer = await _Visit(self, how, own, credential, ask).answer(inputs)
        if answer is None:
            # The next time it may be proved, or refused.
            return replace(await ask(inputs, context), cached_hit=None), context.namespace
        return answer, namespace

    def proof_of(self, credential: Credential, how: ByClient) -> str:
        """Return under which name it is known that a key was accepted for a model."""
        return self._digest(credential.name, how.space)

    def standing(self, proof: str) -> KeyStatus:
        """Return what a key may have. Raises ClientKeyRefused for one that was refused just now."""
        # Frozen, nobody can be asked: what a key has bought is there for whoever has the key.
        return KeyStatus.PROVED if self._frozen else self.proofs.standing(proof)

    @asynccontextmanager
    async def turn(self, proof: str, deadline: float | None) -> AsyncIterator[None]:
        """Wait until nobody proves the same key, and few others do. Raises DeadlineExceeded."""
        lock = self._locks.setdefault(proof, asyncio.Lock())
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout_at(deadline):
                    await stack.enter_async_context(lock)
                    await stack.enter_async_context(self._places)
            except TimeoutError as error:
                raise DeadlineExceeded("the time of the request was up") from error
            yield

    def _credential(self, how: ByClient, key: str) -> Credential:
        """Return a key and its name: a digest of it and of where it is for."""
        if len(key) > LONGEST or not (key.isascii() and key.isprintable()) or " " in key:
            raise ClientKeyRefused("Incorrect API key provided: it holds what is in no key.")
        return Credential(key, f"key-{self._digest(how.origin, key)}")

    def _digest(self, *parts: str) -> str:
        told = b"".join(part(b"k", one.encode()) for one in parts)
        return hashlib.blake2b(told, digest_size=16, key=self._secret).hexdigest()

    def _missing(self, how: ByClient) -> ClientKeyRefused:
        ours = ", and this proxy's key in `x-proxy-key`" if self._asks_keys else ""
        return ClientKeyRefused(
            f"You didn't provide an API key of your own, with which `{how.model}` is asked for at"
            f" {how.providers[0]}: send it in the header `Authorization: Bearer KEY`{ours}."
        )


class _Visit:
    """One request that comes with a key."""

    def __init__(
        self, keys: ClientKeys, how: ByClient, own: Context, credential: Credential, ask: Ask
    ) -> None:
        self._keys = keys
        self._how = how
        self._own = own
        self._credential = credential
        self._ask = ask
        self._proof = keys.proof_of(credential, how)

    async def answer(self, inputs: Sequence[Input]) -> CountedEmbeddings | None:
        """Return the answer; None if the key cannot be proved now, and other routes may do."""
        standing, spend = self._keys.standing(self._proof), self._own.terms.spend
        if standing is KeyStatus.UNKNOWN and not spend:
            if self._how.others:
                return None
            raise InvalidRequest(
                f"Your key has not been proved at {self._how.providers[0]} for so long that nothing"
                " is served to it, and the request says only-if-cached.",
                status=504,
                code="not_cached",
            )
        if standing is KeyStatus.PROVED or not spend:
            return await self._asked(inputs)
        shortest = min(range(len(inputs)), key=lambda place: len(inputs[place]))
        try:
            return await embed_one_first(inputs, shortest, self._first, self._asked)
        except (NoProviderAvailable, ProviderError, InvalidRequest) as error:
            if self._keys.standing(self._proof) is not KeyStatus.UNKNOWN:
                raise
            if self._how.others:
                return None
            if not isinstance(error, TransientError) or isinstance(error, RateLimited):
                raise
            wait = RETRY_S if error.retry_after is None else error.retry_after
            raise NoProviderAvailable(
                f"Your key cannot be proved just now ({error}).", wait
            ) from error

    async def _first(self, inputs: Sequence[Input]) -> CountedEmbeddings:
        """Ask for the inputs past the cache, unless the key is proved when its turn comes."""
        # What is bought so proves the key: no entry is taken, no other's purchase, no other route.
        # A call that an earlier request left under way is such a purchase, and is not made again.
        terms = self._own.terms
        clock = asyncio.get_running_loop().time
        limit = clock() + PROOF_S
        by = limit if self._own.deadline is None else min(self._own.deadline, limit)
        proving = replace(
            self._own,
            deadline=by,
            # That the short time of a proof is up says nothing of the provider.
            begun=None,
            credential=replace(self._credential, is_exclusive=True),
            terms=replace(terms, max_age=0.0, joins_same_key=terms.max_age > 0),
            on_charge=self._accept,
        )
        try:
            async with self._keys.turn(self._proof, by):
                standing = self._keys.standing(self._proof)
                if standing is KeyStatus.DUE:
                    # Others need not wait: they are served on the older proof meanwhile.
                    self._keys.proofs.defer(self._proof)
                if standing is not KeyStatus.PROVED:
                    return await self._asked(inputs, proving)
        except (NoProviderAvailable, ProviderError, DeadlineExceeded) as error:
            is_late = isinstance(error, DeadlineExceeded)
            if is_late and self._own.deadline is not None and self._own.deadline <= clock():
                raise
            if self._keys.standing(self._proof) is KeyStatus.UNKNOWN:
                if not is_late:
                    raise
                told = f"Your key cannot be proved just now (no answer within {PROOF_S:g} s)."
                raise NoProviderAvailable(told, RETRY_S) from error
            self._keys.proofs.defer(self._proof)
            log.info("%s is served on an older proof: %s", self._credential.name, error)
        return await self._asked(inputs)

    def _accept(self, bill: Bill) -> None:
        """Note that the key was charged, though its client may be gone: that proves it as well."""
        if bill.provider in self._how.providers:
            self._keys.proofs.accepted(self._proof)

    async def _asked(
        self, inputs: Sequence[Input], context: Context | None = None
    ) -> CountedEmbeddings:
        """Ask, and note what it says of the key."""
        try:
            answer = await self._ask(inputs, context or self._own)
        except ClientKeyRefused as refusal:
            self._keys.proofs.refused(self._proof, refusal)
            raise
        if not {*answer.providers}.isdisjoint(self._how.providers):
            self._keys.proofs.accepted(self._proof)
        if answer.cached_hit is None:
            return answer
        return replace(answer, cached_hit=_WhileProved(self._is_proved, answer.cached_hit))

    def _is_proved(self) -> bool:
        """Tell whether an answer may be given to the key once more."""
        try:
            return self._keys.standing(self._proof) is KeyStatus.PROVED
        except ClientKeyRefused:
            return False


@dataclass(frozen=True, slots=True)
class _WhileProved:
    """An answer that is given again for as long as the key is good."""

    is_proved: Callable[[], bool]
    answer: Reusable

    async def vectors(self) -> Sequence[Vector] | None:
        return await self.answer.vectors() if self.is_proved() else None

    def count(self) -> None:
        self.answer.count()

    def reuse_of(self, vectors: Sequence[Vector]) -> Callable[[], bool] | None:
        reuse = self.answer.reuse_of(vectors)
        return None if reuse is None else lambda: self.is_proved() and reuse()
