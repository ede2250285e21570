"""The masks that `compare` sets beside the run's own, each an artifact in the run directory of its method.

Methods that mark text or draw tokens write a mask (`methods.masks`). Methods that score tokens write `scores/`, and
their mask is the tokens of highest score, as many as the run's own mask has, or the run's selection of those scores.
`influence_words` is scored by the run's scores, word by word.
`exact` and `smoothed` take the run's scores, without those of other runs (`build_mask.others`); `influence` takes what
the run does. `plain_influence` is the run's selection of other scores, as many.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ifguide.artifacts import MANIFEST, Manifest, data_files, made_from, require
from ifguide.config import OWN, BuildMask
from ifguide.config.compare import INFLUENCE, RANDOM, SCORED, SELECTING, Method
from ifguide.config.methods import classifier_of
from ifguide.distributed.session import connect, require_resources
from ifguide.distributed.shards import LEDGER
from ifguide.distributed.tasks import run_tasks
from ifguide.folders import BASELINE, ENSEMBLE, FACTORS, MODEL, SCORES
from ifguide.influence.proxy import Beginning
from ifguide.methods.masks import Marking, mark_corpus
from ifguide.methods.preferences import VERB
from ifguide.methods.token_scores import FINDER, WITHOUT_PROXY, WITHOUT_QUERY, Scoring, score_tokens
from ifguide.run import Run
from ifguide.schemas import smoothed_column
from ifguide.selection.algorithm import token_budget
from ifguide.selection.measures import measure_of
from ifguide.selection.top import ScoredCorpus, select_top
from ifguide.spans.tables import SPANS, PackedCorpus, write_spans
from ifguide.stages.build_mask import build_mask
from ifguide.stages.build_query import build_query
from ifguide.stages.proxy import read_proxy
from ifguide.stages.score_corpus import score_corpus
from ifguide.tokenizer import load_tokenizer
from ifguide.toxicity import classifier_inputs


def method_mask(run: Run, child: Run, method: Method) -> Manifest:
    """The mask of `method`, which is made in the run `child` unless it is the run's own.

    Raises:
        FileNotFoundError: an artifact of `run` is missing. StageError: a shard failed.
    """
    if method.mask == "plain_influence":
        return _plain_influence(run, child)
    if method.mask is None or method.keeps_mask:
        return require(run.mask, "build_mask")
    if method.mask in SCORED or method.mask in INFLUENCE:
        return scored_mask(run, child, method)
    return marked_mask(run, child, method.mask)


def _marking(run: Run, kind: str) -> Marking:
    config = run.config
    return Marking(
        kind=kind,
        words=config.evaluate.word_list,
        classifier=classifier_of(config),
        threshold=config.compare.threshold,
        tokenizer=run.tokenizer_source,
        seed=config.seed,
    )


def marked_mask(run: Run, child: Run, kind: str) -> Manifest:
    """Make the mask of a method that marks text or draws tokens in `child.mask`, for the corpus of `run`.

    Raises:
        FileNotFoundError: the corpus, or the mask that a random one is measured by, is missing. StageError: a shard
            failed.
    """
    manifest = require(run.corpus, "pack_corpus")
    marking, inputs = _marking(run, kind), {"corpus": manifest.fingerprint}
    if "classifier" in marking.result_options():
        inputs |= classifier_inputs({"compare.classifier": marking.classifier})
    if kind in RANDOM:
        inputs["mask"] = require(run.mask, "build_mask").fingerprint
    artifact = run.open(child.mask, VERB, keys=(), inputs=inputs, extra=marking.result_options())
    if artifact.manifest:
        return artifact.manifest
    connect(run.config.cluster)
    corpus = PackedCorpus.of(run.corpus, manifest)
    marked = mark_corpus(marking, corpus, child.mask, run.mask, verb=VERB, resources=run.config.compare.resources)
    files = data_files(child.mask) + data_files(child.mask, SPANS)
    return artifact.finish(files, rows=marked.rows, summary=marked.summary, digests=marked.files, remove=(LEDGER,))


def scored_mask(run: Run, child: Run, method: Method) -> Manifest:
    """Make the mask of a method by token scores in `child.mask`: as many tokens as the mask of `run` has, or a share.

    They are the tokens of highest score, ties by position, or are selected unit by unit as the run's own are; then
    there may be fewer, where fewer pass the quantile.

    Raises:
        FileNotFoundError: corpus or mask are missing, or the scores or what they are made of. StageError: a shard
            failed.
    """
    corpus, own = require(run.corpus, "pack_corpus"), require(run.mask, "build_mask")
    assert method.mask is not None
    selecting = run.config.build_mask
    if method.mask in INFLUENCE:
        child, scores = child.borrow(run, SCORES, ENSEMBLE), require(run.scores, "score_corpus")
        if INFLUENCE[method.mask] is not None:
            selecting = replace(selecting, smoothed=INFLUENCE[method.mask], others=())
    else:
        scores = method_scores(run, child, method.mask)
        selecting = replace(selecting, behaviour=OWN, smoothed=None, others=())
    if method.mask != "influence":  # only scores along V have nulls, and z-scores are the run's own choice
        selecting = replace(selecting, standardise=False, fdr=None)
    count = own.rows["tokens"]
    if method.selection == "units":
        changed = {name: getattr(method, name) for name in SELECTING if getattr(method, name) is not None}
        if method.quantile is not None:
            changed |= {"fdr": None, "standardise": selecting.standardise or selecting.fdr is not None}
        options = replace(selecting, **{"max_fraction": _share(own), **changed})
        mask = build_mask(replace(child, config=replace(child.config, build_mask=options)))
        assert mask is not None
        return mask
    inputs = {"corpus": corpus.fingerprint, "scores": scores.fingerprint, "mask": own.fingerprint}
    scored = _scored(child, corpus, selecting)
    extra: dict[str, Any] = {"mask": method.mask, "behaviour": selecting.behaviour, "column": scored.column}
    if method.max_fraction is not None:
        extra["max_fraction"] = method.max_fraction
        count = token_budget(method.max_fraction, own.summary["predicted_tokens"])
    artifact = run.open(child.mask, VERB, keys=(), inputs=inputs, extra=extra)
    if artifact.manifest:
        return artifact.manifest
    connect(run.config.cluster)
    require_resources(run.config.cluster, "build_mask", run.config.build_mask.resources)
    on_the_cluster = run_tasks(run.config.build_mask.resources)
    counts = select_top(scored, child.mask, count, on_the_cluster)
    shards = range(scored.corpus.num_shards)
    list(on_the_cluster(write_spans, ((scored.corpus, child.mask, shard) for shard in shards)))
    return artifact.finish(
        data_files(child.mask) + data_files(child.mask, SPANS),
        rows={"blocks": counts.blocks, "tokens": counts.masked},
        summary={
            "tokens_masked": counts.masked,
            "predicted_tokens": counts.predicted,
            "least_score": counts.least,
            "behaviour": selecting.behaviour,
            "smoothed": scored.column == smoothed_column(selecting.behaviour),
        },
    )


def _share(mask: Manifest) -> float:
    """The `max_fraction` of a mask of as many tokens."""
    # half a token more, so that the fraction comes to the count whatever its rounding
    return float(min((mask.rows["tokens"] + 0.5) / mask.summary["predicted_tokens"], 1.0))


def _scored(run: Run, corpus: Manifest, selecting: BuildMask) -> ScoredCorpus:
    """The scores that `selecting` ranks tokens by, where nulls play no part."""
    folder = run.ensemble if selecting.others else run.scores
    column = measure_of(replace(selecting, standardise=False, fdr=None), folder).column
    apart = run.config.pretrain.document_attention
    return ScoredCorpus(corpus=PackedCorpus.of(run.corpus, corpus), scores=folder, column=column, documents_apart=apart)


def method_scores(run: Run, child: Run, kind: str) -> Manifest:
    """Make the token scores of a method in `child.scores`, for the corpus of `run` and what the method learns from.

    Raises:
        FileNotFoundError: the corpus, or what the method learns from, is missing. MismatchError: the query is of other
            texts than this run's. StageError: a shard failed.
    """
    manifest = require(run.corpus, "pack_corpus")
    scoring, learnt = _scoring(run, manifest, kind)
    inputs = {"corpus": manifest.fingerprint, **learnt}
    made = made_from(child.scores)["inputs"]
    if kind in WITHOUT_QUERY and "query" in made:  # as artifacts of before name one: what the scores are of is the same
        inputs = {name: inputs.get(name, digest) for name, digest in made.items()}
    artifact = run.open(child.scores, VERB, keys=("tokenizer",), inputs=inputs, extra=scoring.result_options())
    if artifact.manifest:
        return artifact.manifest
    if kind not in WITHOUT_PROXY:
        run.require_proxy()
    connect(run.config.cluster)
    corpus = PackedCorpus.of(run.corpus, manifest)
    written = score_tokens(scoring, corpus, child.scores, verb=VERB, resources=run.config.compare.resources)
    return artifact.finish(
        [*data_files(child.scores), *written.further],
        rows=written.rows,
        summary=written.summary,
        digests=written.files,
        remove=(LEDGER, FINDER),
    )


def _scoring(run: Run, corpus: Manifest, kind: str) -> tuple[Scoring, dict[str, str]]:
    """How a method scores, and the fingerprints of what it learns from beside the corpus."""
    config, tokenizer = run.config, load_tokenizer(run.tokenizer_source)
    options: dict[str, Any] = {
        "ngrams": config.compare.ngrams,
        "probe": config.compare.probe,
        "span_probe": config.compare.probe,
        "excess_loss": config.compare.excess_loss,
        "influence_words": None,
    }
    scoring = Scoring(
        kind=kind,
        options=options[kind],
        queries=run.query,
        max_tokens=config.build_query.max_tokens,
        tokenizer=run.tokenizer_source,
        proxy=run.proxy_source,
        seed=config.seed,
    )
    if kind == "influence_words":
        scores = require(*((run.ensemble, "build_mask") if config.build_mask.others else (run.scores, "score_corpus")))
        return replace(scoring, scored=_scored(run, corpus, config.build_mask)), {"scores": scores.fingerprint}
    beginning = Beginning.of(
        tokenizer, is_trained=run.proxy_is_trained, of_documents=config.pretrain.document_attention
    )
    if kind in WITHOUT_QUERY and not (run.query / MANIFEST).exists():
        learnt = {"proxy": _fingerprint(run), **beginning.inputs()}
    else:
        query = require(run.query, "build_query")
        beginning.require_of(run.query, query.inputs)
        learnt = {"proxy": query.inputs["proxy"]}
        learnt |= beginning.inputs() if kind in WITHOUT_QUERY else {"query": query.fingerprint}
    return replace(scoring, proxy_fingerprint=learnt["proxy"], beginning=beginning.token), learnt


def _fingerprint(run: Run) -> str:
    """Of the proxy of a run that has no query to tell it.

    Raises:
        ValueError: the proxy cannot read the corpus.
    """
    run.require_proxy()
    connect(run.config.cluster)
    return read_proxy(run, VERB)[0].fingerprint


def _plain_influence(run: Run, child: Run) -> Manifest:
    """The mask of the same selection from scores of the positive queries alone, with this run's factors and proxy.

    It has as many tokens as the mask of `run`. Where that is not of its whole budget, or by `fdr`, they are those above
    a quantile that lets so many pass."""
    own, config = require(run.mask, "build_mask"), child.config
    selecting = replace(config.build_mask, behaviour=OWN, others=())
    budget = token_budget(selecting.max_fraction, own.summary["predicted_tokens"])
    if own.rows["tokens"] != budget or selecting.fdr is not None:
        share, z_scores = _share(own), selecting.standardise or selecting.fdr is not None
        quantile = min(selecting.quantile, 1 - share)
        selecting = replace(selecting, max_fraction=share, quantile=quantile, standardise=z_scores, fdr=None)
    config = replace(
        config,
        build_query=replace(config.build_query, differential=False),
        score_corpus=replace(config.score_corpus, queries={}),
        build_mask=selecting,
    )
    plain = replace(child, config=config).borrow(run, f"{MODEL}/{BASELINE}", FACTORS)
    build_query(plain)
    score_corpus(plain)
    mask = build_mask(plain)
    assert mask is not None
    return mask
