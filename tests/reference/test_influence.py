"""The influence core against float64 oracles and against kronfluence itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import ScoreArguments
from kronfluence.factor.covariance import covariance_matrices_save_path
from kronfluence.task import Task
from kronfluence.utils.constants import ALL_MODULE_NAME
from kronfluence.utils.state import State
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ifguide.influence.factor_sample import FactorSample
from ifguide.influence.factors import EkfacFit
from ifguide.influence.method import Attribution
from ifguide.influence.partition_files import sum_partitions
from ifguide.influence.query import TokenisedQuery, load_factors, mean_completion_gradient, precondition
from ifguide.influence.scorer import TokenScorer
from ifguide.models import tracked_modules
from tests.reference import oracles
from tests.tiny import as_tensors, random_blocks, tiny_model

FAMILIES = ["gpt_neox", "llama"]
LENGTH = 10


def random_directions(model: PreTrainedModel, *, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    directions = {}
    for name in tracked_modules(model).names:
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        shape = (module.out_features, module.in_features + (module.bias is not None))
        directions[name] = torch.randn(shape, generator=generator)
    return directions


def fit_factors(model: PreTrainedModel, folder: Path, *, num_partitions: int = 1, empirical: bool = False) -> EkfacFit:
    """A finished fit: its partitions in `folder`/work, the factors in `folder`/out."""
    blocks_NT, lengths_N = random_blocks(6, LENGTH, seed=3)
    sample = FactorSample(
        blocks_NT=blocks_NT,
        lengths_N=lengths_N,
        num_partitions=num_partitions,
        batch_size=2,
        seed=0,
        use_empirical_fisher=empirical,
    )
    names = tracked_modules(model).names
    fit = EkfacFit(model=model, sample=sample, module_names=names, workdir=folder / "work")
    fit.run(folder / "out")
    return fit


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("family", FAMILIES)
def test_target_is_the_per_token_directional_derivative(family: str, dtype: torch.dtype, tolerance: float) -> None:
    directions = random_directions(tiny_model(family))
    tokens_BT, lengths_B = as_tensors(*random_blocks(3, LENGTH))
    scores_BT = TokenScorer(tiny_model(family, dtype=dtype), directions, attribution="target").score(
        tokens_BT, lengths_B
    )
    assert scores_BT.dtype == dtype
    oracle = tiny_model(family, dtype=torch.float64)
    for tokens_T, length, scores_T in zip(tokens_BT, lengths_B.tolist(), scores_BT, strict=True):
        expected = oracles.target_scores(oracle, directions, tokens_T[:length])
        assert scores_T[0] == 0
        assert bool((scores_T[length:] == 0).all())
        error = (scores_T[:length] - expected).abs().max() / expected.abs().max()
        assert error.item() < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_block_sums_of_both_attributions_are_equal(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    tokens_BT, lengths_B = as_tensors(*random_blocks(4, LENGTH))
    scores = {}
    for attribution in ("target", "position"):
        scorer = TokenScorer(model, random_directions(model), attribution=attribution)
        scores[attribution] = scorer.score(tokens_BT, lengths_B)
    torch.testing.assert_close(scores["target"].sum(1), scores["position"].sum(1), rtol=1e-10, atol=1e-10)
    assert (scores["target"] - scores["position"]).abs().max() > 0.01 * scores["target"].abs().max()


@pytest.mark.parametrize("attribution", ["target", "position"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_padding_or_batch(family: str, attribution: Attribution) -> None:
    model = tiny_model(family, dtype=torch.float64)
    scorer = TokenScorer(model, random_directions(model), attribution=attribution)
    tokens_BT, lengths_B = as_tensors(*random_blocks(4, LENGTH))
    together = scorer.score(tokens_BT, lengths_B)
    other_padding = F.pad(tokens_BT, (0, 3), value=7)
    other_padding[:, :LENGTH].masked_fill_(torch.arange(LENGTH) >= lengths_B[:, None], 11)
    assert (scorer.score(other_padding, lengths_B)[:, LENGTH:] == 0).all()
    torch.testing.assert_close(scorer.score(other_padding, lengths_B)[:, :LENGTH], together, rtol=1e-9, atol=1e-9)
    for b, length in enumerate(lengths_B.tolist()):
        alone = scorer.score(tokens_BT[b : b + 1, :length], lengths_B[b : b + 1])
        torch.testing.assert_close(alone[0], together[b, :length], rtol=1e-9, atol=1e-9)


def test_scoring_leaves_no_hooks_and_no_graph() -> None:
    model = tiny_model("gpt_neox")
    tokens_BT, lengths_B = as_tensors(*random_blocks(2, LENGTH))
    before = model(tokens_BT).logits
    for attribution in ("target", "position"):
        scores = TokenScorer(model, random_directions(model), attribution=attribution).score(tokens_BT, lengths_B)
        assert not scores.requires_grad
    assert torch.equal(model(tokens_BT).logits, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_directions_that_do_not_fit_are_refused() -> None:
    model = tiny_model("llama")
    for directions, message in [
        ({}, "no directions"),
        ({"model.layers.9.x": torch.zeros(1, 1)}, "no such module"),
        ({"model.norm": torch.zeros(16, 1)}, "not an nn.Linear"),
        ({"model.layers.0.mlp.up_proj": torch.zeros(24, 17)}, "its module needs"),
    ]:
        with pytest.raises(ValueError, match=message):
            TokenScorer(model, directions, attribution="target")
    with pytest.raises(ValueError, match="training mode"):
        TokenScorer(model.train(), random_directions(model), attribution="target")
    with pytest.raises(ValueError, match="attribution"):
        TokenScorer(model.eval(), random_directions(model), attribution="sideways")  # type: ignore[arg-type]


QUERIES = [
    TokenisedQuery(token_ids=(5, 6, 7, 8, 9, 10, 11), completion_start=3),
    TokenisedQuery(token_ids=(5, 6, 31, 2), completion_start=1),
    TokenisedQuery(token_ids=(12, 3, 4, 4, 20), completion_start=2),
]
WEIGHTS = [0.5, -1.0, 0.5]


class CompletionTask(Task):
    """Plain cross-entropy with labels -100 where there is no loss; written apart from the library's own."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = list(names)

    def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        assert not sample
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )

    def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.names

    def get_attention_mask(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["attention_mask"]


def kronfluence_rows(sequences: list[tuple[tuple[int, ...], int]]) -> list[dict[str, Tensor]]:
    """(token ids, first position with loss) as padded rows of `CompletionTask`."""
    rows = []
    for token_ids, start in sequences:
        padding = LENGTH - len(token_ids)
        ids = torch.tensor([*token_ids, *[0] * padding])
        labels = torch.tensor([*[-100] * start, *token_ids[start:], *[-100] * padding])
        mask = torch.tensor([1] * len(token_ids) + [0] * padding)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def kronfluence_position_scores(
    model: PreTrainedModel, factors: Path, root: Path, train: list[tuple[tuple[int, ...], int]]
) -> Tensor:
    """(queries, train sequences, T) at kronfluence's own alignment, from our exported factor folder."""
    (root / "theirs").mkdir()
    (root / "theirs" / "factors_ours").symlink_to(factors, target_is_directory=True)
    task = CompletionTask(tracked_modules(model).names)
    State._reset_state()
    analyzer = Analyzer("theirs", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=str(root))
    double = torch.float64
    analyzer.compute_pairwise_scores(
        scores_name="scores",
        factors_name="ours",
        query_dataset=kronfluence_rows([(q.token_ids, q.completion_start) for q in QUERIES]),
        train_dataset=kronfluence_rows(train),
        per_device_query_batch_size=2,
        per_device_train_batch_size=2,
        score_args=ScoreArguments(
            damping_factor=None,
            compute_per_token_scores=True,
            per_sample_gradient_dtype=double,
            precondition_dtype=double,
            score_dtype=double,
        ),
    )
    scores = analyzer.load_pairwise_scores("scores")
    State._reset_state()
    assert scores is not None
    return scores[ALL_MODULE_NAME]


@pytest.mark.parametrize("family", FAMILIES)
def test_position_is_kronfluences_per_token_score(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, dtype=torch.float64)
    names = tracked_modules(model).names
    fit_factors(model, tmp_path)
    gradient = mean_completion_gradient(model, names, QUERIES, WEIGHTS, batch_tokens=16)
    directions = precondition(gradient, load_factors(tmp_path / "out", names))
    tokens_BT, lengths_B = as_tensors(*random_blocks(4, LENGTH))
    ours_BT = TokenScorer(model, directions, attribution="position").score(tokens_BT, lengths_B)

    train = [(tuple(tokens[:n].tolist()), 1) for tokens, n in zip(tokens_BT, lengths_B.tolist(), strict=True)]
    fresh = tiny_model(family, dtype=torch.float64)
    theirs_QBT = kronfluence_position_scores(fresh, tmp_path / "out", tmp_path, train)
    theirs_BT = torch.einsum("q,qbt->bt", torch.tensor(WEIGHTS, dtype=torch.float64), theirs_QBT.double())
    # Theirs at t predicts label t + 1; ours is label-aligned. Their last real position is exactly 0.
    undone_BT = F.pad(ours_BT[:, 1:], (0, 1))
    cosine = F.cosine_similarity(undone_BT.flatten(), theirs_BT.flatten(), dim=0)
    assert cosine.item() >= 0.99999
    # V is handed on in float32, hence not 1e-12.
    assert ((undone_BT - theirs_BT).abs().max() / theirs_BT.abs().max()).item() < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_are_the_explicit_covariances_and_second_moments(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, dtype=torch.float64)
    names = tracked_modules(model).names
    fit = fit_factors(model, tmp_path, empirical=True)
    blocks_NT, lengths_N = as_tensors(fit.sample.blocks_NT, fit.sample.lengths_N)
    gradients = oracles.sequence_gradients(model, names, blocks_NT, lengths_N)
    factors = load_factors(tmp_path / "out")
    assert set(factors) == set(names)
    partition = "data_partition0_module_partition0.safetensors"
    activation = load_file(fit.workdir / f"activation_covariance_{partition}")
    gradient = load_file(fit.workdir / f"gradient_covariance_{partition}")
    eigenvalues = {
        side: load_file(tmp_path / "out" / f"{side}_eigenvalues.safetensors") for side in ("activation", "gradient")
    }
    counts = load_file(tmp_path / "out" / "num_gradient_covariance_processed.safetensors")
    for name in names:
        A, S, count = oracles.covariances(model, name, blocks_NT, lengths_N)
        assert counts[name].item() == count == int(lengths_N.sum())
        torch.testing.assert_close(activation[name], A, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradient[name], S, rtol=1e-9, atol=1e-9)
        Q_A, Q_S = factors[name].Q_A, factors[name].Q_S
        rebuilt_A = Q_A @ torch.diag(eigenvalues["activation"][name]) @ Q_A.T
        rebuilt_S = Q_S @ torch.diag(eigenvalues["gradient"][name]) @ Q_S.T
        torch.testing.assert_close(rebuilt_A, A / count, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(rebuilt_S, S / count, rtol=1e-9, atol=1e-9)
        squares = [(Q_S.T @ sequence[name] @ Q_A).square() for sequence in gradients]
        torch.testing.assert_close(factors[name].lambda_mean, torch.stack(squares).mean(0), rtol=1e-8, atol=1e-9)


def test_partitions_add_up_to_the_whole(tmp_path: Path) -> None:
    model = tiny_model("gpt_neox", dtype=torch.float64)
    whole = fit_factors(model, tmp_path / "whole", empirical=True).workdir
    parts = fit_factors(model, tmp_path / "parts", num_partitions=3, empirical=True).workdir
    kinds = ("activation_covariance", "gradient_covariance")
    sums = [
        sum_partitions(folder, covariance_matrices_save_path, kinds, [(partition, 0) for partition in range(count)])
        for folder, count in ((whole, 1), (parts, 3))
    ]
    counts = [load_file(folder / "num_lambda_processed.safetensors") for folder in (whole, parts)]
    for one, other in (counts, *([found[kind] for found in sums] for kind in kinds)):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-10, atol=1e-10)
    gradient = random_directions(model)
    one = precondition(gradient, load_factors(tmp_path / "whole" / "out"))
    other = precondition(gradient, load_factors(tmp_path / "parts" / "out"))
    for name in gradient:
        # What the factors do to a gradient does not depend on the signs of their eigenvectors.
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5 * one[name].abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_precondition_solves_the_dense_kronecker_system(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, dtype=torch.float64)
    fit_factors(model, tmp_path)
    name = tracked_modules(model).names[1]
    factors = load_factors(tmp_path / "out", [name])
    gradient = {name: random_directions(model)[name].double()}
    for damping in (None, 0.3):
        solved = precondition(gradient, factors, damping=damping)[name]
        module = factors[name]
        used = 0.1 * module.lambda_mean.mean().item() if damping is None else damping
        expected = oracles.kronecker_solve(gradient[name], module.Q_A, module.Q_S, module.lambda_mean, used)
        assert ((solved - expected).abs().max() / expected.abs().max()).item() < 1e-6


def differential_loss(model: PreTrainedModel) -> float:
    """Weighted completion NLL, by the oracle: what V's sign speaks of."""
    with torch.no_grad():
        return sum(
            weight * float(oracles.token_nll(model, torch.tensor(query.token_ids), j))
            for query, weight in zip(QUERIES, WEIGHTS, strict=True)
            for j in range(query.completion_start, len(query.token_ids))
        )


def identity(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    return gradient


@pytest.mark.parametrize("preconditioned", [False, True])
def test_training_on_a_positive_token_makes_positive_completions_likelier(preconditioned: bool, tmp_path: Path) -> None:
    """One step theta -= lr * P grad NLL_j changes the differential loss by -lr * s_j, to first order."""
    model = tiny_model("gpt_neox", dtype=torch.float64)
    names = tracked_modules(model).names
    apply: Callable[[dict[str, Tensor]], dict[str, Tensor]] = identity
    if preconditioned:
        fit_factors(model, tmp_path)
        factors = load_factors(tmp_path / "out")

        def apply(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
            return precondition(gradient, factors)

    directions = apply(mean_completion_gradient(model, names, QUERIES, WEIGHTS, batch_tokens=64))
    tokens_BT, lengths_B = as_tensors(*random_blocks(1, LENGTH, ragged=False))
    scores_T = TokenScorer(model, directions, attribution="target").score(tokens_BT, lengths_B)[0]
    before = differential_loss(model)
    assert scores_T.max() > 0 > scores_T.min()
    for j in (int(scores_T.argmax()), int(scores_T.argmin())):
        trained = tiny_model("gpt_neox", dtype=torch.float64)
        step = apply(oracles.module_gradients(trained, names, oracles.token_nll(trained, tokens_BT[0], j)))
        scale = 1e-5 / max(float(change.abs().max()) for change in step.values())
        with torch.no_grad():
            for name, change in step.items():
                module = trained.get_submodule(name)
                assert isinstance(module, nn.Linear)
                module.weight.sub_(scale * change[:, :-1])
                module.bias.sub_(scale * change[:, -1])
        moved = differential_loss(trained) - before
        assert moved == pytest.approx(-scale * scores_T[j].item(), rel=0.01)
