"""Which backend is the fastest: as `sgconvnext.tune` measured it here, or else by the thresholds below.

``python -m sgconvnext.profile ops`` measures these again.
"""

import torch
from torch import Tensor

from . import tuned
from .context import is_open, is_recorded, is_traced_to_onnx
from .triton import toeplitz as triton_toeplitz

# Where Toeplitz products beat the FFT, or lose little: device; images at most; longest signal in float32, and in half
# precision. None is any number of images (a number there would be a bound for torch.export). Measured forward and
# backward. On two cores with AVX-512, 384 and 768 channels, channels last: 32 images of 36 samples take 5.4 ms by FFT
# and 3.1 ms as products, 8 images of 100 samples 1.8 ms and 10 ms. On an H200 in float32: 256 images of 196 samples
# take 2.5 ms by FFT and 1.0 ms as products, of 784 samples 4.0 and 5.8 ms.
TOEPLITZ = (
    ("cpu", 1, 25, 36),
    ("cpu", None, 36, 49),
    ("cuda", None, 256, 256),
)
# The longest signal for which Triton's programs beat the FFT in half precision. Measured on an H200, forward and
# backward: 256 images of 3,136 samples take 8.4 ms by FFT and 3.6 ms by Triton, 8 of 9,216 samples 1.7 and 8.3 ms.
TRITON = 4096


def choose_backend(
    x: Tensor,
    backend: str = "auto",
    length: int | None = None,
    one_length: bool = True,
    frozen: bool = False,
    batch: int | None = None,
) -> str:
    """The backend that runs for a signal (B, C, L). "auto" is the fastest, by B, L, dtype and device of x.

    Args:
        x: the signal; with ``length``, anything of its dtype, device and number of images.
        backend: "auto", or what is to run.
        length: L; None for that of x.
        one_length: whether this length comes again and again, so that it is worth compiling Triton's programs for it.
        frozen: whether the taps are fixed.
        batch: B; None for that of x.

    Returns:
        The name. What `sgconvnext.tune` measured goes before all else, except in exports. In an export that leaves L
        open, "auto" is "dft". In an export to ONNX by tracing, which has no FFT, it is "toeplitz" or "dft", whichever
        has fewer products. On an H100 or H200 in half precision, by autocast too, it is "triton" up to `TRITON`
        samples, except in exports. Elsewhere it is "toeplitz" or "fft".
    """
    if backend != "auto":
        return backend
    length = x.shape[2] if length is None else length
    if is_open((length,)):
        return "dft"
    if is_traced_to_onnx():
        return "toeplitz" if length <= 64 else "dft"
    batch = x.shape[0] if batch is None else batch
    measured = None if is_recorded() else tuned.choice(x, batch, length, one_length, frozen)
    if measured and (measured != "triton" or triton_toeplitz.refusal(x) is None):
        return measured
    return shipped_backend(x, batch, length, one_length)


def shipped_backend(x: Tensor, batch: int, length: int, one_length: bool) -> str:
    """What "auto" is where nothing was measured, but for exports; arguments as of `choose_backend`."""
    # in this order: a comparison of a symbolic length is a bound for torch.export
    compiled = x.device.type == "cuda" and one_length and not is_recorded() and _is_timed(x.device.index)
    if compiled and triton_toeplitz.refusal(x) is None and length <= TRITON:
        return "triton"
    for device, images, float_length, half_length in TOEPLITZ:
        if x.device.type == device and (images is None or batch <= images):
            return "toeplitz" if length <= (half_length if x.itemsize < 4 else float_length) else "fft"
    return "fft"


@torch.compiler.assume_constant_result
def _is_timed(index: int) -> bool:
    """Whether Triton's programs have been timed on GPUs of this kind: NVIDIA's Hopper. Others may lack the memory."""
    return torch.version.hip is None and torch.cuda.get_device_capability(index)[0] == 9
