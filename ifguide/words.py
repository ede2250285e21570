"""Words and phrases of a list, found in text of any script, ignoring case.

A word stands between characters that are no letters: "rat" is not in "rats". Scripts that are written without spaces
between words (Chinese, Japanese, Thai, ...), and Korean, whose particles follow a noun without one, have no such edge:
there a word is found wherever its characters stand, and beside such a character any word may begin or end.

Cost: one look-up for each length of word at each place where one may begin; the number of words does not matter.
Words are compared character by character without their case, composed as in NFC or decomposed as in NFD. There is no
stemming, and no other Unicode normalisation.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache

from ifguide.storage import local_copy

Span = tuple[int, int]

UNSPACED = (
    "CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "YI", "JAVANESE",
    "BALINESE", "TAI",
)  # fmt: skip  # first words of their characters' names
FIRST_UNSPACED = "\u0e00"  # Thai comes first of them
MARKED = (range(0x20000), range(0xE0000, 0xE1000))  # where there are marks: planes of ideographs have none


class WordList:
    """The words and phrases of `words`; empty ones are left out."""

    def __init__(self, words: Iterable[str]):
        forms = (unicodedata.normalize(form, word) for word in words for form in ("NFC", "NFD"))
        self.words = frozenset(filter(None, map(_folded, forms)))
        lengths: dict[str, set[int]] = {}
        for word in self.words:
            lengths.setdefault(word[0], set()).add(len(word))
        self._lengths = {first: sorted(of_first, reverse=True) for first, of_first in lengths.items()}
        firsts = "".join(map(re.escape, sorted(lengths)))
        unspaced = "".join(re.escape(first) for first in sorted(lengths) if first >= FIRST_UNSPACED)
        places = [rf"(?<!\w)[{firsts}]", rf"(?<=[{FIRST_UNSPACED}-\U0010ffff])[{firsts}]"]
        places += [f"[{unspaced}]"] if unspaced else []
        self._places = re.compile("|".join(places)) if firsts else None

    def spans(self, text: str) -> list[Span]:
        """Half-open character spans of the words in `text`, in order; of words that begin together the longest."""
        return list(self._spans(text))

    def any_in(self, text: str) -> bool:
        """Whether `text` holds one of the words."""
        return next(self._spans(text), None) is not None

    def _spans(self, text: str) -> Iterator[Span]:
        if self._places is None:
            return
        folded, end = _folded(text), 0
        for place in self._places.finditer(folded):
            start = place.start()
            if start < end or not _bounds(folded[max(0, start - 1) : start], folded[start]):
                continue
            for length in self._lengths[folded[start]]:
                word = folded[start : start + length]
                stop = start + len(word)
                if word in self.words and _bounds(folded[stop : stop + 1], word[-1]):
                    yield start, stop
                    end = stop
                    break


def read_word_list(path: str) -> WordList:
    """The words of a UTF-8 file, local or remote, one word or phrase a line.

    Raises:
        FileNotFoundError, ValueError: no such file, not UTF-8, or no word in it.
    """
    file = local_copy(path)
    if not file.is_file():
        raise FileNotFoundError(f"word list {path!r} does not exist: check the path")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"word list {path}: not UTF-8 ({error}); convert it") from error
    if any("\0" in line for line in lines):
        raise ValueError(f"word list {path}: not text in UTF-8 (it holds bytes of 0, as UTF-16 does); convert it")
    words = WordList(line.strip() for line in lines)
    if not words.words:
        raise ValueError(f"word list {path} is empty: give one word or phrase per line")
    return words


def _folded(text: str) -> str:
    """`text` without case, as many characters as before: one whose other case is longer (ß) keeps its own."""
    folded = text.casefold()
    if len(folded) == len(text):
        return folded
    return "".join(other if len(other := character.casefold()) == 1 else character for character in text)


def _bounds(outside: str, inside: str) -> bool:
    """Whether a word whose first or last character is `inside` may stand beside `outside` ("": the text ends)."""
    return not outside or not is_letter(outside) or _is_unspaced(outside) or _is_unspaced(inside)


@cache
def is_letter(character: str) -> bool:
    """Whether a character is part of a word: letters, digits, '_', and the marks that belong to a letter."""
    return character == "_" or character.isalnum() or _is_mark(character)


@cache
def mark_ranges() -> str:
    """The marks that belong to a letter (Unicode's categories M), for a character class of a regular expression.

    Python's `\\w` has none of them, and without them a word of Hindi, Thai or vocalised Arabic falls apart."""
    groups = itertools.groupby(map(chr, itertools.chain(*MARKED)), _is_mark)
    marks = [list(group) for is_mark, group in groups if is_mark]
    return "".join(f"{run[0]}-{run[-1]}" for run in marks)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


@cache
def _is_unspaced(character: str) -> bool:
    return re.split("[ -]", unicodedata.name(character, ""), maxsplit=1)[0] in UNSPACED
