"""Fused forms of the block's forward: the same result in fewer passes over memory, where one is known to be faster.

`fused_forward` alone decides which form may stand in; the forms themselves ask nothing.
"""

import functools
from collections.abc import Callable
from types import NoneType
from typing import Any, TypeAlias

import torch
from timm.layers import DropPath, LayerNorm, Mlp
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from ..longconv import available_backends
from ..longconv.context import is_transformed, runs_eagerly_on_cpu
from .gate import Gate
from .kept import forget
from .packed_mlp import PackedMlp, packed

CHUNK_TOKENS = 1024  # tokens whose hidden layer stays in a CPU's cache; measured with widths 96 to 768

Form: TypeAlias = Callable[[Any, Tensor], Tensor]  # (block, x) -> the block's output


def fused_forward(block: Any, x: Any) -> Form | None:
    """The form that may stand in for ``block.forward(x)`` now, or None.

    A form calls modules with other shapes, or not at all. So gate, norm and MLP must be those of the block, which work
    token by token, and nobody may watch or replace what is inside: no hooks, no forward of their own. `triton_form`
    needs a convolution that Triton runs. The forms for a CPU need eager execution, and no transform or tracer at work.
    Packed weights also need inference in float32, after `reparameterize`.
    """
    if type(block.norm) is not LayerNorm or type(block.mlp) is not Mlp or type(block.gate) not in (Gate, NoneType):
        return None
    if getattr(block.sgconv, "backend", None) == "triton" and isinstance(x, Tensor):
        transformed = not torch.compiler.is_compiling() and is_transformed()
        known = type(block.drop_path) in (DropPath, nn.Identity)
        if known and not transformed and not _is_hooked(block) and "triton" in available_backends(x):
            return triton_form
    if not runs_eagerly_on_cpu(x) or x.numel() == 0:
        return None
    infers = not torch.is_grad_enabled() and getattr(block.sgconv, "taps", None) is not None
    plain = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") and not _drops(block)
    if not infers or not plain:
        forget(block)  # an optimiser's step may follow, or the weights have another dtype now
    if _is_hooked(block):
        return None
    mlp = packed(block) if infers and plain else None
    if mlp is not None:
        return functools.partial(packed_form, mlp=mlp)
    return chunked_form if x.shape[0] * x.shape[2] * x.shape[3] > CHUNK_TOKENS else None


def _is_hooked(block: nn.Module) -> bool:
    """Whether somebody watches or replaces what a module inside does: by a hook, or a forward of its own."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module_hooks, f"_global{kind}") for kind in kinds) or any(
        "forward" in vars(module) or any(getattr(module, kind) for kind in kinds) for module in block.modules()
    )


def _drops(block: Any) -> bool:
    """Whether drop path, or what was put in its place, does anything now."""
    idle = type(block.drop_path) is DropPath and not block.drop_path.training
    return not (idle or type(block.drop_path) is nn.Identity)


def triton_form(block: Any, x: Tensor) -> Tensor:
    """LN reads (B, C, L) and writes (B, L, C), and the sum goes back: the transposes cost no pass of their own."""
    from ..longconv.triton import block as triton_block

    mixed, norm, drop_path = block.sgconv(x).flatten(2), block.norm, block.drop_path
    if block.gate is None:
        tokens = triton_block.layer_norm_channels_last(mixed, norm.weight, norm.bias, norm.eps)
    else:  # its product is the pass that changes the layout
        tokens = norm(block.gate(mixed.transpose(1, 2), x.flatten(2).transpose(1, 2)))
    keep = None
    if isinstance(drop_path, DropPath) and drop_path.training:
        probability = 1 - drop_path.drop_prob
        keep = torch.empty(x.shape[0], device=x.device).bernoulli_(probability)
        if probability > 0 and drop_path.scale_by_keep:
            keep = keep.div_(probability)
    y = triton_block.scale_residual_channels_first(x.flatten(2), block.mlp(tokens), block.gamma, keep)
    return y.view(x.shape)


def chunked_form(block: Any, x: Tensor) -> Tensor:
    """Gate, norm and MLP for a chunk of tokens at a time: the hidden layer, 4 times larger, stays in the cache."""
    y = block.sgconv(x).permute(0, 2, 3, 1)
    chunks, shortcuts = _token_chunks(y), _token_chunks(x.permute(0, 2, 3, 1))
    if _drops(block):  # drop path takes whole images
        branches = [_branch(block, chunk, part) for chunk, part in zip(chunks, shortcuts, strict=True)]
        return block.drop_path(torch.cat(branches).view_as(y).permute(0, 3, 1, 2)) + x
    done = [_branch(block, chunk, part) + part for chunk, part in zip(chunks, shortcuts, strict=True)]
    return (done[0] if len(done) == 1 else torch.cat(done)).view_as(y).permute(0, 3, 1, 2)


def _branch(block: Any, y: Tensor, x: Tensor) -> Tensor:
    """gamma * MLP(LN(Gate(y, x))) of tokens (..., C)."""
    if block.gate is not None:
        y = block.gate(y, x)
    y = block.mlp(block.norm(y))
    return y if block.gamma is None else y * block.gamma


def packed_form(block: Any, x: Tensor, mlp: PackedMlp) -> Tensor:
    """As `chunked_form`, with packed weights; layer scale and sum are in the products."""
    y = block.sgconv(x).permute(0, 2, 3, 1)
    chunks, shortcuts = _token_chunks(y), _token_chunks(x.permute(0, 2, 3, 1))
    done = [_packed_sum(block, mlp, chunk, part) for chunk, part in zip(chunks, shortcuts, strict=True)]
    return (done[0] if len(done) == 1 else torch.cat(done)).view_as(y).permute(0, 3, 1, 2)


def _packed_sum(block: Any, mlp: PackedMlp, y: Tensor, x: Tensor) -> Tensor:
    """x + gamma * MLP(LN(Gate(y, x))) of tokens (tokens, C)."""
    if block.gate is not None:
        y = mlp.gated(y, block.gate.normed(x))
    return mlp(block.norm(y), x)


def _token_chunks(y: Tensor) -> tuple[Tensor, ...]:
    """(B, H, W, C) as the fewest equal chunks (tokens, C) of at most CHUNK_TOKENS."""
    tokens = y.shape[:3].numel()
    size = -(-tokens // -(-tokens // CHUNK_TOKENS))
    return y.flatten(0, 2).split(size)
