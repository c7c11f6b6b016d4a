"""A block runs as it was measured to be the fastest, and only where it can."""

import pytest
import torch
from helpers import refused, relative_error, small_model
from timm.layers import Mlp
from timm.utils import reparameterize_model
from torch import Tensor

from sgconvnext.models import ways
from sgconvnext.models.block import SGConvNeXtBlock
from sgconvnext.models.kept import _KEPT
from sgconvnext.models.ways import Way

pytestmark = pytest.mark.usefixtures("untuned")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that the MLP saw at a time."""
    seen: list[int] = []
    mlp = Mlp.forward
    monkeypatch.setattr(Mlp, "forward", lambda own, y: seen.append(y.shape[:-1].numel()) or mlp(own, y))
    return seen


def block() -> SGConvNeXtBlock:
    return SGConvNeXtBlock(8, (10, 10), ls_init_value=0.5).train()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 8, 10, 10)


@pytest.mark.parametrize("way", [Way("modules"), Way("modules", 1024), Way("packed", 512), Way("triton")], ids=str)
def test_way_is_its_name(way: Way) -> None:
    assert Way.of(str(way)) == way


@pytest.mark.parametrize("name", ["cuda", "modules/many", "modules/-1", "/64"])
def test_unknown_way_is_refused(name: str) -> None:
    with refused(repr(name), "modules, packed, triton"):
        Way.of(name)


def test_block_runs_as_measured_near_the_size_that_was(seen: list[int]) -> None:
    own, which = block(), ways.Block("cpu", torch.float32, 8, 32, False, "training")
    ways.prefer(which, 200, Way("modules", 64))
    ways.prefer(which, 800, Way("modules", 128))
    for batch, size in [(2, 50), (1, 50), (3, 60), (6, 120), (16, 124)]:  # the fewest equal chunks
        seen.clear()
        own(images(batch))
        assert sum(seen) == 100 * batch
        assert set(seen[:-1]) == {size}
    seen.clear()
    own(images(20))  # more than twice as many
    with torch.no_grad():
        own(images(2))  # no training
    assert seen == [2000, 200]


def test_measured_ways_agree_with_the_shipped_one() -> None:
    own, x = block(), images()
    want = own(x)
    ways.prefer(ways.Block("cpu", torch.float32, 8, 32, False, "training"), 200, Way("modules", 64))
    got = own(x)
    assert relative_error(got, want) <= 1e-6
    ways.forget()
    assert torch.equal(own(x), want)


def test_weights_are_packed_only_where_that_was_the_fastest() -> None:
    model = reparameterize_model(small_model(ls_init_value=0.5))
    first = model.stages[0].blocks[0]
    with torch.no_grad():
        for way, kept in [(Way("modules"), False), (Way("packed"), True), (Way("triton"), False), (None, True)]:
            with ways.only(way):
                model(torch.randn(2, 3, 64, 64))
            assert (first in _KEPT) == kept, way


def test_other_blocks_of_the_same_width_are_not_meant(seen: list[int]) -> None:
    ways.prefer(ways.Block("cpu", torch.float32, 8, 32, False, "training"), 200, Way("modules", 64))
    SGConvNeXtBlock(8, (10, 10), gate=True).train()(images())
    SGConvNeXtBlock(8, (10, 10), mlp_ratio=3.5).train()(images())
    assert seen == [200, 200]
