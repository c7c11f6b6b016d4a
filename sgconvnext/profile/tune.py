"""Measure which backend of the long convolution, and which form of the block, is the fastest on this machine.

In the manner of torch.backends.cudnn.benchmark, but only when asked:

    model = timm.create_model("sgconvnext_tiny").cuda()
    with torch.autocast("cuda", torch.bfloat16):
        tuning = sgconvnext.tune(model.train(), images)
    tuning.save("h100.json")

    sgconvnext.Tuning.load("h100.json").use()  # on the same machine, later
"""

import functools
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
from torch import Tensor, nn

from ..longconv import available_backends, check, freeze, long_conv, tuned
from ..longconv.choice import shipped_backend
from ..models.convolution import is_kept
from ..tuning import Choice, Tuning
from . import race, tune_blocks
from .table import environment
from .timing import Step

MATRIX_LIMIT = 2**30  # bytes of the L x L matrices of all channels, above which a backend that builds them is left out
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # relative
TF32_TOLERANCE = 2e-3  # of float32 on a GPU where products may be rounded to TF32


def tune(model: nn.Module, batch: Tensor) -> Tuning:
    """Check and time the backends of a model's convolutions and the forms of its blocks; the fastest run from now on.

    The output, and in training the gradients, of every backend are first compared with the definition in float64. One
    that is wrong on this device is left out, and told. The convolutions, their batch and dtype are those of a forward
    pass with these images: call it as you will call the model, under autocast if you use it. A model in training
    mode is measured forward and backward, any other one forward, after `reparameterize_model` with fixed taps. The
    forms of a block are compared with the block itself in float64, see `tune_blocks`.

    The choices hold in this process, for every model, and for batches from half to twice this one: those of a model in
    training mode wherever gradients are on, the others under torch.no_grad and torch.inference_mode. Outputs with and
    without them agree to rounding. Exports do not look at them.

    Args:
        model: with layers whose backend is "auto".
        batch: images (B, C, H, W), on the model's device.

    Returns:
        what was measured; its `save` keeps it.

    Raises:
        ValueError: the model asks for no backend, or no backend or no form is right.
    """
    asked = _asked(model, batch)
    if not asked:
        raise ValueError(f"{type(model).__name__} has no SGConv layer with backend='auto'; give an SGConvNeXt")
    drawn = torch.random.fork_rng(devices=[batch.device] if batch.is_cuda else [])
    with drawn, torch.inference_mode(False), tuned.undone_by_an_error():  # a tensor of inference has no gradient
        convolutions = [_measure(each, batch.device) for each in asked]
        Tuning(convolutions, here := facts(batch.device)).use()  # the blocks are measured with them
        blocks = tune_blocks.choices(model, batch)
    return Tuning([*convolutions, *blocks], here).use()


def facts(device: torch.device) -> dict[str, Any]:
    """What measurements depend on: device, versions, threads, and the date."""
    found = environment(device, "") | {"date": date.today().isoformat()}
    return {key: value for key, value in found.items() if key != "command"}


def _asked(model: nn.Module, batch: Tensor) -> list[tuned.Asked]:
    """The different convolutions of a forward pass, which changes nothing in the model."""
    with race.evaluated(model), tuned.listening() as asked, torch.no_grad():
        getattr(model, "_orig_mod", model).forward(batch)  # not compiled, to be quick
    if model.training:
        asked = [each._replace(convolution=each.convolution._replace(work="training")) for each in asked]
    return list({(each.convolution, each.batch): each for each in reversed(asked)}.values())[::-1]  # the first of each


def _measure(asked: tuned.Asked, device: torch.device) -> Choice:
    """Check the backends, time those that are right, and choose."""
    which, batch = asked.convolution, asked.batch
    x, dy = (_signal(asked, device) for _ in range(2))
    taps = torch.randn(which.channels, 2 * which.length - 1, device=device, dtype=_taps_dtype(asked.dtype))
    truth = check.truth(x, taps, dy)
    names = [name for name in available_backends(x) if name != "reference"]  # which is the definition itself
    too_large = 4 * which.channels * which.length**2 > MATRIX_LIMIT
    left_out = {"toeplitz": "its matrices are too large"} if too_large else {}
    measured = race.run(
        {
            name: race.Candidate(
                functools.partial(_errors, name, which, truth), functools.partial(_step, name, which, truth)
            )
            for name in names
            if name not in left_out
        },
        _tolerance(which),
        shipped_backend(x, batch, which.length, asked.one_length),
        device,
        f"no backend convolves {which.channels} channels x {which.length} samples rightly",
    )
    measured["left_out"] |= left_out
    return Choice(
        device=which.device,
        dtype=str(which.dtype).partition(".")[2],
        channels=which.channels,
        length=which.length,
        work=which.work,
        batch=batch,
        **measured,
    )


def _signal(asked: tuned.Asked, device: torch.device) -> Tensor:
    """Normal noise (B, C, L), in the dtype and layout that the network's signals have."""
    channels, length = asked.convolution.channels, asked.convolution.length
    if asked.channels_last:
        return torch.randn(asked.batch, length, channels, device=device).to(asked.dtype).transpose(1, 2)
    return torch.randn(asked.batch, channels, length, device=device).to(asked.dtype)


def _taps_dtype(dtype: torch.dtype) -> torch.dtype:
    """Parameters under autocast stay in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _errors(name: str, which: tuned.Convolution, truth: check.Truth) -> dict[str, float]:
    if which.work == "training":
        return truth.errors(functools.partial(long_conv, backend=name))
    return truth.error_of_output(_forward(name, which, truth))


def _forward(name: str, which: tuned.Convolution, truth: check.Truth) -> Callable[[Tensor], Tensor]:
    """The convolution with these taps, as `models.convolution` runs it in inference."""
    if which.device == "cpu" and (which.work == "frozen" or is_kept(which.channels, which.length)):
        return freeze(truth.taps, which.length, truth.x.dtype, name)
    return functools.partial(long_conv, taps=truth.taps, backend=name)


def _tolerance(which: tuned.Convolution) -> float:
    rounded = which.device == "cuda" and which.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return TF32_TOLERANCE if rounded else TOLERANCE[which.dtype]


def _step(name: str, which: tuned.Convolution, truth: check.Truth) -> Step:
    """Forward, or forward and both gradients."""
    if which.work != "training":
        return race.step(functools.partial(_forward(name, which, truth), truth.x), [], truth.dy)
    x, taps = truth.x.detach().requires_grad_(), truth.taps.detach().requires_grad_()
    return race.step(functools.partial(long_conv, x, taps, name), [x, taps], truth.dy)
