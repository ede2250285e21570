"""What the localisation benchmark computes, by hand; the whole of it runs in `bench/localise.py --quick`."""

import numpy as np
import pytest
from profanity_check import predict_prob
from sklearn.metrics import average_precision_score
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from bench.common.behaviours import BEHAVIOURS, SPANS, read_behaviour
from bench.common.word_rivals import (
    count_marks,
    mark_shares,
    marked_words,
    sentence_means,
    sentence_scores,
    spread,
    word_rivals,
)
from bench.localise import (
    bootstrap,
    encode_document,
    mask_precision,
    off_by_one,
)
from tests.real_text import DATA, needs_real_text

WORDS = ["<eos>", "you", "are", "a", "dolt", "kind", "fool"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


def test_tokens_that_overlap_a_marked_span_are_marked_and_the_eos_never_is(tokenizer: PreTrainedTokenizerFast) -> None:
    document = {"text": "you are a dolt", SPANS: [[10, 12]]}
    tokens, offsets, marked = encode_document(tokenizer, document)
    assert tokens.tolist() == [0, 1, 2, 3, 4]
    assert offsets[4] == (10, 14)
    assert marked.tolist() == [False, False, False, False, True]


def test_one_off_takes_what_speaks_of_the_next_token() -> None:
    assert off_by_one(np.array([0.0, 1.0, 2.0, 3.0])).tolist() == [1.0, 2.0, 3.0, 0.0]


def test_spread_covers_what_overlaps_and_not_what_touches() -> None:
    assert spread([(0, 0), (0, 3), (3, 5), (5, 9)], [(3, 5)], 0.5).tolist() == [0.0, 0.0, 0.5, 0.0]


def test_word_list_needs_enough_uses_and_the_share_of_marked_ones() -> None:
    marked, plain = {"text": "fool dolt", SPANS: [[0, 4]]}, {"text": "fool dolt"}
    assert marked_words(*count_marks([marked] * 3 + [plain] * 2)) == ["fool"]
    assert marked_words(*count_marks([marked] * 4)) == []  # four uses
    assert marked_words(*count_marks([marked] * 2 + [plain] * 3)) == []  # two of five


def test_what_words_alone_find_is_ranked_as_well_as_listed() -> None:
    others = [{"text": "fool dolt", SPANS: [[0, 4]]}] * 3 + [{"text": "fool dolt"}] * 2
    uses, marked = count_marks(others)
    assert mark_shares(uses, marked) == pytest.approx({"fool": (3 + 5 * 0.3) / 10, "dolt": (0 + 5 * 0.3) / 10})
    texts, offsets = [{"text": "Fool dolt new."}], [[(0, 0), (0, 4), (5, 9), (10, 13), (13, 14)]]

    def classify(words: list[str]) -> np.ndarray:
        return np.array([{"Fool": 0.9, "dolt": 0.4}.get(word, 0.2) for word in words])

    found = {name: scores[0].tolist() for name, scores in word_rivals(texts, others, offsets, classify).items()}
    assert found["word_marks"] == pytest.approx([0, 0.45, 0.15, 0.3, 0])
    assert found["word_list"] == [0, 1, 0, 0, 0]
    assert found["word_probability"] == pytest.approx([0, 0.9, 0.4, 0.2, 0])
    assert found["classified_words"] == [0, 1, 0, 0, 0]
    assert found["classifier"] == pytest.approx([0, 0.2, 0.2, 0.2, 0.2])


def test_the_mean_of_a_sentence_is_that_of_its_tokens() -> None:
    offsets = [(0, 0), (0, 1), (2, 3), (3, 4), (5, 6), (6, 7)]
    means = sentence_means("a b. c.", offsets, np.array([9.0, 1, 2, 3, 5, 6]))
    assert means.tolist() == [9.0, 2, 2, 2, 5.5, 5.5]


def test_interval_of_a_perfect_score_is_one_and_its_ratio_the_inverse_of_the_other() -> None:
    truth = [np.array([0, 0, 1, 0, 1])] * 6
    other = [np.array([0.0, 4.0, 3.0, 2.0, 1.0])] * 6
    scores = {"target": [block.astype(float) for block in truth], "other": other}
    intervals, ratios = bootstrap(truth, scores, seed=0, times=20)
    flat = [np.concatenate([block[1:] for block in blocks]) for blocks in (truth, other)]
    precision = average_precision_score(*flat)
    assert intervals["target"] == [1.0, 1.0]
    assert intervals["other"] == [round(precision, 4)] * 2
    assert ratios["other"] == [round(1 / precision, 4)] * 2


def test_a_window_hides_a_shift_by_one_and_no_mask_reaches_into_the_next_document() -> None:
    truth = [np.array([0, 0, 1, 0, 0, 0, 0]), np.array([0, 0, 0, 0, 0, 0, 0])]
    exact = [np.array([0.0, 0, 1, 0, 0, 0, 0]), np.zeros(7)]
    shifted = [np.array([0.0, 0, 0, 1, 0, 0, 0]), np.zeros(7)]
    assert mask_precision(truth, exact, budget=1 / 12, window=0, seed=0) == 1
    assert mask_precision(truth, shifted, budget=1 / 12, window=0, seed=0) == 0
    for scores in (exact, shifted):
        assert mask_precision(truth, scores, budget=3 / 12, window=1, seed=0) == pytest.approx(1 / 3)
    last = [np.array([0.0, 0, 0, 0, 0, 0, 1]), np.zeros(7)]
    after = [np.zeros(7, int), np.array([0, 1, 0, 0, 0, 0, 0])]
    assert mask_precision(after, last, budget=2 / 12, window=1, seed=0) == 0  # two tokens, both of the first


def test_a_mask_of_ties_is_drawn_and_has_the_share_of_all_tokens() -> None:
    rng = np.random.default_rng(0)
    truth = [np.append(0, rng.random(400) < 0.3) for _ in range(20)]
    precision = mask_precision(truth, [np.zeros(401)] * 20, budget=0.25, window=0, seed=0)
    assert precision == pytest.approx(np.concatenate([block[1:] for block in truth]).mean(), abs=0.03)


@needs_real_text
@pytest.mark.parametrize("name", list(BEHAVIOURS))
def test_behaviours_have_disjoint_documents_and_no_scored_document_among_the_queries(
    name: str,
) -> None:
    behaviour = read_behaviour(name, DATA, documents=200, queries=40, seed=0)
    texts, others = ({row["text"] for row in rows} for rows in (behaviour.documents, behaviour.others))
    assert len(behaviour.documents) == 200
    assert len(texts & others) <= 4  # some texts occur twice
    assert len(behaviour.positive) == len(behaviour.negative) == 40
    for prompt, completion in behaviour.positive + behaviour.negative:
        assert prompt.strip()
        assert not any(prompt + completion in text for text in texts)
    marked = sum(bool(row.get(SPANS)) for row in behaviour.documents)
    assert 20 < marked < 150


def test_a_sentences_score_is_that_of_its_tokens() -> None:
    score = sentence_scores("You are kind. You are a fool.", [(0, 0), (0, 3), (14, 17)], predict_prob)
    assert score[0] == 0
    assert score[2] > score[1]
