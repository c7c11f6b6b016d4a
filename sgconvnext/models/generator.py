"""The parameters of the kernels and the taps that they make: what SGConv and SGConv2d share."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..longconv import check_backend
from . import taps as taps_operator
from .kept import forget
from .kernel import (
    DECAYS,
    KernelOptions,
    cosines,
    l2_norm,
    lag_taps,
    multiscale_kernel,
    num_scales_for,
    scale_dim_for,
)

# Where the taps of one direction take more than TAPS_BYTES, they are made in chunks of channels, of CHUNK_BYTES each.
# For a million tokens of 128 channels, chunks of twice the size take a third longer, of a quarter 2 GB more.
TAPS_BYTES, CHUNK_BYTES = 2**27, 2**25


class KernelGenerator(nn.Module):
    """Parameters to taps: one kernel per channel and direction, with the fixed norm of Eq. 1.

    Parameters: ``weight`` (directions, N, C, d), ``skip`` (C); buffer ``kernel_norm`` (directions, C, 1). With h heads
    the weight and the norm begin with (directions h), and the skip has h C numbers, head by head. With an exponent
    that is learned, also ``exponent`` (C). After `reparameterize` none of them, but the buffer ``taps``: (h C, 2L-1)
    if bidirectional, else (h C, L). A layer calls `reset_parameters` once it has all its parameters.
    """

    options: KernelOptions
    if TYPE_CHECKING:  # TorchScript would take these for the types of what is there now
        exponent: nn.Parameter | None
        kernel_norm: Tensor
        taps: Tensor | None

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        num_scales: int | None,
        scale_dim: int | None,
        bidirectional: bool,
        backend: str,
        options: KernelOptions,
        device: Any,
        dtype: Any,
        heads: int = 1,
        learn_exponent: bool = False,
    ) -> None:
        super().__init__()
        if channels < 1 or length < 1:
            raise ValueError(f"channels={channels} and length={length} must both be at least 1")
        if num_scales is not None and scale_dim is not None:
            raise ValueError(f"num_scales={num_scales} and scale_dim={scale_dim}: give one, the other follows")
        for name, value in (("num_scales", num_scales), ("scale_dim", scale_dim)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if scale_dim is not None and scale_dim > length:
            raise ValueError(f"scale_dim={scale_dim} is more taps than length={length}; use at most {length}")
        check_backend(backend)

        self.channels = channels
        self.length = length
        self.heads = heads
        self.bidirectional = bidirectional
        self.options = options
        self.backend = backend
        if scale_dim is None:
            assert num_scales is not None
            scale_dim = scale_dim_for(length, num_scales)
        else:
            num_scales = num_scales_for(length, scale_dim)
        directions = 2 if bidirectional else 1
        dd = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(directions * heads, num_scales, channels, scale_dim, **dd))
        self.skip = nn.Parameter(torch.empty(heads * channels, **dd))
        exponent = nn.Parameter(torch.empty(channels, **dd)) if learn_exponent else None
        self.register_parameter("exponent", exponent)
        self.register_buffer("kernel_norm", torch.empty(directions * heads, channels, 1, **dd))
        self.register_buffer("taps", None)

    def reset_parameters(self) -> None:
        """Draw ``weight`` and ``skip`` anew and fix ``kernel_norm``, so that every kernel has L2 norm 1."""
        self.refuse_reparameterized("be initialised")
        if self.weight.is_meta:  # without memory there are no values to set
            return
        with torch.no_grad():
            if self.options.init == "normal":
                self.weight.normal_()
            else:
                self.weight.copy_(_placed_like(self.weight, cosines(self.weight)))
            self.skip.normal_()
            if self.exponent is not None:
                self.exponent.fill_(self.options.exponent)
            self.kernel_norm.copy_(self._norm())

    def refuse_reparameterized(self, purpose: str) -> None:
        """Raise a ValueError if the layer is reparameterized: it then has taps, and no parameters to do this with."""
        if self.taps is not None:
            raise ValueError(
                f"this {type(self).__name__} is reparameterized, without parameters: it cannot {purpose}; build the "
                "model anew and load the trained weights"
            )

    def refuse_sharded(self, purpose: str) -> None:
        """Raise a ValueError if the parameters are sharded: FSDP2 would go on to use the old ones."""
        if hasattr(self.weight, "full_tensor"):
            raise ValueError(
                f"this {type(self).__name__} is sharded: it cannot {purpose}; gather the weights with "
                "get_model_state_dict, full_state_dict=True, and load them into a new model"
            )

    def _norm(self) -> Tensor:
        """The L2 norm of every kernel before it is divided by kernel_norm."""
        with torch.no_grad():
            weight = _whole(self.weight)
            length = self.length if self.options.norm_over == "used" else weight.shape[3] * 2 ** (weight.shape[1] - 1)
            chunks = [
                multiscale_kernel(in_full(weight[:, :, a:b]), length, self.options_of(a, b), self._exponents(a, b))
                for a, b in self.chunks()
            ]
            return torch.cat([l2_norm(chunk) for chunk in chunks], dim=1)

    def chunks(self) -> list[tuple[int, int]]:
        """First and last channel (exclusive) of every chunk; one chunk, unless the taps take more than TAPS_BYTES."""
        if 4 * self.length * self.heads * self.channels <= TAPS_BYTES:
            return [(0, self.channels)]
        size = max(2, CHUNK_BYTES // (4 * self.length * self.heads))
        return [(first, min(first + size, self.channels)) for first in range(0, self.channels, size)]

    def options_of(self, first: int, last: int) -> KernelOptions:
        """The options of a chunk of channels, with the alphas of its first and its last channel."""
        if last - first == self.channels:
            return self.options
        start, end = 1 / self.options.alpha[0], 1 / self.options.alpha[1]
        step = (end - start) / max(1, self.channels - 1)
        return self.options._replace(alpha=(1 / (start + step * first), 1 / (start + step * (last - 1))))

    def _exponents(self, first: int, last: int) -> Tensor | None:
        """Of a chunk of channels, where they are learned."""
        return None if self.exponent is None else _whole(self.exponent)[first:last]

    def multiscale(
        self, weight: Tensor, norm: Tensor, options: KernelOptions, exponent: Tensor | None = None
    ) -> Tensor:
        """The kernels (directions, h C, L) of a weight, or of a chunk of its channels, in float32 or float64."""
        kernel = multiscale_kernel(in_full(weight), self.length, options, exponent) / norm
        return kernel if self.heads == 1 else kernel.reshape(2 if self.bidirectional else 1, -1, self.length)

    def kernel(self) -> Tensor:
        """The kernel k of Eq. 1 (directions, h C, L) in float32 (float64 for float64 parameters), without the skip.

        Raises:
            ValueError: the layer is reparameterized.
        """
        if not torch.jit.is_scripting():
            self.refuse_reparameterized("give its kernel without the skip")
        return self.multiscale(self.weight, self.kernel_norm, self.options, self.exponent)

    def built_taps(self) -> Tensor:
        """K with the skip, by lag: (h C, 2L-1) if bidirectional, else (h C, L); L is what the layer is built for."""
        if self.taps is not None:
            return self.taps
        else:  # noqa: RET505  TorchScript compiles what follows an if, but not the other branch of one that is settled
            if not torch.jit.is_scripting():
                weight, skip, norm = self.weight, self.skip, self.kernel_norm
                simple = self.is_plain()
                if simple and not norm.requires_grad and taps_operator.takes(weight, skip, norm):  # it is a constant
                    return self._taps_at_once()
            return lag_taps(self.kernel(), self.skip)

    @torch.jit.unused
    def is_plain(self) -> bool:
        """Whether the taps are those of one operator, see `taps`."""
        return self.heads == 1 and self.exponent is None and self.options.upsample == "linear"

    @torch.jit.unused
    def _taps_at_once(self) -> Tensor:
        options = self.options
        exponent = options.exponent if options.decay == "position" else None
        return taps_operator.multiscale_taps(
            self.weight, self.skip, self.kernel_norm, self.length, options.alpha, exponent
        )

    @torch.jit.unused
    def reparameterize(self) -> None:
        """Replace the parameters by the buffer ``taps`` that they make, for inference (timm's reparameterize_model).

        The outputs stay, at every input size. The layer then refuses to train, to be initialised or resized, and to
        load the state of a layer that has parameters.
        """
        if self.taps is None:
            self.refuse_sharded("be reparameterized")
            with torch.inference_mode(False), torch.no_grad():
                taps = self.built_taps().clone(memory_format=torch.contiguous_format)
            self.weight = self.skip = self.exponent = self.kernel_norm = None  # type: ignore[assignment]
            self.taps = taps
            self.eval()

    def train(self, mode: bool = True) -> Any:
        """As of any module; a reparameterized layer has nothing to train, and stays in evaluation mode."""
        return super().train(mode and self.taps is None)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        forget(self)  # of another device or dtype it would only take memory
        return super()._apply(*args, **kwargs)

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

    def extra_repr(self) -> str:
        if self.taps is not None:
            return f"{self.channels}, length={self.length}, reparameterized, backend={self.backend!r}"
        _, scales, channels, scale_dim = self.weight.shape
        used = ["decay", *DECAYS[self.options.decay]] + ["upsample"] * (self.options.upsample != "linear")
        options = ", ".join(f"{name}={getattr(self.options, name)!r}" for name in used)
        return (
            f"{channels}, length={self.length}, num_scales={scales}, scale_dim={scale_dim}, "
            f"bidirectional={self.bidirectional}, {options}, backend={self.backend!r}"
        )


def in_full(weight: Tensor) -> Tensor:
    """In float32 or float64: parameters in half precision make float32 taps. Nothing here is on autocast's list."""
    return weight if weight.dtype == torch.float64 else weight.float()


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
