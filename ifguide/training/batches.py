"""The micro-batches of a rank's steps, made one step ahead by a thread and copied to the device without waiting.

A step's blocks come from its number alone, so what is made ahead is what would be made later. On a GPU the host's copy
is in pinned memory: the copy to the device then runs beside what the device computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from ifguide.training.blocks import TrainingBlocks
from ifguide.training.losses import MicroBatch
from ifguide.training.schedule import PADDING, Schedule, rank_micro_batches


class Batches:
    """Micro-batches of `micro_batch_blocks` blocks for one rank, on its device.

    `trained` are the blocks that the schedule's indices speak of. ahead: make the next step's while one is computed.
    """

    def __init__(
        self,
        blocks: TrainingBlocks,
        schedule: Schedule,
        trained: np.ndarray,
        *,
        rank: int,
        world_size: int,
        micro_batch_blocks: int,
        device: torch.device,
        ahead: bool,
    ):
        self.blocks, self.schedule, self.trained = blocks, schedule, trained
        self.rank, self.world_size, self.micro_batch_blocks = rank, world_size, micro_batch_blocks
        self.device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches") if ahead else None
        self._next: tuple[int, Future[list[MicroBatch]]] | None = None

    def of_step(self, step: int) -> Iterator[MicroBatch]:
        """Those of a step of the training."""
        if self._thread is None:
            return self._on_device(self._of_step(step))
        ready = self._next[1].result() if self._next and self._next[0] == step else self._of_step(step)
        self._next = None
        if step + 1 < self.schedule.steps:
            self._next = step + 1, self._thread.submit(self._of_step, step + 1)
        return self._on_device(ready)

    def of_blocks(self, indices: np.ndarray) -> Iterator[MicroBatch]:
        """These blocks without their mask."""
        return self._on_device(self._made(indices, masked=False))

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _of_step(self, step: int) -> list[MicroBatch]:
        batch = self.schedule.batch(step)
        return list(self._made(np.where(batch == PADDING, PADDING, self.trained[batch]), masked=True))

    def _made(self, batch: np.ndarray, *, masked: bool) -> Iterator[MicroBatch]:
        token_count = max(1, self.blocks.predicted_tokens(batch))
        for indices in rank_micro_batches(
            batch, rank=self.rank, world_size=self.world_size, micro_batch_blocks=self.micro_batch_blocks
        ):
            blocks = self.blocks.take(indices)
            mask_BT = self._host(blocks.mask_BT) if masked and blocks.mask_BT is not None else None
            document_BT = None if blocks.document_BT is None else self._host(blocks.document_BT)
            yield MicroBatch(
                self._host(blocks.tokens_BT), self._host(blocks.lengths_B), mask_BT, token_count, document_BT
            )

    def _host(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _on_device(self, made: Iterator[MicroBatch] | list[MicroBatch]) -> Iterator[MicroBatch]:
        def moved(host: torch.Tensor) -> torch.Tensor:
            return host.to(self.device, non_blocking=True)

        for batch in made:
            yield MicroBatch(
                moved(batch.tokens_BT),
                moved(batch.lengths_B),
                None if batch.mask_BT is None else moved(batch.mask_BT),
                batch.token_count,
                None if batch.document_BT is None else moved(batch.document_BT),
            )
