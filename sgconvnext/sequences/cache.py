"""What a causal layer keeps of the tokens that it has seen, sample by sample."""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Self = TypeVar("Self", bound="Cache")
ROOM = 64  # tokens for which a new cache has memory; it doubles when it is full


class Cache:
    """Tensors (B, ..., T, C) that grow by tokens. Index it by rows to shrink or reorder the batch.

    Samples that have seen fewer tokens than others are filled up with zeros at their beginning.

    Attributes:
        owner: the layer whose cache it is.
        count: T, the tokens so far of the sample that has seen most.
        first: where each sample begins (B).
        most: the tokens that it may have to hold; None: any number.
        parts: the tensors (B, ..., room, C), of which T tokens are used.
    """

    def __init__(self, owner: nn.Module, batch: int, device: torch.device, most: int | None) -> None:
        self.owner, self.most = owner, most
        self.count = 0
        self.first = torch.zeros(batch, dtype=torch.long, device=device)
        self.parts: list[Tensor] = []

    def append(self, *new: Tensor) -> None:
        """Take up further tokens (B, ..., T, C), one tensor for each part.

        Raises:
            ValueError: they are of another dtype than those before.
        """
        end = self.count + new[0].shape[-2]
        if not self.parts:
            self.parts = [each.new_zeros(*each.shape[:-2], 0, each.shape[-1]) for each in new]
        for part, each in zip(self.parts, new, strict=True):
            if part.dtype != each.dtype:
                raise ValueError(
                    f"tokens are {each.dtype}, the state {part.dtype}: go on in the dtype that it began with"
                )
        if self.parts[0].is_inference() and not torch.is_inference_mode_enabled():  # such tensors take no change
            self.parts = [part.clone() for part in self.parts]
        if end > (room := self.parts[0].shape[-2]):
            wanted = max(ROOM, 2 * room) if self.most is None else min(max(ROOM, 2 * room), self.most)
            self.parts = [_pad(part, 0, max(wanted, end) - room) for part in self.parts]
        for part, each in zip(self.parts, new, strict=True):
            part[..., self.count : end, :] = each
        self.count = end

    @contextlib.contextmanager
    def kept_on_failure(self) -> Iterator[None]:
        """Forget the tokens that the block took up if it fails, so that it can be tried again."""
        count = self.count
        try:
            yield
        except BaseException:
            self.count = count
            raise

    def seen(self) -> list[Tensor]:
        """The parts (B, ..., T, C), as far as they are used."""
        return [part[..., : self.count, :] for part in self.parts]

    def check(self, owner: nn.Module, x: Tensor) -> None:
        """Refuse a cache of another layer, or of another batch than x."""
        if self.owner is not owner:
            raise ValueError(
                "this state is of another layer; keep one state for every layer, and copy it with state[:]"
            )
        if len(self) != len(x):
            raise ValueError(
                f"x has {len(x)} samples, the state {len(self)}: keep the rows that go on, as in state[rows]"
            )

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self: Self, rows: Tensor | slice | list[int]) -> Self:
        """The state of some samples, in that order. What none of them has seen is dropped."""
        first = self.first[rows]
        if first.ndim != 1:
            raise ValueError("rows must be a slice, a list or a tensor of one dimension, as in state[[0]]")
        unseen = int(first.min()) if len(first) else self.count
        parts = [part[rows][..., unseen:, :].clone() for part in self.seen()]
        return self._with(self.count - unseen, first - unseen, parts)

    def __deepcopy__(self: Self, _: Any) -> Self:
        """A copy of what was seen; the layer stays the same one."""
        return self[:]

    def join(self: Self, other: Self) -> Self:
        """The state of the samples of both, one batch after the other; each may have seen its own number of tokens.

        Raises:
            ValueError: they are states of two layers.
        """
        if self.owner is not other.owner or len(self.parts) != len(other.parts):
            raise ValueError("these are states of two layers; join the states of the same layer, which stays as it is")
        count = max(self.count, other.count)
        late = [count - each.count for each in (self, other)]
        first = torch.cat([self.first + late[0], other.first + late[1]])
        pairs = zip(self.seen(), other.seen(), strict=True)
        return self._with(count, first, [torch.cat([_pad(a, late[0], 0), _pad(b, late[1], 0)]) for a, b in pairs])

    def _with(self: Self, count: int, first: Tensor, parts: list[Tensor]) -> Self:
        other: Self = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.count, other.first, other.parts = count, first, parts
        return other


def _pad(part: Tensor, before: int, after: int) -> Tensor:
    """Zeros before and after the tokens of a tensor (B, ..., T, C)."""
    return F.pad(part, (0, 0, before, after))
