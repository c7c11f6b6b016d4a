"""What inference keeps from one forward to the next: made from fixed tensors, and made anew once these change."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

T = TypeVar("T")


class _Kept(NamedTuple):
    key: Any
    written: list[Any]
    sources: list[Tensor]  # aliases: while they live, no other tensor gets their memory and looks equal; or copies
    value: Any


_KEPT: "WeakKeyDictionary[nn.Module, _Kept]" = WeakKeyDictionary()


def kept(owner: nn.Module, key: Any, sources: list[Tensor], make: Callable[[], T]) -> T:
    """make(), or what it made last for that module, if key and sources are the same and nothing wrote to the sources.

    Versions and addresses are compared, not values. Writing through ``.data``, NumPy or another process changes
    neither. Fused optimisers change neither as well: call `forget` where one may follow. Tensors made in inference
    mode have no version, so nothing is kept of them.
    """
    if any(source.is_inference() for source in sources):
        return make()
    # read before make() uses them: another thread may write to them in the meantime
    written = [(s._version, s.data_ptr(), s.device, s.dtype, s.shape, s.stride()) for s in sources]
    last = _KEPT.get(owner)
    if last is None or (last.key, last.written) != (key, written):
        aliases = [source.detach() for source in sources]
        last = _KEPT[owner] = _Kept(key, written, aliases, make())
    value: T = last.value
    return value


def kept_while_equal(owner: nn.Module, key: Any, sources: list[Tensor], make: Callable[[], T]) -> T:
    """As `kept`, but by the values of the sources, which are copied: for small weights that anything may write to."""
    key = key, [source.dtype for source in sources]
    last = _KEPT.get(owner)
    if last is None or last.key != key or not all(map(torch.equal, last.sources, sources)):
        copies = [source.detach().clone() for source in sources]
        last = _Kept(key, [], copies, make())
        if all(map(torch.equal, copies, sources)):  # no other thread wrote to them in the meantime
            _KEPT[owner] = last
    value: T = last.value
    return value


def forget(owner: nn.Module) -> None:
    """Free what is kept for a module."""
    _KEPT.pop(owner, None)
