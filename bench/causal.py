"""Do token scores say what training does? The demo's model, trained again without the tokens that scores speak of.

    python bench/causal.py [--run runs/demo] [--halves 40] [--seeds 5] [--scores target student ...]
                           [--stop-after-minutes M] [--quick]

The behaviour is measured as the differential gradient has it: D = mean loss of the positive queries' completions minus
that of the negative ones', each summed over its tokens, in nats. The less of the behaviour, the greater D.

It is taken twice: of the queries that the scores were made of, and of others, which no score has seen (`unseen`): the
run's evaluation prompts with their own continuations.

1. Linear datamodelling score (Park et al. 2023, TRAK, arXiv 2303.14186): trainings on random halves of the documents,
   and the rank correlation of -D with the sum of the scores of the tokens in the half. All halves have the same initial
   weights and the same order of blocks. Documents and not blocks: `target` and `position` have the same sum over a
   block, and differ in how they part it among the documents in it.
2. Trainings without (`ignore`) the share of all tokens that a score ranks highest. `qld` is the change of D from the
   training of the same seed without a mask: positive says less of the behaviour. Beside each the same of random tokens
   of the same types (`matched`), of such that the score leaves in (`others`, as far as there are any), and once of any
   random tokens. `matched_shared` and `others_shared` say how many are the score's own. A seed decides initial weights,
   order and random tokens.

Scores: `target` (the run's), `smoothed` (these drawn towards a regression on the proxy's hidden states, where the run
has them), `position`, `identity` (target without EK-FAC), `ngram` (log-odds of n-grams between the query sets), `probe`
(logistic regression on the proxy's hidden states with the query sets' labels) and `student` (a `head`, fitted on exact
scores of a tenth of the blocks). The proxy is the run's finished model. A retraining sees the corpus --epochs times in
batches of --batch-blocks: less than the proxy did, to be affordable.

Without --run the bench makes a run of its own, up to the scores, which it smooths. Running it again resumes: each
finished retraining is kept. --stop-after-minutes begins no retraining after that time, and prints what there is
(`complete` is false). Written to the folder: `causal.md`, `causal.json`. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.common.causal_figures import (
    MATCHED,
    OTHERS,
    PLAIN,
    RANDOM,
    UNSEEN,
    Scores,
    as_markdown,
    datamodelling,
    effects,
)
from bench.common.places import this_machine
from bench.common.retraining import Retraining, Subject, margins, one_thread_each, retrain_all
from bench.common.scores import METHOD
from bench.common.texts import read_rows
from bench.common.token_sets import document_halves, token_count, top_tokens
from ifguide.artifacts import publish, require, write_json
from ifguide.config import load_config
from ifguide.demo.generate import SUMMARY, generate_demo
from ifguide.influence.proxy import Beginning, load_proxy
from ifguide.influence.query import differential_weights, mean_completion_gradient, tokenise_queries, tokenise_query
from ifguide.influence.query_file import QueryRow, read_direction, read_queries
from ifguide.methods.ngrams import fit_ngrams
from ifguide.methods.probes import fit_query_probe
from ifguide.methods.random_masks import random_of_types, random_tokens
from ifguide.methods.reading import QuerySets
from ifguide.pipeline import run_pipeline
from ifguide.run import BASELINE, Run
from ifguide.schemas import OWN_SCORES, SMOOTHED_SCORES
from ifguide.spans.tables import PackedCorpus, read_documents
from ifguide.stages.fit_student import fit_student
from ifguide.stages.score_corpus import score_corpus
from ifguide.telemetry import configure_logging, log
from ifguide.texts import score_tokens
from ifguide.tokenizer import load_tokenizer
from ifguide.training.blocks import TrainingBlocks, flatten_blocks
from ifguide.training.settings import TrainingSettings

Bools = NDArray[np.bool_]
OTHER_SCORES = ("position", "probe", "ngram", "identity")  # those that take longest first
STUDENT, STUDENT_SAMPLE = "student", 0.1
QUICK = (  # of a run made here: the same at its smallest
    "target.architecture.hidden_size=32",
    "target.architecture.intermediate_size=64",
    "target.architecture.num_hidden_layers=2",
    "target.architecture.num_attention_heads=2",
    "pack_corpus.block_size=64",
    "pretrain.engine=torch",
    "pretrain.workers=1",
    "pretrain.epochs=1",
    "fit_factors.sample_blocks=40",
)
QUICK_DATA = {"documents": 140, "vocab_size": 512, "queries": 40, "prompts": 20, "cloze": 10}


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """The corpus by block: (N, T) each. `candidates_NT` have a prediction; `marked_NT` lie in the corpus' own spans."""

    tokens_NT: NDArray[np.int64]
    documents_NT: NDArray[np.int64]
    candidates_NT: Bools
    marked_NT: Bools | None


def main() -> None:
    options = _options()
    configure_logging()
    started = time.monotonic()
    run = finished_run(options)
    rows = read_queries(run.query)
    unseen = unseen_queries(run)
    subject, tokens = the_subject(run, [*rows, *unseen], options)
    scores = token_scores(run, rows, subject.blocks, options)
    kinds = {"seen": np.array([row.positive for row in rows]), UNSEEN: np.array([row.positive for row in unseen])}
    result = measure(subject, tokens, scores, kinds, options, started)
    write_json(options.folder / "causal.json", result)
    with publish(options.folder / "causal.md") as part:
        part.write_text(as_markdown(result), encoding="utf-8")
    print(as_markdown(result))
    print(json.dumps(result))


def finished_run(options: argparse.Namespace) -> Run:
    """The run that is measured, with proxy, factors, query and scores: the one that was named, or one made here."""
    if options.run:
        run = Run(config=load_config(options.run / "scores" / "config.yaml", [f"run_dir={options.run}"]))
        require(run.scores, "score_corpus")
        return run
    folder = options.folder / "run"
    overrides = [
        f"seed={options.seed}",
        f"run_dir={folder}",
        "score_corpus.smooth={}",
        *(QUICK if options.quick else ()),
    ]
    run = Run(config=load_config(options.config, overrides))
    if not (folder / "data" / SUMMARY).exists():
        generate_demo(folder / "data", seed=options.seed, **(QUICK_DATA if options.quick else {}))
    run_pipeline(run.config, dry_run=False, until="score_corpus")
    return run


def unseen_queries(run: Run) -> list[QueryRow]:
    """The run's evaluation prompts with their own continuations, of both kinds as `build_query` tells them apart."""
    query, evaluate = run.config.build_query, run.config.evaluate
    assert evaluate.prompts is not None, "a run of the demo has evaluate.prompts"
    found = []
    for number, row in enumerate(read_rows(Path(evaluate.prompts.path))):
        toxicity, texts = row["continuation"]["toxicity"], (row["prompt"]["text"], row["continuation"]["text"])
        positive = toxicity >= query.positive_threshold
        if positive or toxicity <= query.negative_threshold:
            found.append(QueryRow(row=number, positive=positive, score=toxicity, prompt=texts[0], completion=texts[1]))
    return found


def the_subject(run: Run, rows: Sequence[QueryRow], options: argparse.Namespace) -> tuple[Subject, Tokens]:
    """What the retrainings share, and the tokens that they can leave out."""
    config, packed = run.config, PackedCorpus.of(run.corpus, require(run.corpus, "pack_corpus"))
    flatten_blocks(run.corpus, None, options.folder / "blocks")
    blocks = TrainingBlocks(options.folder / "blocks")
    train = replace(
        config.pretrain,
        engine="torch",
        epochs=options.epochs,
        batch_blocks=options.batch_blocks,
        micro_batch_blocks=options.batch_blocks,
        objective=replace(config.pretrain.objective, kind="ignore"),
    )
    settings = TrainingSettings(
        name=BASELINE,
        folder=str(options.folder),
        corpus=str(run.corpus),
        mask=None,
        tokenizer=run.tokenizer_source,
        block_size=packed.block_size,
        target=config.target,
        train=train,
        seed=config.seed,
    )
    tokenizer, longest = load_tokenizer(run.tokenizer_source), config.build_query.max_tokens
    queries = [tokenise_query(tokenizer, row.prompt, row.completion, max_tokens=longest) for row in rows]
    shards = [read_documents(packed, shard) for shard in range(packed.num_shards)]
    starts = np.concatenate([shard.column("token_start").to_numpy() for shard in shards])
    documents = np.searchsorted(starts, np.arange(packed.num_tokens), side="right") - 1
    marked_NT = None
    if config.pack_corpus.inputs[0].spans_column:
        marked = packed.read(packed.folder, "shard", "annotated", 0, packed.num_tokens)
        marked_NT = by_block(marked, blocks, False).astype(bool)
    places_T = np.arange(packed.block_size)
    tokens = Tokens(
        tokens_NT=np.asarray(blocks.tokens, np.int64),
        documents_NT=by_block(documents, blocks, -1),
        candidates_NT=(places_T >= 1) & (places_T < blocks.lengths[:, None]),
        marked_NT=marked_NT,
    )
    return Subject(settings=settings, blocks=options.folder / "blocks", queries=queries), tokens


def by_block(values: NDArray[Any], blocks: TrainingBlocks, padding: Any) -> NDArray[Any]:
    """(n,) values of the stream as (N, T), filled up with `padding`."""
    missing = blocks.tokens.size - len(values)
    return np.pad(values, (0, missing), constant_values=padding).reshape(blocks.tokens.shape)


def token_scores(run: Run, rows: Sequence[QueryRow], blocks_folder: Path, options: argparse.Namespace) -> Scores:
    """Each wanted score of every token, (N, T) label aligned; those that the run has not are kept."""
    manifest, blocks = require(run.scores, "score_corpus"), TrainingBlocks(blocks_folder)
    if run.config.score_corpus.attribution != "target":
        raise ValueError(f"{run.scores}: attribution is {run.config.score_corpus.attribution}; give a run with target")
    columns = {"target": OWN_SCORES} | ({"smoothed": SMOOTHED_SCORES} if run.config.score_corpus.smooth else {})
    wanted = options.scores or (*columns, *OTHER_SCORES, STUDENT)
    scores: Scores = {name: finished_score(run, column, blocks) for name, column in columns.items() if name in wanted}
    folder = options.folder / "scores" / manifest.fingerprint[:16]
    paths = {name: folder / f"{name}.npy" for name in OTHER_SCORES if name in wanted}
    missing = [name for name in paths if not paths[name].exists()]
    if missing:
        log("causal", f"scoring by {', '.join(missing)}")
        with one_thread_each(options.workers) as pool:
            tasks = [pool.submit(score_into, name, run, rows, blocks_folder, paths[name]) for name in missing]
            for name, task in zip(missing, tasks, strict=True):
                task.result()
                log("causal", f"scored by {name}")
    scores |= {name: np.load(path) for name, path in paths.items()}
    if STUDENT in wanted:
        scores[STUDENT] = finished_score(scored_by_student(run, folder / STUDENT), OWN_SCORES, blocks)
    return scores


def finished_score(run: Run, column: str, blocks: TrainingBlocks) -> NDArray[np.float32]:
    """(N, T) one column of the scores of a run."""
    packed = PackedCorpus.of(run.corpus, require(run.corpus, "pack_corpus"))
    return by_block(packed.read(run.scores, "shard", column, 0, packed.num_tokens), blocks, 0.0)


def scored_by_student(run: Run, folder: Path) -> Run:
    """The run with scores of a student that was fitted on a part of the blocks."""
    config = replace(
        run.config,
        run_dir=str(folder),
        fit_student=replace(run.config.fit_student, sample_fraction=STUDENT_SAMPLE),
        score_corpus=replace(run.config.score_corpus, scorer="student", smooth=None, min_recall=0.0),
    )
    own = Run(config=config).borrow(run, "corpus", f"model/{BASELINE}", "factors", "query")
    fit_student(own)
    score_corpus(own)
    return own


def score_into(name: str, run: Run, rows: Sequence[QueryRow], blocks_folder: Path, path: Path) -> None:
    """Write one of `OTHER_SCORES`."""
    scores_NT = other_score(name, run, rows, TrainingBlocks(blocks_folder))
    with publish(path) as part, part.open("wb") as file:
        np.save(file, scores_NT)


def other_score(name: str, run: Run, rows: Sequence[QueryRow], blocks: TrainingBlocks) -> NDArray[np.float32]:
    """One of `OTHER_SCORES`, which the run has not."""
    config, tokenizer = run.config, load_tokenizer(run.tokenizer_source)
    model = load_proxy(run.proxy_source, gpus=0).eval()
    beginning = Beginning.of(tokenizer, is_trained=run.proxy_is_trained).token
    longest, direction = config.build_query.max_tokens, read_direction(run.query)
    sets = QuerySets.of(rows, max_tokens=longest, beginning=beginning)
    of_blocks = (np.asarray(blocks.tokens), blocks.lengths)
    if name == "position":
        return score_tokens(model, direction, *of_blocks, attribution="position", beginning=beginning)
    if name == "identity":
        queries = tokenise_queries(
            tokenizer,
            [(row.prompt, row.completion) for row in rows],
            model,
            max_tokens=longest,
            beginning=beginning,
        )
        weights, at_once = differential_weights([row.positive for row in rows]), config.build_query.batch_tokens
        gradient = mean_completion_gradient(model, list(direction), queries, weights, batch_tokens=at_once)
        return score_tokens(model, gradient, *of_blocks, method=METHOD, beginning=beginning)
    texts = [row[:length].tolist() for row, length in zip(*of_blocks, strict=True)]
    if name == "ngram":
        finder: Any = fit_ngrams(tokenizer, sets)
    else:
        finder = fit_query_probe(model, tokenizer, sets, seed=config.seed)
    return by_block(np.concatenate(finder.score(texts)), blocks, 0.0)


def measure(
    subject: Subject,
    tokens: Tokens,
    scores: Scores,
    kinds: Mapping[str, Bools],
    options: argparse.Namespace,
    started: float,
) -> dict[str, Any]:
    """Both tests, as far as there are retrainings.

    kinds: which of the subject's queries are positive, by part, in order; UNSEEN's figures stand in their own dict."""
    seed = subject.settings.seed
    halves = document_halves(tokens.documents_NT, options.halves, seed)
    retrainings = [
        Retraining(name=f"half-{index:03d}", seed=seed, left_out_NT=left_out) for index, left_out in enumerate(halves)
    ]
    seeds = range(seed, seed + options.seeds)
    masks = {each: masks_of(scores, tokens, options.share, each) for each in seeds}
    without = [
        Retraining(name=f"seed{each}-{name}", seed=each, left_out_NT=left_out)
        for each in seeds
        for name, left_out in masks[each].items()
    ]
    first = len(masks[seed])  # one seed of the masks first: of few retrainings they say most
    retrainings = without[:first] + retrainings + without[first:]
    losses = retrain_all(
        subject,
        retrainings,
        options.folder / "retrainings",
        workers=options.workers,
        stop_after=60 * options.stop_after_minutes - (time.monotonic() - started),
    )
    figures, begin = {}, 0
    for part, positive_Q in kinds.items():
        own = {name: each[begin : begin + len(positive_Q)] for name, each in losses.items()}
        negative = {name: float(each[~positive_Q].mean()) for name, each in own.items()}
        behaviour = margins(own, positive_Q)
        figures[part] = datamodelling(scores, halves, behaviour, seed)
        figures[part] |= effects(list(scores), masks, behaviour, negative)
        begin += len(positive_Q)
    return {
        **figures["seen"],
        UNSEEN: figures[UNSEEN],
        "marked": {
            name: round(float(tokens.marked_NT[mask].mean()), 4) for name, mask in masks[seed].items() if mask.any()
        }
        if tokens.marked_NT is not None
        else None,
        "tokens_left_out": token_count(tokens.candidates_NT, options.share),
        "retrainings": len(losses),
        "complete": len(losses) == len(retrainings),
        "epochs": options.epochs,
        "batch_blocks": options.batch_blocks,
        "machine": this_machine(),
    }


def masks_of(scores: Scores, tokens: Tokens, share: float, seed: int) -> dict[str, Bools]:
    """Name -> tokens to leave out in trainings of a seed: none, the highest of each score, and random ones for each."""
    candidates_NT = tokens.candidates_NT
    count, candidates = token_count(candidates_NT, share), candidates_NT.reshape(-1)
    own = {name: top_tokens(scores[name], candidates_NT, count, seed=0) for name in scores}
    some = next(iter(own.values())).reshape(-1)
    drawn = random_tokens(some, candidates, np.random.default_rng([seed, len(scores)]))
    masks = {PLAIN: np.zeros_like(candidates_NT), RANDOM: drawn.reshape(candidates_NT.shape), **own}
    for number, name in enumerate(scores):
        of_types = tokens.tokens_NT.reshape(-1), masks[name].reshape(-1), candidates
        for null, stream in ((MATCHED, [seed, number]), (OTHERS, [seed, number, 1])):
            drawn = random_of_types(*of_types, np.random.default_rng(stream), others_first=null == OTHERS)
            masks[f"{name}-{null}"] = drawn.reshape(candidates_NT.shape)
    return masks


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run directory, up to the scores; none: one is made")
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"), help="of a run made here")
    parser.add_argument("--folder", type=Path, default=Path("runs/causal"))
    parser.add_argument("--seed", type=int, default=0, help="of a run made here")
    parser.add_argument("--halves", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--scores", nargs="+", help="those to leave out by (default: all)")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-blocks", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.01, help="of all predicted tokens that a mask holds")
    parser.add_argument("--workers", type=int, default=2, help="retrainings at a time, one thread each")
    parser.add_argument("--stop-after-minutes", type=float, default=float("inf"))
    parser.add_argument("--quick", action="store_true", help="small numbers of everything: does it run?")
    options = parser.parse_args()
    if options.quick:
        options.halves, options.seeds, options.epochs = 4, 2, 0.5
    return options


if __name__ == "__main__":
    main()
