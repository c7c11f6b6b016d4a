"""Which backend is the fastest, as measured: ``python -m sgconvnext.profile ops`` measures it again."""

from torch import Tensor

from .context import is_traced_to_onnx

# Where Toeplitz products beat the FFT, or lose little: device; images at most; longest signal in float32, and in half
# precision. None is any number of images (a number there would be a bound for torch.export). Measured forward and
# backward on two cores with AVX-512, 384 and 768 channels, channels last: 32 images of 36 samples take 5.4 ms by FFT
# and 3.1 ms as products, 8 images of 100 samples 1.8 ms and 10 ms.
TOEPLITZ = (
    ("cpu", 1, 25, 36),
    ("cpu", None, 36, 49),
    ("cuda", None, 32, 32),  # not measured yet
)


def choose_backend(x: Tensor, backend: str = "auto") -> str:
    """The backend that runs for a signal (B, C, L). "auto" is "toeplitz" or "fft", by B, L, dtype and device of x.

    In an export to ONNX by tracing, which has no FFT, it is "toeplitz" or "dft", whichever has fewer products.
    Elsewhere it is never "dft" or "triton": both are for GPUs and have not been timed there yet.
    """
    if backend != "auto":
        return backend
    if is_traced_to_onnx():
        return "toeplitz" if x.shape[2] <= 64 else "dft"
    for device, images, float_length, half_length in TOEPLITZ:
        if x.device.type == device and (images is None or x.shape[0] <= images):
            return "toeplitz" if x.shape[2] <= (half_length if x.itemsize < 4 else float_length) else "fft"
    return "fft"
