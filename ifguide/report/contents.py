"""What a report says: the figures of a run as plain dataclasses. `page` makes HTML and JSON of it."""

from __future__ import annotations

from dataclasses import dataclass

from ifguide.report.figures import ModelRow


@dataclass(frozen=True, kw_only=True)
class TrainingCurve:
    """Losses in nats per token, one entry per logged step; `masked_loss` has None where no token was masked."""

    model: str
    steps: tuple[int, ...]
    benign_loss: tuple[float, ...]
    learning_rate: tuple[float, ...]
    masked_loss: tuple[float | None, ...] | None = None

    def __post_init__(self) -> None:
        columns = {"benign_loss": self.benign_loss, "learning_rate": self.learning_rate}
        for name, column in {**columns, "masked_loss": self.masked_loss}.items():
            if column is not None and len(column) != len(self.steps):
                raise ValueError(f"curve {self.model!r}: {len(self.steps)} steps but {len(column)} {name}")


@dataclass(frozen=True, kw_only=True)
class ScoreHistogram:
    """Tokens per score bin: of the whole corpus and, where annotations exist, of the annotated tokens. `measure` names
    what a score is; `ranks`: it is a mean of ranks, in (0, 1), and has no sign."""

    bin_edges: tuple[float, ...]
    counts: tuple[int, ...]
    tau: float
    annotated_counts: tuple[int, ...] | None = None
    measure: str = "influence score"
    ranks: bool = False

    def __post_init__(self) -> None:
        for name, counts in (("counts", self.counts), ("annotated_counts", self.annotated_counts)):
            if counts is not None and len(counts) + 1 != len(self.bin_edges):
                raise ValueError(f"histogram: {len(self.bin_edges)} bin_edges need one less {name}, got {len(counts)}")


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token's text, its label-aligned influence score if it has one, and whether it is masked and annotated."""

    text: str
    score: float | None
    masked: bool = False
    annotated: bool = False


@dataclass(frozen=True, kw_only=True)
class RankedDocument:
    """A document of the ranking with its tokens; `rank` counts from 1."""

    doc_id: int | str
    source: str
    rank: int
    rank_score: float
    tokens: tuple[Token, ...]


@dataclass(frozen=True, kw_only=True)
class OutlierRow:
    """A block that stands out: score mass over the median block's, share of distinct bigrams, how it begins."""

    block_id: int
    mass_over_median: float
    distinct_bigram_share: float
    repeated: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """How many blocks stand out, by which limits, the heaviest of them; `excluded`: repeated ones are not masked."""

    rows: tuple[OutlierRow, ...]
    high_mass: int
    repeated: int
    mass_ratio: float
    excluded: bool


@dataclass(frozen=True, kw_only=True)
class AgreementRow:
    """How the tokens that `method` selects agree with the annotations; None where undefined.

    `method` says of how many documents that is, if not of all."""

    method: str
    selected: int
    precision: float | None
    recall: float | None
    f1: float | None = None


@dataclass(frozen=True, kw_only=True)
class ArtifactRow:
    """One artifact's manifest. `inputs` name what it was made from; `created` is shown as given."""

    verb: str
    folder: str
    inputs: tuple[str, ...]
    fingerprint: str
    created: str
    rows: int | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What the scores of one behaviour say: their distribution, its highest-ranked documents, its odd blocks.

    `trained`: the mask that a model was trained with is of this behaviour. `plain`: it has no null scores, so its mask
    goes by scores, where that one goes by z-scores. `scored`: the tables of its scores are there; else there is no
    histogram, and no token has a score. `dominant`: a warning of the one document that takes much of the mask."""

    name: str
    trained: bool = True
    plain: bool = False
    scored: bool = True
    histogram: ScoreHistogram | None = None
    documents: tuple[RankedDocument, ...] = ()
    outliers: Outliers | None = None
    dominant: str = ""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All of a report. `models[0]` is the baseline the others are compared with. What is empty or None has no
    section on the page. `settings`: how it was measured, as (what, value). `behaviour` is what the classifier looks
    for, `behaviours` what the corpus was scored for, the mask's first. ValueError without a model, or on two of one
    name."""

    title: str
    behaviour: str
    models: tuple[ModelRow, ...]
    config_text: str
    continuations: int | None = None
    threshold: float = 0.5
    confidence: float = 0.95
    curves: tuple[TrainingCurve, ...] = ()
    behaviours: tuple[Behaviour, ...] = ()
    agreement: tuple[AgreementRow, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    software: tuple[tuple[str, str], ...] = ()
    provenance: tuple[ArtifactRow, ...] = ()

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if not names or len(set(names)) < len(names) or not all(model.sets and model.groups for model in self.models):
            raise ValueError(f"a report needs models of different names, each with a prompt group; got {names}")
