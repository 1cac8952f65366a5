"""
The words by which servers say what went wrong: one row per known sign, in order, first match wins.

Fields are compared by equality and the message by a pattern anchored at its first character, never searched: a prompt
echoed in an error may contain any of these words and must not decide anything.  What no row knows is judged by its
status alone, in `table`.  Patterns hold no
nested repetition, so they run in linear time over the at most 2 KiB that a message has.
"""

import re
from dataclasses import dataclass

from worker.policy.model import ErrorClass
from worker.policy.normalise import Facts, Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
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
    message: re.Pattern[str] | None = None
    """Must match from the first character of the message."""

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
        return self.message is None or self.message.match(facts.message) is not None


def begins(*alternatives: str) -> re.Pattern[str]:
    """Compile a pattern for the beginning of a message."""
    return re.compile("(?:" + "|".join(alternatives) + ")", re.ASCII | re.DOTALL)


_CLIENT = frozenset({400, 403, 413, 422})
_VLLM = "https://github.com/vllm-project/vllm"
_SGLANG = "https://github.com/sgl-project/sglang"
_LITELLM = "https://docs.litellm.ai/docs/exception_mapping"
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
        names=_names("throttlingexception", "throttling", "toomanyrequestsexception"),
        source=_AWS_ERRORS,
    ),
    Signal(
        error_class=ErrorClass.AUTH,
        statuses=_statuses(400, 403),
        names=_names(
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
            "unrecognizedclientexception",
        ),
        source=_AWS_ERRORS,
    ),
    Signal(
        # Google calls a wrong key an invalid argument: without this row a revoked key would answer a whole queue.
        error_class=ErrorClass.AUTH,
        statuses=_statuses(400),
        names=_names("invalid_argument"),
        message=begins(r"API key not valid\.", r"API key expired\.", r"API Key not found\."),
        source="https://github.com/micr0-dev/lexido/issues/54",
    ),
    Signal(
        error_class=ErrorClass.MODEL_NOT_FOUND,
        statuses=_statuses(400, 404),
        names=_names("validationerror", "validationexception"),
        message=begins(r"Endpoint \S{1,200} of account \S{1,64} not found"),
        source="https://github.com/aws/amazon-sagemaker-examples/issues/293",
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
        statuses=_CLIENT | {500},
        names=_names("context_length_exceeded", "exceed_context_size_error"),
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
        statuses=_statuses(500),
        names=_names("server_error"),
        message=begins(r"Context size has been exceeded\."),
        source="https://github.com/ggml-org/llama.cpp/issues/19774",
    ),
    Signal(
        error_class=ErrorClass.CONTEXT_LENGTH,
        statuses=_CLIENT,
        message=begins(r"litellm\.ContextWindowExceededError\b"),
        source=_LITELLM,
    ),
    # -- the fault of no single message: the account, the capacity, the model's state ----------------------------------
    Signal(
        error_class=ErrorClass.QUOTA,
        statuses=_statuses(402, 403, 429),
        names=_names(
            "billing_hard_limit_reached",
            "credit_balance_exhausted",
            "insufficient_quota",
            "organization_spend_limit_exceeded",
            "organization_usage_limit_exceeded",
            "project_spend_limit_exceeded",
        ),
        source=_OPENAI,
    ),
    Signal(
        error_class=ErrorClass.MODEL_NOT_FOUND,
        statuses=_statuses(400, 403, 404),
        names=_names("model_not_found", "deploymentnotfound"),
        source=_OPENAI,
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
    return next((signal for signal in SIGNALS if signal.matches(facts, status)), None)
