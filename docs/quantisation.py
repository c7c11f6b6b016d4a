"""int8 by torchao and by onnxruntime, of a network that train.py trained: the table of docs/quantisation.md.

    python docs/quantisation.py runs/digits/best.pth

Accuracy is that of all validation images of the run. Every time is of one image in one thread, the median of turns in
which all forms run after each other.
"""

import argparse
import copy
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from sgconvnext import formats
from sgconvnext.training import build, checkpoint, data, distributed

Run = Callable[[Tensor], Tensor]
TURNS = 20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="last.pth or best.pth of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="knobs of the run to change")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    model, config = build.trained_model(checkpoint.load(args.checkpoint), False, args.checkpoint, args.overrides)
    split = data.create_split(config, train=False)
    batches = list(data.create_eval_loader(split, config, distributed.start("cpu")))
    images = torch.cat([batch.images for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        rows = compare(forms(reparameterize_model(model.eval()), images, Path(folder)), images, targets)
    print("| form | top-1, % | same class as float32, % | MiB | ms | speed |\n|---|---:|---:|---:|---:|---:|")
    print("\n".join(rows))


def forms(model: nn.Module, images: Tensor, folder: Path) -> dict[str, tuple[Run, float, str]]:
    """By name, each form as a function, its size in MiB, and the form that its speed is compared with."""
    quantised = copy.deepcopy(model)
    quantize_(quantised, Int8DynamicActivationInt8WeightConfig())
    whole, small = folder / "whole.onnx", folder / "small.onnx"
    height, width = images.shape[2:]
    formats.write(model, str(whole), "onnx", size=(height, width), dynamic=["batch"])
    quantize_dynamic(whole, small, weight_type=QuantType.QInt8)
    return {
        "torch, float32": (model, weights(model, folder), "torch, float32"),
        "torchao, int8": (quantised, weights(quantised, folder), "torch, float32"),
        "onnxruntime, float32": (session(whole), mib(whole), "onnxruntime, float32"),
        "onnxruntime, int8": (session(small), mib(small), "onnxruntime, float32"),
    }


def compare(forms: dict[str, tuple[Run, float, str]], images: Tensor, targets: Tensor) -> list[str]:
    found = {name: torch.cat([run(x) for x in images.split(50)]).argmax(1) for name, (run, *_) in forms.items()}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(TURNS):
        for name, (run, *_) in forms.items():
            start = time.perf_counter()
            run(images[:1])
            times[name].append(time.perf_counter() - start)
    rows = []
    for name, (_, size, base) in forms.items():
        ratio = statistics.median(a / b for a, b in zip(times[base], times[name], strict=True))
        right, same = (100 * float((found[name] == of).float().mean()) for of in (targets, found["torch, float32"]))
        rows.append(
            f"| {name} | {right:.2f} | {same:.2f} | {size:.1f} | {1e3 * statistics.median(times[name]):.1f} "
            f"| {ratio:.2f} |"
        )
    return rows


def session(path: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(made.run(None, {made.get_inputs()[0].name: x.numpy()})[0])


def weights(model: nn.Module, folder: Path) -> float:
    torch.save(model.state_dict(), folder / "weights.pt")
    return mib(folder / "weights.pt")


def mib(path: Path) -> float:
    return path.stat().st_size / 2**20


if __name__ == "__main__":
    main()
