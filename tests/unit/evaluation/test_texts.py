"""ifguide.evaluation.texts: `rows` are within their file, and held-out blocks begin as the model's own texts did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ifguide.config import ConfigError, Input
from ifguide.corpus.reading import RawDocument
from ifguide.evaluation.texts import heldout_blocks, read_texts
from ifguide.influence.proxy import Beginning
from ifguide.tokenizer import beginning_token

BOS, EOS = 1, 2
DOCUMENTS = [RawDocument(row=row, text=text) for row, text in enumerate(["a b c a b", "c", "b b"])]


def word_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "<s>": BOS, "</s>": EOS, "a": 3, "b": 4, "c": 5}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    if template:
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("start", [0, 2])
def test_rows_that_go_past_the_end_of_the_file_are_refused(listed: bool, start: int, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "rows.txt").write_text(f"{start}\n2\n" if start < 2 else "2\n")
    source = Input(path=str(texts), rows=str(tmp_path / "rows.txt") if listed else (start, 3))
    with pytest.raises(ConfigError, match=r"^evaluate\.cloze\.rows: ends at 3, but \S+ has 2 rows; lower it$"):
        read_texts(source, "evaluate.cloze")
    assert read_texts(Input(path=str(texts), rows=(1, 2)), "evaluate.cloze") == ["b"]


@pytest.mark.parametrize(("template", "expected"), [(None, None), ("<s> $A", BOS), ("$A </s>", None)])
def test_only_a_tokenizer_that_puts_a_bos_before_texts_has_one(template: str | None, expected: int | None) -> None:
    assert beginning_token(word_tokenizer(template)) == expected
    assert Beginning.of(word_tokenizer(template), is_trained=False).token == expected
    assert Beginning.of(word_tokenizer(template), is_trained=True) == Beginning(None)


@pytest.mark.parametrize("special_tokens", [False, True])
def test_each_block_of_a_model_trained_with_bos_begins_with_it_and_loses_no_token(special_tokens: bool) -> None:
    tokenizer = word_tokenizer("<s> $A")
    blocks_NT, lengths_N, kinds_N = heldout_blocks([DOCUMENTS, []], tokenizer, 4, special_tokens=special_tokens)
    assert blocks_NT.shape[1] == 4
    assert set(kinds_N.tolist()) == {0}
    rows = [row[:length] for row, length in zip(blocks_NT.tolist(), lengths_N.tolist(), strict=True)]
    assert all((row[0] == BOS) == special_tokens for row in rows)
    tokens = np.concatenate([row[int(special_tokens) :] for row in rows]).tolist()
    assert tokens == [3, 4, 5, 3, 4, EOS, 5, EOS, 4, 4, EOS]
