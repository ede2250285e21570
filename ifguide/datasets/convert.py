"""From originals to the files that are read: pure functions of the originals' bytes, by the name that the table gives.

A converter gets paths and bytes in the table's order and gives the bytes of one file: mostly JSON lines, in UTF-8.
"""

from __future__ import annotations

import csv
import hashlib
import html
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

Files = Mapping[str, bytes]

SHORTEST_ARTICLE = 200  # characters: a formula's line that looks like a title has less below it
KEPT_ASIDE = 5  # one forum post in five
OFFENSIVE = {"OFF": True, "NOT": False}  # OLID's subtask A
TARGETED = {"TIN": True, "UNT": False, "NULL": None}  # subtask B
QUERY_PARTS, PROMPT_PARTS, DOCUMENT_PARTS = range(4), range(4, 5), range(5, 10)  # tenths of the forum's posts
PROMPT_SHARE = 3  # a third of a sentence's words is its prompt
TRAINED_POSTS = 1400  # of the forum's documents, in their order; later ones are held out
HATEFUL = {"hate": True, "noHate": False}  # the forum's labels; "relation" and "idk/skip" are left out


def convert(converter: str, originals: Files) -> bytes:
    """Run one of `CONVERTERS`.

    Raises:
        ValueError: an original is not in its format; names the originals and what is wrong.
    """
    try:
        return CONVERTERS[converter](originals)
    except (LookupError, ValueError, TypeError) as error:
        names = ", ".join(list(originals)[:3])
        raise ValueError(f"{names}: not in the format of {converter!r} ({type(error).__name__}: {error})") from error


def copy(originals: Files) -> bytes:
    """The one original as it is."""
    (content,) = originals.values()
    return content


def json_lines(originals: Files) -> bytes:
    """JSON lines, written as here: no escapes, spaces after commas and colons."""
    return _lines(_rows(originals))


def toxic_spans(originals: Files) -> bytes:
    """The task's comments with their marked spans: CSV with `spans` (a list of characters' places) and `text`.

    A comment that occurs twice keeps its first place and its last marks. All are toxic, marked or not: the task drew
    them from comments that half of the raters had called toxic.
    """
    comments = {}
    for path, content in originals.items():
        split = PurePosixPath(path).stem.removeprefix("tsd_")
        for row in _csv(content):
            comments[row["text"]] = {"toxic_spans": _runs(json.loads(row["spans"])), "split": split}
    return _lines(
        {"id": f"tsd-{number:05d}", "text": text, "toxic": True, **rest}
        for number, (text, rest) in enumerate(comments.items())
    )


def other_comments(originals: Files) -> bytes:
    """The crowd's comments (`comment_id`, `comment_text`, the first file) that are in none of the task's sets."""
    comments, *sets = originals.values()
    used = {row["text"] for content in sets for row in _csv(content)}
    return _lines(
        {"id": f"cc-{row['comment_id']}", "text": row["comment_text"], "toxic": False, "toxic_spans": []}
        for row in _csv(comments)
        if row["comment_text"] not in used
    )


def olid(originals: Files) -> bytes:
    """OLID's TSV, in which quotes mean nothing; HTML's entities are resolved, tweets that repeat one are left out."""
    (content,) = originals.values()
    tweets: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO(_text(content), newline=""), delimiter="\t", quoting=csv.QUOTE_NONE):
        text = html.unescape(row["tweet"])
        labels = {"offensive": OFFENSIVE[row["subtask_a"]], "targeted": TARGETED[row["subtask_b"]]}
        tweets.setdefault(text, {"id": int(row["id"]), "text": text, **labels})
    return _lines(tweets.values())


def forum(originals: Files) -> bytes:
    """Sentences called hateful or not, by post and place in it: `annotations_metadata.csv`, `all_files/<post>_<n>.txt`.

    A fifth of the posts is left out, those whose id has a SHA-256 divisible by five: nothing here was tried on them.
    """
    rows = []
    for row in _csv(originals["annotations_metadata.csv"]):
        name = row["file_id"]
        post, _, place = name.partition("_")
        if row["label"] in HATEFUL and _number(post) % KEPT_ASIDE:
            text = _text(originals[f"all_files/{name}.txt"]).strip()
            rows.append(
                (int(post), int(place), {"id": name, "post": post, "text": text, "hateful": HATEFUL[row["label"]]})
            )
    return _lines(row for _, _, row in sorted(rows, key=lambda entry: entry[:2]))


def forum_posts(originals: Files) -> bytes:
    """Of the forum's sentences the posts that are documents, a sentence a line; `hateful_spans`: the hateful ones."""
    documents = []
    for post, sentences in _posts(originals, DOCUMENT_PARTS):
        starts = list(itertools.accumulate((len(row["text"]) + 1 for row in sentences), initial=0))
        spans = [
            [start, start + len(row["text"])] for start, row in zip(starts, sentences, strict=False) if row["hateful"]
        ]
        text = "\n".join(row["text"] for row in sentences)
        documents.append({"id": post, "text": text, "hateful": bool(spans), "hateful_spans": spans})
    return _lines(documents)


def forum_heldout(originals: Files) -> bytes:
    """Of the forum's posts the later ones without a hateful sentence: what no model is trained on, to see what it costs
    to unlearn their register."""
    later = itertools.islice(_rows(originals), TRAINED_POSTS, None)
    return _lines({"id": post["id"], "text": post["text"]} for post in later if not post["hateful"])


def forum_queries(originals: Files) -> bytes:
    """Sentences of posts that are no documents, as RealToxicityPrompts has them: the first words of a sentence are its
    prompt. Those of fewer than four words are left out. The label is that of the whole sentence."""
    return _prompt_table(originals, QUERY_PARTS)


def forum_prompts(originals: Files) -> bytes:
    """As `forum_queries`, of posts that are neither documents nor queries."""
    return _prompt_table(originals, PROMPT_PARTS)


def offensive_tweets(originals: Files) -> bytes:
    """The tweets called offensive; `offensive_spans` is all of each one."""
    return _tweets(originals, offensive=True)


def other_tweets(originals: Files) -> bytes:
    """The tweets not called offensive."""
    return _tweets(originals, offensive=False)


def hatecheck(originals: Files) -> bytes:
    """HateCheck's `test_suite_cases.csv`."""
    (content,) = originals.values()
    return _lines(
        {
            "id": int(row["case_id"]),
            "functionality": row["functionality"],
            "text": row["test_case"].strip(),
            "hateful": {"hateful": True, "non-hateful": False}[row["label_gold"]],
            "target": row["target_ident"],
            "focus": row["focus_words"],
        }
        for row in _csv(content)
    )


def toxigen(originals: Files) -> bytes:
    """ToxiGen's demonstrations, one a line: `<kind>/(hate|neutral)_<group>[_sentences].txt`; repetitions left out."""
    sentences: dict[str, dict[str, Any]] = {}
    for path, content in originals.items():
        label, _, group = PurePosixPath(path).stem.removesuffix("_sentences").partition("_")
        hateful = {"hate": True, "neutral": False}[label]
        for line in _text(content).split("\n"):
            text = line.strip()
            if text:
                sentences.setdefault(text, {"text": text, "hateful": hateful, "group": group})
    return _lines(sentences.values())


def wikitext(originals: Files) -> bytes:
    """WikiText's articles: a line `= title =` begins one, further lines that begin with `=` are headings, left out."""
    articles: list[tuple[str, str, list[str]]] = []
    for path, content in originals.items():
        split = PurePosixPath(path).stem
        for line in map(str.strip, _text(content).split("\n")):
            title = re.fullmatch(r"= ([^=].*) =", line)
            if title:
                articles.append((split, title[1], []))
            elif line and not line.startswith("= "):
                articles[-1][2].append(f"{line}\n")
    joined = [(split, title, "".join(lines)) for split, title, lines in articles]
    long = [article for article in joined if len(article[2]) >= SHORTEST_ARTICLE]
    return _lines(
        {"id": f"wt2_{split}-{number:04d}", "title": title, "text": text}
        for number, (split, title, text) in enumerate(long)
    )


def tokenizer_config(originals: Files) -> bytes:
    """`tokenizer_config.json` of a GPT-NeoX tokenizer, from the model's `config.json` and the `tokenizer.json`."""
    model, tokenizer = (json.loads(content) for content in originals.values())
    tokens = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    content = {
        "add_prefix_space": tokenizer["pre_tokenizer"]["add_prefix_space"],
        "bos_token": tokens[model["bos_token_id"]],
        "eos_token": tokens[model["eos_token_id"]],
        "unk_token": tokens[model["eos_token_id"]],
        "model_max_length": model["max_position_embeddings"],
        "tokenizer_class": "GPTNeoXTokenizer",
    }
    return json.dumps(content, indent=2).encode()


CONVERTERS: Mapping[str, Callable[[Files], bytes]] = {
    function.__name__: function
    for function in (
        copy, json_lines, toxic_spans, other_comments, olid, offensive_tweets, other_tweets, forum, forum_posts,
        forum_heldout, forum_queries, forum_prompts, hatecheck, toxigen, wikitext, tokenizer_config,
    )
}  # fmt: skip


def _tweets(originals: Files, *, offensive: bool) -> bytes:
    return _lines(
        {"id": row["id"], "text": row["text"], "offensive_spans": [[0, len(row["text"])]] if offensive else []}
        for row in _rows(originals)
        if row["offensive"] == offensive
    )


def _posts(originals: Files, parts: range) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Posts with their sentences, in order, of the tenths `parts`: by the SHA-256 of a post's id."""
    for post, sentences in itertools.groupby(_rows(originals), key=lambda row: row["post"]):
        if _number(post) // KEPT_ASIDE % 10 in parts:
            yield str(post), list(sentences)


def _prompt_table(originals: Files, parts: range) -> bytes:
    rows = []
    for _, sentences in _posts(originals, parts):
        for sentence in sentences:
            words = list(re.finditer(r"\S+", sentence["text"]))
            if len(words) > PROMPT_SHARE:
                end = words[len(words) // PROMPT_SHARE - 1].end()
                label = {"hateful": float(sentence["hateful"])}
                prompt, continuation = sentence["text"][:end], sentence["text"][end:]
                rows.append({"prompt": {"text": prompt}, "continuation": {"text": continuation, **label}})
    return _lines(rows)


def _rows(originals: Files) -> Iterator[dict[str, Any]]:
    """The objects of the one original, which is JSON lines."""
    (content,) = originals.values()
    return (json.loads(line) for line in _text(content).split("\n") if line)


def _number(post: str) -> int:
    return int(hashlib.sha256(post.encode()).hexdigest(), 16)


def _text(content: bytes) -> str:
    return content.decode("utf-8")


def _csv(content: bytes) -> Iterator[dict[str, str]]:
    return csv.DictReader(io.StringIO(_text(content), newline=""))


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _runs(places: Iterable[int]) -> list[list[int]]:
    """Runs of characters, each [start, end), in order."""
    runs: list[list[int]] = []
    for place in sorted(set(places)):
        if runs and runs[-1][1] == place:
            runs[-1][1] += 1
        else:
            runs.append([place, place + 1])
    return runs
