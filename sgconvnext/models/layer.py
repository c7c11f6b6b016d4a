"""SGConv: a convolution as long as its input, with multi-scale taps (Li et al., ICLR 2023, arXiv 2210.09298).

Letters: B batch, C channels, L tokens, H W feature map, N scales, d taps per scale.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, to_2tuple
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from ..longconv import check_backend, choose_backend, freeze, is_recorded, long_conv
from ..longconv.fft import plain_long_conv
from .kernel import kernel_norm, lag_taps, multiscale_kernel, num_scales_for, scale_dim_for

# Where one direction's taps take more than this, they are made a few channels at a time, each time this many bytes:
# with as many bytes again a million tokens of 128 channels take a third longer, with a quarter two gigabytes more.
TAPS_BYTES, GROUP_BYTES = 2**27, 2**25
DECAYS = ("scale", "position")
INITS = ("normal", "cosine")


def runs_eagerly_on_cpu(x: Tensor) -> bool:
    """Whether x is an ordinary tensor on a CPU, outside of any graph that is being built and of any transform.

    And nobody looks at the operators, as a counter of FLOPs does, which shall see all of them in forms that it knows.
    """
    if torch.compiler.is_compiling() or is_recorded() or is_transformed() or torch._C._len_torch_dispatch_stack():
        return False
    return type(x) is Tensor and x.device.type == "cpu"


def is_transformed() -> bool:
    """Whether torch.func or forward mode is at work. What they pass in must not be kept."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _Frozen(NamedTuple):
    """A convolution with fixed taps, what it was made for, and the values of the tensors that it was made from."""

    key: tuple[Any, ...]
    sources: list[Tensor]
    convolve: Callable[[Tensor], Tensor]


class _MultiScaleKernel(nn.Module):
    """The parameters of one kernel per channel and direction, and the fixed norm of Eq. 1.

    Parameters: ``weight`` (directions, N, C, d), ``skip`` (C); buffer ``kernel_norm`` (directions, C, 1). After
    `reparameterize` none of them, but the buffer ``taps``: (C, 2L-1) if bidirectional, else (C, L).
    """

    if TYPE_CHECKING:  # TorchScript would take these for the types of what is there now
        kernel_norm: Tensor
        taps: Tensor | None
        _taps_for: Callable[..., Tensor]  # of a size; the subclasses have it

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        num_scales: int | None,
        scale_dim: int | None,
        bidirectional: bool,
        decay: str,
        alpha: float | tuple[float, float],
        exponent: float,
        init: str,
        backend: str,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        if channels < 1 or length < 1:
            raise ValueError(f"channels={channels} and length={length} must both be at least 1")
        if num_scales is not None and scale_dim is not None:
            raise ValueError(f"num_scales={num_scales} and scale_dim={scale_dim}: give one, the other follows")
        for name, value in (("num_scales", num_scales), ("scale_dim", scale_dim)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        alphas = (alpha, alpha) if isinstance(alpha, int | float) else tuple(alpha)
        if len(alphas) != 2 or not all(0 < a < math.inf for a in alphas):
            raise ValueError(f"alpha={alpha} must be a positive number, or a pair of them")
        for name, choice, known in (("decay", decay, DECAYS), ("init", init, INITS)):
            if choice not in known:
                raise ValueError(f"{name} {choice!r} is unknown; use one of {', '.join(known)}")
        check_backend(backend)

        self.channels = channels
        self.length = length
        self.bidirectional = bidirectional
        self.decay = decay
        self.alpha = (float(alphas[0]), float(alphas[1]))
        self.exponent = float(exponent)
        self.init = init
        self.backend = backend
        if scale_dim is None:
            assert num_scales is not None
            scale_dim = scale_dim_for(length, num_scales)
        else:
            num_scales = num_scales_for(length, scale_dim)
        directions = 2 if bidirectional else 1
        dd = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(directions, num_scales, channels, scale_dim, **dd))
        self.skip = nn.Parameter(torch.empty(channels, **dd))
        self.register_buffer("kernel_norm", torch.empty(directions, channels, 1, **dd))
        self.register_buffer("taps", None)
        self._frozen: _Frozen | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``weight`` and ``skip`` anew and fix ``kernel_norm``, so that every kernel has L2 norm 1."""
        self.check_parameters("be initialised")
        with torch.no_grad():
            if self.init == "normal":
                self.weight.normal_()
            else:
                self.weight.copy_(_placed_like(self.weight, _cosines(self.weight)))
            self.skip.normal_()
            self.kernel_norm.copy_(self._norm())

    def check_parameters(self, purpose: str) -> None:
        """Refuse what a reparameterized layer cannot do."""
        if self.taps is not None:
            raise ValueError(
                f"this {type(self).__name__} is reparameterized, without parameters: it cannot {purpose}; build the "
                "model anew and load the trained weights"
            )

    def _norm(self) -> Tensor:
        """The L2 norm of every kernel before it is divided by kernel_norm."""
        with torch.no_grad():
            weight = _whole(self.weight)
            groups = [self._multiscale(weight[:, :, a:b], self._alpha_of(a, b)) for a, b in self._groups()]
            return torch.cat([kernel_norm(group) for group in groups], dim=1)

    def _groups(self) -> list[tuple[int, int]]:
        """First and last channel (exclusive) of groups; all channels are one unless their taps take TAPS_BYTES."""
        if 4 * self.length * self.channels <= TAPS_BYTES:
            return [(0, self.channels)]
        size = max(2, GROUP_BYTES // (4 * self.length))
        return [(first, min(first + size, self.channels)) for first in range(0, self.channels, size)]

    def _alpha_of(self, first: int, last: int) -> tuple[float, float]:
        """The pair of alphas that spreads over a group of channels as ``alpha`` does over all."""
        if last - first == self.channels:
            return self.alpha
        start, end = 1 / self.alpha[0], 1 / self.alpha[1]
        step = (end - start) / max(1, self.channels - 1)
        return 1 / (start + step * first), 1 / (start + step * (last - 1))

    def _multiscale(self, weight: Tensor, alpha: tuple[float, float]) -> Tensor:
        # half-precision parameters still make float32 taps; nothing in the generator is on autocast's list
        weight = weight if weight.dtype == torch.float64 else weight.float()
        return multiscale_kernel(weight, self.length, self.decay, alpha, self.exponent)

    def kernel(self) -> Tensor:
        """The kernel k of Eq. 1 (directions, C, L) in float32 (float64 for float64 parameters), without the skip.

        Raises:
            ValueError: the layer is reparameterized.
        """
        if not torch.jit.is_scripting():
            self.check_parameters("give its kernel without the skip")
        return self._multiscale(self.weight, self.alpha) / self.kernel_norm

    def built_taps(self) -> Tensor:
        """K with the skip, by lag: (C, 2L-1) if bidirectional, else (C, L); L is what the layer is built for."""
        if self.taps is not None:
            return self.taps
        else:  # noqa: RET505  TorchScript compiles what follows an if, but not the other branch of one that is settled
            return lag_taps(self.kernel(), self.skip)

    @torch.jit.unused
    def _convolve(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        """x (B, C, L) with the taps for a size."""
        if self.training or torch.is_grad_enabled() or not runs_eagerly_on_cpu(x) or len(self._groups()) > 1:
            return long_conv(x, self._taps_for(size), self.backend)
        return self._freeze(x, size)(x)

    def _freeze(self, x: Tensor, size: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        """The convolution with the taps of now. What was made last is taken if it was made from the same values.

        The values of parameters are compared, not versions or addresses, which weights written through ``.data`` leave
        as they are; of the buffer that `reparameterize` made, which nothing trains, version and address are enough. A
        GPU would have to be waited for, so only CPUs do this (`runs_eagerly_on_cpu`).
        """
        taps = self.taps
        fixed = taps is not None and not taps.is_inference()  # or it does not tell when it is written to
        sources = [self.weight, self.skip, self.kernel_norm] if taps is None else [taps]
        written = [(source._version, source.data_ptr(), source.stride()) for source in sources] if fixed else []
        kinds = [(source.dtype, source.device, source.shape) for source in sources]
        backend = choose_backend(x) if self.backend == "auto" else self.backend
        built = (self.length, getattr(self, "input_size", None), self.bidirectional)
        options = (backend, self.decay, self.alpha, self.exponent)
        key = (size, x.shape[-1], x.dtype, built, options, kinds, written)
        last = self._frozen
        if last is None or last.key != key or not (fixed or all(map(torch.equal, last.sources, sources))):
            # before they are used, as another thread may write to them; an alias keeps the address from being reused
            kept = [source.detach() if fixed else source.detach().clone() for source in sources]
            convolve = freeze(self._taps_for(size), x.shape[-1], x.dtype, backend)
            self._frozen = last = _Frozen(key, kept, convolve)
        return last.convolve

    @torch.jit.unused
    def reparameterize(self) -> None:
        """Replace the parameters by the buffer ``taps`` that they make, for inference (timm's reparameterize_model).

        The outputs stay, at every input size. The layer then refuses to train, to be initialised or resized, and to
        load the state of a layer that has parameters.
        """
        if self.taps is None:
            with torch.inference_mode(False), torch.no_grad():
                taps = self.built_taps().clone()
            self.weight = self.skip = self.kernel_norm = None  # type: ignore[assignment]
            self.taps = taps
            self.eval()

    def train(self, mode: bool = True) -> Any:
        """As of any module; a reparameterized layer refuses to train."""
        if mode:
            self.check_parameters("train")
            self._frozen = None  # which takes memory
        return super().train(mode)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Say which of the two is reparameterized, where state dict and layer differ in that."""
        *_, errors = args
        found, here = f"{prefix}taps" in state, self.taps is not None
        if found != here and (found or f"{prefix}weight" in state):
            sides = "state dict is reparameterized, the layer is not"
            cure = "call timm.utils.reparameterize_model(model, inplace=True) before loading it"
            if here:
                sides = "layer is reparameterized, the state dict is not"
                cure = "load it into a new model, and reparameterize that"
            errors.append(f"{prefix[:-1]}: the {sides}; {cure}")
        else:
            super()._load_from_state_dict(state, prefix, *args)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._frozen = None  # of another device or dtype it would only take memory
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_frozen": None}  # copies make their own

    def extra_repr(self) -> str:
        if self.taps is not None:
            return f"{self.channels}, length={self.length}, reparameterized, backend={self.backend!r}"
        _, scales, channels, scale_dim = self.weight.shape
        decay = f"alpha={self.alpha}" if self.decay == "scale" else f"exponent={self.exponent}"
        return (
            f"{channels}, length={self.length}, num_scales={scales}, scale_dim={scale_dim}, "
            f"bidirectional={self.bidirectional}, decay={self.decay!r}, {decay}, backend={self.backend!r}"
        )


def _whole(parameter: Tensor) -> Tensor:
    """A parameter, or all of one whose shards lie on several processes (FSDP2's DTensor)."""
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole


def _placed_like(parameter: Any, values: Tensor) -> Tensor:
    """Values, or this process's shard of those of the first one."""
    if not hasattr(parameter, "full_tensor"):
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, parameter.device_mesh, parameter.placements)


def _cosines(weight: Tensor) -> Tensor:
    """cos(2 pi f j / d) with a random frequency f out of 0 .. C-1 per channel, direction and scale."""
    directions, scales, channels, scale_dim = weight.shape
    frequency = torch.rand(directions, scales, channels, device=weight.device).argsort(-1)
    phase = torch.arange(scale_dim, device=weight.device) / scale_dim
    return torch.cos(2 * math.pi * frequency[..., None] * phase)


def _map_size(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = to_2tuple(size)
    if height < 1 or width < 1:
        raise ValueError(f"input_size=({height}, {width}) must be at least 1 x 1")
    return int(height), int(width)


def _check_input(x: Tensor, channels: int, layout: str) -> None:
    if x.ndim != len(layout.split(", ")) or x.shape[1] != channels:
        raise ValueError(f"x is {tuple(x.shape)}; this layer takes ({layout}) with C={channels}")
    if 0 in x.shape[2:]:
        raise ValueError(f"x is {tuple(x.shape)}: it has no token; this layer needs at least one")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; this layer takes floating point: convert it with x.float()")


def _of_one_size(x: Tensor) -> Tensor:
    """x. A trace is of one size: at any other it has to fail, and not to convolve something else."""
    return x.expand(-1, -1, *map(int, x.shape[2:])) if torch.jit.is_tracing() else x


def _record_whole(layer: nn.Module, x: fx.Proxy, **options: Any) -> Any:
    """A symbolic trace knows no shapes; it records the layer as it does those of torch."""
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (x,), options)


@register_notrace_module
class SGConv(_MultiScaleKernel):
    """Global depthwise convolution of signals (arXiv 2210.09298, Eq. 1 and section 3.1).

        y[b, c, t] = sum_{s=0}^{L-1} K[c, t - s] x[b, c, s] + D[c] x[b, c, t]
        K[lag] = k+[lag] for lag >= 0,  k-[-lag-1] for lag < 0 (zero unless bidirectional)
        k = (1/Z) [k_0, ..., k_{N-1}],  k_i = alpha^i Upsample_{2^max(i-1,0) d}(w_i)

    Z makes the L2 norm of every kernel 1 at initialisation and is a constant from then on.

    Args:
        channels: C.
        length: L, the longest signal; shorter ones use the taps that they reach.
        num_scales: N; d = ceil(L / 2^(N-1)) follows.
        scale_dim: d; N = 1 + ceil(log2(L / d)) follows. With neither given, d = 64.
        bidirectional: a second, independent kernel for the lags below 0; False is causal.
        decay: "scale" (alpha^i) or "position" ((j + 1)^-exponent at tap j: Cat*, section 4.1.2).
        alpha: decay per scale; a pair spreads it over the channels, evenly in 1/alpha (Pathfinder-X: (1, 1/3)).
        exponent: t of decay="position".
        init: "normal" (w ~ N(0, 1)) or "cosine" (one random frequency per channel and scale).
        backend: "auto", "fft", "toeplitz", "dft", "triton" or "reference"; see `sgconvnext.longconv.long_conv`.

    Raises:
        ValueError: impossible sizes or unknown choices here; in forward, x of another rank, channel count or dtype.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        num_scales: int | None = None,
        scale_dim: int | None = None,
        bidirectional: bool = False,
        decay: str = "scale",
        alpha: float | tuple[float, float] = 0.5,
        exponent: float = 1.0,
        init: str = "normal",
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if num_scales is None and scale_dim is None:
            scale_dim = 64
        super().__init__(
            channels,
            length,
            num_scales=num_scales,
            scale_dim=scale_dim,
            bidirectional=bidirectional,
            decay=decay,
            alpha=alpha,
            exponent=exponent,
            init=init,
            backend=backend,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor, return_kernel: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Map x (B, C, T), T <= L, to y of the same shape and dtype; with return_kernel also k (directions, C, T)."""
        if isinstance(x, fx.Proxy):
            return _record_whole(self, x, return_kernel=return_kernel)
        _check_input(x, self.channels, "B, C, L")
        x = _of_one_size(x)
        length = self._reach(int(x.shape[-1]) if torch.jit.is_tracing() else x.shape[-1])
        if return_kernel:
            kernel = self.kernel()[..., :length]
            return long_conv(x, lag_taps(kernel, self.skip), self.backend), kernel
        if self.taps is None and len(self._groups()) > 1:
            return self._convolve_by_groups(x)
        return self._convolve(x, (length,))

    def _convolve_by_groups(self, x: Tensor) -> Tensor:
        """What forward does, a few channels at a time, and once more in backward: no taps are kept in between."""
        groups = self._groups()
        parts = x.split([last - first for first, last in groups], dim=1)
        done = []
        for (a, b), part in zip(groups, parts, strict=True):
            own = self.weight[:, :, a:b], self.skip[a:b], self.kernel_norm[:, a:b]
            group = functools.partial(self._convolve_group, alpha=self._alpha_of(a, b))
            if not is_transformed():  # which takes no hooks on what is saved
                group = functools.partial(checkpoint, group, use_reentrant=False)
            done.append(group(part, *own))
        return torch.cat(done, dim=1)

    def _convolve_group(
        self, x: Tensor, weight: Tensor, skip: Tensor, norm: Tensor, alpha: tuple[float, float]
    ) -> Tensor:
        kernel = self._multiscale(weight, alpha)[..., : x.shape[-1]] / norm
        return long_conv(x, lag_taps(kernel, skip), self.backend)

    def step(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One output of a causal layer from one input: generation token by token (section 3.2), O(L) a step.

        Args:
            x: the newest input (B, C).
            past: every input before it (B, C, T), as the last call returned it; None at the start.

        Returns:
            y (B, C), equal to the last position of forward, and past (B, C, T + 1).

        Raises:
            ValueError: the layer is bidirectional, x is not (B, C), or T + 1 exceeds the length.
        """
        if self.bidirectional:
            raise ValueError("step() generates forward in time; build the layer with bidirectional=False")
        _check_input(x, self.channels, "B, C")
        past = x[..., None] if past is None else torch.cat([past, x[..., None]], dim=-1)
        taps = self._taps_for((self._reach(past.shape[-1]),))
        dtype = torch.promote_types(past.dtype, taps.dtype)
        return (past.to(dtype) * taps.flip(-1).to(dtype)).sum(-1).to(x.dtype), past

    def _taps_for(self, size: tuple[int]) -> Tensor:
        """The taps that a signal of that length reaches."""
        first = 0 if not self.bidirectional else self.length - size[0]
        last = self.length if self.bidirectional else 0
        return self.built_taps()[:, first : last + size[0] - int(self.bidirectional)]  # a tracer has tensors for sizes

    def _reach(self, length: int) -> int:
        if length > self.length:
            raise ValueError(f"x has {length} tokens, the kernel {self.length}: build SGConv with length={length}")
        return length


def resize_taps(taps: Tensor, built: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The input-size policy: taps for another feature map that keep each tap's 2-D offset.

    On a map W wide, lag = dy * W + dx with -W/2 <= dx < W/2 is read as the offset (dy, dx). The tap of a lag on the
    new map is the built tap of the same offset; offsets that the built map does not have were never trained and are
    zero. Pixels more than W/2 columns apart share the lag, and so the tap, of a near column in the next row: there
    the two sizes differ.

    Args:
        taps: built for a map of ``built`` = (H0, W0): (C, 2 H0 W0 - 1), or (C, H0 W0) when causal.
        built: (H0, W0).
        size: (H, W) of the new map; with size == built this is the identity.

    Returns:
        taps (C, 2HW - 1), or (C, HW) when causal and built for more than one token.
    """
    length, built_length = size[0] * size[1], built[0] * built[1]
    causal = taps.shape[-1] != 2 * built_length - 1
    dy, dx = _offset(torch.arange(0 if causal else 1 - length, length, device=taps.device), size[1])
    index = dy * built[1] + dx - (0 if causal else 1 - built_length)
    half = built[1] // 2
    trained = (dx >= -half) & (dx < built[1] - half) & (index >= 0) & (index < taps.shape[-1])
    return torch.where(trained, taps.index_select(1, index.clamp(0, taps.shape[-1] - 1)), 0.0)


def _offset(lag: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(dy, dx) of each lag, -W/2 <= dx < W/2."""
    half = width // 2
    dy = torch.div(lag + half, width, rounding_mode="floor")
    return dy, lag - dy * width


def _split_phases(x: Tensor, dilation: int) -> Tensor:
    """(B, C, H, W) to its r x r subsampled maps (r r B, C, ceil(H/r), ceil(W/r)), the last ones filled with zeros."""
    x = F.pad(x, (0, -x.shape[3] % dilation, 0, -x.shape[2] % dilation))
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // dilation, dilation, width // dilation, dilation)
    return x.permute(3, 5, 0, 1, 2, 4).flatten(0, 2)


def _join_phases(x: Tensor, dilation: int, size: tuple[int, int]) -> Tensor:
    """The inverse of `_split_phases`."""
    x = x.unflatten(0, (dilation, dilation, -1)).permute(2, 3, 4, 0, 5, 1)
    return x.flatten(4, 5).flatten(2, 3)[:, :, : size[0], : size[1]]


@register_notrace_module
class SGConv2d(_MultiScaleKernel):
    """Global depthwise convolution of feature maps: flatten row by row, SGConv, unflatten (section 4.3.2).

    The equation is SGConv's with L = H*W and t = row * W + column. The kernel is built for ``input_size`` and usable
    at any H, W: at another size the taps keep their 2-D offsets, see `resize_taps`.

    Args:
        channels: C.
        input_size: H, W (or one int for a square) that the kernel is built for.
        num_scales: N; d = ceil(H*W / 2^(N-1)) follows. With neither N nor d given, N = 5.
        scale_dim: d; N follows.
        bidirectional: the default, because an image has no causal order.
        dilation: r > 1 convolves each of the r x r subsampled maps (every r-th row and column) by itself, as a
            dilated convolution does, for networks whose stride was traded for dilation; the maps are then expected
            r times larger than input_size.
        decay, alpha, exponent, init, backend: as in SGConv.

    Raises:
        ValueError: impossible sizes or unknown choices here; in forward, x of another rank, channel count or dtype.
    """

    def __init__(
        self,
        channels: int,
        input_size: int | tuple[int, int],
        *,
        num_scales: int | None = None,
        scale_dim: int | None = None,
        bidirectional: bool = True,
        dilation: int = 1,
        decay: str = "scale",
        alpha: float | tuple[float, float] = 0.5,
        exponent: float = 1.0,
        init: str = "normal",
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        height, width = _map_size(input_size)
        if dilation < 1:
            raise ValueError(f"dilation={dilation} must be at least 1")
        if num_scales is None and scale_dim is None:
            num_scales = 5
        super().__init__(
            channels,
            height * width,
            num_scales=num_scales,
            scale_dim=scale_dim,
            bidirectional=bidirectional,
            decay=decay,
            alpha=alpha,
            exponent=exponent,
            init=init,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.input_size = (height, width)
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to y of the same shape and dtype."""
        if not torch.jit.is_scripting():
            if isinstance(x, fx.Proxy):
                return _record_whole(self, x)
            _check_input(x, self.channels, "B, C, H, W")
            x = _of_one_size(x)
        size = (x.shape[2], x.shape[3])
        if self.dilation > 1:
            x = _split_phases(x, self.dilation)
        phase = (x.shape[2], x.shape[3])
        x = x.flatten(2)
        y = plain_long_conv(x, self._taps_for(phase)) if torch.jit.is_scripting() else self._convolve(x, phase)
        y = y.unflatten(2, phase)
        return _join_phases(y, self.dilation, size) if self.dilation > 1 else y

    def _taps_for(self, size: tuple[int, int]) -> Tensor:
        """The built taps, or those for a map of another size."""
        taps = self.built_taps()
        return taps if size == self.input_size else resize_taps(taps, self.input_size, size)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Say it where a state dict is of another input size; torch would give two shapes."""
        own = torch.Size() if self.taps is not None else self.weight.shape
        theirs = getattr(state.get(f"{prefix}weight"), "shape", own)
        if len(theirs) == len(own) and theirs[:3] == own[:3] and theirs != own:
            *_, errors = args
            errors.append(
                f"{prefix[:-1]}: the state dict has {theirs[3]} taps a scale, the layer {own[3]}: it is of "
                "another input size; load it into a layer built for that size, then call set_input_size"
            )
        else:
            super()._load_from_state_dict(state, prefix, *args)

    @torch.jit.ignore
    def set_input_size(self, input_size: int | tuple[int, int]) -> None:
        """Rebuild the parameters for another input size, N unchanged, by stretching each scale to its new d.

        Every w_i is interpolated linearly to ceil(H*W / 2^(N-1)) taps, and kernel_norm follows so that each kernel
        keeps its L2 norm. Unlike running at another size this gives every offset of the new map a trainable tap. Call
        it before the optimiser is made: the parameters are new ones.
        """
        height, width = _map_size(input_size)
        self.check_parameters("be rebuilt for another input size")
        _, num_scales, _, scale_dim = self.weight.shape
        before = self._norm()
        self.length = height * width
        self.input_size = (height, width)
        size = scale_dim_for(self.length, num_scales)
        if size != scale_dim:
            stretched = F.interpolate(
                self.weight.detach().flatten(0, 1), size=size, mode="linear", align_corners=False
            ).unflatten(0, self.weight.shape[:2])
            self.weight = nn.Parameter(stretched, requires_grad=self.weight.requires_grad)
        after = self._norm()
        growth = torch.where(before > 0, after / before, 1.0)  # a kernel of zeros stays one
        self.kernel_norm = (self.kernel_norm * growth).to(self.kernel_norm.dtype)

    def extra_repr(self) -> str:
        dilation = f", dilation={self.dilation}" if self.dilation != 1 else ""
        return f"{super().extra_repr()}, input_size={self.input_size}{dilation}"
