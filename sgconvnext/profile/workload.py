"""What is measured of a model: a forward pass, or a whole training step, and the memory it takes."""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from ..training import build
from . import memory
from .timing import Step

EAGER = "eager"  # none of WAYS
WAYS = {"compiled": "compile", "reparameterized": "reparameterize", "channels-last": "channels_last"}  # to run a model
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Workload:
    """How a model is run.

    Args:
        mode: "inference" (forward) or "training" (forward, cross-entropy, backward, AdamW step).
        batch: images at a time.
        img_size: height and width in pixels, for which the model is built if it takes a size.
        dtype: of DTYPES; half precision by autocast, without a loss scale.
        channels_last: memory format of model and images.
        compile: run torch.compile's version for these very shapes.
        reparameterize: run timm's reparameterize_model's version, whose taps are fixed; for inference only.
        device: "cpu" or "cuda".
    """

    mode: Literal["inference", "training"] = "inference"
    batch: int = 1
    img_size: tuple[int, int] = (224, 224)
    dtype: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    reparameterize: bool = False
    device: str = "cpu"

    def __str__(self) -> str:
        what = f"{self.mode}, {spoken_size(self.img_size)} px, batch {self.batch}"
        return what if self.run == EAGER else f"{what}, {self.run}"

    @property
    def run(self) -> str:
        """The way that the model is run: "eager", or names of WAYS joined by "+"."""
        return "+".join(name for name, field in WAYS.items() if getattr(self, field)) or EAGER


def spoken_size(img_size: tuple[int, int]) -> str:
    """``224`` or ``256x192``."""
    height, width = img_size
    return str(height) if height == width else f"{height}x{width}"


def random_images(model: nn.Module, batch: int, img_size: tuple[int, int]) -> Tensor:
    """Normal noise (B, C, H, W) with the channels that the model's first convolution takes, or else three."""
    convolution = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return torch.randn(batch, convolution.in_channels if convolution else 3, *img_size)


def settle_backends() -> None:
    """Let cuDNN look for its fastest convolutions, and let fp32 be fp32: by default its convolutions are TF32."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def network(spec: str, work: Workload) -> tuple[Any, Tensor, torch.autocast]:
    """A model in the mode of the work, images for it, and the autocast to run it under."""
    settle_backends()
    torch.manual_seed(0)
    device = torch.device(work.device)
    layout = torch.channels_last if work.channels_last else torch.contiguous_format
    model: Any = build.from_spec(spec, work.img_size).to(device).to(memory_format=layout)
    images = random_images(model, work.batch, work.img_size).to(device, memory_format=layout)
    if work.reparameterize:
        reparameterize_model(model, inplace=True)
    autocast = torch.autocast(device.type, DTYPES[work.dtype], enabled=work.dtype != "fp32")
    return model.train(work.mode == "training"), images, autocast


def prepare(spec: str, work: Workload) -> Step:
    """Build a model and its images, and return one step of the work."""
    model, images, autocast = network(spec, work)
    run = torch.compile(model, dynamic=False) if work.compile else model

    def infer() -> None:
        with torch.inference_mode(), autocast:
            run(images)

    if work.mode == "inference":
        return infer
    # so small that hundreds of steps on the same images leave the weights, and so the work, as they were
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-7, weight_decay=0.05)
    targets = torch.arange(work.batch, device=images.device) % model.num_classes

    def train() -> None:
        with autocast:
            loss = F.cross_entropy(run(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def peak_memory(spec: str, work: Workload) -> int:
    """Bytes that a model and two steps of its work take at their peak, see `memory.peak`."""
    return memory.peak(f"{spec}, {work}", work.device, functools.partial(prepare, spec, work))
