"""What a step does, and the memory of a process of its own."""

from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest
import timm
import torch
from helpers import refused

from sgconvnext import SGConv2d
from sgconvnext.profile import memory, workload
from sgconvnext.profile.workload import Workload, peak_memory, prepare, spoken_size
from sgconvnext.training import build

TINY = "sgconvnext_atto,depths=[1,1,1,1],dims=[8,16,24,32],num_classes=10"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The model that a step runs, then what it returned at every forward pass and under which circumstances."""
    found: list[Any] = []
    from_spec = build.from_spec

    def watched(*arguments: Any) -> Any:
        model = from_spec(*arguments)
        found.append(model)
        model.register_forward_hook(
            lambda module, inputs, y: found.append((module.training, torch.is_grad_enabled(), inputs[0], y))
        )
        return model

    monkeypatch.setattr(build, "from_spec", watched)
    return found


def test_inference_is_a_forward_pass_in_evaluation_mode(seen: list[Any]) -> None:
    step = prepare(TINY, Workload(batch=3, img_size=(64, 32)))
    assert len(seen) == 1
    step()
    [(training, gradients, images, logits)] = seen[1:]
    assert (training, gradients) == (False, False)
    assert images.shape == (3, 3, 64, 32)
    assert images.is_contiguous()
    assert logits.shape == (3, 10)
    assert seen[0].stages[0].blocks[0].sgconv.input_size == (16, 8)


def test_training_step_moves_every_parameter_and_leaves_no_gradient(seen: list[Any]) -> None:
    spec = f"{TINY},ls_init_value=1.0"  # at 1e-6 the steps are below the weights' last bit
    step = prepare(spec, Workload("training", batch=2, img_size=(32, 32)))
    before = {name: parameter.detach().clone() for name, parameter in seen[0].named_parameters()}
    step()
    assert seen[1][:2] == (True, True)
    for name, parameter in seen[0].named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert parameter.grad is None


def test_half_precision_is_autocast_and_memory_format_is_kept(seen: list[Any]) -> None:
    prepare(TINY, Workload(batch=2, img_size=(32, 32), dtype="bf16", channels_last=True))()
    _, _, images, logits = seen[1]
    assert logits.dtype == torch.bfloat16
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert seen[0].stem[0].weight.dtype == torch.float32
    assert seen[0].stem[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_reparameterized_step_runs_fixed_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = []
    monkeypatch.setattr(SGConv2d, "reparameterize", lambda self: frozen.append(self))
    prepare(TINY, Workload(img_size=(32, 32), reparameterize=True))()
    assert len(frozen) == 4
    prepare(TINY, Workload(img_size=(32, 32)))()
    assert len(frozen) == 4


def test_compiled_step_runs_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compiled.append(dynamic) or model)
    prepare(TINY, Workload(img_size=(32, 32), compile=True))()
    assert compiled == [False]


def test_model_takes_arguments_of_its_own() -> None:
    model: Any = build.from_spec("sgconvnext_atto,depths=[1,1,2,1],backend=toeplitz", (64, 96))
    assert [len(stage.blocks) for stage in model.stages] == [1, 1, 2, 1]
    assert model.stages[0].blocks[0].sgconv.backend == "toeplitz"
    assert model.stages[0].blocks[0].sgconv.input_size == (16, 24)
    assert isinstance(build.from_spec("convnext_atto", (64, 96)), timm.models.ConvNeXt)
    numbers: Any = build.from_spec("sgconvnext_atto,ls_init_value=1e-3,alpha=(0.5,0.25),num_classes=0")
    assert float(numbers.stages[0].blocks[0].gamma[0]) == pytest.approx(1e-3)
    assert numbers.stages[0].blocks[0].sgconv.options.alpha == (0.5, 0.25)


@pytest.mark.parametrize(
    ("spec", "words"),
    {
        "name": ("sgconvnext_tinny", ["'sgconvnext_tinny'", "did you mean 'sgconvnext_tiny'"]),
        "argument": ("convnext_atto,backend=fft", ["convnext_atto", "backend"]),
        "value": ("sgconvnext_atto,backend=slow", ["'slow'", "toeplitz"]),
        "no pair": ("sgconvnext_atto,backend", ["'sgconvnext_atto,backend'", "key=value"]),
        "brackets": ("sgconvnext_atto,depths=[1,1", ["'1'", "key=value"]),
        "none": ("sgconvnext_atto,ls_init_value=None", ["None", "leave ls_init_value out"]),
        "empty": ("", ["''"]),
    }.values(),
    ids=str,
)
def test_model_that_cannot_be_built_is_refused(spec: str, words: list[str]) -> None:
    with refused(*words):
        build.from_spec(spec, (64, 64))


def test_images_have_the_channels_that_the_model_takes() -> None:
    for name in ("convnext_atto", "sgconvnext_atto", "vit_tiny_patch16_224"):
        assert workload.random_images(timm.create_model(name, in_chans=5), 2, (32, 64)).shape == (2, 5, 32, 64)


def test_child_that_is_killed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None: ...
        def submit(self, *_: Any) -> Any:
            raise BrokenProcessPool

    monkeypatch.setattr(memory, "ProcessPoolExecutor", Dead)
    with refused(TINY, "killed", "batch 4", "64x32 px"):
        peak_memory(TINY, Workload(batch=4, img_size=(64, 32)))


def test_sizes_are_spoken_as_they_are_typed() -> None:
    assert [spoken_size(size) for size in ((224, 224), (256, 192))] == ["224", "256x192"]
