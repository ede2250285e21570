"""A model trained again without some tokens, and what it then makes of the queries: many times, resumed.

A retraining is the run's own training by `ifguide.training`, in one process and on one thread: the same blocks in the
same order from the same initial weights, with the loss of `ignore` on the tokens that are left out. They are still read
as context. A block of which nothing is learnt is passed over; its step keeps its place, learning rate and denominator.
So a half of the documents is trained on in as many steps as the whole.

Each finished retraining is one JSON file, named by a digest of all that decides it: settings, blocks, queries, seed and
the tokens left out.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from transformers import PreTrainedModel

from bench.common.similarity import length_batches, padded
from ifguide.artifacts import json_digest, write_json
from ifguide.artifacts.manifest import read_json
from ifguide.config import to_mapping
from ifguide.influence.query import TokenisedQuery
from ifguide.models import next_token_nll
from ifguide.telemetry import Progress
from ifguide.tokenizer import load_tokenizer
from ifguide.training.blocks import TrainingBlocks
from ifguide.training.engines import TorchEngine
from ifguide.training.losses import MicroBatch
from ifguide.training.model import build_model
from ifguide.training.schedule import PADDING, Schedule, learning_rate
from ifguide.training.settings import TrainingSettings

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
BATCH_TOKENS = 4096  # of queries


@dataclass(frozen=True, kw_only=True, eq=False)
class Retraining:
    """`name` is for people; `seed` decides initial weights and order; `left_out_NT` is label aligned."""

    name: str
    seed: int
    left_out_NT: Bools


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What all retrainings share: `settings` but for the seed, the folder of `blocks`, and the queries."""

    settings: TrainingSettings
    blocks: Path
    queries: Sequence[TokenisedQuery]

    def digest(self, retraining: Retraining) -> str:
        """Of all that decides the losses of a retraining."""
        settings = self.settings
        digests = read_json(self.blocks / "digests.json")
        parts = {
            "train": to_mapping(replace(settings.train, resources=type(settings.train.resources)())),
            "target": to_mapping(settings.target),
            "blocks": {name: entry for name, entry in digests.items() if name.endswith(".npy")},
            "queries": [asdict(query) for query in self.queries],
            "seed": retraining.seed,
            "left_out": hashlib.sha256(np.packbits(retraining.left_out_NT).tobytes()).hexdigest(),
        }
        return json_digest(parts)[:16]


def retrain(subject: Subject, blocks: TrainingBlocks, retraining: Retraining) -> PreTrainedModel:
    """The model after the last step, in evaluation mode."""
    train, left_out_NT = subject.settings.train, retraining.left_out_NT
    settings = replace(subject.settings, seed=retraining.seed)
    torch.manual_seed(settings.seed)
    schedule = Schedule(
        num_blocks=len(blocks.lengths), batch_blocks=train.batch_blocks, epochs=train.epochs, seed=settings.seed
    )
    tokens = schedule.total_blocks * settings.block_size
    build = partial(build_model, settings, load_tokenizer(settings.tokenizer), tokens=tokens)
    engine = TorchEngine(train, build, None)
    learns_N = learning_blocks(blocks, left_out_NT)
    for step in range(schedule.steps):
        batch = schedule.batch(step)
        batch = batch[batch != PADDING]
        count, learnt = max(1, blocks.predicted_tokens(batch)), batch[learns_N[batch]]
        if not len(learnt):
            continue
        engine.begin_step(learning_rate(step, schedule.steps, train))
        for begin in range(0, len(learnt), train.micro_batch_blocks):
            indices = learnt[begin : begin + train.micro_batch_blocks]
            taken = blocks.take(indices)
            tokens_BT, lengths_B, mask_BT = map(
                torch.from_numpy, (taken.tokens_BT, taken.lengths_B, left_out_NT[indices])
            )
            engine.backward(engine.loss(MicroBatch(tokens_BT, lengths_B, mask_BT, count)).loss)
        engine.end_step()
    return engine.module.model.eval()


def learning_blocks(blocks: TrainingBlocks, left_out_NT: Bools) -> Bools:
    """(N,): the blocks with a predicted token that is not left out."""
    positions_T = np.arange(left_out_NT.shape[1])
    return ((positions_T >= 1) & (positions_T < blocks.lengths[:, None]) & ~left_out_NT).any(axis=1)


@torch.no_grad()
def query_losses(model: PreTrainedModel, queries: Sequence[TokenisedQuery]) -> list[float]:
    """The NLL of each query's completion, summed over its tokens, in nats."""
    losses = np.zeros(len(queries))
    for rows in length_batches(queries, BATCH_TOKENS):
        tokens_BT, lengths_B, completion_BT = padded([queries[i] for i in rows])
        nll_BT = next_token_nll(model(tokens_BT, use_cache=False).logits, tokens_BT, lengths_B).double()
        losses[rows] = (nll_BT * completion_BT).sum(1).numpy()
    return losses.tolist()


def retrain_all(
    subject: Subject, retrainings: Sequence[Retraining], folder: Path, *, workers: int, stop_after: float = np.inf
) -> dict[str, Floats]:
    """Name -> losses (Q,) of the retrainings that are finished, in order; `workers` at a time, each on one thread.

    stop_after: seconds after which none is begun; those that run then are finished."""
    blocks = TrainingBlocks(subject.blocks)
    epochs, block_size = subject.settings.train.epochs, blocks.tokens.shape[1]
    paths = {each.name: folder / f"{each.name}-{subject.digest(each)}.json" for each in retrainings}
    tokens = {
        each.name: epochs * block_size * int(learning_blocks(blocks, each.left_out_NT).sum()) for each in retrainings
    }
    waiting = [each for each in retrainings if not paths[each.name].exists()]
    already = sum(tokens.values()) - sum(tokens[each.name] for each in waiting)
    progress = Progress("causal", sum(tokens.values()), "tokens", already=already, every_seconds=20)
    started = time.monotonic()
    if waiting:
        with one_thread_each(workers) as pool:
            running: dict[Future[None], str] = {}
            while running or (waiting and time.monotonic() - started < stop_after):
                while waiting and len(running) < workers and time.monotonic() - started < stop_after:
                    each = waiting.pop(0)
                    running[pool.submit(_retrain_into, subject, each, paths[each.name])] = each.name
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    done.result()
                    progress.advance(tokens[running.pop(done)])
    return {name: np.array(read_json(path)["losses"]) for name, path in paths.items() if path.exists()}


def one_thread_each(workers: int) -> ProcessPoolExecutor:
    """Processes that take turns: two threads of each would wait for one another's."""
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread)


def _one_thread() -> None:
    torch.set_num_threads(1)
    threadpool_limits(1)


def _retrain_into(subject: Subject, retraining: Retraining, path: Path) -> None:
    started = time.monotonic()
    model = retrain(subject, TrainingBlocks(subject.blocks), retraining)
    content = {
        "name": retraining.name,
        "seed": retraining.seed,
        "tokens_left_out": int(retraining.left_out_NT.sum()),
        "seconds": round(time.monotonic() - started, 1),
        "losses": query_losses(model, subject.queries),
    }
    write_json(path, content)


def margins(losses: Mapping[str, Floats], positive_Q: Bools) -> dict[str, float]:
    """Name -> mean loss of the negative queries less that of the positive ones: higher is more of the behaviour."""
    return {name: float(each[~positive_Q].mean() - each[positive_Q].mean()) for name, each in losses.items()}
