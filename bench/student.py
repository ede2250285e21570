"""How much of the exact score does a student learn, from how many labels, how fast, and does the certificate hold?

    python bench/student.py [--behaviour explicit|implicit] [--proxy smollm2|FOLDER] [--quick]
                            [--runs EXACT CASCADE]

Documents, queries and directions are those of `bench/localise.py`, with further documents of the same kinds. Each
document is a block of its own after an EOS. 30% of the documents are for testing. Of the others a random part is scored
exactly, so that it holds `--shares` of all tokens: the learning curve. A fourth of that is held out by the student, to
choose its variant by.

Given for `head`, `suffix`, `encoder` and `ngram`, on the documents for testing: Spearman and Pearson with the exact
score, overlap of the top 2%, recall of the exact top 2% in the student's top 10%, and the average precision against the
spans that people marked, beside the exact score's on the same tokens; with intervals over documents. Then, of the
middle sample at `--cascade`:

- what was tried, the best variant of each target and of the layers;
- a cascade, each document a block: a tenth of them, those in which the student finds most, is scored exactly. Which
  share of the exact mask of 2% the mask of its scores has; which lies in what was rechecked, by source; the
  certificate of a random half of the documents, and whether its interval holds the figures of all;
- tokens in a second, each student and the exact `fast` pass alone on the same blocks of 128 tokens, by turns.

Exact scores are those of the difference engine at full rank, in bfloat16 where the CPU is quicker with it; there
`head` reads a copy of the proxy in bfloat16 too. The encoder learns from documents that are packed into blocks, apart
from each other. A suffix learns nothing: its curve is flat. Last line: one JSON object. Not measured here: masks in
training, unless --runs names two finished runs of one seed, with exact scores and with those of a cascade: then the
difference of their penalised models' EMT and TP.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor
from transformers import PreTrainedModel

from bench.common.behaviours import BEHAVIOURS, SOURCE, read_behaviour
from bench.common.direction import fit_direction
from bench.common.places import DATA, this_machine
from bench.common.proxies import load_proxy
from bench.common.scores import METHOD, PRECISION
from bench.common.student_documents import PACKED, LabelledDocuments
from bench.localise import bootstrap, encode_document, factor_documents
from ifguide.config import Encoder
from ifguide.evaluation.bootstrap import Bootstrap
from ifguide.influence.head_derivatives import HeadDerivatives
from ifguide.influence.scorer import TokenScorer
from ifguide.student.certificate import FIGURES, Audit, Certificate, Fidelity, certify
from ifguide.student.encoder import EncoderStudent, encoder_source
from ifguide.student.encoder_fit import EncoderSettings, fit_encoder
from ifguide.student.fidelity import TOP_SHARE, fidelity
from ifguide.student.head import HeadScorer, HeadStudent
from ifguide.student.head_fit import HeadFit, HeadSample, Transforms, fit_head
from ifguide.student.ngrams import NgramStudent, NgramSums, choose_ngrams
from ifguide.student.recheck import block_counts, histogram_of, least_count
from ifguide.student.said import RECHECK_SHARE
from ifguide.student.suffix import first_of_suffix, suffix_of
from ifguide.telemetry import configure_logging, log

KINDS = ("head", "suffix", "encoder", "ngram")
RATE_BLOCKS, RATE_LENGTH, ROUNDS = 16, 128, 3


class Students(NamedTuple):
    """Those of one sample, and what was tried for the head."""

    head: HeadStudent
    encoder: EncoderStudent
    ngram: NgramStudent
    tried: list[dict[str, Any]]


def main() -> int:
    options = _options()
    configure_logging()
    try:
        behaviour = read_behaviour(
            options.behaviour, options.data, documents=options.query_documents, queries=options.queries, seed=0
        )
        model, tokenizer = load_proxy(options.proxy)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    factors = factor_documents(tokenizer, behaviour.others, options.factor_tokens)
    texts = [row["text"] for row in factors]
    direction = fit_direction(model, tokenizer, texts, behaviour.positive, behaviour.negative)
    documents = (behaviour.documents + behaviour.others[len(factors) :])[: options.documents]
    encoded = [encode_document(tokenizer, document) for document in documents]
    bench = Bench(model, direction, encoded, [document[SOURCE] for document in documents])
    rows: list[dict[str, Any]] = []
    for seed in range(options.samples):
        for share in options.shares:
            rows += bench.learn(share, seed)
    cascade = bench.cascade(options.cascade) | (differences(*options.runs) if options.runs else {})
    print(json.dumps({"behaviour": options.behaviour, "machine": this_machine(), **summary(rows, options), **cascade}))
    return 0


def summary(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Means over the samples at the share of the cascade, and the curve of all shares."""

    def mean(kind: str, share: float, name: str) -> float:
        values = [row[name] for row in rows if row["kind"] == kind and row["share"] == share]
        return round(float(np.mean(values)), 4)

    names = ("spearman", "pearson", "overlap", "recall", "ap", "ap_over_exact")
    curve = {
        kind: {f"{share:g}": {name: mean(kind, share, name) for name in names} for share in options.shares}
        for kind in KINDS
    }
    at = f"{options.cascade:g}"
    return {
        "head_spearman": curve["head"][at]["spearman"],
        "head_recall_top2_in_top10": curve["head"][at]["recall"],
        "head_ap_over_exact": curve["head"][at]["ap_over_exact"],
        "ap_exact": mean("head", options.cascade, "ap_exact"),
        "ap_head": curve["head"][at]["ap"],
        **{f"ap_{kind}": curve[kind][at]["ap"] for kind in ("ngram", "encoder", "suffix")},
        "curve": curve,
    }


class Bench:
    """The documents with their exact scores, and students of them."""

    def __init__(
        self, model: PreTrainedModel, direction: dict[str, Tensor], encoded: Sequence[Any], sources: list[str]
    ):
        self.model, self.sources = model, sources
        self.reader = copy.deepcopy(model).bfloat16() if PRECISION == "bfloat16" else model
        self.scorer = TokenScorer(model, direction, attribution="target", method=METHOD)
        upper = suffix_of(model, direction, first_of_suffix(len(self.scorer.blocks)))
        self.suffix = TokenScorer(model, upper, attribution="target", method=METHOD)
        self.truth = [marked for _, _, marked in encoded]
        self.documents = LabelledDocuments([ids for ids, _, _ in encoded], self.scorer, self.reader)
        self.suffix_scores = self.documents.of_test(
            lambda batch: self.suffix.score(batch.tokens_BT, self.documents.lengths(batch))
        )
        self.students: dict[tuple[float, int], Students] = {}

    def learn(self, share: float, seed: int) -> list[dict[str, Any]]:
        """Fit each kind on documents that hold `share` of all tokens; their figures on the documents for testing."""
        order = np.random.default_rng([seed, 1]).permutation(self.documents.learnable)
        sizes = self.documents.sizes
        wanted = order[: 1 + int(np.searchsorted(np.cumsum(sizes[order]), share * sizes.sum()))]
        held_out, fitted = set(wanted[::4].tolist()), set(np.delete(wanted, np.s_[::4]).tolist())
        head, tried, _ = self._fit_head(fitted, held_out)
        encoder, ngram = self._fit_encoder(fitted, held_out), self._fit_ngrams(fitted, held_out)
        self.students[share, seed] = Students(head, encoder, ngram, tried)
        exact = self.documents.of_test(lambda batch: batch.scores_BT)
        scores = {
            "head": self._head_scores(head),
            "suffix": self.suffix_scores,
            "encoder": self.documents.of_test(
                lambda batch: encoder.score(batch.tokens_BT, self.documents.lengths(batch))
            ),
            "ngram": self._ngram_scores(ngram),
        }
        truth = [self.truth[number] for number in self.documents.test]
        intervals, ratios = bootstrap(truth, {"target": exact, **scores}, seed=0)
        flat = {name: np.concatenate([own[1:] for own in of]) for name, of in {"exact": exact, **scores}.items()}
        marks = np.concatenate([own[1:] for own in truth])
        ap = {name: float(average_precision_score(marks, own)) for name, own in flat.items()}
        rows = []
        for kind in scores:
            row = {
                "kind": kind,
                "share": share,
                "seed": seed,
                "labels": int((self.documents.sizes[wanted] - 1).sum()),
                **fidelity(flat["exact"], flat[kind]),
                "ap": ap[kind],
                "ap_interval": intervals[kind],
                "ap_exact": ap["exact"],
                "ap_over_exact": ap[kind] / ap["exact"],
                "exact_over_ap_interval": ratios[kind],
            }
            log(
                "student",
                f"{kind} at {share:.0%}, seed {seed}, {row['labels']:,} labels: Spearman {row['spearman']:.3f}, top 2%"
                f" {row['overlap']:.3f}, recall {row['recall']:.3f}, AP {row['ap']:.3f} {row['ap_interval']},"
                f" exact {row['ap_exact']:.3f}, exact over it {row['exact_over_ap_interval']}",
            )
            rows.append(row)
        return rows

    def _fit_head(self, fitted: set[int], held_out: set[int]) -> HeadFit:
        parts = [(own, held) for held, of in ((False, fitted), (True, held_out)) for own in self.documents.of(of)]
        scores_N = np.concatenate([own.scores_BT[own.known_BT].numpy() for own, _ in parts])
        sample = HeadSample(Transforms.of(scores_N), self.documents.layers)
        for own, is_held in parts:
            sample.add(own.tokens_BT, own.known_BT, own.scores_BT, own.features_BTF, own.tangents_BTD, held_out=is_held)
        return fit_head(sample, HeadDerivatives(self.reader))

    def _fit_encoder(self, fitted: set[int], held_out: set[int]) -> EncoderStudent:
        options, vocabulary = Encoder(), self.model.config.get_text_config().vocab_size
        source = encoder_source(options, vocabulary, max(PACKED, int(self.documents.sizes.max())))
        settings = EncoderSettings(options=options, source=source, seed=0, apart=True)
        return fit_encoder(self.documents.packed(fitted), self.documents.packed(held_out), settings).student

    def _fit_ngrams(self, fitted: set[int], held_out: set[int]) -> NgramStudent:
        tokens_BT, scores_BT, known_BT = self.documents.padded(held_out)
        student, _ = choose_ngrams(NgramSums.of(*self.documents.padded(fitted)), tokens_BT, scores_BT, known_BT)
        return replace(student, sums=student.sums + NgramSums.of(tokens_BT, scores_BT, known_BT))

    def _head_scores(self, student: HeadStudent) -> list[np.ndarray]:
        head, width = HeadDerivatives(self.reader), len(student.weights_F)
        return self.documents.of_test(
            lambda batch: student.scores(batch.read_BTF[..., -width:].float(), batch.tokens_BT, head)
        )

    def _ngram_scores(self, student: NgramStudent) -> list[np.ndarray]:
        return self.documents.of_test(lambda batch: torch.from_numpy(student.score(batch.tokens_BT.numpy())))

    def cascade(self, share: float) -> dict[str, Any]:
        """What a cascade with the head student finds, its certificate, what was tried, and rates."""
        seeds = sorted(seed for own, seed in self.students if own == share)
        students = self.students[share, seeds[len(seeds) // 2]]
        head = students.head
        exact, student = self.documents.of_test(lambda batch: batch.scores_BT), self._head_scores(head)
        number_N = np.repeat(self.documents.test, self.documents.sizes[self.documents.test] - 1)
        exact_N, student_N = (np.concatenate([own[1:] for own in of]) for of in (exact, student))
        edge = float(np.quantile(student_N, 1 - TOP_SHARE))
        counts = np.concatenate([block_counts(own[None, 1:], edge) for own in student])
        least = least_count(functools.partial(histogram_of, counts), RECHECK_SHARE)
        rechecked_N = np.repeat(counts >= least, self.documents.sizes[self.documents.test] - 1)
        merged_N = np.where(rechecked_N, exact_N, student_N)
        marks_N = np.concatenate([self.truth[number][1:] for number in self.documents.test])
        names = sorted(set(self.sources))
        source_N = np.array([names.index(self.sources[number]) for number in number_N])
        places: dict[str, Any] = {"blocks_N": number_N, "sources_N": source_N, "sources": names}
        whole = Audit(exact_N=exact_N, student_N=student_N, rechecked_N=rechecked_N, **places)
        audited = np.isin(
            number_N, np.random.default_rng(2).permutation(self.documents.test)[: len(self.documents.test) // 2]
        )
        part = replace(whole, **{name: own[audited] for name, own in vars(whole).items() if name.endswith("_N")})
        truth, certificate = certify(whole, bootstrap=Bootstrap(samples=200)), certify(part)
        figures = {"all": truth.whole, **truth.by_source}
        return {
            "cascade_mask_agreement": round(fidelity(exact_N, merged_N)["overlap"], 4),
            "cascade_recall": round(float(truth.whole.rechecked.value or 0), 4),
            "cascade_rechecked_share": round(truth.rechecked_share, 4),
            "ap_cascade": round(float(average_precision_score(marks_N, merged_N)), 4),
            "by_source": {name: values_of(own) for name, own in figures.items()},
            "certificate": asdict(certificate.whole),
            "certificate_holds": holds(certificate, truth),
            "tried": best_of(students.tried),
            "rates": (rates := self.rates(students)),
            **{f"{kind}_time_ratio": round(rates["exact"] / rates[kind], 4) for kind in ("head", "suffix")},
            **{f"{kind}_speedup": round(rates[kind] / rates["exact"], 1) for kind in ("ngram", "encoder")},
        }

    def rates(self, students: Students) -> dict[str, float]:
        """Tokens in a second of each on the same packed blocks; the median of rounds by turns."""
        stream = np.concatenate([own.tokens_BT[own.known_BT].numpy() for own in self.documents.batches])
        tokens_BT = torch.from_numpy(np.resize(stream, (RATE_BLOCKS, RATE_LENGTH)))
        lengths_B = torch.full((RATE_BLOCKS,), RATE_LENGTH)
        reader = HeadScorer(self.reader, students.head)
        repeated = np.tile(tokens_BT.numpy(), (64, 1))
        passes: dict[str, tuple[Callable[[], Any], int]] = {
            "exact": (lambda: self.scorer.score(tokens_BT, lengths_B), tokens_BT.numel()),
            "head": (lambda: reader.score(tokens_BT, lengths_B), tokens_BT.numel()),
            "suffix": (lambda: self.suffix.score(tokens_BT, lengths_B), tokens_BT.numel()),
            "encoder": (lambda: students.encoder.score(tokens_BT, lengths_B), tokens_BT.numel()),
            "ngram": (lambda: students.ngram.score(repeated), repeated.size),
        }
        seconds: dict[str, list[float]] = {name: [] for name in passes}
        for number in range(1 + ROUNDS):  # the first one warms up
            for name, (run, _) in passes.items():
                started = time.process_time()
                run()
                if number:
                    seconds[name].append(time.process_time() - started)
        return {name: round(passes[name][1] / float(np.median(own)), 1) for name, own in seconds.items()}


def differences(exact: Path, cascade: Path) -> dict[str, float]:
    """EMT and TP of the penalised model of a cascade's run less those of the exact run, by the runs' first classifier.

    Raises SystemExit when the runs' plain models differ, for then they are not comparable."""
    figures = {}
    for name in ("emt", "tp"):
        of_runs = []
        for run in (exact, cascade):
            models = json.loads((run / "report" / "metrics.json").read_bytes())["models"]
            of_runs.append({model: first_value(models[model], name) for model in ("baseline", "penalised")})
        if of_runs[0]["baseline"] != of_runs[1]["baseline"]:
            raise SystemExit(f"--runs: the plain models of {exact} and {cascade} differ; give runs of one seed")
        figures[f"cascade_{name}_difference"] = round(of_runs[1]["penalised"] - of_runs[0]["penalised"], 4)
    return figures


def first_value(model: dict[str, Any], name: str) -> float:
    """A figure of all prompts by the first classifier."""
    return float(next(iter(model["sets"]["prompts"]["groups"]["all"][name].values()))["value"])


def holds(certificate: Certificate, truth: Certificate) -> dict[str, bool]:
    """Of each figure, whether its interval holds that of all documents."""
    verdicts = {}
    for name in FIGURES:
        figure, value = getattr(certificate.whole, name), getattr(truth.whole, name).value
        verdicts[name] = None not in (figure.low, figure.high, value) and figure.low <= value <= figure.high
    return verdicts


def values_of(fidelity: Fidelity) -> dict[str, float | None]:
    """The figures of some tokens, without intervals."""
    values = {name: getattr(fidelity, name).value for name in FIGURES}
    return {name: None if value is None else round(value, 4) for name, value in values.items()}


def best_of(tried: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was tried in short: the best recall of each target, of each choice of layers and of each mix."""
    return {
        key: {str(value): round(max(own["recall"] for own in tried if own[key] == value), 4) for value in values}
        for key, values in (
            (key, list(dict.fromkeys(own[key] for own in tried))) for key in ("target", "layers", "ridge", "mix")
        )
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--behaviour", choices=list(BEHAVIOURS), default="explicit")
    parser.add_argument("--proxy", default="smollm2", help="smollm2, or a model's folder (with its tokenizer)")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--factor-tokens", type=int, default=14_000)
    parser.add_argument("--query-documents", type=int, default=500, help="as localise has them")
    parser.add_argument("--documents", type=int, default=1500)
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.3], help="of the tokens, labelled"
    )
    parser.add_argument("--samples", type=int, default=3, help="random samples at each share")
    parser.add_argument("--cascade", type=float, default=0.1, help="the share whose student the rest is about")
    parser.add_argument("--queries", type=int, default=160, help="of each set")
    parser.add_argument("--runs", type=Path, nargs=2, metavar=("EXACT", "CASCADE"), help="finished runs of one seed")
    parser.add_argument("--quick", action="store_true", help="small numbers of everything: does it run?")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(documents=80, shares=[0.1, 0.3], samples=1, queries=8, query_documents=60)
        options.factor_tokens = 1000
    if options.cascade not in options.shares:
        parser.error(f"--cascade {options.cascade:g} is none of --shares")
    if any(a >= b for a, b in pairwise(options.shares)):
        parser.error("--shares must rise")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
