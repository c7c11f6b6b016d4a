"""One update, one evaluation: each against the same thing done by hand, and what stops them."""

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import mixers, refused, relative_error
from torch import Tensor, nn
from torch.utils.data import SubsetRandomSampler
from training_helpers import (
    MICRO,
    alone,
    batches_of,
    evaluation_loader,
    micro_config,
    micro_model,
    noise,
    training,
    update,
)

from sgconvnext import console
from sgconvnext.errors import TooManyUnreadableError
from sgconvnext.training import distributed, engine
from sgconvnext.training.config import Config
from sgconvnext.training.images import UNREADABLE

# layer scale 1 instead of 1e-6, or the blocks would hardly take part
LIVE = {"model.kwargs": MICRO | {"ls_init_value": 1.0}}


def config_of(**changes: Any) -> Config:
    return micro_config(**(LIVE | changes))


class Recorder(torch.optim.SGD):
    """Plain gradient descent that keeps the gradients and learning rates it was given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self.gradients: list[Tensor] = []
        self.rates: list[float] = []

    def step(self, closure: Any = None) -> None:
        parameters = self.param_groups[0]["params"]
        self.gradients.append(torch.cat([p.grad.detach().flatten().clone() for p in parameters]))
        self.rates.append(self.param_groups[0]["lr"])
        super().step()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# ---- an update


def test_accumulation_of_four_is_one_batch_four_times_as_large() -> None:
    images, targets = noise(4 * 16)
    start = micro_model(config_of())
    runs = {}
    for per_device in (16, 4):
        t = training(config_of(**{"optim.batch_per_device": per_device}), start)
        assert t.accumulation == 16 // per_device
        batches = batches_of(per_device, images, targets)
        runs[per_device] = [update(t, batches, 1e-3) for _ in range(4)], flat(t.model)
        assert list(batches) == []
    (losses, weights), (losses_, weights_) = runs[16], runs[4]
    assert losses_ == pytest.approx(losses, rel=1e-5)
    assert relative_error(weights_, weights) <= 1e-5
    assert relative_error(flat(start), weights) >= 1e-3  # they have moved


@pytest.mark.parametrize("accumulation", [1, 2])
def test_update_is_a_step_along_the_mean_gradient(accumulation: int) -> None:
    images, targets = noise(16)
    config = config_of(**{"optim.batch_per_device": 16 // accumulation})
    t = training(config)
    t.optimizer = Recorder(t.model)
    before, hand = flat(t.model), deepcopy(t.model)
    loss = F.cross_entropy(hand(images), targets)
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in hand.parameters()])
    got = update(t, batches_of(config.optim.batch_per_device, images, targets), 0.5)
    assert got == pytest.approx(float(loss), rel=1e-6)
    assert relative_error(t.optimizer.gradients[0], gradient) <= 1e-5
    assert relative_error(before - flat(t.model), 0.5 * gradient) <= 1e-4
    assert all(parameter.grad is None for parameter in t.model.parameters())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_clipping_bounds_the_norm_of_the_whole_gradient(precision: str, accumulation: int) -> None:
    images, targets = noise(16)
    start = micro_model(config_of())

    def gradient(clip: float | None) -> Tensor:
        per_device = 16 // accumulation
        knobs = {"run.precision": precision, "optim.clip_grad": clip, "optim.batch_per_device": per_device}
        t = training(config_of(**knobs), start)
        t.optimizer = Recorder(t.model)
        update(t, batches_of(per_device, images, targets), 1e-3)
        [recorded] = t.optimizer.gradients
        return recorded

    free = gradient(None)
    norm = float(free.norm())
    assert float(gradient(norm / 10).norm()) == pytest.approx(norm / 10, rel=1e-3)
    assert relative_error(10 * gradient(norm / 10), free) <= 1e-3  # same direction
    assert relative_error(gradient(10 * norm), free) <= 1e-6  # below the bound, untouched


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precision_is_that_of_the_forward_and_weights_stay_float32(precision: str, dtype: torch.dtype) -> None:
    config = config_of(**{"run.precision": precision})
    t = training(config)
    seen = []
    t.model.head.fc.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    update(t, batches_of(16, *noise(16)), 1e-3)
    engine.evaluate(t.model, evaluation_loader(*noise(4)), config, alone())
    assert set(seen) == {dtype}
    assert {parameter.dtype for parameter in t.model.parameters()} == {torch.float32}
    assert t.scaler.is_enabled() == (precision == "fp16")


def test_step_with_overflowing_gradients_is_left_out_in_fp16() -> None:
    t = training(config_of(**{"run.precision": "fp16"}))
    before, scale = flat(t.model), t.scaler.get_scale()
    images, targets = noise(16)
    update(t, batches_of(16, images * math.inf, targets), 1e-3)
    assert torch.equal(flat(t.model), before)
    assert t.scaler.get_scale() == scale / 2


def test_batch_is_mixed_as_it_comes_from_the_loader_once_per_forward() -> None:
    images, targets = noise(16)
    calls: list[tuple[Tensor, Tensor]] = []
    mixed: list[tuple[Tensor, Tensor]] = []

    def mix(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        calls.append((x, y))
        mixed.append((torch.randn_like(x), torch.softmax(torch.randn(len(y), 10), 1)))
        return mixed[-1]

    config = config_of(**{"optim.batch_per_device": 8, "augment.mixup": 0.8})
    t = training(config, mixup=mix)
    hand, fed = deepcopy(t.model), []
    t.model.register_forward_pre_hook(lambda _, args: fed.append(args[0]))
    loss = update(t, batches_of(8, images, targets), 1e-3)
    assert torch.equal(torch.cat([x for x, _ in calls]), images)  # erased already: see the transforms
    assert torch.equal(torch.cat([y for _, y in calls]), targets)
    assert torch.equal(torch.cat(fed), torch.cat([x for x, _ in mixed]))
    want = torch.stack([-(y * F.log_softmax(hand(x), 1)).sum(1).mean() for x, y in mixed]).mean()
    assert loss == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_takes_the_memory_format_that_was_asked_for(channels_last: bool) -> None:
    config = config_of(**{"model.channels_last": channels_last})
    images, _ = engine.to_device(next(batches_of(4, *noise(4))), config, torch.device("cpu"))
    assert images.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert torch.equal(images, noise(4)[0])


def test_average_follows_the_weights_by_its_decay_after_every_update() -> None:
    t = training(config_of(**{"ema.decay": 0.9, "optim.batch_per_device": 8}))
    assert t.ema is not None
    norms = [mixer.kernel_norm.clone() for mixer in mixers(t.model)]
    batches = batches_of(8, *noise(4 * 16))
    average = flat(t.model).double()
    for _ in range(4):
        update(t, batches, 1e-2)
        average = 0.9 * average + 0.1 * flat(t.model).double()
        assert relative_error(flat(t.ema.module), average) <= 1e-6
        assert relative_error(flat(t.model), average) >= 1e-3
    for mixer, averaged, norm in zip(mixers(t.model), mixers(t.ema.module), norms, strict=True):
        assert torch.equal(mixer.kernel_norm, norm)
        assert torch.equal(averaged.kernel_norm, norm)


def test_unreadable_images_of_an_update_are_told_and_too_many_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    t = training(config_of(**{"data.max_unreadable": 0.1}))
    [batch] = batches_of(16, *noise(16))
    batch.faults[:2], batch.reasons[:2] = UNREADABLE, ["cut short", "no image"]
    with pytest.raises(TooManyUnreadableError, match="2 of 16 training images cannot be read"):
        update(t, iter([batch]), 1e-3)
    assert [line.count("cut short") + line.count("no image") for line in caplog.messages] == [1, 1]


# ---- evaluation


def judged(classes: int, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A model and images whose true class is the model's choice number i % 7, or the best it has of so few classes."""
    model = micro_model(
        config_of(**{"model.num_classes": classes, "model.kwargs": LIVE["model.kwargs"] | {"drop_rate": 0.5}})
    )
    images, _ = noise(count)
    with torch.no_grad():
        model.head.fc.weight.mul_(30)
        order = model.eval()(images).argsort(1, descending=True)
    return model, images, torch.stack([order[i, (i % 7) % classes] for i in range(count)])


@pytest.mark.parametrize("batch", [1, 5, 23])
@pytest.mark.parametrize("classes", [10, 5, 3])
@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_is_exact_and_leaves_the_model_in_its_mode(mode: bool, classes: int, batch: int) -> None:
    model, images, targets = judged(classes, 23)
    logits = model(images).double()
    loader = evaluation_loader(images, targets, batch_size=batch)
    result = engine.evaluate(model.train(mode), loader, config_of(), alone())
    assert model.training == mode
    rank = [(i % 7) % classes for i in range(23)]
    assert result["count"] == 23
    assert result["top1"] == pytest.approx(100 * rank.count(0) / 23, rel=1e-12)
    assert result["top5"] == pytest.approx(100 * sum(r < 5 for r in rank) / 23, rel=1e-12)
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert set(result) == {"top1", "top5", "loss", "count", "unreadable"}
    assert result["unreadable"] == 0


def test_evaluation_without_dropout_and_labels_without_smoothing() -> None:
    model, images, targets = judged(10, 8)
    loader = evaluation_loader(images, targets, batch_size=3)
    smooth = config_of(**{"augment.smoothing": 0.3, "augment.mixup": 0.8})
    want = engine.evaluate(model, loader, config_of(), alone())
    assert engine.evaluate(model.train(), loader, smooth, alone()) == want
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_shares_of_an_evaluation_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, targets = judged(10, 23)
    want = engine.evaluate(model, evaluation_loader(images, targets, batch_size=4), config_of(), alone())
    sums: list[Tensor] = []
    monkeypatch.setattr(distributed.World, "sum", lambda _, values: sums.append(values.clone()) or values)
    for rank in range(3):
        loader = evaluation_loader(images, targets, batch_size=4, sampler=range(rank, 23, 3))
        with pytest.raises(RuntimeError, match="23"):  # a share alone is not the whole set
            engine.evaluate(model, loader, config_of(), alone(rank, 3))
    top1, top5, loss, scored, count, unreadable = torch.stack([s for s in sums if len(s) == 6]).sum(0).tolist()
    assert (scored, count, unreadable) == (23, 23, 0)
    assert [100 * top1 / 23, 100 * top5 / 23, loss / 23] == pytest.approx(
        [want["top1"], want["top5"], want["loss"]], rel=1e-6
    )


def test_evaluation_that_misses_an_image_is_an_error() -> None:
    model, images, targets = judged(10, 8)
    loader = evaluation_loader(images, targets, sampler=SubsetRandomSampler(range(7)))
    with pytest.raises(RuntimeError, match="7 of 8"):
        engine.evaluate(model, loader, config_of(), alone())


# ---- the processes


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_is_refused_where_there_is_none() -> None:
    with refused("run.device=cuda", "run.device=cpu"):
        distributed.start("cuda")


def test_device_is_chosen_by_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.start("cpu").device == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    world = distributed.start("auto")
    assert (world.device, world.rank, world.size, world.is_first) == (torch.device("cpu"), 0, 1, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert distributed.start("auto").device == torch.device("cuda", 0)
    assert distributed.start("cpu").device == torch.device("cpu")


def torchrun(monkeypatch: pytest.MonkeyPatch, rank: str, size: str = "2") -> None:
    """The environment that it gives a process."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    for name, value in (variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("device", "backend"), [("cuda", "cpu:gloo,cuda:nccl"), ("cpu", "gloo")])
def test_backend_follows_the_device(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[str] = []
    torchrun(monkeypatch, rank="0", size="1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name, **_: joined.append(name))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    world = distributed.start(device)
    assert joined == [backend]
    assert (world.rank, world.size, world.device.type, world.is_first) == (3, 4, device, False)


def test_more_processes_than_gpus_are_refused_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever process finds out, the one line must appear: the others only wait for it and are then killed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rank in ("0", "1"):
        torchrun(monkeypatch, rank)
        try:
            distributed.start("cuda")
        except ValueError as error:
            with pytest.raises(SystemExit, match="2"):
                console.fail("train.py", error)
    told = capsys.readouterr().err
    assert "--nproc-per-node" in told
    assert told.count("\n") == 1


# ---- the environment


def in_environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in (*console.NEEDED, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "stray", [{"LOCAL_RANK": "3"}, {"LOCAL_RANK": "3", "WORLD_SIZE": "4"}, {"RANK": "1", "LOCAL_RANK": "1"}], ids=str
)
def test_refusal_is_told_in_an_environment_that_no_launcher_made(
    stray: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_environment(monkeypatch, **stray)
    with pytest.raises(SystemExit, match=r"^2$"):
        console.fail("train.py", ValueError("told"))
    assert capsys.readouterr().err == "train.py: error: told\n"


def test_process_by_itself_tells_whatever_its_local_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torchrun(monkeypatch, rank="0", size="1")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(SystemExit):
        console.fail("train.py", ValueError("told"))
    assert capsys.readouterr().err == "train.py: error: told\n"


def test_stray_local_rank_takes_no_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    in_environment(monkeypatch, LOCAL_RANK="3", LOCAL_WORLD_SIZE="8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert distributed.start("auto").device == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"LOCAL_RANK": None}, ["RANK='1'", "no LOCAL_RANK;", "torchrun"]),
        ({"WORLD_SIZE": None, "MASTER_ADDR": None}, ["no WORLD_SIZE, MASTER_ADDR;"]),
        ({"RANK": ""}, ["RANK=''", "whole number", "unset RANK"]),
        ({"LOCAL_RANK": "-1"}, ["LOCAL_RANK='-1'", "whole number"]),
        ({"LOCAL_WORLD_SIZE": "two"}, ["LOCAL_WORLD_SIZE='two'", "whole number"]),
        ({"RANK": "2"}, ["RANK=2, WORLD_SIZE=2", "count from 0"]),
    ],
    ids=str,
)
def test_half_an_environment_is_refused_by_name(
    change: dict[str, str | None], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torchrun(monkeypatch, rank="1")
    for name, value in change.items():
        monkeypatch.delenv(name)
        if value is not None:
            monkeypatch.setenv(name, value)
    with refused(*words):
        distributed.start("cpu")


def test_local_rank_beyond_the_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun(monkeypatch, rank="1")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with refused("2 processes on a machine with 1 GPUs", "--nproc-per-node"):
        distributed.start("cuda")


def test_sum_of_one_process_is_its_own_value() -> None:
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(alone().sum(values), torch.tensor([1.0, 2.0]))
