"""What is at work around a call: a tracer, an export, forward mode, or torch.func."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def is_recorded() -> bool:
    """Whether something writes down the operators that run, to run them again: jit.trace, torch.export, make_fx."""
    if torch.compiler.is_compiling() and not _is_exporting():
        return False
    return torch.jit.is_tracing() or _is_exporting() or get_proxy_mode() is not None


def _is_exporting() -> bool:
    # not torch.compiler.is_exporting(), which some versions (2.11) compile to True; torch 2.6 has neither, and runs
    # what it compiles
    return getattr(torch.compiler, "_is_exporting_flag", False)


def is_open(size: Sequence[int]) -> bool:
    """Whether an export leaves one of these sizes open. It is a symbol then, and comparing it would settle it."""
    return any(isinstance(side, torch.SymInt) for side in size) and is_recorded()


def is_traced_to_onnx() -> bool:
    """Whether torch.onnx.export(dynamo=False) is at work, whose operators have no FFT."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()


def is_in_forward_mode() -> bool:
    """Whether forward mode is on, torch.func's or torch.autograd's."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def is_compiled_transform() -> bool:
    """Whether torch.func is at work inside of what torch.compile compiles."""
    return torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def runs_eagerly_on_cpu(*tensors: Tensor) -> bool:
    """Whether all are ordinary tensors on a CPU, and no compiler, tracer, transform or counter of FLOPs is at work.

    These have to see operators that they know.
    """
    if torch.compiler.is_compiling() or is_recorded() or is_transformed() or torch._C._len_torch_dispatch_stack():
        return False
    return all(type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" for x in tensors) and not any(
        map(is_legacy_batchedtensor, tensors)
    )


def is_transformed() -> bool:
    """Whether torch.func or forward mode is at work. Their tensors must not be kept."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
