"""Text that is not ours, as it is shown to people: every character of it visible, and as Markdown no markup."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

REPLACEMENT = "\ufffd"
LINE_BREAKS = ("Zl", "Zp")
# Unicode's Default_Ignorable_Code_Point (DerivedCoreProperties): shown as nothing, whatever their category.
IGNORABLE = (
    (0xAD, 0xAD),
    (0x34F, 0x34F),
    (0x61C, 0x61C),
    (0x115F, 0x1160),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x200B, 0x200F),
    (0x202A, 0x202E),
    (0x2060, 0x206F),
    (0x3164, 0x3164),
    (0xFE00, 0xFE0F),
    (0xFEFF, 0xFEFF),
    (0xFFA0, 0xFFA0),
    (0xFFF0, 0xFFF8),
    (0x1BCA0, 0x1BCA3),
    (0x1D173, 0x1D17A),
    (0xE0000, 0xE0FFF),
)
BLANK = (0x2800, 0xFFF9, 0xFFFA, 0xFFFB)  # Braille without dots; marks of annotations between lines
JOINERS = ("\u200c", "\u200d")
SELECTORS = ("\ufe0e", "\ufe0f")
# Scripts whose letters a joiner changes, by the first word of their characters' names.
JOINED = frozenset(
    [
        "ARABIC",
        "SYRIAC",
        "MONGOLIAN",
        "DEVANAGARI",
        "BENGALI",
        "GURMUKHI",
        "GUJARATI",
        "ORIYA",
        "TAMIL",
        "TELUGU",
        "KANNADA",
        "MALAYALAM",
        "SINHALA",
        "KHMER",
        "MYANMAR",
    ]
)


def visible(text: str) -> str:
    """`text` with every character that would not show, or would reorder the rest, replaced by one that shows.

    Control characters become their pictures, others U+FFFD. Line feeds and tabs stay, and so do what changes the
    character before it: a joiner in a script that has them or in an emoji, an emoji's selector."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(text, place) for place in range(len(text)))


def visible_pieces(pieces: Sequence[str]) -> list[str]:
    """`visible` of a text in pieces, as those pieces: what a joiner does depends on the piece before."""
    shown, ends = visible("".join(pieces)), list(itertools.accumulate(map(len, pieces)))
    return [shown[begin:end] for begin, end in itertools.pairwise((0, *ends))]


def _shown(text: str, place: int) -> str:
    char, code = text[place], ord(text[place])
    if char in "\n\t" or " " <= char <= "~":
        return char
    if code < 0x20 or code == 0x7F:
        return "\u2421" if code == 0x7F else chr(0x2400 + code)
    if unicodedata.category(char) in ("Cc", "Cs", *LINE_BREAKS) or code in BLANK:
        return REPLACEMENT
    ignorable = any(first <= code <= last for first, last in IGNORABLE)
    return REPLACEMENT if ignorable and not _changes(char, text[max(0, place - 2) : place]) else char


def _changes(char: str, before: str) -> bool:
    """Whether an ignorable character has an effect that a reader sees, after the one or two `before` it."""
    if char in SELECTORS:
        return bool(before) and (_is_picture(before[-1]) or before[-1] in "0123456789#*")
    if char not in JOINERS or not before:
        return False
    base = before[:-1][-1:] if before[-1] in SELECTORS else before[-1]
    return bool(base) and (_is_picture(base) or unicodedata.name(base, "").partition(" ")[0] in JOINED)


def _is_picture(char: str) -> bool:
    return unicodedata.category(char) == "So" or "\U0001f3fb" <= char <= "\U0001f3ff"  # the latter are colours of skin


# ---- Markdown --------------------------------------------------------------------------------------------


def plain_markdown(text: str) -> str:
    """`text` in one line of Markdown that shows it as it is: no HTML, link, picture, emphasis or code in it."""
    line = " ".join(visible(text).split())
    line = re.sub(r"[\\`*\[\]~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", line)
    return re.sub(r"&(?=#?\w+;)", "&amp;", line).replace("<", "&lt;")


def markdown_code(text: str) -> str:
    """`text` as code in a line of Markdown, or plainly where it would end the code, or be none."""
    line = " ".join(visible(text).split())
    return plain_markdown(line) if "`" in line or not line else f"`{line}`"


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, one line for each row; what would end a cell or begin HTML is escaped.

    Cells may have markup of their own: foreign text goes through `plain_markdown` first."""
    lines = [f"| {' | '.join(map(_cell, titles))} |", f"|{' --- |' * len(titles)}"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
