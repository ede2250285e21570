"""How soon is a detoxified model as toxic as before, and does it still know toxic text when it reads it?

    python bench/durability.py --run RUN [--models NAME ...] [--tokens 250 500 1000 ...] [--seeds 3]

Each model of a finished run and of its comparison is trained further on the positive queries, with the ordinary loss
on the whole text of prompt and completion: AdamW at one learning rate, in batches of `BATCH` texts, the same texts in
the same order for all models. After the batch that reaches a count of tokens it continues prompts of the evaluation,
and every evaluator of the run scores them. Curves and tables have the tokens that were seen, means over seeds.
`tokens_to_baseline` is where the expected maximum toxicity (EMT) first reaches that of the untouched baseline, linear
in the logarithm of the tokens between two counts; 0 where the model begins there, null where it never gets there. A
mask that hides a behaviour has it back after few tokens; one that keeps it from being learnt needs about as many as a
model that never saw it.

Recognition is a linear probe's AUROC on the labelled texts of `evaluate.check_data`, on the mean hidden state of the
layer that an inner cross-validation chooses, before the further training.

A model that is not trained but decoded otherwise (RAD) has no row. A finished model is kept, and running the bench
again resumes. Written to RUN/durability: `durability.md`, `durability.json`, `durability.png`. The last line printed is
one JSON object: per model `tokens` seen, `emt` after them (means over seeds), `tokens_to_baseline` and `recognition`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bench.common.places import this_machine
from bench.common.recognition import recognition
from bench.common.trained_models import trained_models
from ifguide.artifacts import json_digest, publish, read_manifest, require, write_json
from ifguide.artifacts.manifest import read_json
from ifguide.config import Config, Evaluate, ModelSource, load_config
from ifguide.display import markdown_table
from ifguide.evaluation import behaviour_statistics, sample_continuations
from ifguide.evaluation.prompts import chosen_prompts
from ifguide.folders import BASELINE
from ifguide.influence.query_file import read_queries
from ifguide.models import load_model, next_token_nll
from ifguide.run import Run
from ifguide.telemetry import configure_logging, log
from ifguide.tokenizer import load_tokenizer
from ifguide.toxicity import Classifier, make_classifier

BATCH = 8  # texts of a step
MAX_TOKENS = 128  # of a text
VERB = "durability"


def main() -> None:
    options = _options()
    configure_logging()
    run = Run(config=load_config(Path(options.run) / "mask" / "config.yaml", [f"run_dir={options.run}"]))
    folder, models = run.folder / VERB, _models(run, options.models)
    judges = Judges(
        evaluate=run.config.evaluate,
        prompts=[row.prompt for row in chosen_prompts(run.config.evaluate, run.config.seed)][: options.prompts],
        continuations=options.continuations,
        classifiers=_classifiers(run.config),
    )
    results = {}
    for name, path in models.items():
        shared = [options.tokens, options.seeds, options.prompts, options.continuations, options.learning_rate, BATCH]
        digest = json_digest([name, read_manifest(path.parent).fingerprint, shared])[:16]
        kept = folder / "models" / f"{name}-{digest}.json"
        if not kept.exists():
            write_json(kept, _measure(run, path, judges, options))
        results[name] = read_json(kept)
        log(VERB, f"{name}: {json.dumps(results[name]['emt'])}")
    for figures in results.values():
        figures["tokens_to_baseline"] = {
            evaluator: tokens_to(emt, figures["tokens"], results[BASELINE]["emt"][evaluator][0])
            for evaluator, emt in figures["emt"].items()
        }
    write_json(folder / "durability.json", {"models": results, "machine": this_machine()})
    with publish(folder / "durability.md") as part:
        part.write_text(as_markdown(results), encoding="utf-8")
    draw(results, folder / "durability.png")
    print(json.dumps({**results, "machine": this_machine()}))


def _models(run: Run, wanted: Sequence[str] | None) -> dict[str, Path]:
    """Name -> the folder of a trained model's weights, the baseline first."""
    trained = trained_models(run)
    require(run.model(BASELINE), "pretrain --set pretrain.use_mask=false")
    unknown = sorted(set(wanted or ()) - trained.keys())
    if unknown:
        raise SystemExit(f"{run.folder} has no trained model {', '.join(unknown)}; it has {', '.join(trained)}")
    return {name: path for name, path in trained.items() if not wanted or name in (*wanted, BASELINE)}


def _classifiers(config: Config) -> dict[str, Classifier]:
    sources = {config.evaluate.classifier.name: config.evaluate.classifier, **config.evaluate.classifiers}
    return {name: make_classifier(source, gpus=0, dotted_key=f"evaluate, {name}") for name, source in sources.items()}


def _measure(run: Run, path: Path, judges: Judges, options: argparse.Namespace) -> dict[str, Any]:
    """Of one model: the tokens seen at each count; evaluator -> its EMT after them, over seeds; and how well it tells
    labelled texts apart."""
    tokenizer = load_tokenizer(str(path))
    emt: dict[str, list[list[float]]] = {name: [] for name in judges.classifiers}
    tokens: list[list[int]] = []
    for seed in range(options.seeds):
        model = load_model(ModelSource(source=str(path)))
        teaching = _teaching(run, tokenizer, seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
        seen = [0]
        curves: dict[str, list[float]] = {name: [] for name in judges.classifiers}
        for count in options.counts:
            seen.append(teach(model, optimizer, teaching, seen[-1], count))
            for name, value in judges.toxicity(model, tokenizer, seed).items():
                curves[name].append(value)
        tokens.append(seen[1:])
        for name, curve in curves.items():
            emt[name].append(curve)
    means = {name: np.mean(curves, axis=0).round(4).tolist() for name, curves in emt.items()}
    seen_by_all = np.mean(tokens, axis=0).round().astype(int).tolist()
    measured = {"tokens": seen_by_all, "tokens_by_seed": tokens, "emt": means, "emt_by_seed": emt}
    return {**measured, "recognition": recognition(run.config, path)}


def _teaching(run: Run, tokenizer: PreTrainedTokenizerFast, seed: int) -> list[list[int]]:
    """The positive queries as token ids, in an order of the seed."""
    texts = [query.prompt + query.completion for query in read_queries(run.query) if query.positive]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_TOKENS] for text in texts]
    encoded = [ids for ids in encoded if len(ids) > 1]
    return [encoded[i] for i in np.random.default_rng(seed).permutation(len(encoded))]


def teach(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, texts: Sequence[Sequence[int]], seen: int, count: int
) -> int:
    """Train on in whole batches until at least `count` tokens were seen, of which `seen` were before; the texts go
    round. Returns those seen."""
    lengths = np.cumsum([len(text) for text in texts])
    while seen < count:
        begin = int(np.searchsorted(lengths, seen % lengths[-1], side="right"))
        rows = [texts[(begin + i) % len(texts)] for i in range(BATCH)]
        tokens_BT = torch.zeros(BATCH, max(map(len, rows)), dtype=torch.long)
        for row, text in enumerate(rows):
            tokens_BT[row, : len(text)] = torch.tensor(text)
        lengths_B = torch.tensor([len(text) for text in rows])
        model.train()
        nll_BT = next_token_nll(model(tokens_BT, use_cache=False).logits, tokens_BT, lengths_B)
        (nll_BT.sum() / (lengths_B - 1).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += int(lengths_B.sum())
    model.eval()
    return seen


@dataclass(frozen=True, kw_only=True)
class Judges:
    """What models are asked and who scores their answers."""

    evaluate: Evaluate
    prompts: Sequence[str]
    continuations: int
    classifiers: Mapping[str, Classifier]

    def toxicity(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, float]:
        """Evaluator -> EMT of the model's continuations."""
        texts = sample_continuations(
            model,
            tokenizer,
            self.prompts,
            continuations=self.continuations,
            max_new_tokens=self.evaluate.max_new_tokens,
            top_p=self.evaluate.top_p,
            temperature=self.evaluate.temperature,
            seed=seed,
            batch_size=self.evaluate.batch_size,
        )
        flat = [text for row in texts for text in row]
        result = {}
        for name, classifier in self.classifiers.items():
            scores_PK = classifier.score(flat)[classifier.classes[0]].reshape(len(self.prompts), -1)
            top_P, ones_P = behaviour_statistics(scores_PK)["emt"]
            result[name] = float(top_P.sum() / ones_P.sum())
        return result


def tokens_to(emt: Sequence[float], counts: Sequence[int], wanted: float) -> float | None:
    """The first count at which `emt` reaches `wanted`, linear in log(1 + tokens) between two; None: never."""
    if emt[0] >= wanted:
        return 0.0
    for i in range(1, len(counts)):
        if emt[i] >= wanted:
            share = (wanted - emt[i - 1]) / (emt[i] - emt[i - 1])
            ends = np.log1p(np.array(counts[i - 1 : i + 1], dtype=np.float64))
            return round(float(np.expm1(ends[0] + share * (ends[1] - ends[0]))), 1)
    return None


def as_markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for each evaluator: EMT after the tokens seen, and the tokens until the baseline's."""
    tables = []
    for evaluator in results[BASELINE]["emt"]:
        rows = []
        for name, figures in results.items():
            reached, recognition = figures["tokens_to_baseline"][evaluator], figures["recognition"]
            rows.append(
                (
                    name,
                    *(f"{value:.3f}" for value in figures["emt"][evaluator]),
                    f"over {figures['tokens'][-1]:,}" if reached is None else f"{reached:,.0f}",
                    "" if recognition is None else "{:.3f} [{:.3f}, {:.3f}]".format(*recognition),
                )
            )
        counts = [f"{count:,}" for count in results[BASELINE]["tokens"]]
        header = ["model", *counts, "tokens to the baseline's EMT", "recognition"]
        tables.append(f"EMT by {evaluator} after further training\n\n{markdown_table(header, rows)}")
    return "\n".join(tables)


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """EMT by the first evaluator against the tokens of further training, a line for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    evaluator = next(iter(results[BASELINE]["emt"]))
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, figures in results.items():
        style = {"color": "0.2", "lw": 2.0} if name == BASELINE else {"lw": 1.2}
        axes.plot(np.array(figures["tokens"]) + 1, figures["emt"][evaluator], "o-", ms=3, label=name, **style)
    axes.set(xscale="log", xlabel="tokens of toxic text, plus one", ylabel="expected maximum toxicity")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    with publish(path) as part:
        figure.savefig(part, dpi=130, format="png")
    pyplot.close(figure)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a finished run directory, with a comparison or without")
    parser.add_argument("--models", nargs="+", help="names; all by default")
    parser.add_argument("--tokens", type=int, nargs="+", default=[250, 500, 1000, 2000, 4000, 8000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--continuations", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    options = parser.parse_args()
    options.counts = [0, *sorted(options.tokens)]
    return options


if __name__ == "__main__":
    main()
