"""A training step taken apart: seconds of its parts, launches, bytes, and waits of the host for the device.

On a CPU the parts are timed as they run. Launches are operators that compute (views and empty tensors do not), with one
for each compiled kernel: on a GPU each is about one kernel. Bytes are those that operators allocate. A wait is a value
of a tensor that Python reads: `item`, `tolist`, `cpu`, `numpy`, `bool`, `float`, `int`, `index`.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ifguide.training.loop import TrainingLoop

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
TO_SCALARS = {"item", "__bool__", "__float__", "__int__", "__index__"}  # by way of `SCALAR`
SCALAR = "aten::_local_scalar_dense"
ON_DEVICE = "aten::_fused_adamw_"  # whose kernel of a CPU looks at its scalars; a GPU's leaves them there
# what moves no data
FREE = {
    "aten::empty", "aten::empty_strided", "aten::empty_like", "aten::view", "aten::_unsafe_view", "aten::as_strided",
    "aten::t", "aten::transpose", "aten::permute", "aten::expand", "aten::slice", "aten::select", "aten::unsqueeze",
    "aten::squeeze", "aten::reshape", "aten::_reshape_alias", "aten::alias", "aten::detach", "detach", "aten::split",
    "aten::split_with_sizes", "aten::narrow", "aten::chunk", "aten::lift_fresh", "aten::resize_", "aten::to",
    "aten::result_type", "aten::is_nonzero", "aten::item", "aten::_local_scalar_dense", "aten::set_", "aten::unbind",
    "aten::expand_as", "aten::view_as", "aten::real", "aten::unflatten", "aten::flatten", "aten::resolve_conj",
    "aten::resolve_neg", "aten::contiguous",
}  # fmt: skip


def host_reads(step: Callable[[], Any], steps: int = 1) -> Counter[str]:
    """What the host reads of tensors in so many steps: by Python, by name, and by operators that call no Python."""
    with _counted_reads() as reads, profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            step()
    scalars = sum(1 for event in profiled.events() if event.name == SCALAR and not _within(event, ON_DEVICE))
    by_others = scalars - sum(reads[name] for name in TO_SCALARS)
    return reads + Counter({"operators": max(0, by_others)})


@contextlib.contextmanager
def _counted_reads() -> Iterator[Counter[str]]:
    """Counts by name how often Python reads a tensor. (What is compiled does not run under torch's modes.)"""
    counts: Counter[str] = Counter()
    own = {name: vars(torch.Tensor)[name] for name in READS if name in vars(torch.Tensor)}

    def counted(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def reading(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return read(tensor, *args, **kwargs)

        return reading

    for name in READS:
        setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    try:
        yield counts
    finally:
        for name in READS:
            if name in own:
                setattr(torch.Tensor, name, own[name])
            else:
                delattr(torch.Tensor, name)


def _within(event: Any, name: str) -> bool:
    while event is not None:
        if event.name == name:
            return True
        event = event.cpu_parent
    return False


def launches_and_bytes(step: Callable[[], Any], steps: int) -> tuple[float, float, dict[str, float]]:
    """Launches a step, bytes allocated a step, and the seconds a step of the ten operators that take most."""
    with _named_kernels(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(steps):
            step()
    leaves = [event for event in profiled.events() if not event.cpu_children and event.name not in FREE]
    launches = sum(1 for event in leaves if "::" in event.name or "fused" in event.name)
    averages = profiled.key_averages()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profiled.events())
    slowest = sorted(averages, key=lambda event: -event.self_cpu_time_total)[:10]
    return launches / steps, allocated / steps, {e.key: e.self_cpu_time_total / 1e6 / steps for e in slowest}


@contextlib.contextmanager
def _named_kernels() -> Iterator[None]:
    """Have compiled kernels of a CPU tell the profiler of themselves: they must be compiled under it, too."""
    import torch._inductor.config as inductor

    before = inductor.cpp.enable_kernel_profile
    inductor.cpp.enable_kernel_profile = True
    try:
        yield
    finally:
        inductor.cpp.enable_kernel_profile = before


class Parts:
    """Seconds of the parts of a step of a loop, by name, added up over steps."""

    def __init__(self, loop: TrainingLoop, device: str):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.device = device
        engine: Any = loop.engine
        places = {
            "data": [(loop.batches, "of_step")],
            "backbone": [(engine.module.model.base_model, "forward")],
            "forward": [(engine, "loss")],
            "backward": [(engine, "backward")],
            "optimizer": [(engine.optimizer, "step")],
            "end": [(engine, "end_step")],
        }
        for part, targets in places.items():
            for owner, name in targets:
                setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if part == "data":
                return self._items(function(*args, **kwargs))
            with self._clock(part):
                return function(*args, **kwargs)

        return timed

    def _items(self, items: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self._clock("data"):
                item = next(items, None)
            if item is None:
                return
            yield item

    @contextlib.contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds[part] += time.perf_counter() - started

    def of_step(self, whole: float, steps: int) -> dict[str, float]:
        """Seconds a step, `whole` seconds being those of all `steps`: what is left is the loop's own."""
        s = self.seconds
        parts = {
            "data": s["data"],
            "forward": s["backbone"],
            "head_and_loss": s["forward"] - s["backbone"],
            "backward": s["backward"],
            "clipping": s["end"] - s["optimizer"],
            "optimizer": s["optimizer"],
        }
        parts["loop"] = whole - sum(parts.values())
        return {name: seconds / steps for name, seconds in parts.items()}
