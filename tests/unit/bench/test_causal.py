"""The causal tests of scores: sets of tokens, trainings without them, and both figures where one word is bad."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bench import causal
from bench.causal import Tokens, masks_of, measure, unseen_queries
from bench.common import retraining
from bench.common.causal_figures import NULLS, PLAIN, RANDOM, UNSEEN, as_markdown
from bench.common.retraining import Retraining, Subject, learning_blocks, query_losses, retrain, retrain_all
from bench.common.token_sets import (
    correlation_intervals,
    document_halves,
    predictions,
    rank_correlation,
    token_count,
    top_tokens,
)
from ifguide.config.sources import Prompts
from ifguide.influence.query import TokenisedQuery
from ifguide.run import Run
from ifguide.tokenizer import load_tokenizer
from ifguide.training.blocks import TrainingBlocks, flatten_blocks
from ifguide.training.loop import EXPORT, TrainingLoop
from tests.stages.conftest import ARCHITECTURE
from tests.stages.packed import BLOCK_SIZE, BLOCKS, packed_run, settings_of

OPTIONS = {"engine": "torch", "epochs": 1, "objective": {"kind": "ignore"}, "learning_rate": 0.003}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A corpus of random sentences in which `clown` is masked."""
    return packed_run(tmp_path_factory.mktemp("packed"), OPTIONS, architecture=ARCHITECTURE)


@pytest.fixture(scope="module")
def subject(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Four queries that end in the word that the run masks, and four in another."""
    folder = tmp_path_factory.mktemp("subject")
    flatten_blocks(run.corpus, run.mask, folder / "blocks")
    tokenizer = load_tokenizer(run.tokenizer_source)
    queries = []
    for word in (" clown", " calm"):
        for start in ("the pig saw a", "all was", "that", "and said that the"):
            context = tokenizer(start)["input_ids"]
            queries.append(
                TokenisedQuery(token_ids=(*context, *tokenizer(word)["input_ids"]), completion_start=len(context))
            )
    return Subject(settings=settings_of(run, folder / "model"), blocks=folder / "blocks", queries=queries)


@pytest.fixture(scope="module")
def blocks(subject: Subject) -> TrainingBlocks:
    return TrainingBlocks(subject.blocks)


POSITIVE = np.arange(8) < 4


def nothing() -> np.ndarray:
    return np.zeros((BLOCKS, BLOCK_SIZE), bool)


def candidates(blocks: TrainingBlocks) -> np.ndarray:
    places = np.arange(BLOCK_SIZE)
    return (places >= 1) & (places < blocks.lengths[:, None])


def documents() -> np.ndarray:
    """Two documents to a block; the last block is padded."""
    numbers = np.arange(BLOCKS * BLOCK_SIZE).reshape(BLOCKS, BLOCK_SIZE) // (BLOCK_SIZE // 2)
    numbers[-1, BLOCK_SIZE // 2 :] = -1
    return numbers


def test_halves_are_of_whole_documents_and_each_as_likely() -> None:
    numbers = documents()
    halves = document_halves(numbers, 40, seed=0)
    count = numbers.max() + 1
    learnt = []
    for left_out in halves:
        of_document = [np.unique(left_out[numbers == number]) for number in range(count)]
        assert all(len(values) == 1 for values in of_document)
        learnt.append([not values[0] for values in of_document])
        assert sum(learnt[-1]) == count // 2
        assert not left_out[numbers == -1].any()
    assert len({tuple(each) for each in learnt}) == len(halves)
    assert 0.45 < np.mean(learnt) < 0.55
    assert np.array_equal(document_halves(numbers, 41, seed=0)[39], halves[39])


def test_an_oracle_has_a_datamodelling_score_of_one_and_shuffled_scores_of_none() -> None:
    rng = np.random.default_rng(0)
    numbers = np.repeat(np.arange(400), 16).reshape(200, 32)
    scores = rng.gamma(0.2, size=numbers.shape)  # a few tokens matter much, as insults do
    halves = document_halves(numbers, 300, seed=1)
    actual = predictions(scores, halves)
    actual = actual + 0.05 * actual.std() * rng.standard_normal(len(actual))  # a toy whose effects add up
    shuffled = rng.permutation(scores.reshape(-1)).reshape(scores.shape)
    predicted = {"oracle": predictions(scores, halves), "shuffled": predictions(shuffled, halves)}
    assert rank_correlation(predicted["oracle"], actual) > 0.99
    assert abs(rank_correlation(predicted["shuffled"], actual)) < 0.2
    assert rank_correlation(-predicted["oracle"], actual) < -0.99
    assert rank_correlation(np.ones(len(actual)), actual) == 0
    intervals = correlation_intervals(predicted, actual, seed=0)
    assert intervals["oracle"][0] > 0.98
    assert intervals["shuffled"][0] < 0 < intervals["shuffled"][1]
    assert intervals["oracle-shuffled"][0] > 0.5


def test_the_highest_scores_are_taken_ties_by_chance_and_no_token_without_a_prediction() -> None:
    candidates_NT = np.ones((4, 8), bool)
    candidates_NT[:, 0] = False
    scores = np.zeros((4, 8), np.float32)
    scores[:, 0], scores[1, 3], scores[2, 5] = 9, 2, 1
    chosen = top_tokens(scores, candidates_NT, 2, seed=0)
    assert np.argwhere(chosen).tolist() == [[1, 3], [2, 5]]
    draws = [top_tokens(scores, candidates_NT, 6, seed=seed) for seed in range(30)]
    assert all(each.sum() == 6 and each[1, 3] and each[2, 5] and not each[:, 0].any() for each in draws)
    assert len({each.tobytes() for each in draws}) > 20
    assert token_count(candidates_NT, 0.5) == 14
    assert token_count(candidates_NT, 0.001) == 1


def test_a_retraining_is_the_training_of_the_pipeline(
    run: Run, subject: Subject, blocks: TrainingBlocks, tmp_path: Path
) -> None:
    for name, masked in (("penalised", np.array(blocks.masked)), (PLAIN, nothing())):
        settings = replace(settings_of(run, tmp_path / name), mask=str(run.mask) if name != PLAIN else None)
        TrainingLoop(settings, rank=0, world_size=1).run()
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / name / EXPORT).state_dict()
        found = retrain(subject, blocks, Retraining(name=name, seed=settings.seed, left_out_NT=masked)).state_dict()
        assert expected.keys() == found.keys()
        for key, weight in expected.items():  # the last batch is padded there: sums in another order
            torch.testing.assert_close(
                found[key], weight, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )


def test_blocks_without_a_token_to_learn_are_passed_over_and_change_nothing(
    subject: Subject, blocks: TrainingBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out = nothing()
    left_out[::3] = True
    left_out[1, :4] = True
    learns = learning_blocks(blocks, left_out)
    assert learns.tolist() == [number % 3 != 0 for number in range(BLOCKS)]
    one = Retraining(name="thirds", seed=1, left_out_NT=left_out)
    short = retrain(subject, blocks, one).state_dict()
    monkeypatch.setattr(retraining, "learning_blocks", lambda blocks, _: np.ones(BLOCKS, bool))
    for key, weight in retrain(subject, blocks, one).state_dict().items():
        torch.testing.assert_close(short[key], weight, rtol=1e-4, atol=1e-5)


def test_query_losses_are_summed_over_completions(
    subject: Subject, blocks: TrainingBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = retrain(subject, blocks, Retraining(name="x", seed=0, left_out_NT=nothing()))
    monkeypatch.setattr(retraining, "BATCH_TOKENS", 20)
    found = query_losses(model, subject.queries)
    for query, loss in zip(subject.queries, found, strict=True):
        ids = torch.tensor([query.token_ids])
        with torch.no_grad():
            log_p = model(ids).logits[0].double().log_softmax(-1)
        places = range(query.completion_start, len(query.token_ids))
        assert loss == pytest.approx(-sum(float(log_p[j - 1, query.token_ids[j]]) for j in places), rel=1e-5)


def test_finished_retrainings_are_kept_and_others_are_not_taken_for_them(
    subject: Subject, blocks: TrainingBlocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Here:
        """A pool that works in this process."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, work: Callable[..., None], *given: object) -> retraining.Future[None]:
            done: retraining.Future[None] = retraining.Future()
            done.set_result(work(*given))
            made.append(given[1].name)
            return done

    made: list[str] = []
    monkeypatch.setattr(retraining, "ProcessPoolExecutor", Here)
    some = [
        Retraining(name=f"half-{i}", seed=0, left_out_NT=left_out)
        for i, left_out in enumerate(document_halves(documents(), 2, 0))
    ]
    assert retrain_all(subject, some, tmp_path, workers=2, stop_after=0) == {}
    first = retrain_all(subject, some, tmp_path, workers=2)
    assert made == ["half-0", "half-1"]
    assert [*first] == made
    assert not np.allclose(first["half-0"], first["half-1"])
    again = retrain_all(subject, some, tmp_path, workers=2)
    assert made == ["half-0", "half-1"]
    assert all(np.array_equal(again[name], first[name]) for name in first)
    other_seed = [replace(some[0], seed=1)]
    other_length = replace(
        subject, settings=replace(subject.settings, train=replace(subject.settings.train, epochs=0.5))
    )
    other_queries = replace(subject, queries=subject.queries[1:])
    digests = {subject.digest(each) for each in (*some, *other_seed)}
    digests |= {other_length.digest(some[0]), other_queries.digest(some[0])}
    assert len(digests) == 5
    retrain_all(subject, other_seed, tmp_path, workers=1)
    assert made == ["half-0", "half-1", "half-0"]
    assert json.loads(next(tmp_path.glob("half-1-*")).read_text())["tokens_left_out"] == some[1].left_out_NT.sum()


def test_masks_have_one_size_and_matched_ones_the_same_types(blocks: TrainingBlocks) -> None:
    rng = np.random.default_rng(0)
    tokens = Tokens(
        tokens_NT=np.asarray(blocks.tokens, np.int64),
        documents_NT=documents(),
        candidates_NT=candidates(blocks),
        marked_NT=None,
    )
    scores = {name: rng.standard_normal(blocks.tokens.shape).astype(np.float32) for name in ("target", "position")}
    scores["words"] = np.array(blocks.masked, np.float32)
    masks = masks_of(scores, tokens, 0.01, seed=3)
    assert set(masks) == {PLAIN, RANDOM, *scores, *(f"{name}-{null}" for name in scores for null in NULLS)}
    assert not masks.pop(PLAIN).any()
    assert {int(mask.sum()) for mask in masks.values()} == {int(0.01 * tokens.candidates_NT.sum())}
    assert not any((mask & ~tokens.candidates_NT).any() for mask in masks.values())
    for name in scores:
        assert np.array_equal(masks_of(scores, tokens, 0.01, seed=4)[name], masks[name])
        for null in NULLS:
            drawn = masks[f"{name}-{null}"]
            assert sorted(tokens.tokens_NT[masks[name]]) == sorted(tokens.tokens_NT[drawn])
            assert not np.array_equal(masks[name], drawn)
            assert not np.array_equal(masks_of(scores, tokens, 0.01, seed=4)[f"{name}-{null}"], drawn)
        shared = [int((masks[name] & masks[f"{name}-{null}"]).sum()) for null in NULLS]
        assert shared[1] <= shared[0]
        assert shared[1] < shared[0] or name != "words"  # of random scores hardly any is drawn again


def test_a_word_that_the_queries_ask_for_is_found_by_both_tests_and_random_scores_are_not(
    subject: Subject, blocks: TrainingBlocks, tmp_path: Path
) -> None:
    """Training on `clown` makes it likelier: of that the oracle's score is the count."""
    tokens = Tokens(
        tokens_NT=np.asarray(blocks.tokens, np.int64),
        documents_NT=documents(),
        candidates_NT=candidates(blocks),
        marked_NT=np.array(blocks.masked),
    )
    share = float(tokens.marked_NT.sum() / tokens.candidates_NT.sum())
    rng = np.random.default_rng(1)
    scores = {
        "oracle": np.array(blocks.masked, np.float32),
        "noise": rng.standard_normal(blocks.tokens.shape).astype(np.float32),
    }
    options = argparse.Namespace(
        folder=tmp_path,
        halves=8,
        seeds=2,
        share=share,
        workers=2,
        stop_after_minutes=float("inf"),
        epochs=1,
        batch_blocks=16,
    )
    kinds = {"seen": POSITIVE[::2], UNSEEN: POSITIVE[::2]}
    subject = replace(subject, queries=[*subject.queries[::2], *subject.queries[1::2]])
    result = measure(subject, tokens, scores, kinds, options, causal.time.monotonic())
    assert result["complete"]
    assert result["retrainings"] == len(list((tmp_path / "retrainings").iterdir())) == 8 + 2 * 8
    assert result["halves"] == 8
    assert result["qld_oracle"] > 5 * abs(result["qld_random"])
    assert result["qld_oracle_interval"][0] > 0
    assert result["marked"]["oracle"] == 1
    for null in NULLS:  # the oracle has every `clown`: what is drawn is the same mask
        assert result[f"{null}_shared_oracle"] == 1
        assert result[f"qld_oracle_above_{null}"] == 0
    assert result["lds_oracle"] > result["lds_noise"]
    assert result[UNSEEN]["qld_oracle"] > 5 * abs(result[UNSEEN]["qld_random"])
    assert result[UNSEEN]["qld_oracle"] != result["qld_oracle"]
    lines = as_markdown(result).splitlines()
    assert lines[8:10] == ["Queries that no score has seen:", ""]
    assert len(lines) == 16
    lines = lines[:6]
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| oracle", "| noise", "| random", "| tokens"]
    assert len({line.count("|") for line in lines}) == 1


def test_unseen_queries_are_the_evaluation_prompts_that_are_plainly_of_one_kind(run: Run, tmp_path: Path) -> None:
    rows = [
        {"prompt": {"text": f"p{value}"}, "continuation": {"text": f" c{value}", "toxicity": value}}
        for value in (0.5, 0.49, 0.2, 0.9, 0.21)
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = replace(
        run.config,
        evaluate=replace(run.config.evaluate, prompts=Prompts(path=str(path))),
        build_query=replace(run.config.build_query, positive_threshold=0.5, negative_threshold=0.2),
    )
    found = [(row.row, row.positive, row.prompt, row.completion) for row in unseen_queries(Run(config=config))]
    assert found == [(0, True, "p0.5", " c0.5"), (2, False, "p0.2", " c0.2"), (3, True, "p0.9", " c0.9")]
