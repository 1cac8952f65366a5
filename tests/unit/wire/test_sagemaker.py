"""The tables of SageMaker's fields are those of botocore's model of the service."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import botocore
import pytest

from worker.settings.schema import SageMakerSettings
from worker.wire.sagemaker import (
    ERROR_STATUSES,
    FIELDS,
    MAX_REQUEST_BYTES,
    MODEL_ERROR_STATUS,
    REPLY_ATTRIBUTES,
    SETTABLE,
    STREAM_ACCEPT,
    STREAM_CONTENT_TYPE,
    STREAM_ERRORS,
)

_FILE = Path(botocore.__file__).parent / "data/sagemaker-runtime/2017-05-13/service-2.json.gz"
MODEL: dict[str, Any] = json.loads(gzip.decompress(_FILE.read_bytes()))
SHAPES = MODEL["shapes"]
UNARY, STREAM = "InvokeEndpoint", "InvokeEndpointWithResponseStream"


def headers_of(shape: str) -> dict[str, str]:
    """Members that stand in headers: name in snake case, header in lower case."""
    members = SHAPES[shape]["members"].items()
    return {
        re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): member["locationName"].lower()
        for name, member in members
        if member.get("location") == "header"
    }


def test_the_fields_of_both_operations() -> None:
    """Each header of each operation is in the table, and nothing else."""
    assert {name: field.header for name, field in FIELDS.items()} == headers_of(UNARY + "Input")
    streamed = {name: field.header for name, field in FIELDS.items() if field.is_streamable}
    assert streamed | {"accept": STREAM_ACCEPT} == headers_of(STREAM + "Input")


def test_the_fields_of_the_answers() -> None:
    """Each header of a response becomes an attribute, the content type among them."""
    unary, stream = headers_of(UNARY + "Output"), headers_of(STREAM + "Output")
    assert unary.pop("content_type") == "content-type"
    assert stream.pop("content_type") == STREAM_CONTENT_TYPE
    assert set(unary.values()) == set(REPLY_ATTRIBUTES)
    assert set(stream.values()) <= set(REPLY_ATTRIBUTES)


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_is_longer_than_the_service_takes(name: str) -> None:
    """The limits are the service's own; what it calls printable may be narrower here, for it stands in a header."""
    member = {key.lower(): value for key, value in SHAPES[UNARY + "Input"]["members"].items()}[name.replace("_", "")]
    field, shape = FIELDS[name], SHAPES[member["shape"]]
    assert field.max_chars == shape["max"]
    assert field.fault("a" * field.max_chars) is None
    assert "longer" in (field.fault("a" * (field.max_chars + 1)) or "")


@pytest.mark.parametrize("value", ["", " a", "a ", "a\tb", "a\nb", "é", "a\x7f"])
@pytest.mark.parametrize("name", ["custom_attributes", "target_model", "inference_id"])
def test_a_value_that_would_not_arrive_as_it_is(name: str, value: str) -> None:
    """Line breaks, control characters, spaces at an end, anything but ASCII."""
    assert FIELDS[name].fault(value) is not None


@pytest.mark.parametrize("value", ["a", "a b", "k=v; k2=v2, x", "~!{}", "a" * 63])
def test_a_value_that_arrives(value: str) -> None:
    """Visible characters with spaces between them."""
    assert FIELDS["custom_attributes"].fault(value) is None


@pytest.mark.parametrize("value", ["a b", "-a", "a-", "a_b", "a.b", ""])
def test_names_of_variants(value: str) -> None:
    """Letters, digits, hyphens between them."""
    assert FIELDS["target_variant"].fault(value) is not None


def test_the_limits_and_statuses() -> None:
    """Of the request's body, and of the error that has another one inside."""
    assert SHAPES["BodyBlob"]["max"] == MAX_REQUEST_BYTES
    assert SHAPES["ModelError"]["error"]["httpStatusCode"] == MODEL_ERROR_STATUS


def test_the_errors_of_the_service() -> None:
    """Those of botocore's model with their statuses, and the common ones; those inside a stream."""
    named = {
        shape for name in (UNARY, STREAM) for shape in (error["shape"] for error in MODEL["operations"][name]["errors"])
    }
    statuses = {name: SHAPES[name].get("error", {}).get("httpStatusCode") for name in named - set(STREAM_ERRORS)}
    statuses |= {"InternalFailure": 500}  # whose status is that of any fault
    assert statuses.items() <= ERROR_STATUSES.items()
    assert set(STREAM_ERRORS) <= named
    exceptions = {name for name in SHAPES["ResponseStream"]["members"] if SHAPES[name].get("exception")}
    assert exceptions == set(STREAM_ERRORS)


def test_what_a_message_may_be_allowed_to_set() -> None:
    """The choices of the setting are the settable fields; every field is a setting."""
    choices = SageMakerSettings.model_json_schema()["properties"]["message_fields"]["items"]["enum"]
    assert set(choices) == set(SETTABLE.values()) == {name for name, field in FIELDS.items() if field.is_settable}
    assert set(FIELDS) <= set(SageMakerSettings.model_fields)
