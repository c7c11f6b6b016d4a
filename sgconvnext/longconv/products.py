"""Batched matrix products over a few channels at a time: what the backends that convolve by matrices share."""

import torch
from torch import Tensor

# Bytes of the matrices that exist at a time, or one channel's where that is larger. On a CPU what its caches hold (at
# L = 196 all 384 channels at once took three times as long); elsewhere enough to fill a device, and little beside a
# network's activations. A compiled graph repeats its steps for every chunk, so it has few.
CHUNK_BYTES = {"cpu": 2**23}
ACCELERATOR_CHUNK_BYTES = 2**27
COMPILED_CHUNK_BYTES = 2**29

_BMM_TAKES_OUT_DTYPE = hasattr(torch.ops.aten.bmm, "dtype")  # on CUDA, in newer versions than torch 2.6


def channel_chunks(channels: int, channel_bytes: int, device: torch.device) -> list[slice]:
    """Slices of channels, of almost equal lengths, whose matrices take at most CHUNK_BYTES together.

    Args:
        channels: C.
        channel_bytes: of the matrices of one channel.
        device: that they are on.
    """
    limit = CHUNK_BYTES.get(device.type, ACCELERATOR_CHUNK_BYTES)
    if torch.compiler.is_compiling():
        limit = COMPILED_CHUNK_BYTES
    most = max(1, limit // channel_bytes)
    num_chunks = -(-channels // most)
    size = -(-channels // max(1, num_chunks))
    return [slice(start, min(start + size, channels)) for start in range(0, channels, max(1, size))]


def multiply_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b for batches (N, I, J) and (N, J, K) of one dtype, summed in that of ``out`` if that is wider.

    cuBLAS writes into strided views. On a CPU, bmm would then multiply one matrix after the other, and Dynamo takes
    no strided ``out=``; there the product is copied.
    """
    on_gpu, compiling = out.device.type == "cuda", torch.compiler.is_compiling()
    if a.dtype != out.dtype and on_gpu and _BMM_TAKES_OUT_DTYPE:
        if compiling:
            out.copy_(torch.bmm(a, b, out_dtype=out.dtype))
        else:
            torch.bmm(a, b, out_dtype=out.dtype, out=out)
        return
    a, b = a.to(out.dtype), b.to(out.dtype)
    if on_gpu and not compiling:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))
