"""A training of adapters: what it exports is a plain model, and it goes on where it was killed, on other ranks too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ifguide.artifacts import MismatchError, file_digest
from ifguide.config import ConfigError, ModelSource, config_from_mapping, to_mapping
from ifguide.folders import PENALISED
from ifguide.models import load_model
from ifguide.run import Run
from ifguide.stages.pretrain import pretrain
from ifguide.telemetry import METRICS, read_metrics
from ifguide.tokenizer import load_tokenizer
from ifguide.training.checkpoints import last_checkpoint
from ifguide.training.loop import TrainingLoop
from ifguide.training.settings import TrainingSettings
from tests.stages.conftest import ARCHITECTURE
from tests.stages.packed import packed_run, settings_of
from tests.stages.ranks import Kill, run_ranks

Settings = TrainingSettings
LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ten steps of adapters of a model with random weights that was published in a folder."""
    folder = tmp_path_factory.mktemp("packed")
    options = {"epochs": 1, "heldout_blocks": 8, "checkpoint_steps": 2, "weight_decay": 0.1, "engine": "torch"}
    run = packed_run(folder, options, architecture=ARCHITECTURE)
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    fields = {"vocab_size": len(tokenizer), **ARCHITECTURE}
    load_model(ModelSource(architecture=fields)).save_pretrained(folder / "published")
    tree = to_mapping(run.config)
    tree["pretrain"] |= {"init_from": str(folder / "published"), "lora": LORA}
    return Run(config=config_from_mapping(tree))


@pytest.fixture
def settings(run: Run, tmp_path: Path) -> Callable[..., Settings]:
    return lambda name, **changes: settings_of(run, tmp_path / name, **changes)


@pytest.fixture(scope="module")
def undisturbed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    made = settings_of(run, tmp_path_factory.mktemp("torch") / "undisturbed")
    TrainingLoop(made, rank=0, world_size=1).run()
    return made


def weights(made: Settings) -> dict[str, torch.Tensor]:
    return load_file(Path(made.folder) / "hf" / "model.safetensors")


def losses(made: Settings) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(made.folder) / METRICS)]


def test_the_export_is_a_plain_model_whose_blocks_alone_have_changed(undisturbed: Settings, run: Run) -> None:
    assert losses(undisturbed)[-1] < losses(undisturbed)[0] - 0.1
    before = load_file(Path(str(run.config.pretrain.init_from)) / "model.safetensors")
    after = weights(undisturbed)
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all(".layers." in name and name.endswith(".weight") and "norm" not in name for name in changed)
    model = AutoModelForCausalLM.from_pretrained(Path(undisturbed.folder) / "hf")
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    checkpoint = last_checkpoint(Path(undisturbed.folder))
    assert checkpoint is not None
    state = torch.load(checkpoint.state / "torch.pt", weights_only=True)["model"]
    assert all("lora" in name for name in state)


@pytest.mark.parametrize("lora", [LORA, None])
@pytest.mark.parametrize(
    ("published", "kept"),
    [
        ({"temperature": 0.6, "do_sample": False, "eos_token_id": [0, 5]}, {"temperature": 0.6, "eos": [0, 5]}),
        ({"temperature": 0.6, "do_sample": True, "eos_token_id": [0, 5]}, {"temperature": 0.6, "eos": [0, 5]}),
        ({"temperature": 0.6, "do_sample": True, "eos_token_id": [4, 5]}, {"temperature": 0.6, "eos": 0}),
        ({"temperature": 0.6, "do_sample": False, "eos_token_id": 5}, {"temperature": None, "eos": 0}),
    ],
    ids=["flags that do not go together", "stops", "stops without the EOS", "neither"],
)
def test_the_published_generation_config_is_kept_as_far_as_it_can_be(
    published: dict[str, Any], kept: dict[str, Any], lora: dict[str, Any] | None, run: Run, tmp_path: Path
) -> None:
    shutil.copytree(str(run.config.pretrain.init_from), tmp_path / "published")
    (tmp_path / "published" / "generation_config.json").write_text(json.dumps(published))
    made = settings_of(run, tmp_path / "made", init_from=str(tmp_path / "published"), lora=lora, epochs=0.1)
    TrainingLoop(made, rank=0, world_size=1).run()
    written = json.loads((tmp_path / "made" / "hf" / "generation_config.json").read_text())
    assert {"temperature": written.get("temperature"), "eos": written["eos_token_id"]} == kept


def test_a_killed_training_goes_on_to_the_same_weights(
    undisturbed: Settings, settings: Callable[..., Settings]
) -> None:
    class Killed(Exception):
        pass

    made = settings("killed")
    loop = TrainingLoop(made, rank=0, world_size=1)
    step = loop._train_step

    def killed() -> dict[str, Any]:
        if loop.step == 5:
            raise Killed
        return step()

    loop._train_step = killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        loop.run()
    TrainingLoop(made, rank=0, world_size=1).run()
    assert losses(made) == losses(undisturbed)
    paths = [Path(each.folder) / "hf" / "model.safetensors" for each in (made, undisturbed)]
    assert file_digest(paths[0]) == file_digest(paths[1])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_go_on_as_one_and_end_where_one_device_does(
    stage: int, undisturbed: Settings, settings: Callable[..., Settings]
) -> None:
    options: dict[str, Any] = {"engine": "deepspeed", "zero_stage": stage, "workers": 2}
    made = settings("ranks", **options)
    run_ranks(made, 2, Kill(step=5, place="step", rank=0))
    run_ranks(made, 1)
    assert losses(made) == pytest.approx(losses(undisturbed), rel=1e-4)
    expected = weights(undisturbed)
    for name, value in weights(made).items():
        assert torch.allclose(value, expected[name], rtol=1e-2, atol=1e-3), name


@pytest.mark.parametrize("stage", [0, 2])
def test_in_bfloat16_adapters_are_exported_from_their_float32_masters(
    stage: int, undisturbed: Settings, settings: Callable[..., Settings]
) -> None:
    """And the weights that they are merged into were never rounded."""
    made = settings("rounded", engine="deepspeed", zero_stage=stage, dtype="bfloat16")
    run_ranks(made, 1)
    assert losses(made) == pytest.approx(losses(undisturbed), rel=0.02)
    before = load_file(Path(str(made.train.init_from)) / "model.safetensors")
    after, expected = weights(made), weights(undisturbed)
    for name, value in after.items():
        if torch.equal(expected[name], before[name]):
            assert torch.equal(value, before[name]), name
        else:
            assert torch.allclose(value, expected[name], rtol=0.1, atol=0.02), name
            assert not torch.equal(value, value.bfloat16().float()), name


def test_a_map_that_the_model_lacks_is_refused_before_it_trains(run: Run) -> None:
    tree = to_mapping(run.config)
    tree["pretrain"]["lora"] = {**LORA, "targets": ["q_proj"]}
    with pytest.raises(ConfigError, match=r"pretrain\.lora\.targets: .* choose among dense, "):
        pretrain(Run(config=config_from_mapping(tree)))


def test_the_card_tells_of_adapters(run: Run) -> None:
    manifest = pretrain(run)
    assert manifest is not None
    assert manifest.summary["steps"] == 10
    card = (run.model(PENALISED) / "hf" / "README.md").read_text()
    assert "rank: 4" in card
    assert "fine-tuned from" in card


def test_a_model_is_of_the_weights_that_it_began_with(run: Run, tmp_path: Path) -> None:
    shutil.copytree(str(run.config.pretrain.init_from), tmp_path / "published")
    tree = to_mapping(run.config)
    tree |= {"run_dir": str(tmp_path / "run")}
    tree["pretrain"] |= {"init_from": str(tmp_path / "published"), "epochs": 0.2}
    begun = Run(config=config_from_mapping(tree), lent={"corpus": run.corpus, "mask": run.mask})
    made = pretrain(begun)
    assert made is not None
    assert made.inputs.keys() == {"corpus", "mask", "init_from"}
    fields = {**ARCHITECTURE, "vocab_size": load_tokenizer(run.tokenizer_source).vocab_size}
    load_model(ModelSource(architecture=fields), seed=1).save_pretrained(tmp_path / "published")
    with pytest.raises(MismatchError, match="was made from something else: init_from was "):
        pretrain(begun)
