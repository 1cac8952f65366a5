"""
One request from arrival to answer, in the order in which a model server looks at things.

Behaviours first (an outage does not check keys), then the key, the path, the body, the rate, the free slots, chance,
and at last the answer.  Pure modules decide; this one waits and writes.  With `zero_cost` an answer is bytes made once,
with the caller's request id put in: it is for measuring the caller, so requests are neither parsed nor validated.
"""

import asyncio
import hashlib
import time
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.web_request import BaseRequest

from worker.emulators.openai.answers import Identity, chat_body, completion_body, embedding_body
from worker.emulators.openai.control import Director
from worker.emulators.openai.dialects import DIALECTS, Answer, Kind, SimError, error_answer
from worker.emulators.openai.faults import Behaviour, Drop, Facts, Hang, Stage, hint, instead
from worker.emulators.openai.generation import generate, subject
from worker.emulators.openai.options import SimOptions
from worker.emulators.openai.responses import response_body
from worker.emulators.openai.seeded import Dice
from worker.emulators.openai.serving import Gate, Order, Serving
from worker.emulators.openai.stats import Stats
from worker.emulators.openai.timing import TokenBucket
from worker.emulators.openai.transport import SENT, SENT_AND_CLOSE, Sender, response_head
from worker.emulators.openai.validation import Call, Endpoint, check, decode, deployment_of, endpoint_of, opened_answer

_MARK = "\x01"
"""Stands for the request id while the bytes are made; JSON writes it as an escape that occurs nowhere else."""
_ESCAPED_MARK = msgspec.json.encode(_MARK)[1:-1]
_SAMPLES: Mapping[Endpoint, dict[str, object]] = {
    Endpoint.CHAT: {"messages": [{"role": "user", "content": "Say something."}]},
    Endpoint.COMPLETIONS: {"prompt": "Say something."},
    Endpoint.RESPONSES: {"input": "Say something."},
    Endpoint.EMBEDDINGS: {"input": "Say something.", "dimensions": 8},
}
_BODIES = {
    Endpoint.CHAT: chat_body,
    Endpoint.COMPLETIONS: completion_body,
    Endpoint.RESPONSES: response_body,
}


def body_of(call: Call, options: SimOptions, identity: Identity, dice: Dice) -> dict[str, object]:
    """Return the unary body of a call as nothing but its seed and itself make it."""
    if call.endpoint is Endpoint.EMBEDDINGS:
        return embedding_body(call, options.seed)
    return _BODIES[call.endpoint](call, generate(call, dice, options), DIALECTS[options.dialect], identity)


class Prepared:
    """The bytes of one path's answer."""

    def __init__(self, endpoint: Endpoint, options: SimOptions, created: int) -> None:
        """Make the answer once; `created` is Unix seconds."""
        call = check(endpoint, {"model": "simulated", **_SAMPLES[endpoint]}, options)
        body = msgspec.json.encode(body_of(call, options, Identity(_MARK, created), Dice(options.seed, endpoint)))
        self._parts = body.split(_ESCAPED_MARK)
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


_MODELS = "/v1/models"
_DEFAULT_MODEL = "simulated"
_LIMIT_WAIT_S = 1.0
"""What `auto` tells a client that found no room: nobody knows when there will be some."""


class DataPlane:
    """Serves what clients of a model server ask for."""

    def __init__(self, director: Director, stats: Stats, gate: Gate) -> None:
        """Share the director, the counters and the slots with the control plane."""
        self._director = director
        self._stats = stats
        self._gate = gate
        self._serving = Serving(director, stats, gate)
        self._bucket: tuple[float, TokenBucket] | None = None
        self._prepared: Mapping[str, Prepared] = {}
        if director.options.zero_cost:
            self._prepared = prepare(director.options, int(time.time()))
        self.drops = 0
        """How often the server itself dropped its connections; a client lost then has not left by itself."""
        self.release = asyncio.Event()
        """Set and replaced to let go of hanging requests."""

    async def handle(self, request: BaseRequest) -> web.StreamResponse:
        """
        Answer one request.

        Cancellation: the client has gone or the server stops; the request is counted and its slot is free again.
        """
        path = request.path
        prepared = self._prepared.get(path)
        self._stats.begin(path)
        drops = self.drops
        status = "error"
        try:
            if prepared is not None and not self._director.behaviours:
                status = "200"
                return await self._answer_prepared(request, prepared)
            order, response = await self._serve(request, path)
            status = order.status
        except (asyncio.CancelledError, ConnectionError):
            left = self.drops == drops
            status = "disconnected" if left else "reset"
            self._stats.client_disconnects += left
            raise
        else:
            return response
        finally:
            self._stats.end(status)

    async def _answer_prepared(self, request: BaseRequest, prepared: Prepared) -> web.StreamResponse:
        await request.read()
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client has gone")
        transport.write(prepared.bytes_for(_clean(request.headers.get("X-Request-Id")) or "0"))
        return SENT if request.keep_alive else SENT_AND_CLOSE

    async def _serve(self, request: BaseRequest, path: str) -> tuple[Order, web.StreamResponse]:
        options = self._director.options
        given_id = _clean(request.headers.get("X-Request-Id"))
        try:
            data = await request.read()
        except web.HTTPRequestEntityTooLarge:
            order = Order(Sender(request, given_id or "too-large"), options, path)
            return order, self._refuse(order, SimError(Kind.TOO_LARGE))
        digest = hashlib.sha256(data).digest()
        body_key = int.from_bytes(digest[:8], "big")
        seen = self._stats.identify(given_id, body_key) if endpoint_of(path) is not None else 0
        identity = given_id or Dice(options.seed, digest, seen).hex("id")
        order = Order(
            Sender(request, identity),
            options,
            path,
            identity=identity,
            body_key=body_key,
            digest=digest,
            seen=seen,
        )
        if self._director.behaviours:
            facts = _facts(request, path, data)
            order.streamed = facts.stream
            order.behaviour = self._director.choose(facts)
            if order.behaviour is not None:
                self._stats.by_mode[order.behaviour.mode.name] += 1
                if order.behaviour.mode.stage is Stage.INSTEAD:
                    return order, await self._misbehave(order, order.behaviour, facts)
        try:
            return order, await self._route(request, order, data)
        except SimError as error:
            return order, self._refuse(order, error)

    def _refuse(self, order: Order, error: SimError) -> web.StreamResponse:
        answer = error_answer(order.options.dialect, error, path=order.path, streamed=order.streamed)
        order.status = str(answer.status)
        return order.sender.answer(answer)

    async def _misbehave(self, order: Order, behaviour: Behaviour, facts: Facts) -> web.StreamResponse:
        """Do what an `instead` mode says."""
        result = instead(
            behaviour,
            order.options.dialect,
            path=order.path,
            streamed=facts.stream,
            model=facts.model,
            window=order.options.context_window,
            now_s=time.time(),
        )
        if isinstance(result, Answer):
            order.status = str(result.status)
            return order.sender.answer(result)
        if isinstance(result, Drop):
            order.status = result.how
            return order.sender.reset() if result.how == "reset" else order.sender.close()
        return await self._hang(order, result)

    async def _hang(self, order: Order, hang: Hang) -> web.StreamResponse:
        order.status = "hung"
        try:
            async with asyncio.timeout(hang.seconds):
                await self.release.wait()
        except TimeoutError:
            pass
        return order.sender.close()

    async def _route(self, request: BaseRequest, order: Order, data: bytes) -> web.StreamResponse:
        options, path = order.options, order.path
        if path == "/health":
            return order.send_json({"status": "ok"})
        _check_key(request, options)
        if path == _MODELS or path.startswith(_MODELS + "/"):
            if request.method != "GET":
                raise SimError(Kind.METHOD, headers={"Allow": "GET"}, method=request.method, path=path)
            return order.send_json(_models(options, path.removeprefix(_MODELS).strip("/")))
        endpoint = endpoint_of(path)
        if endpoint is None:
            raise SimError(Kind.NOT_FOUND, method=request.method, path=path)
        if request.method != "POST":
            raise SimError(Kind.METHOD, headers={"Allow": "POST"}, method=request.method, path=path)
        body = decode(data)
        order.streamed = body.get("stream") is True
        about, begun = opened_answer(body, DIALECTS[options.dialect])
        order.dice = Dice(options.seed, subject(about))
        call = check(endpoint, body, options, deployment=deployment_of(path))
        call.begun = begun
        await self._admit(options)
        try:
            return await self._in_service(order, call)
        finally:
            self._gate.leave()

    async def _admit(self, options: SimOptions) -> None:
        """Take a slot, perhaps after waiting; raises SimError when there is none to be had."""
        if options.rate is not None:
            if self._bucket is None or self._bucket[0] != options.rate:
                self._bucket = (options.rate, TokenBucket(options.rate, time.monotonic()))
            wait_s = self._bucket[1].take(time.monotonic())
            if wait_s:
                raise SimError(Kind.RATE_LIMIT, headers=hint(options.retry_after, wait_s, time.time()))
        full = self._serving.is_over_capacity(options)
        if options.overload == "reject":
            full = full or not self._gate.has_room
        elif options.max_queue is not None and not self._gate.has_room:
            full = full or self._gate.waiting >= options.max_queue
        if full:
            kind = Kind.RATE_LIMIT if options.overload_status == 429 else Kind.OVERLOADED  # noqa: PLR2004 - the status
            headers = hint(options.retry_after, _LIMIT_WAIT_S, time.time())
            raise SimError(kind, status=options.overload_status, headers=headers)
        await self._gate.enter()

    async def _in_service(self, order: Order, call: Call) -> web.StreamResponse:
        if order.options.error_rate and order.luck().uniform("error") < order.options.error_rate:
            raise SimError(Kind.SERVER_ERROR)
        return await self._serving.answer(order, call)


def _clean(request_id: str | None) -> str | None:
    """Return a caller's request id as it can stand in JSON and in a header; an empty one is none."""
    if not request_id:
        return None
    return request_id if request_id.isascii() else request_id.encode("ascii", "replace").decode()


def _facts(request: BaseRequest, path: str, data: bytes) -> Facts:
    """Return what filters can see; a body that is not a JSON object has no model, no stream and no metadata."""
    try:
        body: Any = msgspec.json.decode(data) if data else {}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        body = {}
    body = body if isinstance(body, dict) else {}
    model, metadata = body.get("model"), body.get("metadata")
    return Facts(
        path=path,
        model=model if isinstance(model, str) else None,
        stream=body.get("stream") is True,
        headers=request.headers,
        data=data,
        metadata=metadata if isinstance(metadata, dict) else {},
        is_inference=endpoint_of(path) is not None,
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
    names = options.models or (_DEFAULT_MODEL,)
    cards = [{"id": name, "object": "model", "created": 0, "owned_by": "simulated"} for name in names]
    if not wanted:
        return {"object": "list", "data": cards}
    if wanted not in names:
        raise SimError(Kind.MODEL_NOT_FOUND, model=wanted)
    return cards[names.index(wanted)]
