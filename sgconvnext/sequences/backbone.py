"""The layers of a network for sequences, each a token mixer and an MLP, in any order.

The letters of ``layers`` name the mixers: C is SGConv (the block of Figure 6 of arXiv 2210.09298), A attention, L a
local convolution. Spaces are for the eye: "AAC AAC ACC" (section 4.3.1).

Letters: B batch, L tokens, C channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Attention
from .cache import Cache
from .local_convolution import LocalConvolution
from .mixer import SGConvMixer

MIXERS: dict[str, Callable[..., nn.Module]] = {"A": Attention, "C": SGConvMixer, "L": LocalConvolution}


class SequenceLayer(nn.Module):
    """x + mix(norm(x)), then x + MLP(norm(x)); with post_norm norm(x + mix(x)), then norm(x + MLP(x)).

    Args:
        mixer: tokens (B, L, C) to the same; it also has step and prefill if it can generate.
        channels: C.
        mlp_ratio: hidden channels of the MLP over C; 0: no MLP.
        post_norm: where the norms are.
        drop: dropout in the MLP.
        drop_path: probability that a sample skips the mixer, and that it skips the MLP.
    """

    def __init__(
        self, mixer: nn.Module, channels: int, mlp_ratio: float, post_norm: bool, drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.mixer: Any = mixer
        self.norm1 = nn.LayerNorm(channels)
        self.post_norm = post_norm
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.mlp = self.norm2 = None
        if mlp_ratio > 0:
            self.norm2 = nn.LayerNorm(channels)
            self.mlp = Mlp(channels, int(mlp_ratio * channels), drop=drop)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Map x (B, L, C) to the same; ``seen`` (B, L) tells which tokens are there."""
        return self._around(x, lambda tokens: self.mixer(tokens, seen))

    def generate(self, how: str, x: Tensor, state: Cache | None) -> tuple[Tensor, Cache]:
        """The mixer's "step" of x (B, C), or "prefill" of x (B, T, C), in place of its forward."""
        states = []

        def mix(tokens: Tensor) -> Tensor:
            y, after = getattr(self.mixer, how)(tokens, state)
            states.append(after)
            return y

        return self._around(x, mix), states[0]

    def _around(self, x: Tensor, mix: Callable[[Tensor], Tensor]) -> Tensor:
        parts: list[tuple[Any, Any]] = [(self.norm1, mix)]
        if self.mlp is not None:
            parts.append((self.norm2, self.mlp))
        for norm, part in parts:
            x = norm(x + self.drop_path(part(x))) if self.post_norm else x + self.drop_path(part(norm(x)))
        return x


class Backbone(nn.Module):
    """The layers of a network, and what timm and train.py ask of one.

    Args:
        length: the longest sequence.
        layers: letters of MIXERS.
        dim: C.
        causal: whether a token sees only itself and those before it.
        mlp_ratio, post_norm: as of `SequenceLayer`.
        attention_heads: of attention.
        subsample: r, where only every r-th token is there, see `SGConv`; the longest sequence then has length / r.
        sgconv: further arguments of `SGConvMixer`: scale_dim, heads, glu, decay, ...
        kernel_size: taps of a local convolution.
        drop_rate: dropout in mixers and MLPs.
        drop_path_rate: stochastic depth, from 0 in the first layer to this in the last.
    """

    def __init__(
        self,
        length: int,
        layers: str,
        dim: int,
        *,
        causal: bool,
        mlp_ratio: float = 0.0,
        post_norm: bool = False,
        attention_heads: int = 4,
        subsample: int = 1,
        sgconv: dict[str, Any] | None = None,
        kernel_size: int = 7,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        letters = layers.replace(" ", "") if isinstance(layers, str) else ""
        if not letters or set(letters) - set(MIXERS):
            raise ValueError(f"layers={layers!r} must be letters of {', '.join(MIXERS)}, as in 'AAC AAC ACC'")
        for name, value, right in (
            ("length", length, length >= 1),
            ("subsample", subsample, subsample >= 1),
            ("mlp_ratio", mlp_ratio, mlp_ratio >= 0),
            ("drop_rate", drop_rate, 0 <= drop_rate < 1),
            ("drop_path_rate", drop_path_rate, 0 <= drop_path_rate < 1),
        ):
            if not right:
                raise ValueError(f"{name}={value} is out of range: lengths begin at 1, ratios at 0, rates end below 1")
        if taken := {"length", "bidirectional", "subsample", "dropout", "channels_last"} & set(sgconv or {}):
            raise ValueError(f"sgconv takes no {min(taken)!r}, which follows from the network; leave it out")
        self.length, self.grad_checkpointing = -(-length // subsample), False
        self.num_features = self.head_hidden_size = dim
        mixing = {
            "A": {"heads": attention_heads, "causal": causal},
            "C": {"length": length, "bidirectional": not causal, "subsample": subsample} | (sgconv or {}),
            "L": {"kernel_size": kernel_size, "causal": causal},
        }
        rates = calculate_drop_path_rates(drop_path_rate, len(letters))
        self.layers = nn.ModuleList(
            SequenceLayer(
                MIXERS[letter](dim, dropout=drop_rate, **mixing[letter]), dim, mlp_ratio, post_norm, drop_rate, rate
            )
            for letter, rate in zip(letters, rates, strict=True)
        )
        self.norm = nn.Identity() if post_norm else nn.LayerNorm(dim)

    def mix(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """All layers and the last norm: x (B, L, C) to the same.

        Raises:
            ValueError: x is longer than the network.
        """
        if x.shape[1] > self.length:
            raise ValueError(f"{x.shape[1]} tokens are more than length={self.length}: build the network for them")
        for layer in self.layers:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, seen, use_reentrant=False)
            else:
                x = layer(x, seen)
        return self.norm(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of a layer in backward: less memory, a third slower."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of parameters, for layer decay."""
        return {"stem": r"^embed", "blocks": r"^layers\.(\d+)" if coarse else [(r"^layers\.(\d+)", None)]}

    def no_weight_decay(self) -> set[str]:
        """timm's names of parameters without weight decay: those of the positions' decay."""
        return {name for name, _ in self.named_parameters() if name.endswith(".exponent")}

    def init_weights(self) -> None:
        """Draw all parameters anew: linear layers and embeddings as GPT-2's, others as they do."""
        module: Any
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, (nn.Linear, nn.Embedding)):
                trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
