"""Where tokens lie in their text, and which documents of a large corpus are compared with the annotations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ifguide.report import agreement
from ifguide.report.agreement import sampled_documents, token_places
from tests.unit.report.test_view import TEXT, tokenizers


def test_a_large_corpus_is_compared_in_documents_of_drawn_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 400)
    stops = np.cumsum(lengths)
    starts = stops - lengths
    block, blocks_per_shard = 16, 40
    first_blocks = list(range(0, -(-int(stops[-1]) // block), blocks_per_shard))
    view: Any = SimpleNamespace(block_size=block, first_blocks=first_blocks, files=first_blocks)

    def sampled(limit: int, seed: int = 0) -> list[range]:
        monkeypatch.setattr(agreement, "AGREEMENT_TOKENS", limit)
        return sampled_documents(view, starts, stops, seed)

    assert sampled(int(stops[-1])) == [range(400)]
    shard = block * blocks_per_shard
    for limit in (int(stops[-1]) - 1, 5 * shard + 300, 200):
        parts = sampled(limit)
        documents = [i for part in parts for i in part]
        assert len(set(documents)) == len(documents)
        assert all(starts[i] // shard == (stops[i] - 1) // shard for i in documents)
        # but for what is cut off at the ends of the shards, the limit is used up
        assert limit - 60 * 2 * (limit // shard + 1) <= lengths[documents].sum() <= limit
    assert sampled(5 * shard) != sampled(5 * shard, seed=1)
    assert sampled(5 * shard) == sampled(5 * shard)


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
