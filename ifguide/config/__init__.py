"""One typed YAML for the whole pipeline: `sections` holds the tree, a module each what grew too long for it.

`typed_yaml` is generic, `sources` says where inputs come from, `resources` what processes take of the cluster;
`pretrain`, `evaluate`, `compare` and `analyse` are sections. `reference` prints docs/config.md.
"""

from ifguide.config.evaluate import Evaluate
from ifguide.config.fit_student import Encoder, FitStudent
from ifguide.config.names import check_names
from ifguide.config.pretrain import Pretrain
from ifguide.config.score_corpus import ScoreCorpus
from ifguide.config.secrets import redact
from ifguide.config.sections import (
    OWN,
    VERBS,
    BuildMask,
    BuildQuery,
    Cluster,
    Config,
    FitFactors,
    ModelSource,
    PackCorpus,
    check_student,
    config_from_mapping,
    load_config,
    result_options,
    to_mapping,
    to_yaml,
)
from ifguide.config.sources import ClassifierSource, Completions, Input, LabelledTexts, Pairs, Prompts, PromptSet
from ifguide.config.typed_yaml import ConfigError

__all__ = [
    "OWN",
    "VERBS",
    "BuildMask",
    "BuildQuery",
    "ClassifierSource",
    "Cluster",
    "Completions",
    "Config",
    "ConfigError",
    "Encoder",
    "Evaluate",
    "FitFactors",
    "FitStudent",
    "Input",
    "LabelledTexts",
    "ModelSource",
    "PackCorpus",
    "Pairs",
    "Pretrain",
    "PromptSet",
    "Prompts",
    "ScoreCorpus",
    "check_names",
    "check_student",
    "config_from_mapping",
    "load_config",
    "redact",
    "result_options",
    "to_mapping",
    "to_yaml",
]
