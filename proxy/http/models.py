"""GET /v1/models: the models that can be asked for, in OpenAI's shape."""

import orjson
from aiohttp import web
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from embedding_proxy.proxy.service.model_registry import Model, ModelUnknown

from .passthrough import Passthrough

# OpenAI's objects carry the time a model was made; ours were not made by us.
_CREATED = 0


class Models:
    """Lists the models of a service: those for which a provider is configured.

    A frozen one has no providers, and whatever model it knows may be in its cache. Where other
    calls are passed to a provider, its models follow.
    """

    def __init__(self, service: EmbeddingService, passthrough: Passthrough | None = None) -> None:
        self._service = service
        self._passthrough = passthrough

    async def list(self, request: web.Request) -> web.Response:
        """Answer with all usable models, by name."""
        models = sorted(self._service.models.items())
        usable = [model for _, model in models if self._may_be_asked(model) and _is_listed(model)]
        data = [_model_object(model) for model in usable]
        if self._passthrough is not None:
            names = {model.name for model in usable}
            others = await self._passthrough.models(request)
            data += [other for other in others if other["id"] not in names]
        return _json({"object": "list", "data": data})

    async def get(self, request: web.Request) -> web.StreamResponse:
        """Answer with one model. Raises ModelUnknown."""
        name = request.match_info["id"]
        model = self._service.models.get(name)
        if model is None or not self._may_be_asked(model):
            if self._passthrough is not None:
                return await self._passthrough.handle(request)
            raise ModelUnknown(name)
        return _json(_model_object(model))

    def _may_be_asked(self, model: Model) -> bool:
        return model.usable or self._service.settings.cache.mode == "frozen"


def _is_listed(model: Model) -> bool:
    """Tell whether a model may be listed: not one that a client has named with its own key."""
    return not (model.by_name and model.client_key_policy)


def _model_object(model: Model) -> dict[str, object]:
    owner = model.space.name.partition("/")[0]
    return {"id": model.name, "object": "model", "created": _CREATED, "owned_by": owner}


def _json(content: object) -> web.Response:
    return web.Response(body=orjson.dumps(content), content_type="application/json")
