"""The plan of a training: the size of real models, memory against counts of real tensors, and what is refused."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ifguide.artifacts import Manifest, write_json
from ifguide.cli import main
from ifguide.config import Config, ConfigError, ModelSource, PackCorpus, Pretrain, load_config
from ifguide.config.resources import WorkerResources
from ifguide.hardware import hardware, hardware_of_device
from ifguide.models import load_model, transformer_blocks
from ifguide.planning import pretrain_plan
from ifguide.planning.command import make_job
from ifguide.planning.estimate import estimate
from ifguide.planning.models import target_shape
from ifguide.planning.pretrain_plan import describe, plan_pretrain, require_fit
from ifguide.planning.training_memory import BUCKET, LIVE, USABLE, count_activations, training_memory
from ifguide.shapes import shape_of_fields
from tests.tiny import ARCHITECTURES

CONFIGS = Path(__file__).parents[3] / "configs"
PARAMETERS = {
    "pythia160m_owt": 162_322_944,
    "pythia410m": 405_334_016,
    "pythia1b": 1_011_781_632,
    "pythia2.8b": 2_775_208_960,
    "pythia12b": 11_846_072_320,
    "llama32_1b": 1_235_814_400,
    "finetune": 1_011_781_632,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_ready_config_plans_the_real_model_and_fits(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    plan = plan_pretrain(config)
    assert plan.target.parameters == PARAMETERS[name]
    require_fit(plan)
    assert config.pretrain.batch_blocks * config.pack_corpus.block_size == (131_072 if name == "finetune" else 524_288)


def test_dry_run_says_parameters_memory_by_part_steps_and_hours() -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ifguide").addHandler(handler)
    try:
        assert main(["pretrain", "--config", str(CONFIGS / "pythia1b.yaml"), "--dry-run"]) == 0
    finally:
        logging.getLogger("ifguide").removeHandler(handler)
    text = "\n".join(lines)
    assert "1,011,781,632 parameters" in text
    assert "7,614 steps of 524,288 tokens" in text
    for part in ("weights", "gradients", "optimizer", "buffers", "activations", "head"):
        assert re.search(rf"{part} [\d.]+ GB", text), part
    assert "activations with checkpointing" in text
    assert re.search(r"~[\d.]+ (min|h) \(", text)


def test_dry_run_refuses_what_cannot_fit(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "pythia12b.yaml")
    arguments = ["pretrain", "--config", config, "--dry-run", "--set", "pretrain.zero_stage=0"]
    assert main(arguments) == 1
    assert "pretrain.zero_stage: " in capsys.readouterr().err


def test_adapters_fit_where_all_weights_do_not() -> None:
    """Of Pythia-12B's 11.8e9 parameters, 36 blocks of four maps, ranks of 16."""
    changes = ["pretrain.init_from=EleutherAI/pythia-12b", "pretrain.activation_checkpointing=true"]
    changes += ["pretrain.workers=1", "pretrain.micro_batch_blocks=1", "pretrain.zero_stage=0"]
    whole = plan_pretrain(load_config(CONFIGS / "pythia12b.yaml", changes))
    adapters = plan_pretrain(load_config(CONFIGS / "pythia12b.yaml", [*changes, "pretrain.lora={rank: 16}"]))
    assert (whole.fits, adapters.fits) == (False, True)
    width = 5120
    count = 36 * 16 * ((width + 3 * width) + 2 * width + 2 * (width + 4 * width))
    assert f"from EleutherAI/pythia-12b, adapters of {count:,} parameters alone" in describe(adapters)[0]


def test_a_training_that_may_begin_on_fewer_workers_must_fit_on_those() -> None:
    changes = ["target=EleutherAI/pythia-6.9b", "pretrain.workers=8", "pretrain.activation_checkpointing=true"]
    all_workers = plan_pretrain(load_config(CONFIGS / "pythia1b.yaml", changes))
    fewer = plan_pretrain(load_config(CONFIGS / "pythia1b.yaml", [*changes, "pretrain.min_workers=2"]))
    assert (all_workers.fits, fewer.fits) == (True, False)
    assert fewer.memory.optimizer == pytest.approx(4 * all_workers.memory.optimizer)
    text = "\n".join(describe(fewer))
    assert "2 to 8 workers" in text
    assert "memory per GPU (h100) of 2" in text
    with pytest.raises(ConfigError, match=r"it fits with --set pretrain\.min_workers=null") as refused:
        require_fit(fewer)
    advised = re.findall(r"--set (\S+)", str(refused.value))
    require_fit(plan_pretrain(load_config(CONFIGS / "pythia1b.yaml", [*changes, "pretrain.min_workers=2", *advised])))


def test_the_disk_holds_the_model_the_checkpoints_that_stay_and_one_more() -> None:
    changes = ["pretrain.keep_last=2", "pretrain.heldout_blocks=8", "pretrain.keep_best=1"]
    one = ["pretrain.keep_last=1", "pretrain.heldout_blocks=0", "pretrain.export=last"]
    plain, more = (plan_pretrain(load_config(CONFIGS / "pythia1b.yaml", which)) for which in (one, changes))
    P = PARAMETERS["pythia1b"]
    assert plain.estimate.storage == pytest.approx(4 * P + 2 * 14 * P)
    assert more.estimate.storage == pytest.approx(4 * P + 4 * 14 * P)


def test_adapters_take_less_of_the_disk_and_of_the_hours_than_all_weights() -> None:
    changes = ["pretrain.init_from=EleutherAI/pythia-1b"]
    whole = plan_pretrain(load_config(CONFIGS / "pythia1b.yaml", changes))
    adapters = plan_pretrain(load_config(CONFIGS / "pythia1b.yaml", [*changes, "pretrain.lora={rank: 16}"]))
    assert 0.6 < adapters.estimate.flop / whole.estimate.flop < 0.75
    assert adapters.estimate.storage < 1.1 * 4 * PARAMETERS["pythia1b"]


@pytest.mark.parametrize("family", ["gpt_neox", "llama3", "gemma2", "gpt2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_those_that_autograd_keeps_of_the_real_model(family: str, dtype: str) -> None:
    """On a real model every attention is the flash kernel's, so what differs is at most its row statistics."""
    fields, tokens = dict(ARCHITECTURES[family]), 32
    if family == "gpt2":
        fields |= {"attn_pdrop": 0.0}  # the kernel of a CPU has no dropout
    eager_only = family == "gemma2"
    shape = shape_of_fields(family, "test", fields)
    model = load_model(
        ModelSource(architecture=fields),
        dtype=getattr(torch, dtype),
        attn_implementation="eager" if eager_only else "sdpa",
    )
    model.train()
    kept = _kept_by_autograd(model, tokens)
    counted = count_activations(shape, tokens, dtype)
    if eager_only:
        assert counted.whole < kept  # the square of attention weights is not kept by a flash kernel
    else:
        assert counted.whole == pytest.approx(kept, rel=0.1)
    assert counted.checkpointed < counted.whole


def _kept_by_autograd(model: Any, tokens: int) -> int:
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def test_checkpointing_keeps_one_input_for_each_block() -> None:
    fields = {**ARCHITECTURES["llama"], "num_hidden_layers": 12}
    shape, tokens = shape_of_fields("tiny", "test", fields), 32
    counted = count_activations(shape, tokens, "float32")
    assert len(transformer_blocks(shape.skeleton)[1]) == 12
    one_more = count_activations(
        shape_of_fields("tiny", "test", {**fields, "num_hidden_layers": 13}), tokens, "float32"
    )
    assert one_more.checkpointed - counted.checkpointed == 4 * tokens * 16
    assert one_more.whole - counted.whole > 10 * 4 * tokens * 16


@pytest.fixture(scope="module")
def billion() -> Config:
    return load_config(CONFIGS / "pythia1b.yaml")


def test_each_stage_of_zero_splits_one_part_more(billion: Config) -> None:
    shape = target_shape(billion)
    memories = [training_memory(replace(billion.pretrain, zero_stage=stage), shape, 2048) for stage in range(4)]
    P = shape.parameters
    for stage, memory in enumerate(memories):
        assert memory.optimizer == pytest.approx(12 * P / (8 if stage >= 1 else 1))
        assert memory.gradients == pytest.approx(2 * P / (8 if stage >= 2 else 1))
        assert memory.weights == pytest.approx(2 * P / (8 if stage >= 3 else 1))
    alone = replace(billion.pretrain, workers=1, zero_stage=3)
    assert training_memory(alone, shape, 2048).weights == pytest.approx(2 * P)
    offloaded = training_memory(replace(billion.pretrain, offload_optimizer=True), shape, 2048)
    assert offloaded.optimizer == 0
    assert offloaded.gradients == pytest.approx(2 * P), "stage 1 adds them up where they are made"


def test_of_what_is_offloaded_the_gpu_holds_what_is_at_work() -> None:
    """Parameters that ZeRO-3 has gathered, and a bucket of gradients on its way."""
    shape = target_shape(load_config(CONFIGS / "pythia12b.yaml"))
    alone = Pretrain(workers=1, zero_stage=3, batch_blocks=8, offload_optimizer=True)
    for train in (alone, replace(alone, zero_stage=2)):
        memory = training_memory(train, shape, 2048)
        assert memory.weights == 2 * shape.parameters
        assert (memory.gradients, memory.optimizer) == (2 * BUCKET, 0)
    for folder in (None, "/nvme"):
        memory = training_memory(replace(alone, offload_parameters=True, offload_nvme=folder), shape, 2048)
        assert (memory.weights, memory.gradients, memory.optimizer) == (2 * LIVE, 2 * BUCKET, 0)
    parted = replace(alone, workers=8, offload_parameters=True, offload_optimizer=False)
    memory = training_memory(parted, shape, 2048)
    assert memory.weights == 2 * LIVE
    assert memory.buffers == max(2 * BUCKET, 4 * shape.parameters / 8), "what is gathered counts once"
    small = training_memory(parted, shape_of_fields("tiny", "test", ARCHITECTURES["llama"]), 16)
    assert small.weights == 2 * shape_of_fields("tiny", "test", ARCHITECTURES["llama"]).parameters


def test_a_gpu_that_offloading_suffices_for_is_not_refused() -> None:
    changes = ["pretrain.workers=1", "cluster.gpu=l40s", "pretrain.micro_batch_blocks=1", "pretrain.zero_stage=3"]
    changes += ["pretrain.activation_checkpointing=true", "pretrain.resources.gpus=0.3"]
    optimizer = [*changes, "pretrain.offload_optimizer=true"]
    with pytest.raises(ConfigError, match=r"^pretrain\.offload_parameters: .*it fits with --set \S+=true \(7.3 GB\)$"):
        require_fit(plan_pretrain(load_config(CONFIGS / "pythia12b.yaml", optimizer)))
    require_fit(
        plan_pretrain(load_config(CONFIGS / "pythia12b.yaml", [*optimizer, "pretrain.offload_parameters=true"]))
    )
    compiled = "pretrain.acceleration.compiled_layers=true"  # not with ZeRO-3, which offloaded parameters need
    changes[3:4] = ["pretrain.zero_stage=1", compiled]
    with pytest.raises(ConfigError, match="cannot fit"):
        require_fit(plan_pretrain(load_config(CONFIGS / "pythia12b.yaml", changes)))


def test_activations_and_head_grow_with_the_micro_batch_and_nothing_else_does(billion: Config) -> None:
    shape = target_shape(billion)
    one, four = (
        training_memory(replace(billion.pretrain, micro_batch_blocks=blocks), shape, 2048) for blocks in (1, 4)
    )
    assert four.activations == 4 * one.activations
    assert (four.weights, four.optimizer, four.buffers) == (one.weights, one.optimizer, one.buffers)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"micro_batch_blocks": 32}, "activation_checkpointing"),
        ({"workers": 1, "zero_stage": 0, "activation_checkpointing": True}, "offload_optimizer"),
        ({"workers": 1, "engine": "torch", "activation_checkpointing": True}, "offload_optimizer"),
        ({"zero_stage": 0, "activation_checkpointing": True, "micro_batch_blocks": 1}, "zero_stage"),
        (
            {
                "zero_stage": 3,
                "activation_checkpointing": True,
                "micro_batch_blocks": 32,
                "resources": WorkerResources(gpus=0.4),
            },
            "micro_batch_blocks",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_changes_that_fit(billion: Config, changes: dict[str, Any], key: str) -> None:
    target = "EleutherAI/pythia-1b" if key == "activation_checkpointing" else "EleutherAI/pythia-6.9b"
    config = replace(billion, target=ModelSource(source=target), pretrain=replace(billion.pretrain, **changes))
    with pytest.raises(ConfigError, match=rf"^pretrain\.{key}: .* needed per GPU, h100 has 80") as refused:
        require_fit(plan_pretrain(config))
    advised = re.findall(r"--set (\S+)", str(refused.value))
    assert advised
    plain = asdict(replace(billion.pretrain, **changes))
    changed = [f"pretrain.{name}={json.dumps(plain[name])}" for name in changes]
    again = load_config(CONFIGS / "pythia1b.yaml", [f"target={target}", *changed, *advised])
    require_fit(plan_pretrain(again))


def test_advice_for_several_workers_keeps_the_deepest_stage_beside_offloading(billion: Config) -> None:
    small = {"micro_batch_blocks": 1, "resources": WorkerResources(gpus=0.15)}
    changes = {"zero_stage": 0, "activation_checkpointing": True, **small}
    target = ModelSource(source="EleutherAI/pythia-12b")
    config = replace(billion, target=target, pretrain=replace(billion.pretrain, **changes))
    with pytest.raises(ConfigError, match=r"offload_optimizer=true") as refused:
        require_fit(plan_pretrain(config))
    assert "pretrain.zero_stage=3" in str(refused.value)


def test_blocks_longer_than_the_models_positions_are_refused(billion: Config) -> None:
    longer = replace(billion, pack_corpus=replace(billion.pack_corpus, block_size=4096))
    with pytest.raises(ValueError, match=r"^pack_corpus\.block_size: 4096 tokens are more than the 2048 positions of"):
        plan_pretrain(longer)


def test_a_mixture_of_experts_is_planned_unless_it_is_to_be_traced() -> None:
    mixture = {**ARCHITECTURES["llama"], "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    config = Config(
        target=ModelSource(architecture=mixture),
        proxy=ModelSource(source="EleutherAI/pythia-160m"),
        pack_corpus=PackCorpus(block_size=16),
    )
    assert plan_pretrain(config).memory.activations > 0
    with pytest.raises(ValueError, match=r"activations in float32 cannot be counted"):
        plan_pretrain(replace(config, pretrain=replace(config.pretrain, dtype="float32")))
    with pytest.raises(ValueError, match="a mixture of experts"):
        plan_pretrain(replace(config, proxy=ModelSource()))


def test_what_fits_nowhere_says_so_and_a_worker_without_a_gpu_is_not_judged(billion: Config) -> None:
    small = hardware("h100")
    plan = plan_pretrain(billion)
    with pytest.raises(ConfigError, match="target: EleutherAI/pythia-1b cannot fit"):
        require_fit(replace(plan, machine=replace(small, memory=1e8)))
    without = plan_pretrain(replace(billion, pretrain=replace(billion.pretrain, resources=WorkerResources(gpus=0))))
    require_fit(without)
    assert any("memory per worker" in line for line in describe(without))
    with pytest.raises(ConfigError, match=r"cluster\.gpu: GPU type abacus"):
        plan_pretrain(load_config(CONFIGS / "pythia1b.yaml", ["cluster.gpu=abacus"]))


def test_the_plan_of_all_stages_and_that_of_training_are_one(billion: Config) -> None:
    plan = plan_pretrain(billion)
    whole = next(
        item for item in estimate(make_job(load_config(CONFIGS / "pythia160m_owt.yaml"))) if item.stage == "pretrain"
    )
    small = plan_pretrain(load_config(CONFIGS / "pythia160m_owt.yaml"))
    assert whole.flop == pytest.approx(2 * small.estimate.flop)  # the baseline too
    assert whole.memory == small.memory.total
    assert plan.memory.total < USABLE * plan.machine.memory


def test_devices_are_known_by_the_names_that_cuda_gives_them() -> None:
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100_pcie", "NVIDIA H200": "h200",
             "NVIDIA A100-SXM4-40GB": "a100", "NVIDIA A100 80GB PCIe": "a100", "NVIDIA L40S": "l40s",
             "NVIDIA GH200 480GB": "gh200"}  # fmt: skip
    for cuda_name, name in names.items():
        found = hardware_of_device(cuda_name)
        assert found is not None
        assert found.name == name
    assert hardware_of_device("Abacus 3000") is None


def test_full_precision_of_one_worker_without_zero() -> None:
    shape = shape_of_fields("tiny", "test", ARCHITECTURES["llama"])
    config = Pretrain(workers=1, zero_stage=0, dtype="float32", micro_batch_blocks=2)
    memory = training_memory(config, shape, 16)
    P = shape.parameters
    assert (memory.weights, memory.gradients, memory.optimizer, memory.buffers) == (4 * P, 4 * P, 8 * P, 0)


def test_the_engine_torch_holds_float32_and_copies_in_bfloat16_and_no_bucket() -> None:
    shape = shape_of_fields("tiny", "test", ARCHITECTURES["llama"])
    config = Pretrain(workers=1, engine="torch", dtype="bfloat16", micro_batch_blocks=2)
    P = shape.parameters
    for dtype, copies in (("bfloat16", 2 * P), ("float32", 0)):
        memory = training_memory(replace(config, dtype=dtype), shape, 16)
        assert (memory.weights, memory.gradients, memory.optimizer, memory.buffers) == (4 * P, 4 * P, 8 * P, copies)


def test_a_training_of_few_steps_is_told_which_batch_has_more(billion: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(blocks: int, **changes: Any) -> list[str]:
        monkeypatch.setattr(pretrain_plan, "planned_tokens", lambda *_: (2048 * blocks, []))
        options = {"epochs": 1.0, "batch_blocks": 256, "heldout_blocks": 0, "workers": 8, "micro_batch_blocks": 8}
        train = replace(billion.pretrain, **options | changes)
        lines = pretrain_plan.describe(plan_pretrain(replace(billion, pretrain=train)))
        return [line for line in lines if line.startswith("few steps")]

    begin = "few steps: pretrain.batch_blocks = 256 blocks are one step"
    assert said(2560, workers=1, micro_batch_blocks=1) == [f"{begin}; with 25 there are 100 and more"]
    assert said(17_920) == [f"{begin}; with 128 there are 100 and more"]  # of 64 blocks at once, so not 179
    assert said(2560) == [f"{begin}; with 24 and pretrain.micro_batch_blocks = 3 there are 100 and more"]
    (line,) = said(768)
    assert line == f"{begin}, and 8 workers want one of 8 blocks at least; with fewer there can be more"
    assert said(25_600) == []


def test_steps_are_of_the_corpus_in_the_targets_tokens_where_it_is_packed(billion: Config, tmp_path: Path) -> None:
    billion = replace(billion, pretrain=replace(billion.pretrain, heldout_blocks=0))
    tokenizer = replace(billion.pretrain, tokenizer="./its/own")
    config = replace(billion, run_dir=str(tmp_path), pretrain=tokenizer)
    assert plan_pretrain(config).steps == 7630
    for folder, tokens in (("corpus", 524_288 * 10), ("target/corpus", 524_288 * 30)):
        manifest = Manifest(
            verb="pack_corpus", fingerprint="", options={}, inputs={}, rows={"tokens": tokens}, summary={}, files={},
            created="", seconds=0.0, environment={},
        )  # fmt: skip
        (tmp_path / folder).mkdir(parents=True)
        write_json(tmp_path / folder / "manifest.json", asdict(manifest))
        assert plan_pretrain(config).steps == 4 * tokens / 524_288
    assert plan_pretrain(replace(config, pretrain=billion.pretrain)).steps == 40


def test_steps_are_of_the_blocks_that_are_left_to_train_on(billion: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    block, batch = billion.pack_corpus.block_size, billion.pretrain.batch_blocks

    def steps(tokens: float, heldout: int) -> int:
        monkeypatch.setattr(pretrain_plan, "planned_tokens", lambda *_: (tokens, []))
        train = replace(billion.pretrain, epochs=1.0, heldout_blocks=heldout)
        return plan_pretrain(replace(billion, pretrain=train)).steps

    assert steps(block * batch * 10, 0) == 10
    assert steps(block * batch * 10 + 1, 0) == 11  # packing pads the last block
    assert steps(block * batch * 10 + 1, 1) == 10
    assert steps(block, 5) == 1
