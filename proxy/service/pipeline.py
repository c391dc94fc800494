"""From a well-formed request to vectors: which model, which dimensions, which deadline, which key.

A request is answered by the model that it names, or by a fallback model of another space. Fallback
happens only where the operator configures it (`fallback:`), and for the request as a whole: all
vectors of an answer are of one space. Answers of a fallback model are cached under its own space
alone, so the first model's vectors come back with the first model.

A dimension strategy makes other vectors, and so another space, of an answer: see
`apply_dimension_strategy`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

from embedding_proxy.cache.cached_hit import CountedEmbeddings
from embedding_proxy.cache.embedder import is_plain
from embedding_proxy.cache.key import Keyring, Namespace, keyring
from embedding_proxy.providers import vector
from embedding_proxy.providers.base import Context, Input, Space, Vector
from embedding_proxy.providers.charge import Account
from embedding_proxy.providers.dimensions import BUILT_IN, can_give, choose_dimensions, find
from embedding_proxy.providers.errors import (
    ClientKeyRefused,
    EmbeddingError,
    InvalidAnswer,
    InvalidRequest,
)
from embedding_proxy.providers.lru_cache import LRUCache
from embedding_proxy.proxy import request_fields
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.request_fields import SpaceWatch

from .cache_policy import to_cache_policy
from .client_keys import Ask, ClientKeys
from .embedding_result import Result, check, check_in_steps, make_result
from .inputs import are_short_texts, prepare
from .model_registry import Model, Registry
from .request import Client, EmbeddingRequest

T = TypeVar("T")
log = logging.getLogger("embedding_proxy.fallback")


_MAX_PLANS = 1000


class _Plan(NamedTuple):
    """How requests of one client, for one model and width, are answered from the cache alone."""

    model: Model
    width: int
    ring: Keyring | None
    """None for requests that are not."""
    account: Account


class EmbeddingPipeline:
    """Answers requests with the models of a registry.

    `client_keys` answers for those that are bought with the client's own key, if there are any.
    """

    def __init__(
        self, settings: Settings, registry: Registry, client_keys: ClientKeys | None
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._client_keys = client_keys
        self._spaces = SpaceWatch()
        self._plans = LRUCache[tuple[object, ...], _Plan](_MAX_PLANS)

    def embed_from_cache(
        self, request: EmbeddingRequest, caller: Client, control: str
    ) -> Result | None:
        """Return what `answer` would, if it can be given without waiting; else None.

        It is not counted yet. For a few short texts without further parameters, at a width that
        needs no strategy. What was found stays in `request.lookup`. Raises EmbeddingError.
        """
        model = self._model(request)
        names = (request.model, request.dimensions, *caller[:2], caller.limit, control)
        plan = self._plans.get(names)
        if plan is None or plan.model is not model:
            plan = self._plans[names] = self._plan(model, request, caller, control)
        if plan.ring is None or not are_short_texts(request.inputs):
            return None
        lookup = request.lookup = model.embedder.lookup_nowait(plan.ring, request.inputs)
        if lookup is None or lookup.missing:
            return None
        embedded = model.embedder.answer_hits(plan.ring, lookup, plan.account)
        space, width = model.space, plan.width
        check(space, width, embedded.vectors)
        return make_result(model, model, space, width, request.inputs, embedded, caller.namespace)

    def _plan(self, model: Model, request: EmbeddingRequest, caller: Client, control: str) -> _Plan:
        """Return how a request is answered from the cache alone. Raises InvalidRequest."""
        account = Account(request.model, caller.client, model.price, caller.limit)
        if (
            model.client_key_policy is not None
            or model.truncate_to is not None
            or model.dimension_policy not in BUILT_IN
            or not model.space.dimensions
            or not is_plain(to_cache_policy(self._settings.cache.mode, control))
        ):
            return _Plan(model, 0, None, account)
        ring = keyring(model.space, Namespace(caller.namespace))
        return _Plan(model, _width(model, request), ring, account)

    def _model(self, request: EmbeddingRequest) -> Model:
        model = self._registry.get(request.model)
        if model.by_name and request.dimensions is not None:
            return model.with_dimensions(request.dimensions)
        return model

    async def answer(self, request: EmbeddingRequest, caller: Client, control: str) -> Result:
        """Answer a request, by a fallback model where no route of its own answers.

        `control` is its `Cache-Control`. Raises EmbeddingError.
        """
        model = self._model(request)
        server = self._settings.server
        deadline = asyncio.get_running_loop().time() + server.request_timeout_s
        allowed = to_cache_policy(self._settings.cache.mode, control)

        async def make_context(target: Model, by: float) -> tuple[Sequence[Input], Context]:
            begun = asyncio.get_running_loop().time()
            inputs, weigh = await prepare(
                request.inputs, target, allow_oversize=server.allow_oversize
            )
            account = Account(request.model, caller.client, target.price, caller.limit)
            neutral = _neutral(target, request)
            return inputs, Context(
                by,
                begun=begun,
                user=request.user,
                neutral=neutral,
                namespace=caller.namespace,
                terms=allowed,
                check_tokens=weigh,
                account=account,
                client_retries=caller.retries,
                has_waiters=caller.is_connected,
            )

        if request.parameters:
            self._spaces.note(model.name, _space(model, request).parameters)
        if not model.space.dimensions:
            inputs, context = await make_context(model, deadline)
            return await self._learn(model, request, caller, inputs, context)
        width = _width(model, request)

        async def ask(target: Model, by: float) -> Result:
            space = _space(target, request)
            inputs, context = await make_context(target, by)
            namespace = caller.namespace
            if target.client_key_policy is None:
                lookup = request.lookup if target is model and inputs is request.inputs else None
                embedded = await target.embedder.embed(space, inputs, context, lookup)
            else:
                embed = partial(target.embedder.embed, space)
                embedded, namespace = await self._with_key(target, caller, inputs, context, embed)
            await check_in_steps(space, width, embedded.vectors)
            return make_result(model, target, space, width, inputs, embedded, namespace)

        if not model.fallbacks:
            return await ask(model, deadline)
        models = [model, *fallback_models(model, self._registry.models, width)]
        return await embed_with_fallback(ask, models, deadline)

    async def _learn(
        self,
        model: Model,
        request: EmbeddingRequest,
        caller: Client,
        inputs: Sequence[Input],
        context: Context,
    ) -> Result:
        """Answer with a model whose width the first answer tells."""
        parameters = _parameters(model, request)

        async def ask(part: Sequence[Input], context: Context) -> CountedEmbeddings:
            nonlocal model
            if not model.space.dimensions:
                model, answer = await self._registry.learn(model, parameters, part, context)
                return answer
            space = model.space.with_parameters(parameters)
            return await model.embedder.embed(space, part, context)

        namespace = caller.namespace
        if model.client_key_policy is None:
            embedded = await ask(inputs, context)
        else:
            embedded, namespace = await self._with_key(model, caller, inputs, context, ask)
        space = model.space.with_parameters(parameters)
        width = _width(model, request)
        await check_in_steps(space, width, embedded.vectors)
        return make_result(model, model, space, width, inputs, embedded, namespace)

    async def _with_key(
        self, model: Model, caller: Client, inputs: Sequence[Input], context: Context, ask: Ask
    ) -> tuple[CountedEmbeddings, str]:
        """Ask for a client that pays with its own key; also return whose namespace it was."""
        if model.client_key_policy is None or self._client_keys is None:
            raise RuntimeError(f"{model.name}: takes no key of a client")
        return await self._client_keys.embed(model.client_key_policy, caller, inputs, context, ask)


def _parameters(model: Model, request: EmbeddingRequest) -> Mapping[str, object]:
    """Return the fields that belong to the space: what no provider of the model calls neutral."""
    declared = model.neutral_fields
    if not declared or declared.isdisjoint(request.parameters):
        return request.parameters
    return {name: value for name, value in request.parameters.items() if name not in declared}


def _space(model: Model, request: EmbeddingRequest) -> Space:
    """Return the space that a request is answered from. Raises InvalidRequest."""
    parameters = _parameters(model, request) if request.parameters else None
    return model.space.with_parameters(parameters) if parameters else model.space


def _neutral(model: Model, request: EmbeddingRequest) -> tuple[tuple[str, bytes], ...]:
    """Return the fields that a provider of the model declares as neutral. Raises InvalidRequest."""
    declared = model.neutral_fields
    if not declared:
        return ()
    fields = {**request.parameters, **request.neutral}
    return request_fields.canonical_fields({n: fields[n] for n in fields if n in declared})


def _width(model: Model, request: EmbeddingRequest) -> int:
    """Return the width to answer with. Raises InvalidRequest."""
    refused = model.reject_dimensions
    return choose_dimensions(
        model.space, request.dimensions, model.dimension_policy, refused=refused
    )


def fallback_models(model: Model, models: Mapping[str, Model], dimensions: int) -> list[Model]:
    """Return the models that may stand in for a model at that width, in the order preferred."""
    return [
        models[fallback.model]
        for fallback in model.fallbacks
        if can_give(models[fallback.model].space, dimensions, fallback.dimension_policy)
    ]


async def embed_with_fallback(
    ask: Callable[[Model, float], Awaitable[T]], models: Sequence[Model], deadline: float
) -> T:
    """Ask one model after the other, and return the first answer.

    `ask` takes a model and the point on the event loop's clock by which it has to answer: each
    leaves the later ones an equal share of the time. A refusal of the inputs, or of the client's
    key, by the first model ends the matter; a later one may refuse what the first would take.
    Raises EmbeddingError: what the first model failed with, for that is the one asked for.
    """
    clock = asyncio.get_running_loop().time
    failure: EmbeddingError | None = None
    for index, model in enumerate(models):
        now = clock()
        try:
            return await ask(model, now + (deadline - now) / (len(models) - index))
        except EmbeddingError as error:
            if failure is None and isinstance(error, InvalidRequest | ClientKeyRefused):
                raise
            failure = failure or error
            for following in models[index + 1 : index + 2]:
                log.warning("%s: %s stands in: %s", model.name, following.name, error)
    assert failure is not None  # noqa: S101 - there is at least one model
    raise failure


async def apply_dimension_strategy(result: Result) -> Result:
    """Return an answer at its width, where the model's width is a matter of a strategy.

    Nothing of it is cached: that is the model's own vector. Raises InvalidAnswer.
    """
    name, native = result.model.dimension_policy, result.space.dimensions
    if name in BUILT_IN or result.fallback or result.dimensions == native:
        return result
    vectors = await asyncio.to_thread(
        _change_dimensions, name, result.embedded.vectors, result.dimensions
    )
    embedded = replace(result.embedded, vectors=vectors, cached_hit=None)
    return replace(result, space=space_of(name, result.space, result.dimensions), embedded=embedded)


def space_of(name: str, space: Space, dimensions: int) -> Space:
    """Return the space of what a strategy makes of vectors of a space."""
    return replace(
        space,
        name=f"{space.name}~{name}-{find(name).version}",
        dimensions=dimensions,
        matryoshka=False,
        unit_norm=False,
    )


def _change_dimensions(name: str, vectors: Sequence[Vector], dimensions: int) -> list[Vector]:
    try:
        rows = vector.rows(find(name).bring(vector.stack(vectors), dimensions))
        if len(rows) != len(vectors):
            raise vector.VectorError(f"{len(rows)} vectors for {len(vectors)}")  # noqa: TRY301
        for row in rows:
            vector.check(row, dimensions)
    except Exception as error:
        why = str(error) or type(error).__name__
        raise InvalidAnswer(f"width {name}", f"the strategy failed: {why}") from error
    return rows
