"""The work of `build_query` in this process: V refined and resumed, and the reliability of its queries."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ifguide import schemas
from ifguide.artifacts import MismatchError
from ifguide.config import BuildQuery, ModelSource, ScoreCorpus
from ifguide.config.resources import Resources
from ifguide.influence import query_worker
from ifguide.influence.decision import decide
from ifguide.influence.factor_sample import FactorSample
from ifguide.influence.factor_worker import SAMPLE, FitPartition, FitSettings
from ifguide.influence.factors import EkfacFit
from ifguide.influence.null_worker import build_nulls
from ifguide.influence.proxy import Beginning, load_proxy
from ifguide.influence.query_file import DIRECTION, HELD_OUT, QueryRow, read_queries, write_queries
from ifguide.influence.query_worker import PARTIAL, FactorsFolder, QueryPart, QuerySettings, draw_queries
from ifguide.influence.refinement import Refinement
from ifguide.influence.reliability import spearman_brown
from ifguide.models import state_fingerprint, tracked_modules
from ifguide.spans.tables import PackedCorpus
from tests.tiny import ARCHITECTURES, random_blocks
from tests.tokenizers import byte_level

BLOCK = 12


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuerySettings, FactorsFolder, list[QueryPart], Path]:
    """Queries whose gradients are summed, factors, and a table of blocks."""
    root = tmp_path_factory.mktemp("query")
    byte_level().save_pretrained(root / "tokenizer")
    proxy = ModelSource(architecture={**ARCHITECTURES["llama"], "vocab_size": 257})
    model = load_proxy(proxy, gpus=0)
    names = tracked_modules(model).names
    blocks_NT, lengths_N = random_blocks(6, BLOCK)
    sample = FactorSample(blocks_NT=blocks_NT, lengths_N=lengths_N, num_partitions=1, batch_size=2, seed=0)
    EkfacFit(model=model, sample=sample, module_names=names, workdir=root / "work").run(root / "factors")
    table: list[Any] = [pa.array(range(6)), pa.array(lengths_N), schemas.per_token_column(
        blocks_NT, schemas.blocks(BLOCK, annotated=False), "tokens"
    )]  # fmt: skip
    pq.write_table(pa.Table.from_arrays(table, ["block_id", "length", "tokens"]), root / "blocks.parquet")
    folder = root / "query"
    folder.mkdir()
    rows = [
        QueryRow(
            row=i, positive=i % 2 == 0, score=0.5, prompt="You", completion=f" {'clown' if i % 2 else 'river'} {i}"
        )
        for i in range(9)
    ]
    write_queries(folder, rows)
    settings = QuerySettings(
        folder=folder,
        proxy=proxy,
        proxy_fingerprint=state_fingerprint(model),
        tokenizer=str(root / "tokenizer"),
        module_names=names,
        beginning=Beginning(None),
        options=BuildQuery(partitions=2, max_tokens=16, resources=Resources(gpus=0)),
    )
    parts = [QueryPart(key=f"part-{i}", partition=i) for i in range(2)]
    worker = query_worker.SumGradients(settings)
    assert sum(worker.process(part)["queries"] for part in parts) == len(rows)
    factors = FactorsFolder(folder=root / "factors", fingerprint="", names={name: name for name in names})
    return settings, factors, parts, root / "blocks.parquet"


def test_queries_are_cut_to_the_positions_of_the_proxy(prepared: Any) -> None:
    settings, *_ = prepared
    settings = replace(settings, options=replace(settings.options, max_tokens=512))
    rows = [QueryRow(row=0, positive=True, score=0.5, prompt="You " * 40, completion=" clown")]
    (query,) = settings.tokenise(byte_level(), rows, load_proxy(settings.proxy, gpus=0))
    assert len(query.token_ids) == ARCHITECTURES["llama"]["max_position_embeddings"]


def test_a_refinement_that_was_interrupted_goes_on_to_the_same_bytes(prepared: Any, tmp_path: Path) -> None:
    settings, factors, parts, blocks = prepared

    def refined(steps: int, state: Path) -> tuple[bytes, dict[str, list[float]]]:
        options = replace(settings.options, refine_steps=steps)
        norms, done = query_worker.refine_parts(replace(settings, options=options), factors, parts, blocks, state)
        assert set(norms) == set(settings.module_names)
        return (settings.folder / DIRECTION).read_bytes(), done

    query_worker.precondition_parts(settings.folder, factors, parts, settings.options)
    plain = (settings.folder / DIRECTION).read_bytes()
    whole, done = refined(4, tmp_path / "whole.safetensors")
    refined(2, tmp_path / "parts.safetensors")
    assert len(Refinement.load(tmp_path / "parts.safetensors", torch.device("cpu")).steps) == 2
    resumed, again = refined(4, tmp_path / "parts.safetensors")
    assert resumed == whole != plain
    assert again == done
    assert [len(values) for values in done.values()] == [4] * 4
    assert done["residual"][-1] < done["residual"][0]


def test_the_reliability_of_queries_is_that_of_their_halves(prepared: Any) -> None:
    settings, factors, _, blocks = prepared
    found = query_worker.judge_queries(settings, factors, blocks, 0)
    assert found is not None
    assert (found.positive, found.negative) == (5, 4)
    lengths = pq.read_table(blocks).column("length").to_numpy()
    assert found.tokens == int(np.sum(lengths - 1))
    assert 0 <= found.spearman <= found.reliability <= 1
    few_queries = replace(settings, options=replace(settings.options, reliability_queries=2))
    few = query_worker.judge_queries(few_queries, factors, blocks, 0)
    assert few is not None
    assert (few.positive, few.negative) == (2, 2)


def test_completions_of_a_prompt_are_not_taken_for_further_prompts(prepared: Any, tmp_path: Path) -> None:
    """Of six prompts with forty equal completions each a sample has seen nearly all that there is to see."""
    settings, factors, _, blocks = prepared
    kinds = [kind for kind in (True, False) for _ in range(6 * 40)]
    rows = [
        QueryRow(row=i, positive=kind, score=0.5, prompt=f"You {i // 40}", completion=" clown" if kind else " river")
        for i, kind in enumerate(kinds)
    ]
    write_queries(tmp_path, rows)
    options = replace(settings.options, reliability_queries=24)
    found = query_worker.judge_queries(replace(settings, folder=tmp_path, options=options), factors, blocks, 0)
    assert found is not None
    assert (found.positive, found.negative) == (24, 24)
    assert found.spearman < found.reliability < spearman_brown(found.spearman, 4)  # two halves of about three prompts


def test_queries_that_are_held_out_are_judged_along_the_direction(prepared: Any) -> None:
    settings, factors, parts, _ = prepared
    query_worker.precondition_parts(settings.folder, factors, parts, settings.options)
    rows = read_queries(settings.folder)
    write_queries(settings.folder, rows, HELD_OUT)
    found = query_worker.judge_held_out(settings)
    assert found is not None
    assert found > 0.9  # V is made of them
    write_queries(settings.folder, [row for row in rows if row.positive], HELD_OUT)
    assert query_worker.judge_held_out(settings) is None


def test_no_worker_takes_another_proxy_of_the_same_name(prepared: Any, tmp_path: Path) -> None:
    settings, factors, parts, blocks = prepared
    other = replace(settings, folder=tmp_path, proxy_fingerprint="of another")
    write_queries(tmp_path, rows := read_queries(settings.folder))
    write_queries(tmp_path, rows, HELD_OUT)
    shutil.copytree(settings.folder / PARTIAL, tmp_path / PARTIAL)
    shutil.copyfile(blocks, tmp_path / SAMPLE)
    fit = FitSettings(
        proxy=settings.proxy,
        proxy_fingerprint="of another",
        module_names=settings.module_names,
        beginning=settings.beginning,
        work=tmp_path,
        num_partitions=1,
        module_partitions=1,
        batch_size=2,
        seed=0,
        gpus=0,
    )
    scored = ScoreCorpus(resources=Resources(cpus=torch.get_num_threads(), gpus=0))
    packed = PackedCorpus(folder=tmp_path, block_size=BLOCK, blocks_per_shard=6, num_tokens=6 * BLOCK)
    works: list[Callable[[], object]] = [
        lambda: FitPartition(fit),
        lambda: query_worker.SumGradients(other),
        lambda: query_worker.refine_parts(other, factors, parts, blocks, tmp_path / "state"),
        lambda: query_worker.judge_queries(other, factors, blocks, 0),
        lambda: query_worker.judge_held_out(other),
        lambda: build_nulls(other, factors, 0),
        lambda: decide(scored, settings.proxy, "of another", Beginning(None), [], packed, "no file"),
    ]
    for work in works:
        with pytest.raises(MismatchError, match=r"the proxy on this node .*the driver's .*: sync it"):
            work()


def test_a_set_of_a_single_query_has_no_reliability(prepared: Any, tmp_path: Path) -> None:
    settings, factors, _, blocks = prepared
    rows = [QueryRow(row=i, positive=i > 0, score=0.5, prompt="You", completion=" clown") for i in range(4)]
    write_queries(tmp_path, rows)
    assert query_worker.judge_queries(replace(settings, folder=tmp_path), factors, blocks, 0) is None


def test_a_sample_of_pairs_has_both_completions_of_each_or_neither() -> None:
    sets = [
        [QueryRow(row=row, positive=kind, score=1.0, prompt="p", completion="c") for row in range(50)]
        for kind in (True, False)
    ]
    drawn = [[[row.row for row in draw_queries(own, 10, seed)] for own in sets] for seed in range(3)]
    for positive, negative in drawn:
        assert positive == negative == sorted(set(positive))
        assert len(positive) == 10
    assert drawn[0] != drawn[1] != drawn[2]
    assert draw_queries(sets[0], 60, 0) == sets[0]
