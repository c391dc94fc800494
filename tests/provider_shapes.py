"""What each ready kind of provider answers: replies and refusals in the provider's own shape.

Data only; `test_provider_shapes` plays it. The refusals lie beside this file, in
`provider_shapes.yaml`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

KEY = "sk-shapes-0123456789abcdef"
"""The key that the proxy sends; some providers repeat it when they refuse it."""


class Outcome(Enum):
    """What a refusal means for the client and for the provider."""

    KEY_REFUSED = "key_refused"
    OUT_OF_CREDIT = "out_of_credit"
    QUOTA_EXCEEDED = "quota_exceeded"
    """Credit is missing for this model or this call, and not for the account."""
    DENIED = "denied"
    """The model or the input is denied, and it is not said which."""
    RATE_LIMITED = "rate_limited"
    MODEL_NOT_FOUND = "model_not_found"
    INPUT_REFUSED = "input_refused"
    """One input is bad; no provider is asked for it again."""
    INPUT_FAILS = "input_fails"
    """One input makes the provider fail, each time; another provider may embed it."""
    BATCH_TOO_LARGE = "batch_too_large"
    UPSTREAM_FAULT = "upstream_fault"


@dataclass(frozen=True)
class Refusal:
    """A refusal, as its provider sends it, and what is to be made of it."""

    kind: str
    name: str
    outcome: Outcome
    status: int
    body: object
    """A JSON value, or the body itself where it is text."""
    reason: str
    """Words of the body that tell a reader what is wrong."""
    code: str | None = None
    """The provider's own word for it, which the client may get as `code`."""
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    wait: float | None = None
    """Seconds after which the provider says to come back; None where it does not say."""
    max_inputs: int | None = None
    """Inputs in the largest call that is not refused so."""
    answer: int | None = None
    """Status of the client's answer, where it does not follow from the status of the refusal."""

    @property
    def id(self) -> str:
        """The name of the shape among all."""
        return f"{self.kind}-{self.name}"


@dataclass(frozen=True)
class Reply:
    """A reply with vectors, as its provider sends it: what it has besides the vectors."""

    top: Mapping[str, object] = field(default_factory=dict)
    """Fields of the reply itself; those that are None are left out."""
    usage: Callable[[int], object] = lambda n: {"prompt_tokens": n, "total_tokens": n}
    """The usage of a call of so many tokens; None leaves it out."""
    index: Callable[[int], Mapping[str, object]] = lambda i: {"index": i}
    """The fields that tell which input a vector is of."""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    start: bytes = b""
    """What stands before the JSON."""

    def body(self, model: str, embeddings: Sequence[object], tokens: int) -> dict[str, Any]:
        """Return the JSON value."""
        data = [
            {"object": "embedding", **self.index(i), "embedding": embedding}
            for i, embedding in enumerate(embeddings)
        ]
        whole = {"object": "list", "data": data, "model": model, "usage": self.usage(tokens)}
        return {name: v for name, v in {**whole, **self.top}.items() if v is not None}


_OPENAI_LIMITS = {
    "x-ratelimit-limit-requests": "3000",
    "x-ratelimit-limit-tokens": "1000000",
    "x-ratelimit-remaining-requests": "2999",
    "x-ratelimit-remaining-tokens": "999990",
    "x-ratelimit-reset-requests": "20ms",
    "x-ratelimit-reset-tokens": "0s",
}

REPLIES: dict[str, Reply] = {
    "openai": Reply(headers={**_OPENAI_LIMITS, "openai-model": "text-embedding-3-small"}),
    "openrouter": Reply(
        {"id": "gen-emb-1764440000-Abc", "provider": "OpenAI"},
        lambda n: {"prompt_tokens": n, "total_tokens": n, "cost": 2e-8 * n},
    ),
    "azure": Reply(
        headers={"apim-request-id": "6c1", "x-ratelimit-remaining-requests": "179"},
    ),
    "mistral": Reply(
        {"id": "b6f3d0f2c0b14b6c"},
        lambda n: {
            "prompt_tokens": n,
            "total_tokens": n,
            "completion_tokens": 0,
            "prompt_audio_seconds": None,
        },
    ),
    "voyage": Reply(usage=lambda n: {"total_tokens": n}),
    "jina": Reply(usage=lambda n: {"total_tokens": n, "prompt_tokens": n}),
    "cohere": Reply({"id": "0f8fad5b-d9cb-469f-a165-70867728950e"}),
    # Reports (2026): the index is left out where it is 0, as protobuf's JSON leaves out zeros.
    "gemini": Reply(usage=lambda _: None, index=lambda i: {"index": i} if i else {}),
    "together": Reply({"request_id": "nxM8-4pPPqN"}, lambda _: None),
    "deepinfra": Reply(),
    "dashscope": Reply({"id": "73591b79-d194-9bca-8bb5-xxxxxxxxxxxx"}),
    "ollama": Reply(),
    "vllm": Reply(
        {"id": "embd-2f6e", "created": 1764440000},
        lambda n: {
            "prompt_tokens": n,
            "total_tokens": n,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
    ),
    "tei": Reply(headers={"x-compute-type": "gpu", "x-compute-tokens": "9", "x-total-time": "11"}),
    "infinity": Reply({"id": "infinity-95e2", "created": 1764440000}),
    "lm_studio": Reply(usage=lambda _: {"prompt_tokens": 0, "total_tokens": 0}),
    "llama_cpp": Reply({"model": "/models/bge-m3-q8_0.gguf"}),
    # Gateways that are known for one oddity each (reports).
    "openai_compatible": Reply(),
    "openai_compatible-status-201": Reply(status=201),
    "openai_compatible-index-null": Reply(index=lambda _: {"index": None}),
    "openai_compatible-index-missing": Reply(index=lambda _: {}),
    "openai_compatible-index-string": Reply(index=lambda i: {"index": str(i)}),
    "openai_compatible-byte-order-mark": Reply(start=b"\xef\xbb\xbf"),
    "openai_compatible-usage-null": Reply({"usage": None}),
    # The limit is whole again at a point in time, which is past.
    "openai_compatible-reset-epoch": Reply(
        headers={
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": "1700000000",
        },
    ),
    "openai_compatible-reset-epoch-ms": Reply(
        headers={
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": "1700000000000",
        },
    ),
}
"""By kind, or by kind and what is odd about the reply."""


def _read() -> list[Refusal]:
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8").replace("$KEY", KEY)
    return [
        Refusal(kind, name, Outcome(fields.pop("outcome")), **fields)
        for kind, shapes in yaml.safe_load(text).items()
        for name, fields in shapes.items()
    ]


REFUSALS: tuple[Refusal, ...] = tuple(_read())
