"""EK-FAC factors of a proxy model, fitted by kronfluence one data partition per process.

Method (EK-FAC, arXiv 1806.03884, as in IF-Guide, arXiv 2506.01790, Sec. 4.1). For every tracked linear module
with input a_t (a bias is one more, constant, last column) and output gradient g_t of a sequence's summed NLL:

    A = E[a a^T] = Q_A diag Q_A^T,   S = E[g g^T] = Q_S diag Q_S^T       (means over real tokens)
    Lambda = E[(Q_S^T G Q_A)^2],     G = sum_t g_t a_t^T                  (mean over sequences)

Labels are sampled from the model (the Fisher), unless `use_empirical_fisher`. The order of the calls is

    fit_covariance_partition (each partition) -> eigendecompose (each module) -> gather_eigenvectors
      -> fit_lambda_partition (each partition) -> aggregate_lambdas -> export_factors

A partition is of data and of modules: one with a part of the modules holds the sums of those alone, and its backward
pass ends at the first of them. So M module partitions divide the memory of the sums by M, and cost M forward passes.

All files are kronfluence's own, by name and key, so its Analyzer loads the exported folder. Sums are float32
(float64 for a float64 model): bfloat16 sums saturate. Eigenvectors are computed in float64.

Determinism: the sampled labels of a block depend on `seed` and the block's row in the sample alone. So the
process, the batch size and the number of data partitions change the factors by float noise only, module partitions
not at all, and one partition fitted again gives the same bytes.

Cost: covariance and Lambda are a forward and a backward pass over the sample each, plus d_in^2 + d_out^2 and
d_in d_out (d_in + d_out) / T FLOP per token and module; a batch of Lambda holds one gradient per sequence of
one module. kronfluence's loops are called directly instead of its Analyzer, which writes shared files from
every process, in place, and sets the root logger's level.

It does not shard a module, and a model is on one device.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import shutil
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
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ifguide.influence.partition_files import (
    module_factors,
    module_folder,
    publish_files,
    require_file,
    sum_partitions,
)
from ifguide.models import next_token_nll, predicted_positions

logger = logging.getLogger(__name__)

TOKEN_COUNTS = (NUM_ACTIVATION_COVARIANCE_PROCESSED, NUM_GRADIENT_COVARIANCE_PROCESSED)
EXPORTED = (*EIGENDECOMPOSITION_FACTOR_NAMES, *LAMBDA_FACTOR_NAMES, *TOKEN_COUNTS)


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
    rows of `numpy.array_split`, and module partition m the modules of the same. `batch_size` is in blocks. `amp_dtype`
    (bfloat16) runs the model under autocast.
    Raises ValueError when the arrays do not fit together or there are fewer blocks than partitions.
    """

    blocks_NT: np.ndarray
    lengths_N: np.ndarray
    num_partitions: int
    batch_size: int
    seed: int
    use_empirical_fisher: bool = False
    amp_dtype: torch.dtype | None = None
    module_partitions: int = 1

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
        options = [
            self.num_partitions,
            self.module_partitions,
            self.seed,
            self.use_empirical_fisher,
            str(self.amp_dtype),
        ]
        digest = hashlib.sha256(json.dumps([*options, self.blocks_NT.shape]).encode())
        digest.update(np.ascontiguousarray(self.blocks_NT, dtype=np.int32).tobytes())
        digest.update(np.ascontiguousarray(self.lengths_N, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def modules(self, module_names: Sequence[str], module_partition: int) -> list[str]:
        """The modules of a module partition, neighbours in the model. ValueError: more partitions than modules."""
        if not 1 <= self.module_partitions <= len(module_names):
            raise ValueError(
                f"{self.module_partitions} module partitions of {len(module_names)} modules; lower"
                " fit_factors.module_partitions"
            )
        chosen = np.array_split(np.arange(len(module_names)), self.module_partitions)[module_partition]
        return [module_names[index] for index in chosen]

    def module_partition(self, module_names: Sequence[str], module_name: str) -> int:
        """The partition that a module is in."""
        return next(m for m in range(self.module_partitions) if module_name in self.modules(module_names, m))

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
            covariance_module_partitions=self.module_partitions,
            activation_covariance_dtype=dtype,
            gradient_covariance_dtype=dtype,
            eigendecomposition_dtype=torch.float64,
            lambda_max_examples=None,
            lambda_data_partitions=self.num_partitions,
            lambda_module_partitions=self.module_partitions,
            per_sample_gradient_dtype=dtype,
            lambda_dtype=dtype,
        )


def fit_covariance_partition(
    model: PreTrainedModel,
    sample: FactorSample,
    partition: int,
    *,
    module_names: Sequence[str],
    workdir: Path,
    module_partition: int = 0,
) -> None:
    """Sums a a^T and g g^T over one partition of data and modules and publishes them in `workdir` by rename.

    A partition that is there already is kept; ValueError if it is of another sample, seed or partition count.
    The caller keeps one `workdir` to one model.
    """
    path_of = functools.partial(
        kron_covariance.covariance_matrices_save_path, workdir, partition=(partition, module_partition)
    )
    if _already_fitted(path_of, COVARIANCE_FACTOR_NAMES, sample):
        return
    names = sample.modules(module_names, module_partition)
    task = NextTokenTask(names, seed=sample.seed, stream=0)
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
        partition=(partition, module_partition),
        metadata={"sample": sample.identity()},
    )
    publish_files(workdir, save)


def eigendecompose(
    model: PreTrainedModel, sample: FactorSample, module_name: str, *, module_names: Sequence[str], workdir: Path
) -> None:
    """Q_A and Q_S of one module, of its partitions' sums added in order. On the model's device.

    FileNotFoundError names a partition that is missing."""
    part = sample.module_partition(module_names, module_name)
    partitions = [(partition, part) for partition in range(sample.num_partitions)]
    path_function = kron_covariance.covariance_matrices_save_path
    covariances = sum_partitions(workdir, path_function, COVARIANCE_FACTOR_NAMES, partitions, only=module_name)
    with _tracking(model, NextTokenTask([module_name])) as state:
        factors = kron_eigen.perform_eigendecomposition(
            covariance_factors=covariances,
            model=model,
            state=state,
            factor_args=sample.arguments(model),
            disable_tqdm=True,
        )

    def save(output_dir: Path) -> None:
        counts = {name: covariances[name] for name in TOKEN_COUNTS}
        for name, factor in {**factors, **counts}.items():
            save_file(factor, output_dir / f"{name}.safetensors")

    publish_files(module_folder(workdir, module_name), save)


def gather_eigenvectors(
    model: PreTrainedModel, sample: FactorSample, *, module_names: Sequence[str], workdir: Path
) -> None:
    """The modules' eigenvectors and token counts in kronfluence's files of all modules, and its factor_arguments.json.

    FileNotFoundError names a module's file that is missing."""
    arguments = sample.arguments(model).to_dict()

    def save(output_dir: Path) -> None:
        for name in (*EIGENDECOMPOSITION_FACTOR_NAMES, *TOKEN_COUNTS):
            save_file(module_factors(workdir, name, module_names), output_dir / f"{name}.safetensors")
        save_json(arguments, output_dir / "factor_arguments.json")

    publish_files(workdir, save)


def fit_lambda_partition(
    model: PreTrainedModel,
    sample: FactorSample,
    partition: int,
    *,
    module_names: Sequence[str],
    workdir: Path,
    module_partition: int = 0,
) -> None:
    """Sums (Q_S^T G Q_A)^2 over one partition; publishes, keeps and refuses as `fit_covariance_partition`."""
    path_of = functools.partial(kron_eigen.lambda_matrices_save_path, workdir, partition=(partition, module_partition))
    if _already_fitted(path_of, LAMBDA_FACTOR_NAMES, sample):
        return
    names = sample.modules(module_names, module_partition)
    eigen_factors = {name: module_factors(workdir, name, names) for name in EIGENDECOMPOSITION_FACTOR_NAMES}
    task = NextTokenTask(names, seed=sample.seed, stream=1)
    with _tracking(model, task) as state:
        _, factors = kron_eigen.fit_lambda_matrices_with_loader(
            model=model,
            state=state,
            task=task,
            loader=sample.loader(partition),
            factor_args=sample.arguments(model),
            eigen_factors=eigen_factors,
            disable_tqdm=True,
        )
    save = functools.partial(
        kron_eigen.save_lambda_matrices,
        factors=factors,
        partition=(partition, module_partition),
        metadata={"sample": sample.identity()},
    )
    publish_files(workdir, save)


def aggregate_lambdas(workdir: Path, *, num_partitions: int, module_partitions: int = 1) -> None:
    """Adds the partitions' sums, in order. FileNotFoundError names a partition that is missing."""
    partitions = [(partition, m) for partition in range(num_partitions) for m in range(module_partitions)]
    factors = sum_partitions(workdir, kron_eigen.lambda_matrices_save_path, LAMBDA_FACTOR_NAMES, partitions)
    publish_files(workdir, functools.partial(kron_eigen.save_lambda_matrices, factors=factors))


def export_factors(workdir: Path, out_dir: Path) -> None:
    """Copies the aggregated files to `out_dir`: what `load_factors` and kronfluence's Analyzer read, and the
    numbers of tokens behind A and S. The covariances and the partitions stay behind."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in ("factor_arguments.json", *(f"{factor}.safetensors" for factor in EXPORTED)):
        shutil.copyfile(require_file(workdir / name), out_dir / name)


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


def _already_fitted(path_of: Callable[[str], Path], names: Sequence[str], sample: FactorSample) -> bool:
    paths = [path_of(name) for name in names]
    if not all(path.is_file() for path in paths):
        return False
    for path in paths:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("sample") != sample.identity():
                raise ValueError(f"{path} is of another sample, seed or partition count; remove the folder")
    logger.info("%s is complete, kept", paths[0])
    return True
