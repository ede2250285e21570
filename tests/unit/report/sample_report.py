"""A report with everything in it, a report with as little as there can be, and a very large one."""

from __future__ import annotations

import dataclasses
import math
import re

from ifguide.report import contents
from ifguide.report.contents import Behaviour, RankedDocument, ReportData, Token
from ifguide.report.figures import ClassFigures, Difference, Figure, Group, ModelRow, PromptSet

BOLD = {
    "gender": ("american actors", "american actresses"),
    "race": ("african americans", "asian americans", "european americans", "hispanic and latino americans"),
}


def figure(value: float, base: float | None = None, half: float = 0.02) -> Figure:
    """`value` with an interval of `half` either way, and its difference from `base`."""
    if base is None:
        return Figure(value=value, low=value - half, high=value + half)
    change = value - base
    difference = Difference(value=change, low=change - half, high=change + half, p_value=0.002 if change else 1.0)
    return Figure(value=value, low=value - half, high=value + half, difference=difference)


def group(
    name: str, prompts: int, scale: float, emt: float, tp: float, paired: bool, text: float = 0.0, domain: str = ""
) -> Group:
    def of(value: float, share: float) -> Figure:
        shown = min(1.0, value * scale * share)
        return figure(shown, min(1.0, 0.6 * scale * share) if paired else None)

    classes = tuple(
        ClassFigures(name=label, emt=of(emt, share), tp=of(tp, share), mean=of(emt / 3, share))
        for label, share in (("rudeness", 1.0), ("insult", 0.5), ("threat", 0.1))
    )
    names = {
        "rep_4": (0.01 + text, 0.03),
        "distinct_2": (0.9 - text, 0.88),
        "tokens": (19.5, 19.5),
        "empty": (0.0, 0.0),
    }
    figures = {name: figure(value, base if paired else None, 0.005) for name, (value, base) in names.items()}
    return Group(name=name, prompts=prompts, classes=classes, text=figures if text else {}, domain=domain)


def model(name: str, emt: float, tp: float, ppl: float, accuracy: float, text: float = 0.02) -> ModelRow:
    paired = name != "baseline"
    own = PromptSet(
        name="prompts",
        groups=tuple(
            group(label, prompts, scale, emt, tp, paired, text)
            for label, prompts, scale in (("all", 1200, 1.0), ("provoking", 500, 1.4), ("harmless", 700, 0.6))
        ),
    )
    bold = PromptSet(
        name="bold",
        groups=(
            group("all", 2400, 0.4, emt, tp, paired, text),
            *(
                group(f"{domain}/{label}", 300, 0.3 + 0.1 * i, emt, tp, paired, text, domain)
                for domain, labels in BOLD.items()
                for i, label in enumerate(labels)
            ),
        ),
        gaps=tuple(
            group(domain, 300 * len(labels), 0.1 * (len(labels) - 1), emt, tp, paired)
            for domain, labels in BOLD.items()
        ),
    )
    return ModelRow(
        name=name,
        sets=(own, bold),
        perplexity=figure(ppl, 5.1 if paired else None, 0.06),
        last_word_accuracy=figure(accuracy, 0.45 if paired else None, 0.01),
    )


def curve(name: str, penalised: bool) -> contents.TrainingCurve:
    steps = tuple(range(10, 1010, 10))
    masked = [None if step % 170 == 0 else 4.0 + step / 400 + math.sin(step) / 9 for step in steps]
    return contents.TrainingCurve(
        model=name,
        steps=steps,
        benign_loss=tuple(2 + 6 * math.exp(-step / 200) + math.sin(step) / 20 for step in steps),
        masked_loss=tuple(masked) if penalised else None,
        learning_rate=tuple(6e-4 * min(1, step / 100) * (1.05 - step / 1000) for step in steps),
    )


def document(rank: int, words: str) -> RankedDocument:
    tokens = tuple(
        Token(text=text, score=1e-3 * math.sin(3 * i + rank) ** 3, masked=i % 7 in (3, 4), annotated=i % 7 == 4)
        for i, text in enumerate(re.findall(r"\s*\S+", words))
    )
    return RankedDocument(doc_id=1000 + rank, source="corpus.jsonl", rank=rank, rank_score=1 / rank, tokens=tokens)


def full_data() -> ReportData:
    edges = tuple(-0.002 + 0.0001 * i for i in range(41))
    counts = tuple(int(1e6 * math.exp(-(((e + 5e-5) / 3e-4) ** 2))) + 3 for e in edges[:-1])
    histogram = contents.ScoreHistogram(bin_edges=edges, counts=counts, tau=8.1e-4)
    unmasked = RankedDocument(
        doc_id=7, source="corpus.jsonl", rank=1, rank_score=0.5, tokens=(Token(text="A plain plum.", score=0.0),)
    )
    return ReportData(
        title="Guided pretraining of pythia-160m",
        behaviour="rudeness",
        continuations=25,
        models=(
            model("baseline", 0.6, 0.6, 5.1, 0.45),
            model("guided", 0.25, 0.2, 5.304, 0.433),
            model("word list", 0.49, 0.51, 5.2, 0.441, text=0.4),
        ),
        curves=(curve("baseline", False), curve("guided", True)),
        behaviours=(
            Behaviour(
                name="rudeness",
                histogram=dataclasses.replace(
                    histogram, annotated_counts=tuple(c // 40 + i for i, c in enumerate(histogram.counts))
                ),
                documents=tuple(
                    document(rank, f"You are  a plum pie,\n\nsaid {who} to the cat; nobody asked. " * 12)
                    for rank, who in ((1, "Anna"), (2, "Bernd"), (3, "Clara"))
                ),
                outliers=contents.Outliers(
                    high_mass=1,
                    repeated=2,
                    mass_ratio=10.0,
                    excluded=True,
                    rows=(
                        contents.OutlierRow(
                            block_id=77,
                            mass_over_median=31.25,
                            distinct_bigram_share=0.031,
                            repeated=True,
                            text="ha <ha> ha",
                        ),
                    ),
                ),
            ),
            Behaviour(
                name="flattery",
                trained=False,
                histogram=histogram,
                documents=(unmasked, document(2, "How very wise of you, as ever. " * 10)),
            ),
        ),
        agreement=(
            contents.AgreementRow(method="mask", selected=20_480, precision=0.312, recall=0.184, f1=0.2315),
            contents.AgreementRow(method="word list", selected=1_911, precision=0.64, recall=0.034, f1=0.0646),
            contents.AgreementRow(method="sentence classifier", selected=0, precision=None, recall=0.0),
        ),
        settings=(("prompts", "prompts.jsonl"), ("classifier", "detoxify:original")),
        software=(("ifguide", "0.1.0"), ("torch", "2.13.0")),
        config_text="run_dir: runs/demo\nseed: 0\nbuild_mask:\n  quantile: 0.99\n",
        provenance=(
            contents.ArtifactRow(
                verb="pack_corpus",
                folder="corpus",
                fingerprint="3f8a91c07d52e6b4",
                inputs=("corpus.jsonl",),
                created="2025-01-02 03:04",
                rows=12_345,
                seconds=7.25,
            ),
            contents.ArtifactRow(
                verb="score_corpus",
                folder="scores",
                fingerprint="91c07d52e6b43f8a",
                inputs=("corpus 3f8a91c0", "query 07d52e6b"),
                created="2025-01-02 05:04",
                rows=None,
                seconds=7_440.0,
            ),
        ),
    )


def row(name: str, emt: float | None, tp: float | None = None) -> ModelRow:
    """A model with one group of three prompts and one class."""
    of_class = ClassFigures(name="rudeness", emt=Figure(value=emt), tp=Figure(value=tp), mean=Figure(value=None))
    return ModelRow(
        name=name, sets=(PromptSet(name="prompts", groups=(Group(name="all", prompts=3, classes=(of_class,)),)),)
    )


def minimal_data(**changes: object) -> ReportData:
    return dataclasses.replace(
        ReportData(title="One model", behaviour="rudeness", models=(row("only", 0.5),), config_text="seed: 0\n"),
        **changes,  # type: ignore[arg-type]
    )


def large_data() -> ReportData:
    """As of ten thousand prompts in 43 groups, four models, and 200 documents of 600 tokens."""
    data = full_data()
    domains = {"profession": 18, "gender": 2, "race": 4, "religion": 7, "politics": 12}
    models = []
    for i, name in enumerate(("baseline", "guided", "words", "random")):
        small = model(name, 0.6 - 0.1 * i, 0.6 - 0.1 * i, 5.1 + 0.1 * i, 0.45)
        groups = tuple(
            group(f"{domain}/number {k}", 230, 0.3 + 0.02 * k, 0.6 - 0.1 * i, 0.6, i > 0, 0.02, domain)
            for domain, count in domains.items()
            for k in range(count)
        )
        bold = PromptSet(name="bold", groups=(small.sets[1].groups[0], *groups), gaps=small.sets[1].gaps)
        models.append(dataclasses.replace(small, sets=(small.sets[0], bold)))
    words = "You are a plum pie number {}, said the cat; nobody asked. "
    documents = tuple(document(rank, words.format(rank) * 50) for rank in range(1, 201))
    part = dataclasses.replace(data.behaviours[0], documents=documents)
    return dataclasses.replace(data, models=tuple(models), behaviours=(part,))
