"""Masks to character spans and back: the same mask for the same tokens, exactly the overlapping ones for others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ifguide.corpus.packing import tokenise
from ifguide.corpus.reading import RawDocument
from ifguide.spans.mapping import mask_of_spans, opens_span, spans_of_mask, token_edges, token_stops
from tests.tokenizers import WRITTEN, tokenizers


def edges_of(text: str, name: str) -> np.ndarray:
    (encoded,) = tokenise([RawDocument(row=0, text=text)], tokenizers()[name], annotate=False)
    assert len(encoded.stops) == len(encoded.tokens)
    return token_edges(encoded.stops)


@settings(max_examples=300)
@given(text=WRITTEN, name=st.sampled_from(["bpe", "unigram", "bytes"]), data=st.data())
def test_spans_give_the_same_tokenizer_the_identical_mask(text: str, name: str, data: st.DataObject) -> None:
    edges = edges_of(text, name)
    masked = np.array(data.draw(st.lists(st.booleans(), min_size=len(edges), max_size=len(edges))), bool)
    spans = spans_of_mask(masked, edges)
    np.testing.assert_array_equal(mask_of_spans(spans, edges), masked)
    assert (spans[:, 0] < spans[:, 1]).all()
    assert (spans[1:, 0] > spans[:-1, 1]).all()


@settings(max_examples=300)
@given(text=WRITTEN, names=st.permutations(["bpe", "unigram", "bytes"]), data=st.data())
def test_another_tokenizer_masks_every_token_that_overlaps_and_no_other(
    text: str, names: list[str], data: st.DataObject
) -> None:
    edges, others = edges_of(text, names[0]), edges_of(text, names[1])
    masked = np.array(data.draw(st.lists(st.booleans(), min_size=len(edges), max_size=len(edges))), bool)
    found = mask_of_spans(spans_of_mask(masked, edges), others)

    def part(of: np.ndarray, j: int) -> tuple[float, float]:
        return (of[j - 1] if j else min(0.0, of[0] - 1)), of[j]

    for j in range(len(others)):
        start, stop = part(others, j)
        overlaps = any(
            max(start, begin) < min(stop, end) for begin, end in (part(edges, i) for i in np.flatnonzero(masked))
        )
        assert found[j] == overlaps, (j, start, stop)


@settings(max_examples=200)
@given(
    texts=st.lists(WRITTEN, min_size=1, max_size=4), name=st.sampled_from(["bpe", "unigram", "bytes"]), data=st.data()
)
def test_documents_side_by_side_have_the_edges_and_spans_of_each_alone(
    texts: list[str], name: str, data: st.DataObject
) -> None:
    stops = [each.stops for each in tokenise([RawDocument(row=0, text=text) for text in texts], tokenizers()[name],
                                             annotate=False)]  # fmt: skip
    begins = np.cumsum([0, *map(len, stops[:-1])])
    size = sum(map(len, stops))
    masked = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), bool)
    edges = token_edges(np.concatenate(stops), begins)
    alone = [token_edges(each) for each in stops]
    np.testing.assert_array_equal(edges, np.concatenate(alone))
    own = [spans_of_mask(masked[b : b + len(each)], each) for b, each in zip(begins, alone, strict=True)]
    np.testing.assert_array_equal(spans_of_mask(masked, edges, begins), np.concatenate(own))
    counts = np.add.reduceat(opens_span(masked, begins), begins, dtype=np.int64)
    assert counts.tolist() == [len(each) for each in own]


@settings(max_examples=200)
@given(text=WRITTEN, name=st.sampled_from(["bpe", "unigram", "bytes"]))
def test_the_parts_of_tokens_tile_the_text_and_its_end(text: str, name: str) -> None:
    edges = edges_of(text, name)
    assert (np.diff(edges) > 0).all()
    assert edges[-1] == len(text) + 1
    assert edges[0] > -1


@settings(max_examples=200)
@given(data=st.data(), text=WRITTEN)
def test_a_part_of_a_document_has_the_edges_of_the_whole_beyond_runs_of_equal_stops(
    data: st.DataObject, text: str
) -> None:
    (encoded,) = tokenise([RawDocument(row=0, text=text)], tokenizers()["bytes"], annotate=False)
    stops, whole = encoded.stops, token_edges(encoded.stops)
    begin = data.draw(st.integers(0, len(stops) - 1))
    end = data.draw(st.integers(begin + 1, len(stops)))
    part = token_edges(stops[begin:end])
    inner = (stops[begin:end] != stops[begin]) & (stops[begin:end] != stops[end - 1])
    np.testing.assert_array_equal(part[inner], whole[begin:end][inner])


def test_a_word_is_masked_with_its_space_and_bytes_of_an_emoji_one_by_one() -> None:
    text = "see 🤡 now"
    edges = edges_of(text, "bytes")
    assert len(edges) == len(text.encode()) + 1
    one = np.zeros(len(edges), bool)
    one[5] = True  # the second of the emoji's four bytes
    spans = spans_of_mask(one, edges)
    assert spans.tolist() == [[4.25, 4.5]]
    words = edges_of("you clown", "bpe")
    covered = mask_of_spans(np.array([[4.0, 9.0]]), words)
    assert covered[words > 4].tolist()[:-1] == [True] * (int((words > 4).sum()) - 1)
    assert not covered[words <= 3].any()


def test_the_closing_token_is_a_character_of_its_own() -> None:
    for name in tokenizers():
        edges = edges_of("a b", name)
        last = np.arange(len(edges)) == len(edges) - 1
        assert spans_of_mask(last, edges).tolist() == [[3.0, 4.0]]
        assert mask_of_spans(np.array([[3.0, 4.0]]), edges_of("a b", "unigram")).tolist()[-1]


def test_stops_never_go_back_and_an_empty_document_is_its_end() -> None:
    assert token_stops([2, 2, 1], 2).tolist() == [2, 2, 2, 3]
    assert token_stops([], 0).tolist() == [1]
    assert token_edges(np.array([0, 0, 3, 3, 3], np.int32)) == pytest.approx([-0.5, 0, 2 + 1 / 3, 2 + 2 / 3, 3])
    assert spans_of_mask(np.zeros(3, bool), np.array([1.0, 2, 3])).shape == (0, 2)
    assert not mask_of_spans(np.zeros((0, 2)), np.array([1.0, 2, 3])).any()
