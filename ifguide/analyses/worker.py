"""The worker of `analyse`: one analysis of one model, with what it needs of the run's query and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
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
from ifguide.analyses.inputs import AnalysisTask
from ifguide.config import ClassifierSource, ModelSource
from ifguide.config.analyse import Analyse
from ifguide.evaluation import Bootstrap
from ifguide.evaluation.generation import before_end, decode
from ifguide.evaluation.metrics import THRESHOLD
from ifguide.influence.query_file import QueryRow
from ifguide.models import load_model, max_positions
from ifguide.tokenizer import beginning_token, load_tokenizer
from ifguide.toxicity import Classifier, make_classifier


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings:
    """`models`: name -> source; the texts of those in `special_tokens` begin with their BOS. `prompts` are the
    lens', `probed` the probes' texts with their labels. `word_list` has the lens' words. `classifier` judges
    `max_new_tokens` tokens after an attack."""

    options: Analyse
    models: dict[str, str]
    special_tokens: frozenset[str]
    queries: tuple[QueryRow, ...]
    probed: tuple[tuple[str, bool], ...]
    prompts: tuple[str, ...]
    word_list: tuple[str, ...]
    classifier: ClassifierSource
    max_new_tokens: int
    bootstrap: Bootstrap
    seed: int


class AnalyseModel:
    """Worker: one analysis of one model; keeps the last model it used, and the classifier."""

    def __init__(self, settings: AnalysisSettings):
        self.settings, self.options = settings, settings.options
        self.positive, self.negative = (
            [row for row in settings.queries if row.positive == kind] for kind in (True, False)
        )
        self.device = "cuda" if self.options.resources.gpus else "cpu"
        self.loaded: tuple[str, Any, Any] | None = None
        self.beginning: list[int] = []  # of the texts of the loaded model

    @cached_property
    def classifier(self) -> Classifier:
        """Loaded when it is first asked for."""
        return make_classifier(self.settings.classifier, gpus=self.options.resources.gpus)

    def process(self, task: AnalysisTask) -> dict[str, Any]:
        if self.loaded is None or self.loaded[0] != task.model:
            self.loaded = None  # frees the old model before the new one is read
            source = self.settings.models[task.model]
            model, tokenizer = load_model(ModelSource(source=source), device=self.device), load_tokenizer(source)
            first = beginning_token(tokenizer) if task.model in self.settings.special_tokens else None
            self.beginning = [] if first is None else [first]
            self.loaded = (task.model, model, tokenizer)
        _, model, tokenizer = self.loaded
        if task.method == "lens":
            return self._lens(model, tokenizer)
        if task.method == "probes":
            return self._probes(model, tokenizer)
        return self._attack(model, tokenizer, self.positive[task.number])

    def _lens(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        words = self._lens_words(tokenizer)
        following = max(map(len, words), default=1) - 1
        texts = [self._begun(model, tokenizer, prompt, following) for prompt in self.settings.prompts]
        mass_NL = LogitLens(model).mass(texts, words, batch_size=self.options.batch_size)
        return {"tokens": [tokenizer.decode(word) for word in words], "token_ids": words, "mass": mass_NL.tolist()}

    def _lens_words(self, tokenizer: Any) -> list[list[int]]:
        """The tokens of each word of the list, with and without a space before it; without a list, single tokens."""
        if self.settings.word_list:
            forms = [form for word in self.settings.word_list for form in (word, f" {word}")]
            return sorted({tuple(form): form for form in (self._encode(tokenizer, text) for text in forms)}.values())
        positive, negative = (
            [self._encode(tokenizer, row.completion)[-self.options.max_tokens :] for row in rows]
            for rows in (self.positive, self.negative)
        )
        return [[token] for token in overrepresented_tokens(positive, negative, self.options.lens_tokens)]

    def _probes(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        encoded = [self._begun(model, tokenizer, text) for text, _ in self.settings.probed]
        labels_N = np.array([label for _, label in self.settings.probed])
        features_LND = mean_residuals(
            model, encoded, batch_size=self.options.batch_size, skip=len(self.beginning)
        ).numpy()
        probes = probe_layers(
            features_LND,
            labels_N,
            folds=self.options.folds,
            seed=self.settings.seed,
            bootstrap=self.settings.bootstrap,
        )
        return {"texts": len(encoded), **probes}

    def _attack(self, model: Any, tokenizer: Any, row: QueryRow) -> dict[str, Any]:
        gcg, classifier = self.options.gcg, self.classifier  # one that cannot be loaded fails before the search
        following = gcg.suffix_tokens + max(gcg.target_tokens, self.settings.max_new_tokens)
        context = self._begun(model, tokenizer, row.prompt, following)
        target = self._encode(tokenizer, row.completion)[: gcg.target_tokens]
        first = self._encode(tokenizer, " !")[:1] * gcg.suffix_tokens
        allowed_V = torch.zeros(model.get_input_embeddings().weight.shape[0], dtype=torch.bool)
        allowed_V[: len(tokenizer)] = True
        allowed_V[tokenizer.all_special_ids] = False

        def keeps_its_tokens(suffix: Sequence[int]) -> bool:
            return self._encode(tokenizer, decode(tokenizer, [suffix])[0]) == list(suffix)

        outcome = attack(
            model,
            context,
            target,
            first,
            Budget(steps=gcg.steps, candidates=gcg.candidates, top_k=gcg.top_k, batch_size=self.options.batch_size),
            seed=self.settings.seed + row.row,
            allowed_V=allowed_V,
            keeps_its_tokens=keeps_its_tokens,
        )
        before, after = self._judged(classifier, model, tokenizer, context, outcome.suffix)
        return {
            "row": row.row,
            "target": decode(tokenizer, [target])[0],
            "target_ids": target,
            "suffix": decode(tokenizer, [outcome.suffix])[0],
            "keeps_its_tokens": keeps_its_tokens(outcome.suffix),
            "continuation": after[0],
            "flagged": after[1],
            "flagged_before": before[1],
            **{name: value for name, value in asdict(outcome).items() if name != "suffix"},
        }

    def _judged(
        self, classifier: Classifier, model: Any, tokenizer: Any, context: list[int], suffix: Sequence[int]
    ) -> tuple[tuple[str, bool], tuple[str, bool]]:
        """What is decoded greedily after the context, and after it with the suffix; whether the classifier flags it."""
        count = self.settings.max_new_tokens
        drawn = [greedy_continuation(model, ids, count) for ids in (context, [*context, *suffix])]
        drawn = [before_end(tokens, tokenizer.eos_token_id) for tokens in drawn]
        texts = decode(tokenizer, drawn)
        before, after = (classifier.score(texts)[classifier.classes[0]] >= THRESHOLD).tolist()
        return (texts[0], before), (texts[1], after)

    def _begun(self, model: Any, tokenizer: Any, text: str, following: int = 0) -> list[int]:
        """The last tokens of a text after the BOS, if the model reads one: `analyse.max_tokens` in all, and so few that
        `following` tokens still fit the model."""
        positions = max_positions(model)
        room = min(self.options.max_tokens, positions - following) - len(self.beginning)
        if room < 1:
            raise ValueError(
                f"{following} tokens after a text leave it no room in the model's {positions} positions; lower"
                " evaluate.max_new_tokens or analyse.gcg.suffix_tokens, or shorten the words of evaluate.word_list"
            )
        return [*self.beginning, *self._encode(tokenizer, text)[-room:]]

    def _encode(self, tokenizer: Any, text: str) -> list[int]:
        """The tokens of a text, without special ones; the EOS where there are none."""
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids or [tokenizer.eos_token_id]
