"""
boto3 and the worker's backend against the same bytes: the same answers, and the same verdicts about what breaks.

A fake that AWS's own client accepts is right; then the worker must see in it what that client sees, but for the one
fault that it does not notice.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.eventstream import ParserError
from botocore.exceptions import ClientError, EventStreamError, HTTPClientError
from urllib3.exceptions import ProtocolError

from tests.support.attempts import CHAT, HELLO, attempt
from tests.support.aws_tokens import REGION, use_keys
from tests.support.random_bodies import canon
from worker.backends.sagemaker import SageMakerBackend
from worker.emulators.openai import SimBackendThread, SimOptions
from worker.emulators.openai.options import EXAMPLE_KEY
from worker.emulators.openai.sagemaker import ERRORS
from worker.settings.schema import RouteSettings

KEY_ID, SECRET = EXAMPLE_KEY.split(":")
STREAM = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimBackendThread]:
    """A simulated endpoint in a thread: boto3 blocks."""
    use_keys(monkeypatch, tmp_path, KEY_ID, SECRET)
    with SimBackendThread(SimOptions.of(sagemaker=True, variants="blue,green")) as server:
        yield server


@pytest.fixture
def client(sim: SimBackendThread) -> Iterator[Any]:
    """AWS's own client, without its retries."""
    config = Config(retries={"total_max_attempts": 1}, read_timeout=10)
    client = boto3.client("sagemaker-runtime", region_name=REGION, endpoint_url=sim.base_url, config=config)
    yield client
    client.close()


def by_boto3(client: Any, body: dict[str, Any], **fields: str) -> tuple[bytes, str, Any]:
    """Body, verdict and response of an invocation by boto3; an empty verdict for an answer."""
    call: Callable[..., Any] = (
        client.invoke_endpoint_with_response_stream if body.get("stream") else client.invoke_endpoint
    )
    came, response = b"", None
    try:
        response = call(EndpointName="ep", Body=json.dumps(body), ContentType="application/json", **fields)
        if body.get("stream"):
            for event in response["Body"]:
                came += event["PayloadPart"]["Bytes"]
        else:
            came = response["Body"].read()
    except (ClientError, EventStreamError) as error:
        return came, error.response["Error"]["Code"], response
    except ParserError as error:
        return came, type(error).__name__, response
    except (HTTPClientError, ProtocolError):
        return came, "connection", response
    finally:
        if response is not None:
            response["Body"].close()
    return came, "", response


def text_of(came: bytes) -> str:
    """The text of the whole events in what came."""
    events = [json.loads(line[6:]) for line in came.split(b"\n\n")[:-1] if line.startswith(b"data: {")]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


async def by_worker(sim: SimBackendThread, body: dict[str, Any], **sagemaker: Any) -> Any:
    # Not `as_requested`: a stream that breaks would be followed by a request for the whole answer.
    stream = "always" if body.get("stream") else "never"
    settings = {"name": "r", "base_url": sim.base_url, "stream": stream, "sagemaker": {"endpoint": "ep", **sagemaker}}
    backend = SageMakerBackend(RouteSettings.model_validate({**settings, "timeouts": {"total_s": 20}}))
    try:
        return await attempt(backend, CHAT, body)
    finally:
        await backend.aclose()


async def test_the_same_answer(sim: SimBackendThread, client: Any) -> None:
    """In one piece, with every field of the response."""
    fields = {"CustomAttributes": "a  b;c=1", "TargetVariant": "green", "InferenceId": "i-1"}
    came, verdict, response = by_boto3(client, HELLO, **fields)
    assert verdict == ""
    ended = await by_worker(sim, HELLO, custom_attributes="a  b;c=1", target_variant="green", inference_id="i-1")
    assert canon(ended.body) == canon(json.loads(came))
    assert ended.result.attributes == {
        "sagemaker_custom_attributes": response["CustomAttributes"],
        "sagemaker_variant": response["InvokedProductionVariant"],
        "sagemaker_content_type": response["ContentType"],
    }
    assert sim.snapshot()["request_ids"]["repeats"] == 1


@pytest.mark.parametrize("size", [None, 1, 37])
async def test_the_same_stream(size: int | None, sim: SimBackendThread, client: Any) -> None:
    """The events that boto3 hands over make the answer that the worker puts together."""
    sim.control({"mode": "frames", "part_bytes": size})
    came, verdict, response = by_boto3(client, STREAM)
    assert verdict == ""
    assert response["ContentType"] == "text/event-stream"
    ended = await by_worker(sim, STREAM)
    assert ended.body["choices"][0]["message"]["content"] == text_of(came)


@pytest.mark.parametrize(
    ("fault", "verdict", "error_class"),
    [
        ({"break": "model_stream_error"}, "ModelStreamError", "model_time_exceeded"),
        ({"break": "model_stream_error", "error_code": "StreamBroken"}, "ModelStreamError", "stream_broken"),
        ({"break": "internal_stream_failure"}, "InternalStreamFailure", "stream_broken"),
        ({"break": "error_message", "error_code": "Oops"}, "Oops", "stream_broken"),
        ({"break": "bad_crc"}, "ChecksumMismatch", "stream_broken"),
        ({"break": "end"}, "", "stream_broken"),
        ({"break": "cut_frame"}, "", "stream_broken"),  # boto3 does not notice it
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
async def test_the_same_verdict_about_frames(
    fault: dict[str, Any], verdict: str, error_class: str, sim: SimBackendThread, client: Any
) -> None:
    """And the same bytes before it, at several places of the stream."""
    for after in (0, 300, 900, 2000):
        sim.control({"mode": "frames", "after_bytes": after, **fault})
        came, said, _ = by_boto3(client, STREAM)
        assert (said, len(came)) == (verdict, after)
        ended = await by_worker(sim, STREAM)
        assert ended.error_class == error_class
        assert ended.reply[1].get("truncated", False) is (text_of(came) != "")
        if text_of(came):
            assert ended.reply[1]["partial"]["choices"][0]["message"]["content"] == text_of(came)


@pytest.mark.parametrize("break_", ["rst", "mid_chunk"])
async def test_the_same_verdict_about_http(break_: str, sim: SimBackendThread, client: Any) -> None:
    """Below the frames."""
    sim.control({"mode": "stream", "break": break_})
    assert by_boto3(client, STREAM)[1] == "connection"
    assert (await by_worker(sim, STREAM)).error_class == "stream_broken"


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["whole", "stream"])
async def test_the_same_name_of_an_error(name: str, body: dict[str, Any], sim: SimBackendThread, client: Any) -> None:
    """boto3's code is the type that the worker's normaliser finds, but for the error that it unwraps."""
    sim.control({"mode": "sagemaker_error", "error": name})
    _, said, _ = by_boto3(client, body)
    ended = await by_worker(sim, body)
    assert said == name
    assert ended.error_class
    assert ended.result.headers["x-amzn-errortype"].partition(":")[0] == name


async def test_a_wrong_key_and_a_wrong_clock(sim: SimBackendThread, client: Any) -> None:
    """Are refused to both; boto3 corrects no clock before it retries."""
    sim.control({"settings": {"clock_skew_s": 4000}})
    assert by_boto3(client, HELLO)[1] == "InvalidSignatureException"
    assert (await by_worker(sim, HELLO)).error_class == ""
    sim.control({"settings": {"clock_skew_s": 0, "aws_key": f"{KEY_ID}:another"}})
    assert by_boto3(client, HELLO)[1] == "InvalidSignatureException"
    assert (await by_worker(sim, HELLO)).error_class == "auth"
