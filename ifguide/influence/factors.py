"""EK-FAC factors of a proxy model, fitted by kronfluence one data partition per process.

Method (EK-FAC, arXiv 1806.03884, as in IF-Guide, arXiv 2506.01790, Sec. 4.1). For every tracked linear module
with input a_t (a bias is one more, constant, last column) and output gradient g_t of a sequence's summed NLL:

    A = E[a a^T] = Q_A diag Q_A^T,   S = E[g g^T] = Q_S diag Q_S^T       (means over real tokens)
    Lambda = E[(Q_S^T G Q_A)^2],     G = sum_t g_t a_t^T                  (mean over sequences)

Labels are sampled from the model (the Fisher), unless `use_empirical_fisher`. `EkfacFit` has the steps, for whoever
distributes them; `fit_factors` takes them all in this process.

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

from __future__ import annotations

import functools
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
from transformers import PreTrainedModel

from ifguide.documents import known_documents
from ifguide.influence.factor_sample import FactorSample
from ifguide.influence.partition_files import (
    module_factors,
    module_folder,
    publish_files,
    require_file,
    sum_partitions,
)
from ifguide.influence.query import ModuleFactors, load_factors
from ifguide.models import next_token_nll, predicted_positions, tracked_modules

logger = logging.getLogger(__name__)

Step = Literal["covariance", "eigen", "lambda"]
STEPS: tuple[Step, ...] = ("covariance", "eigen", "lambda")  # each needs all pieces of the one before it

TOKEN_COUNTS = (NUM_ACTIVATION_COVARIANCE_PROCESSED, NUM_GRADIENT_COVARIANCE_PROCESSED)
EXPORTED = (*EIGENDECOMPOSITION_FACTOR_NAMES, *LAMBDA_FACTOR_NAMES, *TOKEN_COUNTS)


class NextTokenTask(Task):
    """Summed next-token NLL of a batch {"input_ids" (B, T), "lengths" (B,), "rows" (B,)}, and "documents" (B, T) where
    those of a block do not see each other.

    Positions >= length carry no loss and do not enter the covariances. With `sample`, labels are drawn from the
    model, by a generator seeded with (`seed`, `stream`, the block's row), so whatever the batch they are the same.
    """

    def __init__(self, module_names: Sequence[str], *, seed: int = 0, stream: int = 0) -> None:
        self.module_names = list(module_names)
        self.seed = seed
        self.stream = stream

    def compute_train_loss(self, batch: dict[str, Tensor], model: PreTrainedModel, sample: bool = False) -> Tensor:
        tokens_BT = batch["input_ids"]
        document_BT = batch.get("documents")
        with known_documents(document_BT) as places:
            logits_BTV = model(tokens_BT, use_cache=False, **places).logits
        labels_BT = self._sampled_labels(logits_BTV, batch["rows"]) if sample else tokens_BT
        return next_token_nll(logits_BTV, labels_BT, batch["lengths"], document_BT).sum()

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


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """One of kronfluence's two passes over the sample; `stream` is of the labels that it draws."""

    names: tuple[str, ...]
    path: Callable[..., Path]
    fit: Callable[..., Any]
    save: Callable[..., None]
    stream: int


COVARIANCE = _Sums(
    names=tuple(COVARIANCE_FACTOR_NAMES),
    path=kron_covariance.covariance_matrices_save_path,
    fit=kron_covariance.fit_covariance_matrices_with_loader,
    save=kron_covariance.save_covariance_matrices,
    stream=0,
)
LAMBDA = _Sums(
    names=tuple(LAMBDA_FACTOR_NAMES),
    path=kron_eigen.lambda_matrices_save_path,
    fit=kron_eigen.fit_lambda_matrices_with_loader,
    save=kron_eigen.save_lambda_matrices,
    stream=1,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class EkfacFit:
    """One fit in `STEPS`: covariances of each partition, eigenvectors of each module, lambdas of each partition; then
    `finish`. The pieces of a step may be done in any order and by any process; `workdir` is where they meet, and is of
    one model alone. `module_names` are all that are fitted, in the model's order.

    A piece returns the files it published. A partition that is in `workdir` already is kept; ValueError if it is of
    another sample, seed or partition count. A step whose predecessor is missing raises FileNotFoundError, naming the
    file.
    """

    model: PreTrainedModel
    sample: FactorSample
    module_names: Sequence[str]
    workdir: Path

    def covariances(self, partition: int, module_partition: int = 0) -> list[Path]:
        """Sum a a^T and g g^T over one partition of data and modules."""
        return self._sum(COVARIANCE, partition, module_partition)

    def eigenvectors(self, module_name: str) -> list[Path]:
        """Q_A and Q_S of one module, of its partitions' sums added in order. On the model's device."""
        part = self.sample.module_partition(self.module_names, module_name)
        partitions = [(partition, part) for partition in range(self.sample.num_partitions)]
        covariances = sum_partitions(self.workdir, COVARIANCE.path, COVARIANCE.names, partitions, only=module_name)
        with _tracking(self.model, NextTokenTask([module_name])) as state:
            factors = kron_eigen.perform_eigendecomposition(
                covariance_factors=covariances,
                model=self.model,
                state=state,
                factor_args=_arguments(self.sample, self.model),
                disable_tqdm=True,
            )

        def save(output_dir: Path) -> None:
            counts = {name: covariances[name] for name in TOKEN_COUNTS}
            for name, factor in {**factors, **counts}.items():
                save_file(factor, output_dir / f"{name}.safetensors")

        return publish_files(module_folder(self.workdir, module_name), save)

    def lambdas(self, partition: int, module_partition: int = 0) -> list[Path]:
        """Sum (Q_S^T G Q_A)^2 over one partition of data and modules."""
        return self._sum(LAMBDA, partition, module_partition)

    def gather_eigenvectors(self) -> None:
        """The modules' eigenvectors and token counts in kronfluence's files of all modules, and its arguments."""
        arguments = _arguments(self.sample, self.model).to_dict()

        def save(output_dir: Path) -> None:
            for name in (*EIGENDECOMPOSITION_FACTOR_NAMES, *TOKEN_COUNTS):
                save_file(module_factors(self.workdir, name, self.module_names), output_dir / f"{name}.safetensors")
            save_json(arguments, output_dir / "factor_arguments.json")

        publish_files(self.workdir, save)

    def aggregate_lambdas(self) -> None:
        """Add the partitions' sums, in order."""
        factors = sum_partitions(self.workdir, LAMBDA.path, LAMBDA.names, self.sample.partitions)
        publish_files(self.workdir, functools.partial(LAMBDA.save, factors=factors))

    def export(self, out: Path) -> None:
        """Copy to `out` what `load_factors` and kronfluence's Analyzer read, and the numbers of tokens behind A and S.
        The covariances and the partitions stay behind."""
        out.mkdir(parents=True, exist_ok=True)
        for name in ("factor_arguments.json", *(f"{factor}.safetensors" for factor in EXPORTED)):
            shutil.copyfile(require_file(self.workdir / name), out / name)

    def finish(self, out: Path) -> None:
        """Write the factors of all modules to `out`, once every partition is there."""
        self.gather_eigenvectors()
        self.aggregate_lambdas()
        self.export(out)

    def pieces(self, step: Step) -> int:
        """Of how many pieces a step is: partitions, or modules."""
        return len(self.module_names if step == "eigen" else self.sample.partitions)

    def do(self, step: Step, index: int, *, keep: bool = True) -> list[Path]:
        """One piece of a step, by its number; without `keep` it is done again where it is there."""
        if step == "eigen":
            return self.eigenvectors(self.module_names[index])
        return self._sum(COVARIANCE if step == "covariance" else LAMBDA, *self.sample.partitions[index], keep=keep)

    def run(self, out: Path, *, watch: Callable[[Step, range], Iterable[int]] = lambda step, pieces: pieces) -> None:
        """All steps, one after the other, and the factors in `out`. `watch` gives the numbers of a step's pieces back
        one by one, so it is told when each begins and ends."""
        for step in STEPS:
            for index in watch(step, range(self.pieces(step))):
                self.do(step, index)
        self.finish(out)

    def _sum(self, sums: _Sums, partition: int, module_partition: int, *, keep: bool = True) -> list[Path]:
        """One pass over one partition; publishes its sums by rename."""
        place = (partition, module_partition)
        paths = [sums.path(self.workdir, name, partition=place) for name in sums.names]
        if keep and _already_fitted(paths, self.sample):
            return paths
        names = self.sample.modules(self.module_names, module_partition)
        eigenvectors: dict[str, Any] = {}
        if sums is LAMBDA:
            of_modules = {name: module_factors(self.workdir, name, names) for name in EIGENDECOMPOSITION_FACTOR_NAMES}
            eigenvectors["eigen_factors"] = of_modules
        task = NextTokenTask(names, seed=self.sample.seed, stream=sums.stream)
        with _tracking(self.model, task) as state:
            _, factors = sums.fit(
                model=self.model,
                state=state,
                task=task,
                loader=self.sample.loader(partition),
                factor_args=_arguments(self.sample, self.model),
                disable_tqdm=True,
                **eigenvectors,
            )
        metadata = {"sample": self.sample.identity()}
        save = functools.partial(sums.save, factors=factors, partition=place, metadata=metadata)
        return publish_files(self.workdir, save)


def fit_factors(
    model: PreTrainedModel,
    blocks_NT: np.ndarray,
    lengths_N: np.ndarray,
    *,
    module_names: Sequence[str] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    beginning: int | None = None,
    documents_NT: np.ndarray | None = None,
) -> dict[str, ModuleFactors]:
    """EK-FAC factors of `model` from blocks of text, fitted in this process.

    blocks_NT: token ids, padded on the right; lengths_N: real tokens of each block. module_names: None is every tracked
    module (`tracked_modules`; bring the model to plain linear layers with `linearise` first). batch_size: blocks at a
    time; it changes the factors by float noise only. beginning: the BOS that the model was trained with before each
    text, if it was. documents_NT: the number of each token's document, where a block's do not see each other.

    Raises ValueError when blocks and lengths do not fit together, or too little of the model can be tracked.
    """
    sample = FactorSample(
        blocks_NT=blocks_NT,
        lengths_N=lengths_N,
        num_partitions=1,
        batch_size=batch_size,
        seed=seed,
        beginning=beginning,
        documents_NT=documents_NT,
    )
    names = tracked_modules(model).names if module_names is None else module_names
    with tempfile.TemporaryDirectory(prefix="ifguide-factors-") as folder:
        work, out = Path(folder) / "work", Path(folder) / "factors"
        EkfacFit(model=model, sample=sample, module_names=names, workdir=work).run(out)
        return load_factors(out, names)


def _arguments(sample: FactorSample, model: PreTrainedModel) -> FactorArguments:
    """kronfluence's arguments: sums in float64 for a float64 model, else in float32."""
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    return FactorArguments(
        use_empirical_fisher=sample.use_empirical_fisher,
        amp_dtype=sample.amp_dtype,
        covariance_max_examples=None,
        covariance_data_partitions=sample.num_partitions,
        covariance_module_partitions=sample.module_partitions,
        activation_covariance_dtype=dtype,
        gradient_covariance_dtype=dtype,
        eigendecomposition_dtype=torch.float64,
        lambda_max_examples=None,
        lambda_data_partitions=sample.num_partitions,
        lambda_module_partitions=sample.module_partitions,
        per_sample_gradient_dtype=dtype,
        lambda_dtype=dtype,
    )


@contextmanager
def _tracking(model: PreTrainedModel, task: NextTokenTask) -> Iterator[State]:
    """Wraps the tracked modules for kronfluence and leaves the model, afterwards, as it was found.

    `State` is a process singleton that would pick its own device and, under LOCAL_RANK, join a process group:
    it is made anew for the model's device, and dropped.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    was_training = model.training
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
        model.train(was_training)
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        State._reset_state()
    logger.info("kronfluence: %d modules in %.1f s", len(task.module_names), time.monotonic() - started)


def _unwrap(model: PreTrainedModel) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, TrackedModule):
            parent_name, _, child_name = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child_name, module.original_module)


def _already_fitted(paths: Sequence[Path], sample: FactorSample) -> bool:
    if not all(path.is_file() for path in paths):
        return False
    for path in paths:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("sample") != sample.identity():
                raise ValueError(f"{path} is of another sample, seed or partition count; remove the folder")
    logger.info("%s is complete, kept", paths[0])
    return True
