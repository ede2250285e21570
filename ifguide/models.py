"""Proxy and target language models, and which of their modules influence is traced through.

Models come from a hub id, a local folder, a .gguf file (dequantised on loading), or an architecture with
random weights. The tracked modules are found by structure, so that no model family needs a list of names:
the transformer blocks are the `nn.ModuleList` that holds most parameters, and every plain `nn.Linear` inside
them is tracked. Embeddings and LM head lie outside. `linearise` first brings a proxy to that form where it is
only written otherwise (GPT-2's `Conv1D`, OPT's flattened MLP). A weight matrix that stays out of reach (experts,
quantised layers, adapters) is refused by name, for scores that miss it would say nothing of having missed it;
norms and embeddings inside the blocks are reported, and count against a coverage threshold.

Cost: one model in memory. `state_fingerprint` reads every parameter once (about 1 GB/s).

It does not train, quantise or shard a model.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomGelu
from transformers.models.opt.modeling_opt import OPTDecoderLayer
from transformers.pytorch_utils import Conv1D

from ifguide.architecture import named_errors
from ifguide.artifacts import file_digest, folder_digest, json_digest
from ifguide.config import ModelSource
from ifguide.documents import begins_document
from ifguide.tokenizer import locate

logger = logging.getLogger(__name__)

IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class TrackedModules:
    """`names` in model order; `untracked` (name, parameters) of the rest of the blocks, largest first;
    `coverage` the tracked share of the blocks' parameters, 0 to 1."""

    names: tuple[str, ...]
    untracked: tuple[tuple[str, int], ...]
    coverage: float


def load_model(
    model: ModelSource,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """The causal LM that `model` names, in eval mode, on `device`.

    attn_implementation: transformers' name; None is SDPA, or eager attention for an architecture that SDPA cannot
    express (Gemma 2's soft-capping, GPT-Neo).
    `seed` decides the random weights of an `architecture`, drawn on the CPU so that every device gets the
    same ones; the process' own random state is left as it was.

    Raises ValueError unless exactly one of `source` and `architecture` is set, or when the architecture is
    not one transformers knows; FileNotFoundError when a local source does not exist.
    """
    if (model.source is None) == (model.architecture is None):
        raise ValueError("a model needs exactly one of source and architecture; set one and leave the other out")
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    if model.architecture is not None:
        loaded = _random_model(model.architecture, seed, options)
    else:
        assert model.source is not None
        location, location_options = locate(model.source, model.revision, model.trust_remote_code, weights=True)
        _require_file(model.source, location, "config.json", unless="gguf_file" in location_options)
        with named_errors(model.source):
            loaded = AutoModelForCausalLM.from_pretrained(location, **location_options, **options)
    for module in loaded.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # packed blocks hold no padding: that id is a token, whose row must be trained
    # It is on the CPU already, or where ZeRO-3 has placed its parts as it was made: DeepSpeed moves none back there.
    if torch.device(device).type != "cpu":
        nn.Module.to(loaded, device)  # transformers' wrapper of it has no types
    return loaded.eval()


def max_positions(model: PreTrainedModel) -> int:
    """The longest input of the model, in tokens."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


def _random_model(architecture: dict[str, Any], seed: int, options: dict[str, Any]) -> PreTrainedModel:
    if "model_type" not in architecture:
        raise ValueError(f"architecture needs model_type (llama, gpt_neox, ...); it has {sorted(architecture)}")
    config = AutoConfig.for_model(**architecture)
    padding, config.pad_token_id = config.pad_token_id, None  # or that token's embedding would start as zeros
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, **options)
    model.config.pad_token_id = model.generation_config.pad_token_id = padding
    return model


def source_fingerprint(source: str, revision: str | None = None) -> str:
    """Of a model's files, if it is a local or remote one; of a hub id, the commit that it stands for now, and where
    neither the hub nor this machine's cache says that, its name.

    Raises:
        FileNotFoundError: there is no such file or folder.
    """
    place, options = locate(source, revision, False)
    path = Path(place)
    if "gguf_file" in options:
        return file_digest(path / options["gguf_file"])
    if path.is_dir():
        return folder_digest(path)
    try:  # its snapshot, as `from_pretrained` finds it
        return Path(hf_hub_download(source, "config.json", revision=revision)).parent.name
    except (OSError, ValueError) as error:
        logger.warning("%s is told by its name, as its commit is not known: %s", source, error)
        return json_digest(source if revision is None else [source, revision])


def _require_file(source: str, location: str, name: str, *, unless: bool) -> None:
    if not unless and Path(location).is_dir() and not (Path(location) / name).is_file():
        raise FileNotFoundError(f"{source}: the folder has no {name}; name a folder made by save_pretrained")


def linearise(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with every linear map of the blocks a plain `nn.Linear` on (B, T, d); changes `model`.

    - GPT-2's `Conv1D` becomes an `nn.Linear` of the transposed weight, under the same name.
    - OPT's blocks flatten (B, T, d) to (B T, d) around their MLP. kronfluence takes the first axis for the
      sequence, so Lambda would be of tokens: these blocks compute on (B, T, d) instead.

    Other models are returned as they are. A linearised GPT-2 has other shapes than its checkpoint, so it is for
    tracing influence, not for saving; `state_fingerprint` is then of the linearised weights.
    """
    for name, module in list(model.named_modules()):
        if type(module) is Conv1D:
            parent_name, _, child_name = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child_name, _as_linear(module))
        elif type(module) is BloomGelu:
            parent_name, _, child_name = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child_name, nn.GELU(approximate="tanh"))
        elif type(module) is OPTDecoderLayer:
            module.__class__ = _SequenceOPTDecoderLayer
    return model


def _as_linear(convolution: Conv1D) -> nn.Linear:
    # Without storage of its own: both parameters are replaced.
    linear = nn.Linear(convolution.nx, convolution.nf, device="meta")
    trainable = convolution.weight.requires_grad
    linear.weight = nn.Parameter(convolution.weight.detach().T.contiguous(), requires_grad=trainable)
    linear.bias = convolution.bias
    return linear.train(convolution.training)


class _SequenceOPTDecoderLayer(OPTDecoderLayer):
    """OPT's block without its flattening: each norm before its branch, or (the 350m) after the residual sum."""

    # The decoder names every argument but the first.
    def forward(self, hidden_states: Tensor, use_cache: bool | None = None, **kwargs: Any) -> Tensor:
        def attend(inputs_BTD: Tensor) -> Tensor:
            return cast(Tensor, self.self_attn(hidden_states=inputs_BTD, **kwargs)[0])

        def transform(inputs_BTD: Tensor) -> Tensor:
            return cast(Tensor, self.fc2(self.activation_fn(self.fc1(inputs_BTD))))

        for branch, norm in ((attend, self.self_attn_layer_norm), (transform, self.final_layer_norm)):
            change = branch(norm(hidden_states) if self.do_layer_norm_before else hidden_states)
            hidden_states = hidden_states + F.dropout(change, p=self.dropout, training=self.training)
            hidden_states = hidden_states if self.do_layer_norm_before else norm(hidden_states)
        return hidden_states


def tracked_modules(model: nn.Module, *, min_coverage: float = 0.9) -> TrackedModules:
    """Every plain `nn.Linear` of the transformer blocks; `linearise` a proxy first.

    A composition of plain `nn.Linear` modules is tracked whatever it is for. Raises ValueError

    - naming module, class and remedy, whatever `min_coverage`, for a weight matrix of the blocks that cannot be
      tracked: a subclass of `nn.Linear` or a weight that is no plain `nn.Parameter` (quantised); a layer that
      wraps a `base_layer` (peft's LoRA and its kin, which may read the base weight without calling its module, or
      leave the adapter uncalled); `experts`, stacked or listed, which do not see every token; and any other
      parameter or saved buffer of two dimensions or more, unless it is of an embedding or a norm;
    - naming the coverage and the largest modules left out, when less than `min_coverage` of the blocks'
      parameters would be tracked.
    """
    blocks_name, blocks = transformer_blocks(model)
    _refuse_untraceable(blocks_name, blocks)
    names: list[str] = []
    untracked: list[tuple[str, int]] = []
    tracked_count = 0
    for name, module in blocks.named_modules(prefix=blocks_name):
        count = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if isinstance(module, nn.Linear):
            names.append(name)
            tracked_count += count
        elif count:
            untracked.append((name, count))
    untracked.sort(key=lambda item: (-item[1], item[0]))
    coverage = tracked_count / (tracked_count + sum(count for _, count in untracked)) if names else 0.0
    largest = ", ".join(f"{name} ({type(model.get_submodule(name)).__name__}, {n})" for name, n in untracked[:4])
    if coverage < min_coverage or not names:
        raise ValueError(
            f"only {coverage:.1%} of the parameters in {blocks_name} are plain nn.Linear, below the minimum of "
            f"{min_coverage:.1%}; largest untracked: {largest or 'none'}. Choose a proxy whose blocks are made of "
            "nn.Linear (GPT-NeoX, Llama, ...)"
        )
    logger.info(
        "tracking %d modules, %.2f%% of %s; untracked: %d modules, largest %s",
        len(names), 100 * coverage, blocks_name, len(untracked), largest or "none",
    )  # fmt: skip
    return TrackedModules(names=tuple(names), untracked=tuple(untracked), coverage=coverage)


def _refuse_untraceable(blocks_name: str, blocks: nn.ModuleList) -> None:
    modules: dict[tuple[str, str], list[str]] = {}
    for name, module in blocks.named_modules(prefix=blocks_name):
        remedy = _remedy(name, module)
        if remedy is not None:
            modules.setdefault((type(module).__name__, remedy), []).append(name)
    if modules:
        described = "; ".join(
            f"{names[0]} ({kind}{f', {len(names)} such modules' if len(names) > 1 else ''}): {remedy}"
            for (kind, remedy), names in modules.items()
        )
        raise ValueError(f"influence cannot be traced through all weight matrices of {blocks_name}. {described}")


def _remedy(name: str, module: nn.Module) -> str | None:
    """What to do about a module whose weights cannot be traced; None if there is nothing to do."""
    if isinstance(module, nn.Linear):
        if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
            return "not a plain nn.Linear; load the model dequantised, and without parametrisations"
    elif isinstance(getattr(module, "base_layer", None), nn.Module):
        return "an adapter; merge it into its base model (peft: merge_and_unload) and save that"
    elif type(module) in (Conv1D, OPTDecoderLayer):
        return "linearise(model) first"
    elif name.endswith("experts"):
        return "a mixture of experts; choose a dense proxy"
    elif not isinstance(module, nn.Embedding) and "norm" not in type(module).__name__.lower():
        matrices = [f"{own} {tuple(tensor.shape)}" for own, tensor in _own_state(module) if _is_matrix(tensor)]
        if matrices:
            return f"holds {', '.join(matrices)}; choose a dense proxy whose weights are all in nn.Linear"
    return None


def _own_state(module: nn.Module) -> list[tuple[str, Tensor]]:
    # Packed weights are buffers. A boolean one is a mask, one that is not saved a table.
    saved = [item for item in module.named_buffers(recurse=False) if item[0] not in module._non_persistent_buffers_set]
    return [*module.named_parameters(recurse=False), *(item for item in saved if item[1].dtype != torch.bool)]


def _is_matrix(tensor: Tensor) -> bool:
    return sum(size > 1 for size in tensor.shape) >= 2


def transformer_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no nn.ModuleList, so no transformer blocks were found")
    # max keeps the first of equals, and named_modules gives an outer list before those inside it.
    return max(lists, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))


def next_token_nll(
    logits_BTV: Tensor, tokens_BT: Tensor, lengths_B: Tensor, document_BT: Tensor | None = None
) -> Tensor:
    """NLL_j = -log p(x_j | x_<j) in nats, (B, T), label-aligned: entry [b, j] speaks of predicting token j.

    Index 0, positions >= lengths_B[b], and each document's first token where documents are given, are exactly 0 and
    carry no gradient. float32, or float64 if the logits are.
    """
    # bf16 has 8 bits of mantissa: a log-sum-exp over a vocabulary needs more.
    logits = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    labels = tokens_BT.masked_fill(~predicted_positions(tokens_BT, lengths_B, document_BT), IGNORE)
    # Shifting the labels, not the logits, leaves the largest tensor of the step without a copy.
    next_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    nll = F.cross_entropy(logits.flatten(0, 1), next_labels.flatten(), ignore_index=IGNORE, reduction="none")
    return F.pad(nll.view_as(tokens_BT)[:, :-1], (1, 0))


def predicted_positions(tokens_BT: Tensor, lengths_B: Tensor, document_BT: Tensor | None = None) -> Tensor:
    """Boolean (B, T): the tokens that have a prediction, 1 <= j < lengths_B[b]; of documents that do not see each other
    (the number of each token's) all but the first of each."""
    positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    predicted_BT = (positions_T >= 1) & (positions_T < lengths_B.to(tokens_BT.device)[:, None])
    return predicted_BT if document_BT is None else predicted_BT & ~begins_document(document_BT)


def state_fingerprint(model: nn.Module) -> str:
    """Hex SHA-256 over the name, dtype, shape and bytes of every parameter, sorted by name, of the model as it is:
    a proxy is linearised before (by `load_proxy`, for driver and workers alike)."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        flat = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
