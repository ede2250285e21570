"""ifguide.words: where a word begins and ends in any script, and lists of any length."""

import re
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifguide.words import WordList, is_letter, mark_ranges, read_word_list


def words_in(text: str, words: list[str]) -> list[str]:
    return [text[start:end] for start, end in WordList(words).spans(text)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a$$"], ["a$$", "A$$"]),
        (["rat", "rat race"], ["rat race", "rat"]),
        (["", "rat"], ["rat", "rat"]),
        ([""], []),
        (["r.t"], []),
        (["écrit"], ["Écrit"]),
    ],
)
def test_words_may_have_marks_spaces_or_accents_and_the_longest_wins(words: list[str], expected: list[str]) -> None:
    assert words_in("An a$$ (A$$), a ba$$ in a rat race; a rat. Écrit, rats.", words) == expected


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("你真是个笨蛋啊", ["笨蛋"], ["笨蛋"]),
        ("おまえはばかだね", ["ばか"], ["ばか"]),
        ("너는 바보야", ["바보"], ["바보"]),
        ("เขาเป็นคนโง่มาก", ["โง่"], ["โง่"]),
        ("他是idiot吗, idiots", ["idiot"], ["idiot"]),  # a Latin word inside such text has its own edges
        ("これはBAKAです", ["baka"], ["BAKA"]),
        ("कुत्ता", ["कुत्त"], []),  # the vowel sign belongs to the word
        ("ΣΟΦΟΣ σοφος", ["σοφος"], ["ΣΟΦΟΣ", "σοφος"]),
        ("Straße STRASSE", ["straße"], ["Straße"]),
        ("İdiot idiot", ["idiot"], ["idiot"]),  # its lower case is two characters: places must not shift
        ("អ្នកល្ងង់ណាស់", ["ល្ងង់"], ["ល្ងង់"]),
        ("မင်းမိုက်တယ်", ["မိုက်"], ["မိုက်"]),
        ("caf\u00e9 cafe\u0301 cafe", ["caf\u00e9"], ["caf\u00e9", "cafe\u0301"]),
        (
            "\ubc14\ubcf4\uc57c \u1107\u1161\u1107\u1169",
            ["\u1107\u1161\u1107\u1169"],
            ["\ubc14\ubcf4", "\u1107\u1161\u1107\u1169"],
        ),
        ("an_idiot idiot2 idiot", ["idiot"], ["idiot"]),
    ],
)
def test_words_are_found_in_every_script(text: str, words: list[str], expected: list[str]) -> None:
    assert words_in(text, words) == expected


@given(st.text("ab $_B", max_size=30), st.lists(st.text("ab $", min_size=1, max_size=4), max_size=5))
def test_spaced_scripts_give_what_a_pattern_of_all_words_gives(text: str, words: list[str]) -> None:
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"
    expected = [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)] if words else []
    assert WordList(words).spans(text) == expected


def test_a_list_of_many_words_costs_as_much_as_a_short_one() -> None:
    text = "the quick brown fox jumps over the lazy dog and the idiot " * 2000
    seconds = {}
    for count in (50, 100_000):
        words = WordList(["idiot", *(f"word{i:06d}" for i in range(count))])
        started = time.process_time()
        assert len(words.spans(text)) == 2000
        seconds[count] = time.process_time() - started
    assert seconds[100_000] < 3 * seconds[50] + 0.1


def test_a_file_of_words_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes("idiot\r\n\n笨蛋\n".encode("utf-8-sig"))
    assert read_word_list(str(path)).words == {"idiot", "笨蛋"}
    path.write_bytes("idée".encode("latin-1"))
    with pytest.raises(ValueError, match=r"words.txt: not UTF-8"):
        read_word_list(str(path))
    for encoding in ("utf-16", "utf-16-le"):
        path.write_bytes("idiot\n".encode(encoding))
        with pytest.raises(ValueError, match=r"words.txt: not (text in )?UTF-8"):
            read_word_list(str(path))


def test_a_letter_is_what_python_calls_one_or_a_mark() -> None:
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    marks = [character for character in every if unicodedata.category(character).startswith("M")]
    assert re.findall(f"[{mark_ranges()}]", every) == marks
    assert re.findall(rf"[\w{mark_ranges()}]", every) == [
        character for character in every if is_letter.__wrapped__(character)
    ]
