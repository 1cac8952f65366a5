"""The simulated server in front of OpenAI's own client: what it sends must be what that client understands."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from worker.emulators.openai import SimBackend, SimOptions

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed; it is no dependency")

ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture
async def sim() -> AsyncIterator[SimBackend]:
    """A server without latency."""
    async with SimBackend(SimOptions()) as backend:
        yield backend


@pytest.fixture
async def client(sim: SimBackend) -> AsyncIterator[Any]:
    """OpenAI's client, without its own retries."""
    async with openai.AsyncOpenAI(base_url=sim.base_url + "/v1", api_key="k", max_retries=0) as made:
        yield made


async def test_chat_streamed_and_not(client: Any) -> None:
    """The same request gives the same text streamed and not, and the usage agrees."""
    whole = await client.chat.completions.create(**ASK)
    stream = await client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.id.startswith("chatcmpl-")


async def test_tool_calls_are_understood(client: Any) -> None:
    """The client's own accumulation of a streamed tool call gives the arguments of the unary one."""
    whole = await client.chat.completions.create(**ASK, tools=[TOOL], tool_choice="required")
    async with client.chat.completions.stream(**ASK, tools=[TOOL], tool_choice="required") as stream:
        final = await stream.get_final_completion()
    wanted = whole.choices[0].message.tool_calls[0]
    found = final.choices[0].message.tool_calls[0]
    assert (found.function.name, found.function.arguments) == (wanted.function.name, wanted.function.arguments)
    assert found.id == wanted.id


async def test_responses_streamed_and_not(client: Any) -> None:
    """The Responses API works with the client's helper for streams."""
    whole = await client.responses.create(model="m", input="hello")
    async with client.responses.stream(model="m", input="hello") as stream:
        final = await stream.get_final_response()
    assert whole.output_text == final.output_text != ""
    assert final.usage.output_tokens == whole.usage.output_tokens


async def test_completions_embeddings_and_models(client: Any) -> None:
    """The other endpoints decode, embeddings from the base64 that the client asks for."""
    completion = await client.completions.create(model="m", prompt="once", max_tokens=3)
    assert completion.choices[0].finish_reason == "length"
    embeddings = await client.embeddings.create(model="m", input=["a", "b"], dimensions=16)
    assert [len(item.embedding) for item in embeddings.data] == [16, 16]
    assert [model.id async for model in client.models.list()] == ["simulated"]


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ({"mode": "unauthorized"}, "AuthenticationError"),
        ({"mode": "forbidden"}, "PermissionDeniedError"),
        ({"mode": "model_not_found"}, "NotFoundError"),
        ({"mode": "context_length"}, "BadRequestError"),
        ({"mode": "rate_limit", "retry_after": "2"}, "RateLimitError"),
        ({"mode": "outage_5xx"}, "InternalServerError"),
        ({"mode": "html_502"}, "InternalServerError"),
        ({"mode": "reset"}, "APIConnectionError"),
        ({"mode": "close"}, "APIConnectionError"),
    ],
)
async def test_errors_become_the_clients_exceptions(
    sim: SimBackend, client: Any, document: dict[str, Any], error: str
) -> None:
    """Each mode raises the exception that the client has for it, with OpenAI's code where there is one."""
    await sim.control(document)
    with pytest.raises(getattr(openai, error)) as raised:
        await client.chat.completions.create(**ASK)
    if document["mode"] == "context_length":
        assert raised.value.code == "context_length_exceeded"


async def test_an_error_inside_a_stream_is_noticed(sim: SimBackend, client: Any) -> None:
    """An error event in the middle raises after the text that came before."""
    await sim.control({"mode": "stream", "break": "error_event", "after_events": 4})
    seen = 0
    with pytest.raises(openai.APIError):  # noqa: PT012 - the text before counts too
        async for _ in await client.chat.completions.create(**ASK, stream=True):
            seen += 1
    assert seen == 4
