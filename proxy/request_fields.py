"""What each field of an embeddings request does to the vector: one table, with reasons.

`http.openai_format` reads `model`, `input`, `dimensions`, `encoding_format`, `user` and `index`.
Every other field is placed here, in one of three groups:

- key: it may change the numbers. It is sent to the provider and is part of the embedding space, so
  that two values never share a cache entry. A field that no table names belongs to this group: a
  vector bought twice costs a fraction of a cent, a wrong vector costs a search index.
- neutral: it changes no number. It is dropped, or sent to the providers that declare it
  (`neutral_fields`), and it is never part of the space.
- refused: it asks for something that the proxy does not do, or must not do for a client.

A new field must be placed in one of the groups. Sources: the API references of OpenAI, OpenRouter,
Voyage, Cohere, Jina, Mistral, Nomic, Google, Amazon Bedrock and NVIDIA; the request schemas of
vLLM; LiteLLM's list of the arguments that it keeps to itself (autumn 2026).

`SpaceWatch` warns of a field that makes a new embedding space of nearly every request. A field that
changes no number, but that the proxy does not know as such, belongs to the space. When its value
differs from request to request (an id, a time), no text is ever a cache hit, and each is bought
again without a word. So the distinct parameter sets of a model are counted over a short time, and
too many are warned of once. Only digests of values are kept, and only names are logged.
"""

import enum
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import orjson
from embedding_proxy.providers.errors import InvalidRequest
from embedding_proxy.providers.lru_cache import LRUCache

log = logging.getLogger("embedding_proxy.spaces")

OWN_FIELDS = ("model", "input", "dimensions", "encoding_format", "user", "index")
"""Fields that `http.openai_format` reads itself."""
MAX_SETS = 20
"""Distinct parameter sets of one model within `WINDOW_S` that are nothing unusual."""
WINDOW_S = 600.0
MAX_FIELDS = 100
"""Fields of one request that are looked at."""
MAX_NAME = 100
"""Characters of a field's name that are kept."""
_MAX_MODELS = 256
"""Watched at a time; the one that was asked for longest ago is forgotten first."""


class Group(enum.Enum):
    """What the proxy does with a field."""

    KEY = "key"
    NEUTRAL = "neutral"
    REFUSED = "refused"


class Rule(NamedTuple):
    """Where a field is placed, and why."""

    group: Group
    reason: str
    """For people who read this table; for a refused field, the error message. `{name}` stands for
    the name as the client spelled it."""
    defaults: tuple[object, ...] = ()
    """Values of a refused field that ask for what the client gets anyway; they are dropped."""


class Fields(NamedTuple):
    """The further fields of one request."""

    parameters: Mapping[str, object]
    """Part of the embedding space."""
    neutral: Mapping[str, object]
    """Not part of it."""


NO_FIELDS = Fields({}, {})


def _rows(rule: Rule, names: str) -> dict[str, Rule]:
    return {_normalize(name): rule for name in names.split()}


def _normalize(name: str) -> str:
    """Return a name without the differences of spelling: `outputDtype`, `OUTPUT-DTYPE`."""
    return "".join(character for character in name.lower() if character not in "_- .")


def _key(reason: str) -> Rule:
    return Rule(Group.KEY, reason)


def _neutral(reason: str) -> Rule:
    return Rule(Group.NEUTRAL, reason)


def _refused(message: str, defaults: tuple[str | bool, ...] = ()) -> Rule:
    return Rule(Group.REFUSED, message, defaults)


_ELEMENT_TYPE = _refused(
    "`{name}` is not supported: the proxy answers with float32 numbers only. Leave `{name}` out;"
    " for the form of the numbers use `encoding_format`: `float` or `base64`.",
    ("float", "float32", "fp32"),
)
_BYTE_ORDER = _refused(
    "`{name}` is not supported: base64 is little-endian float32, as at OpenAI. Leave it out.",
    ("little",),
)
_WIDTH = _refused("`{name}` is not supported: ask for the width of a vector by `dimensions`.")
_SPELLING = _refused("Unknown field `{name}`; names are case-sensitive. Use `{own}`.")
_CONNECTION = _refused(
    "`{name}` may name a host, an account or a secret: a request must not say that. Providers are"
    " set in the configuration of the proxy; headers are not part of the body."
)
_OTHER_INPUT = _refused(
    "`{name}` is not supported: only text and token ids are taken, and only in `input`."
)
_STREAM = _refused("`{name}` is not supported: an embeddings reply is not streamed.", (False,))
RULES: dict[str, Rule] = {
    # Known to change the numbers. They are listed so that nobody moves them by mistake.
    **_rows(
        _key("the model embeds queries and documents, or several tasks, differently"),
        "input_type task task_type prompt prompt_name instruction query_prefix",
    ),
    **_rows(
        _key("it decides how much of a long text is read"),
        "truncate truncation truncation_side truncate_prompt_tokens max_tokens long_text_mode"
        " max_tokens_per_text truncation_direction",
    ),
    **_rows(
        _key("it decides the length of a vector, or which numbers it has"),
        "normalize normalized normalise normalised use_activation pooling late_chunking",
    ),
    **_rows(
        _key("it decides which server, and so which precision, computes"),
        "provider models route",
    ),
    **_rows(
        _key("it may mask parts of the text, or put text around it, before it is embedded"),
        "guardrails prompt_id prompt_variables prompt_version add_special_tokens",
    ),
    # Change no number.
    **_rows(
        _neutral("labels a request in logs, traces and bills"),
        "metadata tags request_id client_request_id correlation_id idempotency_key trace_id"
        " trace_name traceparent tracestate span_id parent_span_id session_id session_name"
        " generation_id generation_name id user_id end_user end_user_id customer_identifier"
        " safety_identifier verbose no-log model_info cost_per_query base_model",
    ),
    **_rows(
        _neutral("how long, how often and how urgently to try; the proxy has its own limits"),
        "timeout request_timeout stream_timeout force_timeout num_retries max_retries"
        " retry_policy retry_strategy cooldown_time priority service_tier rpm tpm"
        " max_parallel_requests max_budget budget_duration routing_strategy fastest_response"
        " enable_tag_filtering keepalive_seconds",
    ),
    **_rows(
        _neutral("another model would answer from another space; the proxy has `fallback`"),
        "fallbacks default_fallbacks context_window_fallbacks context_window_fallback_dict"
        " content_policy_fallbacks max_fallbacks disable_fallbacks",
    ),
    **_rows(
        _neutral("another cache's control; here the header `Cache-Control` is read"),
        "cache caching caching_groups cache_key cache_salt ttl s-maxage s-max-age no-cache no-store"
        " preset_cache_key enable_prompt_caching prompt_cache_key prompt_cache_retention store",
    ),
    **_rows(
        _neutral("a gateway's own treatment of the fields of a request"),
        "drop_params additional_drop_params allowed_openai_params use_in_pass_through"
        " use_litellm_proxy",
    ),
    **_rows(
        _neutral("a made-up answer must never be cached, so it is never asked for"),
        "mock_response mock_timeout mock_testing_fallbacks mock_testing_rate_limit_error",
    ),
    # Refused.
    **_rows(
        _ELEMENT_TYPE,
        "output_dtype output_data_type output_type dtype data_type embed_dtype embedding_dtype"
        " embedding_type embedding_types embeddings_types embedding_data_type embedding_format"
        " output_format precision quantization quantize quantized",
    ),
    **_rows(_BYTE_ORDER, "endianness endian byte_order"),
    **_rows(
        _WIDTH,
        "dimension dims dim ndims dimensionality output_dimension output_dimensions output_dim"
        " output_dimensionality embedding_dimension embedding_dimensions embedding_dim"
        " embedding_size output_embedding_length vector_size vector_dimension truncate_dim"
        " truncate_dimension matryoshka_dim matryoshka_dimension",
    ),
    **_rows(_SPELLING, " ".join(OWN_FIELDS)),
    **_rows(_OTHER_INPUT, "messages inputs text texts images image documents chat_template"),
    **_rows(_STREAM, "stream stream_options"),
    **_rows(
        _CONNECTION,
        "api_key key token auth authorization password secret credentials api_base base_url"
        " api_version api_type api_host host hostname endpoint url uri proxy proxies webhook"
        " callback_url custom_llm_provider extra_headers extra_body extra_query headers"
        " default_headers provider_specific_header organization organisation org_id openai_project"
        " region_name tenant_id client_id client deployment_id model_list ssl_verify verify_ssl"
        " shared_session proxy_server_request secret_fields configurable_clientside_auth_params"
        " litellm_credential_name litellm_params litellm_system_prompt user_config",
    ),
}
"""The rule of each field, by its normalized name."""
ENDINGS: Sequence[tuple[tuple[str, ...], Rule]] = (
    (
        (
            *("apikey", "apikeys", "apibase", "baseurl", "endpointurl", "apihost", "secret"),
            *("accesskey", "accesskeyid", "secretkey", "privatekey", "secretaccesskey"),
            *("accesstoken", "authtoken", "sessiontoken", "bearertoken", "webidentity"),
            *("password", "credential", "credentials", "authorization", "tokenprovider"),
        ),
        _CONNECTION,
    ),
)
"""Rules by the end of a normalized name."""
BEGINNINGS: Sequence[tuple[tuple[str, ...], Rule]] = (
    (("aws", "vertex", "azure", "s3", "bedrock", "watsonx", "gcs", "oci"), _CONNECTION),
    (("litellm", "langfuse", "langsmith", "helicone"), _neutral("a gateway's own bookkeeping")),
)
"""Rules by the beginning of a normalized name."""
_UNKNOWN = _key("nothing is known of it")


def rule_of(name: str) -> Rule:
    """Return where a further field is placed, whatever the case of its name.

    >>> rule_of("outputDtype").group, rule_of("drop_params").group, rule_of("any_other").group
    (<Group.REFUSED: 'refused'>, <Group.NEUTRAL: 'neutral'>, <Group.KEY: 'key'>)
    """
    plain = _normalize(name)
    known_rule = RULES.get(plain)
    if known_rule is not None:
        return known_rule
    for endings, rule in ENDINGS:
        if plain.endswith(endings):
            return rule
    for beginnings, rule in BEGINNINGS:
        if plain.startswith(beginnings):
            return rule
    return _UNKNOWN


def is_neutral(name: str) -> bool:
    """Tell whether a further field changes no number at any provider."""
    return rule_of(name).group is Group.NEUTRAL


def classify(fields: Mapping[str, object]) -> Fields:
    """Divide the further fields of a request. None of them is null.

    Raises InvalidRequest, status 400, that names the first field that is refused.
    """
    if not fields:
        return NO_FIELDS
    parameters: dict[str, object] = {}
    neutral: dict[str, object] = {}
    for name, value in fields.items():
        rule = rule_of(name)
        if rule.group is Group.KEY:
            parameters[name] = value
        elif rule.group is Group.NEUTRAL:
            neutral[name] = value
        elif not _is_default(rule, value):
            raise _refusal(rule, name)
    return Fields(parameters, neutral)


def neutral_field_problem(names: Iterable[str]) -> str | None:
    """Return why fields cannot be declared as `neutral_fields`; None if they can."""
    for name in names:
        if name in OWN_FIELDS:
            return f"{name} is a field of every request; it is sent in any case"
        if rule_of(name).group is Group.REFUSED:
            return f"{name} is refused in every request, so it is never sent"
    return None


def canonical_fields(fields: Mapping[str, object]) -> tuple[tuple[str, bytes], ...]:
    """Return fields as (name, JSON), sorted. Raises InvalidRequest for what is nested too deep."""
    try:
        return tuple(sorted((name, orjson.dumps(value)) for name, value in fields.items()))
    except orjson.JSONEncodeError as error:
        raise InvalidRequest(f"A field of the request cannot be sent on: {error}.") from error


def _is_default(rule: Rule, value: object) -> bool:
    """Tell whether a value, or each of a list of them, asks for what the client gets anyway."""
    several = value if isinstance(value, list) else [value]
    plain = [item.lower() if isinstance(item, str) else item for item in several]
    # 0 equals False to Python, not to JSON.
    return bool(plain) and all(
        any(type(item) is type(default) and item == default for default in rule.defaults)
        for item in plain
    )


def _refusal(rule: Rule, name: str) -> InvalidRequest:
    own = next(
        (field_name for field_name in OWN_FIELDS if _normalize(field_name) == _normalize(name)), ""
    )
    return InvalidRequest(rule.reason.format(name=name[:100], own=own), param=name[:100])


@dataclass(slots=True)
class _ParameterSets:
    """The parameter sets of one model."""

    sets: dict[bytes, tuple[float, dict[str, bytes]]] = field(default_factory=dict)
    """By digest: when it was last used, and the digest of each value. The newest is last."""
    is_told: bool = False


class SpaceWatch:
    """Counts distinct parameter sets by model. For one event loop.

    `clock` returns seconds; tests inject one that they move themselves.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._models = LRUCache[str, _ParameterSets](_MAX_MODELS)

    def note(self, model: str, parameters: Sequence[tuple[str, bytes]]) -> None:
        """Take note of one request's parameters, (name, canonical JSON); warn if they are many."""
        if not parameters:
            return
        watched = self._models.get_or_make(model, _ParameterSets)
        if watched.is_told:
            return
        now = self._clock()
        whole = _digest(b"".join(_digest(name.encode()) + _digest(one) for name, one in parameters))
        values = {name[:MAX_NAME]: _digest(value) for name, value in parameters[:MAX_FIELDS]}
        watched.sets[whole] = now, values
        watched.sets = {key: one for key, one in watched.sets.items() if one[0] >= now - WINDOW_S}
        if len(watched.sets) > MAX_SETS:
            watched.is_told = True
            self._warn(model, [one for _, one in watched.sets.values()])
            watched.sets.clear()

    @staticmethod
    def _warn(model: str, sets: Sequence[dict[str, bytes]]) -> None:
        names = sorted({name for values in sets for name in values})
        distinct = {name: len({values.get(name) for values in sets}) for name in names}
        field = max(names, key=lambda name: distinct[name])
        log.warning(
            "model %s: more than %d distinct sets of request fields within %d minutes; most differ"
            " in the field %r, so the same text is bought for each of its values. If it changes no"
            " vector, list it in providers.NAME.neutral_fields, or do not send it",
            model,
            MAX_SETS,
            WINDOW_S // 60,
            field,
        )


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
