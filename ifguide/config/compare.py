"""The `compare` section: the grid of methods, and what preference methods and reward models learn from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ifguide.config.pretrain import ObjectiveKind
from ifguide.config.resources import CPU_RESOURCES, Resources, moved
from ifguide.config.sources import ClassifierSource, check_classifier
from ifguide.config.typed_yaml import ConfigError, option

OWN_MODELS = ("baseline", "penalised")
SCORED = ("influence_words", "ngrams", "probe", "span_probe", "excess_loss")  # masks by token scores of their own
INFLUENCE = {"influence": None, "exact": False, "smoothed": True}  # by the run's scores, smoothed or not
ON_QUERIES = ("ngrams", "probe", "excess_loss")  # of these, what tells the two query sets apart
WORDS, CLASSIFIED = ("words", "word_documents"), ("classified_words", "sentences", "documents")  # masks of marked text
ANNOTATED, RANDOM = ("annotated", "annotated_documents"), ("random", "random_types", "other_uses")
SELECTING = ("quantile", "window", "rank_by", "max_fraction")  # a method's own, in place of `build_mask`'s
OWN_FOLDERS = ("report", "generations", "samples", "reward")  # in `compare/`, beside the methods' own


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What DPO and the reward model learn from: continuations that the baseline gives to the prompts of `build_query`.
    Prompts that are evaluated too are left out. Sampling is that of `evaluate`.

    Attributes:
        continuations: of each prompt.
        max_prompts: prompts at most. Null: all.
    """

    continuations: int = option(8, at_least=2)
    max_prompts: int | None = option(None, at_least=1)


@dataclass(frozen=True, kw_only=True)
class Reward:
    """The training of RAD's reward model, one for all methods. A tenth of the prompts is held out, to measure it.

    Attributes:
        source: model to start from, with the same tokenizer. Null: the run's baseline.
        epochs: passes over the samples.
        batch_size: texts of a step.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
    """

    source: str | None = None
    epochs: int = option(1, at_least=1)
    batch_size: int = option(32, at_least=1)
    learning_rate: float = option(1e-5, above=0)
    weight_decay: float = option(0.01, at_least=0)


@dataclass(frozen=True, kw_only=True)
class Dpo:
    """Direct preference optimisation (arXiv 2305.18290). `beta`, optimiser and learning rate are the paper's.
    Its models are larger: a small one needs a higher rate.

    Attributes:
        model: the model to start from, which is the reference too.
        beta: strength of the pull towards the reference.
        pairs_per_prompt: the lowest scored continuation over the highest, the second lowest over the second, ...
        min_difference: pairs whose scores are closer than this are left out.
        epochs: passes over the pairs.
        batch_size: pairs of a step, a multiple of `micro_batch_size`.
        micro_batch_size: pairs of one forward pass.
        learning_rate: at the start.
        checkpoint_steps: steps from one checkpoint to the next.
    """

    model: str = "baseline"
    beta: float = option(0.1, above=0)
    pairs_per_prompt: int = option(1, at_least=1)
    min_difference: float = option(0.25, above=0, at_most=1)
    epochs: float = option(1.0, above=0)
    batch_size: int = option(64, at_least=1)
    micro_batch_size: int = option(16, at_least=1)
    learning_rate: float = option(1e-6, above=0)
    checkpoint_steps: int = option(100, at_least=1, affects_result=False)


@dataclass(frozen=True, kw_only=True)
class Rad:
    """Reward-augmented decoding (arXiv 2310.09520). Defaults are the published code's.

    Attributes:
        model: the model that is decoded.
        beta: what the reward of the text with a candidate is multiplied by before it is added to its logit.
        top_k: likeliest next tokens that are candidates, of those in the nucleus of the model's own distribution.
    """

    model: str = "baseline"
    beta: float = option(50.0, at_least=0)
    top_k: int = option(20, at_least=1)


@dataclass(frozen=True, kw_only=True)
class Ngrams:
    """Log-odds of n-grams between the completions of the two query sets, for `mask: ngrams`.

    Attributes:
        longest: words of an n-gram at most.
        prior: strength of the prior that an n-gram is as frequent in both sets, in n-grams.
    """

    longest: int = option(2, at_least=1)
    prior: float = option(500.0, above=0)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Logistic regression on the proxy's hidden states, for `mask: probe` and `span_probe`.

    Layer and strength are those of the highest AUROC by cross-validation over queries, or documents.

    Attributes:
        tokens: to learn from, at most; half of each kind.
        folds: of the cross-validation.
        strengths: of the L2 penalty that are tried, as scikit-learn's C: smaller is stronger.
        precision: of the proxy's matrix products. bfloat16 is quicker on a GPU, and on most CPUs that have it.
    """

    tokens: int = option(10_000, at_least=2)
    folds: int = option(3, at_least=2)
    strengths: tuple[float, ...] = option((0.001, 0.03, 1.0), above=0)
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class ExcessLoss:
    """Two copies of the proxy tuned on the completions of one query set each, for `mask: excess_loss`.

    Of both sets as many queries are taken.

    Attributes:
        epochs: passes over the queries.
        batch_size: queries of a step.
        learning_rate: of AdamW.
        max_queries: of each set. Null: all of the smaller one.
        precision: of the copies' matrix products. bfloat16 is quicker on a GPU, and on most CPUs that have it.
    """

    epochs: int = option(2, at_least=1)
    batch_size: int = option(16, at_least=1)
    learning_rate: float = option(5e-5, above=0)
    max_queries: int | None = option(None, at_least=1)
    precision: Literal["float32", "bfloat16"] = option("float32", off="float32")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method that `compare` sets beside the run's own models. It has one of `mask`, `dpo` and `rad`.

    `dpo` and `rad` start from a `model`: `baseline`, `penalised`, or a method named before.

    Attributes:
        mask: how masked tokens are found; see evaluation.md.
        selection: how scores become a mask of the run's own size: the highest `tokens`, or `units` as in `build_mask`,
            with its quantile and window. Null: `tokens`; `influence` keeps the run's own mask.
        quantile: of `units`. Null: that of `build_mask`.
        window: of `units`. Null: that of `build_mask`.
        rank_by: of `units`. Null: that of `build_mask`.
        max_fraction: of the predicted tokens; of masks by scores. Null: as many as the run's own mask has.
        objective: kind of loss of masked tokens; `ignore` filters. Null: that of `pretrain`.
        penalty: lambda. Null: that of `pretrain`.
        dpo: train by preference.
        rad: decode with a reward.
    """

    mask: (
        Literal[
            "influence",
            "exact",
            "smoothed",
            "plain_influence",
            "influence_words",
            "random",
            "random_types",
            "other_uses",
            "annotated",
            "words",
            "classified_words",
            "sentences",
            "word_documents",
            "documents",
            "annotated_documents",
            "ngrams",
            "probe",
            "span_probe",
            "excess_loss",
        ]
        | None
    ) = None
    selection: Literal["tokens", "units"] | None = None
    quantile: float | None = option(None, above=0, at_most=1)
    window: int | None = option(None, at_least=0)
    rank_by: Literal["sum", "rate"] | None = option(None, off=None)
    max_fraction: float | None = option(None, above=0, at_most=1)
    objective: ObjectiveKind | None = None
    penalty: float | None = option(None, at_least=0)
    dpo: Dpo | None = None
    rad: Rad | None = None

    def mask_options(self) -> tuple[str | float | None, ...]:
        """All that decides the mask: methods that share them have one mask, and differ in their loss."""
        return self.mask, self.selection, *(getattr(self, name) for name in SELECTING)

    @property
    def keeps_mask(self) -> bool:
        """Whether its mask is the run's own."""
        return self.mask == "influence" and self.selection is None

    def describe(self) -> str:
        """The method in a few words."""
        if self.mask is not None:
            values = {name: getattr(self, name) for name in SELECTING if getattr(self, name) is not None}
            own = [
                f"{name} {value if isinstance(value, str) else format(value, 'g')}" for name, value in values.items()
            ]
            by = f" by {self.selection}" if self.selection else ""
            return f"{self.mask} masked{by}" + (f" ({', '.join(own)})" if own else "")
        return f"DPO of {self.dpo.model}" if self.dpo else f"RAD of {self.rad.model if self.rad else None}"


@dataclass(frozen=True, kw_only=True)
class Compare:
    """The grid of `ifguide compare`. Words are those of `evaluate.word_list`.

    Attributes:
        methods: the methods by name; a name is a folder in `compare/`.
        trainings: models that are trained at once, each by the workers of `pretrain`.
        samples: what DPO and the reward model learn from.
        reward: how the reward model is trained.
        ngrams: of masks by log-odds.
        probe: of masks by a probe.
        excess_loss: of masks by excess loss.
        classifier: scores what methods learn from. Null: that of `evaluate`.
        threshold: a text counts as flagged from this score on.
        resources: of a task that classifies or trains by preference.
    """

    methods: dict[str, Method] = field(default_factory=dict)
    trainings: int = option(1, at_least=1, affects_result=False)
    samples: Samples = Samples()
    reward: Reward = Reward()
    ngrams: Ngrams = Ngrams()
    probe: Probe = Probe()
    excess_loss: ExcessLoss = ExcessLoss()
    classifier: ClassifierSource | None = None
    threshold: float = option(0.5, at_least=0, at_most=1)
    resources: Resources = CPU_RESOURCES

    RENAMED: ClassVar[dict[str, str]] = moved("task") | {"smoothing": "/score_corpus.smooth"}


def check_compare(compare: Compare, evaluated: Iterable[str]) -> None:
    """Raises ConfigError, naming the key, for methods that say too much or too little, or start from no model.

    `evaluated`: further models of `evaluate`, whose names are taken."""
    if compare.classifier is not None:
        check_classifier(compare.classifier, "compare.classifier")
    models = list(OWN_MODELS)
    if not compare.probe.strengths:
        raise ConfigError("compare.probe.strengths: name one at least")
    for name, method in compare.methods.items():
        key = f"compare.methods.{name}"
        if name in (*OWN_MODELS, *OWN_FOLDERS, *evaluated):
            raise ConfigError(f"{key}: that name is taken; a method's names a folder and a model of its own")
        kinds = [kind for kind in ("mask", "dpo", "rad") if getattr(method, kind) is not None]
        if len(kinds) != 1:
            raise ConfigError(f"{key}: set one of mask, dpo and rad; it has {' and '.join(kinds) or 'none'}")
        for option_name in ("objective", "penalty"):
            if getattr(method, option_name) is not None and method.mask is None:
                raise ConfigError(f"{key}.{option_name}: is of masked tokens; {kinds[0]} has none")
        if method.selection and method.mask not in (*INFLUENCE, *SCORED):
            raise ConfigError(f"{key}.selection: is of masks by scores: {', '.join((*INFLUENCE, *SCORED))}")
        for option_name in ("quantile", "window", "rank_by"):
            if getattr(method, option_name) is not None and method.selection != "units":
                raise ConfigError(f"{key}.{option_name}: is of `selection: units`")
        if method.max_fraction is not None and (method.mask not in (*INFLUENCE, *SCORED) or method.keeps_mask):
            raise ConfigError(f"{key}.max_fraction: is of masks by scores, and of `influence` with a selection")
        start = method.dpo or method.rad
        if start and start.model not in models:
            raise ConfigError(f"{key}.{kinds[0]}.model: {start.model!r} is none of {', '.join(models)}")
        if method.dpo and method.dpo.batch_size % method.dpo.micro_batch_size:
            raise ConfigError(
                f"{key}.dpo.batch_size: {method.dpo.batch_size} is not a multiple of micro_batch_size ="
                f" {method.dpo.micro_batch_size}"
            )
        if not method.rad:
            models.append(name)
