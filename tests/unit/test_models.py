"""ifguide.models: where models and tokenizers come from, and what is tracked."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import AutoConfig, ByT5Tokenizer, PreTrainedModel, PreTrainedTokenizerFast

from ifguide.architecture import check_vocabulary, load_architecture
from ifguide.config import ModelSource
from ifguide.influence.proxy import Beginning, describe_proxy, load_proxy
from ifguide.models import (
    linearise,
    load_model,
    next_token_nll,
    predicted_positions,
    state_fingerprint,
    tracked_modules,
)
from ifguide.tokenizer import check_own_tokens, load_tokenizer
from tests.tiny import ARCHITECTURES, GPT2, GPT_NEOX, LLAMA, as_tensors, random_blocks, tiny_model


def word_tokenizer(words: tuple[str, ...] = ("<eos>", "a", "b", "<unk>"), **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """A Llama as a float32 GGUF file; GGUF keeps the rotary halves of Q and K interleaved."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, head_count in heads.items():
            if projection in name:
                halves = values.reshape(head_count, 2, -1, values.shape[1])
                values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        base, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(base)}.{suffix}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_architecture_weights_depend_on_the_seed_alone_and_leave_the_random_state() -> None:
    source = ModelSource(architecture=LLAMA)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load_model(source, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert state_fingerprint(first) == state_fingerprint(load_model(source, seed=1))
    assert state_fingerprint(first) != state_fingerprint(load_model(source, seed=2))
    assert not first.training
    std = first.get_parameter("model.layers.0.mlp.up_proj.weight").std().item()
    assert std == pytest.approx(LLAMA["initializer_range"], rel=0.2)


def test_a_local_folder_gives_the_saved_model(tmp_path: Path) -> None:
    model = load_model(ModelSource(architecture=GPT_NEOX), seed=1)
    model.save_pretrained(tmp_path / "saved")
    loaded = load_model(ModelSource(source=str(tmp_path / "saved")))
    assert state_fingerprint(loaded) == state_fingerprint(model)
    assert load_model(ModelSource(source=str(tmp_path / "saved")), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_gguf_file_gives_the_same_weights(tmp_path: Path) -> None:
    model = load_model(ModelSource(architecture=LLAMA), seed=1)
    write_gguf(model, tmp_path / "tiny.gguf")
    loaded = load_model(ModelSource(source=str(tmp_path / "tiny.gguf")))
    assert state_fingerprint(loaded) == state_fingerprint(model)


@pytest.mark.parametrize("name", ["missing", "missing.gguf"])
def test_a_missing_path_is_named(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=name):
        load_model(ModelSource(source=path))
    with pytest.raises(FileNotFoundError, match=name):
        load_tokenizer(path)
    with pytest.raises(FileNotFoundError, match=r"\./nowhere"):
        load_tokenizer("./nowhere")


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(ModelSource(source=str(tmp_path)))


def test_exactly_one_origin() -> None:
    for source in (ModelSource(), ModelSource(source="./x", architecture=LLAMA)):
        with pytest.raises(ValueError, match="exactly one of source and architecture"):
            load_model(source)
    with pytest.raises(ValueError, match="model_type"):
        load_model(ModelSource(architecture={"hidden_size": 8}))


def test_tokenizer_must_be_fast_and_have_an_eos(tmp_path: Path) -> None:
    word_tokenizer(eos_token="<eos>").save_pretrained(tmp_path / "good")
    assert load_tokenizer(str(tmp_path / "good")).eos_token_id == 0
    word_tokenizer().save_pretrained(tmp_path / "no-eos")
    with pytest.raises(ValueError, match=r"no-eos.*EOS"):
        load_tokenizer(str(tmp_path / "no-eos"))
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    with pytest.raises(ValueError, match=r"slow.*fast tokenizer"):
        load_tokenizer(str(tmp_path / "slow"))


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe{}"])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, damage: bytes) -> None:
    word_tokenizer(eos_token="<eos>").save_pretrained(tmp_path / "words")
    (tmp_path / "words" / "tokenizer.json").write_bytes(damage)
    with pytest.raises(ValueError, match=r"words: .*tokenizer"):
        load_tokenizer(str(tmp_path / "words"))


def test_check_vocabulary_names_both_sizes() -> None:
    tokenizer = word_tokenizer(eos_token="<eos>")
    check_vocabulary(4, tokenizer, model_name="m", tokenizer_name="t")
    with pytest.raises(ValueError, match="t has 4 tokens but model m only 3"):
        check_vocabulary(3, tokenizer, model_name="m", tokenizer_name="t")


def test_published_weights_are_of_their_own_tokens_alone(tmp_path: Path) -> None:
    own = word_tokenizer(("<eos>", "a", "b", "<unk>"))
    own.save_pretrained(tmp_path / "own")
    model = ModelSource(source=str(tmp_path / "own"))
    for words in (("<eos>", "a", "b", "<unk>"), ("<eos>", "a", "b", "<unk>", "c")):
        check_own_tokens(model, word_tokenizer(words), tokenizer_name="other")
    for words, message in (
        (("<eos>", "b", "a", "<unk>"), "token 1 is 'b' in other, and 'a' in .*own"),
        (("<eos>", "a", "c", "<unk>"), "token 2 is 'c' in other, and 'b' in .*own"),
        (("<eos>", "a", "b", "<unk>", "c", "<unk>"), "token 5 is '<unk>' in other, and 'none' in .*own"),
    ):
        with pytest.raises(ValueError, match=rf"^pretrain\.tokenizer: {message}, .* set pretrain\.tokenizer=.*own, or"):
            check_own_tokens(model, word_tokenizer(words), tokenizer_name="other")


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_a_model_without_a_tokenizer_goes_with_any(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    check_own_tokens(ModelSource(source=str(tmp_path)), word_tokenizer(), tokenizer_name="other")


def test_tracked_modules_are_the_linears_of_the_blocks() -> None:
    neox = tracked_modules(tiny_model("gpt_neox"))
    layer = "gpt_neox.layers.{}."
    parts = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert neox.names == tuple(layer.format(i) + part for i in (0, 1) for part in parts)
    assert {name for name, _ in neox.untracked} == {
        layer.format(i) + norm for i in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")
    }
    linear, norms = 16 * 48 + 48 + 16 * 16 + 16 + 2 * 16 * 24 + 24 + 16, 4 * 16
    assert neox.coverage == pytest.approx(linear / (linear + norms))
    llama = tracked_modules(tiny_model("llama"))
    assert len(llama.names) == 14
    assert not any("lm_head" in name or "embed" in name for name in llama.names)


def test_a_model_of_other_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"only 0\.0%.*LayerNorm.*nn\.Linear"):
        tracked_modules(nn.ModuleList([nn.LayerNorm(4)]), min_coverage=0.0)
    with pytest.raises(ValueError, match=r"only 66\.7%.*below the minimum of 70\.0%.*1 \(LayerNorm, 8\)"):
        tracked_modules(nn.ModuleList([nn.Linear(4, 4, bias=False), nn.LayerNorm(4)]), min_coverage=0.7)
    with pytest.raises(ValueError, match=r"no nn\.ModuleList"):
        tracked_modules(nn.Linear(2, 2))


def test_a_linearised_gpt2_is_tracked_whole() -> None:
    gpt2 = load_model(ModelSource(architecture=GPT2))
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn \(Conv1D, 8 such modules\): linearise\(model\) first"):
        tracked_modules(gpt2, min_coverage=0.0)
    weight = gpt2.get_parameter("transformer.h.1.mlp.c_fc.weight").clone()
    fingerprint = state_fingerprint(gpt2)
    tracked = tracked_modules(linearise(gpt2))
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert tracked.names == tuple(f"transformer.h.{i}.{part}" for i in (0, 1) for part in parts)
    assert torch.equal(gpt2.get_parameter("transformer.h.1.mlp.c_fc.weight"), weight.T)
    assert state_fingerprint(gpt2) != fingerprint
    assert state_fingerprint(linearise(gpt2)) == state_fingerprint(gpt2)


def test_an_opt_that_flattens_its_blocks_is_refused() -> None:
    opt = load_model(ModelSource(architecture=ARCHITECTURES["opt"]))
    with pytest.raises(ValueError, match=r"layers\.0 \(OPTDecoderLayer, 2 such modules\): linearise\(model\) first"):
        tracked_modules(opt)
    assert len(tracked_modules(linearise(opt)).names) == 12


@pytest.mark.parametrize("architecture", [GPT2, LLAMA])
def test_driver_and_workers_agree_on_the_proxys_fingerprint(architecture: dict[str, Any]) -> None:
    source = ModelSource(architecture=architecture)
    described = describe_proxy(source, Beginning(None), 16, 0.9)
    worker = load_proxy(source, gpus=0)
    assert described.fingerprint == state_fingerprint(worker)
    assert described.module_names == tracked_modules(worker).names
    with pytest.raises(ValueError, match=r"65 tokens are more than the 64 positions of the proxy"):
        describe_proxy(source, Beginning(None), 65, 0.9)
    with pytest.raises(ValueError, match=r"64 tokens and a BOS are more than the 64 positions .*; pack 63 at most"):
        describe_proxy(source, Beginning(1), 64, 0.9)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_are_refused_by_name(model_type: str) -> None:
    experts = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
    model = load_model(ModelSource(architecture=LLAMA | experts | {"model_type": model_type}))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts \(\w+Experts, 2 such modules\).*dense proxy"):
        tracked_modules(model, min_coverage=0.0)


class Scaled(nn.Linear):
    """A Linear that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Packed(nn.Module):
    """A quantised layer as GPTQ keeps it: no parameter, the weight in an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(2, 24, dtype=torch.int32))


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(3, 16, 24))


class Adapted(nn.Module):
    """The structure of peft's LoRA layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(16, 24)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(16, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 24, bias=False)})


class QuantisedTensor(nn.Parameter):
    """A weight of another kind inside a plain nn.Linear, as torchao makes it."""


def quantised_weight() -> nn.Linear:
    linear = nn.Linear(16, 24)
    linear.weight = QuantisedTensor(torch.zeros(24, 16))
    return linear


@pytest.mark.parametrize(
    ("module", "kind", "remedy"),
    [
        (Scaled(16, 24), "Scaled", "dequantised"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(16, 24)), "ParametrizedLinear", "without parametrisations"),
        (quantised_weight(), "Linear", "dequantised"),
        (Packed(), "Packed", r"qweight \(2, 24\).*dense proxy"),
        (Stacked(), "Stacked", r"kernel \(3, 16, 24\).*dense proxy"),
        (nn.Conv1d(16, 24, 3), "Conv1d", r"weight \(24, 16, 3\)"),
        (Adapted(), "Adapted", "merge_and_unload"),
    ],
)
def test_a_weight_matrix_that_cannot_be_traced_is_refused_by_name(module: nn.Module, kind: str, remedy: str) -> None:
    model = tiny_model("llama")
    model.get_submodule("model.layers.1.mlp").up_proj = module
    with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.up_proj \({kind}\): .*{remedy}"):
        tracked_modules(model, min_coverage=0.0)


def test_what_is_no_weight_matrix_is_reported_not_refused() -> None:
    model = tiny_model("llama")
    mlp = model.get_submodule("model.layers.1.mlp")
    mlp.up_proj = nn.Sequential(nn.Linear(16, 2), nn.Linear(2, 24))
    mlp.relative = nn.Embedding(4, 2)
    mlp.norm = nn.LayerNorm((4, 6))
    mlp.register_parameter("time_mix", nn.Parameter(torch.zeros(1, 1, 16)))
    mlp.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool))
    mlp.register_buffer("table", torch.ones(4, 4), persistent=False)
    tracked = tracked_modules(model)
    assert {f"model.layers.1.mlp.up_proj.{i}" for i in (0, 1)} < set(tracked.names)
    untracked = dict(tracked.untracked)
    assert untracked["model.layers.1.mlp.norm"] == 48
    assert untracked["model.layers.1.mlp"] == 16
    assert untracked["model.layers.1.mlp.relative"] == 8


def test_attention_is_sdpa_where_the_architecture_has_it() -> None:
    for family, attention in (("llama", "sdpa"), ("gpt2", "sdpa"), ("gemma2", "eager"), ("gpt_neo", "eager")):
        assert tiny_model(family).config._attn_implementation == attention
    with pytest.raises(ValueError, match="Gemma2"):
        load_model(ModelSource(architecture=ARCHITECTURES["gemma2"]), attn_implementation="sdpa")


def test_next_token_nll_is_label_aligned_and_zero_elsewhere() -> None:
    tokens_BT, lengths_B = as_tensors(*random_blocks(3, 6))
    logits_BTV = torch.randn(3, 6, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nll_BT = next_token_nll(logits_BTV, tokens_BT, lengths_B)
    for b in range(3):
        for j in range(6):
            if 1 <= j < lengths_B[b]:
                expected = -logits_BTV[b, j - 1].log_softmax(-1)[tokens_BT[b, j]]
                assert nll_BT[b, j].item() == pytest.approx(expected.item(), rel=1e-12)
            else:
                assert nll_BT[b, j].item() == 0.0
    assert torch.equal(predicted_positions(tokens_BT, lengths_B), nll_BT != 0)


def test_fingerprint_sees_every_parameter_and_dtype() -> None:
    model = tiny_model("gpt_neox")
    before = state_fingerprint(model)
    assert state_fingerprint(tiny_model("gpt_neox", dtype=torch.float64)) != before
    with torch.no_grad():
        model.get_parameter("gpt_neox.final_layer_norm.bias")[0] += 1e-3
    assert state_fingerprint(model) != before


def test_an_architecture_read_from_a_folder_makes_the_same_random_model(tmp_path: Path) -> None:
    first = load_model(ModelSource(architecture=dict(GPT_NEOX)), seed=3)
    first.config.save_pretrained(tmp_path)
    fields = load_architecture(ModelSource(source=str(tmp_path)))
    again = load_model(ModelSource(architecture=fields), seed=3)
    assert state_fingerprint(again) == state_fingerprint(first)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_the_token_that_pads_elsewhere_is_trained_like_any_other(family: str, tied: bool, tmp_path: Path) -> None:
    token = 14
    architecture = {**ARCHITECTURES[family], "pad_token_id": token, "tie_word_embeddings": tied}
    model = load_model(ModelSource(architecture=architecture))
    assert model.config.pad_token_id == token
    model.save_pretrained(tmp_path)
    for source in (model, load_model(ModelSource(source=str(tmp_path)))):
        weight = source.get_input_embeddings().weight
        assert weight[token].norm() > 0.5 * weight.norm(dim=1).median()
        source(torch.tensor([[3, token, 5]])).logits.logsumexp(-1).sum().backward()
        assert weight.grad[token].norm() > 0
