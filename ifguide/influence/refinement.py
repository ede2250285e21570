"""V from the curvature itself: conjugate gradients on the damped Gauss-Newton product, preconditioned by EK-FAC.

EK-FAC takes the modules for independent, and each module's curvature for a Kronecker product with corrected
eigenvalues. Refinement solves, over all tracked modules at once,

    (H + D) V = G,   H = 1/N sum over blocks of sum over predicted tokens of J^T (diag p - p p^T) J,

with J the derivative of a token's logits z by the weights, p = softmax(z), D the damping of each module, and G the
differential gradient. H is what EK-FAC approximates: its Lambda is the mean over blocks of squared gradients of the
block's summed NLL, with labels drawn from p. These are independent from token to token, so the expected square of the
sum is the sum over tokens, and of each token it is J^T (diag p - p p^T) J (Martens, arXiv 1412.1193, Sec. 9). N counts
blocks, and D is that of `query.precondition`. Where EK-FAC is exact on the sample, the first step gives its V.

    V_0 = 0, r_0 = G;   z = (EK-FAC + D)^-1 r,   p = z + beta p,   alpha = <r, z> / <p, (H + D) p>,
    V += alpha p,   r -= alpha (H + D) p                                  (Hestenes and Stiefel 1952)

The first direction is EK-FAC's V: one step scales it and changes no ranking. Refinement is done once for a query, and
scoring costs what it did.

Cost of a step: a forward-mode pass, a forward and a backward pass over the sample (about 12N FLOP a token for N tracked
parameters), and one EK-FAC solve in float64. Memory: seven vectors of the size of V. No label is read, and no matrix of
the size (tokens, vocabulary) is held.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.documents import last_hidden_state
from ifguide.influence.directions import linear_module, split_directions
from ifguide.influence.forward import hidden_tangents
from ifguide.influence.head_derivatives import HeadDerivatives
from ifguide.influence.query import ModuleFactors, by_module, only_trainable
from ifguide.models import predicted_positions

logger = logging.getLogger(__name__)

Vector = dict[str, Tensor]  # by module, (d_out, d_in [+ 1])
VECTORS = ("direction", "residual", "search", "first")  # of a `Refinement`
Product = Callable[[Mapping[str, Tensor]], Vector]
TOLERANCE = 1e-6  # of |r| / |G|: float32 products are not known better


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step. `residual`: |G - (H + D) V| / |G| after it; it may rise at first, for what falls with each step is the
    error in the norm of H + D, not this one. `curvature`: V^T H V, without the damping. `step_size`:
    alpha; that of the first step is 1 where EK-FAC has the right curvature along its V. `cosine`: of V with that."""

    residual: float
    curvature: float
    step_size: float
    cosine: float


@dataclass(kw_only=True, eq=False)
class Refinement:
    """Where the conjugate gradients are: V, the residual r, the last search direction p with its <r, z>, the EK-FAC V
    that they began with (`first`), and what each step did."""

    direction: Vector
    residual: Vector
    search: Vector
    first: Vector
    product: float
    steps: list[Step] = field(default_factory=list)

    @classmethod
    def begin(cls, gradient: Mapping[str, Tensor]) -> Refinement:
        """Before the first step, of G."""
        return cls(
            direction={name: torch.zeros_like(tensor) for name, tensor in gradient.items()},
            residual={name: tensor.clone() for name, tensor in gradient.items()},
            search={},
            first={},
            product=0.0,
        )

    def save(self, path: Path) -> None:
        """Write what `load` reads: all that a further step needs."""
        vectors = {part: getattr(self, part) for part in VECTORS}
        tensors = {f"{part}/{name}": tensor for part in VECTORS for name, tensor in vectors[part].items()}
        metadata = {"product": self.product.hex(), "steps": json.dumps([asdict(step) for step in self.steps])}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Refinement:
        """What `save` wrote."""
        vectors: dict[str, Vector] = {part: {} for part in VECTORS}
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata()
            for key in file.keys():  # noqa: SIM118  # it is no mapping
                part, _, name = key.partition("/")
                vectors[part][name] = file.get_tensor(key)
        steps = [Step(**row) for row in json.loads(metadata["steps"])]
        return cls(**vectors, product=float.fromhex(metadata["product"]), steps=steps)

    def summary(self) -> dict[str, list[float]]:
        """What each step did, by quantity, to be written down."""
        rows = [asdict(step) for step in self.steps]
        return {name: [float(f"{row[name]:.6g}") for row in rows] for name in Step.__dataclass_fields__}


def refine(
    gradient: Mapping[str, Tensor],
    factors: Mapping[str, ModuleFactors],
    product: Product,
    *,
    steps: int,
    damping: float | None = None,
    damping_scale: float = 0.1,
    tolerance: float = TOLERANCE,
    begun: Refinement | None = None,
) -> Iterator[Refinement]:
    """The state after each of `steps` conjugate gradient steps, or of those that `begun` lacks; the same object, which
    the next step changes. It ends early where the residual is below `tolerance`.

    `product` is v -> H v, of the gradient's modules and dtype. The damping is that of `precondition`, which checks that
    factors and gradient fit together.

    Raises:
        ValueError: a search direction without curvature, or a number that is not finite.
    """
    state = Refinement.begin(gradient) if begun is None else begun
    device = next(iter(gradient.values())).device
    dampings = {name: float(own.in_float64(device).damping(damping, damping_scale)) for name, own in factors.items()}
    while len(state.steps) < steps and not (state.steps and state.steps[-1].residual < tolerance):
        _step(state, gradient, factors, dampings, product)
        step = state.steps[-1]
        logger.info(
            "refinement: step %d of %d, residual %.3g, cosine %.3f", len(state.steps), steps, step.residual, step.cosine
        )
        yield state


def _step(
    state: Refinement,
    gradient: Mapping[str, Tensor],
    factors: Mapping[str, ModuleFactors],
    dampings: Mapping[str, float],
    product: Product,
) -> None:
    z = {
        name: factors[name].in_float64(r.device).solve(r.double(), dampings[name]).to(r.dtype)
        for name, r in state.residual.items()
    }
    rz = _dot(state.residual, z)
    if state.search:
        state.search = {name: z[name].add_(p, alpha=rz / state.product) for name, p in state.search.items()}
    else:
        state.search, state.first = z, {name: own.clone() for name, own in z.items()}  # saved apart
    Ap = {name: Hp.add_(state.search[name], alpha=dampings[name]) for name, Hp in product(state.search).items()}
    pAp = _dot(state.search, Ap)
    if not (math.isfinite(rz) and math.isfinite(pAp) and pAp > 0):
        raise ValueError(
            f"refinement, step {len(state.steps) + 1}: curvature {pAp:.6g} along a search direction; it must be finite"
            " and above 0; raise `damping_scale`"
        )
    alpha = rz / pAp
    state.product = rz
    state.direction = {name: V.add(state.search[name], alpha=alpha) for name, V in state.direction.items()}
    state.residual = {name: r.sub(Ap[name], alpha=alpha) for name, r in state.residual.items()}
    V = state.direction
    damped = sum(d * float(V[name].double().square().sum()) for name, d in dampings.items())
    norms = [math.sqrt(_dot(vector, vector)) for vector in (state.residual, gradient, V, state.first)]
    state.steps.append(
        Step(
            residual=norms[0] / norms[1],
            curvature=_dot(V, gradient) - _dot(V, state.residual) - damped,  # (H + D) V is G - r
            step_size=alpha,
            cosine=_dot(V, state.first) / (norms[2] * norms[3]),
        )
    )


def _dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return float(sum(float((tensor.double() * b[name].double()).sum()) for name, tensor in a.items()))


class GaussNewton:
    """v -> H v on blocks: the mean over them of each block's Gauss-Newton product, summed over its predicted tokens.

    batches: those of a `FactorSample`'s loader, int64: `input_ids` (B, T), padded on the right, `lengths` (B,), and
    `documents` (B, T) where documents do not see each other. A BOS before a text is one of its tokens. names: the
    tracked modules. The result has the model's dtype, on its device.

    Raises ValueError for a model in training mode, or one whose LM head is not understood.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]]) -> None:
        if model.training:
            raise ValueError("the model is in training mode; call model.eval() before refining")
        self.model, self.batches = model, batches
        self.modules = {name: linear_module(model, name) for name in names}
        self.head = HeadDerivatives(model)
        self.head.check(model)

    def __call__(self, vector: Mapping[str, Tensor]) -> Vector:
        """H v."""
        parameters = [parameter for module in self.modules.values() for parameter in module.parameters()]
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        split = split_directions(self.model, vector)
        direction = {name: own.to(self.model.device, self.model.dtype) for name, own in split.items()}
        for batch in self.batches:
            moved = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
            tokens_BT, document_BT = moved["input_ids"], moved.get("documents")
            hidden_BTD, tangent_BTD = hidden_tangents(self.model, direction, tokens_BT, document_BT)
            predicted_BT = predicted_positions(tokens_BT, moved["lengths"], document_BT)[:, 1:]
            with torch.no_grad():
                at_hidden_ND = self.head.curvature(
                    hidden_BTD[:, :-1].flatten(0, 1),
                    tangent_BTD[:, :-1].flatten(0, 1),
                    predicted_BT.flatten().to(hidden_BTD),
                )
            at_hidden_BTD = F.pad(at_hidden_ND.view(*predicted_BT.shape, hidden_BTD.shape[-1]), (0, 0, 0, 1))
            with torch.enable_grad(), only_trainable(self.model, parameters):
                hidden = last_hidden_state(self.model, tokens_BT, document_BT)
                for total, gradient in zip(totals, torch.autograd.grad(hidden, parameters, at_hidden_BTD), strict=True):
                    total += gradient
        blocks = sum(len(batch["input_ids"]) for batch in self.batches)
        return by_module(self.modules, [total.div_(blocks).detach() for total in totals])
