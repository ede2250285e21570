"""A run: its config and the folders in its run directory. What is below the stages takes paths, the preflight apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ifguide import artifacts, schemas
from ifguide.artifacts.reading import is_trained
from ifguide.config import Config, ConfigError, ModelSource, check_names, result_options, to_yaml
from ifguide.config.methods import MAKERS, SMOOTHED
from ifguide.corpus.tables import TOKENIZER
from ifguide.folders import (
    ANALYSES,
    BASELINE,
    COMPARE,
    CORPUS,
    ENSEMBLE,
    EXPORT,
    FACTORS,
    FOLDERS,
    GENERATIONS,
    MASK,
    MODEL,
    PENALISED,
    QUERY,
    RANKING,
    REPORT,
    ROOMS,
    SCORES,
    STUDENT,
    TARGET,
)
from ifguide.selection.folders import SelectionFolders
from ifguide.storage import location

RESULT_KEYS: dict[str, tuple[str, ...]] = {  # what the result of a verb depends on: top-level keys of a config
    "pack_corpus": ("pack_corpus", "tokenizer"),
    "pretrain": ("pretrain", "target", "seed"),
    "fit_factors": ("fit_factors", "seed"),
    "build_query": ("build_query", "tokenizer", "seed"),
    "fit_student": ("fit_student", "seed"),
    "score_corpus": ("score_corpus",),
    "build_mask": ("build_mask",),
    "evaluate": ("evaluate", "seed"),
    "analyse": ("analyse", "evaluate", "seed"),
}
STANDS_FOR = {  # what has come from elsewhere -> the verbs that it takes the place of
    "import_scores": ("fit_factors", "build_query", "fit_student", "score_corpus"),
    "import_mask": ("fit_factors", "build_query", "fit_student", "score_corpus", "build_mask"),
}
OF_MASKED = ("objective", "penalty")  # of `pretrain`: what a training without a mask does not read
OF_STUDENT = ("recheck_fraction", "audit_fraction")  # of `score_corpus`: what exact scores do not read
# Of `evaluate`, what the analyses read; which prompts the lens takes, the artifact's inputs tell.
ANALYSED = ("models", "word_list", "classifier", "max_new_tokens", "bootstrap_samples")
TRAINED = "trained"  # the name in a plan of a tokenizer that is trained on the corpus


@dataclass(frozen=True, kw_only=True)
class Run:
    """One config in one run directory, and where its artifacts lie.

    Raises:
        ConfigError: `evaluate.report` is the name of another folder.
    """

    config: Config
    lent: Mapping[str, Path] = field(default_factory=dict)  # artifacts that are another run's, by name

    def __post_init__(self) -> None:
        check_names("evaluate.report", [self.config.evaluate.report], of="a folder", taken=ROOMS)

    @property
    def folder(self) -> Path:
        """The run directory, local (then absolute) or remote: Ray workers have another working directory."""
        return location(self.config.run_dir)

    corpus = property(lambda self: self._place(CORPUS))
    factors = property(lambda self: self._place(FACTORS))
    query = property(lambda self: self._place(QUERY))
    student = property(lambda self: self._place(STUDENT))
    scores = property(lambda self: self._place(SCORES))
    ensemble = property(lambda self: self._place(ENSEMBLE))
    ranking = property(lambda self: self._place(RANKING))
    mask = property(lambda self: self._place(MASK))
    analyses = property(lambda self: self.folder / ANALYSES)
    comparison = property(lambda self: self.folder / COMPARE)
    report = property(lambda self: self.folder / self.config.evaluate.report)

    @property
    def selection(self) -> SelectionFolders:
        """The mask, and what it was made of."""
        return SelectionFolders(
            corpus=self.corpus, scores=self.scores, ensemble=self.ensemble, ranking=self.ranking, mask=self.mask
        )

    def model(self, name: str) -> Path:
        """Folder of a trained model: `baseline` or `penalised`."""
        return self._place(f"{MODEL}/{name}")

    def made_by(self, verb: str) -> Path:
        """Folder of what a verb makes."""
        folders = {"pack_corpus": self.corpus, "fit_factors": self.factors, "build_query": self.query}
        folders |= {"fit_student": self.student, "score_corpus": self.scores, "build_mask": self.mask}
        folders |= {"evaluate": self.report, "analyse": self.analyses}
        folders["pretrain"] = self.model(PENALISED if self.config.pretrain.use_mask else BASELINE)
        return folders.get(verb, self.folder / verb)

    def behaviour(self, name: str) -> SelectionFolders:
        """The ranking and mask of a behaviour that was scored, which the report shows and no model is trained with."""
        folder = self.report / "behaviours" / name
        return replace(self.selection, ranking=folder / RANKING, mask=folder / MASK)

    @property
    def models(self) -> dict[str, Path]:
        """The folders of both models, trained or not."""
        return {name: self.model(name) for name in (BASELINE, PENALISED)}

    def generations(self, model: str) -> Path:
        """Folder of a model's continuations, an artifact for each prompt set."""
        return self._place(f"{GENERATIONS}/{model}")

    def _place(self, name: str) -> Path:
        return self.lent.get(name, self.folder / name)

    def artifact_folders(self) -> dict[str, Path]:
        """All artifact folders in pipeline order, whether they exist or not; `student` and `ensemble` where the config
        asks for them."""
        further = {STUDENT: self.student} if self.config.score_corpus.uses_student else {}
        further |= {ENSEMBLE: self.ensemble} if self.config.build_mask.others else {}
        return {name: self._place(name) for name in FOLDERS} | {REPORT: self.report} | further

    @property
    def target(self) -> Run:
        """The run whose corpus and mask the target is trained on: this one, unless the target has another tokenizer.

        Then `target/corpus` and `target/mask` lie beside what they are made of, another run's where those are lent."""
        config, train = self.config, self.config.pretrain
        if not train.has_own_tokenizer or train.tokenizer == self.tokenizer_source:
            return self
        config = replace(
            config,
            run_dir=str(self.corpus.parent / TARGET),
            tokenizer=train.tokenizer,
            pack_corpus=replace(config.pack_corpus, train_tokenizer=train.train_tokenizer),
            pretrain=replace(train, tokenizer=None, train_tokenizer=None),
        )
        return Run(config=config, lent={MASK: self.mask.parent / TARGET / MASK})

    @property
    def tokenizer_source(self) -> str:
        """The source of the tokenizer: the corpus' own if that is trained, another run's where the corpus is lent."""
        if self.config.pack_corpus.train_tokenizer is not None:
            return str(self.corpus / TOKENIZER)
        return self.config.named_tokenizer

    @property
    def planned_tokenizer(self) -> str:
        """The tokenizer's name in the corpus' plan: a trained one lies in the corpus, which may be moved. Plans that
        were made before had its path."""
        if self.config.pack_corpus.train_tokenizer is None:
            return self.tokenizer_source
        name = str(artifacts.made_from(self.corpus)["options"].get("tokenizer"))
        return name if name.endswith(f"/corpus/{TOKENIZER}") else TRAINED

    @property
    def proxy_source(self) -> ModelSource:
        """The proxy: as configured, or the baseline this run trained."""
        if self.config.proxy_is_baseline:
            return ModelSource(source=str(self.model(BASELINE) / EXPORT))
        return self.config.proxy

    @property
    def proxy_is_trained(self) -> bool:
        """Whether `pretrain` makes the proxy, in this run or another."""
        source = self.config.proxy.source
        return self.config.proxy_is_baseline or (source is not None and is_trained(source))

    def require_proxy(self) -> None:
        """Refuse to go on when the proxy should be this run's baseline and that is not there."""
        if self.config.proxy_is_baseline:
            artifacts.require(self.model(BASELINE), "pretrain --set pretrain.use_mask=false")

    def require_plain_model(self) -> None:
        """Refuse a comparison with the plain model where a run neither has nor makes it.

        Raises:
            ConfigError: names the key.
        """
        if not self.config.baseline and not (self.model(BASELINE) / artifacts.MANIFEST).exists():
            raise ConfigError("baseline: compare sets models beside the plain one; set baseline: true")

    @property
    def brought_in(self) -> str | None:
        """The verb by which its mask or its scores have come from elsewhere, if they have: one of `STANDS_FOR`."""
        folders = [folder for folder in (self.mask, self.scores) if (folder / artifacts.MANIFEST).exists()]
        verbs = (artifacts.read_manifest(folder).verb for folder in folders)
        return next((verb for verb in verbs if verb in STANDS_FOR), None)

    @property
    def absent(self) -> frozenset[str]:
        """What it neither has nor makes where scores or a mask have come from elsewhere: folders, and `SMOOTHED`."""
        if (brought := self.brought_in) is None:
            return frozenset()
        makers, left_out = MAKERS | {ENSEMBLE: "build_mask"}, STANDS_FOR[brought]
        absent = {
            name
            for name, verb in makers.items()
            if verb in left_out and not (self._place(name) / artifacts.MANIFEST).exists()
        }
        if SCORES not in absent:
            columns = schemas.read_schema(next(artifacts.verified_files(self.scores))).names
            if schemas.smoothed_column(self.config.build_mask.behaviour) not in columns:
                absent.add(SMOOTHED)
        return frozenset(absent)

    def options(self, verb: str) -> dict[str, Any]:
        """The options of the config that the result of a verb depends on, as its artifact records them."""
        options = result_options(self.config, RESULT_KEYS[verb])
        if verb == "pack_corpus":
            options["tokenizer"] = self.planned_tokenizer
        elif unread := self._unread(verb):
            made = artifacts.made_from(self.made_by(verb))["options"].get(verb, {})  # of before: the whole section
            options[verb] = {key: value for key, value in options[verb].items() if key not in unread}
            options[verb] |= {key: made[key] for key in unread if key in made}
        elif verb == "analyse":
            made = artifacts.made_from(self.analyses)["options"].get("evaluate", {})  # of before: the whole section
            further = {key: value for key, value in made.items() if key not in ANALYSED}
            options["evaluate"] = further | {key: options["evaluate"][key] for key in ANALYSED}
        return options

    def _unread(self, verb: str) -> tuple[str, ...]:
        """The keys of a verb's section that its result does not depend on, as the other keys are set."""
        config = self.config
        if verb == "pretrain" and not config.pretrain.use_mask:
            return OF_MASKED
        if verb == "fit_student" and config.fit_student.kind != "encoder":
            return ("encoder",)
        if verb == "score_corpus":
            return ("min_agreement", *(("smooth",) if config.score_corpus.uses_student else OF_STUDENT))
        return ()

    def open(
        self,
        folder: Path,
        verb: str,
        *,
        keys: tuple[str, ...] | None = None,
        inputs: Mapping[str, str],
        extra: Mapping[str, Any] = {},
    ) -> artifacts.Artifact:
        """Open the artifact of a verb whose result depends on its `options`, or on those of other `keys` where they are
        named, and on `inputs`."""
        options = {**(self.options(verb) if keys is None else result_options(self.config, keys)), **extra}
        return artifacts.open_artifact(
            folder, verb=verb, options=options, inputs=inputs, config_yaml=to_yaml(self.config)
        )

    def with_mask(self, use_mask: bool) -> Run:
        """The same run for one of the two models that `pretrain` makes."""
        return replace(self, config=replace(self.config, pretrain=replace(self.config.pretrain, use_mask=use_mask)))

    def borrow(self, other: Run, *names: str) -> Run:
        """This run with artifacts of another one in place of its own: folders by their names in a run directory."""
        return replace(self, lent={**self.lent, **{name: other._place(name) for name in names}})
