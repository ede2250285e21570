"""The plan of a run: what its estimates rest on, how they scale, and what it refuses."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ifguide.artifacts import MANIFEST, Manifest
from ifguide.cli import main
from ifguide.config import VERBS, Input, Prompts, load_config
from ifguide.config.resources import WorkerResources
from ifguide.hardware import hardware
from ifguide.influence.method import PRESETS, Method
from ifguide.planning import flops
from ifguide.planning.command import DEFAULT_TOKENS, make_job, plan, planned_tokens, worker_settings
from ifguide.planning.corpus_size import BYTES_PER_TOKEN, input_size
from ifguide.planning.estimate import estimate
from ifguide.planning.job import ASSUMED_ROWS, StageEstimate, rows
from ifguide.planning.measurements import MOST, _tables, efficiency, rates, sources, throughputs
from ifguide.shapes import published_shapes, shape_of_fields

CONFIGS = Path(__file__).parents[3] / "configs"
PYTHIA = CONFIGS / "pythia160m_owt.yaml"


@pytest.fixture(scope="module")
def pythia() -> dict[str, Any]:
    return plan(PYTHIA, corpus_tokens=1e9, price_per_hour=2.0)


def _neox(vocabulary: int, hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt_neox", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers, "num_attention_heads": heads}  # fmt: skip


def test_every_measurement_has_a_source_and_a_possible_value() -> None:
    for name, (kind, source) in sources().items():
        assert kind in ("measured", "published", "assumed"), name
        assert source.strip(), name
    for item in throughputs():
        assert 0 < item.efficiency < MOST, item.id
    assert all(rate.value > 0 for rate in rates().values())


def test_the_flop_beside_the_measurements_are_those_of_their_models() -> None:
    hub = published_shapes()
    shapes = {
        "GPT-NeoX of 33.6M": _neox(8192, 512, 8, 8),
        "GPT-NeoX of 1.3M": _neox(2048, 128, 4, 4),
        "GPT-2": hub["openai-community/gpt2"]["fields"],
        "Pythia-160M": hub["EleutherAI/pythia-160m"]["fields"],
        "Pythia-1B": hub["EleutherAI/pythia-1b"]["fields"],
        "Llama-3.2-1B": hub["meta-llama/Llama-3.2-1B"]["fields"],
    }
    position = {"attribution": "position", "method": PRESETS["exact"]}
    for entry in _tables()["throughput"]:
        if "flop" not in entry:
            continue
        shape, block = shape_of_fields(entry["model"], "test", shapes[entry["model"]]), entry["block"]
        factors = flops.covariance(shape, block) + flops.lambda_(shape, block)
        counted = {
            "factors": factors,
            "train": shape.training_flop(block),
            "generate": shape.forward_flop(block),
            "score": flops.scoring(shape, block, attribution="target", method=PRESETS["fast"]),
        }[entry["pass"]]
        if entry["program"] == "paper":
            counted = factors + flops.scoring(shape, block, **position)
        elif entry["id"] == "score-30m-exact":
            counted = flops.scoring(shape, block, attribution="target", method=PRESETS["exact"])
        assert entry["flop"] == pytest.approx(counted, rel=0.02), entry["id"]
        assert entry["size"] == shape.tracked, entry["id"]


def test_what_was_measured_here_is_given_back_and_elsewhere_is_called_an_extrapolation() -> None:
    cpu = hardware("cpu")
    seen = next(item for item in throughputs() if item.id == "score-30m-fast")
    here = efficiency("score", cpu, "bfloat16", seen.size)
    assert here.expected == pytest.approx(seen.efficiency)
    assert not here.extrapolated
    assert efficiency("score", cpu, "bfloat16", 100 * seen.size).extrapolated
    on_a_gpu = next(item for item in throughputs() if item.id == "score-160m-h200")
    assert not efficiency("score", hardware("h200"), "bfloat16", on_a_gpu.size).extrapolated
    there = efficiency("score", hardware("h100"), "bfloat16", on_a_gpu.size)
    assert there.extrapolated
    assert there.expected == pytest.approx(on_a_gpu.efficiency)
    assert set(there.basis) == {"score-160m-h200", "score-1b-h200"}, "other programs say nothing of this one"
    elsewhere = efficiency("factors", hardware("h100"), "bfloat16", 1e8)
    assert elsewhere.extrapolated
    assert elsewhere.low < elsewhere.expected < elsewhere.high < MOST
    with pytest.raises(ValueError, match="no measurement of dreaming"):
        efficiency("dreaming", cpu, "bfloat16", 1e6)


def test_the_plan_has_every_stage_with_floor_below_range(pythia: dict[str, Any]) -> None:
    assert {stage["stage"] for stage in pythia["stages"]} == set(VERBS) - {"fit_student"}
    for stage in pythia["stages"]:
        hours = stage["hours"]
        assert stage["floor_hours"] <= hours["low"] <= hours["expected"] <= hours["high"], stage["stage"]
        assert stage["memory_bytes_per_worker"] > 0
        assert stage["storage_bytes"] > 0
        assert set(stage["basis"]) <= set(pythia["sources"])
        if stage["on_gpu"]:
            assert stage["gpu_hours"] == pytest.approx(hours["expected"] * stage["workers"], rel=1e-2)
            assert stage["cost"] == pytest.approx(2.0 * stage["gpu_hours"], rel=1e-2)
            assert stage["extrapolated"], "nothing was measured on this GPU"
        else:
            assert stage["gpu_hours"] == stage["cost"] == 0


def test_scoring_and_training_grow_with_the_corpus_and_the_fitted_sample_does_not() -> None:
    job = make_job(load_config(PYTHIA), corpus_tokens=1e9)
    once = {stage.stage: stage for stage in estimate(job)}
    more = {stage.stage: stage for stage in estimate(replace(job, tokens=1e10))}
    for name in ("score_corpus", "pretrain"):
        assert more[name].flop == pytest.approx(10 * once[name].flop)
        assert more[name].floor == pytest.approx(10 * once[name].floor)
    assert more["fit_factors"].flop == once["fit_factors"].flop


def test_what_a_query_is_asked_for_besides_is_planned() -> None:
    def query(**options: int) -> float:
        config = load_config(PYTHIA, ["build_query.reliability_queries=0"])
        config = replace(config, build_query=replace(config.build_query, **options))
        return next(
            stage.flop for stage in estimate(make_job(config, corpus_tokens=1e9)) if stage.stage == "build_query"
        )

    plain, refined = query(), [query(refine_steps=steps, refine_blocks=100) for steps in (1, 3)]
    assert refined[1] - plain == pytest.approx(3 * (refined[0] - plain))
    assert query(nulls=4) > 1.9 * plain
    assert 1 < query(reliability_queries=256) / plain < 1.2


def test_further_prompts_are_continued_too(tmp_path: Path) -> None:
    def continuations(**sets: dict[str, Any]) -> tuple[float, list[str]]:
        job = make_job(load_config(PYTHIA, [f"evaluate.prompt_sets={json.dumps(sets)}"]), corpus_tokens=1e9)
        (stage,) = (stage for stage in estimate(job) if stage.stage == "evaluate")
        return stage.storage / rates()["continuation_bytes"].value / 50, job.notes  # 25 of each of two models

    (tmp_path / "bold.json").write_text(json.dumps({"group": {"name": ["A", "B"], "other": ["C"]}}))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "A"}\n' * 9)
    bold, rows = {"path": str(tmp_path / "bold.json")}, {"path": str(tmp_path / "rows.jsonl")}
    plain = continuations()[0]
    assert continuations(bold=bold)[0] - plain == pytest.approx(2)
    assert continuations(bold={**bold, "prompts_per_name": None}, rows=rows)[0] - plain == pytest.approx(3 + 9)
    assert continuations(rows={**rows, "max_prompts": 4})[0] - plain == pytest.approx(4)
    count, notes = continuations(none={"path": str(tmp_path / "none.jsonl"), "max_prompts": 5})
    assert count - plain == pytest.approx(5)
    assert any("none.jsonl of evaluate.prompt_sets.none is not there yet: 5 rows are assumed" in note for note in notes)


def test_prompts_of_any_kind_of_file_are_counted(tmp_path: Path) -> None:
    job = make_job(load_config(PYTHIA), corpus_tokens=1e6)
    (tmp_path / "a.csv").write_text('prompt,continuation\n"two\nlines",x\nb,y\n')
    (tmp_path / "b.json").write_text(json.dumps([{"prompt": "a"}] * 4))
    (tmp_path / "c.jsonl").write_text('{"prompt": "a"}\n\n')
    pq.write_table(pa.table({"prompt": ["a"] * 8}), tmp_path / "d.parquet")
    notes = list(job.notes)
    for name, count in {"a.csv": 2, "b.json": 4, "c.jsonl": 1, "d.parquet": 8, "*": 15, "": 15}.items():
        assert rows(job, Prompts(path=str(tmp_path / name)), "build_query.prompts") == count
    assert job.notes == notes


def test_workers_are_set_by_keys_that_the_run_takes_too() -> None:
    config = load_config(PYTHIA)
    settings = worker_settings(config, 4)
    assert load_config(PYTHIA, settings).score_corpus.max_actors == 4
    four, eight = plan(PYTHIA, corpus_tokens=1e10, gpus=4), plan(PYTHIA, corpus_tokens=1e10, gpus=8)
    assert four["settings"] == settings
    ratio = {stage["stage"]: stage["floor_hours"] for stage in four["stages"]}
    for stage in eight["stages"]:
        if stage["stage"] in ("score_corpus", "pretrain"):
            assert ratio[stage["stage"]] == pytest.approx(2 * stage["floor_hours"], rel=1e-3)
    with pytest.raises(ValueError, match="--gpus 0"):
        worker_settings(config, 0)


def test_a_training_in_one_process_keeps_its_one_worker() -> None:
    in_one = ["pretrain.engine=torch", "pretrain.workers=1", "pretrain.zero_stage=0"]
    planned = plan(PYTHIA, in_one, corpus_tokens=1e9, gpus=4)
    assert not any(setting.startswith("pretrain.") for setting in planned["settings"])
    assert {stage["stage"]: stage["workers"] for stage in planned["stages"]}["pretrain"] == 1


def test_fewer_workers_lower_the_least_number_of_them_too() -> None:
    path, vocabulary = CONFIGS / "demo.yaml", "target.architecture.vocab_size=2048"
    least = [vocabulary, "score_corpus.min_actors=2", "pretrain.min_workers=2"]
    one = plan(path, least, corpus_tokens=1e6, gpus=1)["settings"]
    assert {"score_corpus.min_actors=1", "pretrain.min_workers=1"} < set(one)
    loaded = load_config(path, [*least, *one])
    assert (loaded.score_corpus.min_actors, loaded.score_corpus.max_actors) == (1, 1)
    assert (loaded.pretrain.min_workers, loaded.pretrain.workers) == (1, 1)
    for kept in (worker_settings(load_config(path, least), 2), worker_settings(load_config(PYTHIA), 1)):
        assert not any(".min_" in setting for setting in kept), "it stays where it is low enough"


def test_a_packed_corpus_and_prompts_are_found_in_a_remote_store(store: Path) -> None:
    (store / "prompts.jsonl").write_text("{}\n" * 3)
    keys = [f"run_dir={store}", f"build_query.prompts={store}/prompts.jsonl"]
    assert planned_tokens(load_config(PYTHIA, keys))[0] == DEFAULT_TOKENS
    described = {"verb": "pack_corpus", "fingerprint": "", "created": "", "seconds": 0.0, "rows": {"tokens": 12345}}
    manifest = Manifest(**{field.name: {} for field in fields(Manifest)} | described)
    (store / "corpus" / MANIFEST).write_text(json.dumps(asdict(manifest)))
    assert planned_tokens(load_config(PYTHIA, keys)) == (12345.0, [f"corpus size: of {store}/corpus"])
    job = make_job(load_config(PYTHIA, keys))
    assert job.tokens == 12345.0
    assert rows(job, job.config.build_query.prompts, "build_query.prompts") == 3
    missing = Prompts(path=f"{store}/none.jsonl")
    assert rows(job, missing, "evaluate.prompts") == ASSUMED_ROWS


def test_fewer_shards_than_actors_take_longer_and_the_plan_says_so() -> None:
    few = ["pack_corpus.blocks_per_shard=60000"]  # nine shards for eight actors
    slow = {stage["stage"]: stage for stage in plan(PYTHIA, few, corpus_tokens=1e9)["stages"]}["score_corpus"]
    fast = {stage["stage"]: stage for stage in plan(PYTHIA, corpus_tokens=1e9)["stages"]}["score_corpus"]
    assert slow["hours"]["expected"] > 1.5 * fast["hours"]["expected"]
    assert "blocks_per_shard" in slow["notes"][0]


def test_partitions_wait_for_the_workers_that_there_are() -> None:
    keys = ["fit_factors.data_partitions=64", "score_corpus.max_actors=16", "pretrain.workers=16"]
    more = {stage["stage"]: stage for stage in plan(PYTHIA, keys, corpus_tokens=1e9)["stages"]}["fit_factors"]
    assert more["workers"] == 16
    job = make_job(load_config(PYTHIA, keys), corpus_tokens=1e9)
    assert job.at_once(64, WorkerResources(gpus=0, cpus=2)) == job.cores // 2
    assert job.at_once(3, WorkerResources(gpus=1, cpus=4)) == 3


def test_parts_of_the_modules_hold_less_and_read_the_sample_anew() -> None:
    def fitting(*further: str) -> StageEstimate:
        job = make_job(load_config(PYTHIA, further), corpus_tokens=1e9)
        return next(stage for stage in estimate(job) if stage.stage == "fit_factors")

    whole, parts = fitting(), fitting("fit_factors.module_partitions=4")
    job = make_job(load_config(PYTHIA), corpus_tokens=1e9)
    tokens = job.config.fit_factors.sample_blocks * job.block
    assert parts.flop - whole.flop == pytest.approx(tokens * 2 * 3 * flops.traced(job.proxy, job.block))
    assert parts.seconds > whole.seconds
    sums = 4 * sum(out**2 + inner**2 for out, inner in job.proxy.linears)  # twelve layers alike, three in a part
    assert whole.memory - parts.memory == pytest.approx(sums * 3 / 4)
    one = "fit_factors.data_partitions=1"
    assert fitting(one, "fit_factors.module_partitions=4").workers == 4 * fitting(one).workers


def test_a_model_that_does_not_fit_is_said_to() -> None:
    large = ["target=EleutherAI/pythia-12b", "pretrain.zero_stage=0"]
    stages = {stage["stage"]: stage for stage in plan(PYTHIA, large, corpus_tokens=1e9)["stages"]}
    assert any("GPU memory" in note for note in stages["pretrain"]["notes"])


def test_the_json_of_a_plan_is_stable(capsys: pytest.CaptureFixture[str], pythia: dict[str, Any]) -> None:
    command = ["plan", "--config", str(PYTHIA), "--corpus-tokens", "1e9", "--price-per-hour", "2", "--json"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert main(command) == 0
    assert capsys.readouterr().out == first
    assert json.loads(first) == json.loads(json.dumps(pythia))
    assert list(json.loads(first)) == [
        "config", "settings", "corpus_tokens", "machine", "cores", "price_per_hour", "proxy", "target", "method",
        "scoring_tokens_per_second_per_actor", "stages", "total", "notes", "sources",
    ]  # fmt: skip


def test_the_text_names_stages_sources_and_extrapolations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(PYTHIA), "--corpus-tokens", "1e9"]) == 0
    text = capsys.readouterr().out
    for verb in VERBS:
        assert (f"\n{verb}" in text) == (verb != "fit_student")
    assert "] measured: score-160m-h200: bench/LOG.md" in text
    assert "~ extrapolated" in text


def test_an_unknown_gpu_and_an_empty_corpus_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(PYTHIA), "--gpu", "abacus"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ifguide plan: GPU type abacus: not known, only cpu, h100")
    assert main(["plan", "--config", str(PYTHIA), "--corpus-tokens", "0"]) == 1
    assert "--corpus-tokens 0" in capsys.readouterr().err


def test_rank_and_precision_of_the_config_decide_the_flop() -> None:
    job = make_job(load_config(PYTHIA, ["score_corpus.rank=8"]), corpus_tokens=1e9)
    method = Method(engine="difference", precision="bfloat16", rank=8)
    stage = {item.stage: item for item in estimate(job)}["score_corpus"]
    assert stage.flop == 1e9 * flops.scoring(job.proxy, 2048, attribution="target", method=method)


def test_a_corpus_that_is_not_packed_is_planned_from_the_bytes_of_its_inputs(tmp_path: Path) -> None:
    text = "The weather in the city was cold. " * 200
    rows = [{"text": text, "note": "n" * 1000, "ids": list(range(1000))} for _ in range(50)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.txt").write_text(text * 50)
    varied = [{**row, "text": f"{i} {text}"} for i, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(varied), tmp_path / "a.parquet", use_dictionary=False)
    expected = 50 * len(text) / BYTES_PER_TOKEN
    for name in ("a.jsonl", "a.txt", "a.parquet"):
        config = load_config(PYTHIA, [f"run_dir={tmp_path}/run", f"pack_corpus.inputs=[{tmp_path}/{name}]"])
        tokens, (note,) = planned_tokens(config)
        assert tokens == pytest.approx(expected, rel=0.01), name
        assert note.startswith(f"corpus size: estimated from {(tmp_path / name).stat().st_size:,} bytes in 1 file;")
    assert input_size([Input(path=f"{tmp_path}/a.jsonl.gz")]).tokens > 1000
    assert input_size([Input(path=f"{tmp_path}/a.jsonl", tokens_column="ids")]).tokens == pytest.approx(50_000)
    files = [Input(path=f"{tmp_path}/a.*", rows=(0, 5))]
    assert input_size(files).files == 4
    config = load_config(PYTHIA, [f"run_dir={tmp_path}/run"])
    config = replace(config, pack_corpus=replace(config.pack_corpus, inputs=tuple(files)))
    assert "in 4 files; pack it" in planned_tokens(config)[1][0]
    missing = [f"run_dir={tmp_path}/run", f"pack_corpus.inputs=[{tmp_path}/none.jsonl]"]
    assert planned_tokens(load_config(PYTHIA, missing))[0] == DEFAULT_TOKENS
    assert input_size([]) is None


def test_of_an_input_the_rows_that_it_takes_are_planned(tmp_path: Path) -> None:
    """As far as its files tell how many they have."""
    rows = [{"text": f"{i} The weather in the city was cold."} for i in range(1000)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "a.csv").write_text("text\n" + "".join(row["text"] + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "rows.txt").write_text("3\n8\n900\n")
    for name in ("jsonl", "json", "parquet"):
        everything = input_size([Input(path=f"{tmp_path}/a.{name}")])
        for taken, count in (((100, 350), 250), ((0, 4000), 1000), (str(tmp_path / "rows.txt"), 3)):
            size = input_size([Input(path=f"{tmp_path}/a.{name}", rows=taken)])
            assert size.tokens == pytest.approx(everything.tokens * count / 1000, rel=0.03), (name, taken)
            assert not size.whole
    everything, part = (input_size([Input(path=f"{tmp_path}/a.csv", rows=rows)]) for rows in (None, (0, 9)))
    assert part == everything._replace(whole=True)
    config = load_config(PYTHIA, [f"run_dir={tmp_path}/run"])
    inputs = (Input(path=f"{tmp_path}/a.csv", rows=(0, 9)),)
    config = replace(config, pack_corpus=replace(config.pack_corpus, inputs=inputs))
    assert "in 1 file, rows that `rows` leaves out too" in planned_tokens(config)[1][0]
