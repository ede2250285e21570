"""The proxy model: loaded as factors, query and scores see it, and described to a driver by a few numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ifguide.architecture import require_positions
from ifguide.artifacts import require_same
from ifguide.config import ModelSource
from ifguide.documents import keeps_documents_apart
from ifguide.models import linearise, load_model, state_fingerprint, tracked_modules
from ifguide.tokenizer import beginning_token

BEGINNING, TEXTS = "beginning_token", "texts"  # in the inputs of an artifact


@dataclass(frozen=True, kw_only=True)
class ProxyFacts:
    """What a driver needs of the proxy. `fingerprint` is of its parameters, `untracked` the (name, parameters) of the
    blocks' modules that influence is not traced through, largest first, `coverage` the tracked share."""

    name: str
    fingerprint: str
    module_names: tuple[str, ...]
    untracked: tuple[tuple[str, int], ...]
    coverage: float
    vocab_size: int
    parameters: int

    def __str__(self) -> str:
        text = (
            f"proxy {self.name}: {self.parameters:,} parameters, {len(self.module_names)} tracked modules,"
            f" {self.coverage:.2%} of the blocks' parameters"
        )
        return text + (f"; untracked, largest first: {self.untracked[:3]}" if self.untracked else "")


def proxy_name(source: ModelSource) -> str:
    """What lines and errors call the proxy."""
    return source.source or "from architecture"


@dataclass(frozen=True)
class Beginning:
    """Where a text begins for the proxy: at each block and query, or, `of_documents`, at each document of a block as
    well, which then do not see each other. And the BOS (a token id) before every text; None of a proxy that was trained
    without.

    A model that never saw a text without a BOS gives the first tokens of such a text losses and activations unlike all
    others."""

    token: int | None
    of_documents: bool = False

    @classmethod
    def of(cls, tokenizer: Any, *, is_trained: bool, of_documents: bool = False) -> Beginning:
        """What the tokenizer puts before a text. A run's own plain model, this one's or another's, is trained on blocks
        alone, without."""
        return cls(None if is_trained else beginning_token(tokenizer), of_documents)

    @property
    def length(self) -> int:
        """Positions that it takes of the proxy's."""
        return int(self.token is not None)

    def inputs(self) -> dict[str, str]:
        """Its entries in the inputs of an artifact; without a BOS, and of whole blocks, there are none."""
        token = {} if self.token is None else {BEGINNING: str(self.token)}
        return token | ({TEXTS: "documents"} if self.of_documents else {})

    def require_of(self, folder: Path, inputs: Mapping[str, str]) -> None:
        """Refuse an artifact that was made with another BOS or of other texts. Raises MismatchError."""
        made, wanted = (entry.get(TEXTS, "blocks") for entry in (inputs, self.inputs()))
        require_same(
            f"what {folder} takes for a text", made, "this run (pretrain.document_attention)", wanted, "make it again"
        )
        made, wanted = (entry.get(BEGINNING, "none") for entry in (inputs, self.inputs()))
        require_same(f"the token before each text in {folder}", made, "this run's", wanted, "make it again")


def load_proxy(source: ModelSource, *, gpus: float) -> PreTrainedModel:
    """The proxy in fp32 on this worker's device, linearised: what factors, query, scores and its fingerprint are of."""
    return linearise(load_model(source, device="cuda" if gpus else "cpu"))


def load_same_proxy(
    source: ModelSource, *, gpus: float, fingerprint: str, whose: str = "the driver's"
) -> PreTrainedModel:
    """`load_proxy` on a worker. Another node may see another model under the proxy's name: `fingerprint` is that of
    the proxy to load, and `whose` proxy that is.

    Raises:
        MismatchError: another proxy lies on this node."""
    model = load_proxy(source, gpus=gpus)
    require_same("the proxy on this node", state_fingerprint(model), whose, fingerprint, "sync it")
    return model


def describe_proxy(source: ModelSource, beginning: Beginning, block_size: int, min_coverage: float) -> ProxyFacts:
    """Load the proxy, on the CPU, and describe it.

    Raises:
        FileNotFoundError: there is no such model. ValueError: less than `min_coverage` of it can be tracked, it has
            fewer positions than a block has tokens, with its BOS, or it cannot keep documents apart and is to.
    """
    model = load_proxy(source, gpus=0)
    if beginning.of_documents and not keeps_documents_apart(model):
        raise ValueError(
            f"pretrain.document_attention: {type(model).__name__}, the proxy, lets documents of a block see each other;"
            " set it to false, or choose a proxy of another family"
        )
    require_positions(source.source or "the proxy", model.config.to_dict(), block_size, beginning=beginning.length)
    tracked = tracked_modules(model, min_coverage=min_coverage)
    return ProxyFacts(
        name=proxy_name(source),
        fingerprint=state_fingerprint(model),
        module_names=tracked.names,
        untracked=tracked.untracked,
        coverage=tracked.coverage,
        vocab_size=model.config.get_text_config().vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
