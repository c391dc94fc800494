"""The errors of embedding: one tree, whoever raises them.

It knows no provider, no cache and no wire format::

    EmbeddingError
    ├── InvalidRequest         the request itself is wrong; no provider would take it
    ├── ClientKeyRefused     the client's own key is not accepted, or there is none
    ├── NoRoute              no provider is configured that could answer
    ├── DeadlineExceeded     the request's own time is up
    ├── OutOfDescriptors     this process can open no further connection
    ├── NoProviderAvailable  no provider may be asked now: each has failed or is in cooldown
    └── ProviderError        one provider failed; another may do better
        ├── AuthenticationError   401, or a code that speaks of the key: it is not accepted
        ├── PermissionDenied     403 without a reason: it concerns this model or this input
        ├── QuotaExceeded          402, or a code that speaks of billing: waiting will not help
        │   └── ScopedQuotaExceeded  the quota of one model, one end user, or for so large a call
        ├── ModelNotFound        404, 403 about a model: this provider does not serve it
        ├── LoopDetected         508: the provider's address leads back to this proxy
        └── TransientError       the same call may succeed in a moment
            ├── RateLimited      429
            │   └── LocalQueueFull  the proxy's own queue; no call was made
            ├── UpstreamError    408, 409, 5xx
            ├── UpstreamTimeout  no whole answer within the limit of one attempt
            │   └── ConnectionTimeout  no connection within its limit
            ├── Unreachable      name resolution, connection, TLS or a lost connection
            ├── MalformedResponse       an answer that is no JSON: a gateway's page, or cut off
            └── InvalidAnswer    an answer that fails a check, whole or in single vectors
"""

from dataclasses import dataclass, field
from typing import ClassVar, Self

from .charge import Charge


class EmbeddingError(Exception):
    """Base of all that can go wrong. The message is for people and holds no key and no input."""

    reason: ClassVar[str] = "other"
    """The word for it in metrics and in /status. Each class that is raised has its own, which stays
    when the class gets another name: dashboards and alerts are made of it."""
    index: int | None = None
    """The place of the one input to blame, in the call that raises; None if it is not known."""
    param: str | None = None
    """OpenAI's error field: which field of the request is to blame."""

    def with_index(self, index: int | None, message: str | None = None) -> Self:
        """Return the same error as it reads in another call, where the input has that place."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, index=index)
        other.args = self.args if message is None else (message,)
        return other


class InvalidRequest(EmbeddingError):
    """The request itself is wrong: a provider said so, or no provider can take such an input.

    `param`, `code` and `kind` are OpenAI's error fields; `status` is 400, 403 (moderation), 413 or
    422.
    """

    reason = "invalid_request"

    def __init__(  # noqa: PLR0913 - the fields of OpenAI's error object
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        index: int | None = None,
    ) -> None:
        super().__init__(message)
        self.index = index
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code


class ClientKeyRefused(EmbeddingError):
    """The client's own key is not accepted by the provider that it is for, or none was sent.

    It says nothing of the provider, and ends the matter: nobody else pays for a refused key.
    `status`, `kind` and `code` are for the client, as in `InvalidRequest`.
    """

    reason = "client_key_refused"

    def __init__(
        self,
        message: str,
        *,
        status: int = 401,
        kind: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind or "invalid_request_error"
        self.code = code or "invalid_api_key"


class NoRoute(EmbeddingError):
    """No provider is configured that could answer; the message says what to set."""

    reason = "no_route"


class DeadlineExceeded(EmbeddingError):
    """The time of the request was up before an answer came."""

    reason = "deadline_exceeded"


class OutOfDescriptors(EmbeddingError):
    """This process can open no further connection: it says nothing about any provider."""

    reason = "out_of_descriptors"

    def __init__(self) -> None:
        super().__init__(
            "The proxy is overloaded: it has no file descriptor left for a connection. Raise its"
            " limit on open files (ulimit -n)."
        )


class NoProviderAvailable(EmbeddingError):
    """No provider may be asked just now; the next one may in `retry_after` seconds."""

    reason = "no_provider_available"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Refusal:
    """What an upstream said when it refused, as far as it may be shown to a client."""

    status: int
    """The status a client is told: 401 or 402 where a 400 is about the key or the credit."""
    message: str
    kind: str | None = None
    code: str | None = None
    retry_after: float | None = field(default=None)
    """Seconds the upstream asked to wait."""


class ProviderError(EmbeddingError):
    """One provider failed; the next route may do better."""

    def __init__(self, provider: str, message: str, refusal: Refusal | None = None) -> None:
        super().__init__(f"{provider}: {message}")
        self.provider = provider
        self.refusal = refusal
        self.unexplained: tuple[tuple[str, str], ...] = ()
        """Providers and lanes, once for each call of several inputs that failed so, where one input
        may be the cause; it was not counted against them."""
        self.charge: Charge | None = None
        """What the upstream says it charged for an answer that is no good; None for nothing."""
        self.indices: tuple[int, ...] = ()
        """The places, in the call that raises, of the inputs that are worth another call, each
        alone: see `InvalidAnswer`. Empty if the failure is no single input's."""

    @property
    def retry_after(self) -> float | None:
        """Seconds the provider asked to wait, or None."""
        return self.refusal.retry_after if self.refusal else None


class AuthenticationError(ProviderError):
    """The key that the proxy holds for this provider is not accepted, whatever is asked with it.

    401, or a 400 or 403 whose code or sentence says so (Google, DeepInfra).
    """

    reason = "authentication_error"


class PermissionDenied(ProviderError):
    """403 without a reason that is known: the model is not for this key, or the input is refused.

    Which of them is not known. Other models and other inputs may be answered, so it says nothing
    about the provider.
    """

    reason = "permission_denied"


class QuotaExceeded(ProviderError):
    """The account has no credit: asking again will not help.

    402, or any status with a code that speaks of billing (`insufficient_quota`, `Arrearage`).
    """

    reason = "quota_exceeded"


class ScopedQuotaExceeded(QuotaExceeded):
    """Credit is missing for this request, and not for the whole account.

    It is that of one model (DashScope's free tier), of one end user (`user`, LiteLLM), or too
    little for so large a call (OpenRouter). Other requests may be answered.
    """

    reason = "scoped_quota_exceeded"


class ModelNotFound(ProviderError):
    """This provider does not serve the model, or not to this key: 404, or a code that says so."""

    reason = "model_not_found"


class LoopDetected(ProviderError):
    """508: the provider's address leads back to this proxy. Asking again does not help."""

    reason = "loop_detected"


class TransientError(ProviderError):
    """The same call may succeed in a moment."""


class RateLimited(TransientError):
    """429: too many requests or tokens for now."""

    reason = "rate_limited"


class LocalQueueFull(RateLimited):
    """The proxy's own queue before this provider has no room in time: no call was made.

    A client sees no difference. Of the provider it says nothing.
    """

    reason = "local_queue_full"


class UpstreamError(TransientError):
    """408, 409, 5xx and everything else that is the upstream's own fault."""

    reason = "upstream_error"


class UpstreamTimeout(TransientError):
    """No whole answer within the limit of one attempt."""

    reason = "timeout"


class ConnectionTimeout(UpstreamTimeout):
    """No connection within its limit: no request reached the provider."""

    reason = "connection_timeout"


class Unreachable(TransientError):
    """Name resolution, connection or TLS failed, or the connection was lost."""

    reason = "unreachable"


class MalformedResponse(TransientError):
    """An answer with a status of success that is no JSON object: a gateway's page, or cut off."""

    reason = "malformed_response"


class InvalidAnswer(TransientError):
    """An answer with a status of success that fails a check.

    What of it may be used:

    - The whole answer is bad (wrong count, no permutation, every vector bad): `index` is None and
      `indices` is empty. Nothing of it is used.
    - Single vectors are bad: `index` is the place of the first, `indices` are the places of all.
      The others were told to `Context.on_part`, and are kept.
    - One vector came for all inputs of the call, which differ: `index` is None, and `indices` are
      all places. Nothing of it is used; the upstream may answer each input alone.
    """

    reason = "invalid_response"
