"""SGConv: a convolution as long as its input, with multi-scale taps (Li et al., ICLR 2023, arXiv 2210.09298).

Letters: B batch, C channels, L tokens, h heads, N scales, d taps per scale.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, fx

from ..longconv import long_conv
from ..models.convolution import convolve
from ..models.generator import KernelGenerator
from ..models.inputs import check_input, of_one_size, record_whole
from ..models.kernel import KernelOptions, kernel_options, lag_taps
from .generation import ConvState, Generator

SCALE_DIM = 64  # d, unless it is given


@register_notrace_module
class SGConv(KernelGenerator):
    """Global depthwise convolution of signals (arXiv 2210.09298, Eq. 1 and section 3.1).

        y[b, c, t] = sum_{s=0}^{L-1} K[c, t - s] x[b, c, s] + D[c] x[b, c, t]
        K[lag] = k+[lag] for lag >= 0,  k-[-lag-1] for lag < 0 (zero unless bidirectional)
        k = (1/Z) [k_0, ..., k_{N-1}],  k_i = alpha^i Upsample_{2^max(i-1,0) d}(w_i)

    Z (``kernel_norm``) makes the L2 norm of every kernel 1 at initialisation and is a constant from then on. With the
    weights of a ConvNeXt it is 1, see `sgconvnext.models.convnext`.

    Args:
        channels: C.
        length: L, the longest signal; shorter ones use the taps that they reach, which is exact. Longer ones are
            refused.
        num_scales: N; d = ceil(L / 2^(N-1)) follows.
        scale_dim: d, at most L; N = 1 + ceil(log2(L / d)) follows. With neither given, d = 64, or L if that is less.
        bidirectional: a second, independent kernel for the lags below 0; False is causal.
        heads: h kernels per channel. y then has h C channels, head by head: channel c of head i is i C + c.
        channels_last: x is (B, L, C), and y (B, L, h C).
        subsample: r, for signals of which only every r-th token is there, such as sound at half the rate for r = 2:

                K'[lag] = sum_{m=0}^{r-1} K[r lag + m],   and so for the lags below 0 with their own kernel

            The parameters are those of the layer with r = 1, and the longest signal has ceil(L / r) tokens.
        learn_exponent: of decay="position": every channel learns its exponent, beginning with the given one.
        backend: "auto", "fft", "toeplitz", "dft", "triton" or "reference"; see `sgconvnext.longconv.long_conv`.
        device, dtype: of the parameters.
        kernel: decay, alpha, exponent, init, upsample, norm_over; see `sgconvnext.models.kernel.kernel_options`.

    Raises:
        ValueError: impossible sizes or unknown choices here; in forward, x of another rank, channel count or dtype,
            or longer than L.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        num_scales: int | None = None,
        scale_dim: int | None = None,
        bidirectional: bool = False,
        heads: int = 1,
        channels_last: bool = False,
        subsample: int = 1,
        learn_exponent: bool = False,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
        **kernel: Any,
    ) -> None:
        if num_scales is None and scale_dim is None:
            scale_dim = max(1, min(SCALE_DIM, length))
        for name, value in (("heads", heads), ("subsample", subsample)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number, at least 1")
        options = kernel_options(**kernel)
        if learn_exponent and options.decay != "position":
            raise ValueError(f"learn_exponent is for decay='position', not decay={options.decay!r}")
        super().__init__(
            channels,
            length,
            num_scales=num_scales,
            scale_dim=scale_dim,
            bidirectional=bidirectional,
            backend=backend,
            options=options,
            device=device,
            dtype=dtype,
            heads=heads,
            learn_exponent=learn_exponent,
        )
        self.channels_last = channels_last
        self.subsample = subsample
        self.reset_parameters()

    def forward(self, x: Tensor, return_kernel: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Map x (B, C, T), T <= L, to y (B, h C, T) of the same dtype.

        With channels_last x is (B, T, C) and y (B, T, h C). With return_kernel also k (directions, h C, T).
        """
        if isinstance(x, fx.Proxy):
            return record_whole(self, x, return_kernel=return_kernel)
        x = of_one_size(self._signal(x))
        length = self.reach(int(x.shape[-1]) if torch.jit.is_tracing() else x.shape[-1])
        kernel = self.kernel()[..., :length] if return_kernel else None
        y = self._mix(x, kernel)
        y = y.mT if self.channels_last else y
        return y if kernel is None else (y, kernel)

    def _mix(self, x: Tensor, kernel: Tensor | None) -> Tensor:
        """x (B, C, T) with the taps of a kernel, if it is given."""
        if kernel is not None:
            return long_conv(self.of_heads(x), lag_taps(kernel, self.skip), self.backend)
        if self.taps is None and len(self.chunks()) > 1:
            return self._convolve_by_chunks(x)
        length = int(x.shape[-1]) if torch.jit.is_tracing() else x.shape[-1]
        return convolve(self, self.of_heads(x), (length,))

    def of_heads(self, x: Tensor) -> Tensor:
        """x once for every head (B, h C, T)."""
        return x if self.heads == 1 else x.repeat(1, self.heads, 1)

    def _convolve_by_chunks(self, x: Tensor) -> Tensor:
        """What forward does, a chunk of channels at a time, so that what makes their taps and spectra stays small."""
        chunks = self.chunks()
        skips = self.skip.unflatten(0, (self.heads, self.channels))
        done = []
        for (a, b), part in zip(chunks, x.split([b - a for a, b in chunks], dim=1), strict=True):
            exponent = None if self.exponent is None else self.exponent[a:b]
            options = self.options_of(a, b)
            kernel = self.multiscale(self.weight[:, :, a:b], self.kernel_norm[:, a:b], options, exponent)
            taps = lag_taps(kernel[..., : x.shape[-1]], skips[:, a:b].flatten())
            done.append(long_conv(self.of_heads(part), taps, self.backend).unflatten(1, (self.heads, -1)))
        return torch.cat(done, dim=2).flatten(1, 2)

    def step(self, x: Tensor, state: ConvState | None = None) -> tuple[Tensor, ConvState]:
        """One output of a causal layer from one input: generation token by token (section 3.2).

        A step reads 4 d inputs and 2 d + 2 sums for each scale beyond the third, in place of all T inputs, see
        `sgconvnext.sequences.generation`. Without gradients.

        Args:
            x: the newest input (B, C).
            state: of every input before it, as the last call returned it; None at the start. It is changed in place,
                and copied by ``state[:]``. The parameters have to stay as they are while it is in use.

        Returns:
            y (B, h C), equal to the last position of forward up to rounding in float32, and the state.

        Raises:
            ValueError: the layer is bidirectional, x is not (B, C), the state is of another batch or layer, or its
                T + 1 inputs exceed the length.
        """
        check_input(x, self.channels, "B, C")
        return Generator(self).step(x, state)

    def prefill(self, x: Tensor, state: ConvState | None = None) -> tuple[Tensor, ConvState]:
        """The outputs of a chunk of inputs that follows those of a state: what forward gives, chunk by chunk.

        The past is convolved again with every chunk, in O((T + P) log(T + P)) for P inputs before it. Without
        gradients.

        Args:
            x: the inputs, as in forward.
            state: as in `step`.

        Returns:
            y, as in forward, and the state, with which `step` or another chunk goes on.
        """
        y, state = Generator(self).prefill(self._signal(x), state)
        return y.mT if self.channels_last else y, state

    def multiscale(
        self, weight: Tensor, norm: Tensor, options: KernelOptions, exponent: Tensor | None = None
    ) -> Tensor:
        """As of `KernelGenerator`, for every r-th token."""
        kernel = super().multiscale(weight, norm, options, exponent)
        if self.subsample == 1:
            return kernel
        missing = self.longest * self.subsample - self.length
        return F.pad(kernel, (0, missing)).unflatten(-1, (self.longest, self.subsample)).sum(-1)

    def is_plain(self) -> bool:
        """As of `KernelGenerator`; the operator makes no taps of every r-th token."""
        return super().is_plain() and self.subsample == 1

    @property
    def longest(self) -> int:
        """Tokens of the longest signal."""
        return -(-self.length // self.subsample)

    def _signal(self, x: Tensor) -> Tensor:
        """An input as (B, C, T)."""
        if not self.channels_last:
            check_input(x, self.channels, "B, C, L")
            return x
        if x.ndim != 3 or x.shape[2] != self.channels:
            raise ValueError(f"x is {tuple(x.shape)}; this layer takes (B, L, C) with C={self.channels}")
        check_input(x.mT, self.channels, "B, C, L")
        return x.mT

    def is_built_for(self, size: tuple[int, ...]) -> bool:
        """Whether signals of that length are the longest."""
        return size == (self.longest,)

    def _taps_for(self, size: tuple[int]) -> Tensor:
        """The taps that a signal of that length reaches."""
        first = 0 if not self.bidirectional else self.longest - size[0]
        last = self.longest if self.bidirectional else 0
        return self.built_taps()[:, first : last + size[0] - int(self.bidirectional)]  # a tracer has tensors for sizes

    def reach(self, length: int) -> int:
        """The length, refused if no taps reach so far."""
        if length > self.longest:
            cure = f"build SGConv with length={length * self.subsample}"
            raise ValueError(f"x has {length} tokens, the kernel {self.longest}: {cure}")
        return length

    def extra_repr(self) -> str:
        heads = f", heads={self.heads}" if self.heads != 1 else ""
        heads += f", subsample={self.subsample}" if self.subsample != 1 else ""
        learned = ", learn_exponent=True" if self.exponent is not None else ""
        return f"{super().extra_repr()}{heads}{learned}" + (", channels_last=True" if self.channels_last else "")
