"""`analyse`: logit lens, linear probes and adversarial suffixes of the models that `evaluate` compares.

`analyses/analyses.json` holds

    {"models": {model: {"lens": {"tokens": [...], "layers": [F by depth]},
                        "probes": {"texts": n, "layers": [{"accuracy": F, "auroc": F} by depth]},
                        "gcg": {"exact": F, "flagged": F, "flagged_before": F, "loss": F, "first_loss": F,
                                "attacks": [one mapping a target]}}},
     "paired": {model: {"against": first model, "lens": D at the last depth, "gcg/<figure>": D}}}

with F a value and its interval of a bootstrap over prompts, texts or targets, D the difference to the first model
(`evaluation.bootstrap`): null where the tokens that the figure is of are not the first model's, as in models of two
tokenizers. Beside it `analyses.md` and a PNG for each analysis. Each model's lens and probes, and each attack, is a
piece of work of its own; running again resumes.

An attack succeeds as `exact` when greedy decoding after the prompt and the suffix gives the target token by token, as
`flagged` when `evaluate.classifier` calls the text greedily decoded after them (`evaluate.max_new_tokens`) toxic;
`flagged_before` is that of the prompt without a suffix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from ifguide.analyses import (
    Budget,
    LogitLens,
    attack,
    greedy_continuation,
    mean_residuals,
    overrepresented_tokens,
    probe_layers,
)
from ifguide.analyses.summary import as_markdown, draw_gcg, draw_lens, draw_probes
from ifguide.artifacts import Manifest, publish, require, verified, write_json, write_text
from ifguide.config import Config, ConfigError, ModelSource, config_from_mapping, to_mapping
from ifguide.distributed.session import connect, require_resources
from ifguide.distributed.shards import LEDGER, Pool, run_shards
from ifguide.evaluation import Bootstrap, Replicates
from ifguide.evaluation.agreement import labelled_texts
from ifguide.evaluation.figures import THRESHOLD
from ifguide.evaluation.generation import decode
from ifguide.evaluation.prompts import chosen_prompts
from ifguide.influence.query_file import QUERIES, QueryRow, read_queries
from ifguide.models import load_model
from ifguide.run import Run
from ifguide.stages.evaluate import models_to_evaluate
from ifguide.telemetry import log
from ifguide.tokenizer import load_tokenizer
from ifguide.toxicity import make_classifier

VERB = "analyse"
DRAW = {"lens": draw_lens, "probes": draw_probes, "gcg": draw_gcg}
GCG_FIGURES = ("exact", "flagged", "flagged_before", "loss", "first_loss")
BY_TOKENS = ("lens", "gcg/exact", "gcg/loss", "gcg/first_loss")  # of two models with the same tokens alone


def analyse(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `analyses/`, of a run that has its query and a model.

    Raises:
        ConfigError: no prompts, a classifier that cannot score text, or too few texts of a kind. FileNotFoundError: no
            model, or no query. StageError: a piece failed, with its reason: a model without a last norm.
    """
    config = run.config.analyse
    _check(run.config)
    if dry_run:
        log(VERB, f"would make {', '.join(config.methods)} of the models that evaluate compares")
        return None
    models = models_to_evaluate(run)
    query = require(run.query, "build_query")
    verified(run.query, QUERIES)
    rows = read_queries(run.query)
    _check_queries(run.config, rows)
    probed = probe_texts(run.config, rows) if "probes" in config.methods else []
    inputs = {f"model/{name}": fingerprint for name, (_, fingerprint) in models.items()}
    inputs["query"] = query.fingerprint
    artifact = run.open(run.analyses, VERB, keys=("analyse", "evaluate", "seed"), inputs=inputs)
    if artifact.manifest:
        log(VERB, f"complete: {run.analyses / 'analyses.md'}")
        return artifact.manifest
    connect(run.config.cluster)
    require_resources(run.config.cluster, VERB, config.resources)
    results = run_shards(
        VERB,
        _descriptors(run.config, list(models), sum(row.positive for row in rows)),
        AnalyseModel,
        {
            "config": to_mapping(run.config),
            "models": {name: source for name, (source, _) in models.items()},
            "queries": rows,
            "probed": probed,
        },
        folder=run.analyses,
        pool=Pool(size=config.actors, resources=config.resources),
        unit="analyses",
    )
    content = collect(
        results, list(models), Bootstrap(samples=run.config.evaluate.bootstrap_samples, seed=run.config.seed)
    )
    write_json(run.analyses / "analyses.json", content)
    write_text(run.analyses / "analyses.md", as_markdown(content["models"]))
    names = [f"{method}.png" for method in config.methods]
    for method, name in zip(config.methods, names, strict=True):
        with publish(run.analyses / name) as part:
            DRAW[method](content["models"], part)
    manifest = artifact.finish(
        [run.analyses / name for name in ("analyses.json", "analyses.md", *names)],
        rows={"models": len(models), "pieces": len(results)},
        summary={},
        remove=(LEDGER,),
    )
    log(VERB, f"{len(models)} models; {run.analyses / 'analyses.md'}")
    return manifest


def _check(config: Config) -> None:
    if config.evaluate.prompts is None and "lens" in config.analyse.methods:
        raise ConfigError("evaluate.prompts: the lens reads prompts; name a file in RealToxicityPrompts' schema")
    if config.evaluate.classifier.name == "labels" and "gcg" in config.analyse.methods:
        raise ConfigError("evaluate.classifier: labels cannot score what an attack draws; choose another classifier")


def _check_queries(config: Config, queries: Sequence[QueryRow]) -> None:
    if "lens" not in config.analyse.methods or config.evaluate.word_list:
        return
    if all(row.positive for row in queries):
        raise ConfigError(
            "evaluate.word_list: it is empty, and the query has only positive completions, none to tell their tokens"
            " from; list words for the lens, or make the query with build_query.differential = true"
        )


def probe_texts(config: Config, queries: Sequence[QueryRow]) -> list[tuple[str, bool]]:
    """Texts of the probes with their labels, as many of one kind as of the other, drawn by seed.

    Raises:
        ConfigError: fewer of a kind than folds.
    """
    options = config.analyse
    if options.texts:
        labelled = [(row.text, row.label) for row in labelled_texts(options.texts, "analyse.texts") if row.text]
    else:
        labelled = [(row.completion, row.positive) for row in queries]
    positive, negative = ([text for text in labelled if text[1] == kind] for kind in (True, False))
    count = min(len(positive), len(negative), options.max_texts // 2)
    if count < options.folds:
        source = "they are" if options.texts else "none are named, and the query's completions are"
        remedy = "" if options.texts else ", make the query with build_query.differential = true"
        raise ConfigError(
            f"analyse.texts: {source} {len(positive)} positive and {len(negative)} negative, of which the probes take"
            f" {options.max_texts // 2} each at most (half of analyse.max_texts) and {options.folds} at least"
            f" (analyse.folds); name texts of both kinds{remedy}, or leave probes out of analyse.methods"
        )
    rng = np.random.default_rng(config.seed)
    return [each[i] for each in (positive, negative) for i in rng.permutation(len(each))[:count]]


def _descriptors(config: Config, models: Sequence[str], positive: int) -> list[dict[str, Any]]:
    """Model by model, so that an actor seldom changes its model; `number` is the attack's positive query."""
    options = config.analyse
    chosen = np.random.default_rng(config.seed).permutation(positive)[: options.gcg.targets].tolist()
    found: list[dict[str, Any]] = []
    for model in models:
        for method in options.methods:
            numbers = chosen if method == "gcg" else [0]
            found += [
                {"key": f"{method}-{i:04d}-{model}", "model": model, "method": method, "number": number}
                for i, number in enumerate(numbers)
            ]
    return found


class AnalyseModel:
    """Worker: one analysis of one model; keeps the last model it used."""

    def __init__(
        self,
        config: dict[str, Any],
        models: dict[str, str],
        queries: list[QueryRow],
        probed: list[tuple[str, bool]],
    ):
        self.config = config_from_mapping(config)
        self.options, self.models, self.probed = self.config.analyse, models, probed
        self.positive, self.negative = ([row for row in queries if row.positive == kind] for kind in (True, False))
        self.device = "cuda" if self.options.resources.gpus else "cpu"
        self.loaded: tuple[str, Any, Any] | None = None

    def process(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        name = descriptor["model"]
        if self.loaded is None or self.loaded[0] != name:
            self.loaded = None  # frees the old model before the new one is read
            source = self.models[name]
            self.loaded = (name, load_model(ModelSource(source=source), device=self.device), load_tokenizer(source))
        _, model, tokenizer = self.loaded
        if descriptor["method"] == "lens":
            return self._lens(model, tokenizer)
        if descriptor["method"] == "probes":
            return self._probes(model, tokenizer)
        return self._attack(model, tokenizer, self.positive[descriptor["number"]])

    def _lens(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        prompts = chosen_prompts(self.config)[: self.options.max_prompts]
        texts = [self._encode(tokenizer, row.prompt) for row in prompts]
        tokens = self._lens_tokens(tokenizer)
        mass_NL = LogitLens(model).mass(texts, tokens, batch_size=self.options.batch_size)
        words = [tokenizer.decode([token]) for token in tokens]
        return {"tokens": words, "token_ids": tokens, "mass": mass_NL.tolist()}

    def _lens_tokens(self, tokenizer: Any) -> list[int]:
        words = self.config.evaluate.word_list
        if words:
            forms = [form for word in words for form in (word, f" {word}")]
            return sorted({self._encode(tokenizer, form)[0] for form in forms})
        positive, negative = (
            [self._encode(tokenizer, row.completion) for row in rows] for rows in (self.positive, self.negative)
        )
        return overrepresented_tokens(positive, negative, self.options.lens_tokens)

    def _probes(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        encoded = [self._encode(tokenizer, text)[: self.options.max_tokens] for text, _ in self.probed]
        labels_N = np.array([label for _, label in self.probed])
        features_LND = mean_residuals(model, encoded, batch_size=self.options.batch_size).numpy()
        bootstrap = Bootstrap(samples=self.config.evaluate.bootstrap_samples, seed=self.config.seed)
        layers = probe_layers(
            features_LND, labels_N, folds=self.options.folds, seed=self.config.seed, bootstrap=bootstrap
        )
        return {"texts": len(self.probed), "layers": layers}

    def _attack(self, model: Any, tokenizer: Any, row: QueryRow) -> dict[str, Any]:
        options = self.options.gcg
        context = self._encode(tokenizer, row.prompt)
        target = self._encode(tokenizer, row.completion)[: options.target_tokens]
        first = self._encode(tokenizer, " !")[:1] * options.suffix_tokens
        allowed_V = torch.zeros(model.get_input_embeddings().weight.shape[0], dtype=torch.bool)
        allowed_V[: len(tokenizer)] = True
        allowed_V[tokenizer.all_special_ids] = False

        def keeps_its_tokens(suffix: Sequence[int]) -> bool:
            return self._encode(tokenizer, decode(tokenizer, [suffix])[0]) == list(suffix)

        found = attack(
            model,
            context,
            target,
            first,
            Budget(
                steps=options.steps,
                candidates=options.candidates,
                top_k=options.top_k,
                batch_size=self.options.batch_size,
            ),
            seed=self.config.seed + row.row,
            allowed_V=allowed_V,
            keeps_its_tokens=keeps_its_tokens,
        )
        count = self.config.evaluate.max_new_tokens
        drawn = [greedy_continuation(model, ids, count) for ids in (context, [*context, *found.suffix])]
        texts = decode(tokenizer, drawn)
        classifier = make_classifier(self.config.evaluate.classifier, gpus=self.options.resources.gpus)
        before, after = (classifier.score(texts)[classifier.classes[0]] >= THRESHOLD).tolist()
        return {
            "row": row.row,
            "target": decode(tokenizer, [target])[0],
            "target_ids": target,
            "suffix": decode(tokenizer, [found.suffix])[0],
            "keeps_its_tokens": keeps_its_tokens(found.suffix),
            "continuation": texts[1],
            "flagged": after,
            "flagged_before": before,
            **{name: value for name, value in asdict(found).items() if name != "suffix"},
        }

    def _encode(self, tokenizer: Any, text: str) -> list[int]:
        """The last tokens of a text, without special ones; the EOS where there are none."""
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids[-self.options.max_tokens :] or [tokenizer.eos_token_id]


def collect(results: Mapping[str, dict[str, Any]], models: Sequence[str], bootstrap: Bootstrap) -> dict[str, Any]:
    """The content of `analyses.json` from the pieces by key."""
    shown: dict[str, dict[str, Any]] = {}
    replicates: dict[str, dict[str, Replicates]] = {}
    tokens: dict[str, dict[str, Any]] = {}  # model -> analysis -> what its figures are of
    for model in models:
        by_key = {tuple(key.split("-", 2)): result for key, result in results.items()}  # a model's name may hold dashes
        own = {f"{method}-{i}": result for (method, i, name), result in by_key.items() if name == model}
        items: dict[str, np.ndarray] = {}
        found: dict[str, Any] = {}
        tokens[model] = {}
        attacks = [result for key, result in own.items() if key.startswith("gcg-")]
        if "lens-0000" in own:
            mass_NL = np.array(own["lens-0000"]["mass"])
            tokens[model]["lens"] = (own["lens-0000"]["tokens"], own["lens-0000"]["token_ids"])
            lens = {f"{depth}": mass_NL[:, depth] for depth in range(mass_NL.shape[1])}
            drawn = _replicates(lens, bootstrap)
            items["lens"] = mass_NL[:, -1]
            found["lens"] = {
                "tokens": own["lens-0000"]["tokens"],
                "layers": [bootstrap.figure(each).as_json() for each in drawn.values()],
            }
        if "probes-0000" in own:
            found["probes"] = own["probes-0000"]
        if attacks:
            outcomes = {name: np.array([float(each[name]) for each in attacks]) for name in GCG_FIGURES}
            drawn = _replicates(outcomes, bootstrap)
            items |= {f"gcg/{name}": values for name, values in outcomes.items()}
            found["gcg"] = {name: bootstrap.figure(each).as_json() for name, each in drawn.items()}
            found["gcg"]["attacks"] = attacks
            tokens[model]["gcg"] = [each["target_ids"] for each in attacks]
        shown[model] = found
        replicates[model] = {name: _replicates({name: values}, bootstrap)[name] for name, values in items.items()}
    first = models[0]

    def difference(model: str, name: str) -> dict[str, Any] | None:
        method = name.partition("/")[0]
        if name in BY_TOKENS and tokens[model][method] != tokens[first][method]:
            return None
        return bootstrap.difference(replicates[model][name], replicates[first][name])

    paired = {
        model: {"against": first, **{name: difference(model, name) for name in replicates[model]}}
        for model in models[1:]
    }
    return {"models": shown, "paired": paired}


def _replicates(items: Mapping[str, np.ndarray], bootstrap: Bootstrap) -> dict[str, Replicates]:
    return bootstrap.ratios({name: (values, np.ones(len(values))) for name, values in items.items()})
