"""How much of the exact score does a student learn, from how many labels, how fast, and does the certificate hold?

    python bench/student.py [--behaviour explicit|implicit] [--proxy smollm2|FOLDER] [--quick]

Documents, queries and directions are those of `bench/localise.py`, with further documents of the same kinds. Each
document is a block of its own after an EOS. 30% of the documents are for testing. Of the others a random part is scored
exactly, so that it holds `--shares` of all tokens: the learning curve. A fourth of that is held out by the student, to
choose its variant by.

Given for `head` and `ngram`, on the documents for testing: Spearman and Pearson with the exact score, overlap of the
top 2%, recall of the exact top 2% in the student's top 10%, and the average precision against the spans that people
marked, beside the exact score's on the same tokens; with intervals over documents. Then, of the middle sample at
`--cascade`:

- what was tried, the best variant of each target and of the layers;
- a cascade, each document a block: a tenth of them, those in which the student finds most, is scored exactly. Which
  share of the exact mask of 2% the mask of its scores has; which lies in what was rechecked, by source; the
  certificate of a random half of the documents, and whether its interval holds the figures of all;
- tokens in a second, each student and the exact `fast` pass alone on the same blocks of 128 tokens, by turns.

Exact scores are those of the difference engine at full rank, in bfloat16 where the CPU has instructions for it; there
`head` reads a copy of the proxy in bfloat16 too. Last line: one JSON object. Not measured here: masks in training, and
an encoder.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

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
from bench.localise import bootstrap, encode_document, factor_documents
from ifguide.evaluation.bootstrap import Bootstrap
from ifguide.influence.head_derivatives import HeadDerivatives
from ifguide.influence.scorer import TokenScorer
from ifguide.influence.smoothing import smoothing_layers
from ifguide.models import predicted_positions
from ifguide.student.certificate import FIGURES, Audit, Certificate, Fidelity, certify
from ifguide.student.fidelity import RECHECK_SHARE, TOP_SHARE, fidelity
from ifguide.student.head import HeadScorer, HeadStudent, read_features
from ifguide.student.head_fit import HeadSample, Transforms, fit_head
from ifguide.student.ngrams import NgramStudent, NgramSums, choose_strength
from ifguide.student.recheck import block_counts, least_count
from ifguide.telemetry import Progress, configure_logging, log

TEST_SHARE = 0.3
BATCH = 16  # documents of like length
RATE_BLOCKS, RATE_LENGTH, ROUNDS = 16, 128, 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Documents of like length: their numbers, ids, and all that one exact pass gives; `read_BTF` are the features as
    the student's own pass reads them."""

    numbers: list[int]
    tokens_BT: Tensor
    known_BT: Tensor
    scores_BT: Tensor
    features_BTF: Tensor
    tangents_BTD: Tensor
    read_BTF: Tensor

    def of(self, wanted: set[int]) -> Batch | None:
        """The documents among them that are wanted."""
        rows = [row for row, number in enumerate(self.numbers) if number in wanted]
        if not rows:
            return None
        tensors = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, numbers=[self.numbers[row] for row in rows], **tensors)


def main() -> int:
    options = _options()
    configure_logging()
    try:
        behaviour = read_behaviour(
            options.behaviour, options.data, documents=options.query_documents, queries=options.queries, seed=0
        )
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    model, tokenizer = load_proxy(options.proxy)
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
    cascade = bench.cascade(options.cascade)
    print(json.dumps({"behaviour": options.behaviour, "machine": this_machine(), **summary(rows, options), **cascade}))
    return 0


def summary(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Means over the samples at the share of the cascade, and the curve of all shares."""

    def mean(kind: str, share: float, name: str) -> float:
        found = [row[name] for row in rows if row["kind"] == kind and row["share"] == share]
        return round(float(np.mean(found)), 4)

    names = ("spearman", "pearson", "overlap", "recall", "ap", "ap_over_exact")
    curve = {
        kind: {f"{share:g}": {name: mean(kind, share, name) for name in names} for share in options.shares}
        for kind in ("head", "ngram")
    }
    at = f"{options.cascade:g}"
    return {
        "head_spearman": curve["head"][at]["spearman"],
        "head_recall_top2_in_top10": curve["head"][at]["recall"],
        "head_ap_over_exact": curve["head"][at]["ap_over_exact"],
        "ap_exact": mean("head", options.cascade, "ap_exact"),
        "ap_head": curve["head"][at]["ap"],
        "ap_ngram": curve["ngram"][at]["ap"],
        "curve": curve,
    }


class Bench:
    """The documents with their exact scores, and students of them."""

    def __init__(
        self, model: PreTrainedModel, direction: dict[str, Tensor], encoded: Sequence[Any], sources: list[str]
    ):
        self.model, self.sources = model, sources
        self.reader = copy.deepcopy(model).to(torch.bfloat16) if PRECISION == "bfloat16" else model
        self.scorer = TokenScorer(model, direction, attribution="target", method=METHOD)
        self.layers = smoothing_layers(len(self.scorer.blocks))
        self.truth = [marked for _, _, marked in encoded]
        self.sizes = np.array([len(ids) for ids, _, _ in encoded])
        self.batches = list(self._read([ids for ids, _, _ in encoded]))
        order = np.random.default_rng(0).permutation(len(encoded))
        cut = round((1 - TEST_SHARE) * len(order))
        self.learnable, self.test = order[:cut], np.sort(order[cut:])
        self.students: dict[tuple[float, int], tuple[HeadStudent, NgramStudent, list[dict[str, Any]]]] = {}

    def _read(self, ids: Sequence[np.ndarray]) -> Iterator[Batch]:
        order, progress = np.argsort(self.sizes, kind="stable"), Progress("exact", float(self.sizes.sum()), "tokens")
        for begin in range(0, len(order), BATCH):
            numbers = order[begin : begin + BATCH].tolist()
            lengths_B = torch.from_numpy(self.sizes[numbers])
            tokens_BT = torch.zeros(len(numbers), int(lengths_B.max()), dtype=torch.int64)
            for row, number in enumerate(numbers):
                tokens_BT[row, : self.sizes[number]] = torch.from_numpy(ids[number])
            scores, states, tangents = self.scorer.score_and_read(tokens_BT, lengths_B, self.layers, tangents=True)
            assert tangents is not None
            yield Batch(
                numbers=numbers,
                tokens_BT=tokens_BT,
                known_BT=predicted_positions(tokens_BT, lengths_B),
                scores_BT=scores[0],
                features_BTF=torch.cat(states, dim=-1).float(),
                tangents_BTD=tangents[0].float(),
                read_BTF=read_features(self.reader, tokens_BT, self.layers).to(self.reader.dtype),
            )
            progress.advance(float(lengths_B.sum()))

    def learn(self, share: float, seed: int) -> list[dict[str, Any]]:
        """Fit both kinds on documents that hold `share` of all tokens; their figures on the documents for testing."""
        order = np.random.default_rng([seed, 1]).permutation(self.learnable)
        wanted = order[: 1 + int(np.searchsorted(np.cumsum(self.sizes[order]), share * self.sizes.sum()))]
        held_out, fitted = set(wanted[::4].tolist()), set(np.delete(wanted, np.s_[::4]).tolist())
        head, tried = self._fit_head(fitted, held_out)
        ngram = self._fit_ngrams(fitted, held_out)
        self.students[share, seed] = head, ngram, tried
        exact = self._of_test(lambda batch: batch.scores_BT)
        found = {"head": self._head_scores(head), "ngram": self._ngram_scores(ngram)}
        truth = [self.truth[number] for number in self.test]
        intervals, ratios = bootstrap(truth, {"target": exact, **found}, seed=0)
        flat = {name: np.concatenate([own[1:] for own in of]) for name, of in {"exact": exact, **found}.items()}
        marks = np.concatenate([own[1:] for own in truth])
        ap = {name: float(average_precision_score(marks, own)) for name, own in flat.items()}
        rows = []
        for kind in found:
            row = {
                "kind": kind,
                "share": share,
                "seed": seed,
                "labels": int((self.sizes[wanted] - 1).sum()),
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

    def _fit_head(self, fitted: set[int], held_out: set[int]) -> tuple[HeadStudent, list[dict[str, Any]]]:
        parts = [(own, False) for own in self._of(fitted)] + [(own, True) for own in self._of(held_out)]
        scores_N = np.concatenate([own.scores_BT[own.known_BT].numpy() for own, _ in parts])
        sample = HeadSample(Transforms.of(scores_N), self.layers)
        for own, is_held in parts:
            sample.add(own.tokens_BT, own.known_BT, own.scores_BT, own.features_BTF, own.tangents_BTD, held_out=is_held)
        return fit_head(sample, HeadDerivatives(self.reader))

    def _fit_ngrams(self, fitted: set[int], held_out: set[int]) -> NgramStudent:
        tokens_BT, scores_BT, known_BT = self._padded(held_out)
        student, _ = choose_strength(NgramSums.of(*self._padded(fitted)), tokens_BT, scores_BT, known_BT)
        return replace(student, sums=student.sums + NgramSums.of(tokens_BT, scores_BT, known_BT))

    def _padded(self, wanted: set[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, scores and where there is one, of documents in one array."""
        parts, longest = list(self._of(wanted)), int(self.sizes.max())
        arrays = []
        for name in ("tokens_BT", "scores_BT", "known_BT"):
            tensors = [getattr(own, name) for own in parts]
            padded = [torch.nn.functional.pad(own, (0, longest - own.shape[1])) for own in tensors]
            arrays.append(torch.cat(padded).numpy())
        return arrays[0], arrays[1], arrays[2]

    def _of(self, wanted: set[int]) -> Iterator[Batch]:
        return (own for batch in self.batches if (own := batch.of(wanted)) is not None)

    def _of_test(self, score: Callable[[Batch], Tensor]) -> list[np.ndarray]:
        """(T,) of each document for testing, in the order of their numbers."""
        found: dict[int, np.ndarray] = {}
        for batch in self._of(set(self.test.tolist())):
            scores_BT = score(batch).float().numpy()
            found |= {number: scores_BT[row, : self.sizes[number]] for row, number in enumerate(batch.numbers)}
        return [found[number] for number in self.test.tolist()]

    def _head_scores(self, student: HeadStudent) -> list[np.ndarray]:
        head, width = HeadDerivatives(self.reader), len(student.weights_F)
        return self._of_test(lambda batch: student.scores(batch.read_BTF[..., -width:].float(), batch.tokens_BT, head))

    def _ngram_scores(self, student: NgramStudent) -> list[np.ndarray]:
        return self._of_test(lambda batch: torch.from_numpy(student.score(batch.tokens_BT.numpy())))

    def cascade(self, share: float) -> dict[str, Any]:
        """What a cascade with the head student finds, its certificate, what was tried, and rates."""
        seeds = sorted(seed for own, seed in self.students if own == share)
        head, ngram, tried = self.students[share, seeds[len(seeds) // 2]]
        exact, student = self._of_test(lambda batch: batch.scores_BT), self._head_scores(head)
        number_N = np.repeat(self.test, self.sizes[self.test] - 1)
        exact_N, student_N = (np.concatenate([own[1:] for own in of]) for of in (exact, student))
        edge = float(np.quantile(student_N, 1 - TOP_SHARE))
        counts = np.concatenate([block_counts(own[None, 1:], edge) for own in student])
        rechecked_N = np.repeat(counts >= least_count(lambda: [counts], RECHECK_SHARE), self.sizes[self.test] - 1)
        merged_N = np.where(rechecked_N, exact_N, student_N)
        marks_N = np.concatenate([self.truth[number][1:] for number in self.test])
        names = sorted(set(self.sources))
        source_N = np.array([names.index(self.sources[number]) for number in number_N])
        whole = Audit(
            exact_N=exact_N,
            student_N=student_N,
            rechecked_N=rechecked_N,
            blocks_N=number_N,
            sources_N=source_N,
            sources=names,
        )
        audited = np.isin(number_N, np.random.default_rng(2).permutation(self.test)[: len(self.test) // 2])
        part = replace(whole, **{name: own[audited] for name, own in vars(whole).items() if name.endswith("_N")})
        truth, certificate = certify(whole, bootstrap=Bootstrap(samples=200)), certify(part)
        found = {"all": truth.whole, **truth.by_source}
        return {
            "cascade_mask_agreement": round(fidelity(exact_N, merged_N)["overlap"], 4),
            "cascade_recall": round(float(truth.whole.recall.value or 0), 4),
            "cascade_rechecked_share": round(truth.rechecked_share, 4),
            "ap_cascade": round(float(average_precision_score(marks_N, merged_N)), 4),
            "by_source": {name: values_of(own) for name, own in found.items()},
            "certificate": asdict(certificate.whole),
            "certificate_holds": holds(certificate, truth),
            "tried": best_of(tried),
            "rates": (rates := self.rates(head, ngram)),
            "head_time_ratio": round(rates["exact"] / rates["head"], 4),
            "ngram_speedup": round(rates["ngram"] / rates["exact"], 1),
        }

    def rates(self, head: HeadStudent, ngram: NgramStudent) -> dict[str, float]:
        """Tokens in a second of each on the same packed blocks; the median of rounds by turns."""
        stream = np.concatenate([own.tokens_BT[own.known_BT].numpy() for own in self.batches])
        tokens_BT = torch.from_numpy(np.resize(stream, (RATE_BLOCKS, RATE_LENGTH)))
        lengths_B = torch.full((RATE_BLOCKS,), RATE_LENGTH)
        reader = HeadScorer(self.reader, head)
        repeated = np.tile(tokens_BT.numpy(), (64, 1))
        passes: dict[str, tuple[Callable[[], Any], int]] = {
            "exact": (lambda: self.scorer.score(tokens_BT, lengths_B), tokens_BT.numel()),
            "head": (lambda: reader.score(tokens_BT, lengths_B), tokens_BT.numel()),
            "ngram": (lambda: ngram.score(repeated), repeated.size),
        }
        seconds: dict[str, list[float]] = {name: [] for name in passes}
        for number in range(1 + ROUNDS):  # the first one warms up
            for name, (run, _) in passes.items():
                started = time.process_time()
                run()
                if number:
                    seconds[name].append(time.process_time() - started)
        return {name: round(passes[name][1] / float(np.median(own)), 1) for name, own in seconds.items()}


def holds(certificate: Certificate, truth: Certificate) -> dict[str, bool]:
    """Of each figure, whether its interval holds that of all documents."""
    found = {}
    for name in FIGURES:
        figure, value = getattr(certificate.whole, name), getattr(truth.whole, name).value
        found[name] = None not in (figure.low, figure.high, value) and figure.low <= value <= figure.high
    return found


def values_of(fidelity: Fidelity) -> dict[str, float | None]:
    """The figures of some tokens, without intervals."""
    found = {name: getattr(fidelity, name).value for name in FIGURES}
    return {name: None if value is None else round(value, 4) for name, value in found.items()}


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
    parser.add_argument("--documents", type=int, default=1500)
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.3], help="of the tokens, labelled"
    )
    parser.add_argument("--samples", type=int, default=3, help="random samples at each share")
    parser.add_argument("--cascade", type=float, default=0.1, help="the share whose student the rest is about")
    parser.add_argument("--queries", type=int, default=160, help="of each set")
    parser.add_argument("--query-documents", type=int, default=500, help="as localise has them")
    parser.add_argument("--factor-tokens", type=int, default=14_000)
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
