"""sgconvnext.tune on blocks: the ways that it checks, times and lets them take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GATED, refused, relative_error, small_model
from timm.utils import reparameterize_model
from torch import Tensor

import sgconvnext
from sgconvnext import tuning
from sgconvnext.longconv import tuned
from sgconvnext.models import fused, packed_mlp, ways
from sgconvnext.models.ways import Way
from sgconvnext.profile import tune_blocks
from sgconvnext.tuning import BlockChoice

pytestmark = pytest.mark.usefixtures("untuned")


@pytest.fixture
def chunks_are_fastest(fastest: Callable[[str], None]) -> None:
    fastest("modules/512")


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 64, 64)  # 1,024 tokens in the first stage


def blocks(found: sgconvnext.Tuning) -> list[BlockChoice]:
    return [each for each in found.choices if isinstance(each, BlockChoice)]


@pytest.mark.parametrize("options", [{}, GATED], ids=str)
@pytest.mark.parametrize(("mode", "work"), [("train", "training"), ("eval", "inference"), ("fixed", "frozen")])
def test_block_takes_what_was_measured_and_outputs_agree(
    mode: str, work: str, options: dict[str, Any], chunks_are_fastest: None, tmp_path: Path
) -> None:
    model = small_model(ls_init_value=0.5, drop_path_rate=0.3, **options).train(mode == "train")
    if mode == "fixed":
        model = reparameterize_model(model)
    x = images()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.set_grad_enabled(mode == "train"):
        before = model.eval()(x) if mode != "train" else None
        model.train(mode == "train")
        found = sgconvnext.tune(model, x)
    first = blocks(found)[0]
    assert (first.work, first.tokens, first.backend) == (work, 1024, "modules/512")
    assert first.shipped == ("packed" if mode == "fixed" else "modules")
    assert {"modules", "modules/512"} | ({"packed", "packed/512"} if mode == "fixed" else set()) == set(first.seconds)
    names = set(tuning.BLOCK_ERRORS) if mode == "train" else {"y error"}
    assert all(set(errors) == names for errors in first.errors.values())
    assert all(0 < error <= 1e-5 for errors in first.errors.values() for error in errors.values())
    assert ways._MEASURED
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    if before is not None:
        with torch.no_grad():
            assert relative_error(model(x), before) <= 1e-5
    found.save(tmp_path / "a.json")
    tuning.forget()
    assert not ways._MEASURED
    assert sgconvnext.Tuning.load(tmp_path / "a.json").use() == found
    assert next(iter(ways._MEASURED.values())) == {1024: Way("modules", 512)}


def test_real_clock_chooses_among_ways_that_are_right() -> None:
    [first] = blocks(sgconvnext.tune(small_model().train(), images()))
    assert first.backend in first.seconds
    assert all(seconds > 0 for seconds in first.seconds.values())
    assert first.gain >= 1
    assert str(first).startswith("block of 8 channels, 1024 tokens, float32, training: modules")


def test_wrong_way_is_left_out_and_named(chunks_are_fastest: None, monkeypatch: pytest.MonkeyPatch) -> None:
    own = fused.chunked_form
    monkeypatch.setattr(fused, "chunked_form", lambda block, x, most: own(block, x, most) * 1.01)
    found = sgconvnext.tune(small_model().train(), images())
    [first] = blocks(found)
    assert first.backend == first.shipped == "modules"
    assert first.left_out["modules/512"].startswith("wrong, y error ")
    assert "modules/512 left out: wrong" in str(first)
    assert "left out: wrong" in str(found.block_table().cells())


def test_way_that_gives_nan_is_left_out(chunks_are_fastest: None, monkeypatch: pytest.MonkeyPatch) -> None:
    own = fused.chunked_form
    monkeypatch.setattr(fused, "chunked_form", lambda block, x, most: own(block, x, most) * float("nan"))
    [first] = blocks(sgconvnext.tune(small_model(), images()))
    assert first.backend == "modules"
    assert first.left_out["modules/512"].startswith("wrong, y error nan")


@pytest.mark.parametrize("part", ["all", "blocks but one weight"])
def test_frozen_weights_need_no_gradient(part: str, chunks_are_fastest: None) -> None:
    model = small_model().requires_grad_(False).train()
    if part != "all":
        model.stages[0].blocks[0].mlp.fc1.weight.requires_grad_(True)
    [first] = blocks(sgconvnext.tune(model, images()))
    assert first.backend == "modules/512"
    assert ("weights error" in first.errors["modules"]) == (part != "all")


def test_blocks_are_measured_in_inference_mode_and_under_autocast_too(chunks_are_fastest: None) -> None:
    for context in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        for model in (small_model(), small_model().train()):
            with context:
                [first] = blocks(sgconvnext.tune(model, images().to(memory_format=torch.channels_last)))
            assert first.backend == "modules/512"
            assert first.dtype == ("float32" if isinstance(context, torch.inference_mode) else "bfloat16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_network_in_half_precision_is_measured(dtype: torch.dtype, mode: str, chunks_are_fastest: None) -> None:
    """In which the sum of a small branch and a large shortcut would be nothing but rounding."""
    model = small_model(ls_init_value=1e-6).to(dtype).train(mode == "train")
    first = blocks(sgconvnext.tune(model, images().to(dtype)))[0]
    assert (first.backend, first.dtype) == ("modules/512", str(dtype).partition(".")[2])


@pytest.mark.end_to_end
def test_exports_and_compilers_leave_sizes_open_after_a_measurement(chunks_are_fastest: None) -> None:
    model = small_model()
    for batch in (2, 4, 8):
        sgconvnext.tune(model, images(batch))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(),), dynamic_shapes={"x": {0: batch}})
    run = torch.compile(model.stages[0].blocks[0], fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for count in (2, 5, 17, 30):
            given = images(count)
            assert relative_error(program.module()(given), model(given)) <= 1e-4
            x = torch.randn(count, 8, 16, 16)
            assert relative_error(run(x), model.stages[0].blocks[0](x)) <= 1e-5


def test_products_that_may_be_rounded_are_judged_so(chunks_are_fastest: None) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert blocks(sgconvnext.tune(small_model(), images()))[0].backend == "modules/512"
    finally:
        torch.set_float32_matmul_precision(before)


def test_refused_tuning_leaves_the_choices_before_it(fastest: Callable[[str], None], monkeypatch: Any) -> None:
    fastest("dft")
    sgconvnext.tune(small_model(), images())
    before = {which: dict(by_batch) for which, by_batch in tuned._TUNED.items()}
    assert before
    fastest("toeplitz")
    monkeypatch.setattr(tune_blocks, "TOLERANCE", {torch.float32: 0.0})
    with refused("no form of a block of 8 channels is right", "modules: wrong"):
        sgconvnext.tune(small_model(), images())
    assert before == tuned._TUNED


def test_measurement_leaves_the_exact_sizes_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_mlp, "_SIZES", {(number, 8) for number in range(packed_mlp.EXACT_SIZES)})
    before = set(packed_mlp._SIZES)
    with torch.no_grad():
        first = blocks(sgconvnext.tune(reparameterize_model(small_model()), images()))[0]
    assert "packed/512" in first.errors
    assert before == packed_mlp._SIZES


def test_block_with_a_hook_inside_is_left_alone(chunks_are_fastest: None) -> None:
    model, seen = small_model(), []
    model.stages[0].blocks[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    assert blocks(sgconvnext.tune(model, images())) == []
    assert len(seen) == 2  # the two passes that look which convolutions and blocks there are


def test_way_that_fails_is_in_the_table(chunks_are_fastest: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no memory\nfor this")

    monkeypatch.setattr(fused, "chunked_form", fails)
    found = sgconvnext.tune(small_model(), images())
    assert blocks(found)[0].left_out == {"modules/512": "fails: no memory for this"}
    assert "left out: fails: no memory for this" in str(found.block_table().cells())
