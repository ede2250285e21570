"""What makes toxicity the behaviour: classifiers, prompt tables, and the two query sets made from them."""

from ifguide.toxicity.classifiers import (
    CLASSIFIERS,
    Classifier,
    DetoxifyClassifier,
    LabelClassifier,
    ProfanityClassifier,
    SequenceClassifier,
    WordListClassifier,
    classifier_inputs,
    known_classes,
    load_classifier,
    make_classifier,
)
from ifguide.toxicity.fitted import FittedClassifier
from ifguide.toxicity.prompts import (
    WHOLE,
    GroupedPrompt,
    LabelledText,
    PromptRow,
    labelled_texts,
    read_grouped_prompts,
    read_labelled,
    read_prompt_rows,
    read_prompts,
)
from ifguide.toxicity.queries import QuerySets, choose_queries, select_queries

__all__ = [
    "CLASSIFIERS",
    "WHOLE",
    "Classifier",
    "DetoxifyClassifier",
    "FittedClassifier",
    "GroupedPrompt",
    "LabelClassifier",
    "LabelledText",
    "ProfanityClassifier",
    "PromptRow",
    "QuerySets",
    "SequenceClassifier",
    "WordListClassifier",
    "choose_queries",
    "classifier_inputs",
    "known_classes",
    "labelled_texts",
    "load_classifier",
    "make_classifier",
    "read_grouped_prompts",
    "read_labelled",
    "read_prompt_rows",
    "read_prompts",
    "select_queries",
]
