"""
The words by which servers say what went wrong: one row per known sign, in order, first match wins.

Fields are compared by equality and the message by a pattern anchored at its first character, never searched: a prompt
echoed in an error may contain any of these words and must not decide anything.  A gateway that quotes its provider's
error is judged by the quoted error first.  What no row knows is judged by its status alone, in `table`.  Patterns hold
no nested repetition, so they run in linear time over the at most 2 KiB that a message has.
"""

import re
from functools import cache

import msgspec

from worker.policy.model import ErrorClass
from worker.policy.normalise import Facts, Shape, quoted_facts


class Signal(msgspec.Struct, frozen=True, kw_only=True):
    """One sign; every condition that is given must hold."""

    error_class: ErrorClass
    source: str
    """Where the server says so."""
    statuses: frozenset[int] | None = None
    """HTTP statuses it may come with; an error that has no status (inside a stream) passes too.  `None`: any; empty:
    without a status only."""
    shape: Shape | None = None
    """The form of the body; for words so plain that only the form makes them a sign."""
    names: frozenset[str] = frozenset()
    """Lower case; one of them must equal the code, the type or the inner code."""
    params: frozenset[str] = frozenset()
    """One of them must equal the param."""
    message: str | None = None
    """A regular expression, compiled when it is first needed.  Must match from the first character of the message.
    Where it has the groups `requested` and `limit`, the first number must be the larger one."""

    def matches(self, facts: Facts, status: int | None) -> bool:
        """Say whether the facts show this sign under a status."""
        if self.statuses is not None and status is not None and status not in self.statuses:
            return False
        if self.shape is not None and self.shape is not facts.shape:
            return False
        if self.names and not self.names & {
            name.lower() for name in (facts.code, facts.type, facts.inner_code) if name is not None
        }:
            return False
        if self.params and facts.param not in self.params:
            return False
        if self.message is None:
            return True
        match = _compile(self.message).match(facts.message)
        return match is not None and ("limit" not in match.re.groupindex or _is_over_limit(match))


def _is_over_limit(match: re.Match[str]) -> bool:
    if match["limit"] is None:  # an alternative of the pattern that names no numbers
        return True
    return int(match["requested"].replace(",", "")) > int(match["limit"].replace(",", ""))


@cache
def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.ASCII | re.DOTALL)


def begins(*alternatives: str) -> str:
    """Return a pattern for the beginning of a message."""
    return "(?:" + "|".join(alternatives) + ")"


_CLIENT = frozenset({400, 403, 413, 422, 429})
"""Statuses of a refused request; 429 too, with which some servers refuse what no waiting can make smaller."""
_CLIENT_OR_500 = _CLIENT | {500}
"""For words of servers that report the request's own fault as theirs."""
_KEY_REFUSED = frozenset({400, 401, 403, 404, 412, 422, 424, 429, 500})
_VLLM = "https://github.com/vllm-project/vllm"
_SGLANG = "https://github.com/sgl-project/sglang"
_LITELLM = "https://docs.litellm.ai/docs/exception_mapping"
_LITELLM_ERRORS = "https://github.com/BerriAI/litellm/blob/main/litellm/proxy/_types.py"
_SAGEMAKER = "https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_runtime_InvokeEndpoint.html"
_AWS_ERRORS = "https://docs.aws.amazon.com/sagemaker/latest/APIReference/CommonErrors.html"
_OPENAI = "https://developers.openai.com/docs/guides/error-codes"
_KUBEAI = "https://github.com/substratusai/kubeai/blob/main"
_ENVOY = "https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_conn_man/response_code_details"


def _names(*names: str) -> frozenset[str]:
    """Return the set of words in one or several texts."""
    return frozenset(" ".join(names).split())


def _statuses(*statuses: int) -> frozenset[int]:
    return frozenset(statuses)


SIGNALS: tuple[Signal, ...] = (
    # -- what SageMaker itself says ------------------------------------------------------------------------------
    Signal(
        error_class=ErrorClass.MODEL_TIME_EXCEEDED,
        names=_names("modelinvocationtimeexceeded"),
        source="https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_runtime_ModelStreamError.html",
    ),
    Signal(
        error_class=ErrorClass.MODEL_TIME_EXCEEDED,
        message=begins(
            "Your invocation timed out while waiting",
            r'Received server error \(\d{1,3}\) from \S{1,64} with message "Your invocation timed out',
        ),
        source="https://docs.aws.amazon.com/sagemaker/latest/dg/neo-troubleshooting-inference.html",
    ),
    Signal(
        error_class=ErrorClass.STREAM_BROKEN,
        names=_names("streambroken", "internalstreamfailure"),
        source="https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_runtime_ModelStreamError.html",
    ),
    Signal(
        error_class=ErrorClass.NOT_READY,
        names=_names("modelnotreadyexception"),
        source=_SAGEMAKER,
    ),
    Signal(
        error_class=ErrorClass.RATE_LIMITED,
        statuses=_statuses(400, 429, 503),
        names=_names("requestlimitexceeded throttledexception throttling throttlingexception toomanyrequestsexception"),
        source=_AWS_ERRORS,
    ),
    Signal(
        error_class=ErrorClass.AUTH,
        statuses=_statuses(400, 403),
        names=_names(
            "accessdenied",
            "accessdeniedexception",
            "expiredtoken",
            "expiredtokenexception",
            "incompletesignature",
            "invalidclienttokenid",
            "invalidsignatureexception",
            "missingauthenticationtoken",
            "missingauthenticationtokenexception",
            "notauthorized",
            "optinrequired",
            "requestexpired",
            "requesttimetooskewed",
            "signaturedoesnotmatch",
            "unrecognizedclientexception",
        ),
        source=_AWS_ERRORS,
    ),
    Signal(
        error_class=ErrorClass.MODEL_NOT_FOUND,
        statuses=_statuses(400, 404),
        names=_names("validationerror", "validationexception"),
        message=begins(r"Endpoint \S{1,200} of account \S{1,64} not found"),
        source="https://github.com/aws/amazon-sagemaker-examples/issues/293",
    ),
    # -- the account: before the request's own fault, since a revoked key or an unpaid bill must not answer a queue ---
    Signal(
        error_class=ErrorClass.QUOTA,
        names=_names(
            "allocationquota.freetieronly arrearage billing_disabled billing_error billing_hard_limit_reached",
            "billing_not_active budget_exceeded consumer_suspended credit_balance_exhausted",
            "exceeded_current_quota_error",
            "insufficient_balance insufficient_credits insufficient_funds insufficient_quota insufficient_user_quota",
            "organization_restricted organization_spend_limit_exceeded organization_usage_limit_exceeded",
            "payment_required paymentrequired paymentrequirederror project_spend_limit_exceeded",
        ),
        source=_OPENAI,
    ),
    Signal(
        error_class=ErrorClass.QUOTA,
        message=begins(
            r"Your credit balance is too low",
            r"You have reached your specified (?:API )?(?:workspace )?usage limits",
            r"This organization has been disabled",
        ),
        source="https://docs.anthropic.com/en/api/errors",
    ),
    Signal(
        error_class=ErrorClass.QUOTA,
        message=begins(
            r"(?:Authentication Error,? ?-? ?)?"
            r"(?:Budget has been exceeded|Exceeded\w{0,32}Budget\b|Max budget limit reached)",
            r"(?:litellm\.)?BudgetExceededError\b",
        ),
        source="https://docs.litellm.ai/docs/proxy/users",
    ),
    Signal(
        error_class=ErrorClass.QUOTA,
        message=begins(
            r"Account \S{1,200} is suspended",
            r"Your account \S{0,200} ?(?:is|has been) suspended",
            r"(?:Your )?[Aa]ccount is not active, please check your billing",
            r"Insufficient (?:[Bb]alance|[Cc]redits|[Ff]unds)\b",
            r"(?:Billing hard limit has been reached|You have reached your (?:monthly )?spending limit)",
            r"Your (?:newly created )?team \S{1,200} "
            r"(?:has (?:either )?used all available credits|doesn't have any credits)",
            r"Access denied, please make sure your account is in good standing",
            r"This API method requires billing to be enabled",
            r"You exceeded your current quota, please check your plan and billing details\.(?=.{0,1500}\blimit: 0\b)",
        ),
        source="https://docs.fireworks.ai/guides/quotas_usage/account-quotas",
    ),
    Signal(
        # The key is good, the model is not among those it may use: the request's own fault.
        error_class=ErrorClass.MODEL_NOT_FOUND,
        names=_names(
            "key_model_access_denied org_model_access_denied project_model_access_denied team_model_access_denied",
            "user_model_access_denied",
        ),
        source=_LITELLM_ERRORS,
    ),
    Signal(
        error_class=ErrorClass.AUTH,
        statuses=_KEY_REFUSED,
        names=_names(
            "account_deactivated api_key_invalid auth_error authentication_error authenticationerror expired_api_key",
            "expired_key expired_token incorrect_api_key_error invalid_api_key invalid_authentication",
            "invalid_authentication_error invalid_iam_token invalidapikey key_disabled missing_api_key no_api_key",
            "no_db_connection token_expired token_not_found_in_db unauthenticated",
        ),
        source=_LITELLM_ERRORS,
    ),
    Signal(
        # xAI and Google refuse a wrong key with 400, several gateways with 403 or 500.
        error_class=ErrorClass.AUTH,
        statuses=_KEY_REFUSED,
        message=begins(
            r"(?:Incorrect|Invalid|Missing) API [Kk]ey\b",
            r"API [Kk]ey (?:not valid|expired|not found|is invalid|has expired)\b",
            r"Authentication Error\b",
            r"Access denied due to (?:invalid|missing) subscription key",
            r"No connected db\.\Z",
        ),
        source="https://docs.x.ai/docs/key-information/debugging",
    ),
    # -- the request's own fault ---------------------------------------------------------------------------------
    Signal(
        error_class=ErrorClass.CONTENT_FILTER,
        statuses=_CLIENT,
        names=_names(
            "content_filter",
            "content_policy_violation",
            "contentpolicyviolationerror",
            "image_content_policy_violation",
            "responsibleaipolicyviolation",
        ),
        source="https://learn.microsoft.com/en-us/azure/ai-foundry/openai/concepts/content-filter",
    ),
    Signal(
        error_class=ErrorClass.CONTENT_FILTER,
        statuses=_CLIENT,
        message=begins(r"litellm\.ContentPolicyViolationError\b"),
        source=_LITELLM,
    ),
    Signal(
        error_class=ErrorClass.CONTEXT_LENGTH,
        names=_names("context_length_exceeded", "exceed_context_size_error", "string_above_max_length"),
        source="https://github.com/ggml-org/llama.cpp/pull/15780",
    ),
    Signal(
        error_class=ErrorClass.CONTEXT_LENGTH,
        statuses=_CLIENT,
        params=_names("input_tokens", "input_text"),
        names=_names("badrequesterror"),
        source=f"{_VLLM}/blob/main/vllm/renderers/params.py",
    ),
    Signal(
        error_class=ErrorClass.CONTEXT_LENGTH,
        statuses=_CLIENT,
        message=begins(
            r"This model's maximum context length is \d",
            r"Input length \([\d,]{1,12}\) exceeds model's maximum context length",
            r"The decoder prompt \(length \d{1,12}\) is longer than the maximum model length",
            r"The prompt \(total length \d{1,12}\) is too long to fit into the model",
        ),
        source=f"{_VLLM}/blob/main/vllm/v1/engine/input_processor.py",
    ),
    Signal(
        error_class=ErrorClass.CONTEXT_LENGTH,
        statuses=_CLIENT,
        message=begins(
            r"Requested token count exceeds the model's maximum context length",
            r"The input \(\d{1,12} tokens\) is longer than the model's context length",
            r"Input length \(\d{1,12} tokens\) exceeds the maximum allowed length",
        ),
        source=f"{_SGLANG}/blob/main/python/sglang/srt/managers/tokenizer_manager.py",
    ),
    Signal(
        error_class=ErrorClass.CONTEXT_LENGTH,
        statuses=_CLIENT,
        message=begins(
            r"Input validation error: `inputs` tokens \+ `max_new_tokens` must be",
            r"Input validation error: `inputs` must have less than \d{1,12} tokens",
        ),
        source="https://github.com/huggingface/text-generation-inference/blob/main/router/src/validation.rs",
    ),
    Signal(
        error_class=ErrorClass.CONTEXT_LENGTH,
        statuses=_CLIENT_OR_500,
        message=begins(
            r"Context size has been exceeded\.",
            r"input (?:\(\d{1,12} tokens\) )?is (?:too large to process|larger than the max context size)",
            r"(?:[Tt]he )?request (?:\(\d{1,12} tokens\) )?exceeds the available context size",
            r"Requested tokens \(\d{1,12}\) exceed context window of \d",
        ),
        source="https://github.com/ggml-org/llama.cpp/issues/19774",
    ),
    Signal(
        error_class=ErrorClass.CONTEXT_LENGTH,
        statuses=_CLIENT_OR_500,
        message=begins(
            r"(?:the )?input length exceeds the context length",
            r"prompt is too long: \d{1,12} tokens > \d",
            r"Prompt contains \d{1,12} tokens\b.{0,64} too large for model",
            r"The input token count \(?\d{1,12}\)? exceeds the maximum number of tokens allowed",
            r"Input is too long for requested model",
        ),
        source="https://docs.anthropic.com/en/docs/build-with-claude/context-windows",
    ),
    Signal(
        # A rate limit that the request exceeds by itself: no waiting makes it smaller.
        error_class=ErrorClass.CONTEXT_LENGTH,
        message=begins(
            r"Request too large for ",
            r"Rate limit reached for [^\n]{1,600}?: Limit (?P<limit>\d[\d,]{0,14}), (?:Used [\d,]{1,15}, )?"
            r"Requested (?P<requested>\d[\d,]{0,14})",
        ),
        source="https://community.openai.com/t/request-too-large-for-gpt-4-in-organization/",
    ),
    Signal(
        error_class=ErrorClass.CONTEXT_LENGTH,
        statuses=_CLIENT,
        message=begins(r"Extra usage is required for long context requests"),
        source="https://docs.anthropic.com/en/api/rate-limits",
    ),
    Signal(
        error_class=ErrorClass.CONTEXT_LENGTH,
        statuses=_CLIENT,
        message=begins(r"litellm\.ContextWindowExceededError\b"),
        source=_LITELLM,
    ),
    Signal(
        # A server without the projector or the encoder for it: no repeat can be answered.
        error_class=ErrorClass.INVALID_REQUEST,
        statuses=_CLIENT_OR_500 | {501},
        message=begins(
            r"(?i:(?:image|audio|video|file|multi-?modal|media|vision)(?:s|_url)? "
            r"(?:inputs? |content |data )?(?:(?:is|are) )?(?:not |un)supported)\b",
            r"(?i:(?:(?:this|the) )?(?:model|server) (?:\S{1,200} )?(?:does not|doesn't) support "
            r"(?:image|audio|video|file|multi-?modal|vision|tool)s?)\b",
            r"this model is missing data required for (?:image|audio|video) input",
            r"(?:Failed|failed|Unable|unable) to (?:load|decode|process) (?:the )?(?:image|audio|video)\b",
        ),
        source="https://github.com/ggml-org/llama.cpp/blob/master/tools/server/server-common.cpp",
    ),
    Signal(
        error_class=ErrorClass.INVALID_REQUEST,
        statuses=_CLIENT_OR_500,
        message=begins(
            r"(?i:(?:the )?(?:input )?['\"`]?(?:prompt|content|inputs?|input_prefix|messages|query|documents)['\"`]? "
            r"(?:(?:text|string|content|list) )?"
            r"(?:(?:must|should|may) not be|can(?:not| not|'t) be|is|are|must be non-?) ?(?:an )?empty)\b",
            r"(?i:empty (?:prompt|content|inputs?|messages|query|documents))\b",
            r"['\"`](?:prompt|input|content|messages|query|documents)['\"`] must be \w",
        ),
        source="https://github.com/ggml-org/llama.cpp/blob/master/tools/server/server.cpp",
    ),
    Signal(
        # Validation of the request that a server reports as its own failure.
        error_class=ErrorClass.INVALID_REQUEST,
        statuses=_CLIENT_OR_500,
        message=begins(
            r"\d{1,4} validation errors?:\s+\{'type': '\w{1,64}', 'loc': \('body'",
            r"\d{1,4} validation errors? for \w{0,64}Request\b",
        ),
        source="https://github.com/abetlen/llama-cpp-python/blob/main/llama_cpp/server/errors.py",
    ),
    Signal(
        error_class=ErrorClass.INVALID_REQUEST,
        names=_names("request_too_large", "payload_too_large"),
        source="https://docs.anthropic.com/en/api/errors",
    ),
    # -- the fault of no single message: the capacity, the model's state ------------------------------
    Signal(
        error_class=ErrorClass.MODEL_NOT_FOUND,
        names=_names("model_not_found", "deploymentnotfound", "model_decommissioned", "model_deprecated"),
        source=_OPENAI,
    ),
    Signal(
        error_class=ErrorClass.MODEL_NOT_FOUND,
        statuses=_CLIENT_OR_500 | {404},
        message=begins(
            r"(?:\d{3}: )?(?:\{'error': ['\"])?(?:/?[\w./-]{1,64}: ?)?Invalid model name passed in model=",
            r"You passed in model=\S{1,300}\.? "
            r"There (?:is no 'model_name' with this string|are no healthy deployments)",
        ),
        source=_LITELLM_ERRORS,
    ),
    Signal(
        # The gateway did not reach the server behind it.
        error_class=ErrorClass.CONNECT,
        statuses=_statuses(500, 502, 503, 504),
        message=begins(
            r"Connection error\.",
            r"Cannot connect to host ",
            r"All connection attempts failed",
            r"\[Errno -?\d{1,3}\] (?:Connection refused|Connect call failed|No route to host|Network is unreachable"
            r"|Name or service not known|Temporary failure in name resolution|No address associated with hostname)",
            r'(?:(?:Get|Post|proxy error:) "?[^\s"]{1,300}"?: )?dial tcp\b',
            r"(?:connect (?:ECONNREFUSED|EHOSTUNREACH|ENETUNREACH)|getaddrinfo (?:ENOTFOUND|EAI_AGAIN)) ",
            r"HTTPS?ConnectionPool\(host=[^\n]{1,1000}\b(?:NewConnection|ConnectTimeout|NameResolution)Error\b",
        ),
        source=_LITELLM_ERRORS,
    ),
    Signal(
        error_class=ErrorClass.MODEL_NOT_FOUND,
        statuses=_statuses(404),
        names=_names("notfounderror", "not_found_error"),
        params=_names("model"),
        source=f"{_VLLM}/blob/main/vllm/entrypoints/openai/models/serving.py",
    ),
    Signal(
        error_class=ErrorClass.MODEL_NOT_FOUND,
        statuses=_statuses(404),
        message=begins(
            r"[Mm]odel not found\b",
            r"model ['\"][^'\"]{1,300}['\"] not found",
            r"The model `[^`]{1,300}` does not exist",
        ),
        source=f"{_KUBEAI}/internal/modelproxy/handler.go",
    ),
    Signal(
        error_class=ErrorClass.NOT_READY,
        statuses=_statuses(503),
        names=_names("unavailable_error"),
        source="https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md",
    ),
    Signal(
        error_class=ErrorClass.NOT_READY,
        statuses=_statuses(503),
        message=begins(
            r"The model is currently scaling",
            r"Loading model",
            r"no healthy upstream",
            r"no endpoints available for service",
        ),
        source=f"{_VLLM}/blob/main/vllm/entrypoints/serve/middleware.py",
    ),
    Signal(
        # No replica came up in time: KubeAI hides the reason of its own 5xx behind the name of the status.
        error_class=ErrorClass.NOT_READY,
        statuses=_statuses(504),
        shape=Shape.STRING,
        message=begins(r"Gateway Timeout\Z"),
        source=f"{_KUBEAI}/internal/modelproxy/request.go",
    ),
    Signal(
        error_class=ErrorClass.NOT_READY,
        statuses=_statuses(502, 503, 504),
        message=begins(
            r"upstream connect error or disconnect/reset before headers\. "
            r"(?:retried and the latest )?reset reason: (?:remote |local )?connection (?:failure|timeout)"
        ),
        source=_ENVOY,
    ),
    Signal(
        error_class=ErrorClass.OVERLOADED,
        statuses=_statuses(503),
        message=begins(
            r"upstream connect error or disconnect/reset before headers\. "
            r"(?:retried and the latest )?reset reason: overflow"
        ),
        source=_ENVOY,
    ),
    Signal(
        # The request had reached a server, which then went away: the prompt may be what killed it.
        error_class=ErrorClass.CONNECTION_LOST,
        statuses=_statuses(502, 503),
        message=begins(r"upstream connect error or disconnect/reset before headers\b"),
        source=_ENVOY,
    ),
    Signal(
        error_class=ErrorClass.OVERLOADED,
        statuses=_statuses(500, 503, 529),
        names=_names("overloaded_error", "server_is_overloaded", "serviceunavailableerror"),
        source=_OPENAI,
    ),
    Signal(
        error_class=ErrorClass.RATE_LIMITED,
        statuses=_statuses(400, 403, 429),
        names=_names("rate_limit_exceeded", "rate_limit_error", "ratelimiterror"),
        source=_OPENAI,
    ),
    Signal(
        # Inside a stream, or under a 200, these words are all there is.  Under an error status the status decides:
        # OpenAI gives its 401 and 403 the type `invalid_request_error` too.
        error_class=ErrorClass.INVALID_REQUEST,
        statuses=_statuses(),
        names=_names(
            "badrequesterror empty_image_file failed_to_download_image image_file_not_found image_file_too_large",
            "image_parse_error image_too_large image_too_small invalid_base64_image invalid_image invalid_image_format",
            "invalid_image_mode invalid_image_url invalid_prompt invalid_request_error unsupported_image_media_type",
        ),
        source="https://github.com/openai/openai-python/blob/main/src/openai/types/responses/response_error.py",
    ),
)


def match_signal(facts: Facts, status: int | None) -> Signal | None:
    """
    Return the first sign that the facts show, or `None`.

    Args:
        facts: Of the body.
        status: HTTP status, `None` where the error came without one.
    """
    if facts.shape is Shape.EMPTY and facts.type is None:
        return None
    quoted = quoted_facts(facts)
    known = (facts,) if quoted is None else (quoted, facts)
    return next((signal for signal in SIGNALS for each in known if signal.matches(each, status)), None)
