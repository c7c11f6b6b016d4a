"""A loss or gradient that is not finite: who is blamed, and that nothing has changed when training ends on it."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from training_helpers import MICRO, alone, batches_of, micro_config, micro_model, noise, training, update

from sgconvnext.errors import NonFiniteError
from sgconvnext.training import engine
from sgconvnext.training.config import Config
from sgconvnext.training.nonfinite import first_gradient, first_module

CULPRIT = "stages.2.blocks.0.mlp.fc1"  # in the middle; everything after it is not finite either


def config_of(**changes: Any) -> Config:
    return micro_config(**({"model.kwargs": MICRO | {"ls_init_value": 1.0}, "ema.decay": 0.9} | changes))


def loss_of(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    return lambda: model(images).square().mean()


def spoil(model: nn.Module, name: str = CULPRIT, chance: float = 1.0) -> None:
    """Make a module's output NaN, at random; weights stay as they are."""
    model.get_submodule(name).register_forward_hook(
        lambda _, __, output: output * math.nan if torch.rand(()) < chance else None
    )


# ---- the culprit


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["stem.0", CULPRIT, "head.fc"])
def test_earliest_module_is_named(name: str, value: float) -> None:
    model = micro_model(config_of())
    with torch.no_grad():
        model.get_submodule(name).bias[0] = value
    assert first_module(model, loss_of(model, noise(2)[0])) == name


def test_operation_that_is_no_module_is_named_by_the_module_after_it() -> None:
    model = micro_model(config_of())
    with torch.no_grad():
        model.stages[2].blocks[0].gamma[3] = math.nan
    assert first_module(model, loss_of(model, noise(2)[0])) == "the input of stages.2.blocks.0.drop_path"


def test_images_and_loss_are_told_from_the_network() -> None:
    model = micro_model(config_of())
    images, _ = noise(2)
    assert first_module(model, loss_of(model, images)) is None
    assert first_module(model, lambda: model(images).mean() * math.inf) == "the loss"
    images[1, 2, 3, 4] = math.nan
    assert first_module(model, loss_of(model, images)) == "the images"


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_looking_leaves_no_hooks_and_no_gradients_behind() -> None:
    model = micro_model(config_of())

    def fails() -> Tensor:
        assert hooks(model) > 10
        assert not torch.is_grad_enabled()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        first_module(model, fails)
    assert hooks(model) == 0
    first_module(model, loss_of(model, noise(2)[0]))
    assert hooks(model) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradient_nearest_the_output_is_named() -> None:
    model = micro_model(config_of())
    assert first_gradient(model) is None
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert first_gradient(model) is None
    for name in ("stem.0.weight", f"{CULPRIT}.weight", "head.fc.weight"):  # backward comes to them the other way round
        model.get_parameter(name).grad[0] = math.inf
        assert first_gradient(model) == f"the gradient of {name}"


# ---- an update


def contents(t: engine.Training) -> list[Any]:
    """Everything that an update changes."""
    assert t.ema is not None
    return deepcopy([t.model.state_dict(), t.ema.module.state_dict(), t.optimizer.state_dict()["state"]])


def same(got: Any, want: Any) -> bool:
    if isinstance(want, Tensor):
        return torch.equal(got, want)
    if isinstance(want, dict):
        return got.keys() == want.keys() and all(same(got[key], want[key]) for key in want)
    return all(same(*pair) for pair in zip(got, want, strict=True)) if isinstance(want, list) else got == want


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_that_is_not_finite_ends_training_before_anything_changes(precision: str) -> None:
    t = training(config_of(**{"run.precision": precision}))
    t.world = alone(rank=3)
    batches, progress = batches_of(16, *noise(48)), engine.Progress(epoch=7)
    start = contents(t)
    engine.train_update(t, batches, progress, 1e-3)
    before = contents(t)
    assert not same(start[0], before[0])
    spoil(t.model)
    with pytest.raises(NonFiniteError) as caught:
        engine.train_update(t, batches, progress, 2e-3)
    assert same(contents(t), before)
    message = str(caught.value)
    for words in ("epoch 7, update 2, rank 3:", "loss nan", f"first not finite: {CULPRIT} (", "optim.lr"):
        assert words in message
    assert "\n" not in message
    [rank] = caught.value.report.pop("ranks")
    assert caught.value.report == {"epoch": 7, "update": 2, "lr": 2e-3}
    assert math.isnan(rank.pop("loss"))
    assert rank == {"rank": 3, "culprit": CULPRIT, "places": list(range(16, 32))}
    assert progress.update == 1


def failure(t: engine.Training, images: Tensor, targets: Tensor) -> NonFiniteError:
    batches = batches_of(t.config.optim.batch_per_device, images, targets)
    with pytest.raises(NonFiniteError) as caught:
        engine.train_update(t, batches, engine.Progress(0), 1e-3)
    return caught.value


def culprit_of(error: NonFiniteError) -> str:
    [rank] = error.report["ranks"]
    assert f"first not finite: {rank['culprit']} " in str(error)
    return str(rank["culprit"])


def test_report_has_the_places_of_all_batches_of_the_update() -> None:
    t = training(config_of(**{"optim.batch_per_device": 4}))
    spoil(t.model)
    [rank] = failure(t, *noise(32)).report["ranks"]
    assert rank["places"] == list(range(16))


def test_image_that_is_not_finite_is_not_blamed_on_the_stem() -> None:
    images, targets = noise(16)
    images[9, 0, 0, 0] = math.nan
    assert culprit_of(failure(training(config_of(**{"optim.batch_per_device": 8})), images, targets)) == "the images"


def test_loss_of_finite_logits_is_blamed_on_the_loss() -> None:
    t = training(config_of(), criterion=lambda logits, _: logits.mean() + math.inf)
    error = failure(t, *noise(16))
    assert culprit_of(error) == "the loss"
    assert "loss inf" in str(error)


def test_culprit_that_fails_by_chance_is_found_by_drawing_the_same_numbers() -> None:
    t = training(config_of(**{"optim.batch_per_device": 8, "model.kwargs": MICRO | {"drop_path_rate": 0.5}}))
    spoil(t.model, chance=0.2)
    batches, progress = batches_of(8, *noise(16 * 40)), engine.Progress(0)

    def train() -> None:
        while True:
            engine.train_update(t, batches, progress, 1e-3)

    with pytest.raises(NonFiniteError) as caught:
        train()
    assert progress.update > 0
    assert culprit_of(caught.value) == CULPRIT


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_that_is_not_finite_names_its_parameter(precision: str) -> None:
    t = training(config_of(**{"run.precision": precision}))
    before = contents(t)
    t.model.get_parameter("stem.0.bias").register_hook(lambda gradient: gradient * math.inf)
    error = failure(t, *noise(16))
    assert culprit_of(error) == "the gradient of stem.0.bias"
    assert same(contents(t), before)


def test_norm_that_overflows_over_finite_gradients_is_reported_too() -> None:
    t = training(config_of())
    inner = t.criterion
    t.criterion = lambda logits, targets: inner(logits, targets) * 1e25  # type: ignore[assignment]
    error = failure(t, *noise(16))
    assert "gradient norm inf" in str(error)
    assert "None" not in str(error)


# ---- fp16, which may leave updates out


def half(max_skips: int) -> engine.Training:
    scaler = GradScaler("cpu", init_scale=2.0**10)  # with which no good update overflows
    return training(config_of(**{"run.precision": "fp16", "run.max_skips": max_skips}), scaler=scaler)


def overflowing(*good: bool) -> tuple[Tensor, Tensor]:
    """Images and targets of one update each, good or not."""
    images, targets = noise(16 * len(good))
    for number, fine in enumerate(good):
        images[16 * number : 16 * (number + 1)] *= 1.0 if fine else math.inf
    return images, targets


@pytest.mark.parametrize("max_skips", [0, 2])
def test_half_precision_may_skip_so_many_updates_in_a_row_and_no_more(max_skips: int) -> None:
    t = half(max_skips)
    batches, progress = batches_of(16, *overflowing(*[False] * (max_skips + 1))), engine.Progress(4)
    before, scale = contents(t), t.scaler.get_scale()
    for skips in range(1, max_skips + 1):
        engine.train_update(t, batches, progress, 1e-3)
        assert (progress.update, progress.skipped, progress.skipped_in_a_row) == (skips, skips, skips)
        assert t.scaler.get_scale() == scale / 2**skips
    with pytest.raises(NonFiniteError, match=f"epoch 4, update {max_skips + 1}, .*after {max_skips + 1} skipped"):
        engine.train_update(t, batches, progress, 1e-3)
    assert same(contents(t)[0], before[0])
    assert same(contents(t)[2], before[2])


def test_good_update_ends_a_row_of_skips_and_sums_leave_skips_out() -> None:
    order = [False, False, True, False, False, True]
    t, progress = half(2), engine.Progress(0)
    batches, losses, norms = batches_of(16, *overflowing(*order)), [], []
    for good in order:
        engine.train_update(t, batches, progress, 1e-3)
        assert math.isfinite(progress.loss) == good
        if good:
            assert progress.skipped_in_a_row == 0
            losses.append(progress.loss)
            norms.append(progress.grad_norm)
    assert (progress.update, progress.skipped) == (6, 4)
    assert progress.loss_sum == pytest.approx(sum(losses))
    assert progress.norm_sum == pytest.approx(sum(norms))
    assert min(losses) > 0.1
    assert min(norms) > 1e-3


def test_finite_updates_never_end_training() -> None:
    t = training(config_of())
    batches = batches_of(16, *noise(64))
    assert all(math.isfinite(update(t, batches, 1e-3)) for _ in range(4))
