"""What the codes and sentences in upstreams' errors mean. Tables only; `error_reply` reads them."""

import re

from embedding_proxy.providers.errors import (
    AuthenticationError,
    ModelNotFound,
    ProviderError,
    QuotaExceeded,
    RateLimited,
    ScopedQuotaExceeded,
)

# Codes are compared in lower case and without punctuation.
CODE_WORDS: dict[type[ProviderError], re.Pattern[str]] = {
    QuotaExceeded: re.compile(
        r"arrear|overdue|billing|payment|insufficient\w*(?:quota|balance|credit|fund)"
        r"|outofcredit|nocredit|creditbalance|balancenotenough|exceededcurrentquota|freetieronly"
        r"|budgetexceeded"
    ),
    AuthenticationError: re.compile(
        r"(?:invalid|incorrect|expired|missing)apikey|apikey(?:invalid|incorrect|expired|notfound"
        r"|missing|revoked|disabled|serviceblocked)|^keyinvalid|^keyexpired|^unauthenticated"
        r"|authenticationerror|invalidauthentication|authenticationfailed|accountdeactivated"
        r"|consumersuspended|consumerinvalid|^servicedisabled|^accessnotconfigured"
        r"|^unsupportedcountry"
    ),
    ModelNotFound: re.compile(
        r"model(?:id|name)?(?:is|does)?"
        r"(?:not(?:found|exist|allowed|available|open|supported|permitted)"
        r"|(?:access|permission)(?:denied|error)|forbidden|restricted|disabled)"
        r"|(?:unsupported|unknown|invalid)model(?:id|name|error)?$|noaccesstomodel|nosuchmodel"
    ),
    RateLimited: re.compile(r"ratelimit|throttl|toomanyrequests"),
}
"""What a code means, most decisive first."""
SCOPED_QUOTA_WORDS = re.compile(r"freetieronly|^(?:model|enduser)budget")
"""Codes for a quota that is one model's or one end user's, not the account's."""
BUDGET_WORDS = re.compile(r"budgetexceeded")
"""LiteLLM's code for every budget: only its sentence tells whose it is."""
MODERATION_WORDS = re.compile(
    r"contentpolicy|contentfilter|contentviolation|moderation|flagged|datainspection"
    r"|responsibleai|prohibitedcontent|promptblocked|unsafe|^safety"
)

SENTENCES: tuple[tuple[str, type[ProviderError], str], ...] = (
    ("azure", ModelNotFound, "The embeddings operation does not work with the specified model"),
    (
        "dashscope",
        QuotaExceeded,
        "Access denied, please make sure your account is in good standing",
    ),
    ("dashscope", QuotaExceeded, "Access denied due to overdue account"),
    ("dashscope", ModelNotFound, "Model access denied"),
    ("dashscope", ModelNotFound, "Access to model denied"),
    ("deepinfra", AuthenticationError, "Not authenticated"),
    ("deepseek", QuotaExceeded, "Insufficient balance"),
    ("gemini", QuotaExceeded, "Your prepayment credits are depleted"),
    ("gemini", AuthenticationError, "API key not valid"),
    ("gemini", AuthenticationError, "API key not found"),
    ("gemini", AuthenticationError, "API key expired"),
    ("gemini", AuthenticationError, "User location is not supported for the API use"),
    ("gemini", AuthenticationError, "Method doesn't allow unregistered callers"),
    ("gemini", AuthenticationError, "Your API key was reported as leaked"),
    ("gpustack", ModelNotFound, "Model not found"),
    ("infinity", ModelNotFound, "Invalid model"),
    ("jina", AuthenticationError, "Invalid API key"),
    ("litellm", QuotaExceeded, "Budget has been exceeded"),
    ("litellm", ScopedQuotaExceeded, "Budget has been exceeded! Tag={name} Current cost"),
    ("litellm", ModelNotFound, "key not allowed to access model"),
    ("litellm", ModelNotFound, "Authentication Error, API Key not allowed to access model"),
    ("litellm", ModelNotFound, "Invalid model name passed in model={name}"),
    ("lm_studio", ModelNotFound, "No models loaded"),
    (
        "openai",
        QuotaExceeded,
        "Your account is not active, please check your billing details on our website",
    ),
    ("openai", AuthenticationError, "Incorrect API key provided"),
    ("openai", ModelNotFound, "You are not allowed to generate embeddings from this model"),
    ("openrouter", QuotaExceeded, "Key limit exceeded"),
    ("openrouter", ScopedQuotaExceeded, "This request requires more credits"),
    ("openrouter", ScopedQuotaExceeded, "More credits are required to run this request"),
    ("openrouter", ScopedQuotaExceeded, "Prompt tokens limit exceeded"),
    ("openrouter", ModelNotFound, "This model is not available in your region"),
    ("openrouter", ModelNotFound, "{name} is not a valid model ID"),
    ("siliconflow", QuotaExceeded, "Your account balance is insufficient"),
    ("siliconflow", QuotaExceeded, "Sorry, your account balance is insufficient"),
    ("siliconflow", QuotaExceeded, "The selected model requires paid balance"),
    ("siliconflow", ScopedQuotaExceeded, "The selected model requires paid balance"),
    ("siliconflow", ModelNotFound, "Model does not exist"),
    ("voyage", ModelNotFound, "Model {name} is not supported. Supported models are"),
    ("zhipu", QuotaExceeded, "Insufficient balance or no resource package"),
    ("zhipu", QuotaExceeded, "余额不足或无可用资源包"),
)
"""Who begins a message so, what it means, and the sentence; `{name}` stands for the model's name.

Each is from a public report or from the provider's documentation. It counts whoever sends it, since
gateways repeat what their providers say.
"""
_NAME = r"""["'`]?[^\s"'`,;]{1,200}["'`]?"""
_WRAPPER = r"(?:\[RID: \w{1,40}\] |/embeddings: |litellm\.\w{1,40}: (?:\w{1,40} - )?)?"
"""What Jina and LiteLLM put before a provider's sentence."""


def _sentences_of(error: type[ProviderError]) -> re.Pattern[str]:
    """Return what matches a reason that is one of the sentences with this meaning, or begins so."""
    texts = (re.escape(text) for _, meaning, text in SENTENCES if meaning is error)
    named = "|".join(text.replace(re.escape("{name}"), _NAME) for text in texts)
    return re.compile(rf"\A{_WRAPPER}(?:{named})(?:$|[.,:;!?]| ?[(\[])", re.IGNORECASE)


SENTENCES_OF = {error: _sentences_of(error) for error in {error for _, error, _ in SENTENCES}}
