"""The worker of `analyse` in this process: what each analysis reads of a text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from ifguide.analyses import worker
from ifguide.analyses.inputs import AnalysisTask
from ifguide.config import ClassifierSource, ModelSource
from ifguide.config.analyse import Analyse, Gcg
from ifguide.config.resources import Resources
from ifguide.evaluation import Bootstrap
from ifguide.influence.query_file import QueryRow
from ifguide.models import load_model
from ifguide.tokenizer import load_tokenizer
from tests.tiny import GPT2
from tests.tokenizers import byte_level

POSITIONS, BOS = 64, 256
GCG = Gcg(targets=1, target_tokens=2, suffix_tokens=3, steps=1, candidates=4, top_k=4)
LONG = "you are a kind river " * 8


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of few positions whose tokenizer puts a BOS before a text."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), byte_level()
    tokenizer.bos_token = "</s>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", BOS)])
    tokenizer.save_pretrained(folder)
    load_model(ModelSource(architecture={**GPT2, "vocab_size": BOS + 1})).save_pretrained(folder)
    (folder / "words.txt").write_text("pig\n")
    return str(folder)


def worker_of(source: str, **changes: Any) -> worker.AnalyseModel:
    settings: dict[str, Any] = {
        "options": Analyse(max_tokens=100, folds=2, gcg=GCG, resources=Resources(gpus=0)),
        "models": {"model": source},
        "special_tokens": frozenset(),
        "queries": (QueryRow(row=0, positive=True, score=1.0, prompt=LONG, completion="xyz " * 40),),
        "probed": tuple((text, i % 2 == 0) for i, text in enumerate([LONG, "a", "b c", "d", "e f", "g", "h", "i"])),
        "prompts": (LONG, "a"),
        "word_list": ("pig",),
        "classifier": ClassifierSource(name=f"words:{source}/words.txt"),
        "max_new_tokens": 4,
        "bootstrap": Bootstrap(samples=10),
        "seed": 0,
    }
    return worker.AnalyseModel(worker.AnalysisSettings(**{**settings, **changes}))


def task(method: str) -> AnalysisTask:
    return AnalysisTask(key="key", model="model", method=method, number=0)


def analysed(source: str, method: str, **changes: Any) -> dict[str, Any]:
    return worker_of(source, **changes).process(task(method))


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the analyses are given, by method."""
    given: dict[str, Any] = {}

    def mass(self: Any, texts: Any, words: Any, **_: Any) -> np.ndarray:
        given["lens"] = [*texts, *words]
        return np.zeros((len(texts), 1))

    mean_residuals = worker.mean_residuals

    def recorded(model: Any, texts: Any, **options: Any) -> Any:
        given["probes"], given["skip"] = texts, options["skip"]
        return mean_residuals(model, texts, **options)

    attack = worker.attack

    def attacked(model: Any, context: Any, target: Any, first: Any, *arguments: Any, **options: Any) -> Any:
        given["gcg"], given["first"] = context, first
        return attack(model, context, target, first, *arguments, **options)

    monkeypatch.setattr(worker.LogitLens, "mass", mass)
    monkeypatch.setattr(worker, "mean_residuals", recorded)
    monkeypatch.setattr(worker, "attack", attacked)
    return given


def test_texts_are_cut_to_the_positions_of_the_model(source: str, texts: dict[str, Any]) -> None:
    for method in ("lens", "probes", "gcg"):
        analysed(source, method)
    ids = byte_level()(LONG)["input_ids"]
    assert texts["lens"][0] == ids[-(POSITIONS - len(" pig") + 1) :]
    assert texts["probes"][0] == ids[-POSITIONS:]
    assert texts["gcg"] == ids[-(POSITIONS - GCG.suffix_tokens - 4) :]


def test_the_target_is_the_first_tokens_of_the_completion(source: str) -> None:
    assert analysed(source, "gcg")["target"] == "xy"


def test_a_model_without_room_for_a_text_is_named(source: str) -> None:
    with pytest.raises(ValueError, match=r"67 tokens after a text .* 64 positions; lower evaluate\.max_new"):
        analysed(source, "gcg", max_new_tokens=POSITIONS)


def test_texts_of_a_model_trained_with_a_bos_begin_with_it(source: str, texts: dict[str, Any]) -> None:
    for method in ("lens", "probes", "gcg"):
        analysed(source, method, special_tokens=frozenset(["model"]))
    prompts, words = texts["lens"][:2], texts["lens"][2:]
    assert [ids[0] for ids in (*prompts, *texts["probes"], texts["gcg"])] == [BOS] * 11
    assert len(texts["probes"][0]) == POSITIONS
    assert texts["skip"] == 1  # the BOS is not in the mean
    assert not any(BOS in ids for ids in (*words, texts["first"]))


def test_what_is_decoded_after_the_end_of_a_text_is_not_judged(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(source)
    end = tokenizer.eos_token_id
    assert end is not None
    drawn = [*tokenizer("a river", add_special_tokens=False)["input_ids"], end]
    drawn += tokenizer(" pig", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(worker, "greedy_continuation", lambda model, ids, count: drawn)
    result = analysed(source, "gcg")
    assert result["continuation"] == "a river"
    assert not result["flagged"]
    assert not result["flagged_before"]


def test_the_classifier_is_loaded_once_and_before_the_first_attack(
    source: str, texts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = ClassifierSource(name=f"words:{source}/lost.txt")
    with pytest.raises(FileNotFoundError, match=r"lost\.txt"):
        analysed(source, "gcg", classifier=lost)
    assert "gcg" not in texts
    assert analysed(source, "lens", classifier=lost)  # which reads none
    loaded: list[Any] = []
    make_classifier = worker.make_classifier

    def counted(*arguments: Any, **options: Any) -> Any:
        loaded.append(make_classifier(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr(worker, "make_classifier", counted)
    actor = worker_of(source)
    assert actor.process(task("gcg")) == actor.process(task("gcg"))
    assert len(loaded) == 1
