"""Where tokens lie in the text that they decode to."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from ifguide.artifacts import MismatchError
from ifguide.tokenizer import load_tokenizer, require_kept, save_tokenizer, token_places, train_tokenizer
from tests.tokenizers import byte_level
from tests.tokenizers import tokenizers as kinds
from tests.unit.report.test_view import TEXT, tokenizers


@pytest.mark.parametrize("name", ["sentencepiece", "bytes"])
def test_tokens_that_a_text_is_not_made_of_again_have_the_places_of_what_they_add(name: str) -> None:
    tokenizer = tokenizers()[name]
    whole = tokenizer.encode(TEXT, add_special_tokens=False)
    pieces = [tokenizer.convert_tokens_to_ids(char) for char in "This"] + whole  # that word is one token
    for tokens, has_gaps in ((whole, name == "bytes"), (pieces, False)):  # its own offsets leave out spaces
        text = str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
        places = token_places(tokenizer, text, tokens)
        starts, ends = places.T
        assert (starts[0], ends[-1]) == (0, len(text))
        assert has_gaps or ((starts[1:] == ends[:-1]) | (places[1:] == places[:-1]).all(axis=1)).all()
        assert text[slice(*places[-1])] == "?"
        clown = [text[slice(*place)] for place in places].index("🤡")
        assert (places[clown : clown + 4] == places[clown]).all()  # its four bytes are four tokens


def test_the_places_of_many_tokens_take_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizers()["bytes"]
    tokens = [tokenizer.convert_tokens_to_ids(char) for char in "This"] * 50_000
    text = str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_, **__: pytest.fail("decoded a prefix"))
    places = token_places(tokenizer, text, tokens)
    np.testing.assert_array_equal(places[:, 0], np.arange(len(text)))
    np.testing.assert_array_equal(places[:, 1], np.arange(len(text)) + 1)


def test_tokens_that_change_what_is_before_them_have_no_places() -> None:
    raw = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    raw.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("ab", "x")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    for written, decoded, message in (
        ("a cab", "a cx", "token 3 decodes to 'a', which the text does not have there"),
        ("ab cd", "x cd", "token 0 decodes to 'a', which the text does not have there"),
    ):
        tokens = tokenizer(written)["input_ids"]
        assert tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == decoded
        with pytest.raises(ValueError, match=message):
            token_places(tokenizer, decoded, tokens)


@pytest.mark.parametrize("name", kinds())
def test_a_source_that_is_another_tokenizer_than_was_kept_of_it_is_refused(name: str, tmp_path: Path) -> None:
    source, kept = tmp_path / "source", tmp_path / "corpus" / "tokenizer"
    kinds()[name].save_pretrained(source)
    save_tokenizer(load_tokenizer(str(source)), kept)
    require_kept(str(source), kept)
    train_tokenizer(["others"], vocab_size=300).save_pretrained(source)
    with pytest.raises(
        MismatchError, match=r"source is another .*/corpus was begun with: restore it, or delete .*corpus and"
    ):
        require_kept(str(source), kept)
    shutil.rmtree(source)
    require_kept(str(source), kept)  # there is nothing to compare with
