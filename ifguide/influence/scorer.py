"""One influence score per token of a corpus block, by contracting directions V with token gradients.

Method (IF-Guide, arXiv 2506.01790). With a_t the input and g_t the loss gradient at the output of a tracked
linear module at position t (a bias is one more, constant, input column), two attributions:

- `target`, Eq. 8:  s_j = <V, grad NLL_j>, the derivative of token j's own loss along V. No backward pass, no graph.
- `position`, what the paper's code computes:  s_t = sum over modules of g_t^T V a_t, with g_t the gradient of the
  whole block's summed NLL.

Summed over a block without a BOS before it the two are equal; token by token they are not: `position` at t mixes in
the losses of all later tokens.

Engines: `forward` (target, exact, in the model's own precision), `difference` (target, two streams and fused kernels,
any precision and rank: what the `fast` preset uses) and, for `position`, `backward`.

Alignment: returned scores are label-aligned. score[b, j] speaks of predicting token j, so `position` is
shifted by one (what happens at t predicts token t + 1). Index 0 and padding are exactly 0.
Sign: positive means that training on the token makes the positive completions of V more likely.

Cost: with one direction 6N FLOP per token for N tracked parameters at full rank, 4N at low rank (and for `difference`
at full rank in float32). Nothing of the size (tokens, vocabulary) is ever held.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ifguide.documents import Begun, begun
from ifguide.influence.backward import BackwardEngine
from ifguide.influence.difference import DifferenceEngine
from ifguide.influence.directions import energy_report, split_directions
from ifguide.influence.forward import ForwardEngine
from ifguide.influence.method import PRESETS, Attribution, Method
from ifguide.influence.states import taken_states
from ifguide.models import predicted_positions, transformer_blocks


class Engine(Protocol):
    """Scores (K, B, T), label-aligned; entries without a prediction may hold anything. With `fixed_sizes`, batches of
    another number of blocks cost a compilation."""

    fixed_sizes: bool

    def score(self, tokens_BT: Tensor, lengths_B: Tensor, document_BT: Tensor | None = None) -> Tensor: ...

    def primal(self, streams: Tensor, layer: int) -> Tensor:
        """The hidden states (B, T, D) in what flows out of a layer of the model (`influence.states`)."""

    def tangents(self, streams: Tensor, layer: int) -> Tensor:
        """Their derivatives (K, B, T, D) along the directions. Raises ValueError where the engine takes none."""


class Pass(NamedTuple):
    """Scores (K, B, T), hidden states (B, T, D) by layer, and the derivatives (K, B, T, D) of the final ones along the
    directions, or None."""

    scores_KBT: Tensor
    states: list[Tensor]
    tangents_KBTD: Tensor | None


class TokenScorer:
    """Scores packed blocks with one model and one or several directions.

    It turns off `requires_grad` of the model's parameters, and leaves the model otherwise as it is; several scorers can
    share a model.

    directions: tracked module -> (d_out, d_in), or (d_out, d_in + 1) with a bias; any floating dtype. One mapping, or a
    sequence of K of them over the same modules: K behaviours are scored in one pass.
    steps: of the `difference` engine, as another scorer of the same model and directions gave them (`.steps`).
    beginning: a BOS that the model reads before every text, which has no score; None: nothing. A text is a block, or
    each document in it where documents are given.

    Raises ValueError when a direction names no `nn.Linear` of the model or has another shape, when there is
    none, when the model is in training mode (dropout would make the scores random) or of a dtype that the engine cannot
    score in, when its LM head is not one that is understood, or when the options do not go together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        directions: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
        *,
        attribution: Attribution,
        method: Method = PRESETS["exact"],
        steps: Sequence[float] | None = None,
        beginning: int | None = None,
    ) -> None:
        if attribution not in ("target", "position"):
            raise ValueError(f"attribution is {attribution!r}; it must be 'target' or 'position'")
        if model.training:
            raise ValueError("the model is in training mode; call model.eval() before scoring")
        _require_precision(model, attribution, method)
        self.model = model.requires_grad_(False)
        self.attribution, self.method, self.beginning = attribution, method, beginning
        self._several = not isinstance(directions, Mapping)
        of_behaviours = [directions] if isinstance(directions, Mapping) else list(directions)
        if any(V.keys() != of_behaviours[0].keys() for V in of_behaviours):
            raise ValueError("the directions are of different modules; all must be of one proxy")
        split = [split_directions(model, V, rank=method.rank) for V in of_behaviours]
        if not split:
            raise ValueError("no directions to score with; build the query first")
        self.energy = energy_report(split)
        product_dtype = torch.bfloat16 if method.precision == "bfloat16" else None
        self.steps: list[float] | None = None
        self._engine: Engine
        if attribution == "position":
            self._engine = BackwardEngine(model, split, product_dtype=product_dtype)
        elif method.engine == "difference":
            self._engine = DifferenceEngine(model, split, product_dtype=product_dtype, steps=steps, fused=method.fused)
            self.steps = self._engine.steps
        elif product_dtype is None:
            self._engine = ForwardEngine(model, split)
        else:
            raise ValueError("engine forward runs in the model's own precision; use precision float32 or difference")
        self._engine.head.check(model)

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The model's blocks, in order: found once, for finding them counts every parameter."""
        return transformer_blocks(self.model)[1]

    def score(
        self, tokens_BT: Tensor, lengths_B: Tensor, document_BT: Tensor | None = None, *, usual_blocks: int = 0
    ) -> Tensor:
        """Scores (B, T), or (K, B, T) of a sequence of directions; label-aligned, on the model's device.

        float32, or float64 if the model is. tokens_BT: int64, padded on the right with any valid id; lengths_B: real
        tokens of each row. document_BT: int64, the number of each token's document, ascending; documents then do not
        see each other, and the first token of each has no score (`ifguide.documents`). None: a block is one text.
        usual_blocks: B of most calls; a smaller batch is padded to it where the engine has fixed sizes.
        """
        read = self._read(tokens_BT, lengths_B, document_BT)
        return self._scores(tokens_BT, lengths_B, document_BT, read, usual_blocks)

    def score_and_read(
        self,
        tokens_BT: Tensor,
        lengths_B: Tensor,
        layers: Sequence[int],
        document_BT: Tensor | None = None,
        *,
        usual_blocks: int = 0,
        tangents: bool = False,
    ) -> Pass:
        """The scores (K, B, T) as above, and of the same pass the hidden states (B, T, D) of each of `layers`
        (`influence.states`); entry t has read the tokens up to t. And the `tangents` of the final ones, if wanted.

        Raises ValueError when they are, and the engine takes none, as that of `position`."""
        top, read = len(self.blocks), self._read(tokens_BT, lengths_B, document_BT)
        with (
            taken_states(self.model, self.blocks, [top] if tangents else [], self._engine.tangents) as final,
            taken_states(self.model, self.blocks, layers, self._engine.primal) as states,
        ):
            scores = self._scores(tokens_BT, lengths_B, document_BT, read, usual_blocks)
        return Pass(
            scores if self._several else scores[None],
            [read.own(states[layer][: len(tokens_BT)], 0) for layer in layers],
            read.own(final[top][:, : len(tokens_BT)], 1) if tangents else None,
        )

    def score_one_by_one(self, tokens_BT: Tensor, lengths_B: Tensor, document_BT: Tensor | None = None) -> Tensor:
        """As `score`, on the CPU, a block at a time: of little memory, for samples."""
        several = (slice(b, b + 1) for b in range(len(tokens_BT)))
        scores = [
            self.score(tokens_BT[b], lengths_B[b], None if document_BT is None else document_BT[b]).cpu()
            for b in several
        ]
        return torch.cat(scores, dim=1 if self._several else 0)

    def _read(self, tokens_BT: Tensor, lengths_B: Tensor, document_BT: Tensor | None) -> Begun:
        """The blocks as the model reads them, on its device."""
        device = self.model.device
        documents = None if document_BT is None else document_BT.to(device)
        return begun(tokens_BT.to(device), lengths_B.to(device), documents, self.beginning)

    def _scores(
        self, tokens_BT: Tensor, lengths_B: Tensor, document_BT: Tensor | None, read: Begun, usual_blocks: int
    ) -> Tensor:
        """As `score`."""
        missing = max(0, usual_blocks - len(tokens_BT)) if self._engine.fixed_sizes else 0
        documents = None if read.document_BU is None else F.pad(read.document_BU, (0, 0, 0, missing))
        padded = F.pad(read.tokens_BU, (0, 0, 0, missing)), F.pad(read.lengths_B, (0, missing)), documents
        scores_KBT = read.own(self._engine.score(*padded)[:, : len(tokens_BT)], 1)
        predicted_BT = predicted_positions(tokens_BT, lengths_B, document_BT).to(scores_KBT.device)
        scores_KBT = scores_KBT.masked_fill(~predicted_BT, 0.0)
        scores_KBT = scores_KBT if scores_KBT.dtype == torch.float64 else scores_KBT.float()
        return scores_KBT if self._several else scores_KBT[0]


def _require_precision(model: PreTrainedModel, attribution: Attribution, method: Method) -> None:
    """Refuse float16, in which losses overflow, and for the difference engine all but its streams' precisions."""
    differences = attribution == "target" and method.engine == "difference"
    if model.dtype == torch.float16 or (differences and model.dtype not in (torch.float32, torch.float64)):
        engine = "engine difference" if differences else "scoring"
        raise ValueError(f"the model is of {model.dtype}, which {engine} cannot take; call model.float() before")
