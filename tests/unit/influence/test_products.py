"""Packed products: the layout changes nothing but the last bit."""

import subprocess
import sys

import pytest
import torch

from ifguide.influence import products
from ifguide.influence.products import Product, bfloat16_pays, can_pack

needs_packing = pytest.mark.skipif(not can_pack(), reason="this torch cannot pack bfloat16 matrices")


@needs_packing
@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize(("d_out", "d_in"), [(96, 64), (1, 64), (50, 33)])
def test_packed_products_are_exact_up_to_one_rounding(rows: int, d_out: int, d_in: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, y, matrix = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((rows, d_in), (rows, d_out), (d_out, d_in))
    )
    product = Product(matrix)
    assert product.packed
    exact = x.double() @ matrix.double().mT
    # half a unit in the last of 8 bits, and what cancels in a float32 sum
    torch.testing.assert_close(product(x).double(), exact, rtol=2.0**-8, atol=1e-4)
    torch.testing.assert_close(product.added_to(y.clone(), x).double(), exact + y.double(), rtol=2.0**-8, atol=1e-4)


def test_other_precisions_are_multiplied_as_they_are() -> None:
    x, y, matrix = torch.randn(5, 8), torch.randn(5, 3), torch.randn(3, 8)
    product = Product(matrix)
    assert not product.packed
    assert torch.equal(product(x), torch.nn.functional.linear(x, matrix))
    torch.testing.assert_close(product.added_to(y.clone(), x), y + x @ matrix.mT)


@pytest.mark.parametrize(
    ("instructions", "ratio", "pays"), [(True, 2.0, True), (True, 0.5, False), (False, 2.0, False)]
)
def test_bfloat16_pays_where_there_are_instructions_and_a_product_is_quicker(
    monkeypatch: pytest.MonkeyPatch, instructions: bool, ratio: float, pays: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(products.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(products, "_seconds_ratio", lambda: ratio)
    assert bfloat16_pays.__wrapped__(torch.device("cpu")) is pays


def test_the_ratio_of_seconds_is_of_float32_over_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that a float32 product moves by 3 and a bfloat16 one by 2."""
    now = 0.0

    def multiply(self: Product, x: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += {torch.float32: 3.0, torch.bfloat16: 2.0}[x.dtype]
        return x

    monkeypatch.setattr(Product, "__call__", multiply)
    monkeypatch.setattr(products.time, "perf_counter", lambda: now)
    assert products._seconds_ratio(rows=2, width=2) == 1.5


def test_a_wrong_operator_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_pack", lambda matrix: (2 * matrix).contiguous())
    can_pack.cache_clear()
    try:
        assert not can_pack()
    finally:
        can_pack.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux alone")
def test_freed_memory_stays_with_a_process_that_asks_for_it() -> None:
    code = """
import resource, torch
from ifguide.influence.memory import keep_memory
keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(4 << 20)  # 16 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert int(done.stdout) < 20 * 512  # without it 20 * 4,096: every page of every tensor
