"""Invariants of a finished run, and of running parts of it again in another way."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from safetensors.torch import load_file

from ifguide import schemas
from ifguide.artifacts import MANIFEST, PLAN, data_files, file_digest, read_manifest, write_json
from ifguide.cli import main
from ifguide.config import Config, load_config
from ifguide.corpus.tables import document_table
from ifguide.pipeline import run_pipeline, stage
from ifguide.report.view import View, mask_agreement
from ifguide.run import Run
from ifguide.tokenizer import load_tokenizer
from tests.reference import algorithm1
from tests.sharded import in_any_order


def test_every_artifact_is_complete_and_its_config_can_be_run_again(finished: Config) -> None:
    for folder in Run(config=finished).artifact_folders().values():
        manifest = read_manifest(folder)
        for name, entry in manifest.files.items():
            assert file_digest(folder / name) == entry["sha256"]
        assert not (folder / PLAN).exists()
        assert not list(folder.glob("**/*.part"))
        assert load_config(folder / "config.yaml").pack_corpus == finished.pack_corpus


def test_the_blocks_are_the_documents_end_to_end(finished: Config, data: Path) -> None:
    corpus = Run(config=finished).corpus
    tables = [schemas.read_table(path) for path in data_files(corpus)]
    lengths = np.concatenate([table.column("length").to_numpy() for table in tables])
    stream = np.concatenate([schemas.per_token_array(table, "tokens").reshape(-1) for table in tables])[: lengths.sum()]
    tokenizer = load_tokenizer(Run(config=finished).tokenizer_source)
    rows = [json.loads(line) for line in (data / "corpus.jsonl").read_text().splitlines()]
    documents = document_table(corpus).to_pylist()
    assert [record["doc_id"] for record in documents] == list(range(len(rows)))
    for record in documents:
        start, stop = record["token_start"], record["token_start"] + record["num_tokens"]
        text = rows[record["row"]]["text"]
        expected = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert stream[start:stop].tolist() == expected
        assert record["num_chars"] == len(text)
        assert (record["block_id"], record["offset"]) == divmod(start, finished.pack_corpus.block_size)
    assert documents[-1]["token_start"] + documents[-1]["num_tokens"] == len(stream)


def test_the_mask_is_algorithm_1_on_the_scores(finished: Config) -> None:
    run = Run(config=finished)
    assert len(data_files(run.scores)) > 2
    blocks, masks = [], []
    for name in (path.name for path in data_files(run.scores)):
        lengths = schemas.read_table(run.corpus / name).column("length").to_pylist()
        scores = schemas.per_token_array(schemas.read_table(run.scores / name), "smoothed_score").astype(np.float64)
        blocks += [row[:length].tolist() for row, length in zip(scores, lengths, strict=True)]
        masks.append(schemas.per_token_array(schemas.read_table(run.mask / name), "masked"))
    spans = [(x["token_start"], x["token_start"] + x["num_tokens"]) for x in document_table(run.corpus).to_pylist()]
    options = {name: getattr(finished.build_mask, name) for name in ("quantile", "window", "max_fraction", "unit")}
    prior, size = finished.build_mask.rate_prior, finished.pack_corpus.block_size  # documents are ranked by rate
    tau, rank_score, masked = algorithm1.select(blocks, spans, size, prior=prior, **options)
    assert set(map(tuple, np.argwhere(np.concatenate(masks)).tolist())) == masked
    summary = read_manifest(run.mask).summary
    assert (summary["tau"], summary["tokens_masked"]) == (tau, len(masked))
    assert 0 < len(masked) <= summary["token_budget"]
    ranking = schemas.read_table(run.ranking / "ranking-00000.parquet", schemas.RANKING)
    assert sum(ranking.column("tokens_masked").to_pylist()) == summary["tokens_masked"]
    assert [rank_score[unit] for unit in ranking.column("unit_id").to_pylist()] == ranking.column(
        "rank_score"
    ).to_pylist()


def test_running_again_changes_nothing(finished: Config, shared: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(finished.run_dir).rglob(MANIFEST)}
    with FileLock(shared / "run.lock"):  # other processes of `pytest -n` come to it by the same fixture
        run_pipeline(finished, dry_run=False)
    assert {path: path.stat().st_mtime_ns for path in Path(finished.run_dir).rglob(MANIFEST)} == before


@pytest.mark.parametrize("verb", ["pack_corpus", "score_corpus", "build_mask"])
def test_artifacts_have_the_same_bytes_on_another_number_of_workers(
    verb: str, finished: Config, copied: Callable[..., Config]
) -> None:
    names = {"pack_corpus": ("corpus",), "score_corpus": ("scores",), "build_mask": ("ranking", "mask")}[verb]
    changes = (
        {"score_corpus__min_actors": 2, "score_corpus__max_actors": 2}
        if verb == "score_corpus"
        else {f"{verb}__resources": {"cpus": 2.0}}
    )
    again = copied(drop=names, **changes)
    stage(verb)(Run(config=again))
    for name in names:
        found, expected = (read_manifest(Path(config.run_dir) / name) for config in (again, finished))
        assert found.fingerprint == expected.fingerprint


def test_a_run_directory_is_read_without_what_it_was_made_from(copied: Callable[..., Config]) -> None:
    run = Run(config=copied())
    view = View(run.selection)
    assert view.tokenizer.name_or_path == str(run.corpus / "tokenizer")
    assert view.tokenizer.get_vocab() == load_tokenizer(run.tokenizer_source).get_vocab()
    assert any(name.startswith("tokenizer/") for name in read_manifest(run.corpus).files)


def test_shard_and_chunk_size_do_not_change_the_stream(finished: Config, copied: Callable[..., Config]) -> None:
    again = copied(drop=("corpus",), pack_corpus__blocks_per_shard=37, pack_corpus__chunk_megabytes=0.01)
    stage("pack_corpus")(Run(config=again))

    def stream(config: Config) -> np.ndarray:
        files = data_files(Run(config=config).corpus)
        return np.concatenate([schemas.per_token_array(schemas.read_table(path), "tokens") for path in files])

    np.testing.assert_array_equal(stream(again), stream(finished))
    documents = [document_table(Run(config=config).corpus) for config in (again, finished)]
    assert documents[0].equals(documents[1])


def test_unfinished_scores_are_finished_and_leftovers_not_trusted(
    finished: Config, copied: Callable[..., Config]
) -> None:
    config = copied()
    scores = Run(config=config).scores
    manifest = read_manifest(scores)
    (scores / MANIFEST).unlink()
    write_json(scores / PLAN, {"verb": manifest.verb, "options": manifest.options, "inputs": manifest.inputs})
    shard = data_files(scores)[1]
    shard.rename(shard.with_name(f"{shard.name}.999.part"))
    data_files(scores)[0].write_bytes(b"half a shard")
    assert stage("score_corpus")(Run(config=config)).fingerprint == manifest.fingerprint


def test_block_sums_of_both_attributions_agree(copied: Callable[..., Config]) -> None:
    found = []
    for attribution in ("target", "position"):
        changes = {"score_corpus__attribution": attribution, "score_corpus__preset": "exact"}
        config = copied(drop=("scores",), **changes)
        stage("score_corpus")(Run(config=config))
        tables = [schemas.read_table(path) for path in data_files(Run(config=config).scores)]
        found.append(np.concatenate([schemas.per_token_array(table, "token_score") for table in tables]))
    target, position = found
    sums = target.sum(1)
    np.testing.assert_allclose(position.sum(1), sums, atol=2e-4 * np.abs(sums).max())
    assert np.abs(target - position).max() > 0.01 * np.abs(target).max()  # token by token they differ


def test_block_unit_masks_whole_blocks_ranked(copied: Callable[..., Config]) -> None:
    config = copied(drop=("mask", "ranking"), build_mask__unit="block")
    manifest = stage("build_mask")(Run(config=config))
    assert manifest.summary["unit"] == "block"
    assert View(Run(config=config).selection).top_documents(2)[0].texts


def test_both_models_start_alike_and_only_the_masked_loss_tells_them_apart(finished: Config) -> None:
    rows = {}
    for name in ("baseline", "penalised"):
        path = Run(config=finished).model(name) / "metrics.jsonl"
        rows[name] = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row["loss_masked"] is None for row in rows["baseline"])
    assert any(row["loss_masked"] is not None for row in rows["penalised"])
    assert [row["step"] for row in rows["baseline"]] == [row["step"] for row in rows["penalised"]]
    weights = [load_file(Run(config=finished).model(name) / "hf" / "model.safetensors") for name in rows]
    assert any((weights[0][key] != weights[1][key]).any() for key in weights[0])


def test_the_report_says_what_the_continuations_say(finished: Config) -> None:
    run = Run(config=finished)
    figures = read_manifest(run.report).summary
    options = finished.evaluate
    for model in ("baseline", "penalised"):
        rows: dict[int, list[float]] = {}
        for path in (run.report / "continuations").glob(f"{model}-*.parquet"):
            for record in schemas.read_table(path, schemas.CONTINUATIONS).to_pylist():
                rows.setdefault(record["prompt_row"], []).append(dict(record["scores"])["toxicity"])
        table = np.array(list(rows.values()))
        assert table.shape == (options.max_prompts, options.continuations)
        assert figures[model]["emt"] == pytest.approx(table.max(axis=1).mean())
        assert figures[model]["tp"] == pytest.approx((table.max(axis=1) >= 0.5).mean())
    agreement = mask_agreement(View(run.selection), in_any_order())
    assert 0 < agreement.both < agreement.selected
    assert figures["mask"] == {
        "precision": agreement.both / agreement.selected,
        "recall": agreement.both / agreement.annotated,
    }
    page = (run.report / "index.html").read_text()
    assert "word list" in page
    assert "penalised" in page


def test_show_and_inspect_print_what_the_run_holds(
    finished: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["show", finished.run_dir]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("corpus", "factors", "model/penalised", "tau"))
    assert main(["inspect", finished.run_dir, "--documents", "2"]) == 0
    inspected = capsys.readouterr().out
    assert "⟦" in inspected
    assert "\x1b" not in inspected
    assert "tokens masked" in inspected
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["inspect", finished.run_dir, "--documents", "2"]) == 0
    coloured = capsys.readouterr().out
    assert "\x1b[1;31m" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == re.sub("[⟦⟧]", "", inspected)


def test_exported_factors_lack_nothing_that_kronfluence_writes(finished: Config) -> None:
    names = {path.stem for path in Run(config=finished).factors.glob("*.safetensors")}
    kinds = {"activation_eigenvectors", "gradient_eigenvectors", "lambda_matrix", "num_lambda_processed"}
    assert kinds <= names


def test_finetuning_starts_from_the_given_checkpoint(finished: Config, copied: Callable[..., Config]) -> None:
    source = Run(config=finished).model("baseline") / "hf"
    config = copied(drop=("model/penalised",), pretrain__init_from=str(source), pretrain__epochs=0.2)
    stage("pretrain")(Run(config=config))
    rows = (Run(config=config).model("penalised") / "metrics.jsonl").read_text().splitlines()
    last = (Run(config=finished).model("baseline") / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(rows[0])["loss_benign"] < json.loads(last)["loss_benign"]


def test_a_finished_run_can_move(finished: Config, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished.run_dir, moved)
    assert main(["show", str(moved)]) == 0
