"""
One request from arrival to answer, in the order in which a model server looks at things.

Behaviours first (an outage does not check keys), then the key, the path, the body, the rate, the free slots, chance,
and at last the answer.  Pure modules decide; this one waits and writes.  With `zero_cost` an answer is bytes made once,
with the caller's request id put in: it is for measuring the caller, so requests are neither parsed nor validated.
"""

import asyncio
import hashlib
import re
import time
from collections.abc import Mapping
from email.utils import formatdate
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.web_request import BaseRequest

from worker.emulators.openai.answers import Identity
from worker.emulators.openai.control import Controls
from worker.emulators.openai.dialects import DIALECTS, Answer, Kind, SimError, error_answer
from worker.emulators.openai.engine import LiveEngine
from worker.emulators.openai.faults import (
    Behaviour,
    Drop,
    Facts,
    Hang,
    ServiceError,
    Stage,
    frame_fault,
    replacement,
    retry_after_header,
)
from worker.emulators.openai.generation import generate, subject
from worker.emulators.openai.metrics_page import CONTENT_TYPE, EngineLoad, metrics_page
from worker.emulators.openai.options import SimOptions
from worker.emulators.openai.sagemaker import (
    SERVICE,
    Invocation,
    ServiceRefusalError,
    check_invocation,
    invocation_of,
    path_of,
    variant_of,
)
from worker.emulators.openai.seeded import Draws
from worker.emulators.openai.serving import Exchange, Serving, Slots, unary_body
from worker.emulators.openai.sigv4 import Key, SignatureError, verify
from worker.emulators.openai.stats import Stats
from worker.emulators.openai.timing import TokenBucket
from worker.emulators.openai.transport import SENT, SENT_AND_CLOSE, InvocationSender, Sender, response_head
from worker.emulators.openai.validation import (
    DEFAULT_MODEL,
    Call,
    Endpoint,
    check,
    decode,
    deployment_of,
    endpoint_of,
    split_continuation,
)
from worker.wire.sagemaker import FIELDS

_MODELS = "/v1/models"
_HEADER = re.compile(r"[ -~]*")
_LIMIT_WAIT_S = 1.0
"""What `auto` tells a client that found no free slot: when one will be free is unknown."""
_MARK = "\x01"
"""Stands for the request id while the bytes are made; JSON writes it as an escape that occurs nowhere else."""
_ESCAPED_MARK = msgspec.json.encode(_MARK)[1:-1]
_SAMPLES: Mapping[Endpoint, dict[str, object]] = {
    Endpoint.CHAT: {"messages": [{"role": "user", "content": "Say something."}]},
    Endpoint.COMPLETIONS: {"prompt": "Say something."},
    Endpoint.RESPONSES: {"input": "Say something."},
    Endpoint.EMBEDDINGS: {"input": "Say something.", "dimensions": 8},
    Endpoint.MODERATIONS: {"input": "Say something."},
    Endpoint.IMAGES: {"prompt": "Show something."},
    Endpoint.EDITS: {"prompt": "Show something.", "images": [{"file_id": "file-1"}]},
}


class Prepared:
    """The bytes of one path's answer, always the unary one."""

    def __init__(self, endpoint: Endpoint, options: SimOptions, created: int) -> None:
        """Make the answer once; `created` is Unix seconds."""
        call = check(endpoint, {"model": "simulated", **_SAMPLES[endpoint]}, options)
        generation = generate(call, Draws(options.seed, endpoint), options)
        body = unary_body(call, generation, options, Identity(_MARK, created))
        self._parts = msgspec.json.encode(body).split(_ESCAPED_MARK)
        self._fixed = sum(map(len, self._parts))
        self._marks = len(self._parts) - 1

    def bytes_for(self, request_id: str) -> bytes:
        """Return the whole HTTP answer, head included, for a keep-alive connection."""
        shown = msgspec.json.encode(request_id)[1:-1]
        length = self._fixed + self._marks * len(shown)
        head = response_head(200, "application/json", {"x-request-id": request_id}, length=length)
        return head + shown.join(self._parts)


def prepare(options: SimOptions, created: int) -> Mapping[str, Prepared]:
    """Return the prepared answers by path."""
    return {endpoint.value: Prepared(endpoint, options, created) for endpoint in Endpoint}


class DataPlane:
    """Serves what clients of a model server ask for."""

    def __init__(self, controls: Controls, stats: Stats, slots: Slots) -> None:
        """Share the controls, the counters and the slots with the control plane."""
        self._controls = controls
        self._stats = stats
        self._slots = slots
        self._serving = Serving(controls, stats, slots)
        self._bucket: tuple[float, TokenBucket] | None = None
        self._prepared: Mapping[str, Prepared] = {}
        if controls.options.zero_cost:
            self._prepared = prepare(controls.options, int(time.time()))
        self.drops = 0
        """How often the server itself dropped its connections; a client lost then did not disconnect by itself."""
        self.end_hangs = asyncio.Event()
        """Set and replaced to end hanging requests."""

    @property
    def engine(self) -> LiveEngine | None:
        """The engine that answers now; None without one."""
        return self._serving.engine(self._controls.options)

    def reset_counters(self) -> None:
        """Count what the engines count from 0 again."""
        self._serving.reset_counters()

    async def handle(self, request: BaseRequest) -> web.StreamResponse:
        """
        Answer one request.

        Cancellation: the client has disconnected or the server stops; the request is counted, its slot is free again.
        """
        path = request.path
        prepared = self._prepared.get(path)
        self._stats.begin(path)
        drops = self.drops
        status = "error"
        try:
            if prepared is not None and not self._controls.behaviours:
                status = "200"
                return await self._answer_prepared(request, prepared)
            exchange, response = await self._serve(request, path)
            status = exchange.status
        except (asyncio.CancelledError, ConnectionError) as end:
            left = self.drops == drops
            status = "disconnected" if left else "reset"
            self._stats.client_disconnects += left
            if isinstance(end, asyncio.CancelledError):
                raise
            return SENT_AND_CLOSE  # of an error aiohttp would print a traceback
        else:
            return response
        finally:
            self._stats.end(status)

    async def _answer_prepared(self, request: BaseRequest, prepared: Prepared) -> web.StreamResponse:
        await request.read()
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client has disconnected")
        transport.write(prepared.bytes_for(_clean(request.headers.get("X-Request-Id")) or "0"))
        return SENT if request.keep_alive else SENT_AND_CLOSE

    async def _serve(self, request: BaseRequest, path: str) -> tuple[Exchange, web.StreamResponse]:
        options = self._controls.options
        given_id = _clean(request.headers.get("X-Request-Id"))
        try:
            data = await request.read()
        except web.HTTPRequestEntityTooLarge:
            exchange = Exchange(Sender(request, given_id or "too-large"), options, path)
            return exchange, self._refuse(exchange, SimError(Kind.TOO_LARGE))
        digest = hashlib.sha256(data).digest()
        body_key = int.from_bytes(digest[:8], "big")
        invocation = invocation_of(path) if options.sagemaker else None
        if invocation is not None:
            given_id = _clean(request.headers.get(FIELDS["inference_id"].header))
            path = path_of(_object(data))
        seen = self._stats.identify(given_id, body_key) if endpoint_of(path) is not None else 0
        identity = given_id or Draws(options.seed, digest, seen).hex("id")
        exchange = Exchange(
            Sender(request, identity),
            options,
            path,
            identity=identity,
            body_key=body_key,
            digest=digest,
            seen=seen,
        )
        sender: InvocationSender | None = None
        if invocation is not None:
            sender = _invocation_sender(request, identity, invocation, options, body_key)
            exchange.sender = sender
        if self._controls.behaviours:
            facts = _facts(request, path, data, framed=invocation is not None and invocation.is_streamed)
            exchange.streamed = facts.stream
            exchange.behaviour = self._controls.choose(facts)
            if exchange.behaviour is not None:
                self._stats.by_mode[exchange.behaviour.mode.name] += 1
                if exchange.behaviour.mode.stage is Stage.INSTEAD:
                    return exchange, await self._misbehave(exchange, exchange.behaviour, facts)
        if sender is not None and invocation is not None:
            sender.fault = frame_fault(exchange.behaviour)
            try:
                _admit_invocation(request, invocation, data, options)
            except ServiceRefusalError as refusal:
                answer = refusal.answer()
                exchange.status = str(answer.status)
                return exchange, sender.refuse(answer)
        try:
            return exchange, await self._route(request, exchange, data)
        except SimError as error:
            return exchange, self._refuse(exchange, error)

    def _refuse(self, exchange: Exchange, error: SimError) -> web.StreamResponse:
        answer = error_answer(exchange.options.dialect, error, path=exchange.path, streamed=exchange.streamed)
        exchange.status = str(answer.status)
        return exchange.sender.answer(answer)

    async def _misbehave(self, exchange: Exchange, behaviour: Behaviour, facts: Facts) -> web.StreamResponse:
        """Do what an `instead` mode says."""
        result = replacement(
            behaviour,
            exchange.options.dialect,
            path=exchange.path,
            streamed=facts.stream,
            model=facts.model,
            window=exchange.options.context_window,
            now_s=time.time(),
        )
        if isinstance(result, ServiceError):
            exchange.status = str(result.answer.status)
            sender = exchange.sender
            send = sender.refuse if isinstance(sender, InvocationSender) else sender.answer
            return send(result.answer)
        if isinstance(result, Answer):
            exchange.status = str(result.status)
            return exchange.sender.answer(result)
        if isinstance(result, Drop):
            exchange.status = result.how
            return exchange.sender.reset() if result.how == "reset" else exchange.sender.close()
        return await self._hang(exchange, result)

    async def _hang(self, exchange: Exchange, hang: Hang) -> web.StreamResponse:
        exchange.status = "hung"
        try:
            async with asyncio.timeout(hang.seconds):
                await self.end_hangs.wait()
        except TimeoutError:
            pass
        return exchange.sender.close()

    async def _route(self, request: BaseRequest, exchange: Exchange, data: bytes) -> web.StreamResponse:
        options, path = exchange.options, exchange.path
        if path == "/health":
            return exchange.send_json({"status": "ok"})
        if path == "/metrics":  # without a key, as vLLM and SGLang have it
            page = metrics_page(options.dialect, (*options.models, DEFAULT_MODEL)[0], self._load(options))
            return exchange.sender.answer(Answer(200, page.encode(), CONTENT_TYPE))
        if not isinstance(exchange.sender, InvocationSender):  # those are signed
            _check_key(request, options)
        if path == _MODELS or path.startswith(_MODELS + "/"):
            if request.method != "GET":
                raise SimError(Kind.METHOD, headers={"Allow": "GET"}, method=request.method, path=path)
            return exchange.send_json(_models(options, path.removeprefix(_MODELS).strip("/")))
        endpoint = endpoint_of(path)
        if endpoint is None:
            raise SimError(Kind.NOT_FOUND, method=request.method, path=path)
        if request.method != "POST":
            raise SimError(Kind.METHOD, headers={"Allow": "POST"}, method=request.method, path=path)
        body = decode(data)
        exchange.streamed = body.get("stream") is True
        about, prefix = split_continuation(body, DIALECTS[options.dialect])
        exchange.draws = Draws(options.seed, subject(about))
        call = check(endpoint, body, options, deployment=deployment_of(path))
        call.prefix = prefix
        await self._admit(options)
        try:
            return await self._in_service(exchange, call)
        finally:
            self._slots.release()

    def _load(self, options: SimOptions) -> EngineLoad:
        running, waiting = self._slots.in_service, self._slots.waiting
        cache_share = min(running / options.max_concurrency, 1.0) if options.max_concurrency else 0.0
        if (engine := self.engine) is not None:
            running, waiting, cache_share = engine.running, waiting + engine.waiting, engine.kv_usage
        stats = self._stats
        return EngineLoad(
            running=running,
            waiting=waiting,
            cache_share=cache_share,
            generated_tokens=stats.tokens_generated,
            prompt_tokens=stats.prompt_tokens,
            cached_prompt_tokens=stats.prompt_tokens_cached,
        )

    async def _admit(self, options: SimOptions) -> None:
        """Take a slot, perhaps after waiting; raises SimError when there is none to be had."""
        if options.rate is not None:
            if self._bucket is None or self._bucket[0] != options.rate:
                self._bucket = (options.rate, TokenBucket(options.rate, time.monotonic()))
            wait_s = self._bucket[1].take(time.monotonic())
            if wait_s:
                raise SimError(Kind.RATE_LIMIT, headers=retry_after_header(options.retry_after, wait_s, time.time()))
        full = self._serving.is_over_capacity(options)
        if options.overload == "reject":
            full = full or not self._slots.has_free_slot
        elif options.max_queue is not None and not self._slots.has_free_slot:
            full = full or self._slots.waiting >= options.max_queue
        if full:
            kind = Kind.RATE_LIMIT if options.overload_status == 429 else Kind.OVERLOADED  # noqa: PLR2004 - the status
            headers = retry_after_header(options.retry_after, _LIMIT_WAIT_S, time.time())
            raise SimError(kind, status=options.overload_status, headers=headers)
        await self._slots.acquire()

    async def _in_service(self, exchange: Exchange, call: Call) -> web.StreamResponse:
        if exchange.options.error_rate and exchange.event_draws().uniform("error") < exchange.options.error_rate:
            raise SimError(Kind.SERVER_ERROR)
        return await self._serving.answer(exchange, call)


def _clean(request_id: str | None) -> str | None:
    """Return a caller's request id as it can stand in JSON and in a header; an empty one is none."""
    if not request_id:
        return None
    return request_id if request_id.isascii() else request_id.encode("ascii", "replace").decode()


def _invocation_sender(
    request: BaseRequest, identity: str, invocation: Invocation, options: SimOptions, body_key: int
) -> InvocationSender:
    """Return what answers an invocation; one that asks for a variant that does not exist is refused later."""
    headers = _lower(request)
    try:
        variant = variant_of(headers, options.variants, body_key)
    except ServiceRefusalError:
        variant = options.variants[0]
    own = {"Date": formatdate(time.time() + options.clock_skew_s, usegmt=True)}
    attributes = FIELDS["custom_attributes"].header
    if attributes in headers and _HEADER.fullmatch(headers[attributes]):
        own[attributes] = headers[attributes]
    return InvocationSender(request, identity, variant=variant, is_framed=invocation.is_streamed, headers=own)


def _admit_invocation(request: BaseRequest, invocation: Invocation, data: bytes, options: SimOptions) -> None:
    """Raise ServiceRefusalError unless the service passes the request on to the container."""
    headers = _lower(request)
    if request.method != "POST":
        raise ServiceRefusalError("UnknownOperationException", f"There is no {request.method} here.", 404)
    try:
        key = Key(*options.aws_key.split(":"))
        now = time.time() + options.clock_skew_s
        verify(request.method, request.raw_path, headers, data, key=key, service=SERVICE, now_unix=now)
    except SignatureError as error:
        raise ServiceRefusalError(error.name, error.message, 403) from None
    check_invocation(invocation, headers, len(data), options.endpoints)
    variant_of(headers, options.variants, 0)


def _lower(request: BaseRequest) -> dict[str, str]:
    return {name.lower(): value for name, value in request.headers.items()}


def _object(data: bytes) -> dict[str, Any]:
    """Return the JSON object of a body; an empty one where it is none."""
    try:
        body: Any = msgspec.json.decode(data) if data else {}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _facts(request: BaseRequest, path: str, data: bytes, *, framed: bool) -> Facts:
    """Return what filters can see; a body that is not a JSON object has no model, no stream and no metadata."""
    body = _object(data)
    model, metadata = body.get("model"), body.get("metadata")
    return Facts(
        path=path,
        model=model if isinstance(model, str) else None,
        stream=body.get("stream") is True,
        headers=request.headers,
        data=data,
        metadata=metadata if isinstance(metadata, dict) else {},
        is_inference=endpoint_of(path) is not None,
        framed=framed,
    )


def _check_key(request: BaseRequest, options: SimOptions) -> None:
    """Raise SimError (401) unless the request carries the key that is required now."""
    if options.api_key is None:
        return
    sent = request.headers.get("Authorization", ""), request.headers.get("api-key")
    if sent[0] != f"Bearer {options.api_key}" and sent[1] != options.api_key:
        raise SimError(Kind.UNAUTHORIZED, headers={"WWW-Authenticate": "Bearer"})


def _models(options: SimOptions, wanted: str) -> dict[str, Any]:
    """Return the list of models, or one of them by name."""
    names = options.models or (DEFAULT_MODEL,)
    cards = [{"id": name, "object": "model", "created": 0, "owned_by": "simulated"} for name in names]
    if not wanted:
        return {"object": "list", "data": cards}
    if wanted not in names:
        raise SimError(Kind.MODEL_NOT_FOUND, model=wanted)
    return cards[names.index(wanted)]
