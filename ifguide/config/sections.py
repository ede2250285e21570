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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from ifguide.config.analyse import Analyse, check_analyse
from ifguide.config.build_query import BuildQuery, check_build_query
from ifguide.config.compare import Compare, check_compare
from ifguide.config.evaluate import Evaluate, check_evaluate
from ifguide.config.fit_student import FitStudent, check_fit_student
from ifguide.config.names import check_names
from ifguide.config.packaged import find_config, packaged_config
from ifguide.config.pretrain import Pretrain, check_pretrain
from ifguide.config.resources import CPU_RESOURCES, RESOURCES, Resources, moved
from ifguide.config.score_corpus import ScoreCorpus
from ifguide.config.secrets import redact, redacted_key
from ifguide.config.sources import Input, check_input
from ifguide.config.typed_yaml import ConfigError, apply_override, build, option, read_yaml, result_part, substitute

OWN = "own"  # the name of a run's own query among the behaviours that are scored
VERBS = (
    "pack_corpus",
    "pretrain",
    "fit_factors",
    "build_query",
    "fit_student",
    "score_corpus",
    "build_mask",
    "evaluate",
)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a language model comes from. `source` and `architecture` exclude each other; what neither means stands with
    the key that holds the model.

    Attributes:
        source: hub id, local folder, or path of a `.gguf` file, whose weights are dequantised.
        architecture: fields of a Hugging Face config with `model_type`; the weights are random.
        revision: commit or branch of the hub's repository that weights are of; tokenizers are the main branch's.
        trust_remote_code: run the model code that the hub's repository brings.
    """

    source: str | None = None
    architecture: dict[str, Any] | None = None
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The Ray cluster.

    Attributes:
        address: a running cluster to join. Null: `RAY_ADDRESS`, else a local one is started.
        num_cpus: CPUs of a cluster that is started. Null: all of the machine.
        gpu: the GPU type that plans and dry runs reckon with, a name of `ifguide/hardware.yaml`.
    """

    address: str | None = option(None, affects_result=False)
    num_cpus: int | None = option(None, at_least=1, affects_result=False)
    gpu: str = option("h100", affects_result=False)


@dataclass(frozen=True, kw_only=True)
class PackCorpus:
    """Tokenise documents and pack them into blocks of equal length.

    Attributes:
        inputs: the documents, in order.
        block_size: tokens of a block.
        blocks_per_shard: blocks of a shard. A shard is the unit of scoring, of retries and of resuming.
        interleave: mix the inputs in proportion to their document counts; false: one after the other.
        special_tokens: what the name of a special token (`<|endoftext|>`) within a document is: text, or that token.
        train_tokenizer: train a byte-level BPE tokenizer of this many tokens on the corpus instead of loading one.
        max_bad_rows: documents that may be unusable (not UTF-8, no text). More than that ends the stage.
        chunk_megabytes: input that one tokenising task reads.
        resources: of one task.
    """

    inputs: tuple[Input, ...] = ()
    block_size: int = option(1024, at_least=2)
    blocks_per_shard: int = option(4096, at_least=1)
    interleave: bool = True
    special_tokens: Literal["text", "token"] = "text"
    train_tokenizer: int | None = option(None, at_least=300)
    max_bad_rows: int = option(0, at_least=0, affects_result=False)
    chunk_megabytes: float = option(32.0, above=0)
    resources: Resources = CPU_RESOURCES

    RENAMED: ClassVar[dict[str, str]] = moved("task")


@dataclass(frozen=True, kw_only=True)
class FitFactors:
    """EK-FAC factors of the proxy.

    Attributes:
        sample_blocks: blocks that the factors are fitted on; a smaller corpus is taken whole.
        data_partitions: parts of the sample. A part is one task, and the unit of resuming.
        module_partitions: parts of the modules. M parts hold 1/M of the sums at a time. They read the sample M times.
        batch_size: blocks of one forward pass.
        min_coverage: the share of the blocks' parameters that linear layers must hold, or the proxy is refused.
        resources: of one task.
    """

    sample_blocks: int = option(20_000, at_least=1)
    data_partitions: int = option(1, at_least=1)
    module_partitions: int = option(1, at_least=1)
    batch_size: int = option(8, at_least=1)
    min_coverage: float = option(0.9, at_least=0, at_most=1)
    resources: Resources = RESOURCES

    RENAMED: ClassVar[dict[str, str]] = moved("task")


@dataclass(frozen=True, kw_only=True)
class BuildMask:
    """Algorithm 1: rank documents, then mask tokens.

    Attributes:
        behaviour: what to select by: `own`, the run's own query, or a name of `score_corpus.queries`.
        smoothed: select by smoothed scores. Null: where `score_corpus.smooth` made them. False: by exact ones.
        others: `scores` folders of other runs on this corpus, by other checkpoints of the proxy or by other proxies of
            its tokenizer. Tokens are selected by the mean of their ranks in these and in the run's own scores.
        quantile: tau is this quantile of all token scores.
        standardise: divide each score by the spread of its nulls first (`build_query.nulls`).
        fdr: tau is where this share of the tokens above it would be there by chance, in place of the quantile;
            standardises. Null: the quantile.
        window: neighbours on each side that are masked with a token above tau.
        max_fraction: masked share of the corpus' predicted tokens at most.
        unit: what is ranked: documents (the paper) or blocks (the paper's code).
        rank_by: `rate` ranks by what a unit holds per predicted token; `sum` (the paper) by what it holds, so that
            length alone ranks it high.
        rate_prior: tokens below tau that `rate` adds to each unit, so that a short one is not first by one token.
        outlier_mass_ratio: list blocks whose sum of |score| is over this many times the median block's.
        outlier_bigram_share: list blocks whose share of distinct bigrams is below this (repeated tokens).
        exclude_repeated: keep blocks of repeated tokens out of ranking and mask.
        resources: of one task.
    """

    behaviour: str = OWN
    smoothed: bool | None = option(None, off=None)
    others: tuple[str, ...] = option((), off=())
    quantile: float = option(0.99, above=0, at_most=1)
    standardise: bool = option(False, off=False)
    fdr: float | None = option(None, above=0, at_most=1, off=None)
    window: int = option(1, at_least=0)
    max_fraction: float = option(0.02, above=0, at_most=1)
    unit: Literal["document", "block"] = "document"
    rank_by: Literal["sum", "rate"] = option("rate", off="sum")
    rate_prior: int = option(100, at_least=0, off=100)
    outlier_mass_ratio: float = option(10.0, above=0)
    outlier_bigram_share: float = option(0.25, at_least=0, at_most=1)
    exclude_repeated: bool = False
    resources: Resources = CPU_RESOURCES

    RENAMED: ClassVar[dict[str, str]] = moved("task")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole run.

    Attributes:
        run_dir: folder of all artifacts, local or remote. `{run_dir}` in any other string stands for it.
        seed: of samples, orders and initial weights.
        tokenizer: hub id or folder. Null: the proxy's, else the target's.
        proxy: the model that scores. Empty: the baseline that `pretrain` makes.
        target: the model that is trained.
        baseline: train the plain model as well.
    """

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
    build_query: BuildQuery = BuildQuery()  # noqa: RUF009  # frozen
    fit_student: FitStudent = FitStudent()  # noqa: RUF009  # frozen
    score_corpus: ScoreCorpus = ScoreCorpus()  # noqa: RUF009  # frozen
    build_mask: BuildMask = BuildMask()
    evaluate: Evaluate = Evaluate()  # noqa: RUF009  # frozen
    compare: Compare = Compare()  # noqa: RUF009  # frozen
    analyse: Analyse = Analyse()  # noqa: RUF009  # frozen

    @property
    def named_tokenizer(self) -> str:
        """The source of a tokenizer that is not trained: `tokenizer`, the proxy's, or the target's."""
        source = self.tokenizer or self.proxy.source or self.target.source
        if source is None:
            raise ConfigError("tokenizer: name a hub id or a local folder (no proxy or target source gives one)")
        return source

    @property
    def target_tokenizer_size(self) -> int | None:
        """Tokens of the target's tokenizer, where that is trained; None: it is not, as with `pretrain.init_from`."""
        if self.pretrain.has_own_tokenizer:
            return self.pretrain.train_tokenizer
        return self.pack_corpus.train_tokenizer

    @property
    def proxy_is_baseline(self) -> bool:
        """True when no proxy is named, so that the baseline model of this run serves as one."""
        return self.proxy.source is None and self.proxy.architecture is None


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, or the packaged one of that name, and apply `a.b=c` overrides. A file that `extends` another,
    named relative to it or packaged, has that one's keys where it sets none of its own.

    Raises:
        ConfigError: unknown key, bad type or value; names the dotted key.
        FileNotFoundError: no such file.
    """
    tree = _read_tree(Path(path))
    tree = _apart(tree)
    for override in overrides:
        apply_override(tree, override)
    if (key := redacted_key(tree)) is not None:
        raise ConfigError(
            f"{key}: the credentials were taken out when this config was written down; to go on with that run, give the"
            f" whole value again with --set {key}=..., and for a new one leave them to the environment"
        )
    return config_from_mapping(substitute(tree, str(tree.get("run_dir", Config.run_dir))))


def _read_tree(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    path = find_config(path)
    try:
        tree = read_yaml(path.read_text(encoding="utf-8")) or {}
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(tree).__name__}")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str) or path.resolve() in extending:
        raise ConfigError(f"extends: {path} extends {base!r}; name one other file, which does not extend this one")
    extended = path.parent / base
    if not extended.is_file():
        extended = Path(base)
    elif extended.samefile(path):  # it may be named after the packaged one that it extends
        extended = packaged_config(base) or extended
    return _merged(_read_tree(extended, (*extending, path.resolve())), tree)


def _apart(tree: Any) -> Any:
    """A tree without shared parts: YAML builds what aliases name once, and an override of one place is of no other."""
    if isinstance(tree, dict):
        return {key: _apart(value) for key, value in tree.items()}
    return [_apart(value) for value in tree] if isinstance(tree, list) else tree


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
    """The resolved config as YAML; `load_config` reads it back to an equal config, but for credentials (`secrets`)."""
    return yaml.safe_dump(redact(to_mapping(config)), sort_keys=False, allow_unicode=True)


def result_options(config: Config, keys: Iterable[str]) -> dict[str, Any]:
    """The options under top-level `keys` that change results, as nested dicts without credentials."""
    return {key: redact(result_part(getattr(config, key))) for key in keys}


def _check_across(config: Config) -> None:
    check_pretrain(config.pretrain)
    scoring = config.score_corpus
    if scoring.min_actors > scoring.max_actors:
        raise ConfigError(f"score_corpus.min_actors: {scoring.min_actors} is over max_actors = {scoring.max_actors}")
    check_fit_student(config.fit_student)
    if scoring.uses_student:
        check_student(config)
    if scoring.smooth is not None and not scoring.smooth.ridges:
        raise ConfigError("score_corpus.smooth.ridges: name one at least")
    if config.build_mask.smoothed and (config.build_mask.standardise or config.build_mask.fdr is not None):
        raise ConfigError("build_mask.smoothed: z-scores are of exact scores; set it to false or null")
    if config.build_mask.others and (config.build_mask.standardise or config.build_mask.fdr is not None):
        key = "standardise" if config.build_mask.fdr is None else "fdr"
        raise ConfigError(
            f"build_mask.{key}: z-scores are of one run's scores against its nulls, and mean ranks have none; unset it,"
            " or build_mask.others"
        )
    check_names("score_corpus.queries", scoring.queries, of="a column of scores and a folder", taken=[OWN])
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
    start = config.pretrain.init_from
    if config.pack_corpus.train_tokenizer is not None and start is not None and not config.pretrain.has_own_tokenizer:
        raise ConfigError(
            "pack_corpus.train_tokenizer: the weights of pretrain.init_from are of that model's own tokens; set"
            f" pretrain.tokenizer={start}, or tokenizer={start} in place of this"
        )
    for index, source in enumerate(config.pack_corpus.inputs):
        check_input(source, f"pack_corpus.inputs[{index}]")
        if source.tokens_column is not None:
            _check_tokens(config, source, f"pack_corpus.inputs[{index}].tokens_column")
    check_build_query(config.build_query)
    check_evaluate(config.evaluate)
    check_analyse(config.analyse)
    check_names("compare.methods", config.compare.methods, of="a folder")
    check_compare(config.compare, config.evaluate.models)
    if config.compare.trainings > 1 and config.pretrain.engine == "torch":
        raise ConfigError("compare.trainings: engine: torch trains in this process, one model at a time; set it to 1")
    for name in ("proxy", "target"):
        model: ModelSource = getattr(config, name)
        if model.source is not None and model.architecture is not None:
            raise ConfigError(f"{name}: set either source or architecture, not both")
    if config.target.trust_remote_code:
        raise ConfigError("target.trust_remote_code: targets of remote code are not supported; set it to false")


def check_student(config: Config) -> None:
    """Raises ConfigError where a student cannot learn, or make, the scores that the config asks for."""
    scoring, selection = config.score_corpus, config.build_mask
    scorer = scoring.scorer if scoring.uses_student else "student"
    key = f"score_corpus.scorer: {scorer}" if scoring.uses_student else "fit_student: a student"
    if scoring.queries:
        raise ConfigError(f"{key} scores the run's own query alone; unset score_corpus.queries, or take exact scores")
    if config.fit_student.sample_fraction == 1:
        raise ConfigError(f"fit_student.sample_fraction: 1 leaves no block to audit the {scorer} by; lower it")
    kind = config.fit_student.kind
    if scoring.attribution == "position" and kind in ("head", "suffix"):
        raise ConfigError(f"{key}: fit_student.kind: {kind} makes target scores; set score_corpus.attribution: target")
    if config.build_query.nulls or selection.standardise or selection.fdr is not None:
        raise ConfigError(
            f"{key} scores no null directions; set build_query.nulls: 0, and unset build_mask.standardise and fdr"
        )
    if selection.smoothed:
        raise ConfigError(f"{key} smooths no scores; set build_mask.smoothed to false or null")


def _check_tokens(config: Config, source: Input, key: str) -> None:
    if source.spans_column is not None or source.text_column != Input.text_column:
        other = "spans_column" if source.spans_column is not None else "text_column"
        raise ConfigError(f"{key}: token ids have no text; unset {other}")
    if config.pack_corpus.train_tokenizer is not None or config.pretrain.has_own_tokenizer:
        raise ConfigError(
            f"{key}: token ids are of one tokenizer, and there is no text to train another on or to pack with it; unset"
            " pack_corpus.train_tokenizer, pretrain.tokenizer and pretrain.train_tokenizer"
        )
