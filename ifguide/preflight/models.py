"""Whether models, tokenizers and classifiers are there, by names, files and configs alone."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ifguide.config import ClassifierSource, Evaluate, ModelSource
from ifguide.preflight.findings import Findings
from ifguide.preflight.hub import Hub
from ifguide.storage import is_remote, location
from ifguide.tokenizer import names_path, require_corpus_tokens

# What a folder must have, one of each.
CONFIG = (("config.json",),)
MODEL = (*CONFIG, ("*.safetensors", "*.bin", "*.gguf"))
TOKENIZER = (("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "*.gguf"),)


class ModelChecks:
    """Checks of one preflight; `made_in` is the run directory, where a model may yet be made."""

    def __init__(self, findings: Findings, made_in: Path):
        self.findings, self.made_in, self.hub = findings, made_in, Hub()

    def model(self, key: str, model: ModelSource, *, weights: bool = True) -> None:
        """A causal language model, of a source or of an architecture; without `weights`, its config alone."""
        if model.architecture is not None:
            self.architecture(f"{key}.architecture", model.architecture)
        elif model.source is not None:
            self.source(f"{key}.source", model.source, MODEL if weights else CONFIG, model.revision)

    def source(self, key: str, source: str, files: Sequence[Sequence[str]], revision: str | None = None) -> Path | None:
        """A hub id, a .gguf file, or a folder that has one of each of the `files`; returns the folder if it is one."""
        with self.findings.caught(key, source):
            place = location(source)
            if place.is_dir():
                for patterns in files:
                    if not any(True for pattern in patterns for _ in place.glob(pattern)):
                        what = f"the folder has no {' or '.join(patterns)}"
                        self.findings.fault(key, source, f"{what}; name a folder made by save_pretrained")
                return place
            if place.is_file() and place.suffix == ".gguf":
                return None
            if place.exists():
                self.findings.fault(key, source, "a file that is no .gguf; name a folder made by save_pretrained")
            elif not is_remote(place) and place.is_relative_to(self.made_in):
                self.findings.leave(key, source, "not there yet; a step of this run must make it first")
            elif names_path(source) or is_remote(place):
                self.findings.fault(key, source, "no such file or folder; a hub id has the form owner/name")
            elif (reason := self.hub.unchecked(source, revision)) is not None:
                self.findings.leave(key, source, f"there is no such folder, and {reason}")
        return None

    def corpus_tokens(self, proxy: ModelSource, tokenizer: str) -> None:
        """That the proxy reads the tokens of the corpus' tokenizer, where both lie here."""
        if proxy.source is not None and proxy.source != tokenizer:
            self._tokens("proxy.source", proxy.source, tokenizer, partial(require_corpus_tokens, proxy, tokenizer))

    def encoder_reads(self, source: str, tokenizer: str, block_size: int) -> None:
        """That a pretrained encoder reads blocks of that many tokens of the corpus' tokenizer, where both lie here."""
        from ifguide.student.pretrained import KEY, require_readable

        self._tokens(KEY, source, tokenizer, partial(require_readable, source, tokenizer, block_size))

    def _tokens(self, key: str, source: str, tokenizer: str, require: Callable[[], None]) -> None:
        """What is required of a model's tokens, where it and the tokenizer lie here."""
        places = location(source), location(tokenizer)
        if any(is_remote(place) or not place.exists() for place in places):
            self.findings.leave(
                key, source, f"whether its tokens are those of {tokenizer}: its stage will compare them"
            )
            return
        with self.findings.caught(key, source):
            require()

    def architecture(self, key: str, fields: dict[str, Any]) -> None:
        """Fields of a config of transformers: a known `model_type`, no field that it would ignore, and values that go
        together."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        kind = fields.get("model_type")
        if kind is None or kind not in CONFIG_MAPPING:
            near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING.keys()), n=1, cutoff=0.5)
            advice = f"; did you mean {near[0]}?" if near else "; name llama, gpt_neox, gpt2, ..."
            what = "not set" if kind is None else "no model that transformers knows"
            self.findings.fault(f"{key}.model_type", kind, what + advice)
            return
        config_class = CONFIG_MAPPING[kind]
        try:
            config = config_class(**{name: value for name, value in fields.items() if name != "model_type"})
        except Exception as error:  # transformers has its own for a wrong type, and what comes of that may be any
            self.findings.fault(key, fields, f"transformers refuses it: {' '.join(str(error).split())}; mend the field")
            return
        class_fields = {*config_class().to_dict(), *config_class.attribute_map, "model_type"}
        class_fields |= {field.name for field in dataclasses.fields(config_class)}
        kept = config.to_dict()  # what the class does not know stays as it is; older names it turns into others
        for name in fields:
            if name in kept and name not in class_fields:
                near = difflib.get_close_matches(name, class_fields, n=1, cutoff=0.5)
                advice = f"did you mean {near[0]}?" if near else "remove it"
                self.findings.fault(f"{key}.{name}", fields[name], f"unknown field of {kind}; {advice}")

    def room(self, key: str, target: ModelSource, new_tokens: int) -> None:
        """That a prompt has room before so many new tokens, where the target's architecture is given."""
        if target.architecture is None:
            return
        from transformers import AutoConfig

        try:
            config = AutoConfig.for_model(**target.architecture).get_text_config()
        except Exception:  # of what is amiss in its fields, which `architecture` says
            return
        positions = getattr(config, "max_position_embeddings", None)
        if positions and new_tokens >= positions:
            what = f"leaves no room for a prompt among the target's {positions} positions; lower it"
            self.findings.fault(key, new_tokens, what)

    def classifier(self, key: str, source: ClassifierSource, *, of_new_text: bool) -> None:
        """A classifier by its name, its options and its files; `of_new_text`: it must score what models write."""
        from ifguide.toxicity.classifiers import classifier_inputs, require_known
        from ifguide.words import read_word_list

        kind, _, rest = source.name.partition(":")
        with self.findings.caught(f"{key}.name", source.name):
            options = {name: getattr(source, name) for name in ("checkpoint", "huggingface_config", "label", "head")}
            require_known(source.name, **options)
            if kind == "words":
                read_word_list(rest)
            elif kind == "hf":
                self._sequence_classifier(key, source, rest)
            elif kind == "detoxify":
                self._package(f"{key}.name", source.name, "detoxify")
                self._checkpoint(key, source)
            elif kind == "alt-profanity-check":
                self._package(f"{key}.name", source.name, "profanity_check")
            elif kind == "hatesonar":
                self._package(f"{key}.name", source.name, "hatesonar")
            elif kind == "labels" and of_new_text:
                self.findings.fault(
                    f"{key}.name", source.name, "labels cannot score new text; choose another classifier"
                )
        if kind == "fitted":
            with self.findings.caught(f"{key}.training", [texts.path for texts in source.training]):
                self._package(f"{key}.name", source.name, "sklearn")
                classifier_inputs({key: source})

    def classes_apart(self, options: Evaluate) -> None:
        """That no further classifier is called as a class of the main one."""
        from ifguide.toxicity.classifiers import known_classes

        classes = known_classes(options.classifier) or ()
        for name, source in options.classifiers.items():
            if name in classes:
                what = "is a class of evaluate.classifier too; choose another name"
                self.findings.fault(f"evaluate.classifiers.{name}", source.name, what)

    def benchmarks(self, key: str, tasks: Sequence[str]) -> None:
        """Tasks of lm-evaluation-harness: files, or names that it knows. The list of those takes it some seconds."""
        if not require_package(self.findings, key, ", ".join(tasks), "lm_eval"):
            return
        files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
        for task in files:
            if not Path(task).is_file():
                self.findings.fault(key, task, "does not exist: check the path")
        if named := [task for task in tasks if task not in files]:
            from lm_eval.tasks import TaskManager

            all_tasks = TaskManager().all_tasks
            for task in named:
                if task not in all_tasks:
                    near = difflib.get_close_matches(task, all_tasks, n=1, cutoff=0.5)
                    advice = f"; did you mean {near[0]}?" if near else "; `lm_eval ls tasks` lists them"
                    self.findings.fault(key, task, f"no task of lm-evaluation-harness{advice}")

    def _package(self, key: str, value: str, package: str) -> None:
        require_package(self.findings, key, value, package)

    def _checkpoint(self, key: str, source: ClassifierSource) -> None:
        for name in ("checkpoint", "huggingface_config"):
            value = getattr(source, name)
            if value is not None:
                with self.findings.caught(f"{key}.{name}", value):
                    if not location(value).exists():
                        self.findings.fault(f"{key}.{name}", value, "does not exist: check the path")
        if source.checkpoint is None:
            self.findings.leave(
                f"{key}.name", source.name, "its weights come from the network, if this machine has not kept them"
            )

    def _sequence_classifier(self, key: str, source: ClassifierSource, name: str) -> None:
        from ifguide.toxicity.sequence_classifier import outputs_of

        said = self.findings.count
        folder = self.source(f"{key}.name", name, MODEL)
        if folder is None and self.findings.count == said:  # the hub has it
            folder = self._hub_config(key, source, name)
        if folder is None or is_remote(folder) or not (folder / "config.json").is_file():
            return
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(folder)
        except Exception as error:  # of a damaged file nearly any
            self.findings.fault(f"{key}.name", source.name, f"its config.json cannot be read ({error}); restore it")
            return
        with self.findings.caught(f"{key}.label", source.label):
            outputs_of(config, source.name, label=source.label, head=source.head)

    def _hub_config(self, key: str, source: ClassifierSource, name: str) -> Path | None:
        """A folder with the config of a model of the hub; None where it does not come, which is said."""
        config = self.hub.file(name, "config.json")
        if config is None:
            self.findings.leave(f"{key}.label", source.label, f"whether {name} has it: its config did not come")
        return None if config is None else config.parent


def require_package(findings: Findings, key: str, value: str, package: str) -> bool:
    """Whether a package is installed here; a fault of the key, if it is not."""
    with findings.caught(key, value):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(package, name=package)
        return True
    return False
