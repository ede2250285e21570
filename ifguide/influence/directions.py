"""Directions V as the scorer contracts with them: k of them, split like the modules, whole or of rank r.

A module with weight (d_out, d_in) has V of (d_out, d_in), or (d_out, d_in + 1) with a bias, the bias being the last
input column. What a token meets is V a_t = V_w a_t + v_b. At rank r the weight part is replaced by its best
approximation of that rank (Eckart-Young), V_w = U R with U (d_out, r) and R (r, d_in): 2 r (d_in + d_out) FLOP a token
instead of 2 d_in d_out. The bias column is kept exactly. What the approximation keeps is reported per module as
energy, ||U R||_F^2 / ||V_w||_F^2.

Cost: one thin SVD per module, exact below `EXACT_SVD`, randomised (with power iterations) above. It chooses no rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Below this smaller side a full SVD is quicker than it is worth to approximate.
EXACT_SVD = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class Direction:
    """V of one module. `weight` (d_out, d_in) at full rank, else `left` U (d_out, r) and `right` R (r, d_in);
    `bias` (d_out,) where the module has one. `energy`: share of ||V_w||^2 that is kept, 1 at full rank."""

    weight: Tensor | None
    left: Tensor | None
    right: Tensor | None
    bias: Tensor | None
    energy: float

    def to(self, device: torch.device, dtype: torch.dtype) -> "Direction":
        """The same direction elsewhere, or in another precision."""
        moved = [
            None if tensor is None else tensor.to(device, dtype)
            for tensor in (self.weight, self.left, self.right, self.bias)
        ]
        return Direction(weight=moved[0], left=moved[1], right=moved[2], bias=moved[3], energy=self.energy)

    def dense(self) -> Tensor:
        """(d_out, d_in): the weight part multiplied out."""
        if self.weight is not None:
            return self.weight
        assert self.left is not None
        assert self.right is not None
        return self.left @ self.right


def split_directions(
    model: nn.Module, directions: Mapping[str, Tensor], *, rank: int | None = None
) -> dict[str, Direction]:
    """Each direction checked against its module and split; approximated where `rank` is below full rank.

    Raises ValueError when there is none, or one names no plain `nn.Linear` of the model, has another shape, or is not
    finite.
    """
    if not directions:
        raise ValueError("no directions to score with; build the query first")
    return {name: _split(model, name, direction, rank) for name, direction in directions.items()}


def linear_module(model: nn.Module, name: str) -> nn.Linear:
    """The tracked module `name`."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear), f"{name} is a {type(module).__name__}"
    return module


def _split(model: nn.Module, name: str, direction: Tensor, rank: int | None) -> Direction:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"direction of {name}: the model has no such module; use the query's proxy") from error
    if type(module) is not nn.Linear:
        raise ValueError(f"direction of {name}: a {type(module).__name__}, not an nn.Linear")
    expected = (module.out_features, module.in_features + (module.bias is not None))
    if tuple(direction.shape) != expected:
        raise ValueError(f"direction of {name} has shape {tuple(direction.shape)}, its module needs {expected}")
    if not bool(torch.isfinite(direction).all()):
        raise ValueError(f"direction of {name} is not finite; build the query again, with more damping if it recurs")
    weight = direction[:, : module.in_features]
    bias = None if module.bias is None else direction[:, -1]
    # U R costs less than V_w only below half of the harmonic mean of the sides.
    if rank is None or rank * (module.in_features + module.out_features) >= weight.numel():
        return Direction(weight=weight, left=None, right=None, bias=bias, energy=1.0)
    left, right, energy = low_rank(weight, rank)
    return Direction(weight=None, left=left, right=right, bias=bias, energy=energy)


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """U (d_out, r), R (r, d_in) with U R the best approximation of `weight`, and its share of the energy.

    The singular values are split evenly, so that neither factor under- or overflows in bfloat16. Deterministic.
    """
    matrix = weight.float()
    total = float(matrix.double().square().sum())
    if min(matrix.shape) <= EXACT_SVD:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        U, S, V = U[:, :rank], S[:rank], Vh[:rank].T
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(matrix, q=min(2 * rank + 8, *matrix.shape), niter=4)
        U, S, V = U[:, :rank], S[:rank], V[:, :rank]
    energy = float(S.double().square().sum()) / total if total > 0 else 1.0
    root = S.sqrt()
    return (U * root).contiguous(), (V * root).T.contiguous(), min(energy, 1.0)


def energy_report(directions: Sequence[Mapping[str, Direction]]) -> dict[str, float]:
    """Per module the least energy kept over the behaviours."""
    return {name: min(one[name].energy for one in directions) for name in directions[0]}
