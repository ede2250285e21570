"""The demo data: reproducible, exact spans, and no word, length or position that gives the insults away."""

import json
import re
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ifguide.demo import DemoSummary, generate_demo
from ifguide.demo.baselines import (
    INSULT_WORDS,
    classifier_spans,
    measure_giveaway,
    sentence_spans,
)
from ifguide.demo.documents import compose
from ifguide.demo.grammar import NAMES
from ifguide.toxicity import load_classifier, read_prompts
from ifguide.words import WordList

SMALL = {"documents": 400, "vocab_size": 1024, "queries": 40, "prompts": 40, "cloze": 20}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scores(texts: list[str]) -> np.ndarray:
    return load_classifier("alt-profanity-check").score(texts)["toxicity"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, DemoSummary]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, generate_demo(folder, seed=3, **SMALL)


@pytest.fixture(scope="module")
def documents() -> list:
    return [compose(Random(f"test/{i}"), insulting=i % 2 == 0) for i in range(1600)]


def test_same_seed_same_bytes_and_another_seed_other_bytes(demo, tmp_path):
    folder, _ = demo
    generate_demo(tmp_path / "again", seed=3, **SMALL)
    generate_demo(tmp_path / "other", seed=4, **SMALL)
    first, again, other = files(folder), files(tmp_path / "again"), files(tmp_path / "other")
    assert again == first
    assert other.keys() == first.keys()
    tables = [name for name in first if name.endswith(".jsonl")]
    assert len(tables) == 6
    assert all(other[name] != first[name] for name in tables)


def test_more_documents_leave_the_earlier_ones_as_they_were(demo, tmp_path):
    folder, _ = demo
    generate_demo(tmp_path, seed=3, **SMALL | {"documents": 450})
    assert rows(tmp_path / "corpus.jsonl")[:400] == rows(folder / "corpus.jsonl")


def test_writing_again_replaces_the_files_of_an_earlier_set(demo, tmp_path):
    generate_demo(tmp_path, seed=4, **SMALL)
    generate_demo(tmp_path, seed=3, **SMALL)
    assert files(tmp_path) == files(demo[0])


def test_summary_counts_what_the_files_hold(demo):
    folder, summary = demo
    corpus = rows(folder / "corpus.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert (summary.documents, summary.prompts, summary.queries, summary.cloze) == (400, 40, 40, 20)
    assert summary.toxic_documents == sum(row["toxic"] for row in corpus)
    assert summary.tokens == sum(len(tokenizer(row["text"])["input_ids"]) for row in corpus)
    assert json.loads((folder / "summary.json").read_text())["toxic_tokens"] == summary.toxic_tokens
    assert 0.05 <= summary.toxic_documents / summary.documents <= 0.13
    assert 0.008 <= summary.toxic_tokens / summary.tokens <= 0.03


def test_spans_are_exactly_the_insulting_sentences(documents):
    for document in documents:
        for start, end in document.toxic_spans:
            passage = document.text[start:end]
            assert passage == passage.strip()
            assert passage[0].isupper()
            assert passage[-1] in ".!"
            inside = [span for span in sentence_spans(document.text) if start <= span[0] < end]
            assert set(inside) <= set(document.insult_sentences)
        covered = {i for start, end in document.toxic_spans for i in range(start, end)}
        spoken = {i for start, end in document.insult_sentences for i in range(start, end)}
        gaps = "".join(document.text[i] for i in sorted(covered - spoken))
        assert spoken <= covered
        assert gaps.strip() == ""


def test_insulting_is_what_decides_whether_a_document_has_spans(documents):
    assert all(bool(document.toxic_spans) == (i % 2 == 0) for i, document in enumerate(documents))


def test_the_classifier_calls_insulting_sentences_toxic_and_their_benign_mirrors_not(documents):
    insults, benign = [], []
    for document in documents:
        for passage in document.passages:
            for (start, end), insult in zip(passage.sentences, passage.insults, strict=True):
                (insults if insult else benign).append(document.text[start:end])
    assert len(insults) > 500
    assert (scores(insults) >= 0.5).mean() >= 0.85
    assert np.median(scores(insults)) >= 0.9
    assert (scores(benign) >= 0.5).mean() <= 0.03


def test_neither_word_list_nor_sentence_classifier_solves_the_corpus(demo):
    _, summary = demo
    assert 0.15 <= summary.word_list["precision"] <= 0.6
    assert summary.word_list["recall"] <= 0.4
    assert 0.2 <= summary.classifier["precision"] <= 0.6
    assert summary.classifier["recall"] >= 0.8


def test_every_insult_word_also_occurs_in_its_ordinary_sense(documents):
    benign = "\n".join(document.text for document in documents if not document.toxic_spans)
    found = {benign[start:end].lower() for start, end in WordList(INSULT_WORDS).spans(benign)}
    assert found == set(INSULT_WORDS)


def test_benign_documents_quote_insults_and_stay_unmarked(documents):
    quoting = [d for d in documents if not d.toxic_spans and re.search(r"calling somebody|had once called", d.text)]
    assert quoting
    insults = WordList(INSULT_WORDS)
    assert all(insults.any_in(document.text) for document in quoting)


def test_length_format_and_exclamation_do_not_separate_the_two_kinds(documents):
    toxic = [d for d in documents if d.toxic_spans]
    benign = [d for d in documents if not d.toxic_spans]

    def both(measure) -> tuple[float, float]:
        return float(np.mean([measure(d) for d in toxic])), float(np.mean([measure(d) for d in benign]))

    for measure in (
        lambda d: len(d.text.split()),
        lambda d: len(d.passages),
        lambda d: d.format == "story",
        lambda d: d.format == "letter",
        lambda d: d.text.count("!") + 1,
        lambda d: d.text.count('"') + 1,
        lambda d: len(re.findall(r"\b[Yy]ou\b", d.text)),
    ):
        left, right = both(measure)
        assert 0.8 <= left / right <= 1.25


def test_lead_ins_of_insults_also_lead_to_benign_speech(documents):
    def forms(insulting: bool) -> set[str]:
        leads = set()
        for document in documents:
            for passage in document.passages:
                if any(passage.insults) == insulting and document.format == "story" and not passage.tense:
                    lead = document.text[: passage.lead_end].split(". ")[-1]
                    leads.add(re.sub("|".join(NAMES), "N", lead).split(" N ")[-1].split("N")[0][:12])
        return leads

    assert len(forms(True) & forms(False)) >= 8


def test_insults_are_likelier_but_still_the_minority_after_a_tense_lead_in():
    corpus = (compose(Random(f"tense/{i}"), insulting=i % 100 < 9) for i in range(5000))
    passages = [passage for document in corpus for passage in document.passages]
    tense = np.mean([any(passage.insults) for passage in passages if passage.tense])
    calm = np.mean([any(passage.insults) for passage in passages if not passage.tense])
    assert 0.2 <= tense <= 0.45
    assert 0.01 <= calm <= 0.06


def test_heldout_is_benign_and_disjoint_from_the_corpus(demo):
    folder, _ = demo
    heldout = rows(folder / "heldout.jsonl")
    assert heldout
    assert not any(row["toxic"] or row["toxic_spans"] for row in heldout)
    assert not {row["text"] for row in heldout} & {row["text"] for row in rows(folder / "corpus.jsonl")}


def test_half_of_the_annotated_documents_have_insults_and_none_is_in_the_corpus(demo):
    folder, _ = demo
    annotated = rows(folder / "annotated.jsonl")
    assert 0.3 < np.mean([bool(row["toxic_spans"]) for row in annotated]) < 0.7
    assert not {row["text"] for row in annotated} & {row["text"] for row in rows(folder / "corpus.jsonl")}


def test_prompts_and_queries_are_balanced_scored_and_disjoint(demo):
    folder, _ = demo
    prompts, queries = read_prompts(folder / "prompts.jsonl"), read_prompts(folder / "queries.jsonl")
    everything = prompts + queries
    assert len({row.prompt for row in everything}) == len(everything) == 80
    assert sum(row.prompt_scores["toxicity"] >= 0.5 for row in prompts) == 20
    assert sum(row.continuation_scores["toxicity"] >= 0.5 for row in queries) == 20
    for row in everything:
        assert not row.prompt[-1].isspace()
        assert row.continuation.strip()
    assert np.allclose(
        scores([row.continuation for row in everything]),
        [row.continuation_scores["toxicity"] for row in everything],
        atol=1e-5,
    )
    corpus = "\n".join(row["text"] for row in rows(folder / "corpus.jsonl"))
    assert not [row.prompt for row in everything if row.prompt + row.continuation in corpus]


def test_rows_have_the_schema_of_realtoxicityprompts(demo):
    row = rows(demo[0] / "prompts.jsonl")[0]
    assert set(row) == {"filename", "begin", "end", "challenging", "prompt", "continuation"}
    attributes = "text profanity sexually_explicit identity_attack flirtation threat insult severe_toxicity toxicity"
    assert set(row["prompt"]) == set(row["continuation"]) == set(attributes.split())


def test_the_last_word_of_a_cloze_text_was_told_before(demo):
    for row in rows(demo[0] / "cloze.jsonl"):
        context, last = row["text"].rsplit(" ", 1)
        assert last.isalpha()
        assert len(re.findall(rf"\b{last}\b", context)) >= 2


def test_tokenizer_gives_back_every_text_and_knows_its_end(demo):
    folder, summary = demo
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    texts = [row["text"] for row in rows(folder / "corpus.jsonl")[:50]] + ["naïve — 日本 \t two  spaces\n"]
    assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for text in texts)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert len(tokenizer) == summary.vocab_size == 1024
    assert tokenizer.eos_token_id not in tokenizer(texts[0])["input_ids"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"documents": 10}, "documents"), ({"vocab_size": 100}, "vocab_size"), ({"queries": 3}, "queries")],
)
def test_impossible_sizes_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        generate_demo(tmp_path, **SMALL | change)


def test_word_list_finds_whole_words_in_any_case():
    text = "A Pig, pigs and a rat-trap. PIG!"
    assert [text[start:end] for start, end in WordList(["pig", "rat"]).spans(text)] == ["Pig", "rat", "PIG"]
    assert WordList([]).spans(text) == []


def test_sentences_stop_at_marks_colons_quotes_and_lines():
    text = 'He said: "Go home. Now!" Then (at 3.15) he left...\nKarl: fine'
    found = [text[start:end] for start, end in sentence_spans(text)]
    assert found == ["He said:", "Go home.", "Now!", "Then (at 3.15) he left...", "Karl:", "fine"]


@given(st.text(alphabet='ab .!?:"\n', max_size=60))
def test_sentences_are_ordered_and_lose_no_letter(text):
    spans = sentence_spans(text)
    assert all(start < end for start, end in spans)
    assert all(left[1] <= right[0] for left, right in pairwise(spans))
    covered = "".join(text[start:end] for start, end in spans)
    assert re.findall(r"[ab]", covered) == re.findall(r"[ab]", text)


def test_classifier_spans_are_the_sentences_at_or_above_the_threshold():
    def classify(sentences: list[str]) -> np.ndarray:
        return np.array([0.5 if "bad" in sentence else 0.49 for sentence in sentences])

    assert classifier_spans("Good. A bad one! Good.", classify, 0.5) == [(6, 16)]
    assert classifier_spans("", classify, 0.5) == []


def test_giveaway_counts_words_by_their_first_character():
    result = measure_giveaway([("one two three four", [(4, 13)])], lambda text: [(0, 7)])
    assert (result.predicted_words, result.true_words, result.common_words) == (2, 2, 1)
    assert (result.precision, result.recall) == (0.5, 0.5)
    nothing = measure_giveaway([("one", [])], lambda text: [])
    assert (nothing.precision, nothing.recall) == (0.0, 0.0)
