"""Products with constant matrices: y = x M^T, with M held in the layout that the machine's kernels read.

On a CPU a bfloat16 product spends a tenth of its time on bringing M into blocks, the same at every call. oneDNN keeps
it in blocks where torch was built with it: `torch.ops.mkldnn`, which torch's own compiler uses when it freezes a
model. It is tried once on a small product, and left alone if it is not there or not right.

Cost: 2 FLOP for each entry of M and row of x; M is held once. Sums are float32 in either layout.
"""

import functools
import math
import platform
import time
from typing import ClassVar
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

PAYS_FROM = 1.2  # times as quick as float32: bfloat16 costs precision
EXPECTED_ROWS = 2048  # oneDNN chooses the blocks for about so many; any number is right


class Product:
    """Multiplies rows by a matrix of shape (d_out, d_in), which it may keep in blocks; the matrix must not change.

    A graph that is being compiled cannot hold a matrix in blocks: it holds a key of it, and the product is a call."""

    _by_key: ClassVar[WeakValueDictionary[int, "Product"]] = WeakValueDictionary()

    def __init__(self, matrix: Tensor) -> None:
        self.packed = matrix.device.type == "cpu" and matrix.dtype == torch.bfloat16 and can_pack()
        matrix = matrix.detach()
        self.d_out = len(matrix)
        self.matrix = _pack(matrix) if self.packed else matrix
        self.key = torch.tensor(id(self))  # a tensor: of a number, each value would be compiled anew
        self._by_key[id(self)] = self

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, d_in), in the matrix' dtype -> (N, d_out)."""
        if not self.packed:
            return F.linear(x, self.matrix)
        if torch.compiler.is_compiling():
            return _product(x, self.key, self.d_out)
        return torch.ops.mkldnn._linear_pointwise(x, self.matrix, None, "none", [], "")

    def added_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y + x M^T, rounded once; y (N, d_out) may be overwritten."""
        if not self.packed:
            return y.addmm_(x, self.matrix.mT)
        if torch.compiler.is_compiling():
            return _product_added(y, x, self.key)
        return torch.ops.mkldnn._linear_pointwise.binary(x, y, self.matrix, None, "add")

    @classmethod
    def of_key(cls, key: Tensor) -> "Product":
        return cls._by_key[int(key)]


@torch.library.custom_op("ifguide::product", mutates_args=())
def _product(x: Tensor, key: Tensor, d_out: int) -> Tensor:
    return Product.of_key(key)(x)


@_product.register_fake
def _(x: Tensor, key: Tensor, d_out: int) -> Tensor:
    return x.new_empty(len(x), d_out)


@torch.library.custom_op("ifguide::product_added", mutates_args=())
def _product_added(y: Tensor, x: Tensor, key: Tensor) -> Tensor:
    return Product.of_key(key).added_to(y, x)


@_product_added.register_fake
def _(y: Tensor, x: Tensor, key: Tensor) -> Tensor:
    return torch.empty_like(y)


class JointProduct:
    """Multiplies by two matrices L (d_out, m) and R (d_out, n) at once, [a b] -> L a + R b, or by L alone.

    One product in place of one that is added to another's output, which is written and read once more for it."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.matrix = torch.cat([left.detach(), right.detach()], dim=1)
        self.width = left.shape[1]

    def left(self, a: Tensor) -> Tensor:
        """a (..., m) -> (..., d_out)."""
        return F.linear(a, self.matrix[:, : self.width])

    def both(self, a_and_b: Tensor) -> Tensor:
        """a_and_b (..., m + n) -> (..., d_out)."""
        return F.linear(a_and_b, self.matrix)


@functools.cache
def bfloat16_pays(device: torch.device) -> bool:
    """Whether products are quicker in bfloat16 than in float32 on a device.

    A CPU needs instructions for it: with AVX2 alone, bfloat16 took six times as long as float32. With them it is asked
    for a product in both: an AMD EPYC took half as long in bfloat16, an Intel Xeon with AVX-512's and no AMX twice as
    long. No processor was met that is between, where two runs might decide differently."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if platform.machine() in ("x86_64", "AMD64"):
        supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(supported) and _seconds_ratio() >= PAYS_FROM


def _seconds_ratio(rows: int = EXPECTED_ROWS, width: int = 768, repeats: int = 5) -> float:
    """Seconds of a product on the CPU in float32 over those in bfloat16: the best of each, taken in turns."""
    generator = torch.Generator().manual_seed(0)
    x, matrix = (torch.randn(shape, generator=generator) for shape in ((rows, width), (width, width)))
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    pairs = {dtype: (x.to(dtype), Product(matrix.to(dtype))) for dtype in seconds}
    for _ in range(repeats):
        for dtype, (rows_of_x, product) in pairs.items():
            start = time.perf_counter()
            product(rows_of_x)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.float32] / seconds[torch.bfloat16]


@functools.cache
def can_pack() -> bool:
    """Whether this torch multiplies by packed bfloat16 matrices, and does so rightly."""
    generator = torch.Generator().manual_seed(0)
    x, y, matrix = (torch.randn(shape, generator=generator).bfloat16() for shape in ((33, 64), (33, 96), (96, 64)))
    try:
        packed = _pack(matrix)
        product = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        added = torch.ops.mkldnn._linear_pointwise.binary(x, y, packed, None, "add")
    except (AttributeError, RuntimeError):  # no such operator in this build; not for this processor
        return False
    expected = x.float() @ matrix.float().mT
    close = functools.partial(torch.allclose, rtol=2.0**-7, atol=2.0**-7)
    return close(product.float(), expected) and close(added.float(), y.float() + expected)


def _pack(matrix: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), EXPECTED_ROWS)
    return packed
