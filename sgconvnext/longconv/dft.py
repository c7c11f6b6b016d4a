"""Long convolution as products with small matrices only: O(L^1.5), at matrix-multiply speed in the dtype of x.

The signal, with zeros behind it, is n blocks X_q of b samples. Between blocks the convolution is one over their index,
with Toeplitz matrices as taps:

    Y_p = sum_{q=0}^{n-1} X_q T_{p-q}        T_d (b, b) of the lags (d - 1) b + 1 .. (d + 1) b - 1

A DFT of N = 2n - 1 points over the index turns the sum into one product per frequency. In real numbers, with the
cosine and sine of a frequency beside each other and the root of its weight in each of the two transforms, this is

    y = W^T M W x        W (2n, n) with W^T W = 1;  M one (2b, 2b) matrix for each of n frequencies

and dM = (W x)^T (W dy), summed over the batch. dx is the convolution of dy with the taps of the opposite lags.

Products are in the dtype of x; under autocast x is cast, as for any convolution. In half precision x, taps and dy are
rounded once more after their transforms: the relative error of y, dx and dtaps is 4e-3 in bfloat16 and 5e-4 in
float16. Rounding the taps and y alone makes errors of 2.4e-3 and 3e-4. float32 is TF32 only if torch is told so, by
torch.backends.cuda.matmul.allow_tf32 or torch.set_float32_matmul_precision.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Backend, Operations
from .context import is_open, is_recorded
from .precision import full_precision, product_dtype, without_autocast
from .products import channel_chunks, multiply_into
from .toeplitz import antidiagonal_sums

# In an export. For one image a runtime mostly waits for M to come from memory: of 40 channels of 56 x 56 tokens,
# onnxruntime takes 19.6 ms with 56 blocks of 56 samples, and 11.6 ms with the 132 of 24 that this gives; for 8 images
# it takes 54 and 51 ms.
READING = 3


def block_shape(length: int, reading: int = 0) -> tuple[int, int]:
    """n and b: the n blocks of b samples that hold a signal with the fewest products, 4 n b (n + b) for W, M and W^T.

    M is read once for all images: each of its numbers counts as ``reading`` further products.

    b is a multiple of 8 and n of 4, unless it is 1, so that every row of every matrix begins at a multiple of 16 bytes
    in half precision, as fast kernels need (at 224 px: 56 x 56, 20 x 40, 28 x 8 and 8 x 8 for 3136, 784, 196, 49).
    """
    widest = 8 * math.ceil(math.sqrt(length) / 4)  # twice the root; any wider, and there are more products
    sizes = range(8, widest + 1, 8)
    best = (1, 8 * math.ceil(length / 8))
    for n, size in [(4 * math.ceil(length / (4 * size)), size) for size in sizes]:
        costs = [count * width * (count + (1 + reading) * width) for count, width in ((n, size), best)]
        if costs[0] < costs[1]:  # torch 2.6 compiles no min(key=...)
            best = (n, size)
    return best


def waves(left: Tensor, right: Tensor, points: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and minus sine of 2 pi i j / points, for i of left and j of right, both whole numbers."""
    phase = left[:, None] * right
    # exact, where angles would be rounded; the exporter to ONNX has no remainder for an open size
    phase = phase - torch.div(phase, points, rounding_mode="floor") * points
    angle = phase.to(dtype) * (2 * math.pi / points)
    return angle.cos(), -angle.sin()


def _waves(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosine and minus sine (2n, 2n-1) of the n frequencies below half of N = 2n-1, at -(n-1) .. n-1."""
    frequency, index = torch.arange(n, device=device), torch.arange(1 - n, n, device=device)
    return torch.stack(waves(frequency, index, 2 * n - 1, dtype), 1).flatten(0, 1)


def _isometry(waves: Tensor) -> Tensor:
    """W (2n, n) of `_waves`: frequency 0 counts once, the others for their mirror images too."""
    n = waves.shape[0] // 2
    energy = torch.cat([waves.new_full((2, 1), 1 / (2 * n - 1)), waves.new_full((2 * n - 2, 1), 2 / (2 * n - 1))])
    return waves[:, n - 1 :] * energy.sqrt()


class _Plan:
    """Sizes, matrices and taps for one call, and the steps that forward and backward share."""

    def __init__(self, x: Tensor, taps: Tensor) -> None:
        self.length, self.num_taps = int(x.shape[-1]), int(taps.shape[-1])
        self.blocks, self.size = block_shape(self.length)
        self.dtype, self.exact = x.dtype, full_precision(x.dtype)
        self.waves = _waves(self.blocks, self.exact, x.device)
        self.transform = _isometry(self.waves).to(x.dtype)
        self.margin = self.blocks * self.size - self.length
        self.before = self.length + self.blocks * self.size - 1 - self.num_taps  # zeros, up to the first tap
        self.taps = F.pad(taps.to(self.exact), (self.before, self.margin))
        matrix_bytes = (2 * self.size) ** 2 * self.exact.itemsize
        self.chunks = channel_chunks(x.shape[1], self.blocks * matrix_bytes, x.device)

    def split(self, x: Tensor) -> Tensor:
        """x (B, C, L), with zeros behind it, as (B*C, n, b)."""
        return (F.pad(x, (0, self.margin)) if self.margin else x).reshape(-1, self.blocks, self.size)

    def spectrum(self, x: Tensor, batch: int) -> Tensor:
        """W x (B, C*n, 2b) of x (B*C, n, b)."""
        return torch.bmm(self.transform.expand(x.shape[0], -1, -1), x).view(batch, -1, 2 * self.size)

    def matrices(self, taps: Tensor) -> Tensor:
        """M (C*n, 2b, 2b) of taps (C, 2nb-1), for blocks whose samples are in reverse order.

        A row [re im] times [[Re, Im], [-Im, Re]] is a complex product. Each of the four is Toeplitz, and with its rows
        in reverse order every row is the one before, one lag later.
        """
        lags = taps.unfold(-1, 2 * self.size - 1, self.size)  # (C, 2n-1, 2b-1): row d + n - 1 has the lags of T_d
        response = torch.bmm(self.waves.expand(lags.shape[0], -1, -1), lags).to(self.dtype)
        real, imaginary = response.view(-1, 2, 2 * self.size - 1).unbind(1)
        matrices = response.new_empty(real.shape[0], 2, self.size, 2, self.size)
        for row, column, part in ((0, 0, real), (0, 1, imaginary), (1, 0, -imaginary), (1, 1, real)):
            matrices[:, row, :, column] = part.unfold(-1, self.size, 1)
        return matrices.view(-1, 2 * self.size, 2 * self.size)

    def convolve(self, spectrum: Tensor, taps: Tensor) -> Tensor:
        """y (B, C, L) of W x (B, C*n, 2b) with the samples of every block of x in reverse order."""
        product = torch.empty_like(spectrum)
        multiply_into(product.transpose(0, 1), spectrum.transpose(0, 1), self.matrices(taps))
        product = product.view(-1, 2 * self.blocks, self.size)
        y = torch.bmm(self.transform.mT.expand(product.shape[0], -1, -1), product)
        return y.view(spectrum.shape[0], -1, self.blocks * self.size)[..., : self.length]

    def correlate(self, spectrum: Tensor, reverse: Tensor) -> Tensor:
        """dK (C, num_taps) of W x and W dy (B, C*n, 2b), this one with the samples of every block in reverse order.

        Summed over the batch in float32 (float64 for float64).
        """
        size = self.size
        gradient = spectrum.new_empty(spectrum.shape[1], 2 * size, 2 * size, dtype=self.exact)
        multiply_into(gradient, spectrum.permute(1, 2, 0), reverse.transpose(0, 1))
        real = gradient[:, :size, :size] + gradient[:, size:, size:]
        imaginary = gradient[:, :size, size:] - gradient[:, size:, :size]
        parts = F.pad(torch.stack([real, imaginary], 1).flatten(0, 1), (0, size))
        response = antidiagonal_sums(parts).flip(-1).view(-1, 2 * self.blocks, 2 * size - 1)
        lags = torch.bmm(self.waves.mT.expand(response.shape[0], -1, -1), response)
        # rows of 2b-1 lags begin b apart: first halves side by side, second halves side by side one block later
        first, second = F.pad(lags, (0, 1)).split(size, -1)
        taps = F.pad(first, (0, 0, 0, 1)) + F.pad(second, (0, 0, 1, 0))
        return taps.flatten(1)[:, self.before : self.before + self.num_taps]


def _conv(x: Tensor, taps: Tensor, adjoint: bool) -> Tensor:
    with without_autocast(x):
        plan = _Plan(x, taps)
        y = torch.empty_like(x)
        for chunk in plan.chunks if len(x) else []:  # the blocks of no image cannot be told apart
            own = plan.taps[chunk]
            spectrum = plan.spectrum(plan.split(x[:, chunk]).flip(-1), x.shape[0])
            y[:, chunk] = plan.convolve(spectrum, own.flip(-1) if adjoint else own)  # the lags change their signs
    return y


def _correlate(x: Tensor, dy: Tensor, num_taps: int, dx: Tensor | None = None, taps: Tensor | None = None) -> Tensor:
    """The gradient of the taps. If dx and the taps are given, the gradient of x is written into dx."""
    dtaps = torch.zeros(x.shape[1], num_taps, dtype=full_precision(x.dtype), device=x.device)
    with without_autocast(x):
        plan = _Plan(x, dtaps if taps is None else taps)
        for chunk in plan.chunks if len(x) else []:
            reverse = plan.spectrum(plan.split(dy[:, chunk]).flip(-1), x.shape[0])
            if dx is not None:
                dx[:, chunk] = plan.convolve(reverse, plan.taps[chunk].flip(-1))
            dtaps[chunk] = plan.correlate(plan.spectrum(plan.split(x[:, chunk]), x.shape[0]), reverse)
    return dtaps


def _gradients(x: Tensor, taps: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """dx and dtaps; dy is transformed once for both."""
    dx = torch.empty_like(x)
    return dx, _correlate(x, dy, taps.shape[1], dx, taps)


def _convolve_blocks(x: Tensor, taps: Tensor) -> Tensor:
    """y (B, C, n, b) of x, n blocks of b samples (B, C, n, b), by products of matrices only, for tracers and exports.

    n may be open in an export, b may not. Taps are (C, 2nb-1) for the lags -(nb-1) .. nb-1.
    """
    n, size = x.shape[2:]
    if torch.jit.is_tracing():  # which has tensors for sizes, and holds for these alone
        n, size = int(n), int(size)
    waves = _waves(n, full_precision(x.dtype), x.device)
    transform = _isometry(waves).to(x.dtype)
    block = torch.arange(2 * n - 1, device=x.device)[:, None] * size
    lags = taps[:, block + torch.arange(2 * size - 1, device=x.device)]  # (C, 2n-1, 2b-1)
    response = torch.matmul(waves, lags).to(x.dtype).unflatten(1, (n, 2))
    sample = torch.arange(size, device=x.device)
    parts = response[..., sample[None, :] - sample[:, None] + size - 1]  # (C, n, 2, b, b) of T_d, transformed
    real, imaginary = parts[:, :, 0], parts[:, :, 1]
    matrix = torch.cat([torch.cat([real, imaginary], -1), torch.cat([-imaginary, real], -1)], -2)
    spectrum = torch.matmul(transform, x).flatten(-2).unflatten(-1, (n, 2 * size))
    product = torch.matmul(spectrum.permute(1, 2, 0, 3), matrix).permute(2, 0, 1, 3)
    return torch.matmul(transform.transpose(0, 1), product.flatten(-2).unflatten(-1, (2 * n, size)))


def _plain(x: Tensor, taps: Tensor) -> Tensor:
    """Products of matrices only, for runtimes without an FFT."""
    length = int(x.shape[-1]) if torch.jit.is_tracing() else x.shape[-1]
    with without_autocast(x):
        n, size = (length, 1) if is_open((length,)) else block_shape(length, READING if is_recorded() else 0)
        margin, missing = n * size - length, 2 * length - 1 - taps.shape[-1]
        taps = F.pad(taps.to(full_precision(x.dtype)), (margin + missing, margin))
        y = _convolve_blocks(F.pad(x, (0, margin)).unflatten(-1, (n, size)), taps)
        return y.flatten(-2)[..., :length]


def flops(batch: int, channels: int, length: int, num_taps: int) -> int:
    """FLOPs of products over n blocks of b samples: W, M and W^T for every image, and the transform of the taps once.

    The transform of the taps takes 2n-1 distances between blocks to 2n waves, for each of 2b-1 lags.
    """
    n, size = block_shape(length)
    per_image = 2 * (2 * n * n * size) + n * (2 * size) ** 2
    return 2 * channels * (batch * per_image + 2 * n * (2 * n - 1) * (2 * size - 1))


BACKEND = Backend(
    flops,
    Operations(_conv, _correlate, _gradients),
    plain=_plain,
    prepare=lambda x: x.to(product_dtype(x)),
)
