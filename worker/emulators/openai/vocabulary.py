"""
The simulated model's vocabulary: 256 words, each one token, so that one pseudo-random byte is one token.

A sixteenth of the words is not ASCII, on purpose: an answer of usual length then contains characters of two, three and
four UTF-8 bytes, which is what cuts of a stream must be rehearsed with.
"""

import re

WORDS: tuple[str, ...] = tuple(
    """
    a about above across after again air all along also always an and animal any are art as ask at away back
    base be because been before begin behind below best between big bird blue boat body book both box bridge
    bright bring build but by call came can carry change child circle city clear close cloud coast cold colour
    come common copper could country course cover dark day deep did different do door down draw dream dry each
    early earth east easy edge end enough even evening every eye face fact fall family far farm fast few field
    find fire first fish five flow follow food for forest form found four free friend from full garden gave give
    glass go gold good grass great green ground group grow had half hand hard has have head hear heat help here
    high hill hold home horse hour house how idea if in inside iron is island it just keep kind know lake land
    language large last later learn leave left letter level light like line list little long look made make map
    mark metal might mile milk moon more morning most mountain move much music must name near never new next
    night north not note now number ocean of off old on once one open or order other our out over own page paper
    part path piece place plan plant play point power press rain read red rest river road rock naïve café Größe
    señor żółw Прага река 日本 東京 漢字 한국 θάλασσα façade 🙂 🚀 𝄞
    """.split()  # noqa: SIM905 - a list of 256 literals would fill the screen
)
_SPACED = tuple(" " + word for word in WORDS)
_CAPITAL = tuple(" " + word[0].upper() + word[1:] for word in WORDS)
SENTENCE_WORDS = 9
"""A full stop after this many words: prose has 15 to 20, but short answers should show one too."""

TOKEN = re.compile(r"\s*\w+|\s*[^\w\s]|\s+")
"""How text that was not made of `WORDS` is cut into tokens: a word or a mark with the space before it."""


def spell(data: bytes) -> list[str]:
    """Return one token per byte; joined they read as sentences: capitals, full stops, single spaces."""
    tokens = [_SPACED[byte] for byte in data]
    for place in range(0, len(data), SENTENCE_WORDS):
        tokens[place] = _CAPITAL[data[place]] if place else _CAPITAL[data[place]].lstrip()
    for place in range(SENTENCE_WORDS - 1, len(data), SENTENCE_WORDS):
        tokens[place] += "."
    if len(data) % SENTENCE_WORDS:
        tokens[-1] += "."
    return tokens


def cut(text: str) -> list[str]:
    """Return the tokens of any text; joined they are the text again, an empty text has none."""
    return TOKEN.findall(text)


def count_tokens(text: str) -> int:
    """Return about how many tokens a text has: a quarter of its UTF-8 bytes, at least 1 unless it is empty."""
    return (len(text.encode("utf-8", "surrogatepass")) + 3) // 4
