"""The resizing of taps as one operator, against its definition; also as a compiler sees it."""

from typing import Any

import pytest
import torch
from helpers import relative_error
from torch._dynamo.backends.debugging import aot_eager

from sgconvnext import SGConv2d
from sgconvnext.models import resized_taps
from sgconvnext.models.input_size import resize_taps

BUILT = (4, 6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("size", [(9, 7), (2, 3), (4, 7)], ids=str)
def test_operator_and_its_adjoint_equal_the_definition(size: tuple[int, int], gap: int, causal: bool) -> None:
    length = BUILT[0] * (BUILT[1] + gap)
    taps = torch.randn(3, length if causal else 2 * length - 1, dtype=torch.float64, requires_grad=True)
    want = resize_taps(taps, BUILT, size, gap)
    got = resized_taps._Resized.apply(taps, *BUILT, *size, gap)
    assert torch.equal(got, want)
    dy = torch.randn_like(want)
    assert torch.equal(*(torch.autograd.grad(y, taps, dy)[0] for y in (got, want)))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(resized_taps._resized, (taps.detach(), *BUILT, *size, gap), test_utils=checks)
    torch.library.opcheck(resized_taps._resized_backward, (dy, taps.shape[1], *BUILT, *size, gap), test_utils=checks)


@pytest.mark.parametrize("gap", [0, 2])
def test_compiled_layer_takes_open_sizes_in_one_graph(gap: int) -> None:
    graphs: list[str] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    layer = SGConv2d(3, BUILT, row_gap=gap)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=keep)
    for size in ((5, 8), (7, 9), (12, 5)):
        x = torch.randn(2, 3, *size)
        gradients = [torch.autograd.grad(run(x).square().sum(), layer.weight)[0] for run in (layer, compiled)]
        assert relative_error(compiled(x), layer(x)) <= 1e-6
        assert relative_error(*gradients) <= 1e-6
    assert len(graphs) == 1
    assert "index_select" not in graphs[0]
