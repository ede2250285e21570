"""What the methods of `compare` need of the rest of a run's config."""

from __future__ import annotations

from collections.abc import Collection

from ifguide.config.compare import ANNOTATED, CLASSIFIED, INFLUENCE, ON_QUERIES, WORDS, Method
from ifguide.config.sections import OWN, Config
from ifguide.config.sources import ClassifierSource
from ifguide.config.typed_yaml import ConfigError
from ifguide.folders import ENSEMBLE, FACTORS, QUERY, SCORES

MAKERS = {FACTORS: "fit_factors", QUERY: "build_query", SCORES: "score_corpus"}  # what masks are made of -> its verb
SMOOTHED = "smoothed scores"


def classifier_of(config: Config) -> ClassifierSource:
    """That of the compared methods."""
    return config.compare.classifier or config.evaluate.classifier


def check_method(config: Config, name: str, absent: Collection[str] = ()) -> None:
    """Refuse a method that a run of this config cannot have. `absent`: what it lacks by an import, as `Run` tells it.

    Raises:
        ConfigError: names the key, and what to set.
    """
    key, method = f"compare.methods.{name}", config.compare.methods[name]
    if method.mask is None:
        needs = _preference_needs(config)
    else:
        key, needs = f"{key}.mask", _mask_needs(config, method, absent)
    if needs is not None:
        raise ConfigError(f"{key}: {method.mask or method.describe()} {needs}")


def _preference_needs(config: Config) -> str | None:
    if config.build_query.prompts is None:
        return "learns from continuations of other prompts; set build_query.prompts"
    if classifier_of(config).name == "labels":
        return "needs a classifier that scores text; set compare.classifier"
    return None


def _mask_needs(config: Config, method: Method, absent: Collection[str]) -> str | None:
    kind, scoring, selecting = method.mask, config.score_corpus, config.build_mask
    if kind in WORDS and not config.evaluate.word_list:
        return "needs words; list them in evaluate.word_list"
    if kind in CLASSIFIED and classifier_of(config).name == "labels":
        return "needs a classifier that scores text; set compare.classifier"
    if kind in WORDS + CLASSIFIED and any(source.tokens_column for source in config.pack_corpus.inputs):
        return "reads texts, and pack_corpus.inputs are of token ids; pack texts, or choose another mask"
    if kind in (*ANNOTATED, "span_probe") and not any(texts.spans_column for texts in config.pack_corpus.inputs):
        return "needs spans that came with the documents; set pack_corpus.inputs[i].spans_column"
    if kind in ON_QUERIES and not config.build_query.differential:
        return "needs queries of both sets; set build_query.differential"
    if kind in (*ON_QUERIES, "plain_influence") and selecting.behaviour != OWN:
        return (
            f"learns from the run's own query, and build_mask.behaviour is {selecting.behaviour!r}; compare in a run"
            " whose own query is of that behaviour"
        )
    if kind in ("exact", "smoothed", "plain_influence") and scoring.uses_student:
        return f"needs exact scores of every block, and score_corpus.scorer is {scoring.scorer!r}; take `exact`"
    if kind == "smoothed" and SMOOTHED in absent:
        return "needs smoothed scores, and those that are there are exact ones; choose another mask"
    if kind == "smoothed" and scoring.smooth is None:
        return "needs smoothed scores; set score_corpus.smooth"
    if _ranks_scores(method) and (selecting.standardise or selecting.fdr is not None):
        return "goes by scores, and the run's own mask by z-scores; unset build_mask.standardise and build_mask.fdr"
    for missing in _made_of(config, method):
        if missing in absent:
            make = f"make it by `ifguide {MAKERS[missing]}`, or " if missing in MAKERS else ""
            return f"needs {missing}/, which a run leaves out after an import; {make}choose another mask"
    return None


def _made_of(config: Config, method: Method) -> tuple[str, ...]:
    """The folders of the run that a mask is made of, beside its corpus, its models and its own mask."""
    kind = method.mask
    if kind in ON_QUERIES:
        return (QUERY,)
    if kind == "plain_influence":
        return (FACTORS,) if config.build_query.factors is None else ()
    if method.keeps_mask or kind not in (*INFLUENCE, "influence_words"):
        return ()
    return (SCORES, ENSEMBLE) if _ranks_scores(method) and config.build_mask.others else (SCORES,)


def _ranks_scores(method: Method) -> bool:
    """Whether it ranks tokens or words by the scores that the run's own mask goes by."""
    return method.mask == "influence_words" or (method.mask == "influence" and method.selection == "tokens")
