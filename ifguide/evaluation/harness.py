"""Benchmarks of lm-evaluation-harness on the models of an evaluation: `evaluate.lm_eval`.

A task is one that the harness knows by name (`lambada_openai`), or a YAML file that describes one of your own. Its data
come from where the task says, mostly the hub. Each metric is kept with an interval of its value and 1.96 of the
standard errors that the harness gives. Models are not paired, as the harness gives no figures of single questions here.

Cost: the harness' own, on the actor that has the model. To know its tasks by name it reads 14,000 files, in 10 to 30 s:
once a process, and not for files that name none of them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEVIATIONS = 1.96  # of the normal distribution: 95% lie within
DETAILS = ("name", "alias", "sample_len")  # of a task, which are no metrics

# of a file that may name other tasks: a group of them, a list in place of a name, or a file that it goes on from
_NAMES_OTHERS = re.compile(r"^\s*(?:group|include|tag)\s*:|^task\s*:\s*(?:\[|$)", re.MULTILINE)

Benchmarks = dict[str, dict[str, dict[str, Any]]]


def benchmarks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int,
    seed: int,
    special_tokens: bool,
) -> Benchmarks:
    """Task -> metric -> {"value", "low", "high", "n"}; interval and n are None where the harness does not tell.

    `tokenizer` may be changed: the harness sets a padding token. `special_tokens`: whether texts get its special
    tokens; else what stands before a text without a context is its EOS, as in a corpus, not its BOS.

    Raises:
        ValueError: a task that the harness does not know. ModuleNotFoundError: it is not installed.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    kinds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    seeds = dict.fromkeys(kinds, seed % 2**32)  # NumPy takes no larger one
    plain = {} if special_tokens else {"add_bos_token": False, "prefix_token_id": tokenizer.eos_token_id}
    harnessed = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **plain)
    manager = _task_manager(defaults=not all(_stands_alone(task) for task in tasks))
    for task in tasks:
        if task not in manager.all_tasks and not Path(task).is_file():
            raise ValueError(f"evaluate.lm_eval: {task} is no task and no file; `lm_eval ls tasks` lists the names")
    made = simple_evaluate(model=harnessed, tasks=list(tasks), task_manager=manager, log_samples=False, **seeds)
    counts = made["n-samples"]
    return {task: _figures(metrics, counts.get(task, {}).get("effective")) for task, metrics in made["results"].items()}


@functools.cache
def _task_manager(*, defaults: bool) -> Any:
    """The harness' own; `defaults`: with the tasks that it knows by name."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _stands_alone(task: str) -> bool:
    """Whether it is a file that names no other task."""
    path = Path(task)
    return path.is_file() and not _NAMES_OTHERS.search(path.read_text(encoding="utf-8"))


def _figures(metrics: Mapping[str, Any], count: int | None) -> dict[str, dict[str, Any]]:
    """The metrics of one task; the harness names them `metric,filter`, and their errors `metric_stderr,filter`."""
    figures = {}
    for key, value in metrics.items():
        metric, _, kind = key.partition(",")
        if key in DETAILS or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{metric}_stderr,{kind}")
        reach = DEVIATIONS * error if isinstance(error, int | float) else None
        ends = {"low": None, "high": None} if reach is None else {"low": value - reach, "high": value + reach}
        figures[metric if kind in ("", "none") else f"{metric}, {kind}"] = {"value": value, **ends, "n": count}
    return figures
