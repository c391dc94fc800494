"""Real providers, asked for two short texts each: only with EMBEDDING_PROXY_REAL=1 and their keys.

It costs some twenty tokens a call. Keys are read here, before the suite hides them from its tests.
"""

import math
import os
from collections.abc import Sequence
from itertools import combinations

import pytest
from aiohttp import web
from embedding_proxy.providers import registry, similarity
from embedding_proxy.providers.base import Vector
from embedding_proxy.providers.model_catalog import CATALOGUE
from embedding_proxy.providers.route_check import SAME
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service.embedding_service import EmbeddingService

TEXTS = ["The canteen serves lunch until two.", "Two keepers together open the vault."]
VARIABLES = {
    kind: each.profile.api_key_env
    for kind, each in registry.KINDS.items()
    if each.profile.base_url and each.profile.api_key_env
}
KEYS = {kind: os.environ.get(variable, "").strip() for kind, variable in VARIABLES.items()}
WANTED = os.environ.get("EMBEDDING_PROXY_REAL") == "1"
ASKED = {
    kind: next(name for name, entry in CATALOGUE.items() if kind in dict(entry.routes))
    for kind, key in KEYS.items()
    if key and WANTED
}
SHARED = [
    name
    for name, entry in CATALOGUE.items()
    if "/" not in name and len({*dict(entry.routes)} & {*ASKED}) > 1
]


async def _vectors(kind: str, model: str, base_url: str | None = None) -> Sequence[Vector]:
    """Return what one provider answers for the texts, past the cache."""
    upstream = dict(CATALOGUE[model].routes)[kind]
    settings = Settings.model_validate(
        {
            "cache": {"mode": "off"},
            "providers": {kind: {"base_url": base_url} if base_url else {}},
            "models": {model: {"routes": [{"provider": kind, "model": upstream}]}},
            "passthrough": None,
        }
    )
    async with EmbeddingService(settings) as service:
        result = await service.embed(TEXTS, model)
    assert list(result.embedded.providers) == [kind]
    return result.embedded.vectors


def _least_cosine(answers: Sequence[Sequence[Vector]]) -> float:
    """Return how alike the two least alike answers are."""
    return min(similarity.cosines(one, other)[0] for one, other in combinations(answers, 2))


@pytest.mark.skipif(not ASKED, reason="needs EMBEDDING_PROXY_REAL=1 and the key of a provider")
@pytest.mark.parametrize("kind", ASKED or ["none"])
async def test_a_real_provider_embeds(kind, monkeypatch):
    """Its answer passes every check, has the catalogue's width, and tells the texts apart."""
    monkeypatch.setenv(VARIABLES[kind], KEYS[kind])
    one, other = await _vectors(kind, ASKED[kind])
    assert len(one) == len(other) == 4 * CATALOGUE[ASKED[kind]].dimensions
    assert similarity.cosines([one], [other])[0] < SAME


@pytest.mark.skipif(not SHARED, reason="needs EMBEDDING_PROXY_REAL=1 and keys of two providers")
@pytest.mark.parametrize("model", SHARED or ["none"])
async def test_real_providers_of_one_space_agree(model, monkeypatch):
    """Whoever is asked for a model, the vectors are the same."""
    there = [kind for kind in dict(CATALOGUE[model].routes) if kind in ASKED]
    for kind in there:
        monkeypatch.setenv(VARIABLES[kind], KEYS[kind])
    assert _least_cosine([await _vectors(kind, model) for kind in there]) >= SAME


async def test_this_comparison_tells_models_apart(upstream, second, monkeypatch):
    """Played by two servers of ours: one model agrees with itself, and not with another."""
    for kind in ("openai", "openrouter"):
        monkeypatch.setenv(VARIABLES[kind], "made-up")

    async def another(_: web.Request, payload: dict[str, object]) -> web.Response:
        return web.json_response(second.reply({**payload, "model": "another"}))

    urls = {"openai": upstream.url, "openrouter": second.url}
    answers = [await _vectors(kind, "text-embedding-3-small", url) for kind, url in urls.items()]
    assert math.isclose(_least_cosine(answers), 1)
    second.always = another
    answers[1] = await _vectors("openrouter", "text-embedding-3-small", second.url)
    assert _least_cosine(answers) < SAME
