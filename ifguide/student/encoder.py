"""A student that reads the tokens: a small causal transformer, and a linear map of what it knows around each token.

With h_j the last states after token j has been read,

    score_j = w . [h_{j-1} ; h_j] + b

so a score may depend on the token itself and on all before it, and on none after it. The transformer is a Llama with
random weights, or the body of a pretrained model of the corpus' tokenizer. It does not read the proxy, so its pass does
not grow with that. `encoder_fit` trains it.

Cost: 2 N FLOP a token for the N parameters of the blocks; no LM head. The embeddings are looked up.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ifguide.artifacts import publish
from ifguide.config import Encoder, ModelSource
from ifguide.documents import keeps_documents_apart, last_hidden_state
from ifguide.lm_head import output_embedding
from ifguide.models import load_model, predicted_positions
from ifguide.student.pretrained import KEY

FIELDS, WEIGHTS = "fields", "weights."  # in a student's file


def encoder_source(options: Encoder, vocabulary: int, block_size: int) -> ModelSource:
    """The transformer that is trained: the one that is named, or a Llama of the sizes. `vocabulary`: token ids."""
    if options.source is not None:
        return ModelSource(source=options.source)
    fields = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": options.hidden_size,
        "intermediate_size": 8 * math.ceil(options.hidden_size / 3),
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.heads,
        "max_position_embeddings": block_size,
        "tie_word_embeddings": True,
    }
    return ModelSource(architecture=fields)


def require_apart(source: str) -> None:
    """Refuse a pretrained encoder that lets documents of a block see each other; loads it, on the CPU.

    Raises:
        ValueError: it does; names its family.
    """
    model = load_model(ModelSource(source=source))
    if not keeps_documents_apart(model):
        raise ValueError(
            f"pretrain.document_attention: {type(model).__name__}, the encoder, lets documents of a block see each"
            f" other; set it to false, or choose a {KEY} of another family, or none"
        )


class TokenRegression(nn.Module):
    """A transformer's body and a linear map of its states around each token to S numbers. `width` is that of its last
    states, which the config's may not be (OPT-350M)."""

    def __init__(self, body: PreTrainedModel, width: int, outputs: int):
        super().__init__()
        self.body = body
        self.head = nn.utils.skip_init(nn.Linear, 2 * width, outputs)  # or it would draw weights to throw away
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def begin(cls, source: ModelSource, outputs: int, *, seed: int) -> TokenRegression:
        """Before training, on the CPU, in eval mode; the seed decides the weights of an architecture.

        Raises:
            ValueError: its LM head is no `nn.Linear`."""
        model = load_model(source, seed=seed)
        return cls(cast(PreTrainedModel, model.base_model), output_embedding(model).in_features, outputs).eval()

    def forward(self, tokens_BT: Tensor, document_BT: Tensor | None = None) -> Tensor:
        """(B, T, S) float32, label-aligned: entry j has read the tokens up to j. Documents that are given do not see
        each other; the first entry of a text holds anything. The map is float32 under autocast, too: scores of 8 bits
        would tie."""
        after_BTD = last_hidden_state(self.body, tokens_BT, document_BT).float()
        before_BTD = F.pad(after_BTD[:, :-1], (0, 0, 1, 0))
        with torch.autocast(after_BTD.device.type, enabled=False):
            scores_BTS: Tensor = self.head(torch.cat([before_BTD, after_BTD], dim=-1))
        return scores_BTS


class EncoderStudent:
    """A regression of one number. `low_precision`: bfloat16 products in the body, where it is on a GPU."""

    def __init__(self, regression: TokenRegression, *, low_precision: bool = False):
        self.regression, self.low_precision = regression.eval(), low_precision

    @property
    def device(self) -> torch.device:
        return self.regression.head.weight.device

    @torch.no_grad()
    def score(self, tokens_BT: Tensor, lengths_B: Tensor, document_BT: Tensor | None = None) -> Tensor:
        """Scores (B, T), float32, label-aligned; what has no prediction is exactly 0. document_BT: as
        `TokenScorer.score`."""
        tokens_BT, lengths_B = tokens_BT.to(self.device), lengths_B.to(self.device)
        document_BT = None if document_BT is None else document_BT.to(self.device)
        with low_precision(self.device, wanted=self.low_precision):
            scores_BT = self.regression(tokens_BT, document_BT)[..., 0]
        return scores_BT.masked_fill(~predicted_positions(tokens_BT, lengths_B, document_BT), 0.0)

    def save(self, path: Path) -> None:
        """Publish what `load` reads: the fields of the body's config as JSON, and all weights."""
        weights = {f"{WEIGHTS}{name}": own.cpu().numpy() for name, own in self.regression.state_dict().items()}
        fields = json.dumps(self.regression.body.config.to_dict())
        with publish(path) as part, part.open("wb") as file:
            np.savez(file, **{FIELDS: np.array(fields), **weights})

    @classmethod
    def load(cls, path: Path, *, device: str = "cpu", low_precision: bool = False) -> EncoderStudent:
        """What `save` wrote."""
        with np.load(path) as saved:
            fields: dict[str, Any] = json.loads(str(saved[FIELDS]))
            weights = {
                name.removeprefix(WEIGHTS): torch.from_numpy(saved[name]) for name in saved.files if name != FIELDS
            }
        with torch.random.fork_rng(devices=[]):  # weights that are drawn and thrown away
            body = AutoModel.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
        for module in body.modules():
            if isinstance(module, nn.Embedding):
                module.padding_idx = None
        outputs, inputs = weights["head.weight"].shape
        regression = TokenRegression(body, inputs // 2, outputs)
        regression.load_state_dict(weights)
        return cls(regression.to(device), low_precision=low_precision)


def low_precision(device: torch.device, *, wanted: bool) -> torch.autocast:
    """Where products are bfloat16: on a GPU, if wanted."""
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=wanted and device.type == "cuda")
