"""Which keys each verb uses, and the check of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from typing import Any

from ifguide.artifacts import MANIFEST, read_manifest, standing
from ifguide.config import VERBS, Config, Evaluate
from ifguide.config.methods import check_method
from ifguide.config.resources import WorkerResources
from ifguide.folders import BASELINE, PENALISED
from ifguide.preflight.findings import Finding, Findings, PreflightError
from ifguide.preflight.models import MODEL, TOKENIZER, ModelChecks, require_package
from ifguide.preflight.selection import SelectionChecks
from ifguide.preflight.tables import TableChecks
from ifguide.run import RESULT_KEYS, Run
from ifguide.storage import is_remote, location
from ifguide.student.sampling import LEAST_AUDITED, require_audit

Check = Callable[[], object]
CHECK_CLASSIFIER = "check_classifier"  # `evaluate --check-classifier`


def preflight(config: Config, verbs: Iterable[str] = VERBS, *, elsewhere: bool = False) -> tuple[Finding, ...]:
    """Check what `verbs` use; returns what could not be checked.

    `elsewhere`: the run itself may be on another machine, so what this one has too little of is no fault.

    Raises:
        PreflightError: it would fail; lists every fault.
    """
    findings, verbs = Findings(), tuple(verbs)
    sections = _Sections(config, findings, trains="pretrain" in verbs, elsewhere=elsewhere)
    checks: dict[str, Check] = {"run_dir": sections.run_dir}  # by key: what two verbs use is checked once
    for verb in verbs:
        checks |= sections.of(verb)
    for check in checks.values():
        check()
    if findings.faults:
        raise PreflightError(findings.faults, findings.unchecked)
    return tuple(findings.unchecked)


class _Sections:
    """The checks of one config. `trains`: its models are trained before what comes later."""

    def __init__(self, config: Config, findings: Findings, *, trains: bool, elsewhere: bool):
        self.config, self.findings, self.trains, self.elsewhere = config, findings, trains, elsewhere
        self.run = Run(config=config)
        self.models = ModelChecks(findings, made_in=self.run.folder)
        self.tables = TableChecks(findings, self.models.hub, apart=self.run.folder)
        self.selection = SelectionChecks(
            config=config, findings=findings, corpus=self.run.corpus, scores=self.run.scores
        )

    def of(self, verb: str) -> dict[str, Check]:
        """The checks of a verb by the key that each is of."""
        checks: Mapping[str, Check] = getattr(self, f"_{verb}")()
        made = {f"{verb} made": partial(self._made, verb)} if verb in RESULT_KEYS else {}
        return {**checks, **made, **self._resources(verb)}

    def _made(self, verb: str) -> None:
        """That what is there of a verb was made with the same options."""
        with self.findings.caught("run_dir", self.config.run_dir):
            standing(self.run.made_by(verb), self.run.options(verb))

    def run_dir(self) -> None:
        """That the run directory can be made and written."""
        key, value, place = "run_dir", self.config.run_dir, location(self.config.run_dir)
        with self.findings.caught(key, value):
            if is_remote(place):
                place.exists()  # no credentials, no such bucket
                return
            there = next(folder for folder in (place, *place.parents) if folder.exists())
            if not there.is_dir():
                self.findings.fault(key, value, f"{there} is a file; name a folder")
            elif not os.access(there, os.W_OK | os.X_OK):
                self.findings.fault(
                    key, value, f"{there} cannot be written to; name another folder, or change its mode"
                )

    def _pack_corpus(self) -> dict[str, Check]:
        pack, train = self.config.pack_corpus, self.config.pretrain
        checks: dict[str, Check] = {}
        if not pack.inputs:
            checks["pack_corpus.inputs"] = self._missing(
                "pack_corpus.inputs", "at least one file, folder or hf:// dataset"
            )
        for index, source in enumerate(pack.inputs):
            key = f"pack_corpus.inputs[{index}]"
            checks[key] = partial(self.tables.documents, key, source, bad_rows=pack.max_bad_rows)
        if train.tokenizer is not None:
            checks["pretrain.tokenizer"] = self._tokenizer("pretrain.tokenizer", train.tokenizer)
        return checks | self._corpus_tokenizer()

    def _corpus_tokenizer(self) -> dict[str, Check]:
        """The corpus' tokenizer, by the key that names it; none of a corpus that trains its own."""
        config = self.config
        if config.pack_corpus.train_tokenizer is not None:
            return {}
        named = {
            "tokenizer": config.tokenizer,
            "proxy.source": config.proxy.source,
            "target.source": config.target.source,
        }
        for key, source in named.items():
            if source is not None:
                return {f"{key} as tokenizer": self._tokenizer(key, source)}
        return {
            "tokenizer": self._missing("tokenizer", "a hub id or a local folder (no proxy or target source gives one)")
        }

    def _model(self, key: str, source: str, revision: str | None = None) -> Check:
        return partial(self.models.source, key, source, MODEL, revision)

    def _tokenizer(self, key: str, source: str) -> Check:
        return partial(self.models.source, key, source, TOKENIZER)

    def _proxy(self) -> dict[str, Check]:
        checks = self._corpus_tokenizer()
        if not self.config.proxy_is_baseline:
            checks["proxy"] = partial(self.models.model, "proxy", self.config.proxy)
        if self.config.proxy.source is not None:
            checks["proxy tokens"] = partial(self.models.corpus_tokens, self.config.proxy, self.run.tokenizer_source)
        return checks

    def _pretrain(self) -> dict[str, Check]:
        train, target = self.config.pretrain, self.config.target
        checks: dict[str, Check] = {"pretrain.engine": self._packages}
        if train.init_from is not None:
            checks["pretrain.init_from"] = self._model("pretrain.init_from", train.init_from, target.revision)
        elif target.source is None and target.architecture is None:
            checks["target"] = self._missing("target", "target.architecture, target.source or pretrain.init_from")
        else:
            checks["target"] = partial(self.models.model, "target", target, weights=False)
        if train.tokenizer is not None:
            checks["pretrain.tokenizer"] = self._tokenizer("pretrain.tokenizer", train.tokenizer)
        return checks

    def _packages(self) -> None:
        train = self.config.pretrain
        if train.engine == "deepspeed":
            require_package(self.findings, "pretrain.engine", train.engine, "deepspeed")
        if train.lora is not None:
            require_package(self.findings, "pretrain.lora.rank", str(train.lora.rank), "peft")
        if train.wandb is not None:
            require_package(self.findings, "pretrain.wandb.project", train.wandb.project, "wandb")

    def _fit_factors(self) -> dict[str, Check]:
        return self._proxy()

    def _build_query(self) -> dict[str, Check]:
        query = self.config.build_query
        tables = {"pairs": query.pairs, "positive": query.positive, "negative": query.negative}
        given = {f"build_query.{name}": source for name, source in tables.items() if source is not None}
        checks = self._proxy() | {key: partial(self.tables.queries, key, source) for key, source in given.items()}
        if not given:
            checks["build_query.classifier"] = partial(
                self.models.classifier, "build_query.classifier", query.classifier, of_new_text=False
            )
            others = " for the classifier; or set build_query.pairs, or positive and negative"
            checks |= self._prompts("build_query.prompts", query.prompts, others)
        checks["build_query"] = partial(self.tables.query_sets, query, self.config.seed)
        if query.factors is not None:
            checks["build_query.factors"] = partial(self._folder, "build_query.factors", query.factors)
        return checks

    def _fit_student(self) -> dict[str, Check]:
        checks, student = self._proxy(), self.config.fit_student
        if student.kind == "encoder" and student.encoder.source is not None:
            source, block = student.encoder.source, self.config.pack_corpus.block_size
            checks["fit_student.encoder.source"] = self._model("fit_student.encoder.source", source)
            checks["fit_student.encoder tokens"] = partial(
                self.models.encoder_reads, source, self.run.tokenizer_source, block
            )
        return checks | {"score_corpus.audit_fraction": self._audit}

    def _audit(self) -> None:
        """That a student's audit has enough of the corpus' blocks."""
        key, fraction = "score_corpus.audit_fraction", self.config.score_corpus.audit_fraction
        if (self.run.scores / MANIFEST).exists():
            return
        if not (self.run.corpus / MANIFEST).exists():
            unknown = f"whether that is {LEAST_AUDITED} blocks or more: {self.run.corpus} is not packed yet"
            self.findings.leave(key, fraction, unknown)
            return
        with self.findings.caught(key, fraction):
            require_audit(fraction, read_manifest(self.run.corpus).rows["blocks"])

    def _score_corpus(self) -> dict[str, Check]:
        checks = self._proxy()
        for name, folder in self.config.score_corpus.queries.items():
            key = f"score_corpus.queries.{name}"
            checks[key] = partial(self._folder, key, folder, MANIFEST)
        if self.config.score_corpus.uses_student:
            checks["score_corpus.audit_fraction"] = self._audit
        return checks

    def _folder(self, key: str, value: str, file: str | None = None) -> None:
        """A folder that another run or program made, with a file in it."""
        with self.findings.caught(key, value):
            place = location(value)
            if not place.is_dir():
                self.findings.fault(key, value, "no such folder; check the path")
            elif file is not None and not (place / file).exists():
                self.findings.fault(key, value, f"the folder has no {file}; name the query/ folder of a finished run")

    def _build_mask(self) -> dict[str, Check]:
        return {
            "build_mask.behaviour": self.selection.behaviour,
            "build_query.nulls": self.selection.nulls,
            "build_mask.others": self.selection.others,
            "build_mask": self.selection.measure,
        }

    def _evaluate(self) -> dict[str, Check]:
        options = self.config.evaluate
        checks = self._evaluated_prompts() | self._classifiers(options)
        checks["evaluate.classifiers"] = partial(self.models.classes_apart, options)
        room = self.config.target, options.max_new_tokens
        checks["evaluate.max_new_tokens"] = partial(self.models.room, "evaluate.max_new_tokens", *room)
        for key, source in options.texts.items():
            checks[key] = partial(self.tables.documents, key, source)
            if source is not options.cloze:
                checks[f"{key} apart"] = partial(self.tables.apart_from, key, source, self.config.pack_corpus.inputs)
        if options.lm_eval:
            checks["evaluate.lm_eval"] = partial(self.models.benchmarks, "evaluate.lm_eval", options.lm_eval)
        for name, model in options.models.items():
            checks[f"evaluate.models.{name}"] = self._model(f"evaluate.models.{name}", model)
        checks["evaluate.models"] = self._further_models
        return checks

    def _evaluated_prompts(self) -> dict[str, Check]:
        options = self.config.evaluate
        checks = self._prompts("evaluate.prompts", options.prompts)
        for name, prompts in options.prompt_sets.items():
            key = f"evaluate.prompt_sets.{name}"
            checks[key] = partial(self.tables.prompt_set, key, prompts)
        if options.balanced:
            checks["evaluate.balanced"] = partial(self.tables.balanced, options, self.config.seed)
        return checks

    def _further_models(self) -> None:
        """That further models are not called as those that this run has, or trains."""
        given, config = self.config.evaluate.models, self.config
        trained = (PENALISED, *([BASELINE] if config.baseline else [])) if self.trains else ()
        for name, folder in self.run.models.items():
            if name in given:
                key = f"evaluate.models.{name}"
                with self.findings.caught(key, given[name]):
                    if name in trained or (folder / MANIFEST).exists():
                        self.findings.fault(key, given[name], "this run has a model of that name; choose another")

    def _classifiers(self, options: Evaluate, *, of_new_text: bool = True) -> dict[str, Check]:
        named = {"evaluate.classifier": options.classifier}
        named |= {f"evaluate.classifiers.{name}": source for name, source in options.classifiers.items()}
        return {
            key: partial(self.models.classifier, key, source, of_new_text=of_new_text) for key, source in named.items()
        }

    def _check_classifier(self) -> dict[str, Check]:
        options = self.config.evaluate
        checks = self._classifiers(options, of_new_text=False)
        if not options.check_data:
            checks["evaluate.check_data"] = self._missing("evaluate.check_data", "files of texts with labels")
        for index, texts in enumerate(options.check_data):
            key = f"evaluate.check_data[{index}]"
            checks[key] = partial(self.tables.labelled, key, texts)
        return checks

    def _compare(self) -> dict[str, Check]:
        compare = self.config.compare
        checks: dict[str, Check] = {"baseline": self._plain_model}
        if not compare.methods:
            checks["compare.methods"] = self._missing("compare.methods", "some, as in configs/demo.yaml")
        if compare.classifier is not None:
            checks["compare.classifier"] = partial(
                self.models.classifier, "compare.classifier", compare.classifier, of_new_text=True
            )
        if compare.reward.source is not None:
            checks["compare.reward.source"] = self._model("compare.reward.source", compare.reward.source)
        for name, method in compare.methods.items():
            checks[f"compare.methods.{name}"] = partial(self._method, name)
            if method.dpo:
                key = f"compare.methods.{name}.dpo"
                checks[key] = partial(require_package, self.findings, key, method.dpo.model, "trl")
        if self.config.build_query.prompts and any(method.mask is None for method in compare.methods.values()):
            checks |= self._evaluated_prompts() | self._prompts("build_query.prompts", self.config.build_query.prompts)
            checks["compare.samples"] = partial(self.tables.learnt_from, self.config)
        return checks

    def _plain_model(self) -> None:
        with self.findings.caught("baseline", self.config.baseline):
            self.run.require_plain_model()

    def _method(self, name: str) -> None:
        with self.findings.caught(f"compare.methods.{name}", self.config.compare.methods[name].describe()):
            check_method(self.config, name, self._absent)

    @cached_property
    def _absent(self) -> frozenset[str]:
        """What the run lacks by an import: read from its folders once, for all methods."""
        return self.run.absent

    def _analyse(self) -> dict[str, Check]:
        options, evaluated = self.config.analyse, self.config.evaluate
        checks: dict[str, Check] = {}
        for index, texts in enumerate(options.texts):
            key = f"analyse.texts[{index}]"
            checks[key] = partial(self.tables.labelled, key, texts)
        if "lens" in options.methods:
            checks |= self._prompts("evaluate.prompts", evaluated.prompts)
        if "gcg" in options.methods:
            checks |= self._classifiers(evaluated)
        return checks

    def _prompts(self, key: str, prompts: Any, others: str = "") -> dict[str, Check]:
        if prompts is None:
            return {key: self._missing(key, f"a JSONL or Parquet file of prompts{others}")}
        return {key: partial(self.tables.prompts, key, prompts)}

    def _missing(self, key: str, what: str) -> Check:
        return partial(self.findings.fault, key, None, f"name {what}")

    def _resources(self, verb: str) -> dict[str, Check]:
        """That there are resources for it; what is finished needs none."""
        section = getattr(self.config, verb, None)
        if section is None or not hasattr(section, "resources") or (self.run.made_by(verb) / MANIFEST).exists():
            return {}
        key = f"{verb}.resources"
        if verb == "pretrain" and section.engine == "torch":
            return {key: partial(self._in_driver, f"{key}.gpus", section.resources.gpus)}
        count = section.fewest_workers if verb == "pretrain" else 1
        return {key: partial(self._fits, key, section.resources, count)}

    def _fits(self, key: str, resources: WorkerResources, count: int) -> None:
        """That this machine is large enough, if Ray will run on it alone; a cluster says it when it is joined."""
        cluster = self.config.cluster
        if cluster.address or os.environ.get("RAY_ADDRESS"):
            address = cluster.address or os.environ["RAY_ADDRESS"]
            self.findings.leave("cluster.address", address, "each stage asks for its resources when it begins")
            return
        cpus, gpus = cluster.num_cpus or os.cpu_count() or 1, _gpus() if resources.gpus else 0
        for name, wanted, there in (
            ("cpus", resources.cpus, cpus),
            ("gpus", resources.gpus, gpus),
            ("memory", resources.memory or 0, _memory()),
        ):
            if wanted * count > there + 1e-6:
                processes = f"{count} process{'es' * (count > 1)} of {wanted:,.12g}"
                self._too_few(
                    f"{key}.{name}",
                    wanted,
                    f"{processes} asked for, this machine has {there:,}; lower it, or join a cluster",
                )

    def _in_driver(self, key: str, gpus: float) -> None:
        """That this machine has the GPU of a training in this process, which no cluster gives one."""
        there = _gpus() if gpus else 0
        if gpus > there:
            self._too_few(
                key,
                gpus,
                f"engine: torch trains in this process, and this machine has {there}; lower it, or set pretrain.engine:"
                " deepspeed",
            )

    def _too_few(self, key: str, value: float, what: str) -> None:
        """What this machine lacks: a fault, unless the run may be on another one."""
        say = self.findings.leave if self.elsewhere else self.findings.fault
        say(key, value, what)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _memory() -> int:
    """Bytes of this machine; Ray gives its processes less."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
