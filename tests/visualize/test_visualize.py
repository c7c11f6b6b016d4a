"""The numbers behind the pictures, by hand; the pictures themselves, and what is refused."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import refused, relative_error
from PIL import Image
from torch import nn
from training_helpers import trained, write_images

from sgconvnext import SGConv2d, figure
from sgconvnext.longconv import long_conv
from sgconvnext.models.convnext import energy_outside, mixer_state
from sgconvnext.models.kernel import lag_taps
from sgconvnext.visualize import __main__ as main
from sgconvnext.visualize import features, kernels, pruning
from sgconvnext.visualize.subject import Subject, load, untrained_convnext

SMALL = "sgconvnext_atto,depths=[1,1,1,1],dims=[8,16,24,32],img_size=64"
COMMANDS = ("kernels", "footprint", "energy", "features", "erf")
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command in this process; its standard output."""

    def told(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["visualize", *map(str, arguments)])
        main.main()
        return capsys.readouterr().out

    return told


@pytest.fixture
def refusal(run: Run, capsys: pytest.CaptureFixture[str]) -> Run:
    """The one line that a command ends with."""

    def told(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return told


@pytest.mark.parametrize("bidirectional", [True, False])
def test_taps_are_what_the_layer_convolves_with_but_for_the_skip(bidirectional: bool) -> None:
    layer, x = SGConv2d(3, (4, 6), bidirectional=bidirectional), torch.randn(2, 3, 4, 6)
    nn.init.zeros_(layer.skip)
    before = kernels.taps(layer)
    want = long_conv(x.flatten(2), kernels.taps(layer), "reference").unflatten(2, (4, 6))
    assert relative_error(layer(x), want) <= 1e-6
    nn.init.ones_(layer.skip)
    assert torch.equal(kernels.taps(layer), before)
    assert relative_error(layer(x) - x, want) <= 1e-6


def test_scales_start_where_the_lengths_double() -> None:
    assert kernels.scale_starts(SGConv2d(1, (8, 8), num_scales=4)) == [0, 8, 16, 32]
    assert kernels.scale_starts(SGConv2d(1, (7, 7), num_scales=5)) == [0, 4, 8, 16, 32]
    assert kernels.scale_starts(SGConv2d(1, (1, 2), num_scales=5)) == [0, 1]


def test_footprint_has_the_tap_of_every_offset_between_pixels() -> None:
    height, width = 3, 4
    taps = torch.arange(1.0, 24.0)  # lag -11 .. 11
    folded = kernels.footprint(taps, (height, width))
    assert folded.shape == (5, 7)
    for t in range(12):
        for s in range(12):
            dy, dx = t // width - s // width, t % width - s % width
            assert folded[dy + 2, dx + 3] == taps[t - s + 11]
    assert folded[3, 0] == folded[2, 4 - 1 + 1]  # (1, -3) is lag 1, as (0, 1): where rows wrap


def test_footprint_with_a_gap_has_the_tap_of_every_offset_between_pixels() -> None:
    height, width, row = 3, 4, 4 + 2
    taps = torch.arange(1.0, 36.0)  # lag -17 .. 17
    folded = kernels.footprint(taps, (height, width), row_gap=2)
    assert folded.shape == (5, 7)
    for y, x, v, u in itertools.product(range(3), range(4), range(3), range(4)):
        lag = (y * row + x) - (v * row + u)
        assert folded[y - v + 2, x - u + 3] == taps[lag + 17]
    assert folded[2, 0] == folded[1, 3 + 3]  # (0, -3) is lag -3, as (-1, 3): more than half a row and its gap
    assert len(set(folded[:, 1:6].flatten().tolist())) == 25  # the others have a tap of their own


def converted(size: tuple[int, int]) -> tuple[SGConv2d, torch.Tensor]:
    """A layer that convolves as a 7x7 depthwise convolution does, and its weight (3, 7, 7)."""
    layer, weight = SGConv2d(3, size, row_gap=3, bias=True), torch.randn(3, 1, 7, 7)
    layer.load_state_dict({**mixer_state(weight, layer), "bias": torch.zeros(3)})
    return layer, weight[:, 0]


@pytest.mark.parametrize("size", [(14, 9), (7, 7), (8, 4), (2, 3), (1, 1)], ids=str)
def test_footprint_of_a_converted_convnext_is_its_7x7_weight_and_zero_elsewhere(size: tuple[int, int]) -> None:
    layer, weight = converted(size)
    rows, columns = (min(3, side - 1) for side in size)  # that two pixels of the map can be apart
    for channel in range(3):
        # turned around, as it is drawn: where the input lies around the output, as in the weight of a convolution
        drawn = kernels.footprint(kernels.taps(layer)[channel], size, 3).flip(0, 1)
        want = torch.zeros(2 * size[0] - 1, 2 * size[1] - 1)
        square = weight[channel, 3 - rows : 4 + rows, 3 - columns : 4 + columns]
        want[size[0] - 1 - rows : size[0] + rows, size[1] - 1 - columns : size[1] + columns] = square
        assert torch.equal(drawn, want)
    assert not energy_outside(kernels.taps(layer), size, 3, 3).any()


def test_what_grew_around_the_7x7_is_in_the_footprint_and_is_told() -> None:
    layer, weight = converted((14, 14))
    before = kernels.taps(layer)[1]
    grown = before.clone()
    grown[len(grown) // 2 - (5 * 17 - 6)] = 2.0  # the input five rows below and six columns to the left
    changed = (kernels.footprint(grown, (14, 14), 3) - kernels.footprint(before, (14, 14), 3)).flip(0, 1)
    assert changed.nonzero().tolist() == [[13 + 4, 13 + 11], [13 + 5, 13 - 6]]  # its other side, a row up, too
    assert float(energy_outside(grown[None], (14, 14), 3, 3)) == pytest.approx(
        4 / (4 + float(weight[1].square().sum()))
    )


def test_footprint_of_a_causal_kernel_has_no_offset_ahead() -> None:
    folded = kernels.footprint(torch.ones(12), (3, 4))
    assert folded[:2, :3].isnan().all()  # rows above and columns to the left: negative lags
    assert folded[2, 2].isnan()
    assert (folded[2:, 3:] == 1).all()


def test_energy_is_kept_by_distance_on_both_sides() -> None:
    taps = torch.tensor([[1.0, 2.0, 3.0, 0.0, 2.0]])  # lags -2 .. 2
    assert kernels.energy_kept(taps, 3).tolist() == pytest.approx([9 / 18, 13 / 18, 1.0])
    assert kernels.energy_kept(taps[:, 2:], 3).tolist() == pytest.approx([9 / 13, 9 / 13, 1.0])


def test_kernel_of_zeros_has_no_energy_to_lose() -> None:
    taps = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0, 0.0]])
    assert kernels.energy_kept(taps, 3).tolist() == pytest.approx([0.75, 0.75, 1.0])
    for order in pruning.ORDERS:
        assert not pruning.prune(torch.zeros(2, 3, 8), 0.5, order).any()


def test_pruning_takes_the_smallest_taps_of_every_channel() -> None:
    kernel = torch.tensor([[[1.0, -4.0, 2.0, 3.0], [0.5, 0.1, -0.2, 9.0]]])
    assert pruning.prune(kernel, 0.5, "smallest").tolist() == [[[0, -4, 0, 3], [0.5, 0, 0, 9]]]
    assert torch.equal(pruning.prune(kernel, 0.2, "smallest"), kernel)
    assert not pruning.prune(kernel, 1.0, "smallest").any()
    assert (pruning.prune(kernel, 0.75, "random") != 0).sum(-1).tolist() == [[1, 1]]


class OneConvolution(nn.Module):
    """The last stage is one 3x3 convolution with stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)

    def forward_intermediates(self, x: torch.Tensor, intermediates_only: bool) -> list[torch.Tensor]:
        return [self.conv(x)]


def test_receptive_field_of_a_convolution_is_its_weights() -> None:
    model = OneConvolution()
    field = features.receptive_field(Subject("conv", model, None), torch.randn(2, 3, 8, 8))
    want = torch.zeros(8, 8)
    want[3:6, 3:6] = model.conv.weight.detach().sum(0).abs().sum(0)  # around token (2, 2), pixel (4, 4)
    assert relative_error(field, want) <= 1e-6


def test_area_holds_the_share_of_the_strongest_pixels() -> None:
    field = torch.tensor([[4.0, 1.0], [3.0, 2.0]])
    assert [features.area_holding(field, share) for share in (0.3, 0.5, 0.71, 1.0)] == [0.25, 0.5, 0.75, 1.0]


def test_untrained_opponent_has_the_same_depths_and_widths() -> None:
    other = untrained_convnext(load(SMALL)).model
    assert [len(stage.blocks) for stage in other.stages] == [1, 1, 1, 1]
    assert [info["num_chs"] for info in other.feature_info] == [8, 16, 24, 32]


@pytest.mark.parametrize("command", COMMANDS)
def test_untrained_network_is_drawn_small(run: Run, tmp_path: Path, command: str) -> None:
    out = tmp_path / f"{command}.png"
    assert run(command, SMALL, "--out", out) == f"{out}: {command} of sgconvnext_atto, untrained\n"
    with Image.open(out) as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 20
    assert out.stat().st_size < 200_000


@pytest.fixture
def convnext(tmp_path: Path) -> str:
    """Arguments of a gap model that takes the weights of a ConvNeXt, which are large enough to be seen."""
    theirs = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    torch.save(theirs.state_dict(), tmp_path / "convnext.pth")
    overlay = f"pretrained=True,pretrained_cfg_overlay={{'file':'{tmp_path / 'convnext.pth'}'}}"
    return f"convnext_atto,depths=[1,1,1,1],dims=[8,16,24,32],{overlay}"


@pytest.mark.end_to_end
@pytest.mark.parametrize("command", COMMANDS)
def test_converted_convnext_is_drawn(run: Run, tmp_path: Path, convnext: str, command: str) -> None:
    spec, out = convnext.replace("convnext_atto", "sgconvnext_atto_gap3,img_size=64", 1), tmp_path / f"{command}.png"
    assert run(command, spec, "--out", out) == f"{out}: {command} of sgconvnext_atto_gap3, pretrained\n"
    with Image.open(out) as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 20


def test_converted_convnext_has_its_receptive_field(convnext: str) -> None:
    ours = load(convnext.replace("convnext_atto", "sgconvnext_atto_gap3,img_size=64", 1))
    theirs, images = load(convnext), torch.randn(2, 3, 96, 64)
    assert (ours.title, theirs.title) == ("sgconvnext_atto_gap3, pretrained", "convnext_atto, pretrained")
    field = features.receptive_field(ours, images)
    assert relative_error(field, features.receptive_field(theirs, images)) <= 1e-5


@pytest.mark.end_to_end
@pytest.mark.parametrize("command", COMMANDS)
def test_network_of_zeros_is_drawn(tmp_path: Path, command: str) -> None:
    subject = load(SMALL + ",row_gap=3,bias=True")
    for parameter in subject.model.parameters():
        nn.init.zeros_(parameter)
    draw: dict[str, Callable[[], Any]] = {
        "kernels": lambda: kernels.draw_kernels(subject, 0),
        "footprint": lambda: kernels.draw_footprint(subject, 0),
        "energy": lambda: kernels.draw_energy(subject),
        "features": lambda: features.draw_features(subject, subject.images(1)),
        "erf": lambda: features.draw_receptive_fields([subject], subject.images(1)),
    }
    figure.save(draw[command](), tmp_path / "a.png")


def test_footprint_is_drawn_as_far_as_one_likes() -> None:
    subject = load(SMALL + ",row_gap=3,bias=True")
    for reach, want in ((None, [15.5, 7.5, 3.5, 1.5]), (4, [4.5, 4.5, 3.5, 1.5])):
        cells = kernels.draw_footprint(subject, 0, reach).axes[: 4 * kernels.COLUMNS : kernels.COLUMNS]
        assert [cell.get_xlim() for cell in cells] == [(-half, half) for half in want]
        assert [cell.get_ylim() for cell in cells] == [(half, -half) for half in want]  # downwards, as in an image


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """Of a network with large weights, trained on folders of 3 classes with 4 validation images."""
    root = write_images(tmp_path / "data", {"train": {"a": 1, "b": 1, "c": 1}, "val": {"a": 2, "b": 1, "c": 1}})
    data = {"data.dataset": "", "data.root": str(root), "data.img_size": 32, "data.crop_pct": 1.0}
    return trained(tmp_path, **data)[0]


@pytest.mark.end_to_end
@pytest.mark.parametrize("command", COMMANDS)
def test_trained_network_is_drawn_from_its_checkpoint(run: Run, tmp_path: Path, checkpoint: str, command: str) -> None:
    out = tmp_path / "a.png"
    assert run(command, checkpoint, "--out", out) == f"{out}: {command} of sgconvnext_atto, trained\n"
    average = tmp_path / "b.png"
    run(command, checkpoint, "--use-ema", "--out", average)
    assert average.read_bytes() != out.read_bytes()


def test_pruning_tells_and_draws_every_share(run: Run, tmp_path: Path, checkpoint: str) -> None:
    lines = run("pruning", checkpoint, "--images", 4, "--out", tmp_path / "a.png").splitlines()
    assert len(lines) == 2 * len(pruning.SHARES) + 1
    assert lines[0].startswith("smallest: 0 % of the taps pruned, top-1 ")
    assert lines[-1].startswith(str(tmp_path))
    assert lines[0].split()[-2] == lines[len(pruning.SHARES)].split()[-2]  # nothing pruned, in either order
    assert (tmp_path / "a.png").exists()


def test_pruned_network_is_evaluated_with_its_kernels_pruned(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, seen, evaluated = load(checkpoint), [], []
    layers = [module for module in subject.model.modules() if isinstance(module, SGConv2d)]
    before = [layer.kernel() for layer in layers]
    prune = pruning.prune

    def watched(kernel: torch.Tensor, share: float, order: str) -> torch.Tensor:
        seen.append((share, prune(kernel, share, order)))
        return seen[-1][1]

    def evaluate(model: Any, images: torch.Tensor, targets: torch.Tensor) -> float:
        assert images.shape == (2, 3, 32, 32)
        evaluated.extend(module.taps for module in model.modules() if isinstance(module, SGConv2d))
        return 50.0

    monkeypatch.setattr(pruning, "prune", watched)
    monkeypatch.setattr(pruning, "top1", evaluate)
    found = pruning.measure(subject, count=2)
    assert [point.share for point in found] == 2 * list(pruning.SHARES)
    assert {point.images for point in found} == {2}
    assert len(seen) == len(evaluated) == len(layers) * len(found)
    for layer, taps, (share, kernel) in zip(layers * len(found), evaluated, seen, strict=True):
        assert float((kernel != 0).double().mean()) == 1 - int(share * layer.length) / layer.length
        assert torch.equal(taps, lag_taps(kernel, layer.skip))
    assert all(torch.equal(layer.kernel(), kernel) for layer, kernel in zip(layers, before, strict=True))


def test_accuracy_counts_the_right_ones() -> None:
    model, images = nn.Flatten(), torch.eye(3).repeat(50, 1)  # the class is where the one is
    targets = torch.tensor([0, 1, 0]).repeat(50)
    assert pruning.top1(model, images, targets) == pytest.approx(200 / 3)


def test_images_of_a_run_are_spread_over_its_validation_set(checkpoint: str) -> None:
    subject = load(checkpoint)
    everything, classes = subject.samples(9)
    assert len(set(everything.mean((1, 2, 3)).tolist())) == 4
    assert classes.tolist() == [0, 0, 1, 2]
    assert torch.equal(subject.images(2), everything[[0, 2]])
    assert torch.equal(subject.images(3), everything[[0, 1, 2]])


def test_image_file_is_seen_as_in_validation(checkpoint: str, tmp_path: Path) -> None:
    file = tmp_path / "data" / "val" / "a" / "0.png"
    assert torch.equal(load(checkpoint).image(file), load(checkpoint).images(4)[:1])
    assert load("sgconvnext_atto").image(file).shape == (1, 3, 224, 224)
    assert load(SMALL).image(file).shape == load(SMALL).images(1).shape == (1, 3, 64, 64)


def test_unreadable_validation_image_is_told(checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "data" / "val" / "b" / "0.png").write_bytes(b"")
    with refused("1 of 4 validation images"):
        load(checkpoint).images(4)


def test_network_without_stage_outputs_is_refused() -> None:
    with refused("linear", "forward_intermediates"):
        features.receptive_field(Subject("linear", nn.Linear(1, 1), None), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "words"),
    {
        "no network": (["kernels", "sgconvnext_tinny"], ["'sgconvnext_tinny'", "did you mean"]),
        "no checkpoint": (["kernels", "runs/x/best.pth"], ["'runs/x/best.pth'", "does not exist"]),
        "a folder": (["kernels", "/"], ["'/'", "it is a folder; name a file in it, such as best.pth"]),
        "argument": (["kernels", "sgconvnext_tinny,alpha=0.5"], ["did you mean 'sgconvnext_tiny'"]),
        "no opponent": (["erf", "resnet18"], ["resnet18", "no SGConv layer"]),
        "no kernels": (["kernels", "convnext_atto"], ["convnext_atto", "no SGConv layer"]),
        "block": (["kernels", SMALL, "--block", "2"], ["--block 2", "1 block"]),
        "block 0": (["footprint", SMALL, "--block", "0"], ["--block", "0"]),
        "untrained": (["pruning", SMALL], ["sgconvnext_atto, untrained: no run trained it", "name a checkpoint"]),
        "reach": (["footprint", SMALL, "--reach", "0"], ["--reach", "at least 1"]),
        "average": (["kernels", SMALL, "--use-ema"], ["--use-ema", "no checkpoint"]),
        "knobs": (["erf", SMALL, "--set", "data.root=x"], ["--set", "no checkpoint"]),
        "image": (["features", SMALL, "no.jpg"], ["no.jpg"]),
        "images": (["erf", SMALL, "--images", "0"], ["--images", "at least 1"]),
        "folder": (["kernels", SMALL, "--out", "no/a.png"], ["no/a.png"]),
    }.values(),
    ids=str,
)
def test_what_cannot_be_drawn_is_refused_in_one_line(refusal: Run, arguments: list[str], words: list[str]) -> None:
    line = refusal(*arguments)
    for word in words:
        assert word in line
    assert line.startswith(("sgconvnext.visualize: error: ", "python -m sgconvnext.visualize"))


def test_checkpoint_without_its_data_says_which_are_missing(tmp_path: Path, checkpoint: str) -> None:
    with refused("data.root", "elsewhere"):
        load(checkpoint, overrides=["data.root=elsewhere"]).images(1)
    assert load(checkpoint, overrides=[f"data.root={tmp_path / 'data'}"]).images(1).shape == (1, 3, 32, 32)


def test_missing_matplotlib_is_named(refusal: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'sgconvnext[viz]'" in refusal("kernels", SMALL)


def test_picture_replaces_a_file_and_no_device(tmp_path: Path) -> None:
    with refused("/dev/null", "cannot be a picture"):
        figure.check(Path("/dev/null"))
    target, link = tmp_path / "target.png", tmp_path / "link.png"
    target.write_text("")
    link.symlink_to(target)
    figure.check(link)
    figure.save(figure.new(1, 1), link)
    assert link.is_symlink()
    assert Image.open(target).size == (100, 100)
