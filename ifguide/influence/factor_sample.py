"""The blocks that EK-FAC factors are fitted on, and how they and the modules are cut into partitions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ifguide.documents import begun


@dataclass(frozen=True, kw_only=True, eq=False)
class FactorSample:
    """What the factors are fitted on, the same for every partition and both passes.

    blocks_NT: int32 token ids, padded on the right; lengths_N: real tokens per block. Partition p of P has the
    rows of `numpy.array_split`, and module partition m the modules of the same. `batch_size` is in blocks. `amp_dtype`
    (bfloat16) runs the model under autocast. `documents_NT`: the number of each token's document, ascending, where
    documents do not see each other. `beginning`: a BOS that the model reads before every block, or before every
    document where they are given, if any.
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
    beginning: int | None = None
    documents_NT: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.blocks_NT.ndim != 2 or self.lengths_N.shape != (len(self.blocks_NT),):
            raise ValueError(
                f"blocks {self.blocks_NT.shape} and lengths {self.lengths_N.shape} do not fit: (N, T) and (N,)"
            )
        if self.documents_NT is not None and self.documents_NT.shape != self.blocks_NT.shape:
            raise ValueError(f"documents {self.documents_NT.shape} and blocks {self.blocks_NT.shape} do not fit")
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
            *([] if self.beginning is None else [f"beginning {self.beginning}"]),
        ]
        digest = hashlib.sha256(json.dumps([*options, self.blocks_NT.shape]).encode())
        digest.update(np.ascontiguousarray(self.blocks_NT, dtype=np.int32).tobytes())
        digest.update(np.ascontiguousarray(self.lengths_N, dtype=np.int64).tobytes())
        if self.documents_NT is not None:
            digest.update(np.ascontiguousarray(self.documents_NT, dtype=np.int64).tobytes())
        return digest.hexdigest()

    @property
    def partitions(self) -> list[tuple[int, int]]:
        """All partitions (data, modules), in the order in which their sums are added."""
        return [(p, m) for p in range(self.num_partitions) for m in range(self.module_partitions)]

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
            tokens_BT = torch.from_numpy(self.blocks_NT[batch_rows].astype(np.int64))
            lengths_B = torch.from_numpy(self.lengths_N[batch_rows].astype(np.int64))
            documents = None
            if self.documents_NT is not None:
                documents = torch.from_numpy(self.documents_NT[batch_rows].astype(np.int64))
            read = begun(tokens_BT, lengths_B, documents, self.beginning)
            batch = {"input_ids": read.tokens_BU, "lengths": read.lengths_B, "rows": torch.tensor(batch_rows)}
            return batch if read.document_BU is None else {**batch, "documents": read.document_BU}

        return DataLoader(rows.tolist(), batch_size=self.batch_size, collate_fn=collate)
