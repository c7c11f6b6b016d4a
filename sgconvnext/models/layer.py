"""SGConv2d: SGConv over the flattened feature map (Li et al., ICLR 2023, arXiv 2210.09298, section 4.3.2).

Letters: B batch, C channels, L tokens, H W feature map, N scales, d taps per scale.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, fx, nn

from ..longconv import choose_backend, long_conv_of_open_size
from ..longconv.context import is_open
from ..longconv.fft import plain_long_conv
from .convolution import convolve
from .generator import KernelGenerator
from .input_size import join_phases, map_size, resize_taps, scale_dim_with_gap, split_phases, stretch
from .inputs import check_input, of_one_size, record_whole
from .kept import forget
from .kernel import (
    kernel_of_lags,
    kernel_options,
    lag_taps,
    nearest_weight,
    num_scales_for,
    scale_dim_for,
)
from .resized_taps import taps_of_size


@register_notrace_module
class SGConv2d(KernelGenerator):
    """Global depthwise convolution of feature maps: flatten row by row, SGConv, unflatten (section 4.3.2).

    The equation is SGConv's, plus the bias, with L = H (W + g) and t = row * (W + g) + column. The g zero columns of
    ``row_gap`` are appended to every row before flattening, and dropped afterwards: an offset of up to g columns then
    ends on a pixel of the same row, or on a zero. So a (2g+1) x (2g+1) depthwise convolution with zero padding is one
    setting of the taps, see `sgconvnext.models.convnext`. Without a gap, the pixel after the last one of a row is the
    first one of the next row.

    The kernel is built for ``input_size`` and usable at any H, W: at another size the taps keep their 2-D offsets,
    see `resize_taps`.

    Args:
        channels: C.
        input_size: H, W (or one int for a square) that the kernel is built for.
        num_scales: N; d = ceil(L / 2^(N-1)) follows. With neither N nor d given, N = 5 without a gap; with one, d is
            what `scale_dim_with_gap` says.
        scale_dim: d; N = 1 + ceil(log2(L / d)) follows.
        row_gap: g, zero columns between two rows.
        bias: whether a ``bias`` (C) is added to y; 0 at first.
        bidirectional: the default, because an image has no causal order.
        dilation: r > 1 convolves each of the r x r subsampled maps (every r-th row and column) by itself, as a
            dilated convolution does, for networks whose stride was traded for dilation; the maps are then expected
            r times larger than input_size.
        backend, device, dtype, kernel: as in `sgconvnext.sequences.layer.SGConv`.

    Raises:
        ValueError: impossible sizes or unknown choices here; in forward, x of another rank, channel count or dtype.
    """

    if TYPE_CHECKING:
        bias: Tensor | None

    def __init__(
        self,
        channels: int,
        input_size: int | tuple[int, int],
        *,
        num_scales: int | None = None,
        scale_dim: int | None = None,
        bidirectional: bool = True,
        row_gap: int = 0,
        bias: bool = False,
        dilation: int = 1,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
        **kernel: Any,
    ) -> None:
        height, width = map_size(input_size)
        if dilation < 1:
            raise ValueError(f"dilation={dilation} must be at least 1")
        if type(row_gap) is not int or row_gap < 0:
            raise ValueError(f"row_gap={row_gap!r} must be a whole number of columns, at least 0")
        if type(bias) is not bool:
            raise ValueError(f"bias={bias!r} must be True or False")
        self_scaled = num_scales is None and scale_dim is None
        if self_scaled and row_gap > 0:
            scale_dim = scale_dim_with_gap(height, width, row_gap)
        elif self_scaled:
            num_scales = 5
        super().__init__(
            channels,
            height * (width + row_gap),
            num_scales=num_scales,
            scale_dim=scale_dim,
            bidirectional=bidirectional,
            backend=backend,
            options=kernel_options(**kernel),
            device=device,
            dtype=dtype,
        )
        self.input_size = (height, width)
        self.row_gap = row_gap
        self.dilation = dilation
        offset = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", offset)
        # None: N and d follow from the input size
        self.num_scales = None if self_scaled and row_gap > 0 else int(self.weight.shape[1])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `KernelGenerator.reset_parameters`; the bias is 0."""
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to y of the same shape and dtype."""
        if not torch.jit.is_scripting():
            if isinstance(x, fx.Proxy):
                return record_whole(self, x)
            check_input(x, self.channels, "B, C, H, W")
            x = of_one_size(x)
        size = (x.shape[2], x.shape[3])
        if self.dilation > 1:
            x = split_phases(x, self.dilation)
        grid = (x.shape[2], x.shape[3])
        if self.row_gap > 0:
            x = F.pad(x, (0, self.row_gap))
        y = self._convolve_rows(x, grid)
        if self.row_gap > 0:
            y = y[..., : grid[1]]
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)[:, None, None]
        return join_phases(y, self.dilation, size) if self.dilation > 1 else y

    def _convolve_rows(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps (B, C, H, W + g) convolved row by row."""
        rows = (x.shape[2], x.shape[3])
        if torch.jit.is_scripting():
            y = plain_long_conv(x.flatten(2), self._taps_for(grid))
        elif is_open(grid):
            return long_conv_of_open_size(x, self._taps_for(grid), self.backend)
        else:
            y = convolve(self, x.flatten(2), grid)
        return y.unflatten(2, rows)

    @torch.jit.ignore
    def backend_for(self, x: Tensor) -> str:
        """The backend that convolves a map (B, C, H, W)."""
        height, width = (-(-size // self.dilation) for size in x.shape[2:])
        length, built = height * (width + self.row_gap), self.is_built_for((height, width))
        batch = x.shape[0] * self.dilation**2
        return choose_backend(x, self.backend, length, built, frozen=self.taps is not None, batch=batch)

    @torch.jit.ignore
    def is_built_for(self, size: tuple[int, int]) -> bool:
        """Whether the kernel is built for maps of that size; of none that an export leaves open."""
        return not is_open(size) and size == self.input_size

    def _taps_for(self, size: tuple[int, int]) -> Tensor:
        """The built taps, or those for a map of another size; where an export leaves it open, for every size."""
        taps = self.built_taps()
        if not torch.jit.is_scripting():
            return taps_of_size(taps, self.input_size, size, self.row_gap)
        return taps if size == self.input_size else resize_taps(taps, self.input_size, size, self.row_gap)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Tell that a state dict is of another input size, where torch would tell two shapes."""
        own = torch.Size() if self.taps is not None else self.weight.shape
        theirs = getattr(state.get(f"{prefix}weight"), "shape", own)
        fixed = 3 if self.num_scales else 1  # dimensions before d, or before N, which follows from the input size
        if len(theirs) == len(own) and theirs != own and theirs[2] == own[2] and theirs[:fixed] == own[:fixed]:
            *_, errors = args
            errors.append(
                f"{prefix[:-1]}: the state dict has {theirs[1]} scales of {theirs[3]} taps, the layer {own[1]} of "
                f"{own[3]}: it is of another input size; load it into a layer built for that size, then call "
                "set_input_size"
            )
        else:
            super()._load_from_state_dict(state, prefix, *args)

    @torch.jit.ignore
    def scales_at(self, height: int, width: int) -> tuple[int, int]:
        """N and d of a layer like this one that is built for a map of that size."""
        length = height * (width + self.row_gap)
        if self.num_scales is None:
            scale_dim = scale_dim_with_gap(height, width, self.row_gap)
            return num_scales_for(length, scale_dim), scale_dim
        return self.num_scales, scale_dim_for(length, self.num_scales)

    @torch.jit.ignore
    def set_input_size(self, input_size: int | tuple[int, int]) -> None:
        """Rebuild the parameters for another input size. Every offset of the new map then has a trainable tap.

        Without a gap, N stays, every w_i is interpolated linearly to ceil(H*W / 2^(N-1)) taps, and kernel_norm is
        scaled so that each kernel keeps its L2 norm.

        With a gap, the taps keep their 2-D offsets, as in a forward pass at that size. N and d are those of
        `scales_at`. The new weight is the one whose kernel is nearest to these taps. It has exactly these taps if they
        lie on the first two scales, as those of a converted ConvNeXt do.

        Call it before the optimiser is made: the parameters are new ones.
        """
        height, width = map_size(input_size)
        self.refuse_reparameterized("be rebuilt for another input size")
        self.refuse_sharded("be rebuilt for another input size")
        forget(self)  # the weights may stay, but not the offsets of their taps
        if self.row_gap > 0:
            self._move_taps(height, width)
        else:
            self._stretch_scales(height, width)

    def _move_taps(self, height: int, width: int) -> None:
        before, (num_scales, scale_dim) = self.input_size, self.scales_at(height, width)
        self.input_size = (height, width)
        if self.input_size == before:
            return
        with torch.no_grad():
            taps = lag_taps(self.kernel(), torch.zeros_like(self.skip))
            taps = resize_taps(taps, before, self.input_size, self.row_gap)
            self.length = height * (width + self.row_gap)
            kernel = kernel_of_lags(taps, self.bidirectional) * self.kernel_norm
            weight = nearest_weight(kernel, num_scales, scale_dim, self.options).to(self.weight.dtype)
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)

    def _stretch_scales(self, height: int, width: int) -> None:
        _, num_scales, _, scale_dim = self.weight.shape
        before = self._norm()
        self.length = height * width
        self.input_size = (height, width)
        size = scale_dim_for(self.length, num_scales)
        if size != scale_dim:
            stretched = stretch(self.weight.detach(), size)
            self.weight = nn.Parameter(stretched, requires_grad=self.weight.requires_grad)
        after = self._norm()
        growth = torch.where(before > 0, after / before, 1.0)  # a kernel of zeros stays one
        self.kernel_norm = (self.kernel_norm * growth).to(self.kernel_norm.dtype)

    def extra_repr(self) -> str:
        gap = f", row_gap={self.row_gap}" if self.row_gap else ""
        bias = ", bias=True" if self.bias is not None else ""
        dilation = f", dilation={self.dilation}" if self.dilation != 1 else ""
        return f"{super().extra_repr()}, input_size={self.input_size}{gap}{bias}{dilation}"
