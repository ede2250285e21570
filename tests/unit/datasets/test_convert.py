"""Every converter on a small made-up original in the original's format."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from typing import Any

import pytest

from ifguide.datasets.convert import CONVERTERS, convert
from ifguide.datasets.table import read_table


def table_of(columns: list[str], rows: list[list[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue().encode()


def rows_of(content: bytes) -> list[dict[str, Any]]:
    assert content.endswith(b"\n")
    return [json.loads(line) for line in content.decode().split("\n")[:-1]]


def spans_file(*rows: tuple[str, str]) -> bytes:
    return table_of(["spans", "text"], [list(row) for row in rows])


def test_marked_characters_become_runs_and_the_last_marks_of_a_comment_count() -> None:
    train = spans_file(("[2, 3, 4, 9, 7, 8]", "a dim, dull\nthing"), ("[]", 'said “so”, "twice"'), ("[0]", "oh"))
    trial = spans_file(("[0, 1]", "oh"), ("[1]", "no"))
    rows = rows_of(convert("toxic_spans", {"SemEval2021/data/tsd_train.csv": train, "x/tsd_trial.csv": trial}))
    assert rows == [
        {"id": "tsd-00000", "text": "a dim, dull\nthing", "toxic": True, "toxic_spans": [[2, 5], [7, 10]],
         "split": "train"},
        {"id": "tsd-00001", "text": 'said “so”, "twice"', "toxic": True, "toxic_spans": [], "split": "train"},
        {"id": "tsd-00002", "text": "oh", "toxic": True, "toxic_spans": [[0, 2]], "split": "trial"},
        {"id": "tsd-00003", "text": "no", "toxic": True, "toxic_spans": [[1, 2]], "split": "trial"},
    ]  # fmt: skip


def test_other_comments_are_those_of_no_set() -> None:
    comments = table_of(["comment_id", "comment_text"], [[7, "in train"], [3, "a, new\none"], [5, "in test"], [4, "é"]])
    sets = {"a/tsd_train.csv": spans_file(("[]", "in train")), "a/tsd_test.csv": spans_file(("[1]", "in test"))}
    assert rows_of(convert("other_comments", {"data/comments.csv": comments, **sets})) == [
        {"id": "cc-3", "text": "a, new\none", "toxic": False, "toxic_spans": []},
        {"id": "cc-4", "text": "é", "toxic": False, "toxic_spans": []},
    ]


def test_tweets_keep_their_quotes_lose_their_entities_and_come_once() -> None:
    lines = [
        "id\ttweet\tsubtask_a\tsubtask_b\tsubtask_c",
        '86\t"@USER you &amp; "" they\tOFF\tUNT\tNULL',
        "87\tit's nice 🎈\tNOT\tNULL\tNULL",
        '88\t"@USER you & "" they\tNOT\tNULL\tNULL',
        "89\t@USER fool\tOFF\tTIN\tIND",
    ]
    assert rows_of(convert("olid", {"olid-training-v1.0.tsv": "\n".join([*lines, ""]).encode()})) == [
        {"id": 86, "text": '"@USER you & "" they', "offensive": True, "targeted": False},
        {"id": 87, "text": "it's nice 🎈", "offensive": False, "targeted": None},
        {"id": 89, "text": "@USER fool", "offensive": True, "targeted": True},
    ]


def forum_original(sentences: dict[str, tuple[str, str]]) -> dict[str, bytes]:
    columns = ["file_id", "user_id", "subforum_id", "num_contexts", "label"]
    rows = [[name, 1, 2, 0, label] for name, (label, _) in sentences.items()]
    texts = {f"all_files/{name}.txt": text.encode() for name, (_, text) in sentences.items()}
    return {"annotations_metadata.csv": table_of(columns, rows), **texts}


def test_sentences_of_a_forum_are_in_the_order_of_their_posts() -> None:
    aside = next(str(n) for n in range(1000, 2000) if int(hashlib.sha256(str(n).encode()).hexdigest(), 16) % 5 == 0)
    kept = [str(n) for n in range(1000, 2000) if int(hashlib.sha256(str(n).encode()).hexdigest(), 16) % 5][:2]
    original = forum_original(
        {
            f"{kept[1]}_2": ("noHate", "second \n"),
            f"{kept[1]}_10": ("hate", "tenth"),
            f"{kept[0]}_1": ("relation", "neither"),
            f"{aside}_1": ("hate", "kept aside"),
            f"{kept[0]}_2": ("hate", " first"),
        }
    )
    assert rows_of(convert("forum", original)) == [
        {"id": f"{kept[0]}_2", "post": kept[0], "text": "first", "hateful": True},
        {"id": f"{kept[1]}_2", "post": kept[1], "text": "second", "hateful": False},
        {"id": f"{kept[1]}_10", "post": kept[1], "text": "tenth", "hateful": True},
    ]


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_tweets_are_documents_of_which_all_or_nothing_is_offensive() -> None:
    original = {
        "olid.jsonl": lines_of(
            [{"id": 1, "text": "so \u2028 it is", "offensive": False}, {"id": 2, "text": "a fool", "offensive": True}]
        )
    }
    assert rows_of(convert("other_tweets", original)) == [{"id": 1, "text": "so \u2028 it is", "offensive_spans": []}]
    assert rows_of(convert("offensive_tweets", original)) == [{"id": 2, "text": "a fool", "offensive_spans": [[0, 6]]}]


def test_posts_of_a_forum_are_documents_queries_or_prompts() -> None:
    posts = [str(number) for number in range(1000, 1100)]
    sentences = [("One two three.", False), ("Four five six seven eight nine ten.", True), ("Yes.", True)]
    original = {
        "forum.jsonl": lines_of(
            [{"id": f"{post}_{i}", "post": post, "text": text, "hateful": hateful}
             for post in posts for i, (text, hateful) in enumerate(sentences)]
        )
    }  # fmt: skip
    documents, queries, prompts = (
        rows_of(convert(f"forum_{kind}", original)) for kind in ("posts", "queries", "prompts")
    )
    text = "One two three.\nFour five six seven eight nine ten.\nYes."
    assert {row["text"] for row in documents} == {text}
    assert [text[start:stop] for start, stop in documents[0]["hateful_spans"]] == [sentences[1][0], sentences[2][0]]
    query = {"prompt": {"text": "Four five"}, "continuation": {"text": " six seven eight nine ten.", "hateful": 1.0}}
    assert all(row == query for row in queries + prompts)  # the others are too short
    calm = [{"id": post, "text": "a", "hateful": post % 2 == 0, "hateful_spans": []} for post in range(1404)]
    held_out = rows_of(convert("forum_heldout", {"forum_posts.jsonl": lines_of(calm)}))
    assert held_out == [{"id": 1401, "text": "a"}, {"id": 1403, "text": "a"}]
    assert len(documents) + len(queries) + len(prompts) == len(posts)
    assert min(len(documents), len(queries)) > 20
    assert prompts


def test_hatecheck_cases() -> None:
    columns = ["", "functionality", "case_id", "test_case", "label_gold", "target_ident", "direction", "focus_words"]
    rows = [[0, "derog_h", 12, "I dislike X. ", "hateful", "X", "general", "dislike"],
            [1, "profanity_nh", 13, "Blast, it rains.", "non-hateful", "", "", "blast"]]  # fmt: skip
    assert rows_of(convert("hatecheck", {"test_suite_cases.csv": table_of(columns, rows)})) == [
        {"id": 12, "functionality": "derog_h", "text": "I dislike X.", "hateful": True, "target": "X",
         "focus": "dislike"},
        {"id": 13, "functionality": "profanity_nh", "text": "Blast, it rains.", "hateful": False, "target": "",
         "focus": "blast"},
    ]  # fmt: skip


def test_demonstrations_have_the_label_and_the_group_of_their_file() -> None:
    files = {
        "demonstrations/a/hate_native_american_sentences.txt": b"one \n\ntwo\n",
        "demonstrations/b/hate_muslim.txt": b"three\none",
        "demonstrations/b/neutral_muslim.txt": "fôur\n".encode(),
    }
    assert rows_of(convert("toxigen", files)) == [
        {"text": "one", "hateful": True, "group": "native_american"},
        {"text": "two", "hateful": True, "group": "native_american"},
        {"text": "three", "hateful": True, "group": "muslim"},
        {"text": "fôur", "hateful": False, "group": "muslim"},
    ]


def test_articles_begin_at_their_titles_and_a_formulas_line_is_none() -> None:
    long = "word " * 50
    valid = f" \n = A title ( of 1 ) = \n \n First , {long}\n \n = = Heading = = \n = = = Lower = = = \n Second . \n"
    valid += f" = 1 <unk> k = \n 1 <unk> . \n = Next = \n {long}\n = <unk> for the next round\n q = \n"
    rows = rows_of(convert("wikitext", {"w/valid.txt": valid.encode(), "w/test.txt": f" = Last = \n {long}".encode()}))
    assert rows == [
        {"id": "wt2_valid-0000", "title": "A title ( of 1 )", "text": f"First , {long.strip()}\nSecond .\n"},
        {"id": "wt2_valid-0001", "title": "Next", "text": f"{long.strip()}\nq =\n"},
        {"id": "wt2_test-0002", "title": "Last", "text": f"{long.strip()}\n"},
    ]


def test_json_lines_lose_their_escapes_and_nothing_else() -> None:
    original = b'{"b":"\\u201cso\\u201d \\"x\\"","a":[0.05,null]}\n{"b":"\xc3\xa9\\n"}\n'
    written = convert("json_lines", {"val.jsonl": original})
    assert written.decode() == '{"b": "“so” \\"x\\"", "a": [0.05, null]}\n{"b": "é\\n"}\n'


def test_a_tokenizers_configuration_names_its_special_tokens() -> None:
    model = {"bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 64}
    tokenizer = {
        "added_tokens": [{"id": 0, "content": "<s>"}, {"id": 1, "content": "</s>"}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    }
    files = {"config.json": json.dumps(model).encode(), "tokenizer.json": json.dumps(tokenizer).encode()}
    assert json.loads(convert("tokenizer_config", files)) == {
        "add_prefix_space": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
        "model_max_length": 64,
        "tokenizer_class": "GPTNeoXTokenizer",
    }


def test_a_copy_is_the_original() -> None:
    assert convert("copy", {"a": b"\x00\r\n"}) == b"\x00\r\n"


@pytest.mark.parametrize(
    ("converter", "original"),
    [
        ("toxic_spans", b"span,text\n[1],a\n"),
        ("toxic_spans", b"spans,text\n[1,a\n"),
        ("olid", b"id\ttweet\tsubtask_a\tsubtask_b\n1\tx\tMAYBE\tNULL\n"),
        ("hatecheck", b"\xff\xfe"),
        ("wikitext", b" text before any title \n"),
    ],
)
def test_another_format_is_an_error_that_names_the_original(converter: str, original: bytes) -> None:
    with pytest.raises(ValueError, match=r"some/original: not in the format of '" + converter):
        convert(converter, {"some/original": original})


def test_the_table_names_converters_and_originals_that_exist() -> None:
    outputs = read_table()
    assert {output.converter for output in outputs} == set(CONVERTERS)
    for output in outputs:
        assert output.files or output.origin.members
        digests = [output.result.sha256, output.origin.sha256 or output.result.sha256]
        digests += [contents.sha256 for contents in output.origin.files.values()]
        assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in digests)
        assert output.origin.url.startswith("https://")
        assert output.origin.licence
        assert output.origin.checked
        assert output.result.bytes > 0
