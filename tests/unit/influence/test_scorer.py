"""The scorer's engines agree with the exact one, whatever the family, precision, rank, batch and directions."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.config import ConfigError, ModelSource, ScoreCorpus
from ifguide.influence.agreement import compare
from ifguide.influence.directions import low_rank, split_directions
from ifguide.influence.head_derivatives import HeadDerivatives
from ifguide.influence.memory import MemoryEstimate, estimate_memory
from ifguide.influence.method import PRESETS, Attribution, Method, chosen_method
from ifguide.influence.scorer import TokenScorer
from ifguide.models import linearise, load_model, next_token_nll, predicted_positions, tracked_modules
from tests.reference.test_influence import random_directions
from tests.tiny import ARCHITECTURES, as_tensors, random_blocks, tiny_model

LENGTH = 24
FULL = Method(engine="difference", precision="float32", rank=None)
# A ReLU whose sign differs between the streams has no derivative there: the few tokens that meet one are off.
KINKED = {"opt", "opt_350m"}
LOW = Method(engine="difference", precision="bfloat16", rank=None)


def relative_error(scores_BT: Tensor, exact_BT: Tensor) -> float:
    """The largest error of a block relative to its largest score; the worst block."""
    return float(((scores_BT - exact_BT).abs().amax(-1) / exact_BT.abs().amax(-1)).max())


def gentle_model(family: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Weights of a usual size: at tiny_model's 0.3 the loss bends more within a step than in any trained model."""
    model = tiny_model(family, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 0.5
    return model


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_differences_approximate_the_exact_derivative(family: str) -> None:
    model = gentle_model(family)
    directions = random_directions(model)
    tokens_BT, lengths_B = as_tensors(*random_blocks(3, LENGTH))
    exact_BT = TokenScorer(model, directions, attribution="target").score(tokens_BT, lengths_B)
    scores_BT = TokenScorer(model, directions, attribution="target", method=FULL).score(tokens_BT, lengths_B)
    predicted = predicted_positions(tokens_BT, lengths_B)
    if family in KINKED:
        assert compare(scores_BT, exact_BT, predicted).correlation > 0.999
    else:
        assert relative_error(scores_BT, exact_BT) < 2e-3
    low_BT = TokenScorer(model, directions, attribution="target", method=LOW).score(tokens_BT, lengths_B)
    # Products of width 16 average little of bfloat16's rounding away; a sign or scale error would not come near this.
    assert compare(low_BT, exact_BT, predicted).correlation > 0.99


def test_a_proxy_may_have_few_positions() -> None:
    """Fewer than the engine would probe its step with."""
    model = linearise(load_model(ModelSource(architecture={**ARCHITECTURES["gpt2"], "max_position_embeddings": 16})))
    directions = random_directions(model)
    read = as_tensors(*random_blocks(2, 16))
    exact_BT, scores_BT = (
        TokenScorer(model, directions, attribution="target", method=method).score(*read)
        for method in (PRESETS["exact"], FULL)
    )
    assert compare(scores_BT, exact_BT, predicted_positions(*read)).correlation > 0.99


def test_an_engine_that_has_one_precision_takes_it() -> None:
    assert chosen_method(ScoreCorpus(engine="forward")) == replace(PRESETS["exact"], fused=False)
    with pytest.raises(ConfigError, match=r"float32; set it, or score_corpus\.engine: difference"):
        chosen_method(ScoreCorpus(engine="forward", precision="bfloat16"))


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gemma2"])
def test_halving_the_step_quarters_the_error_in_float64(family: str) -> None:
    model = gentle_model(family, dtype=torch.float64)
    directions = random_directions(model)
    tokens_BT, lengths_B = as_tensors(*random_blocks(3, LENGTH))
    exact_BT = TokenScorer(model, directions, attribution="target").score(tokens_BT, lengths_B)
    errors = [
        relative_error(
            TokenScorer(model, directions, attribution="target", method=FULL, steps=[step]).score(tokens_BT, lengths_B),
            exact_BT,
        )
        for step in (2e-4, 1e-4)
    ]
    assert 3.5 < errors[0] / errors[1] < 4.5


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_exact_linear_maps_and_folded_weights_are_the_same_function(family: str, rank: int | None) -> None:
    model = gentle_model(family, dtype=torch.float64)
    tokens_BT, lengths_B = as_tensors(*random_blocks(3, LENGTH))
    directions = random_directions(model)
    split = split_directions(model, directions, rank=rank)
    # The same directions, multiplied out: folded at full rank, exact at low rank.
    dense = {
        name: one.dense() if one.bias is None else torch.cat([one.dense(), one.bias[:, None]], dim=1)
        for name, one in split.items()
    }
    whole = TokenScorer(model, dense, attribution="target", method=FULL, steps=[1e-4])
    method = Method(engine="difference", precision="float32", rank=rank)
    other = TokenScorer(model, directions, attribution="target", method=method, steps=[1e-4])
    expected = whole.score(tokens_BT, lengths_B)
    # The SVD runs in float32.
    assert relative_error(other.score(tokens_BT, lengths_B), expected) < 1e-5


@pytest.mark.parametrize(
    ("attribution", "method"),
    [("target", FULL), ("target", LOW), ("position", FULL), ("position", LOW), ("target", None)],
)
def test_several_directions_give_a_column_each(attribution: Attribution, method: Method | None) -> None:
    model = gentle_model("llama")
    tokens_BT, lengths_B = as_tensors(*random_blocks(3, LENGTH))
    several = [random_directions(model, seed=seed) for seed in (1, 2, 3)]
    options = {"attribution": attribution} | ({"method": method} if method else {})
    together_KBT = TokenScorer(model, several, **options).score(tokens_BT, lengths_B)
    assert together_KBT.shape == (3, *tokens_BT.shape)
    for directions, together_BT in zip(several, together_KBT, strict=True):
        alone_BT = TokenScorer(model, directions, **options).score(tokens_BT, lengths_B)
        tolerance = 3e-2 if method is LOW else 2e-3
        assert relative_error(together_BT, alone_BT) < tolerance


@pytest.mark.parametrize(("attribution", "method"), [("target", LOW), ("target", FULL), ("position", LOW)])
def test_scores_do_not_depend_on_the_micro_batch(attribution: Attribution, method: Method) -> None:
    model = gentle_model("gpt_neox")
    scorer = TokenScorer(model, random_directions(model), attribution=attribution, method=method)
    tokens_BT, lengths_B = as_tensors(*random_blocks(5, LENGTH))
    together_BT = scorer.score(tokens_BT, lengths_B)
    for b in range(5):
        alone_BT = scorer.score(tokens_BT[b : b + 1], lengths_B[b : b + 1])
        assert relative_error(alone_BT, together_BT[b : b + 1]) < (3e-2 if method is LOW else 1e-3)


def test_a_scorer_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    tokens_BT, lengths_B = as_tensors(*random_blocks(2, LENGTH))
    before, implementation = model(tokens_BT).logits, model.config._attn_implementation
    for method in (FULL, LOW):
        for attribution in ("target", "position"):
            TokenScorer(model, random_directions(model), attribution=attribution, method=method).score(
                tokens_BT, lengths_B
            )
    assert torch.equal(model(tokens_BT).logits, before)
    assert model.config._attn_implementation == implementation
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("attribution", "method"), [("target", PRESETS["exact"]), ("target", FULL), ("target", LOW), ("position", FULL)]
)
def test_a_model_that_an_engine_cannot_take_is_refused(attribution: Attribution, method: Method) -> None:
    differences = attribution == "target" and method.engine == "difference"
    for dtype in (torch.float16, torch.bfloat16)[: 1 + differences]:
        model = tiny_model("llama", dtype=dtype)
        with pytest.raises(ValueError, match=rf"{dtype}, .* call model\.float\(\)"):
            TokenScorer(model, random_directions(model), attribution=attribution, method=method)


@pytest.mark.parametrize("method", [PRESETS["exact"], FULL])
@pytest.mark.parametrize("attribution", ["target", "position"])
def test_blocks_of_one_token_score_nothing(attribution: Attribution, method: Method) -> None:
    model = tiny_model("llama")
    scorer = TokenScorer(model, random_directions(model), attribution=attribution, method=method)
    assert torch.equal(scorer.score(torch.tensor([[3], [4]]), torch.tensor([1, 1])), torch.zeros(2, 1))


def test_options_that_do_not_go_together_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="own precision"):
        TokenScorer(
            model,
            random_directions(model),
            attribution="target",
            method=Method(engine="forward", precision="bfloat16", rank=None),
        )
    few = dict(list(random_directions(model).items())[:2])
    with pytest.raises(ValueError, match="different modules"):
        TokenScorer(model, [random_directions(model), few], attribution="target")
    zero = {name: torch.zeros_like(tensor) for name, tensor in random_directions(model).items()}
    with pytest.raises(ValueError, match="zero in every module"):
        TokenScorer(model, zero, attribution="target", method=FULL)


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_the_chunked_head_gives_gradient_and_tangent_of_the_nll(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ifguide.influence.head_derivatives.CHUNK_VALUES", {"cpu": 48 * 5})
    model = tiny_model(family, dtype=torch.float64)
    tokens_BT, lengths_B = as_tensors(*random_blocks(2, LENGTH))
    hidden = model.base_model(tokens_BT, use_cache=False).last_hidden_state.detach().requires_grad_()
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: (hidden,))
    weight_BT = torch.rand(tokens_BT.shape, dtype=torch.float64)
    nll_BT = next_token_nll(model(tokens_BT).logits, tokens_BT, lengths_B)
    (expected,) = torch.autograd.grad((nll_BT * weight_BT).sum(), hidden)
    handle.remove()
    head = HeadDerivatives(model)
    has_loss = predicted_positions(tokens_BT, lengths_B)[:, 1:]
    labels = tokens_BT[:, 1:].flatten()
    flat = hidden.detach()[:, :-1].flatten(0, 1)
    weights = (weight_BT[:, 1:] * has_loss).flatten()
    gradient = head.gradient(flat, labels, weights)
    torch.testing.assert_close(gradient, expected[:, :-1].flatten(0, 1), rtol=1e-9, atol=1e-10)
    tangent = torch.randn(flat.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = head.tangents(flat, tangent[None], labels)[0]
    torch.testing.assert_close((scores * weights).sum(), (expected[:, :-1].flatten(0, 1) * tangent).sum())


def test_a_head_that_is_not_understood_is_refused() -> None:
    model = tiny_model("llama")
    model.config.logit_scale = 2.0  # the head would scale, the model does not
    with pytest.raises(ValueError, match="its logits are not"):
        TokenScorer(model, random_directions(model), attribution="target")


def test_low_rank_is_the_best_approximation_and_reports_its_energy() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(20, 30, generator=generator)
    values = torch.linalg.svdvals(matrix.double())
    for rank in (1, 7, 20):
        left, right, energy = low_rank(matrix, rank)
        assert left.shape == (20, rank)
        assert energy == pytest.approx(float(values[:rank].square().sum() / values.square().sum()), rel=1e-5)
        error = float((matrix - left @ right).double().square().sum())
        assert error == pytest.approx(float(values[rank:].square().sum()), rel=1e-4, abs=1e-4)
    large = torch.randn(1100, 4, generator=generator) @ torch.randn(4, 1200, generator=generator)
    left, right, energy = low_rank(large, 4)
    assert energy == pytest.approx(1.0, abs=1e-4)
    assert float((large - left @ right).abs().max()) < 1e-2


def test_agreement_is_that_of_hand_made_scores() -> None:
    exact = torch.arange(200.0)
    predicted = torch.ones(200, dtype=torch.bool)
    assert compare(exact, exact, predicted).least == pytest.approx(1.0)
    assert compare(-exact, exact, predicted).correlation == pytest.approx(-1.0)
    assert compare(-exact, exact, predicted).top == 0.0
    swapped = exact.clone()
    swapped[[100, 199]] = swapped[[199, 100]]  # one of the top leaves
    assert compare(swapped, exact, predicted).top == pytest.approx(29 / 30)
    assert compare(exact.square(), exact, predicted).spearman == pytest.approx(1.0)
    assert compare(swapped, exact, predicted & (exact < 100)).least == pytest.approx(1.0)
    with pytest.raises(ValueError, match="not finite"):
        compare(exact / 0, exact, predicted)


@pytest.mark.parametrize(("tokens", "top"), [(2, 1), (24, 12), (60, 30), (508, 30), (2990, 30), (8000, 80)])
def test_the_top_has_tokens_enough_that_one_swap_is_no_disagreement(tokens: int, top: int) -> None:
    exact, predicted = torch.arange(float(tokens)), torch.ones(tokens, dtype=torch.bool)
    edge = tokens - top
    swapped = exact.clone()
    swapped[[edge - 1, edge]] = swapped[[edge, edge - 1]]
    found = compare(swapped, exact, predicted)
    assert found.top_tokens == top
    assert found.top == pytest.approx(1 - 1 / top)


@pytest.mark.parametrize("engine", ["forward", "difference", "backward"])
def test_the_memory_estimate_decides_the_micro_batch(engine: str) -> None:
    model = tiny_model("llama")
    names = list(tracked_modules(model).names)
    few, many = (
        estimate_memory(model, names, engine=engine, precision="bfloat16", rank=2, behaviours=k, block_size=64)
        for k in (1, 4)
    )
    assert many.fixed > few.fixed
    cpu = torch.device("cpu")
    assert few.micro_batch(64, cpu, 1 << 40) == 32  # 2,048 tokens
    assert few.micro_batch(64, cpu, few.fixed) == 1
    estimate = MemoryEstimate(fixed=0, per_block=100)
    assert estimate.micro_batch(64, cpu, 1000) == 4  # 60% of it holds six, the power of two below is four


@pytest.mark.parametrize(
    ("attribution", "chosen"), [("target", FULL), ("target", PRESETS["exact"]), ("position", PRESETS["exact"])]
)
def test_a_beginning_is_read_before_every_block_and_has_no_score(attribution: Attribution, chosen: Method) -> None:
    model = gentle_model("llama", dtype=torch.float64)
    directions = random_directions(model)
    tokens_BT, lengths_B = as_tensors(*random_blocks(3, LENGTH))

    def scored(tokens_BT: Tensor, lengths_B: Tensor, beginning: int | None) -> Tensor:
        scorer = TokenScorer(model, directions, attribution=attribution, method=chosen, beginning=beginning)
        return scorer.score(tokens_BT, lengths_B)

    expected_BT = scored(torch.cat([torch.full((3, 1), 5), tokens_BT], dim=1), lengths_B + 1, None)[:, 1:]
    scores_BT = scored(tokens_BT, lengths_B, 5)
    assert torch.equal(scores_BT[:, 1:], expected_BT[:, 1:])
    assert (scores_BT[:, 0] == 0).all()
    assert (expected_BT[:, 0] != 0).all()
    assert not torch.allclose(scores_BT, scored(tokens_BT, lengths_B, None))


@pytest.mark.parametrize("beginning", [None, 3])
@pytest.mark.parametrize(
    ("attribution", "method"),
    [("target", PRESETS["exact"]), ("target", FULL), ("target", LOW), ("position", PRESETS["exact"])],
)
@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_hidden_states_of_the_pass_are_those_of_the_model(
    family: str, attribution: Attribution, method: Method, beginning: int | None
) -> None:
    model = gentle_model(family)
    directions = [random_directions(model), random_directions(model)]
    tokens_BT, lengths_B = as_tensors(*random_blocks(3, LENGTH))
    scorer = TokenScorer(model, directions, attribution=attribution, method=method, beginning=beginning)
    layers = (1, model.config.num_hidden_layers)
    scores, states, _ = scorer.score_and_read(tokens_BT, lengths_B, layers)
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(scores, scorer.score(tokens_BT, lengths_B))
    first = [] if beginning is None else [torch.full((3, 1), beginning)]
    expected = model.base_model(torch.cat([*first, tokens_BT], dim=1), output_hidden_states=True).hidden_states
    tolerance = 0.05 if method is LOW else 1e-3
    for layer, found in zip(layers, states, strict=True):
        wanted = expected[layer][:, len(first) :]
        assert float((found - wanted).abs().max() / wanted.abs().max()) < tolerance
