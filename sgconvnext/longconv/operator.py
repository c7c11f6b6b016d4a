"""Functions as operators of torch, which compilers, exporters and counters of FLOPs see as one node.

torch.library.custom_op does the same, and also checks every call in Python: on a GPU these checks took longer than the
programs of a small map.
"""

from collections.abc import Callable
from typing import Any

import torch


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that makes torch.ops.sgconvnext.NAME of a function of tensors.

    The function writes to no argument, and returns tensors of its own. It knows no derivatives.

    Args:
        name: of the operator.
        fake: takes the same arguments, and returns empty tensors of the shapes and dtypes that the function returns.
    """

    def define(function: Callable[..., Any]) -> Any:
        full_name = f"sgconvnext::{name}"
        torch.library.define(full_name, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(full_name, "default", function)
        torch.library.register_fake(full_name, fake)
        return getattr(torch.ops.sgconvnext, name).default

    return define
