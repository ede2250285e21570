"""ifguide.models: where models and tokenizers come from, and what is tracked."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import ByT5Tokenizer, PreTrainedModel, PreTrainedTokenizerFast

from ifguide.config import ModelSource
from ifguide.models import (
    check_vocabulary,
    load_architecture,
    load_model,
    load_tokenizer,
    next_token_nll,
    predicted_positions,
    state_fingerprint,
    tracked_modules,
)
from tests.tiny import GPT2, GPT_NEOX, LLAMA, as_tensors, random_blocks, tiny_model


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocabulary = {"<eos>": 0, "a": 1, "b": 2, "<unk>": 3}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
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


def test_check_vocabulary_names_both_sizes() -> None:
    tokenizer = word_tokenizer(eos_token="<eos>")
    check_vocabulary(4, tokenizer, model_name="m", tokenizer_name="t")
    with pytest.raises(ValueError, match="t has 4 tokens but model m only 3"):
        check_vocabulary(3, tokenizer, model_name="m", tokenizer_name="t")


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
    gpt2 = load_model(ModelSource(architecture=GPT2))
    with pytest.raises(ValueError, match=r"only 0\.0%.*Conv1D"):
        tracked_modules(gpt2)
    with pytest.raises(ValueError, match="only 0"):
        tracked_modules(gpt2, min_coverage=0.0)
    with pytest.raises(ValueError, match=r"no nn\.ModuleList"):
        tracked_modules(nn.Linear(2, 2))


def test_a_linear_subclass_is_not_tracked() -> None:
    class Scaled(nn.Linear):
        pass

    model = tiny_model("llama")
    model.get_submodule("model.layers.1.mlp").up_proj = Scaled(16, 24, bias=False)
    tracked = tracked_modules(model, min_coverage=0.5)
    assert "model.layers.1.mlp.up_proj" not in tracked.names
    assert tracked.untracked[0] == ("model.layers.1.mlp.up_proj", 16 * 24)


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
