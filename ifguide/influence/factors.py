"""EK-FAC factors of a proxy model, fitted by kronfluence one data partition per process.

Method (EK-FAC, arXiv 1806.03884, as in IF-Guide, arXiv 2506.01790, Sec. 4.1). For every tracked linear module
with input a_t (a bias is one more, constant, last column) and output gradient g_t of a sequence's summed NLL:

    A = E[a a^T] = Q_A diag Q_A^T,   S = E[g g^T] = Q_S diag Q_S^T       (means over real tokens)
    Lambda = E[(Q_S^T G Q_A)^2],     G = sum_t g_t a_t^T                  (mean over sequences)

Labels are sampled from the model (the Fisher), unless `use_empirical_fisher`. The order of the calls is

    fit_covariance_partition (each partition) -> aggregate_covariances -> eigendecompose
      -> fit_lambda_partition (each partition) -> aggregate_lambdas -> export_factors

All files are kronfluence's own, by name and key, so its Analyzer loads the exported folder. Sums are float32
(float64 for a float64 model): bfloat16 sums saturate. Eigenvectors are computed in float64.

Determinism: the sampled labels of a block depend on `seed` and the block's row in the sample alone. So the
process, the batch size and the number of partitions change the factors by float noise only, and one
partition fitted again gives the same bytes.

Cost: covariance and Lambda are a forward and a backward pass over the sample each, plus d_in^2 + d_out^2 and
d_in d_out (d_in + d_out) / T FLOP per token and module; a batch of Lambda holds one gradient per sequence of
one module. kronfluence's loops are called directly instead of its Analyzer, which writes shared files from
every process, in place, and sets the root logger's level.

It does not shard modules, and a model is one device.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from kronfluence.arguments import FactorArguments
from kronfluence.factor import covariance as kron_covariance
from kronfluence.factor import eigen as kron_eigen
from kronfluence.module.tracked_module import TrackedModule
from kronfluence.module.utils import wrap_tracked_modules
from kronfluence.task import Task
from kronfluence.utils.constants import (
    COVARIANCE_FACTOR_NAMES,
    EIGENDECOMPOSITION_FACTOR_NAMES,
    LAMBDA_FACTOR_NAMES,
    NUM_ACTIVATION_COVARIANCE_PROCESSED,
    NUM_GRADIENT_COVARIANCE_PROCESSED,
)
from kronfluence.utils.save import save_json
from kronfluence.utils.state import State
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ifguide.models import next_token_nll, predicted_positions

logger = logging.getLogger(__name__)

EXPORTED = (
    *EIGENDECOMPOSITION_FACTOR_NAMES,
    *LAMBDA_FACTOR_NAMES,
    NUM_ACTIVATION_COVARIANCE_PROCESSED,
    NUM_GRADIENT_COVARIANCE_PROCESSED,
)
Factors = dict[str, dict[str, Tensor]]


class NextTokenTask(Task):
    """Summed next-token NLL of a batch {"input_ids" (B, T), "lengths" (B,), "rows" (B,)}.

    Positions >= length carry no loss and do not enter the covariances. With `sample`, labels are drawn from the
    model, by a generator seeded with (`seed`, `stream`, the block's row), so whatever the batch they are the same.
    """

    def __init__(self, module_names: Sequence[str], *, seed: int = 0, stream: int = 0) -> None:
        self.module_names = list(module_names)
        self.seed = seed
        self.stream = stream

    def compute_train_loss(self, batch: dict[str, Tensor], model: PreTrainedModel, sample: bool = False) -> Tensor:
        tokens_BT = batch["input_ids"]
        logits_BTV = model(tokens_BT, use_cache=False).logits
        labels_BT = self._sampled_labels(logits_BTV, batch["rows"]) if sample else tokens_BT
        return next_token_nll(logits_BTV, labels_BT, batch["lengths"]).sum()

    def compute_measurement(self, batch: dict[str, Tensor], model: PreTrainedModel) -> Tensor:
        return self.compute_train_loss(batch=batch, model=model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.module_names

    def get_attention_mask(self, batch: dict[str, Tensor]) -> Tensor:
        mask_BT = predicted_positions(batch["input_ids"], batch["lengths"])
        mask_BT[:, 0] = True
        return mask_BT

    @torch.no_grad()
    def _sampled_labels(self, logits_BTV: Tensor, rows_B: Tensor) -> Tensor:
        """Label-aligned (B, T): entry j is drawn from the logits at j - 1, by an exponential race
        (argmax_v p_v / E_v with E ~ Exp(1) has the distribution p)."""
        labels_BT = torch.zeros(logits_BTV.shape[:2], dtype=torch.long, device=logits_BTV.device)
        generator = torch.Generator(device=logits_BTV.device)
        for index, row in enumerate(rows_B.tolist()):
            entropy = np.random.SeedSequence([self.seed, self.stream, row])
            generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
            probabilities_TV = logits_BTV[index, :-1].float().softmax(dim=-1)
            race_TV = torch.empty_like(probabilities_TV).exponential_(generator=generator)
            labels_BT[index, 1:] = (probabilities_TV / race_TV).argmax(dim=-1)
        return labels_BT


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FactorSample:
    """What the factors are fitted on, the same for every partition and both passes.

    blocks_NT: int32 token ids, padded on the right; lengths_N: real tokens per block. Partition p of P has the
    rows of `numpy.array_split`. `batch_size` is in blocks. `amp_dtype` (bfloat16) runs the model under autocast.
    Raises ValueError when the arrays do not fit together or there are fewer blocks than partitions.
    """

    blocks_NT: np.ndarray
    lengths_N: np.ndarray
    num_partitions: int
    batch_size: int
    seed: int
    use_empirical_fisher: bool = False
    amp_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.blocks_NT.ndim != 2 or self.lengths_N.shape != (len(self.blocks_NT),):
            raise ValueError(
                f"blocks {self.blocks_NT.shape} and lengths {self.lengths_N.shape} do not fit: (N, T) and (N,)"
            )
        if not 1 <= self.num_partitions <= len(self.blocks_NT):
            raise ValueError(
                f"{self.num_partitions} partitions of {len(self.blocks_NT)} blocks; lower data_partitions, "
                "or sample more blocks"
            )

    def identity(self) -> str:
        """Hex SHA-256 of all that decides a partition's values, for telling another sample's files apart."""
        options = [self.num_partitions, self.seed, self.use_empirical_fisher, str(self.amp_dtype)]
        digest = hashlib.sha256(json.dumps([*options, self.blocks_NT.shape]).encode())
        digest.update(np.ascontiguousarray(self.blocks_NT, dtype=np.int32).tobytes())
        digest.update(np.ascontiguousarray(self.lengths_N, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def loader(self, partition: int) -> DataLoader:
        """Batches of one partition, in row order."""
        rows = np.array_split(np.arange(len(self.blocks_NT)), self.num_partitions)[partition]

        def collate(batch_rows: list[int]) -> dict[str, Tensor]:
            return {
                "input_ids": torch.from_numpy(self.blocks_NT[batch_rows].astype(np.int64)),
                "lengths": torch.from_numpy(self.lengths_N[batch_rows].astype(np.int64)),
                "rows": torch.tensor(batch_rows),
            }

        return DataLoader(rows.tolist(), batch_size=self.batch_size, collate_fn=collate)

    def arguments(self, model: PreTrainedModel) -> FactorArguments:
        """kronfluence's arguments: sums in float64 for a float64 model, else in float32."""
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        return FactorArguments(
            use_empirical_fisher=self.use_empirical_fisher,
            amp_dtype=self.amp_dtype,
            covariance_max_examples=None,
            covariance_data_partitions=self.num_partitions,
            activation_covariance_dtype=dtype,
            gradient_covariance_dtype=dtype,
            eigendecomposition_dtype=torch.float64,
            lambda_max_examples=None,
            lambda_data_partitions=self.num_partitions,
            per_sample_gradient_dtype=dtype,
            lambda_dtype=dtype,
        )


def fit_covariance_partition(
    model: PreTrainedModel, sample: FactorSample, partition: int, *, module_names: Sequence[str], workdir: Path
) -> None:
    """Sums a a^T and g g^T over one partition and publishes them in `workdir` by rename.

    A partition that is there already is kept; ValueError if it is of another sample, seed or partition count.
    The caller keeps one `workdir` to one model.
    """
    path_of = functools.partial(_partition_path, kron_covariance.covariance_matrices_save_path, partition)
    if _already_fitted(workdir, path_of, COVARIANCE_FACTOR_NAMES, sample):
        return
    task = NextTokenTask(module_names, seed=sample.seed, stream=0)
    with _tracking(model, task) as state:
        _, factors = kron_covariance.fit_covariance_matrices_with_loader(
            model=model,
            state=state,
            task=task,
            loader=sample.loader(partition),
            factor_args=sample.arguments(model),
            disable_tqdm=True,
        )
    save = functools.partial(
        kron_covariance.save_covariance_matrices,
        factors=factors,
        partition=(partition, 0),
        metadata={"sample": sample.identity()},
    )
    _publish(workdir, save)


def aggregate_covariances(workdir: Path, *, num_partitions: int) -> None:
    """Adds the partitions' sums, in order. FileNotFoundError names a partition that is missing."""
    factors = _sum_partitions(
        workdir, kron_covariance.covariance_matrices_save_path, COVARIANCE_FACTOR_NAMES, num_partitions
    )
    _publish(workdir, functools.partial(kron_covariance.save_covariance_matrices, factors=factors))


def eigendecompose(model: PreTrainedModel, sample: FactorSample, *, module_names: Sequence[str], workdir: Path) -> None:
    """Q_A and Q_S of the aggregated covariances, and kronfluence's factor_arguments.json. On the model's device."""
    for name in COVARIANCE_FACTOR_NAMES:
        _require(kron_covariance.covariance_matrices_save_path(workdir, name))
    arguments = sample.arguments(model)
    with _tracking(model, NextTokenTask(module_names)) as state:
        factors = kron_eigen.perform_eigendecomposition(
            covariance_factors=kron_covariance.load_covariance_matrices(workdir),
            model=model,
            state=state,
            factor_args=arguments,
            disable_tqdm=True,
        )
    _publish(workdir, lambda output_dir: save_json(arguments.to_dict(), output_dir / "factor_arguments.json"))
    _publish(workdir, functools.partial(kron_eigen.save_eigendecomposition, factors=factors))


def fit_lambda_partition(
    model: PreTrainedModel, sample: FactorSample, partition: int, *, module_names: Sequence[str], workdir: Path
) -> None:
    """Sums (Q_S^T G Q_A)^2 over one partition; publishes, keeps and refuses as `fit_covariance_partition`."""
    path_of = functools.partial(_partition_path, kron_eigen.lambda_matrices_save_path, partition)
    if _already_fitted(workdir, path_of, LAMBDA_FACTOR_NAMES, sample):
        return
    for name in EIGENDECOMPOSITION_FACTOR_NAMES:
        _require(kron_eigen.eigendecomposition_save_path(workdir, name))
    task = NextTokenTask(module_names, seed=sample.seed, stream=1)
    with _tracking(model, task) as state:
        _, factors = kron_eigen.fit_lambda_matrices_with_loader(
            model=model,
            state=state,
            task=task,
            loader=sample.loader(partition),
            factor_args=sample.arguments(model),
            eigen_factors=kron_eigen.load_eigendecomposition(workdir),
            disable_tqdm=True,
        )
    save = functools.partial(
        kron_eigen.save_lambda_matrices,
        factors=factors,
        partition=(partition, 0),
        metadata={"sample": sample.identity()},
    )
    _publish(workdir, save)


def aggregate_lambdas(workdir: Path, *, num_partitions: int) -> None:
    """Adds the partitions' sums, in order. FileNotFoundError names a partition that is missing."""
    factors = _sum_partitions(workdir, kron_eigen.lambda_matrices_save_path, LAMBDA_FACTOR_NAMES, num_partitions)
    _publish(workdir, functools.partial(kron_eigen.save_lambda_matrices, factors=factors))


def export_factors(workdir: Path, out_dir: Path) -> None:
    """Copies the aggregated files to `out_dir`: what `load_factors` and kronfluence's Analyzer read, and the
    numbers of tokens behind A and S. The covariances and the partitions stay behind."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in ("factor_arguments.json", *(f"{factor}.safetensors" for factor in EXPORTED)):
        shutil.copyfile(_require(workdir / name), out_dir / name)


@contextmanager
def _tracking(model: PreTrainedModel, task: NextTokenTask) -> Iterator[State]:
    """Wraps the tracked modules for kronfluence and leaves the model, afterwards, as it was found.

    `State` is a process singleton that would pick its own device and, under LOCAL_RANK, join a process group:
    it is made anew for the model's device, and dropped.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    device = model.device
    State._reset_state()
    state = State(cpu=True)
    state.device = device
    started = time.monotonic()
    try:
        with warnings.catch_warnings():
            # kronfluence makes a disabled GradScaler by a deprecated name.
            warnings.simplefilter("ignore", FutureWarning)
            model.eval().requires_grad_(False)
            wrap_tracked_modules(model=model, task=task)
            # The wrappers bring a parameter of their own, made on the CPU.
            nn.Module.to(model, device)
            yield state
    finally:
        _unwrap(model)
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        State._reset_state()
    logger.info("kronfluence: %d modules in %.1f s", len(task.module_names), time.monotonic() - started)


def _unwrap(model: PreTrainedModel) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, TrackedModule):
            parent_name, _, child_name = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child_name, module.original_module)


def _partition_path(path_function: Callable[..., Path], partition: int, workdir: Path, name: str) -> Path:
    return path_function(workdir, name, (partition, 0))


def _already_fitted(
    workdir: Path, path_of: Callable[[Path, str], Path], names: Sequence[str], sample: FactorSample
) -> bool:
    paths = [path_of(workdir, name) for name in names]
    if not all(path.is_file() for path in paths):
        return False
    for path in paths:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("sample") != sample.identity():
                raise ValueError(f"{path} is of another sample, seed or partition count; remove the folder")
    logger.info("%s is complete, kept", paths[0])
    return True


def _sum_partitions(
    workdir: Path, path_function: Callable[..., Path], names: Sequence[str], num_partitions: int
) -> Factors:
    totals: Factors = {name: {} for name in names}
    for partition in range(num_partitions):
        for name in names:
            path = _require(_partition_path(path_function, partition, workdir, name))
            with safe_open(path, framework="pt") as file:
                for module in sorted(file.keys()):
                    value = file.get_tensor(module)
                    totals[name][module] = totals[name][module] + value if module in totals[name] else value
    return totals


def _publish(workdir: Path, save: Callable[..., None]) -> None:
    """Runs `save(output_dir=...)` in a private folder beside the others', then renames each file into place."""
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workdir, prefix=".part-") as folder:
        save(output_dir=Path(folder))
        for path in sorted(Path(folder).iterdir()):
            path.replace(workdir / path.name)


def _require(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the step before it has not completed in this folder")
    return path
