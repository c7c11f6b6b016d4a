"""What pictures are made of: a network out of a checkpoint or untrained, and the images it is shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from ..errors import one_line
from ..models.input_size import STEM_STRIDE
from ..models.layer import SGConv2d
from ..training import build, checkpoint, data
from ..training.config import Config
from ..training.images import Images, decode

UNTRAINED_CONVNEXT = "convnext_tiny"


@dataclass(frozen=True)
class Subject:
    """A network in evaluation mode.

    ``config`` is of the run that trained it; None for timm's name of a model, which may have ``pretrained`` weights.
    """

    name: str
    model: Any
    config: Config | None
    pretrained: bool = False

    @property
    def title(self) -> str:
        """Name and state, for the head of a picture."""
        state = "trained" if self.config else "pretrained" if self.pretrained else "untrained"
        return f"{self.name}, {state}"

    def mixers(self) -> list[list[SGConv2d]]:
        """The SGConv2d layers of every stage.

        Raises:
            ValueError: the network has none.
        """
        if not any(isinstance(module, SGConv2d) for module in self.model.modules()):
            raise ValueError(f"{self.name} has no SGConv layer; name an sgconvnext model, or a checkpoint of one")
        return [[block.sgconv for block in stage.blocks] for stage in self.model.stages]

    def image(self, path: Path) -> Tensor:
        """An image file as the network sees it in validation (1, C, H, W).

        Raises:
            ValueError: no such file, or no image.
        """
        transform: Any
        if self.config is not None:
            upright, transform = self.config.data.upright, data.eval_transform(self.config.data)
        else:
            expected = resolve_data_config({}, model=self.model) | {"input_size": self._input_size()}
            upright, transform = False, create_transform(**expected)
        try:
            with Image.open(path) as file:
                image, _ = decode(file, upright)
        except Exception as error:  # Pillow raises a dozen types for damaged files
            raise ValueError(f"image {str(path)!r} cannot be read: {one_line(error)}") from error
        seen: Tensor = transform(image)
        return seen[None]

    def images(self, count: int) -> Tensor:
        """Validation images of the run (B, C, H, W), evenly out of all; noise for a network of no run.

        Raises:
            ValueError: the run's data are not there.
        """
        if self.config is None:
            return torch.randn(count, *self._input_size(), generator=torch.Generator().manual_seed(0))
        return self.samples(count)[0]

    def samples(self, count: int) -> tuple[Tensor, Tensor]:
        """Validation images of the run (B, C, H, W), evenly out of all, and their classes (B).

        Raises:
            ValueError: the network is of no run, or the run's data are not there.
        """
        if self.config is None:
            raise ValueError(f"{self.title}: no run trained it, so there are no validation images; name a checkpoint")
        split = data.create_split(self.config, train=False)
        if not isinstance(split.dataset, Images):
            raise ValueError(
                f"data.dataset={self.config.data.dataset!r} is read in order; name a folder of images with --set "
                "data.dataset= data.root=PATH"
            )
        chosen = min(count, len(split))
        samples = [split.dataset[i * len(split) // chosen] for i in range(chosen)]
        readable = [sample for sample in samples if sample.image is not None]
        if len(readable) < chosen:
            raise ValueError(f"{chosen - len(readable)} of {chosen} validation images cannot be read; repair them")
        images = torch.stack([sample.image for sample in readable if sample.image is not None])
        return images, torch.tensor([sample.target for sample in readable])

    def _input_size(self) -> tuple[int, int, int]:
        """What a network of no run was built for."""
        channels, height, width = resolve_data_config({}, model=self.model)["input_size"]
        mixer = next((module for module in self.model.modules() if isinstance(module, SGConv2d)), None)
        if mixer is not None:
            height, width = (STEM_STRIDE * side for side in mixer.input_size)
        return channels, height, width


def load(spec: str, ema: bool = False, overrides: Sequence[str] = ()) -> Subject:
    """The network of a checkpoint of train.py, or one by timm's name for it.

    Args:
        spec: path of a checkpoint, or name with arguments after commas as in `sgconvnext.profile`. The network is
            untrained, unless ``pretrained=True`` is one of them.
        ema: the checkpoint's average of the weights.
        overrides: knobs of the checkpoint's run, such as data.root.

    Raises:
        ValueError: neither a checkpoint nor a model, or knobs where there is no run.
    """
    if Path(spec).is_file():
        state = checkpoint.load(spec)
        model, config = build.trained_model(state, ema, spec, overrides)
        return Subject(config.model.name, model.eval(), config)
    name = spec.partition(",")[0]
    if ("/" in name and ":" not in name) or name.endswith((".pth", ".pt", ".safetensors")):
        checkpoint.load(spec)  # says why it cannot: there is no such file, or it is a folder
    if ema or overrides:
        raise ValueError(f"{spec} is no checkpoint: --use-ema and --set are about the run of one")
    torch.manual_seed(0)
    _, arguments = build.parse_spec(spec)
    return Subject(name, build.from_spec(spec).eval(), None, bool(arguments.get("pretrained")))


def untrained_convnext(subject: Subject) -> Subject:
    """timm's ConvNeXt with the depths and widths of a network.

    Raises:
        ValueError: the network has no stages of blocks.
    """
    subject.mixers()
    torch.manual_seed(0)
    depths = tuple(len(stage.blocks) for stage in subject.model.stages)
    dims = tuple(info["num_chs"] for info in subject.model.feature_info)
    model = timm.create_model(UNTRAINED_CONVNEXT, depths=depths, dims=dims).eval()
    return Subject("convnext", model, None)
