"""ifguide.influence.query: tokenised queries, gradients, preconditioning."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import PreTrainedTokenizerFast

from ifguide.config import ModelSource
from ifguide.influence.proxy import load_proxy
from ifguide.influence.query import (
    ModuleFactors,
    TokenisedQuery,
    build_direction,
    load_factors,
    mean_completion_gradient,
    precondition,
    tokenise_queries,
    tokenise_query,
)
from ifguide.models import state_fingerprint, tracked_modules
from tests.tiny import GPT2, tiny_model
from tests.tokenizers import byte_level


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose only merges are a+b and space+c."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", *alphabet, "ab", "Ġc"])}
    inner = Tokenizer(BPE(vocabulary, [("a", "b"), ("Ġ", "c")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def split(tokenizer: PreTrainedTokenizerFast, query: TokenisedQuery) -> tuple[str, str]:
    start = query.completion_start
    token_ids = list(query.token_ids)
    return str(tokenizer.decode(token_ids[:start])), str(tokenizer.decode(token_ids[start:]))


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("xy", " cd", ("xy", " cd")),
        ("xa", "bc", ("x", "abc")),  # "ab" straddles the boundary
        ("x ", "cd", ("x", " cd")),  # so does " c"
        ("", "cd", ("<eos>", "cd")),
        ("a", "b", ("<eos>", "ab")),
        ("é", "ü", ("é", "ü")),  # two tokens each, with the offsets of one character
        ("x", " ", ("x", " ")),
    ],
)
def test_boundary_is_of_the_joint_tokenisation(
    tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str, expected: tuple[str, str]
) -> None:
    assert split(tokenizer, tokenise_query(tokenizer, prompt, completion, max_tokens=16)) == expected


def test_prompt_is_cut_on_its_left_then_completion_on_its_right(tokenizer: PreTrainedTokenizerFast) -> None:
    assert split(tokenizer, tokenise_query(tokenizer, "uvwxyz", "cde", max_tokens=5)) == ("yz", "cde")
    assert split(tokenizer, tokenise_query(tokenizer, "uvwxyz", "cde", max_tokens=4)) == ("z", "cde")
    assert split(tokenizer, tokenise_query(tokenizer, "uvwxyz", "cde", max_tokens=3)) == ("z", "cd")
    assert split(tokenizer, tokenise_query(tokenizer, "", "cde", max_tokens=2)) == ("<eos>", "c")


def test_a_beginning_stays_whatever_the_prompt_loses(tokenizer: PreTrainedTokenizerFast) -> None:
    bos = tokenizer.convert_tokens_to_ids("B")

    def tokens(prompt: str, max_tokens: int) -> tuple[str, str]:
        return split(tokenizer, tokenise_query(tokenizer, prompt, "cde", max_tokens=max_tokens, beginning=bos))

    assert tokens("xyz", 16) == ("Bxyz", "cde")
    assert tokens("xyz", 5) == ("Bz", "cde")
    assert tokens("xyz", 4) == ("Bz", "cd")
    assert tokens("xyz", 2) == ("B", "c")
    assert tokens("", 16) == ("B", "cde")  # in place of an EOS


def test_impossible_queries_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="empty completion"):
        tokenise_query(tokenizer, "xy", "", max_tokens=8)
    with pytest.raises(ValueError, match="at least 2"):
        tokenise_query(tokenizer, "xy", "z", max_tokens=1)
    for start in (0, 3):
        with pytest.raises(ValueError, match="completion_start"):
            TokenisedQuery(token_ids=(1, 2, 3), completion_start=start)


def test_queries_are_cut_to_the_positions_of_the_model() -> None:
    model, tokenizer = load_proxy(ModelSource(architecture={**GPT2, "vocab_size": 257}), gpus=0), byte_level()
    positive, negative = [("You " * 40, " clown")], [("You", " river" * 40)]
    factors = {"transformer.h.0.mlp.c_fc": small_factors(torch.ones(24, 17))}
    direction = build_direction(model, tokenizer, positive, negative, factors)
    (first, second) = tokenise_queries(tokenizer, (*positive, *negative), model, max_tokens=512)
    assert len(first.token_ids) == len(second.token_ids) == GPT2["max_position_embeddings"]
    gradient = mean_completion_gradient(model, list(factors), [first, second], [1.0, -1.0], batch_tokens=4096)
    torch.testing.assert_close(direction, precondition(gradient, factors))


QUERIES = [
    TokenisedQuery(token_ids=(5, 6, 7, 8, 9, 10, 11), completion_start=3),
    TokenisedQuery(token_ids=(5, 6), completion_start=1),
    TokenisedQuery(token_ids=(12, 3, 4, 4, 20), completion_start=2),
]


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2", "opt", "gpt_neo", "gemma2"])
def test_gradient_does_not_depend_on_the_batching(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    names = tracked_modules(model).names
    weights = [0.5, -1.0, 0.5]
    before = state_fingerprint(model), [parameter.requires_grad for parameter in model.parameters()]
    alone = mean_completion_gradient(model, names, QUERIES, weights, batch_tokens=1)
    together = mean_completion_gradient(model, names, QUERIES[::-1], weights[::-1], batch_tokens=1000)
    assert before == (state_fingerprint(model), [parameter.requires_grad for parameter in model.parameters()])
    assert all(parameter.grad is None for parameter in model.parameters())
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        assert alone[name].shape == (module.out_features, module.in_features + (module.bias is not None))
        torch.testing.assert_close(alone[name], together[name], rtol=1e-9, atol=1e-12)


def test_prompt_tokens_carry_no_loss() -> None:
    """Two queries that differ in completion_start differ by exactly the tokens between."""
    model = tiny_model("llama", dtype=torch.float64)
    names = tracked_modules(model).names[:1]
    tokens = (3, 14, 15, 9, 26)

    def gradient(start: int, length: int) -> torch.Tensor:
        query = TokenisedQuery(token_ids=tokens[:length], completion_start=start)
        return mean_completion_gradient(model, names, [query], [1.0], batch_tokens=64)[names[0]]

    torch.testing.assert_close(gradient(2, 5), gradient(2, 4) + gradient(4, 5), rtol=1e-9, atol=1e-12)


def test_one_weight_per_query() -> None:
    with pytest.raises(ValueError, match="3 queries but 1 weights"):
        mean_completion_gradient(tiny_model("llama"), [], QUERIES, [1.0], batch_tokens=8)


def test_a_model_in_training_mode_is_refused() -> None:
    model = tiny_model("llama").train()
    with pytest.raises(ValueError, match=r"in training mode; call model\.eval\(\)"):
        build_direction(
            model, byte_level(), [("a", "b")], [], {"model.layers.0.mlp.up_proj": small_factors(torch.ones(2, 2))}
        )


def small_factors(lambda_mean: torch.Tensor) -> ModuleFactors:
    d_out, d_in = lambda_mean.shape
    return ModuleFactors(Q_A=torch.eye(d_in), Q_S=torch.eye(d_out), lambda_mean=lambda_mean)


def test_damping_is_relative_to_the_mean_unless_given() -> None:
    gradient = {"m": torch.ones(1, 2)}
    factors = {"m": small_factors(torch.tensor([[1.0, 3.0]]))}
    relative = precondition(gradient, factors, damping_scale=0.5)["m"]
    torch.testing.assert_close(relative, torch.tensor([[1 / 2.0, 1 / 4.0]]))
    absolute = precondition(gradient, factors, damping=4.0)["m"]
    torch.testing.assert_close(absolute, torch.tensor([[1 / 5.0, 1 / 7.0]]))
    assert absolute.dtype == torch.float32


def test_factors_that_do_not_fit_are_refused() -> None:
    factors = {"m": small_factors(torch.tensor([[1.0, 0.0]]))}
    with pytest.raises(ValueError, match="m: Lambda"):
        precondition({"m": torch.ones(1, 2)}, factors, damping=0.0)
    with pytest.raises(ValueError, match=r"differ in modules \['m', 'n'\]"):
        precondition({"n": torch.ones(1, 2)}, factors)
    with pytest.raises(ValueError, match="m: the factors are of shape"):
        precondition({"m": torch.ones(2, 2)}, factors)


def test_missing_factor_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"activation_eigenvectors\.safetensors"):
        load_factors(tmp_path)
