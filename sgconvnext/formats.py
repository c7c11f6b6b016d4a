"""A network as a file for a runtime: ONNX, OpenVINO, torch.export's pt2 or TorchScript, checked in that runtime.

Networks of this package are reparameterized first. Their file then holds the taps, and for ONNX and OpenVINO nothing
but matrix products stands in for the FFT.
"""

import contextlib
import copy
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch._dynamo
from timm.utils import reparameterize_model
from torch import Tensor, nn

from .errors import one_line

STRIDE, LARGEST = 32, 4096  # pixels of a side
LEAST_OPSET, OPSET, MOST_OPSET = 18, 20, 24
RUNTIMES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".pt", "openvino": ".xml"}
Run = Callable[[Tensor], Tensor]
LARGEST_ERROR = {torch.float32: 1e-4, torch.float16: 2e-2}


def refuse(out: str, kind: str, size: Sequence[int], dynamic: Sequence[str], opset: int | None) -> None:
    """Raise a ValueError for what cannot be written, before anything is built.

    Args:
        out: the file.
        kind: of `SUFFIXES`.
        size: H, W of the example, in pixels.
        dynamic: "batch", "hw", both or none: the sizes that stay open.
        opset: of ONNX; None for `OPSET`.
    """
    suffix = SUFFIXES[kind]
    if Path(out).suffix != suffix:
        raise ValueError(f"OUT {out!r} must end with {suffix}, as files of --format {kind} do")
    _refuse_existing(out, kind)
    if min(size) < STRIDE:
        raise ValueError(f"--img-size {size[0]}x{size[1]} is below the stride; use at least {STRIDE}x{STRIDE}")
    if max(size) > LARGEST:
        raise ValueError(f"--img-size {size[0]}x{size[1]} is too large; use at most {LARGEST}x{LARGEST}")
    if opset is not None and kind not in RUNTIMES:
        raise ValueError(f"--opset {opset} is of ONNX; --format {kind} has none: leave it out")
    if opset is not None and not LEAST_OPSET <= opset <= MOST_OPSET:
        age = "old" if opset < LEAST_OPSET else "new"
        raise ValueError(f"--opset {opset} is too {age} for --format {kind}; use {LEAST_OPSET} to {MOST_OPSET}")
    if "hw" in dynamic and kind == "torchscript":
        raise ValueError("--dynamic hw: a TorchScript trace holds for one size; use --format pt2, onnx or openvino")
    if "hw" in dynamic and (min(size) < 2 * STRIDE or any(side % STRIDE for side in size)):
        raise ValueError(f"--img-size {size[0]}x{size[1]}: with --dynamic hw use multiples of {STRIDE}, from 64 on")
    for package in RUNTIMES.get(kind, ()):
        _refuse_missing(package, kind)


def _refuse_missing(package: str, kind: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:  # also where it is there, and broken
        told = f"--format {kind} needs the package {package}: pip install {package} ({one_line(error)})"
        raise ValueError(told) from error


def _refuse_existing(out: str, kind: str) -> None:
    for path in (Path(out), Path(out).with_suffix(".bin")) if kind == "openvino" else (Path(out),):
        if os.path.lexists(path):
            raise ValueError(f"OUT {str(path)!r} exists; name another, or remove it")


def write(
    model: nn.Module,
    out: str,
    kind: str,
    *,
    size: tuple[int, int],
    dynamic: Sequence[str] = (),
    opset: int | None = None,
    half: bool = False,
) -> float:
    """Write a network, and compare the file in its own runtime with the network.

    Args:
        model: images (B, C, H, W) to logits.
        out, kind, size, dynamic, opset: as in `refuse`, which checks them.
        half: in float16.

    Returns:
        the largest relative error ||got - want|| / ||want|| over some of the sizes that the file takes.

    Raises:
        ValueError: what `refuse` refuses, or the file is wrong; it is not written then.
    """
    refuse(out, kind, size, dynamic, opset)
    network = reparameterize_model(copy.deepcopy(model).eval(), inplace=True)
    dtype = torch.float16 if half else torch.float32
    channels = getattr(network, "in_chans", 3)
    network = network.to(dtype)
    example = torch.randn(2 if "batch" in dynamic else 1, channels, *size, dtype=dtype)
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export", dir=target.parent) as name, torch.no_grad():
        beside = Path(name) / target.name
        beside.touch()  # a name that the disk refuses fails here as an OSError, and not after the export
        # with open sides torch's cache of fake tensors costs a third of the export, and is hardly ever hit
        with torch._dynamo.config.patch(fake_tensor_cache_enabled="hw" not in dynamic):
            _save(network, example, beside, kind, dynamic, opset)
        run = RUN[kind](beside)
        errors = []
        for batch, height, width in _shapes(size, dynamic):
            x = torch.randn(batch, channels, height, width, dtype=dtype)
            want, got = _logits(network, x), run(x).double()
            errors.append(float((got - want).norm() / want.norm()))
        if wrong := [error for error in errors if not error <= LARGEST_ERROR[dtype]]:  # NaN is wrong too
            raise ValueError(f"{kind}: the file differs from PyTorch by {wrong[0]:.1e}, so it was not written")
        del run
        _refuse_existing(out, kind)  # another export may have been faster
        for file in sorted(Path(name).iterdir()):
            file.replace(target.with_name(file.name))
    return max(errors)


def _logits(network: nn.Module, x: Tensor) -> Tensor:
    """What the network gives, in float64."""
    y = network(x)
    if not isinstance(y, Tensor):
        raise ValueError(f"the network gives a {type(y).__name__}; only networks that give one tensor can be written")
    if not y.isfinite().all():
        cure = "leave out --half" if x.dtype == torch.float16 else "use other weights"
        raise ValueError(f"the network's outputs are not finite in {str(x.dtype).partition('.')[2]}; {cure}")
    return y.double()


def _shapes(size: tuple[int, int], dynamic: Sequence[str]) -> list[tuple[int, int, int]]:
    """Batches and sizes to compare at."""
    batches = (1, 3) if "batch" in dynamic else (1,)
    height, width = size
    sizes = [size, (height + STRIDE, width), (64, 96)] if "hw" in dynamic else [size]
    return [(batch, *pair) for pair in sizes for batch in batches]


def mib(file: Path) -> float:
    """Size of a file, OpenVINO's weights beside it included."""
    parts = [file, file.with_suffix(".bin")] if file.suffix == SUFFIXES["openvino"] else [file]
    return sum(part.stat().st_size for part in parts) / 2**20


def _program_shapes(dynamic: Sequence[str]) -> Any:
    """The sizes that torch.export leaves open."""
    dim = torch.export.Dim
    shapes: dict[int, Any] = {0: dim("batch", min=1)} if "batch" in dynamic else {}
    if "hw" in dynamic:
        shapes |= {i: STRIDE * dim(name, min=1, max=LARGEST // STRIDE) for i, name in ((2, "height"), (3, "width"))}
    return (shapes,) if shapes else None


def _save(model: nn.Module, x: Tensor, path: Path, kind: str, dynamic: Sequence[str], opset: int | None) -> None:
    if kind == "torchscript":
        with _without_deprecations():
            torch.jit.save(torch.jit.trace(model, x), str(path))
    elif kind == "pt2":
        torch.export.save(
            torch.export.export(model, (x,), dynamic_shapes=_program_shapes(dynamic), strict=False), path
        )
    else:
        target = path.with_suffix(".onnx")
        module: Any
        for module in model.modules():
            if getattr(module, "backend", None) == "auto":
                module.backend = "dft"  # most runtimes have no FFT, or a slow one
        torch.onnx.export(
            model,
            (x,),
            target,
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
            opset_version=opset or OPSET,
            dynamic_shapes=_program_shapes(dynamic),
            external_data=False,
        )
        if kind == "openvino":
            openvino = importlib.import_module("openvino")
            openvino.save_model(openvino.convert_model(str(target)), str(path), compress_to_fp16=False)
            target.unlink()


def _pt2(path: Path) -> Run:
    return torch.export.load(path).module()


def _torchscript(path: Path) -> Run:
    with _without_deprecations():
        return torch.jit.load(str(path))


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """torch warns at every step that TorchScript is deprecated; whoever asks for it has read so in docs/export.md."""
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", kind)
        yield


def _onnx(path: Path) -> Run:
    onnxruntime = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _openvino(path: Path) -> Run:
    openvino = importlib.import_module("openvino")
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # else some CPUs compute in bfloat16
    compiled = openvino.compile_model(str(path), "CPU", exact)
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())


RUN: dict[str, Callable[[Path], Run]] = {  # a file as a function, in its runtime
    "onnx": _onnx,
    "pt2": _pt2,
    "torchscript": _torchscript,
    "openvino": _openvino,
}
