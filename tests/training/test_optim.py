"""Learning rates and parameter groups: ConvNeXt's rules written again here, and compared exactly."""

import math
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import refused
from torch import nn
from training_helpers import CONFIGS, batches_of, micro_config, micro_model, noise, training, update

import sgconvnext  # noqa: F401  registers the models with timm
from sgconvnext.training.config import OptimConfig, load_config
from sgconvnext.training.optim import (
    accumulation_steps,
    create_optimizer,
    learning_rates,
    load_state,
    param_groups,
    refuse_other_groups,
    set_learning_rate,
    updates_per_epoch,
)

IMAGENET = load_config(CONFIGS / "imagenet.yaml")
FINETUNE = load_config(CONFIGS / "finetune_384.yaml")


@cache
def build(name: str) -> nn.Module:
    """A model without memory, built once: only names and shapes matter here, and no test changes it."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    return model


# ---- learning rates


def convnext_schedule(lr: float, min_lr: float, epochs: int, updates: int, warmup_epochs: int) -> np.ndarray:
    """facebookresearch/ConvNeXt utils.py:428, cosine_scheduler with start_warmup_value=0."""
    warmup = np.linspace(0, lr, warmup_epochs * updates)
    steps = np.arange(epochs * updates - len(warmup))
    cosine = np.array([min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * i / len(steps))) for i in steps])
    return np.concatenate((warmup, cosine))


def test_learning_rates_of_the_recipe_are_convnexts_to_the_last_bit() -> None:
    table = learning_rates(IMAGENET.optim, IMAGENET.epochs, 1_281_167 // 4096)
    want = convnext_schedule(4e-3, 1e-6, 300, 312, 20)
    assert len(table) == len(want) == 93_600
    assert np.abs(table - want).max() == 0.0


def test_recipe_warms_up_from_0_to_the_peak_which_comes_twice_and_ends_at_the_minimum() -> None:
    table = learning_rates(IMAGENET.optim, IMAGENET.epochs, 312)
    assert table[0] == 0.0
    assert table[1] == pytest.approx(4e-3 / 6239, rel=1e-12)
    assert table[6239] == table[6240] == 4e-3
    assert (np.diff(table[:6240]) > 0).all()
    assert (np.diff(table[6240:]) < 0).all()
    assert table[6240 + 43_680] == pytest.approx((4e-3 + 1e-6) / 2, rel=1e-12)  # half of 87,360
    assert 1e-6 < table[-1] == pytest.approx(1.0000013e-6, rel=1e-7)


def test_learning_rates_of_fine_tuning_start_at_the_peak() -> None:
    table = learning_rates(FINETUNE.optim, FINETUNE.epochs, 1_281_167 // 512)
    assert len(table) == 75_060
    assert np.abs(table - convnext_schedule(5e-5, 1e-6, 30, 2502, 0)).max() == 0.0
    assert table[0] == 5e-5


@pytest.mark.parametrize(("epochs", "updates", "warmup"), [(1, 1, 0), (2, 1, 1), (3, 7, 2), (5, 4, 4)])
def test_table_has_one_learning_rate_for_every_update(epochs: int, updates: int, warmup: int) -> None:
    optim = OptimConfig(lr=0.3, min_lr=0.1, warmup_epochs=warmup)
    table = learning_rates(optim, epochs, updates)
    assert table.tolist() == convnext_schedule(0.3, 0.1, epochs, updates, warmup).tolist()
    assert len(table) == epochs * updates


# ---- weight decay


def decayed_by_convnext(name: str, shape: torch.Size, exempt: frozenset[str] = frozenset()) -> bool:
    """facebookresearch/ConvNeXt optim_factory.py:82."""
    return not (len(shape) == 1 or name.endswith(".bias") or name in exempt)


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
@pytest.mark.parametrize(
    ("name", "decayed", "exempt"),
    [
        ("convnext_tiny", 59, 123),
        ("convnext_small", 113, 231),
        ("convnext_base", 113, 231),
        ("sgconvnext_tiny", 59, 123),
        ("sgconvnext_small", 113, 231),
        ("sgconvnext_base", 113, 231),
        ("sgconvnext_large", 113, 231),
        ("sgconvnext_atto_gated", 53, 99),
        ("convnext_atto_gated", 53, 99),
    ],
)
def test_weight_decay_spares_biases_and_vectors_alone(
    name: str, decayed: int, exempt: int, layer_decay: float
) -> None:
    model = build(name)
    groups = param_groups(model, 0.05, layer_decay)
    given = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    want = {id(p): 0.05 if decayed_by_convnext(n, p.shape) else 0.0 for n, p in model.named_parameters()}
    assert given == want
    assert sum(len(group["params"]) for group in groups) == len(want)  # none twice
    assert Counter(given.values()) == {0.05: decayed, 0.0: exempt}


def test_kernel_is_decayed_and_its_skip_is_not() -> None:
    model = build("sgconvnext_tiny")
    [decayed, exempt] = sorted(param_groups(model, 0.05, 1.0), key=lambda group: -group["weight_decay"])
    block = model.stages[0].blocks[0]
    assert any(p is block.sgconv.weight for p in decayed["params"])
    assert any(p is block.sgconv.skip for p in exempt["params"])


def test_matrix_named_bias_is_not_decayed() -> None:
    model = nn.Module()
    model.bias = nn.Parameter(torch.zeros(2, 2))
    inner = nn.Module()
    inner.bias = nn.Parameter(torch.zeros(2, 2))
    inner.weight = nn.Parameter(torch.zeros(2, 2))
    model.inner = inner
    decayed = [p for group in param_groups(model, 0.05, 1.0) if group["weight_decay"] for p in group["params"]]
    assert {id(p) for p in decayed} == {id(model.bias), id(inner.weight)}  # ConvNeXt's rule asks for '.bias'


def test_model_may_exempt_parameters_by_name_or_pattern() -> None:
    class Exempting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 2))
            self.table = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
            self.head = nn.Linear(2, 2)

        def no_weight_decay(self) -> set[str]:
            return {"token", "table.*"}

    model = Exempting()
    decayed = [p for group in param_groups(model, 0.05, 1.0) if group["weight_decay"] for p in group["params"]]
    assert [id(p) for p in decayed] == [id(model.head.weight)]


def test_frozen_parameter_is_in_no_group() -> None:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    assert [group["params"] for group in param_groups(model, 0.05, 1.0)] == [[model.bias]]


# ---- layer decay


def convnext_layer(name: str, last: int) -> int:
    """optim_factory.py:32 get_num_layer_for_convnext, in ConvNeXt's own names; last is 12, and 6 for T's detector."""
    part = name.split(".")
    if part[0] == "downsample_layers":
        return {"0": 0, "1": 2, "2": 3, "3": last}[part[1]]
    if part[0] == "stages":
        return {"0": 1, "1": 2, "2": 3 + int(part[2]) // 3, "3": last}[part[1]]
    return last + 1


def convnext_name(name: str) -> str:
    """timm's name of a parameter to ConvNeXt's."""
    part = name.split(".")
    if part[0] == "stem":
        return ".".join(["downsample_layers", "0", *part[1:]])
    if part[0] == "stages":
        inside = part[3:]
        return ".".join(["downsample_layers" if part[2] == "downsample" else "stages", part[1], *inside])
    return ".".join(part[1:])  # head.norm and head.fc


LAYERS = {  # last layer below the head, groups
    "convnext_tiny": (6, 16),
    "convnext_small": (12, 28),
    "convnext_base": (12, 28),
    "sgconvnext_tiny": (6, 16),
    "sgconvnext_base": (12, 28),
    "sgconvnext_large": (12, 28),
    "sgconvnext_atto": (5, 14),  # ceil(6 / 3) layers in stage 3
    "sgconvnext_atto_gated": (5, 14),
    "convnext_atto_gated": (5, 14),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_decay_groups_layers_as_convnext_does(name: str) -> None:
    model, (last, count) = build(name), LAYERS[name]
    groups = param_groups(model, 0.05, 0.7)
    assert len(groups) == count == 2 * (last + 2)  # decayed and not, of each layer
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        layer = convnext_layer(convnext_name(parameter_name), last)
        assert scales[id(parameter)] == pytest.approx(0.7 ** (last + 1 - layer), rel=1e-12), parameter_name


@pytest.mark.parametrize(
    ("start", "layer"),
    [
        ("stem.0.weight", 0),
        ("stem.1.bias", 0),
        ("stages.0.blocks.2.", 1),
        ("stages.1.downsample.1.weight", 2),
        ("stages.1.blocks.0.", 2),
        ("stages.2.downsample.0.bias", 3),
        ("stages.2.blocks.0.", 3),
        ("stages.2.blocks.2.", 3),
        ("stages.2.blocks.3.", 4),
        ("stages.2.blocks.26.", 11),
        ("stages.3.downsample.1.weight", 12),
        ("stages.3.blocks.2.", 12),
        ("head.norm.weight", 13),
        ("head.fc.weight", 13),
    ],
)
@pytest.mark.parametrize("name", ["convnext_base", "sgconvnext_base"])
def test_layer_of_base_is_the_one_in_convnexts_table(name: str, start: str, layer: int) -> None:
    model = build(name)
    chosen = {id(p) for n, p in model.named_parameters() if n.startswith(start)}
    assert chosen
    scales = {
        group["lr_scale"] for group in param_groups(model, 0.05, 0.7) if chosen & {id(p) for p in group["params"]}
    }
    assert scales == {0.7 ** (13 - layer)}


def test_without_layer_decay_there_are_two_groups_at_full_learning_rate() -> None:
    groups = param_groups(build("sgconvnext_tiny"), 0.05, 1.0)
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.05]
    assert [group["lr_scale"] for group in groups] == [1.0, 1.0]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_layer_decay_is_refused_for_a_model_without_convnexts_layers(name: str) -> None:
    model = build(name)
    with refused("optim.layer_decay", "ConvNeXt", "use 1"):
        param_groups(model, 0.05, 0.7)
    assert len(param_groups(model, 0.05, 1.0)) == 2


# ---- parameters with a factor of their own


SPARED, FASTER = "*.sgconv.weight", "*.sgconv.weight=10, *.sgconv.*=2"


def of_each(model: nn.Module, key: str, *knobs: Any) -> dict[str, float]:
    """What the groups give every parameter, by name."""
    given = {id(p): group[key] for group in param_groups(model, 0.05, *knobs) for p in group["params"]}
    assert len(given) == len(list(model.parameters()))
    return {name: given[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_first_pattern_that_matches_gives_the_factor_on_top_of_layer_decay(layer_decay: float) -> None:
    model = build("sgconvnext_tiny")
    plain, scaled = of_each(model, "lr_scale", layer_decay), of_each(model, "lr_scale", layer_decay, FASTER)
    factors = {name: scaled[name] / scale for name, scale in plain.items()}
    for name, factor in factors.items():
        want = 10 if name.endswith(".sgconv.weight") else 2 if ".sgconv." in name else 1
        assert factor == pytest.approx(want, rel=1e-12), name
    assert set(map(round, factors.values())) == {1, 2, 10}
    assert of_each(model, "weight_decay", layer_decay, FASTER) == of_each(model, "weight_decay", layer_decay)


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_pattern_spares_parameters_from_weight_decay_and_no_others(layer_decay: float) -> None:
    model = build("sgconvnext_tiny")
    plain = of_each(model, "weight_decay", layer_decay)
    want = {name: 0.0 if name.endswith(".sgconv.weight") else decay for name, decay in plain.items()}
    assert want != plain
    assert of_each(model, "weight_decay", layer_decay, "", SPARED) == want
    assert of_each(model, "lr_scale", layer_decay, "", SPARED) == of_each(model, "lr_scale", layer_decay)


def test_factor_of_1_groups_as_no_pattern_does() -> None:
    model = build("sgconvnext_tiny")
    plain, other = (param_groups(model, 0.05, 0.7, text) for text in ("", "*.sgconv.weight=1"))
    assert [[*map(id, group.pop("params"))] for group in plain] == [[*map(id, group.pop("params"))] for group in other]
    assert plain == other


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_patterns_are_for_any_model(name: str) -> None:
    model = build(name)
    scales = of_each(model, "lr_scale", 1.0, "*.bias=3")
    assert scales == {key: 3.0 if key.endswith(".bias") else 1.0 for key in scales}


@pytest.mark.parametrize("knob", ["optim.lr_scale", "optim.no_weight_decay"])
def test_pattern_without_a_parameter_is_refused_with_names_like_it(knob: str) -> None:
    model, pattern = build("convnext_atto"), "stages.0.blocks.0.sgconv.weight"
    text = f"head.*=2,{pattern}=10" if knob == "optim.lr_scale" else f"head.*,{pattern}"
    with refused(f"{knob}: {pattern!r} matches no parameter", "stages.0.blocks.0.conv_dw.weight"):
        param_groups(model, 0.05, 1.0, **{knob.removeprefix("optim."): text})


@pytest.mark.parametrize(
    "text", ["head.*", "head.*=", "=2", "head.*=0", "head.*=-1", "head.*=nan", "head.*=1e7", "a=x"]
)
def test_text_that_is_no_pattern_with_a_factor_is_refused(text: str) -> None:
    with refused(f"command line: optim.lr_scale={text!r} must be PATTERN=FACTOR", "1e-06 to 1e+06"):
        load_config(CONFIGS / "digits.yaml", [f"optim.lr_scale={text}"])


def test_parameter_moves_as_many_times_as_far_as_its_factor_says() -> None:
    moved, model = [], micro_model(micro_config())
    for text in ("", "*.sgconv.weight=10"):
        t = training(micro_config(**{"optim.lr_scale": text, "optim.weight_decay": 0.0}), model)
        before = {name: parameter.detach().clone() for name, parameter in t.model.named_parameters()}
        update(t, batches_of(16, *noise(16)), 1e-3)
        moved.append({name: (p.detach() - before[name]).norm().item() for name, p in t.model.named_parameters()})
    ratios = {name: moved[1][name] / once for name, once in moved[0].items()}
    faster = {name for name in ratios if name.endswith(".sgconv.weight")}
    assert len(faster) == 4
    for name, ratio in ratios.items():
        assert ratio == pytest.approx(10 if name in faster else 1, rel=1e-3), name


def test_state_goes_on_under_another_factor_and_not_in_other_groups() -> None:
    model = micro_model(micro_config())
    then, now = OptimConfig(lr_scale="*.sgconv.weight=10"), OptimConfig(lr_scale="*.sgconv.weight=5")
    old, new = create_optimizer(model, then), create_optimizer(model, now)
    refuse_other_groups(model, then, now)
    load_state(new, old.state_dict())
    assert sorted(group["lr_scale"] for group in new.param_groups) == [1, 1, 5]
    for other in (
        OptimConfig(),
        OptimConfig(lr_scale="*.sgconv.weight=10", no_weight_decay="head.*"),
        OptimConfig(lr_scale="*.mlp.fc1.weight=10"),  # as many groups, of as many parameters
    ):
        with refused("has 3 parameter groups", "optim.lr_scale", "keep which parameters"):
            refuse_other_groups(model, then, other)


# ---- the optimiser


def test_optimizer_is_adamw_with_the_recipes_numbers() -> None:
    model = build("sgconvnext_tiny")
    optimizer = create_optimizer(model, IMAGENET.optim)
    assert type(optimizer) is torch.optim.AdamW
    assert not any(group["amsgrad"] for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
    other = OptimConfig(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3)
    for group in create_optimizer(model, other).param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-3)
        assert group["weight_decay"] in (0.0, 0.3)


def test_layer_decay_scales_the_whole_table_with_its_first_value_and_its_minimum() -> None:
    table = learning_rates(FINETUNE.optim, FINETUNE.epochs, 2502)
    optimizer = create_optimizer(build("convnext_base"), FINETUNE.optim)
    for lr in (table[0], table[40_000], table[-1], FINETUNE.optim.min_lr):
        set_learning_rate(optimizer, lr)
        got = sorted({group["lr"] for group in optimizer.param_groups})
        assert got == pytest.approx([lr * 0.7 ** (13 - layer) for layer in range(14)], rel=1e-12)
    set_learning_rate(optimizer, table[0])
    assert min(group["lr"] for group in optimizer.param_groups) == pytest.approx(4.84e-7, rel=1e-3)
    assert max(group["lr"] for group in optimizer.param_groups) == 5e-5


def test_group_without_a_scale_gets_the_learning_rate_itself() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25


# ---- updates and batches


@pytest.mark.parametrize(
    ("samples", "batch", "updates"), [(1_281_167, 4096, 312), (1_281_167, 512, 2502), (16, 16, 1), (31, 16, 1)]
)
def test_updates_per_epoch_are_whole_global_batches(samples: int, batch: int, updates: int) -> None:
    assert updates_per_epoch(samples, batch) == updates


@pytest.mark.parametrize("samples", [0, 1, 15])
def test_dataset_smaller_than_a_global_batch_is_refused(samples: int) -> None:
    with refused("optim.global_batch=16", f"{samples} training images", "lower"):
        updates_per_epoch(samples, 16)


@pytest.mark.parametrize(
    ("batch", "per_device", "size", "steps"),
    [(4096, 128, 8, 4), (4096, 64, 8, 8), (4096, 128, 32, 1), (512, 32, 8, 2), (512, 32, 16, 1), (6, 1, 3, 2)],
)
def test_accumulation_follows_from_the_batches_and_the_devices(
    batch: int, per_device: int, size: int, steps: int
) -> None:
    assert accumulation_steps(batch, per_device, size) == steps


@pytest.mark.parametrize(("batch", "per_device", "size"), [(4096, 128, 3), (16, 5, 1), (16, 32, 1), (16, 16, 2)])
def test_global_batch_that_does_not_divide_is_refused(batch: int, per_device: int, size: int) -> None:
    words = (f"optim.global_batch={batch}", f"optim.batch_per_device={per_device}", f"{size} processes", "change")
    with refused(*words, f"= {per_device * size}"):
        accumulation_steps(batch, per_device, size)
