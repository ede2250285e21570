"""The logit lens: what the LM head would say of the residual stream after each block.

    p_l = softmax(head(norm(h_l)))        h_l: the stream at depth l, norm and head: the model's last ones

(nostalgebraist, "interpreting GPT: the logit lens", 2020). At the last depth that is the model's own prediction. The
figure is the mass p_l gives to a set of tokens at a prompt's last position.

The head runs as the model runs it, with its scales and soft caps: the stream of all depths takes the place of the last
hidden states within one forward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ifguide.analyses.residuals import decoder_of, final_norm, padded, recorded_residuals
from ifguide.evaluation.generation import evaluating

MIN_COUNT = 3  # of a token, to be called over-represented


class LogitLens:
    """A lens on one model.

    Raises ValueError naming the model: it has no last norm, or the lens at the last depth is not the model's own
    prediction (something lies between norm and head).
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.norm = model, final_norm(model)
        probe = (torch.arange(1, 9) % model.config.get_text_config().vocab_size).tolist()
        with evaluating(model):
            own_V = model(torch.tensor([probe], device=model.device), use_cache=False).logits[0, -1].float()
        error = (self.logits([probe])[0, -1].float() - own_V).abs().max() / own_V.abs().max().clamp(min=1.0)
        tolerance = 5e-2 if model.dtype == torch.bfloat16 else 1e-4
        if not error <= tolerance:
            raise ValueError(
                f"{type(model).__name__}: its logits are not its last norm and LM head applied to its last block's"
                " output; leave this model out of the analysis"
            )

    def logits(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """(B, L + 1, V): the lens at each depth at the last token of each text of token ids."""
        tokens_BT, lengths_B = padded(texts, self.model.device)
        rows_B = torch.arange(len(texts), device=self.model.device)
        with evaluating(self.model), recorded_residuals(self.model) as depths:

            def replace(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
                stream_BLD = torch.stack([depth[rows_B, lengths_B - 1] for depth in depths], dim=1)
                output.last_hidden_state = self.norm(stream_BLD)
                return output

            handle = decoder_of(self.model).register_forward_hook(replace)
            try:
                return self.model(tokens_BT, use_cache=False).logits
            finally:
                handle.remove()

    def mass(self, texts: Sequence[Sequence[int]], tokens: Iterable[int], *, batch_size: int) -> np.ndarray:
        """(N, L + 1) float64: the probability of `tokens` together at each depth. ValueError where there are none."""
        chosen = sorted(set(tokens))
        if not chosen:
            raise ValueError("no tokens for the lens; list words in evaluate.word_list")
        parts = []
        for begin in range(0, len(texts), batch_size):
            logits_BLV = self.logits(texts[begin : begin + batch_size])
            logits_BLV = logits_BLV.to(torch.promote_types(logits_BLV.dtype, torch.float32))
            parts.append(logits_BLV.softmax(-1)[..., chosen].sum(-1).double().cpu().numpy())
        return np.concatenate(parts)


def overrepresented_tokens(texts: Sequence[Sequence[int]], others: Sequence[Sequence[int]], count: int) -> list[int]:
    """The `count` tokens whose share in `texts` exceeds that in `others` most, by the ratio of shares after adding one
    to each count; of tokens that `texts` hold `MIN_COUNT` times or more. Ties by id."""
    mine, theirs = (Counter(token for ids in each for token in ids) for each in (texts, others))
    total, other_total = mine.total() + 1, theirs.total() + 1
    lead = {
        token: (found + 1) / total / ((theirs[token] + 1) / other_total)
        for token, found in mine.items()
        if found >= MIN_COUNT
    }
    ranked = sorted(lead, key=lambda token: (-lead[token], token))
    return [token for token in ranked[:count] if lead[token] > 1]
