"""Batched matrix products, and chunks of channels to do them for: shared by the backends that convolve by matrices."""

import torch
from torch import Tensor

# Bytes of the matrices that exist at a time; one channel may take more. A CPU's caches hold as much: at L = 196 all
# 384 channels at once took three times as long. On an accelerator as much fills the device, and is little beside a
# network's activations.
CHUNK_BYTES = {"cpu": 2**23}
ACCELERATOR_CHUNK_BYTES = 2**27

_BMM_TAKES_OUT_DTYPE = hasattr(torch.ops.aten.bmm, "dtype")  # on CUDA, in newer versions than torch 2.6


def channel_chunks(channels: int, channel_bytes: int, device: torch.device) -> list[slice]:
    """Slices of channels, of almost equal lengths. The matrices of one slice take at most the bytes above.

    Args:
        channels: C.
        channel_bytes: of the matrices of one channel.
        device: where the matrices are.
    """
    most = max(1, CHUNK_BYTES.get(device.type, ACCELERATOR_CHUNK_BYTES) // channel_bytes)
    num_chunks = -(-channels // most)
    size = -(-channels // max(1, num_chunks))
    return [slice(start, min(start + size, channels)) for start in range(0, channels, max(1, size))]


def multiply_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b for batches (N, I, J) and (N, J, K) of one dtype, summed in the dtype of ``out`` if that is wider.

    cuBLAS writes into strided views. On a CPU, bmm would multiply one matrix after the other to do so: there the
    product is copied.
    """
    on_gpu = out.device.type == "cuda"
    if a.dtype != out.dtype and on_gpu and _BMM_TAKES_OUT_DTYPE:
        torch.bmm(a, b, out_dtype=out.dtype, out=out)
        return
    a, b = a.to(out.dtype), b.to(out.dtype)
    if on_gpu:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))
