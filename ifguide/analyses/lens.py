"""The logit lens: what the LM head would say of the residual stream after each block.

    p_l = softmax(head(norm(h_l)))        h_l: the stream at depth l, norm and head: the model's last ones

(nostalgebraist, "interpreting GPT: the logit lens", 2020). At the last depth that is the model's own prediction. The
figure is the mass p_l gives to a set of words after a prompt: of a word of tokens w_1 w_2 ... it is

    p_l(w_1 | prompt) p_l(w_2 | prompt w_1) ...

and not the mass of w_1 alone, a sub-word (`st`) that many other words begin with.

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

    def mass(self, texts: Sequence[Sequence[int]], words: Iterable[Sequence[int]], *, batch_size: int) -> np.ndarray:
        """(N, L + 1) float64: the probability at each depth that a text goes on with one of `words`, each of one token
        or more. A word that begins with the tokens of another is in that one's. ValueError where there are none.

        Cost: a pass over the texts for each different beginning of words, one if all of them are single tokens.
        """
        chosen = _disjoint(words)
        if not chosen:
            raise ValueError("no tokens for the lens; list words in evaluate.word_list")
        after: dict[tuple[int, ...], set[int]] = {}
        for word in chosen:
            for i, token in enumerate(word):
                after.setdefault(word[:i], set()).add(token)
        mass: dict[tuple[int, ...], np.ndarray] = {(): np.ones(1)}
        for beginning in sorted(after, key=len):
            tokens = sorted(after[beginning])
            next_NLK = self._next([[*text, *beginning] for text in texts], tokens, batch_size)
            for place, token in enumerate(tokens):
                mass[(*beginning, token)] = mass[beginning] * next_NLK[..., place]
        return np.sum([mass[word] for word in chosen], axis=0)

    def _next(self, texts: Sequence[Sequence[int]], tokens: list[int], batch_size: int) -> np.ndarray:
        """(N, L + 1, K) float64: the probability of each of K tokens after each text, at each depth."""
        parts = []
        for begin in range(0, len(texts), batch_size):
            logits_BLV = self.logits(texts[begin : begin + batch_size])
            logits_BLV = logits_BLV.to(torch.promote_types(logits_BLV.dtype, torch.float32))
            parts.append(logits_BLV.softmax(-1)[..., tokens].double().cpu().numpy())
        return np.concatenate(parts)


def _disjoint(words: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
    """The words, sorted, without those that begin with another: what goes on with them goes on with that one."""
    different = {tuple(word) for word in words if len(word)}
    return sorted(word for word in different if not any(word[:i] in different for i in range(1, len(word))))


def overrepresented_tokens(texts: Sequence[Sequence[int]], others: Sequence[Sequence[int]], count: int) -> list[int]:
    """The `count` tokens whose share in `texts` exceeds that in `others` most, by the ratio of shares after adding one
    to each count; of tokens that `texts` hold `MIN_COUNT` times or more. Ties by id."""
    mine, theirs = (Counter(token for ids in side for token in ids) for side in (texts, others))
    total, other_total = mine.total() + 1, theirs.total() + 1
    lead = {
        token: (occurrences + 1) / total / ((theirs[token] + 1) / other_total)
        for token, occurrences in mine.items()
        if occurrences >= MIN_COUNT
    }
    ranked = sorted(lead, key=lambda token: (-lead[token], token))
    return [token for token in ranked[:count] if lead[token] > 1]
