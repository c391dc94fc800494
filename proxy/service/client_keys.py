"""Models that are bought with the client's own API key.

`ClientKeyPolicy` says which models these are. What a key has bought is served to that key alone: it
is kept in a namespace of its own, named by a digest. Where the operator sets `share_cache`, it is
kept where all entries are. In both cases nothing is served to a key that the provider has not
accepted: the first request of a key buys one input with it, past the cache, and keeps that like any
other.

A client without a key is served by the other routes of the model, if it has any; so is one whose
key cannot be proved at the moment. A client whose key is refused gets that error.

`Proofs` remembers which keys a provider has accepted or refused, and when. It keeps digests, in
memory and as empty files whose time is that of the proof: so workers share them, and a restart
during an outage loses none. A proof that the disk does not take is known to this process alone.

The digests are keyed with a secret that is made once and kept beside the store. Without it no
digest can be tested against a key. All workers share the file.
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
from embedding_proxy.cache.cached_hit import CountedEmbeddings, Reusable
from embedding_proxy.cache.disk.store import StoreError
from embedding_proxy.cache.key import part
from embedding_proxy.providers.base import Context, Input, Vector
from embedding_proxy.providers.charge import Bill
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

log = logging.getLogger("embedding_proxy.keys")

HASH_KEY_FILE = "client-keys.secret"
"""The name of the file, in the folder of the store."""
HASH_KEY_SIZE = 32
"""Bytes."""
PROOFS_FOLDER = "client-keys"
"""The name of the folder of proofs, in that of the store."""
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
MAX_KEYS = 10_000
"""Keys that are remembered, of either sort; those noted longest ago are forgotten."""
SWEEP_EVERY = 1000
"""New files after which the old ones are looked for, and those beyond MAX_KEYS."""
MAX_PROVED_AT_ONCE = 16
"""Keys that are proved at a time: bad ones cannot flood a provider, however many come."""
RETRY_S = 1.0
"""When to try again to prove a key, where nobody named a time."""
PROOF_S = 5.0
"""Seconds that a request waits for a proof of its key at most, its turn for it included. A call
that was sent goes on, and proves the key when its answer comes."""
MAX_KEY_LENGTH = 4096
"""Characters of a key."""
Ask: TypeAlias = Callable[[Sequence[Input], Context], Awaitable[CountedEmbeddings]]
"""Asks the cache, and behind it the routes."""


@dataclass(frozen=True, slots=True)
class ClientKeyPolicy:
    """That a model is asked for with the client's own key."""

    model: str
    space: str
    providers: tuple[str, ...]
    """Those that are asked with it; all of one origin."""
    origin: str
    share_cache: bool
    """Whether what one key has bought is served to others."""
    has_other_routes: bool
    """Whether the model has routes that need no client's key."""


def client_key_policy(
    settings: Settings, name: str, entry: ModelConfig, usable: Container[str]
) -> ClientKeyPolicy | None:
    """Return how a model is asked for with clients' keys; None if it is not.

    `usable` are the names of the providers that can be asked.
    """
    routes = {route.provider: settings.providers.get(route.provider) for route in entry.routes}
    client_paid = {
        name: config
        for name, config in routes.items()
        if config is not None and config.uses_client_key
    }
    if not client_paid:
        return None
    return ClientKeyPolicy(
        model=name,
        space=entry.space,
        providers=tuple(client_paid),
        origin=next(config.origin for config in client_paid.values()),
        share_cache=all(config.share_cache for config in client_paid.values()),
        has_other_routes=any(
            provider in usable for provider in routes if provider not in client_paid
        ),
    )


def load_secret(folder: Path) -> bytes:
    """Return the secret, made now if there is none. Raises StoreError for one that is damaged.

    Where it cannot be kept it is this process's own: what is bought then is found by nobody later.
    """
    file = folder / HASH_KEY_FILE
    try:
        if not file.exists():
            _make_secret(file)
        secret = file.read_bytes()
    except OSError as error:
        log.warning(
            "%s: cannot be kept (%s): what is bought with clients' keys will be bought anew after"
            " a restart",
            *(file, error.strerror),
        )
        return secrets.token_bytes(HASH_KEY_SIZE)
    if len(secret) != HASH_KEY_SIZE:
        raise StoreError(
            f"{file}: is damaged: bring it back from a backup; or delete it, and what was bought"
            " with clients' keys is bought anew"
        )
    return secret


def _make_secret(file: Path) -> None:
    """Write a new secret, whole or not at all; if another process is first, its own stays."""
    with contextlib.suppress(FileExistsError):
        atomic_file.write(file, secrets.token_bytes(HASH_KEY_SIZE), exclusive=True)


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
        self._proved = LRUCache[str, float](MAX_KEYS)
        self._refused = LRUCache[str, tuple[float, ClientKeyRefused]](MAX_KEYS)
        self._deferred = LRUCache[str, float](MAX_KEYS)
        self._written = 0
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
        self._sweep()

    def status(self, name: str) -> KeyStatus:
        """Return what is known. Raises ClientKeyRefused for a key that was refused just now."""
        now = self._clock()
        at, refusal = self._refused.peek(name) or (-REFUSED_S, None)
        if refusal is not None and 0 <= now - at < REFUSED_S:
            raise _copy_refusal(refusal)
        age = now - (self._proved.peek(name) or 0.0)
        if not 0 <= age < FRESH_S:
            # Another worker may have proved it since.
            age = now - self._on_disk(name)
        if not 0 <= age < STALE_S:
            return KeyStatus.UNKNOWN
        deferred = 0 <= now - (self._deferred.peek(name) or -AGAIN_S) < AGAIN_S
        return KeyStatus.PROVED if age < FRESH_S or deferred else KeyStatus.DUE

    def accept(self, name: str) -> None:
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

    def refuse(self, name: str, refusal: ClientKeyRefused) -> None:
        """Note that the provider does not accept a key: from now on nothing is served to it."""
        self._proved.pop(name)
        self._refused[name] = (self._clock(), _copy_refusal(refusal))
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
        """Delete the files that prove nothing any more, and all but the newest MAX_KEYS."""
        before = self._clock() - STALE_S
        try:
            with os.scandir(self._folder) as files:
                ages = sorted(((file.stat().st_mtime, file.path) for file in files), reverse=True)
            for rank, (at, path) in enumerate(ages):
                if at < before or rank >= MAX_KEYS:
                    Path(path).unlink(missing_ok=True)
        except OSError as error:
            log.info("%s: proofs of clients' keys are not kept: %s", self._folder, error.strerror)


def _copy_refusal(refusal: ClientKeyRefused) -> ClientKeyRefused:
    """Return the same refusal, to be raised once more."""
    return ClientKeyRefused(
        str(refusal), status=refusal.status, kind=refusal.kind, code=refusal.code
    )


class ClientKeys:
    """Answers those who come with keys of their own. Raises StoreError, see `load_secret`."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        """`folder` is that of the store."""
        self._frozen = settings.cache.mode == "frozen"
        self._asks_keys = bool(settings.server.keys) or settings.keys_path.exists()
        self._secret = load_secret(folder)
        self.proofs = Proofs(folder / PROOFS_FOLDER)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._proving = asyncio.Semaphore(MAX_PROVED_AT_ONCE)

    async def embed(
        self,
        how: ClientKeyPolicy,
        caller: Client,
        inputs: Sequence[Input],
        context: Context,
        ask: Ask,
    ) -> tuple[CountedEmbeddings, str]:
        """Answer from what the caller's key may see, and buy the rest with it.

        Also returns the namespace that it was. Raises EmbeddingError: ClientKeyRefused for a key
        that is not accepted, and for none; NoProviderAvailable for one that cannot be proved now.
        """
        if not caller.api_key:
            if not how.has_other_routes:
                raise self._missing_key_error(how)
            return await ask(inputs, context), context.namespace
        credential = self._credential(how, caller.api_key)
        namespace = context.namespace
        if not how.share_cache:
            namespace = "/".join(filter(None, (namespace, credential.name)))
        account = context.account
        if not account.client:
            account = replace(account, client=credential.name)
        own = replace(context, credential=credential, namespace=namespace, account=account)
        answer = await _KeyedRequest(self, how, own, credential, ask).answer(inputs)
        if answer is None:
            # The next time it may be proved, or refused.
            return replace(await ask(inputs, context), cached_hit=None), context.namespace
        return answer, namespace

    def proof_of(self, credential: Credential, how: ClientKeyPolicy) -> str:
        """Return under which name it is known that a key was accepted for a model."""
        return self._digest(credential.name, how.space)

    def status(self, proof: str) -> KeyStatus:
        """Return what a key may have. Raises ClientKeyRefused for one that was refused just now."""
        # Frozen, nobody can be asked: what a key has bought is there for whoever has the key.
        return KeyStatus.PROVED if self._frozen else self.proofs.status(proof)

    @asynccontextmanager
    async def turn(self, proof: str, deadline: float | None) -> AsyncIterator[None]:
        """Wait until nobody proves the same key, and few others do. Raises DeadlineExceeded."""
        lock = self._locks.setdefault(proof, asyncio.Lock())
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout_at(deadline):
                    await stack.enter_async_context(lock)
                    await stack.enter_async_context(self._proving)
            except TimeoutError as error:
                raise DeadlineExceeded("the time of the request was up") from error
            yield

    def _credential(self, how: ClientKeyPolicy, key: str) -> Credential:
        """Return a key and its name: a digest of it and of where it is for."""
        if len(key) > MAX_KEY_LENGTH or not (key.isascii() and key.isprintable()) or " " in key:
            raise ClientKeyRefused("Incorrect API key provided: it holds what is in no key.")
        return Credential(key, f"key-{self._digest(how.origin, key)}")

    def _digest(self, *parts: str) -> str:
        message = b"".join(part(b"k", text.encode()) for text in parts)
        return hashlib.blake2b(message, digest_size=16, key=self._secret).hexdigest()

    def _missing_key_error(self, how: ClientKeyPolicy) -> ClientKeyRefused:
        hint = ", and this proxy's key in `x-proxy-key`" if self._asks_keys else ""
        return ClientKeyRefused(
            f"You didn't provide an API key of your own, with which `{how.model}` is asked for at"
            f" {how.providers[0]}: send it in the header `Authorization: Bearer KEY`{hint}."
        )


class _KeyedRequest:
    """One request that comes with a key."""

    def __init__(
        self, keys: ClientKeys, how: ClientKeyPolicy, own: Context, credential: Credential, ask: Ask
    ) -> None:
        self._keys = keys
        self._how = how
        self._own = own
        self._credential = credential
        self._ask = ask
        self._proof = keys.proof_of(credential, how)

    async def answer(self, inputs: Sequence[Input]) -> CountedEmbeddings | None:
        """Return the answer; None if the key cannot be proved now, and other routes may do."""
        status, spend = self._keys.status(self._proof), self._own.terms.spend
        if status is KeyStatus.UNKNOWN and not spend:
            if self._how.has_other_routes:
                return None
            raise InvalidRequest(
                f"Your key has not been proved at {self._how.providers[0]} for so long that nothing"
                " is served to it, and the request says only-if-cached.",
                status=504,
                code="not_cached",
            )
        if status is KeyStatus.PROVED or not spend:
            return await self._ask_noted(inputs)
        shortest = min(range(len(inputs)), key=lambda index: len(inputs[index]))
        try:
            return await embed_one_first(inputs, shortest, self._prove, self._ask_noted)
        except (NoProviderAvailable, ProviderError, InvalidRequest) as error:
            if self._keys.status(self._proof) is not KeyStatus.UNKNOWN:
                raise
            if self._how.has_other_routes:
                return None
            if not isinstance(error, TransientError) or isinstance(error, RateLimited):
                raise
            wait = RETRY_S if error.retry_after is None else error.retry_after
            raise NoProviderAvailable(
                f"Your key cannot be proved just now ({error}).", wait
            ) from error

    async def _prove(self, inputs: Sequence[Input]) -> CountedEmbeddings:
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
                status = self._keys.status(self._proof)
                if status is KeyStatus.DUE:
                    # Others need not wait: they are served on the older proof meanwhile.
                    self._keys.proofs.defer(self._proof)
                if status is not KeyStatus.PROVED:
                    return await self._ask_noted(inputs, proving)
        except (NoProviderAvailable, ProviderError, DeadlineExceeded) as error:
            is_late = isinstance(error, DeadlineExceeded)
            if is_late and self._own.deadline is not None and self._own.deadline <= clock():
                raise
            if self._keys.status(self._proof) is KeyStatus.UNKNOWN:
                if not is_late:
                    raise
                problem = f"Your key cannot be proved just now (no answer within {PROOF_S:g} s)."
                raise NoProviderAvailable(problem, RETRY_S) from error
            self._keys.proofs.defer(self._proof)
            log.info("%s is served on an older proof: %s", self._credential.name, error)
        return await self._ask_noted(inputs)

    def _accept(self, bill: Bill) -> None:
        """Note that the key was charged, though its client may be gone: that proves it as well."""
        if bill.provider in self._how.providers:
            self._keys.proofs.accept(self._proof)

    async def _ask_noted(
        self, inputs: Sequence[Input], context: Context | None = None
    ) -> CountedEmbeddings:
        """Ask, and note what it says of the key."""
        try:
            answer = await self._ask(inputs, context or self._own)
        except ClientKeyRefused as refusal:
            self._keys.proofs.refuse(self._proof, refusal)
            raise
        if not {*answer.providers}.isdisjoint(self._how.providers):
            self._keys.proofs.accept(self._proof)
        if answer.cached_hit is None:
            return answer
        return replace(answer, cached_hit=_KeyBoundHit(self._is_proved, answer.cached_hit))

    def _is_proved(self) -> bool:
        """Tell whether an answer may be given to the key once more."""
        try:
            return self._keys.status(self._proof) is KeyStatus.PROVED
        except ClientKeyRefused:
            return False


@dataclass(frozen=True, slots=True)
class _KeyBoundHit:
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
