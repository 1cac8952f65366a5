"""What is found in an input before anything is done about it, by `local` and `submit` alike."""

import json

import pytest

from tests.unit.client.test_local import Source
from worker.client.check import MAX_MODELS, CheckedLines, LineCheck, ModelUse, OutputMatch, check_lines
from worker.client.errors import InputError, OutputError
from worker.client.io.lines import RawLine
from worker.client.resume import AnsweredLines


def a_message(number, model="m"):
    return b'{"path":"/v1/x","metadata":{"n":%d},"body":{"model":"%s"}}' % (number, model.encode())


def a_batch_line(custom_id):
    return b'{"custom_id":%s,"method":"POST","url":"/v1/x","body":{}}' % custom_id


def answers_to(lines):
    answered = AnsweredLines()
    for number, line in enumerate(lines, 1):
        answered.add(RawLine.of(number, line).line_id)
    return answered


def matched(answered=None, name="in.jsonl", **options):
    return OutputMatch(name, "out.jsonl", answered or AnsweredLines(), **options)


def checked(lines, answered=None, **options):
    check, match = LineCheck(), matched(answered, **options)
    try:
        known = check_lines(Source(lines), check, match, lambda _: None)
    finally:
        check.close()
    return check.result, match, known


def test_lines_models_and_bad_lines_are_counted():
    """With the number of the first line of each, so that a person can look at it."""
    result = checked([a_message(1), b"bad", a_message(3, "n"), a_message(4, "n"), b'{"path":"/v1/x"}'])[0]
    assert (result.lines, result.bad, result.fault_count) == (5, 2, 2)
    assert str(result.faults[0]).startswith("line 2: the message is not JSON")
    assert result.faults[1].field == "body"
    assert result.models == {"m": ModelUse(count=1, first=1), "n": ModelUse(count=2, first=3)}


def test_names_of_models_are_bounded():
    """Requesters choose them."""
    assert len(checked([a_message(n, f"m{n}") for n in range(MAX_MODELS + 5)])[0].models) == MAX_MODELS


@pytest.mark.parametrize("again", [b'"a"', b'"\\u0061"'])
def test_a_custom_id_that_stands_twice_is_refused(again):
    """However it is spelled; both lines are named."""
    lines = [a_batch_line(b'"b"'), a_batch_line(b'"a"'), a_message(3), a_batch_line(again)]
    with pytest.raises(InputError, match=r"in\.jsonl: line 4, custom_id: 'a' is the custom_id of line 2 too"):
        checked(lines)


def test_lines_without_a_custom_id_are_no_repeats():
    """Messages, bad lines and batch lines whose custom_id is no text."""
    assert checked([a_message(1), a_message(1), a_batch_line(b"7"), a_batch_line(b"7")])[0].lines == 4


def test_an_output_of_the_same_input_fits():
    """Whatever part of it has answers."""
    lines = [a_message(n) for n in range(5)]
    known = checked(lines, answers_to(lines[:3]))[2]
    assert (known.lines, known.answered) == (5, 3)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([a_message(n, "other") for n in range(5)], "is the output of another input"),
        ([a_message(0), b"edited", *map(a_message, range(2, 5))], r"1 of its 5 answers .*\(line 2 has changed\)"),
        ([a_message(n) for n in range(3)], r"2 of its 5 answers .*\(lines are gone\)"),
    ],
    ids=["another input", "an edited line", "lines are gone"],
)
def test_an_output_of_other_lines_is_refused(lines, told):
    """Nothing is mixed; the message says how to go on."""
    answered = answers_to([a_message(n) for n in range(5)])
    with pytest.raises(OutputError, match=told):
        checked(lines, answered)
    match = checked(lines, answered, keeps_changed=True)[1]
    assert [RawLine.of(n, line).line_id in match.ids for n, line in enumerate(lines, 1)] == [True] * len(lines)


def test_an_input_without_any_request_is_refused():
    """With what is wrong with the first line, and what is expected."""
    with pytest.raises(
        InputError, match=r"no line is a request; line 1, prompt: unknown key 'prompt'.*; expected \{\"path\""
    ):
        checked([b'{"prompt":"a"}', b"text"])
    assert checked([])[0].lines == 0


def test_a_damaged_input_is_told():
    """As by the run itself."""
    source = Source([a_message(1)], failure=InputError("in.jsonl: is damaged"))
    with pytest.raises(InputError, match="damaged"):
        check_lines(source, LineCheck(), matched(), lambda _: None)


def test_a_pipe_is_looked_at_as_it_comes():
    """The lines before a fault are given out; then the fault is raised, again and again."""
    lines = [a_batch_line(json.dumps(text).encode()) for text in "abcab"]
    reader = CheckedLines(Source(lines, bunch=10), LineCheck(), matched(name="standard input"))
    assert [line.number for line in reader.read_lines()] == [1, 2, 3]
    for _ in range(2):
        with pytest.raises(InputError, match="standard input: line 4, custom_id: 'a'"):
            reader.read_lines()


def test_a_pipe_with_another_line_than_the_answered_one_is_refused():
    """It is noticed at that line; lines that are the same go through."""
    answered = answers_to([a_message(1), a_message(2)])
    reader = CheckedLines(Source([a_message(1), b"edited"], bunch=10), LineCheck(), matched(answered))
    assert [line.number for line in reader.read_lines()] == [1]
    with pytest.raises(InputError, match=r"line 2 is not the one that out\.jsonl has an answer to"):
        reader.read_lines()
