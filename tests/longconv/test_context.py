"""What is at work around a call: the compiler runs what it sees, an exporter writes it down."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from sgconvnext.longconv.context import is_recorded


class Recorded(nn.Module):
    """x + 1 where something writes down what runs, else x."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if is_recorded() else x + 0


def test_compiler_writes_nothing_down() -> None:
    x = torch.zeros(1)
    assert Recorded()(x) == 0
    assert torch.compile(Recorded(), backend="eager", fullgraph=True)(x) == 0


@pytest.mark.parametrize("strict", [False, True])
def test_export_and_tracers_write_down(strict: bool) -> None:
    x = torch.zeros(1)
    if hasattr(torch.compiler, "is_exporting") or not strict:  # torch 2.6 cannot tell in a strict export
        assert torch.export.export(Recorded(), (x,), strict=strict).module()(x) == 1
    assert torch.jit.trace(Recorded(), (x,))(x) == 1
    assert make_fx(Recorded())(x)(x) == 1
