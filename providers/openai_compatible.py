"""A provider that speaks OpenAI's embeddings over HTTP; its profile says how it differs."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Self

import orjson
from embedding_proxy.providers.routing.route import request_scope
from embedding_proxy.providers.scheduling.batch_limits import BatchLimits
from embedding_proxy.providers.scheduling.refusal import is_quoted
from embedding_proxy.providers.upstream.rate_limiter import ProviderQueue, estimate
from embedding_proxy.providers.upstream.transport import Reply, Transport

from . import descriptors, request_context, tokens
from .allowance import SharedAllowance
from .base import Context, Embedded, Input, Outcome, Space
from .charge import Charge
from .client_credential import MOST_KEYS, Credential
from .errors import (
    AuthenticationError,
    ClientKeyRefused,
    EmbeddingError,
    InvalidRequest,
    LocalQueueFull,
    RateLimited,
)
from .histogram import Histogram
from .lru_cache import LRUCache
from .profile import Limits, Profile
from .redaction import QuotedInputs, Redactor
from .upstream import error_reply, response

log = logging.getLogger("embedding_proxy.provider")

# A JSON float takes at most 25 bytes; the rest of a reply is small.
_BYTES_A_NUMBER = 32
_BYTES_A_REPLY = 1 << 20
_WIDEST = 1 << 16

# Up to this many bytes, and inputs, reading a reply is quicker than handing it to a thread.
_READ_INLINE = 1 << 20
_READ_INLINE_INPUTS = 128

MAX_OTHER_MODELS = 100
"""Distinct model names in replies that are counted each on its own."""
MAX_NAME = 100
"""Characters of such a name that are kept."""
OTHER = "other"
"""The name under which the replies with further names are counted."""

# Of the files that this process may open, the part that connections to one provider may take
# where each client pays with its own key, and has its own limits.
_CONNECTIONS_SHARE = 0.5


class HttpProvider:
    """Asks one upstream for embeddings. Open it with `async with`.

    An upstream that a profile cannot describe derives from it and replaces `path` or
    `fixed_fields`. `sleep` takes seconds; tests inject one that does not wait.
    """

    profile: ClassVar[Profile] = Profile()
    """What this kind declares; what holds for one provider of it is given when it is made."""

    def __init__(
        self,
        name: str,
        profile: Profile,
        *,
        api_key: str | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if profile.base_url is None:
            raise ValueError(f"{name}: has no base URL")
        self.name = name
        self.limits = profile.limits
        self.options = profile.options
        self.other_models: Counter[str] = Counter()
        """Replies that named another model than was asked for, by that name; those of names beyond
        MAX_OTHER_MODELS are counted together, as OTHER."""
        self._base_url = profile.base_url.rstrip("/")
        self._declared = profile
        self._has_unnumbered_answers = False
        self._redactor = Redactor(*profile.secrets(api_key))
        headers = dict(profile.headers)
        connections = None
        if profile.by_client:
            max_connections = int(descriptors.left() * _CONNECTIONS_SHARE)
            connections = asyncio.Semaphore(max(1, max_connections))
        elif api_key:
            headers |= self._key_header(api_key)
        # How many calls there are at a time is decided in `ProviderQueue`. A limit of the transport
        # would be a second queue, whose waits would count as the provider's.
        self._transport = Transport(
            name, profile.base_url, headers, profile.timeouts, network=profile.network
        )
        self._batch_limits = BatchLimits(name, profile.limits)
        self._allowance_of_client: Callable[[str], SharedAllowance] | None = None
        self._queue = ProviderQueue(name, profile.limits, sleep)
        self._client_queues = LRUCache[str, ProviderQueue](MOST_KEYS)
        self._new_queue = partial(ProviderQueue, name, profile.limits, sleep, connections)

    def share_limits(
        self, own: SharedAllowance, of_client: Callable[[str], SharedAllowance]
    ) -> None:
        """Let the declared limits a minute be those of all nodes together.

        `own` counts calls with the proxy's key; `of_client` gives the same of a client's.
        Called before the first call.
        """
        self._queue = self._new_queue(shared=own)
        self._allowance_of_client = of_client

    def _client_queue(self, credential: Credential) -> ProviderQueue:
        """Return a new queue for the calls with a client's own key."""
        of_client = self._allowance_of_client
        return self._new_queue(shared=of_client and of_client(credential.secret))

    @property
    def accepts_tokens(self) -> bool:
        """Whether token arrays may be sent as they are."""
        return self._declared.accepts_tokens

    @property
    def by_client(self) -> bool:
        """Whether it is asked with each client's own key, and with no other."""
        return self._declared.by_client

    def limits_of(self, model: str) -> Limits:
        """Return what it takes of a model in one call: as declared, or less if it has shown so."""
        return self._batch_limits.of(model)

    def rate_limit_waits(self) -> dict[str, float]:
        """Return the seconds that calls wait for the limit that was told, by model.

        Of calls with the proxy's own key.
        """
        return self._queue.waits()

    def learn_single(self, model: str) -> None:
        """Ask for one input in a call of this model from now on: more of them get one vector."""
        self._batch_limits.learn_single(model)

    def path(self, model: str) -> str:  # noqa: ARG002 - for upstreams whose path names the model
        """Return the path below the base URL at which a model is asked."""
        return "/embeddings"

    def fixed_fields(self) -> Mapping[str, object]:
        """Return fields that every request body has by configuration; none may change a vector."""
        return {}

    @property
    def durations(self) -> Histogram:
        """How long its calls took."""
        return self._transport.durations

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._transport.__aexit__(*exc)

    async def ask(
        self, model: str, space: Space, inputs: Sequence[Input], context: Context
    ) -> Embedded:
        """Make one attempt at the upstream's `model`; vectors come back checked, in input order.

        Asks for the native width, whatever width the client wants. Waits for room within the
        limits per minute, and for a free place among the calls at the same time.

        Raises EmbeddingError. If only some vectors of an answer are bad, the others are told to
        `context.on_part` first; the InvalidAnswer that is raised then names the places of the bad
        ones. The `charge` of both is that of the whole call, and is to be billed once.
        """
        with request_context.observer.begin_call(self.name, model, len(inputs)) as span:
            answer = await self._ask(model, space, inputs, context)
            charge = answer.charge
            span.answered(None if charge is None else charge.tokens, space.dimensions)
        return answer

    async def _ask(
        self, model: str, space: Space, inputs: Sequence[Input], context: Context
    ) -> Embedded:
        objection = self.objection(space)
        if objection is not None:
            raise objection
        credential, queue, headers = None, self._queue, None
        if self.by_client:
            credential = context.credential
            if credential is None:
                raise ClientKeyRefused(
                    f"{self.name}: is asked with the client's own key; none came"
                )
            queue = self._client_queues.get_or_make(
                credential.name, partial(self._client_queue, credential)
            )
            headers = self._key_header(credential.secret)
        try:
            payload = orjson.dumps(self._payload(model, space, inputs, context))
        except orjson.JSONEncodeError as error:
            raise InvalidRequest(f"The request cannot be sent on: {error}.") from error
        width = space.dimensions or _WIDEST
        limit = _BYTES_A_REPLY + len(inputs) * width * _BYTES_A_NUMBER
        scope = request_scope(model, space)
        async with queue.slot(scope, estimate(inputs), context):
            is_abandoned = context.attempt is not None and context.attempt.is_abandoned
            if is_abandoned or (context.is_needed is not None and not context.is_needed()):
                # Raised so, it gives back its room within the limits.
                raise LocalQueueFull(self.name, "nobody waits for the answer any more")
            counts = dict(context.counts)
            reply = await self._transport.post(
                self.path(model),
                payload,
                limit,
                context,
                headers,
                on_sent=partial(tokens.count_short_texts, inputs, space.tokenizer, counts),
            )
        queue.learn(scope, reply.headers)
        read = partial(self._read, reply, model, space, inputs, credential)
        try:
            is_short = len(reply.body) <= _READ_INLINE and len(inputs) <= _READ_INLINE_INPUTS
            checked = read() if is_short else await asyncio.to_thread(read)
        except EmbeddingError as error:
            if isinstance(error, RateLimited) and error.retry_after is not None:
                queue.pause(scope, error.retry_after)
            elif isinstance(error, InvalidRequest) and not is_quoted(error, payload):
                self._batch_limits.learn_refused(model, inputs, len(payload), error)
            elif isinstance(error, AuthenticationError) and credential is not None:
                raise self._refused(credential, error) from error
            raise
        self._note(model, checked, inputs)
        self._batch_limits.learn_accepted(model, inputs)
        return await self._deliver(checked, space, inputs, context, counts)

    async def _deliver(
        self,
        checked: response.CheckedReply,
        space: Space,
        inputs: Sequence[Input],
        context: Context,
        counts: Mapping[str, int],
    ) -> Embedded:
        """Return an answer with its tokens; if it has bad vectors, tell the good ones and raise."""
        charge = checked.charge or Charge()
        sizes, exact = await tokens.count_charged(inputs, charge.tokens, space.tokenizer, counts)
        good = Embedded(
            vectors=checked.vectors,
            tokens=[sizes[index] for index in checked.indices],
            counted=exact,
            providers=(self.name,),
            outcomes=[Outcome.MISS] * len(checked.indices),
            charge=checked.charge,
        )
        if not checked.problems:
            return good
        error = response.bad_vectors(self.name, checked)
        # The good ones were bought: the call is billed also where the upstream names no price.
        total = sum(sizes) if charge.tokens is None else charge.tokens
        error.charge = Charge(total, charge.nanodollars)
        if context.on_part is not None:
            await context.on_part(checked.indices, replace(good, charge=error.charge))
        raise error

    def _key_header(self, key: str) -> dict[str, str]:
        return {self._declared.key_header: self._declared.key_prefix + key}

    def _refused(self, credential: Credential, error: AuthenticationError) -> ClientKeyRefused:
        """Return what a client is told whose key is not accepted; the log gets no word of it."""
        refusal = error.refusal
        if refusal is None:
            return ClientKeyRefused(str(error))
        log.info("%s: refuses a client's key, %s: %d", self.name, credential.name, refusal.status)
        return ClientKeyRefused(
            str(error), status=refusal.status, kind=refusal.kind, code=refusal.code
        )

    def _read(
        self,
        reply: Reply,
        model: str,
        space: Space,
        inputs: Sequence[Input],
        credential: Credential | None,
    ) -> response.CheckedReply:
        """Read a reply. Any status of success with good vectors is an answer."""

        def redact(text: str) -> str:
            """Take out the key that was sent: some upstreams repeat the one that they refuse."""
            if credential is not None:
                text = credential.redacted(text.encode(errors="replace")).decode(errors="replace")
            return self._redactor.redact_text(text)

        hide = QuotedInputs(inputs).hide
        url = self._base_url + self.path(model)
        if not 200 <= reply.status < 300:
            raise error_reply.refusal(
                self.name,
                reply.status,
                reply.headers,
                reply.body,
                redact=redact,
                hide=hide,
                url=url,
            )
        return response.read(
            self.name,
            space,
            inputs,
            reply.headers,
            reply.body,
            status=reply.status,
            unit_norm=space.unit_norm or self._declared.unit_norm,
            model=model,
            redact=redact,
            hide=hide,
            url=url,
        )

    def _note(self, model: str, checked: response.CheckedReply, inputs: Sequence[Input]) -> None:
        """Take note of what is odd in a good answer."""
        self._compare(model, checked.model, inputs)
        self._note_numbering(checked)

    def _note_numbering(self, checked: response.CheckedReply) -> None:
        """Say once that embeddings come without their index."""
        if checked.is_numbered or self._has_unnumbered_answers:
            return
        self._has_unnumbered_answers = True
        log.warning(
            "%s: its answers leave out `index`; the missing ones are deduced, or follow the order",
            self.name,
        )

    def _compare(self, requested: str, answered: str | None, inputs: Sequence[Input]) -> None:
        """Count replies that name another model; a version of the same model is no other one."""
        if answered is None or answered == requested or not self._declared.names_models:
            return
        requested_name, answered_name = (
            name.rpartition("/")[2].lower() for name in (requested, answered)
        )
        if requested_name.startswith(answered_name) or answered_name.startswith(requested_name):
            return
        answered = answered[:MAX_NAME]
        if answered not in self.other_models:
            answered = QuotedInputs(inputs).hide(answered)
        if answered not in self.other_models:
            if len(self.other_models) >= MAX_OTHER_MODELS:
                self.other_models[OTHER] += 1
                return
            log.warning(
                "%s: answers as %r when asked for %r; `embedding-proxy check` compares the routes",
                self.name,
                answered,
                requested,
            )
        self.other_models[answered] += 1

    def objection(self, space: Space) -> InvalidRequest | None:
        """Return why this upstream cannot be asked in that space, if it cannot.

        A field of the request may be unknown to it, or not the client's to say.
        """
        if not space.parameters:
            return None
        fields = self._declared.extra_fields
        width = self._declared.dimensions_field
        fixed = self.fixed_fields()
        for name, _ in space.parameters:
            if name == width:
                problem = f"The width of a vector is asked for by `dimensions`, not by `{name}`."
            elif name in fixed:
                problem = f"`{name}` is set by the configuration of the proxy."
            elif fields is not None and name not in fields:
                problem = f"Unrecognized request argument supplied: {name}"
            else:
                continue
            return InvalidRequest(problem, param=name)
        return None

    def _payload(
        self, model: str, space: Space, inputs: Sequence[Input], context: Context
    ) -> dict[str, object]:
        """Return the request body; what decides the numbers comes from the space alone."""
        declared = self._declared
        payload: dict[str, object] = {"model": model, "input": inputs}
        if declared.encoding_format is not None:
            payload["encoding_format"] = declared.encoding_format
        if space.send_dimensions and declared.dimensions_field is not None:
            payload[declared.dimensions_field] = space.dimensions
        if context.user is not None and declared.forward_user:
            payload["user"] = context.user
        for name, value in context.neutral:
            if name in declared.neutral_fields:
                payload[name] = orjson.Fragment(value)
        for name, value in space.parameters:
            payload[name] = orjson.Fragment(value)
        return {**payload, **self.fixed_fields()}
