import pytest

from worker.emulators.pubsub.errors import InvalidArgumentError
from worker.emulators.pubsub.filters import MAX_FILTER_BYTES, parse

ATTRIBUTES = {"lang": "en", "name": "com", "iana.org/language_tag": "en-GB", "empty": "", "み": "x"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("attributes:lang", True),
        ("attributes:Lang", False),
        ("attributes:missing", False),
        ("attributes:empty", True),
        ('attributes:"lang"', True),
        ('attributes:"iana.org/language_tag"', True),
        ('attributes:"み"', True),
        (r'attributes:"\u307F"', True),
        (r'attributes:"\U0000307F"', True),
        ('attributes.lang = "en"', True),
        ('attributes.lang="en"', True),
        ('attributes.lang = "EN"', False),
        ('attributes.empty = ""', True),
        ('attributes.missing = ""', False),
        ('attributes."iana.org/language_tag" = "en-GB"', True),
        (r'attributes.lang = "\x65\156"', True),
        ('attributes.lang != "de"', True),
        ('attributes.lang != "en"', False),
        ('attributes.missing != "en"', True),
        ('hasPrefix(attributes.name, "co")', True),
        ('hasPrefix(attributes.name, "om")', False),
        ('hasPrefix(attributes.missing, "")', False),
        ('hasPrefix( attributes."iana.org/language_tag" , "en-" )', True),
        ("NOT attributes:missing", True),
        ("-attributes:missing", True),
        ("-attributes:lang", False),
        ('NOT hasPrefix(attributes.name, "co")', False),
        ('attributes:lang AND attributes.name = "com"', True),
        ("attributes:lang AND attributes:missing", False),
        ("attributes:lang AND NOT attributes:missing", True),
        ("attributes:lang AND -attributes:missing AND attributes:name", True),
        ("attributes:missing OR attributes:lang", True),
        ("attributes:missing OR attributes:gone", False),
        ("attributes:missing OR attributes:gone OR attributes:lang", True),
        ("NOT attributes:lang OR attributes:name", True),
        ("NOT (attributes:lang OR attributes:name)", False),
        ("NOT (attributes:lang AND attributes:missing)", True),
        ("(attributes:lang AND attributes:missing) OR attributes:name", True),
        ("attributes:lang AND (attributes:missing OR attributes:name)", True),
        ("((attributes:lang))", True),
        ("  attributes:lang\n\tAND attributes:name ", True),
    ],
)
def test_documented_expressions_match_as_documented(text: str, expected: bool) -> None:
    """Every form of the documented language selects the messages it describes."""
    assert parse(text)(ATTRIBUTES) is expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bogus ==",
        "attributes",
        "attributes:",
        "attributes:a b",
        "attributes.a",
        'attributes.a == "b"',
        "attributes.a = b",
        "attributes.a = 'b'",
        'attributes.a = "b',
        'attributes:a = "b"',
        'attributes.a.b = "c"',
        "attributes:AND",
        "attributes:iana.org/tag",
        "Attributes:a",
        "lang:en",
        '"attributes":a',
        "attributes:a and attributes:b",
        "attributes:a AND",
        "AND attributes:a",
        "attributes:a OR OR attributes:b",
        "attributes:a AND attributes:b OR attributes:c",
        "attributes:a OR attributes:b AND attributes:c",
        "NOT NOT attributes:a",
        "NOT",
        "not attributes:a",
        "(attributes:a",
        "attributes:a)",
        "()",
        "hasPrefix(attributes.a)",
        'hasPrefix(attributes:a, "b")',
        'hasPrefix(attributes.a, "b"',
        'HASPREFIX(attributes.a, "b")',
        'hasPrefix("attributes".a, "b")',
        r'attributes.a = "\q"',
        r'attributes.a = "\x+1"',
        r'attributes.a = "\UFFFFFFFF"',
        "attributes:a;",
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    """A form that is not documented is an INVALID_ARGUMENT with a reason."""
    with pytest.raises(InvalidArgumentError, match="Invalid filter"):
        parse(text)


def test_a_syntax_error_names_its_place() -> None:
    """The position counts characters from 1."""
    with pytest.raises(InvalidArgumentError, match=r"parentheses when mixed at character 31\."):
        parse("attributes:a AND attributes:b OR attributes:c")


def test_the_limit_is_256_bytes_of_utf8() -> None:
    """A filter of 256 bytes is accepted, one of 257 is not; bytes are counted, not characters."""
    room = MAX_FILTER_BYTES - len('attributes:""')
    assert parse(f'attributes:"{"a" * room}"')({"a" * room: ""})
    with pytest.raises(InvalidArgumentError, match="257 bytes"):
        parse(f'attributes:"{"a" * (room + 1)}"')
    with pytest.raises(InvalidArgumentError, match="maximum is 256"):
        parse(f'attributes:"{"み" * 100}"')


def test_the_deepest_nesting_that_fits_is_parsed() -> None:
    """No filter within the limit exceeds the parser's recursion."""
    depth = (MAX_FILTER_BYTES - len("attributes:a")) // 2
    assert parse("(" * depth + "attributes:a" + ")" * depth)({"a": ""})
