"""The `fit_student` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ifguide.config.typed_yaml import ConfigError, option


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """The causal transformer of an `encoder` student, and its training.

    Attributes:
        source: local folder or hub id of a causal LM of the corpus' tokenizer, whose body is trained further. Null: a
            Llama of the sizes below with random weights. They are of that alone.
        hidden_size: width of its states; its MLPs are 8/3 as wide.
        layers: transformer blocks.
        heads: attention heads. Each has an even share of the width.
        epochs: passes over the fitted blocks at most. The one whose scores find most in the held-out blocks is kept.
        patience: epochs that may find no more than the best one before them, until training stops.
        learning_rate: of AdamW at its highest, after a warm-up over the first twentieth; it falls as a cosine.
        batch_tokens: of one step, in whole blocks, one at least. A small sample wants many steps.
    """

    source: str | None = None
    hidden_size: int = option(256, at_least=2)
    layers: int = option(3, at_least=1)
    heads: int = option(4, at_least=1)
    epochs: int = option(10, at_least=1)
    patience: int = option(3, at_least=1)
    learning_rate: float = option(1e-3, above=0)
    batch_tokens: int = option(1024, at_least=1)


@dataclass(frozen=True, kw_only=True)
class FitStudent:
    """A student of the token scores, fitted on a random sample of the corpus that is scored exactly. Made only where
    `score_corpus.scorer` is not `exact`.

    Attributes:
        kind: `head` reads the proxy's hidden states in one ordinary forward pass. `suffix` takes V in the last third of
            the proxy's blocks alone. `encoder` is a small transformer that reads the tokens, and `ngram` looks the last
            ones up; neither wants the proxy beyond the sample.
        sample_fraction: share of the corpus' blocks that are scored exactly, the same of every source.
        held_out: share of these that the student's options are chosen on.
        partitions: parts of the sample. A part is one piece of work, and the unit of resuming. Its worker has
            `score_corpus.resources`.
        encoder: of kind `encoder`.
    """

    kind: Literal["head", "suffix", "encoder", "ngram"] = "head"
    sample_fraction: float = option(0.01, above=0, at_most=1)
    held_out: float = option(0.25, above=0, at_most=0.9)
    partitions: int = option(1, at_least=1)
    encoder: Encoder = option(Encoder(), off=Encoder())  # noqa: RUF009  # frozen


def check_fit_student(student: FitStudent) -> None:
    """Raises ConfigError where options do not go together."""
    encoder = student.encoder
    if encoder.hidden_size % (2 * encoder.heads):
        raise ConfigError(
            f"fit_student.encoder.heads: {encoder.heads} heads give no even share of hidden_size ="
            f" {encoder.hidden_size}; make it a multiple of {2 * encoder.heads}"
        )
