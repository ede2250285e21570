"""The `evaluate` section of the config: prompts, sampling, classifiers, held-out texts, the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ifguide.config.names import check_names
from ifguide.config.resources import RESOURCES, Resources, moved
from ifguide.config.sources import (
    ClassifierSource,
    Input,
    LabelledTexts,
    Prompts,
    PromptSet,
    check_classifier,
    check_input,
    check_text,
)
from ifguide.config.typed_yaml import ConfigError, option


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Generate, classify, measure, report.

    Attributes:
        behaviour: its name in the report.
        prompts: the prompts that are continued.
        max_prompts: prompts drawn by seed. Null: all.
        balanced: draw half of them with the behaviour, by their labels.
        prompt_sets: further prompts by name, with groups (BOLD, AttaQ).
        classifier: scores the continuations.
        classifiers: further classes of the same continuations, by name.
        bootstrap_samples: replicates that the intervals rest on.
        report: folder of the figures. Another name lets another classifier take the same generations.
        check_data: texts with labels that `--check-classifier` compares all classifiers with.
        prompt_threshold: a prompt counts as one with the behaviour from this label on.
        continuations: continuations sampled for each prompt.
        max_new_tokens: tokens of a continuation at most.
        top_p: mass of the nucleus that tokens are drawn from.
        temperature: of the logits.
        prompts_per_shard: prompts of one task.
        heldout: documents for the perplexity, and once more without those that the classifier flags.
        annotated: documents whose harmful parts `spans_column` marks: how much less likely they are than the rest.
        cloze: texts whose last word is to be predicted (LAMBADA).
        lm_eval: benchmarks of lm-evaluation-harness, by the names of its tasks, or YAML files of your own.
        models: further models by name, beside those that this run trained.
        word_list: words of the word-list finders and of the lens.
        top_documents: documents that the page shows.
        batch_size: texts that a model takes at once.
        dtype: of the models' weights and products. Probabilities are float32 either way.
        actors: actors that sample and measure.
        resources: of one actor.
    """

    behaviour: str = "toxicity"
    prompts: Prompts | None = None
    max_prompts: int | None = option(None, at_least=1)
    balanced: bool = False
    prompt_sets: dict[str, PromptSet] = field(default_factory=dict)
    classifier: ClassifierSource = ClassifierSource()  # noqa: RUF009  # frozen
    classifiers: dict[str, ClassifierSource] = field(default_factory=dict)
    bootstrap_samples: int = option(1000, at_least=100)
    report: str = option("report", affects_result=False)
    check_data: tuple[LabelledTexts, ...] = option((), affects_result=False)
    prompt_threshold: float = option(0.5, at_least=0, at_most=1)
    continuations: int = option(25, at_least=1)
    max_new_tokens: int = option(20, at_least=1)
    top_p: float = option(0.9, above=0, at_most=1)
    temperature: float = option(1.0, above=0)
    prompts_per_shard: int = option(64, at_least=1)
    heldout: tuple[Input, ...] = ()
    annotated: tuple[Input, ...] = option((), off=())
    cloze: Input | None = None
    lm_eval: tuple[str, ...] = option((), off=())
    models: dict[str, str] = field(default_factory=dict)
    word_list: tuple[str, ...] = ()
    top_documents: int = option(10, at_least=0)
    batch_size: int = option(64, at_least=1)
    dtype: Literal["float32", "bfloat16"] = option("float32", off="float32")
    actors: int = option(1, at_least=1, affects_result=False)
    resources: Resources = RESOURCES

    RENAMED: ClassVar[dict[str, str]] = moved("actor")

    @property
    def texts(self) -> dict[str, Input]:
        """The documents and texts that a model's own probabilities are measured on, by dotted key."""
        lists = {"heldout": self.heldout, "annotated": self.annotated}
        listed = {f"evaluate.{name}[{i}]": source for name, each in lists.items() for i, source in enumerate(each)}
        return listed | ({"evaluate.cloze": self.cloze} if self.cloze else {})


def check_evaluate(evaluate: Evaluate) -> None:
    """Raises ConfigError, naming the key, for names that cannot name files and options that do not go together."""
    for key in ("models", "prompt_sets", "classifiers"):
        check_names(f"evaluate.{key}", getattr(evaluate, key))
    check_classifier(evaluate.classifier, "evaluate.classifier")
    for name, classifier in evaluate.classifiers.items():
        check_classifier(classifier, f"evaluate.classifiers.{name}")
    for key, source in evaluate.texts.items():
        check_input(source, key)
        check_text(source, key)
    for i, source in enumerate(evaluate.annotated):
        if source.spans_column is None:
            raise ConfigError(f"evaluate.annotated[{i}].spans_column: name the column of the spans that are harmful")
    check_names("evaluate.report", [evaluate.report], of="a folder")
    if "prompts" in evaluate.prompt_sets:
        raise ConfigError("evaluate.prompt_sets.prompts: that is the name of evaluate.prompts; choose another")
    if evaluate.balanced and evaluate.max_prompts is None:
        raise ConfigError("evaluate.balanced: draws half of max_prompts; set evaluate.max_prompts")
