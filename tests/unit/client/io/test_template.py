"""From a row to a request line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.client.errors import InputError
from worker.client.io.template import Template
from worker.wire.message import decode_request


def rendered(template, row, number=1):
    text = template if isinstance(template, str) else json.dumps(template)
    return json.loads(Template(text).render(row, number))


def a_body(value):
    """The value that a template makes of one string of a body."""
    return {"path": "/v1/x", "metadata": {}, "body": {"v": value}}


@pytest.mark.parametrize(
    ("text", "row", "value"),
    [
        ("plain", {}, "plain"),
        ("{a}", {"a": "x"}, "x"),
        ("{a}", {"a": 5}, 5),
        ("{a}", {"a": [1, None]}, [1, None]),
        ("{a}", {"a": None}, None),
        ("<{a}{b}>", {"a": "x", "b": "y"}, "<xy>"),
        ("{a}!", {"a": 5}, "5!"),
        ("{a}!", {"a": True}, "true!"),
        ("{a}!", {"a": None}, "!"),
        ("{a}!", {"a": {"k": [1]}}, '{"k":[1]}!'),
        ("{a b}", {"a b": "x"}, "x"),
        ("{a:json}", {"a": "5"}, 5),
        ("{a:json}", {"a": " "}, None),
        ("{a:json}", {"a": '{"k": 1}'}, {"k": 1}),
        ("{a:json}", {"a": 5}, 5),
        ("<{a:json}>", {"a": "[1, 2]"}, "<[1,2]>"),
        ("{{a}}", {}, "{a}"),
        ("{{{a}}}", {"a": "x"}, "{x}"),
        ("{a}", {"a": "{b}"}, "{b}"),
        ("{ä}", {"ä": "\U0001f600"}, "\U0001f600"),
    ],
)
def test_a_string_of_the_template(text, row, value):
    """Text, values with their types, values inside text, JSON in texts, braces; what a row holds is never a template."""
    assert rendered(a_body(text), row)["body"]["v"] == value


def test_the_rest_of_the_template_stays_as_it_is():
    """Numbers, booleans, null, nested lists; keys are no templates."""
    template = a_body([1, 2.5, True, None, {"{a}": ["{a}", 18446744073709551617]}])
    assert rendered(template, {"a": "x"})["body"]["v"] == [1, 2.5, True, None, {"{a}": ["x", 18446744073709551617]}]


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ({"model": "m", "messages": []}, "/v1/chat/completions"),
        ({"model": "m", "prompt": "{a}"}, "/v1/completions"),
    ],
)
def test_a_body_alone_gets_its_path(template, path):
    """And metadata that name the row."""
    line = rendered(template, {"a": "x"}, number=7)
    assert (line["path"], line["metadata"]) == (path, {"row": 7})
    assert decode_request(json.dumps(line).encode()).path == path


def test_a_batch_line_keeps_its_custom_id():
    """It has no metadata: its custom_id says which row it belongs to."""
    line = rendered({"custom_id": "r-{id}", "method": "POST", "url": "/v1/x", "body": {"n": "{id}"}}, {"id": 3})
    assert line == {"custom_id": "r-3", "method": "POST", "url": "/v1/x", "body": {"n": 3}}


def test_metadata_of_the_template_are_kept():
    """Only where it names none they are the row's number."""
    template = {"path": "/v1/x", "metadata": {"key": "{id}"}, "body": {}}
    assert rendered(template, {"id": "k"})["metadata"] == {"key": "k"}
    assert rendered({"path": "/v1/x", "body": {}}, {}, number=2)["metadata"] == {"row": 2}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"model": "m", "input": "x"}', "neither a request nor a body"),
        ('{"body": {}}', "has a body but no path"),
        ('{"prompt": "a { b"}', r"has { in 'a { b'"),
        ('{"prompt": "a }"}', "has } in"),
        ('{"prompt": "{}"}', "has {} in"),
    ],
)
def test_a_template_that_cannot_be_used_is_told(text, told):
    """Before any row is read."""
    with pytest.raises(InputError, match=told):
        Template(text)


def test_a_missing_column_is_told_with_those_that_are_there():
    """With the nearest one, and how a brace is written."""
    template = Template('{"prompt": "{name} {nmae}"}')
    with pytest.raises(InputError, match=r"t\.csv: has no column 'nmae'.*did you mean name.*it has id, name"):
        template.require("t.csv", ["id", "name"])
    template.require("t.csv", ["nmae", "name"])


def test_a_value_that_is_to_be_json_and_is_none_is_told():
    """With its column."""
    with pytest.raises(InputError, match="column 'a' is not JSON"):
        rendered(a_body("{a:json}"), {"a": "{"})


@given(st.dictionaries(st.sampled_from("abc"), st.text(), min_size=3))
def test_any_text_arrives_as_it_is(row):
    """Quotes, braces, control characters: the line is JSON, and the text inside is the row's."""
    encodable = all(text.isprintable() or text.encode("utf-8", "ignore").decode() == text for text in row.values())
    if encodable:
        assert rendered(a_body("{a}-{b}"), row)["body"]["v"] == f"{row['a']}-{row['b']}"
