"""Bad input ends in a clear error that names what is wrong, and loses nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from ifguide.artifacts import MANIFEST, PLAN, MismatchError, data_files, read_manifest, write_manifest
from ifguide.artifacts.files import file_entry
from ifguide.cli import main
from ifguide.config import Config, ConfigError, config_from_mapping, to_mapping
from ifguide.corpus.tables import document_table
from ifguide.distributed.shards import StageError
from ifguide.influence.query_file import read_queries
from ifguide.models import load_model
from ifguide.pipeline import stage
from ifguide.run import Run
from ifguide.stages import build_query, pack_corpus
from ifguide.tokenizer import load_tokenizer, train_tokenizer
from tests.stages.conftest import ARCHITECTURE, small_config
from tests.stages.interrupting import interrupted_before


@pytest.fixture
def pack(data: Path, tmp_path: Path, cluster: None) -> Callable[..., Any]:
    """Pack a corpus of the given lines; returns the run and its manifest."""

    def run(lines: list[bytes], **options: Any) -> tuple[Run, Any]:
        (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + (b"\n" if lines else b""))
        tree = small_config(data, Path(options.pop("run_dir", tmp_path / "run")))
        tree["pack_corpus"] = {"inputs": [str(tmp_path / "in.jsonl")], "block_size": 16, **options}
        made = Run(config=config_from_mapping(tree))
        return made, stage("pack_corpus")(made)

    return run


def row(text: Any) -> bytes:
    return json.dumps({"text": text}).encode()


def test_misspelt_key_names_the_nearest(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(small_config(data, tmp_path / "run")))
    assert main(["pack_corpus", "--config", str(path), "--set", "pack_corpus.blok_size=3"]) == 1
    assert "pack_corpus.block_size" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_missing_file_names_the_config_key(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(small_config(data, tmp_path / "run")))
    assert main(["pack_corpus", "--config", str(path), "--set", "pack_corpus.inputs=[nowhere.jsonl]"]) == 1
    error = capsys.readouterr().err
    assert "pack_corpus.inputs[0].path" in error
    assert "nowhere.jsonl" in error


def test_dry_run_writes_nothing(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(small_config(data, tmp_path / "run")))
    assert main(["run", "--config", str(path), "--dry-run"]) == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lines", [[], [row("")] * 3, [row("a")]])
def test_a_corpus_smaller_than_a_block_is_refused(lines: list[bytes], pack: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"no document|fewer than one block"):
        pack(lines)


def test_a_tokenizer_of_no_documents_is_refused(pack: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    tree = small_config(data, tmp_path / "run")
    del tree["tokenizer"]
    (tmp_path / "in.jsonl").write_bytes(b"")
    tree["pack_corpus"] = {"inputs": [str(tmp_path / "in.jsonl")], "train_tokenizer": 300}
    with pytest.raises(ValueError, match=r"pack_corpus.inputs: no document in .*in.jsonl"):
        stage("pack_corpus")(Run(config=config_from_mapping(tree)))


def test_a_pack_that_was_ended_goes_on_with_the_tokenizer_that_it_began_with(
    data: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = small_config(data, tmp_path / "run")
    tree["tokenizer"] = str(tmp_path / "tokenizer")
    shutil.copytree(data / "tokenizer", tmp_path / "tokenizer")
    run = Run(config=config_from_mapping(tree))
    with monkeypatch.context() as patch:
        patch.setattr(pack_corpus, "number_rows", lambda *_: 1 / 0)  # all chunks are tokenised, and nothing is packed
        with pytest.raises(ZeroDivisionError):
            stage("pack_corpus")(run)
    train_tokenizer(["others"], vocab_size=300).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(MismatchError, match=r"tokenizer is another tokenizer now than .*/corpus was begun with: "):
        stage("pack_corpus")(run)
    shutil.rmtree(tmp_path / "tokenizer")
    gone = stage("pack_corpus")(run)
    assert gone.summary["vocab_size"] == len(load_tokenizer(str(data / "tokenizer")))

    shutil.rmtree(run.corpus)
    shutil.copytree(data / "tokenizer", tmp_path / "tokenizer")
    assert stage("pack_corpus")(run).fingerprint == gone.fingerprint


def test_tokens_of_an_unknown_tokenizer_are_made_again(tmp_path: Path) -> None:
    for name in ("ledger", "tokens", "counts"):
        (tmp_path / name).mkdir()
    (tmp_path / "tokenizer").mkdir()
    assert pack_corpus._keeps_tokenizer(tmp_path)
    (tmp_path / "tokenizer").rmdir()
    assert not pack_corpus._keeps_tokenizer(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["counts"]


@pytest.mark.parametrize("named", ["trained", "/old/run/corpus/tokenizer"])
@pytest.mark.parametrize("record", [MANIFEST, PLAN])
def test_a_run_that_trains_its_tokenizer_goes_on_where_it_was_moved_to(
    named: str, record: str, data: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = small_config(data, tmp_path / "run")
    del tree["tokenizer"]
    tree["pack_corpus"] |= {"train_tokenizer": 300}
    run = Run(config=config_from_mapping(tree))
    if record == PLAN:
        with interrupted_before(monkeypatch, pack_corpus, pack_corpus.train_on_chunks):
            stage("pack_corpus")(run)
    else:
        stage("pack_corpus")(run)
    content = json.loads((run.corpus / record).read_text())
    assert content["options"]["tokenizer"] == "trained"
    content["options"]["tokenizer"] = named  # plans that were made before had a path
    content.pop("sha256", None)
    (run.corpus / record).write_text(json.dumps(content))

    (tmp_path / "run").rename(tmp_path / "moved")
    moved = stage("pack_corpus")(Run(config=replace(run.config, run_dir=str(tmp_path / "moved"))))
    assert moved.options["tokenizer"] == named


@pytest.mark.parametrize("verb", ["fit_factors", "build_query", "score_corpus"])
@pytest.mark.parametrize("resource", ["cpus", "gpus"])
def test_resources_that_this_machine_has_not_are_refused(
    verb: str, resource: str, copied: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder = {"fit_factors": "factors", "build_query": "query", "score_corpus": "scores"}[verb]
    config = copied(drop=(folder,), **{f"{verb}__resources": {"gpus": 0, resource: 3.0}})
    with pytest.raises(ConfigError, match=rf"{verb}\.resources\.{resource}: 1 process of .* there are 2 CPU and 0 GPU"):
        stage(verb)(Run(config=config))


def test_odd_documents_are_all_kept(pack: Callable[..., Any]) -> None:
    huge = "The pig sat in the barn. " * 420_000  # over 10 MB
    run, manifest = pack([row("x"), row(" \n\t " * 50), row(""), row(huge), row("The end is near, my friend.")])
    documents = document_table(run.corpus).to_pylist()
    assert [record["num_chars"] for record in documents][:3] == [1, 200, 0]
    assert documents[2]["num_tokens"] == 1  # its EOS
    assert documents[3]["num_chars"] == len(huge)
    assert manifest.rows["documents"] == 5
    assert manifest.rows["tokens"] == sum(record["num_tokens"] for record in documents)


def test_bad_rows_are_listed_and_fail_unless_allowed(pack: Callable[..., Any]) -> None:
    good = row("The pig sat in the barn and slept all day, and nobody minded it at all.")
    lines = [good, b'{"text": "\xff\xfe"}', good, b'{"other": 1}', row(7), b"not json"]
    with pytest.raises(StageError, match=r"4 bad rows") as caught:
        pack(lines, chunk_megabytes=2e-5)  # a chunk for every line or two
    assert all(f"in.jsonl row {i}" in str(caught.value) for i in (1, 3, 4, 5))
    run, manifest = pack(lines, max_bad_rows=4, chunk_megabytes=2e-5)
    assert manifest.rows["documents"] == 2
    listed = (run.corpus / "bad_rows.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[1]) for line in listed] == [1, 3, 4, 5]
    assert [record["row"] for record in document_table(run.corpus).to_pylist()] == [0, 2]


def test_an_input_edited_since_is_refused_also_when_it_is_as_long(pack: Callable[..., Any]) -> None:
    lines = [row("some words that are long enough to fill a block of tokens") for _ in range(8)]
    pack([*lines, row("the last")])
    with pytest.raises(MismatchError, match=r"files\..*in\.jsonl\.sha256 was"):
        pack([*lines, row("THE last")])


def test_an_input_mended_at_the_same_size_loses_no_row(pack: Callable[..., Any]) -> None:
    lines = [row("some words that are long enough to fill a block of tokens") for _ in range(8)]
    mended = row("the last")
    with pytest.raises(StageError, match="1 bad rows"):
        pack([*lines, mended[:-1] + b" "])
    run, manifest = pack([*lines, mended], max_bad_rows=1)
    assert (manifest.rows["documents"], manifest.summary["bad_rows"]) == (9, 0)
    assert document_table(run.corpus).to_pylist()[-1]["num_chars"] == len("the last")


def test_rows_of_an_input_count_over_all_its_chunks(pack: Callable[..., Any], tmp_path: Path) -> None:
    lines = [row(f"The pig of farm {i} sat in the barn.") for i in range(12)]
    inputs = [{"path": str(tmp_path / "in.jsonl"), "rows": rows} for rows in ([1, 3], [4, 9])]
    run, _ = pack(lines, inputs=inputs, chunk_megabytes=1e-4)
    assert sorted(record["row"] for record in document_table(run.corpus).to_pylist()) == [1, 2, 4, 5, 6, 7, 8]
    inputs[1]["rows"] = [4, 13]
    with pytest.raises(ConfigError, match=r"inputs\[1\]\.rows: ends at 13, but .*in\.jsonl has 12 rows"):
        pack(lines, inputs=inputs, run_dir=str(tmp_path / "other"))


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(finished: Config, copied: Callable[..., Config]) -> None:
    config = copied(drop=("model/baseline",), target__architecture={**ARCHITECTURE, "vocab_size": 100})
    with pytest.raises(ValueError, match=r"has 512 tokens but model target.architecture only 100"):
        stage("pretrain")(Run(config=config).with_mask(False))


def test_a_query_set_without_toxic_rows_is_refused(copied: Callable[..., Config], data: Path) -> None:
    rows = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()]
    benign = [item for item in rows if item["continuation"]["toxicity"] < 0.3]
    path = data / "benign_queries.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in benign))
    config = copied(drop=("query",), build_query__prompts={"path": str(path), "rows": None})
    with pytest.raises(ValueError, match=r"build_query.positive_threshold"):
        stage("build_query")(Run(config=config))


def test_prompts_edited_since_an_interrupted_run_leave_nothing_of_the_old_ones(
    copied: Callable[..., Config], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their completions hold a line separator, which is no end of a row."""
    rows = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(config=copied(drop=("query",), build_query__prompts={"path": str(prompts)}, build_query__partitions=1))

    with interrupted_before(monkeypatch, build_query, build_query.precondition_parts):
        stage("build_query")(run)
    for row in rows:
        row["continuation"]["text"] += "\u2028You see."
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage("build_query")(run)
    resumed = (run.query / "direction.safetensors").read_bytes()
    assert "\u2028" in read_queries(run.query)[0].completion
    shutil.rmtree(run.query)
    stage("build_query")(run)
    assert (run.query / "direction.safetensors").read_bytes() == resumed


def test_a_query_of_another_proxy_is_refused_with_both_fingerprints(
    copied: Callable[..., Config], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    fields = {**ARCHITECTURE, "vocab_size": 512}
    load_model(config_from_mapping({"proxy": {"architecture": fields}}).proxy, seed=9).save_pretrained(other)
    config = copied(drop=("scores",), proxy__source=str(other))
    query = read_manifest(Run(config=config).query)
    with pytest.raises(MismatchError, match=query.inputs["proxy"][:16]) as caught:
        stage("score_corpus")(Run(config=config))
    assert str(other) in str(caught.value)


def test_a_mask_of_another_corpus_is_refused_with_both_fingerprints(copied: Callable[..., Config]) -> None:
    config = copied(drop=("corpus", "model/penalised"), pack_corpus__block_size=32)
    mask = read_manifest(Run(config=config).mask)
    corpus = stage("pack_corpus")(Run(config=config))
    with pytest.raises(MismatchError, match=mask.inputs["corpus"][:16]) as caught:
        stage("pretrain")(Run(config=config))
    assert corpus.fingerprint[:16] in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"direction of gpt_neox\S+ is not finite"),
        (3e38, r"shard-00000.*not finite.*block 0"),  # finite itself, but not what comes of it
    ],
)
def test_not_finite_scores_name_module_or_shard_and_block(
    value: float, message: str, copied: Callable[..., Config]
) -> None:
    config = copied(drop=("scores",), score_corpus__preset="exact", score_corpus__check_blocks=0)
    path = Run(config=config).query / "direction.safetensors"
    direction = load_file(path)
    name = next(iter(direction))
    direction[name][:] = value
    save_file(direction, path)
    manifest = read_manifest(path.parent)
    write_manifest(path.parent, replace(manifest, files={**manifest.files, path.name: file_entry(path)}))
    with pytest.raises((StageError, ValueError), match=message):
        stage("score_corpus")(Run(config=config))


def test_a_run_directory_of_another_config_is_refused(copied: Callable[..., Config]) -> None:
    config = copied(build_mask__quantile=0.9)
    before = read_manifest(Run(config=config).mask)
    with pytest.raises(MismatchError, match=r"build_mask.quantile was 0.97, now 0.9"):
        stage("build_mask")(Run(config=config))
    assert read_manifest(Run(config=config).mask) == before


def test_a_truncated_input_artifact_is_refused(copied: Callable[..., Config]) -> None:
    config = copied(drop=("mask", "ranking"))
    shard = data_files(Run(config=config).scores)[0]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(ValueError, match=shard.name):
        stage("build_mask")(Run(config=config))


def test_a_stage_before_its_input_says_what_to_run(data: Path, tmp_path: Path) -> None:
    run = Run(config=config_from_mapping(small_config(data, tmp_path / "run")))
    with pytest.raises(FileNotFoundError, match=r"run `ifguide pack_corpus` first"):
        stage("build_mask")(run)


def test_the_resolved_config_of_an_artifact_is_equal_to_the_run(finished: Config) -> None:
    text = (Run(config=finished).scores / "config.yaml").read_text()
    assert config_from_mapping(yaml.safe_load(text)) == finished
    assert yaml.safe_load(text) == to_mapping(finished)
