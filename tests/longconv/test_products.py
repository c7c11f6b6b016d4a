"""Chunks of channels, what they bound, and what a GPU is told to do: seen on tensors that only pretend to be there."""

from typing import Any

import pytest
import torch
from helpers import relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sgconvnext.longconv import BACKENDS, freeze, long_conv, products, reference
from sgconvnext.longconv.products import channel_chunks, multiply_into

CPU = torch.device("cpu")

each_matrix_backend = pytest.mark.parametrize("backend", ["toeplitz", "dft"])


class Seen(TorchDispatchMode):
    """Every operation below autograd, and what it made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, result))
        return result

    def largest(self) -> int:
        """Bytes of the largest memory that a result lies in."""
        made = [result for _, _, result in self.calls if isinstance(result, Tensor)]
        return max(tensor.untyped_storage().nbytes() for tensor in made)

    def products(self) -> list[tuple[Any, torch.dtype, torch.dtype]]:
        """Variant of bmm, dtype of its operands, dtype of its sum."""
        return [(call, args[0].dtype, result.dtype) for call, args, result in self.calls if "bmm" in str(call)]


def forward_and_backward(x: Tensor, taps: Tensor, backend: str) -> list[Tensor]:
    inputs = [x.detach().requires_grad_(), taps.detach().requires_grad_()]
    y = long_conv(*inputs, backend)
    return [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]


def limit_cpu(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setitem(products.CHUNK_BYTES, "cpu", nbytes)


@pytest.mark.parametrize(
    ("channels", "limit", "sizes"),
    [
        (7, 70, [7]),
        (7, 69, [4, 3]),
        (7, 29, [2, 2, 2, 1]),
        (7, 10, [1] * 7),
        (7, 9, [1] * 7),
        (1, 1, [1]),
        (0, 10, []),
    ],
)
def test_chunks_are_even_in_order_and_within_the_limit(
    channels: int, limit: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_cpu(monkeypatch, limit)
    chunks = channel_chunks(channels, 10, CPU)
    assert [chunk.stop - chunk.start for chunk in chunks] == sizes
    assert [channel for chunk in chunks for channel in range(channels)[chunk]] == list(range(channels))


def test_accelerator_takes_larger_chunks() -> None:
    assert len(channel_chunks(96, 2**21, torch.device("cuda"))) < len(channel_chunks(96, 2**21, CPU))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@each_matrix_backend
def test_chunks_do_not_change_the_result(
    backend: str, dtype: torch.dtype, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, taps = torch.randn(3, 5, 49).to(dtype), torch.randn(5, 49 if causal else 97)
    whole = forward_and_backward(x, taps, backend)
    assert relative_error(whole[0], reference.long_conv(x, taps)) < 1e-2
    chunks = [slice(0, 2), slice(2, 4), slice(4, 5)]
    monkeypatch.setattr(f"sgconvnext.longconv.{backend}.channel_chunks", lambda *_: chunks)
    for got, want in zip(forward_and_backward(x, taps, backend), whole, strict=True):
        assert relative_error(got, want) < 1e-6


@each_matrix_backend
def test_matrices_take_no_more_memory_than_a_chunk(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, taps, limit = torch.randn(1, 256, 49), torch.randn(256, 97), 2**17
    assert x.nbytes + taps.nbytes < 2 * limit
    with Seen() as unlimited:
        forward_and_backward(x, taps, backend)
    limit_cpu(monkeypatch, limit)
    with Seen() as limited:
        forward_and_backward(x, taps, backend)
    assert limited.largest() <= limit
    assert unlimited.largest() > 8 * limit


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fits", [True, False])
def test_fixed_taps_keep_their_matrix_if_it_fits(fits: bool, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_cpu(monkeypatch, 5 * 49**2 * 4 if fits else 5 * 49**2 * 4 - 1)
    x, taps = torch.randn(3, 5, 49), torch.randn(5, 49 if causal else 97)
    convolve = freeze(taps, 49, x.dtype, "toeplitz")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), Seen() as seen:
        y = convolve(x)
    assert relative_error(y, reference.long_conv(x, taps)) <= 2e-6
    built = [call for call, _, _ in seen.calls if call is torch.ops.aten.flip.default]
    assert len(built) == (0 if fits else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_product_is_written_into_a_view_and_summed_in_its_dtype(dtype: torch.dtype) -> None:
    a, b = torch.randn(3, 4, 64).to(dtype), torch.randn(3, 64, 5).to(dtype)
    y = torch.full((4, 6, 5), torch.nan)
    multiply_into(y[:, ::2].transpose(0, 1), a, b)
    assert relative_error(y[:, ::2].transpose(0, 1), a.double() @ b.double()) < 1e-6
    assert y[:, 1::2].isnan().all()


def on_gpu(backend: str, dtype: torch.dtype) -> Seen:
    """What a backend would run on CUDA: fake tensors go through every check of shapes, dtypes and strides."""
    operations = BACKENDS[backend].operations  # below autograd, whose engine has no threads for a fake GPU
    assert operations is not None
    with FakeTensorMode():
        try:
            torch.empty(2, device="cuda")[1:]
        except RuntimeError as error:
            pytest.skip(f"this torch asks a driver for its opinion of fake tensors: {error}")
    with FakeTensorMode(), Seen() as seen:
        x, taps = torch.empty(8, 6, 196, dtype=dtype, device="cuda"), torch.empty(6, 391, device="cuda")
        y = operations.convolve(x, taps, False)
        dx = operations.convolve(torch.empty_like(y), taps, True)
        dtaps = operations.correlate(x, torch.empty_like(y), taps.shape[1])
    assert (y.dtype, dx.dtype, dtaps.dtype) == (dtype, dtype, torch.float32)
    assert (y.shape, dx.shape, dtaps.shape) == (x.shape, x.shape, taps.shape)
    assert y.is_contiguous()
    assert all(tensor.is_cuda for tensor in (y, dx, dtaps))
    return seen


@pytest.mark.skipif(not hasattr(torch.ops.aten.bmm, "dtype"), reason="this torch has no bmm(out_dtype=)")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_matrix_backend
def test_gpu_sums_the_taps_gradient_of_half_precision_in_float32(backend: str, dtype: torch.dtype) -> None:
    found = on_gpu(backend, dtype).products()
    assert (torch.ops.aten.bmm.dtype_out, dtype, torch.float32) in found
    assert (torch.ops.aten.bmm.out, dtype, dtype) in found  # y and dx, without a copy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@each_matrix_backend
def test_gpu_with_an_older_torch_converts_the_operands_instead(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_BMM_TAKES_OUT_DTYPE", False)
    found = on_gpu(backend, dtype).products()
    assert any(operands == sums == torch.float32 for _, operands, sums in found)
    assert all(operands == sums for _, operands, sums in found)
