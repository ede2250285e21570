"""Foreign text shows every character that it has, and is no Markdown of its own."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from ifguide.display import markdown_code, markdown_table, plain_markdown, visible

# Soft hyphen, joiner of graphemes, marks of direction, embeddings, overrides, isolates, fillers of Hangul, Khmer
# vowels, Mongolian separators, spaces and joiners of no width, operators that do not show, selectors, tags, separators
# of lines, Braille without dots, marks of annotations between lines, of musical beams, and a byte-order mark.
INVISIBLE = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b\u180e\u200b\u200c\u200d\u200e\u200f\u2028\u2029\u202a\u202b\u202c"
    "\u202d\u202e\u2060\u2061\u2062\u2063\u2064\u2065\u2066\u2067\u2068\u2069\u206a\u206f\u2800\u3164\ufe00\ufe0e\ufe0f"
    "\ufeff\uffa0\ufff0\ufff9\ufffb\U0001bca0\U0001d173\U000e0001\U000e0041\U000e007f\U000e0100\x7f\x85\x00\ud800"
)


@pytest.mark.parametrize("char", INVISIBLE, ids=lambda char: f"{ord(char):04x}")
def test_what_would_not_show_or_would_reorder_the_rest_is_replaced(char: str) -> None:
    for text in (char, f"a{char}b", f"{char}b", f"a{char}{char}", f"\u05d0{char}\u05d1", f"^{char}", f"\ufe0f{char}"):
        assert char not in visible(text)
        assert len(visible(text)) == len(text)


SHOWN = "naïve 日本\t\n|שלום|می\u200cخواهم|क्\u200dष|👩🏽\u200d🚀|❤\ufe0f\u200d🔥|1\ufe0f⃣|\u3000a\xa0b"


@pytest.mark.parametrize("text", SHOWN.split("|"))
def test_what_shows_stays(text: str) -> None:
    assert visible(text) == text


def test_controls_are_pictured_and_a_hidden_message_behind_an_emoji_is_not_hidden() -> None:
    assert visible("\x1b[31m\r\x7f") == "␛[31m␍␡"
    message = "".join(chr(0xE0100 + byte) for byte in b"secret")
    assert visible(f"😀{message}") == "😀" + 6 * "\ufffd"
    assert visible("👩\u200d\u200d\u200d") == "👩\u200d\ufffd\ufffd"
    assert visible("a\ufe0f\u200d") == "a\ufffd\ufffd"


# ---- Markdown --------------------------------------------------------------------------------------------

RENDER = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render
PIECES = (
    *("![x](http://a/b.png)", "[x](y)", "[x]", "]: ", "<b>", "</p>", "<!--", "&lt;", "&", "`", "``", "*a*", "__a__"),
    *("~~", "a_b", "_", "|", "\\", "# ", "1. ", "\n\n", " ", "a", "\u202e"),
)
MARKED = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


def text_of(rendered: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", rendered)).strip()


@given(text=MARKED)
@example(text="<img src=x onerror=alert(1)>![p](https://evil/p.png)")
def test_foreign_text_in_markdown_is_the_text_and_nothing_else(text: str) -> None:
    shown = " ".join(visible(text).split())
    for before, tags in (("", {"p"}), ("## ", {"h2"})):
        rendered = RENDER(f"{before}about {plain_markdown(text)}, and more")
        assert set(re.findall(r"</?([a-z0-9]+)", rendered)) == tags
        assert " ".join(text_of(rendered).split()) == " ".join(f"about {shown}, and more".split())
    code = RENDER(f"x {markdown_code(text)} x")
    assert set(re.findall(r"</?([a-z0-9]+)", code)) <= {"p", "code"}
    assert " ".join(text_of(code).split()) == " ".join(f"x {shown} x".split())


@given(text=MARKED)
def test_foreign_text_in_a_table_stays_in_its_cell(text: str) -> None:
    rendered = RENDER(markdown_table(("name", "value"), [(plain_markdown(text), 1234)]))
    assert set(re.findall(r"</?([a-z0-9]+)", rendered)) == {"table", "thead", "tbody", "tr", "th", "td"}
    cells = [text_of(cell) for cell in re.findall(r"<td>(.*?)</td>", rendered, re.DOTALL)]
    assert cells == [" ".join(visible(text).split()), "1,234"]


def test_plain_words_and_names_are_left_as_they_are() -> None:
    for text in ("rudeness", "word_list", "data/own.jsonl", "asian americans", "EMT, 4-gram", "Q&A: 50% > 3"):
        assert plain_markdown(text) == text
