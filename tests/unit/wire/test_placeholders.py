"""Texts with placeholders: what an operator may write, and what a requester can put in."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.wire.placeholders import Template, Values

VALUES = Values(
    message_id="17",
    attempt_id="a-1",
    traceparent="00-1-2-01",
    model="m/1",
    metadata=json.dumps(
        {"a": {"b": "x y", "n": 12345678901234567890}, "t": "é\n", "none": None, "l": [1, {"k": 2}]}
    ).encode(),
)


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("", ""),
        ("plain", "plain"),
        ("{message_id}", "17"),
        ("{traceparent}", "00-1-2-01"),
        ("id={message_id};try={attempt_id};{model}", "id=17;try=a-1;m/1"),
        ("{metadata.a.b}", "x y"),
        ("{metadata.a.n}", "12345678901234567890"),
        ("{metadata.t}", "é\n"),
        ("{metadata.l}", '[1, {"k": 2}]'),
        ("{metadata.a.b}{metadata.a.b}", "x yx y"),
        ("{metadata.none}{metadata.missing}{metadata.a.missing.deep}{metadata.t.inner}{metadata.l.k}", ""),
        ("{{message_id}}", "{message_id}"),
        ("a}}b{{{message_id}}}", "a}b{17}"),
    ],
)
def test_what_is_rendered(text: str, rendered: str) -> None:
    """Texts as they are, other values as JSON, what is absent or null as nothing."""
    assert Template(text).render(VALUES) == rendered


@pytest.mark.parametrize(
    "text",
    ["{", "}", "{message_id", "message_id}", "{}", "{metadata}", "{metadata.}", "{metadata..a}", "{secret}", "{{}"],
)
def test_what_is_refused(text: str) -> None:
    """An unknown placeholder or a lone brace is the operator's mistake, found at the start."""
    with pytest.raises(ValueError, match=r"placeholder|brace"):
        Template(text)


@given(
    st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
)
def test_nothing_of_a_request_is_understood_as_a_template(metadata: dict[str, object]) -> None:
    """Whatever stands in the metadata, it comes out as it is or as its JSON, never raises and is never rendered again."""
    rendered = Template("{metadata.a}|").render(Values(metadata=json.dumps(metadata).encode()))
    value = metadata.get("a")
    expected = "" if value is None else value if isinstance(value, str) else json.dumps(value)
    assert rendered == f"{expected}|"
