"""One typed YAML for the whole pipeline: frozen dataclasses, one section per verb.

`load_config(path, overrides)` reads the YAML, applies dotted overrides (`a.b=c`, the value in YAML syntax), puts
the run directory for `{run_dir}` in any string, and checks every key, type and bound. Every error is a
`ConfigError` that names the dotted key; an unknown key also names the nearest valid one. `to_yaml(config)` gives
the resolved config, and that text can be run again.

A field made with `option(..., affects_result=False)` (placement, retries, logging) is left out of
`result_options`: two runs that differ only there make the same artifacts.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from ifguide.config.analyse import Analyse
from ifguide.config.compare import Compare, check_compare
from ifguide.config.pretrain import Pretrain, check_pretrain
from ifguide.config.resources import CPU_RESOURCES, RESOURCES, Resources, moved
from ifguide.config.sources import ClassifierSource, Input, LabelledTexts, Prompts, PromptSet
from ifguide.config.typed_yaml import ConfigError, apply_override, build, option, result_part, substitute
from ifguide.storage import location

NAME, NAME_RULE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*"), "letters, digits, '_', '.' and '-' alone"
OWN = "own"  # the name of a run's own query among the behaviours that are scored
VERBS = (
    "pack_corpus",
    "pretrain",
    "fit_factors",
    "build_query",
    "score_corpus",
    "build_mask",
    "evaluate",
)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a language model comes from: `source` (hub id, local folder, or path of a .gguf file) or
    `architecture` (HF config fields with `model_type`, random weights). Neither: see the field's owner."""

    source: str | None = None
    architecture: dict[str, Any] | None = None
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The Ray cluster: `address` joins a running one, else `RAY_ADDRESS`, else a local one is started. Plans and dry
    runs reckon with GPUs of the type `gpu`, a name of hardware.yaml."""

    address: str | None = option(None, affects_result=False)
    num_cpus: int | None = option(None, at_least=1, affects_result=False)
    gpu: str = option("h100", affects_result=False)


@dataclass(frozen=True, kw_only=True)
class PackCorpus:
    """Tokenise and pack. `interleave` mixes the inputs in proportion to their document counts.
    `train_tokenizer` trains a byte-level BPE of that many tokens on the corpus instead of loading one."""

    inputs: tuple[Input, ...] = ()
    block_size: int = option(1024, at_least=2)
    blocks_per_shard: int = option(4096, at_least=1)
    interleave: bool = True
    train_tokenizer: int | None = option(None, at_least=300)
    max_bad_rows: int = option(0, at_least=0, affects_result=False)
    chunk_megabytes: float = option(32.0, above=0)
    resources: Resources = CPU_RESOURCES

    RENAMED: ClassVar[dict[str, str]] = moved("task")


@dataclass(frozen=True, kw_only=True)
class FitFactors:
    """EK-FAC factors of the proxy from `sample_blocks` blocks (all of a smaller corpus). A task has one of
    `data_partitions` of the blocks and one of `module_partitions` of the modules: more of the latter, less memory."""

    sample_blocks: int = option(20_000, at_least=1)
    data_partitions: int = option(1, at_least=1)
    module_partitions: int = option(1, at_least=1)
    batch_size: int = option(8, at_least=1)
    min_coverage: float = option(0.9, at_least=0, at_most=1)
    resources: Resources = RESOURCES

    RENAMED: ClassVar[dict[str, str]] = moved("task")


@dataclass(frozen=True, kw_only=True)
class BuildQuery:
    """The direction V = (EK-FAC + damping)^-1 [mean positive - mean negative completion gradient]: completions whose
    score is at least `positive_threshold` show the behaviour, those of at most `negative_threshold` do not. With
    `differential` false the mean of the positive ones stands alone: plain influence, which finds what is merely common.
    `damping` null means `damping_scale` * mean(lambda) per module. `factors` names a folder of factors that
    kronfluence fitted elsewhere; null means the run's own."""

    prompts: Prompts | None = None
    classifier: ClassifierSource = ClassifierSource()  # noqa: RUF009  # frozen
    positive_threshold: float = option(0.5, at_least=0, at_most=1)
    negative_threshold: float = option(0.1, at_least=0, at_most=1)
    max_positive: int = option(10_000, at_least=1)
    max_negative: int = option(10_000, at_least=1)
    differential: bool = True
    max_tokens: int = option(512, at_least=2)
    batch_tokens: int = option(4096, at_least=1)
    partitions: int = option(1, at_least=1)
    factors: str | None = option(None, affects_result=False)  # their digest is among the artifact's inputs
    damping: float | None = option(None, at_least=0)
    damping_scale: float = option(0.1, at_least=0)
    resources: Resources = RESOURCES

    RENAMED: ClassVar[dict[str, str]] = moved("task") | {
        "toxic_threshold": "positive_threshold",
        "nontoxic_threshold": "negative_threshold",
        "max_toxic": "max_positive",
        "max_nontoxic": "max_negative",
    }


@dataclass(frozen=True, kw_only=True)
class ScoreCorpus:
    """Score every token. `attribution: target` is the paper's Eq. 8, `position` what its code computes.

    `preset` sets engine, precision, rank and fused (see `influence.method`); each can be set alone, `rank: 0` meaning
    full. `precision` null is the preset's, but float32 where the first actor's machine is not quicker in bfloat16.
    `fused` compiles kernels, about 20 s per actor: null does where the preset does and a compiler is found.
    Before the first shard, `check_blocks` blocks are scored by the exact method too, and correlation and agreement of
    the top 1% must both reach `min_agreement`. `queries` names further behaviours, `name: folder of a query artifact`
    of the same proxy: each gives one more column of scores. `own` names the run's own query, and no further one.
    `micro_batch_blocks` null is chosen to fit the memory. The actors are `min_actors` to `max_actors`, as there is
    room, each with `resources`."""

    attribution: Literal["target", "position"] = "target"
    preset: Literal["fast", "exact"] = "fast"
    engine: Literal["forward", "difference"] | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    rank: int | None = option(None, at_least=0)
    fused: bool | None = None
    queries: dict[str, str] = field(default_factory=dict)
    micro_batch_blocks: int | None = option(None, at_least=1)
    check_blocks: int = option(4, at_least=0)
    min_agreement: float = option(0.9, at_least=0, at_most=1)
    min_actors: int = option(1, at_least=1, affects_result=False)
    max_actors: int = option(1, at_least=1, affects_result=False)
    resources: Resources = RESOURCES

    RENAMED: ClassVar[dict[str, str]] = moved("actor")


@dataclass(frozen=True, kw_only=True)
class BuildMask:
    """Algorithm 1. `max_fraction` bounds the masked share of the corpus' predicted tokens. `behaviour` is `own`, the
    run's own query, or one of the further behaviours that `score_corpus` scored. Blocks whose mass (sum of |score|)
    is over `outlier_mass_ratio` times the median block's, or whose share of distinct bigrams is below
    `outlier_bigram_share` (repeated tokens), are listed; `exclude_repeated` keeps the latter out of ranking and mask.
    """

    behaviour: str = OWN
    quantile: float = option(0.99, above=0, at_most=1)
    window: int = option(1, at_least=0)
    max_fraction: float = option(0.02, above=0, at_most=1)
    unit: Literal["document", "block"] = "document"
    outlier_mass_ratio: float = option(10.0, above=0)
    outlier_bigram_share: float = option(0.25, at_least=0, at_most=1)
    exclude_repeated: bool = False
    resources: Resources = CPU_RESOURCES

    RENAMED: ClassVar[dict[str, str]] = moved("task")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Generate, classify, measure, report. `models` adds models by name to those this run trained.

    `max_prompts` of `prompts` are drawn by seed, half of them with the behaviour by their labels if `balanced`.
    `prompt_sets` are further sets by name (BOLD, AttaQ). `classifiers` score the same continuations as further classes
    by name (`implicit: hf:tomh/toxigen_roberta`). Perplexity is of `heldout`, and again of its documents that the
    classifier does not flag. Intervals rest on `bootstrap_samples`. `report` names the folder
    of the figures: with another name, another classifier takes the same generations. `--check-classifier` compares all
    classifiers with the labels in `check_data`."""

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
    cloze: Input | None = None
    models: dict[str, str] = field(default_factory=dict)
    word_list: tuple[str, ...] = ()
    top_documents: int = option(10, at_least=0)
    batch_size: int = option(64, at_least=1)
    actors: int = option(1, at_least=1, affects_result=False)
    resources: Resources = RESOURCES

    RENAMED: ClassVar[dict[str, str]] = moved("actor")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole run. `proxy` left empty means: the baseline that `pretrain` makes is the proxy."""

    run_dir: str = option("runs/default", affects_result=False)
    seed: int = option(0, at_least=0)
    tokenizer: str | None = None
    proxy: ModelSource = ModelSource()
    target: ModelSource = ModelSource()
    baseline: bool = True
    cluster: Cluster = Cluster()
    pack_corpus: PackCorpus = PackCorpus()
    pretrain: Pretrain = Pretrain()  # noqa: RUF009  # frozen
    fit_factors: FitFactors = FitFactors()
    build_query: BuildQuery = BuildQuery()
    score_corpus: ScoreCorpus = ScoreCorpus()
    build_mask: BuildMask = BuildMask()
    evaluate: Evaluate = Evaluate()
    compare: Compare = Compare()  # noqa: RUF009  # frozen
    analyse: Analyse = Analyse()  # noqa: RUF009  # frozen

    @property
    def tokenizer_source(self) -> str:
        """The tokenizer's source: the corpus' own if trained, else `tokenizer`, the proxy's, or the target's."""
        if self.pack_corpus.train_tokenizer is not None:
            return str(location(self.run_dir) / "corpus" / "tokenizer")
        source = self.tokenizer or self.proxy.source or self.target.source
        if source is None:
            raise ConfigError("tokenizer: name a hub id or a local folder (no proxy or target source gives one)")
        return source

    @property
    def proxy_is_baseline(self) -> bool:
        """True when no proxy is named, so that the baseline model of this run serves as one."""
        return self.proxy.source is None and self.proxy.architecture is None


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file and apply `a.b=c` overrides. A file that `extends` another, named relative to it, has that one's
    keys where it sets none of its own.

    Raises:
        ConfigError: unknown key, bad type or value; names the dotted key.
        FileNotFoundError: no such file.
    """
    tree = _read_tree(Path(path))
    for override in overrides:
        apply_override(tree, override)
    return config_from_mapping(substitute(tree, str(tree.get("run_dir", Config.run_dir))))


def _read_tree(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(tree).__name__}")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str) or path.resolve() in extending:
        raise ConfigError(f"extends: {path} extends {base!r}; name one other file, which does not extend this one")
    return _merged(_read_tree(path.parent / base, (*extending, path.resolve())), tree)


def _merged(base: Any, over: Any) -> Any:
    """`over` where it has a value; sections key by key, anything else whole."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {**base, **{key: _merged(base.get(key), value) for key, value in over.items()}}


def config_from_mapping(tree: Mapping[str, Any]) -> Config:
    """A checked `Config` from nested mappings, as YAML or JSON give them."""
    config = build(Config, tree, "")
    _check_across(config)
    return config


def to_mapping(section: Any) -> dict[str, Any]:
    """Plain nested dicts and lists of a config or a section: what YAML and JSON write."""
    return json.loads(json.dumps(dataclasses.asdict(section)))


def to_yaml(config: Config) -> str:
    """The resolved config as YAML; `load_config` reads it back to an equal config."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True)


def result_options(config: Config, keys: Iterable[str]) -> dict[str, Any]:
    """The options under top-level `keys` that change results, as nested dicts."""
    return {key: result_part(getattr(config, key)) for key in keys}


def _check_across(config: Config) -> None:
    check_pretrain(config.pretrain)
    if config.build_query.negative_threshold >= config.build_query.positive_threshold:
        raise ConfigError(
            f"build_query.negative_threshold: {config.build_query.negative_threshold} is not below"
            f" build_query.positive_threshold = {config.build_query.positive_threshold}: a query would be in both sets"
        )
    scoring = config.score_corpus
    if scoring.min_actors > scoring.max_actors:
        raise ConfigError(f"score_corpus.min_actors: {scoring.min_actors} is over max_actors = {scoring.max_actors}")
    for name in scoring.queries:
        if name == OWN or not NAME.fullmatch(name):
            raise ConfigError(
                f"score_corpus.queries: {name!r} names a column of scores and a folder; use {NAME_RULE}, and not"
                f" {OWN!r}, which is the run's own query"
            )
    if config.proxy_is_baseline and not config.baseline:
        raise ConfigError("baseline: false leaves no proxy; set proxy.source, or baseline: true")
    if config.pretrain.has_own_tokenizer and config.proxy_is_baseline:
        key = "tokenizer" if config.pretrain.tokenizer is not None else "train_tokenizer"
        raise ConfigError(
            f"pretrain.{key}: the proxy reads the corpus' own tokens, so this run's baseline, which would read"
            " these, cannot be it; set proxy.source"
        )
    if config.pack_corpus.train_tokenizer is not None and config.tokenizer is not None:
        raise ConfigError("pack_corpus.train_tokenizer: a tokenizer is named too; unset one of them")
    _check_evaluate(config.evaluate)
    for name in config.compare.methods:
        if not NAME.fullmatch(name):
            raise ConfigError(f"compare.methods: {name!r} names a folder; use {NAME_RULE}")
    check_compare(config.compare, config.evaluate.models)
    for name in ("proxy", "target"):
        model: ModelSource = getattr(config, name)
        if model.source is not None and model.architecture is not None:
            raise ConfigError(f"{name}: set either source or architecture, not both")


def _check_evaluate(evaluate: Evaluate) -> None:
    groups: dict[str, Iterable[str]] = {key: getattr(evaluate, key) for key in ("models", "prompt_sets", "classifiers")}
    for key, names in {**groups, "report": [evaluate.report]}.items():
        for name in names:
            if not NAME.fullmatch(name):
                raise ConfigError(f"evaluate.{key}: {name!r} names files; use {NAME_RULE}")
    if "prompts" in evaluate.prompt_sets:
        raise ConfigError("evaluate.prompt_sets.prompts: that is the name of evaluate.prompts; choose another")
    if evaluate.balanced and evaluate.max_prompts is None:
        raise ConfigError("evaluate.balanced: draws half of max_prompts; set evaluate.max_prompts")
