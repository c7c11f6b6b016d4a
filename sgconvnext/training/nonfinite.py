"""Where a loss or gradient first stopped being finite."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def first_module(model: nn.Module, forward: Callable[[], Tensor]) -> str | None:
    """The first module, in the order of computation, whose output is not finite when ``forward`` runs again.

    Returns:
        Its name, or "the input of" it after an operation that is no module; "the images" or "the loss" where it is
        not the network's doing; None where all is finite.
    """
    found: list[str] = []
    finite: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if found:
                return
            if not _finite(inputs):  # which no module has made
                found.append(f"the input of {name}" if finite else "the images")
            elif not _finite(output):
                found.append(name)
            finite.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            loss = forward()
    finally:
        for hook in hooks:
            hook.remove()
    if not found and not math.isfinite(loss.item()):
        found.append("the loss")
    return found[0] if found else None


def first_gradient(model: nn.Module) -> str | None:
    """The parameter nearest the output with a gradient that is not finite: backward begins at the output."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"the gradient of {name}"
    return None


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    return all(_finite(item) for item in value) if isinstance(value, list | tuple) else True
