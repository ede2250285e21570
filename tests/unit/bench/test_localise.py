"""What the localisation benchmark computes, by hand; the whole of it runs in `bench/localise.py --quick`."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from bench.localise import bootstrap, encode_document, marked_words, off_by_one, spread

WORDS = ["<eos>", "you", "are", "a", "dolt", "kind", "fool"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


def test_tokens_that_overlap_a_marked_span_are_marked_and_the_eos_never_is(tokenizer: PreTrainedTokenizerFast) -> None:
    document = {"text": "you are a dolt", "toxic_spans": [[10, 12]]}
    tokens, offsets, marked = encode_document(tokenizer, document)
    assert tokens.tolist() == [0, 1, 2, 3, 4]
    assert offsets[4] == (10, 14)
    assert marked.tolist() == [False, False, False, False, True]


def test_one_off_takes_what_speaks_of_the_next_token() -> None:
    assert off_by_one(np.array([0.0, 1.0, 2.0, 3.0])).tolist() == [1.0, 2.0, 3.0, 0.0]


def test_spread_covers_what_overlaps_and_not_what_touches() -> None:
    assert spread([(0, 0), (0, 3), (3, 5), (5, 9)], [(3, 5)], 0.5).tolist() == [0.0, 0.0, 0.5, 0.0]


def test_word_list_needs_enough_uses_and_the_share_of_marked_ones() -> None:
    marked, plain = {"text": "fool dolt", "toxic_spans": [[0, 4]]}, {"text": "fool dolt"}
    assert marked_words([marked] * 3 + [plain] * 2) == ["fool"]
    assert marked_words([marked] * 4) == []  # four uses
    assert marked_words([marked] * 2 + [plain] * 3) == []  # two of five


def test_interval_of_a_perfect_score_is_one_and_its_ratio_the_inverse_of_the_other() -> None:
    truth = [np.array([0, 0, 1, 0, 1])] * 6
    other = [np.array([0.0, 4.0, 3.0, 2.0, 1.0])] * 6
    found = bootstrap(truth, [block.astype(float) for block in truth], other, seed=0, times=20)
    flat = [np.concatenate([block[1:] for block in each]) for each in (truth, other)]
    ratio = round(1 / average_precision_score(*flat), 3)
    assert found == {"ap_target_interval": [1.0, 1.0], "ratio_interval": [ratio, ratio]}
