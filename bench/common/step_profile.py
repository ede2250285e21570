"""A training step taken apart: seconds of its parts, launches, bytes, and waits of the host for the device.

On a CPU the parts are timed as they run. Launches are operators that compute (views and empty tensors do not), with one
for each compiled kernel: on a GPU each is about one kernel. Bytes are those that operators allocate. A wait is a value
of a tensor that Python reads: `item`, `tolist`, `cpu`, `numpy`, `bool`, `float`, `int`, `index`.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ifguide.training.loop import TrainingLoop

READS = {
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__bool__,
    torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__index__, torch.Tensor.__array__,
}  # fmt: skip
READING_OPERATORS = {"aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.equal.default"}
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


class _Reads(TorchFunctionMode):
    """Counts, by name, the values of tensors that Python reads."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in READS:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class _ReadingOperators(TorchDispatchMode):
    """Counts, by name, operators that give the host a value: most reads of Python's come to them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if str(func) in READING_OPERATORS:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def host_reads(step: Callable[[], Any], steps: int = 1) -> Counter[str]:
    """What the host reads of tensors in so many steps: by Python, and by operators that others than Python call."""
    with _Reads() as reads, _ReadingOperators() as operators:
        for _ in range(steps):
            step()
    by_python = sum(reads.counts[name] for name in ("item", "__bool__", "__float__", "__int__", "__index__"))
    by_others = sum(operators.counts.values()) - by_python
    return reads.counts + Counter({"operators": max(0, by_others)})


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
        self.seconds: Counter[str] = Counter()
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
