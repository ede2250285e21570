"""The names of the folders of a run directory: here and nowhere else. `Run` makes paths of them."""

from __future__ import annotations

CORPUS, FACTORS, QUERY, STUDENT, SCORES = "corpus", "factors", "query", "student", "scores"
ENSEMBLE, RANKING, MASK = "ensemble", "ranking", "mask"
MODEL, BASELINE, PENALISED = "model", "baseline", "penalised"  # the two are folders of the first
EXPORT = "hf"  # in the folder of a model: what transformers loads
GENERATIONS, REPORT, ANALYSES = "generations", "report", "analyses"
COMPARE = "compare"  # of a comparison, with a run directory for each method
TARGET = "target"  # of a corpus and a mask in the tokens of a target with another tokenizer
FOLDERS = (  # the artifacts of a run, in pipeline order
    CORPUS,
    f"{MODEL}/{BASELINE}",
    FACTORS,
    QUERY,
    SCORES,
    RANKING,
    MASK,
    f"{MODEL}/{PENALISED}",
    REPORT,
)
ROOMS = frozenset(name.partition("/")[0] for name in FOLDERS[:-1]) | {  # what `evaluate.report` may not name
    ANALYSES,
    COMPARE,
    ENSEMBLE,
    GENERATIONS,
    STUDENT,
    TARGET,
}
