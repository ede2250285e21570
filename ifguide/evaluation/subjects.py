"""What one evaluation is of: its models by their files or commit, its prompts and texts by content, and its folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ifguide.artifacts import MANIFEST, file_digest, json_digest, read_manifest
from ifguide.config import ConfigError, Evaluate, Input
from ifguide.corpus.reading import list_chunks
from ifguide.evaluation.prompts import PROMPTS
from ifguide.evaluation.reward_decoding import Guidance
from ifguide.folders import EXPORT
from ifguide.models import source_fingerprint
from ifguide.storage import local_copy
from ifguide.toxicity import classifier_inputs

VERB = "evaluate"
SETS = "prompts/"  # before the name of a prompt set
OF_MODEL = "model/"  # before that of a model

Prompts = Sequence[Any]  # rows with `row` and `prompt`: `toxicity.PromptRow`, `toxicity.GroupedPrompt`


class Model(NamedTuple):
    """Where a model comes from (folder, .gguf file or hub id), and a digest of what it is."""

    source: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Models and prompt sets by name, and where their figures and continuations go.

    The first model is what the others are compared with. `block_size`: of held-out documents, in tokens.
    `generations`: the folder of each model's continuations, with an artifact for each prompt set. `guides`: of the
    models that are sampled by reward-augmented decoding. `digests`: `measured_inputs`, of which actors compare those of
    prompts and texts with what they read. `reference`: one more model that the others are compared with."""

    options: Evaluate
    models: Mapping[str, Model]
    sets: Mapping[str, Prompts]
    seed: int
    block_size: int
    report: Path
    generations: Mapping[str, Path]
    config_yaml: str
    guides: Mapping[str, Guidance] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    reference: str | None = None

    @property
    def num_continuations(self) -> int:
        """How many there are of one model."""
        return sum(map(len, self.sets.values())) * self.options.continuations


def models_to_evaluate(own: Mapping[str, Path], given: Mapping[str, str]) -> dict[str, Model]:
    """The finished models of a run, of the folders `own`, and those of `evaluate.models`, sources by name.

    The first is what the others are compared with: the first of `own` if that is finished, else what is given.

    Raises:
        ConfigError: both have a model of one name. FileNotFoundError: there are none, or a given one does not exist.
    """
    trained = {
        name: Model(str(folder / EXPORT), read_manifest(folder).fingerprint)
        for name, folder in own.items()
        if (folder / MANIFEST).exists()
    }
    for name in given:
        if name in trained:
            raise ConfigError(f"evaluate.models.{name}: this run has a model of that name; choose another")
    others = {name: Model(source, source_fingerprint(source)) for name, source in given.items()}
    models = trained | others if next(iter(own)) in trained else others | trained
    if not models:
        place = next(iter(own.values())).parent
        raise FileNotFoundError(f"{place} holds no finished model; run `ifguide pretrain` first")
    return models


def measured_inputs(models: Mapping[str, Model], sets: Mapping[str, Prompts], options: Evaluate) -> dict[str, str]:
    """Digests of what the figures are measured of, by name: models, prompts, texts whose probabilities are measured,
    files of tasks, and what fitted classifiers learn from."""
    return {
        **{f"{OF_MODEL}{name}": model.fingerprint for name, model in models.items()},
        **prompt_digests(sets),
        **text_digests(options),
        **{f"lm_eval/{task}": file_digest(Path(task)) for task in options.lm_eval if Path(task).is_file()},
        **classifier_inputs(
            {f"{VERB}.classifier": options.classifier}
            | {f"{VERB}.classifiers.{name}": source for name, source in options.classifiers.items()}
        ),
    }


def prompt_digests(sets: Mapping[str, Prompts]) -> dict[str, str]:
    """Of each set by its name in `measured_inputs`."""
    return {f"{SETS}{name}": json_digest([vars(row) for row in rows]) for name, rows in sets.items()}


def text_digests(options: Evaluate, kind: str = "") -> dict[str, str]:
    """Of each input of `Evaluate.texts`, or of those of one kind, by its name in `measured_inputs`: `heldout[0]`."""
    sources = {key.removeprefix(f"{VERB}."): source for key, source in options.texts.items()}
    return {name: _input_digest(text, f"{VERB}.{name}") for name, text in sources.items() if name.startswith(kind)}


def require_same_texts(read: Mapping[str, str], begun_with: Mapping[str, str]) -> None:
    """Refuse prompts and texts whose digests `read` here are others than those of `measured_inputs`, by name. Of files
    they are taken after the reading, so that an edit before is found.

    Raises:
        ValueError: names the key.
    """
    for name, digest in read.items():
        if digest != begun_with[name]:
            of_set = name.removeprefix(SETS)
            key = name if of_set == name else PROMPTS if of_set == PROMPTS else f"prompt_sets.{of_set}"
            raise ValueError(
                f"{VERB}.{key}: the texts on this node are not those that this evaluation was begun with; sync or"
                " restore them"
            )


def _input_digest(source: Input, dotted_key: str) -> str:
    """Of an input's files in order; a hub dataset is told by its name."""
    if source.on_hub:
        return json_digest(source.path)
    paths = [chunk.path for chunk in list_chunks(source, 0, chunk_bytes=2**62, dotted_key=f"{dotted_key}.path")]
    paths += [source.rows] if isinstance(source.rows, str) else []
    return json_digest([file_digest(local_copy(path)) for path in paths])
