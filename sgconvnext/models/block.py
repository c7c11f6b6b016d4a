"""The ConvNeXt block with SGConv in place of the 7x7 depthwise convolution."""

from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, Mlp
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from ..longconv import available_backends
from .layer import SGConv2d, is_transformed, runs_eagerly_on_cpu
from .packed_mlp import PackedMlp, packed

PIECE_TOKENS = 1024  # tokens whose hidden layer stays in a CPU's cache; measured with widths 96 to 768


class SGConvNeXtBlock(nn.Module):
    """x + DropPath(gamma * Linear(GELU(Linear(LN(SGConv2d(x)))))); (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        input_size: H, W that the kernel is built for.
        drop_path: probability of dropping the branch of a sample.
        ls_init_value: initial layer scale gamma; None for no layer scale.
        device, dtype: of the parameters.
        sgconv: further options of SGConv2d.
    """

    def __init__(
        self,
        channels: int,
        input_size: tuple[int, int],
        *,
        drop_path: float = 0.0,
        ls_init_value: float | None = 1e-6,
        device: Any = None,
        dtype: Any = None,
        **sgconv: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.sgconv = SGConv2d(channels, input_size, **sgconv, **dd)
        self.norm = LayerNorm(channels, **dd)
        self.mlp = Mlp(channels, 4 * channels, **dd)
        self.ls_init_value = ls_init_value
        self.gamma = nn.Parameter(torch.empty(channels, **dd)) if ls_init_value is not None else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self._packed: PackedMlp | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the layer scale to its initial value; the submodules have their own."""
        if self.gamma is not None and self.ls_init_value is not None:
            nn.init.constant_(self.gamma, self.ls_init_value)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self._runs_triton(x):
            return self._fused(x)
        y = self.sgconv(x).permute(0, 2, 3, 1)  # LN and the MLP work on (B, H, W, C)
        if not torch.jit.is_scripting() and self._works_in_pieces(x):
            return self._in_pieces(x, y)
        return self.drop_path(self._branch(y).permute(0, 3, 1, 2)) + x  # the first one's layout is kept

    def _branch(self, y: Tensor) -> Tensor:
        """gamma * MLP(LN(y)) of tokens (..., C)."""
        y = self.mlp(self.norm(y))
        return y if self.gamma is None else y * self.gamma

    @torch.jit.unused
    def _works_in_pieces(self, x: Tensor) -> bool:
        """Whether a few tokens at a time keep the hidden layer, 4 times larger, in the cache, and no hook sees it."""
        if not runs_eagerly_on_cpu(x) or x.numel() == 0:
            return False
        if torch.is_grad_enabled():  # an optimiser's step may follow, and fused ones do not count as writing
            self._packed = None
        if self._is_hooked():
            return False
        return x.shape[0] * x.shape[2] * x.shape[3] > PIECE_TOKENS or self._packed_mlp(x) is not None

    @torch.jit.unused
    def _packed_mlp(self, x: Tensor) -> PackedMlp | None:
        """The MLP with packed weights, for float32 on a CPU and a block that `reparameterize` fixed."""
        if (
            torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or x.dtype != torch.float32
            or getattr(self.sgconv, "taps", None) is None
        ):
            return None
        self._packed = packed(self.mlp, self.gamma, self._packed)
        return self._packed

    @torch.jit.unused
    def _is_hooked(self) -> bool:
        """Whether somebody watches or replaces what a module inside does: by a hook, or a forward of its own."""
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return any(getattr(module_hooks, f"_global{kind}") for kind in kinds) or any(
            "forward" in vars(module) or any(getattr(module, kind) for kind in kinds) for module in self.modules()
        )

    @torch.jit.unused
    def _drops(self) -> bool:
        """Whether drop path, or what was put in its place, does anything now."""
        idle = type(self.drop_path) is DropPath and not self.drop_path.training
        return not (idle or type(self.drop_path) is nn.Identity)

    @torch.jit.unused
    def _runs_triton(self, x: Tensor) -> bool:
        """Whether Triton runs the convolution; then it also runs the norm and the sum, which change the layout."""
        if getattr(self.sgconv, "backend", None) != "triton" or not isinstance(x, Tensor) or self._is_hooked():
            return False
        if not torch.compiler.is_compiling() and is_transformed():
            return False
        if type(self.norm) is not LayerNorm or type(self.drop_path) not in (DropPath, nn.Identity):
            return False
        return "triton" in available_backends(x)

    @torch.jit.unused
    def _fused(self, x: Tensor) -> Tensor:
        """The block's output with LN from (B, C, L) to (B, L, C) and the sum back, without further passes."""
        from ..longconv.triton import block as triton_block  # imports triton

        mixed, norm = self.sgconv(x).flatten(2), self.norm
        tokens = triton_block.layer_norm_channels_last(mixed, norm.weight, norm.bias, norm.eps)
        keep = None
        if isinstance(self.drop_path, DropPath) and self.drop_path.training:
            kept = 1 - self.drop_path.drop_prob
            keep = torch.empty(x.shape[0], device=x.device).bernoulli_(kept)
            if kept > 0 and self.drop_path.scale_by_keep:
                keep = keep.div_(kept)
        y = triton_block.scale_residual_channels_first(x.flatten(2), self.mlp(tokens), self.gamma, keep)
        return y.view(x.shape)

    @torch.jit.unused
    def _in_pieces(self, x: Tensor, y: Tensor) -> Tensor:
        """The block's output from x and y = SGConv2d(x) in (B, H, W, C)."""
        tokens = y.shape[:3].numel()
        size = -(-tokens // -(-tokens // PIECE_TOKENS))  # of as many equal pieces as it takes
        mixed, shortcuts = y.flatten(0, 2).split(size), x.permute(0, 2, 3, 1).flatten(0, 2).split(size)
        if self._drops():  # whole images
            branch = torch.cat([self._branch(piece) for piece in mixed]).view_as(y)
            return self.drop_path(branch.permute(0, 3, 1, 2)) + x
        mlp = self._packed_mlp(x)
        pieces = [
            self._branch(piece) + shortcut if mlp is None else mlp(self.norm(piece), shortcut)
            for piece, shortcut in zip(mixed, shortcuts, strict=True)
        ]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view_as(y).permute(0, 3, 1, 2)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._packed = None  # of another device or dtype it would only take memory
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}  # copies make their own
