"""Multi-head attention with rotary positions: what SGConv is compared with, and mixed with."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import Cache

BASE = 10_000.0  # of the rotary frequencies (Su et al., arXiv 2104.09864)


class Attention(nn.Module):
    """y = W_o softmax(q k^T / sqrt(d)) v, with q and k turned by their positions; (B, L, C) to (B, L, C).

    Positions only enter by their differences, so samples may begin at any token.

    Args:
        channels: C.
        heads: of C / heads = d channels, an even number.
        causal: whether a token sees only itself and those before it.
        dropout: of the output of the heads.
        device, dtype: of the parameters.

    Raises:
        ValueError: the channels cannot be divided so.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        causal: bool = False,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if heads < 1 or channels % (2 * heads):
            raise ValueError(f"attention of {channels} channels has no {heads} heads of an even number of channels")
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(channels, 3 * channels, device=device, dtype=dtype)
        self.drop = nn.Dropout(dropout)
        self.project = nn.Linear(channels, channels, device=device, dtype=dtype)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Map x (B, L, C) to y; tokens that are not ``seen`` (B, L) are no keys."""
        query, key, value = self._heads(x, torch.arange(x.shape[1], device=x.device))
        if seen is None:
            return self._merge(F.scaled_dot_product_attention(query, key, value, is_causal=self.causal))
        mask = seen[:, None, None]
        if self.causal:
            mask = mask & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return self._merge(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))

    def step(self, x: Tensor, state: Cache | None = None) -> tuple[Tensor, Cache]:
        """One output (B, C) from one input (B, C) and the keys and values of those before it."""
        y, state = self.prefill(x[:, None], state)
        return y[:, 0], state

    @torch.no_grad()
    def prefill(self, x: Tensor, state: Cache | None = None) -> tuple[Tensor, Cache]:
        """The outputs (B, T, C) of a chunk (B, T, C) that follows what the state has seen.

        Raises:
            ValueError: the attention is not causal, or the state is of another layer or batch.
        """
        if not self.causal:
            raise ValueError("attention that sees the future cannot generate; build it with causal=True")
        state = Cache(self, x.shape[0], x.device, None) if state is None else state
        state.check(self, x)
        with state.kept_on_failure():
            return self._attend(x, state), state

    def _attend(self, x: Tensor, state: Cache) -> Tensor:
        """The outputs of a chunk, which the state takes up."""
        past = state.count
        positions = past + torch.arange(x.shape[1], device=x.device) - state.first[:, None]
        query, key, value = self._heads(x, positions[:, None])
        state.append(key, value)
        keys, values = state.seen()
        token = torch.arange(state.count, device=x.device)
        mask = token <= token[past:, None]  # (T, all)
        if state.first.any():
            mask = mask & (token >= state.first[:, None])[:, None, None]
        return self._merge(F.scaled_dot_product_attention(query, keys, values, attn_mask=mask))

    def _heads(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, L, d) of tokens at positions (L), or (B, 1, L)."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        half = query.shape[-1] // 2
        frequency = BASE ** (-torch.arange(half, device=x.device) / half)
        angles = positions[..., None] * frequency
        return _turn(query, angles), _turn(key, angles), value

    def _merge(self, y: Tensor) -> Tensor:
        return self.project(self.drop(y.transpose(1, 2).flatten(2)))


def _turn(x: Tensor, angles: Tensor) -> Tensor:
    """Channel pairs (i, i + d/2) turned by their angles, in the dtype of x."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
