"""torch.compile of whole networks: one graph, in every way of running them, and no warning."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import timm
import torch
from helpers import GAP, GATED, SMALL, random_gates, relative_error
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

pytestmark = pytest.mark.end_to_end
Result = tuple[list[Tensor], list[Tensor]]


class Graphs(list[str]):
    """The graphs that torch.compile makes of what it compiles with ``self.keep``."""

    def keep(self, graph: Any, inputs: Any) -> Any:
        self.append(str(graph.graph))
        return aot_eager(graph, inputs)

    def compile(self, model: nn.Module, dynamic: bool | None = None) -> Any:
        torch.compiler.reset()
        return torch.compile(model, fullgraph=True, dynamic=dynamic, backend=self.keep)


def network(**options: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model("sgconvnext_atto", **SMALL, ls_init_value=0.5, **options)
    return random_gates(model).train()


def step(run: Any, model: nn.Module, x: Tensor, context: AbstractContextManager[Any]) -> Result:
    """Outputs, and the gradients of the sum of their squares."""
    model.zero_grad()
    with context:
        found = run(x)
    outputs = found if isinstance(found, list) else [found]
    torch.stack([y.float().square().sum() for y in outputs]).sum().backward()
    return outputs, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("dynamic batch", {}),
        ("dynamic batch", GAP),
        ("bf16 autocast", {}),
        ("gradient checkpointing", GATED),
        ("features_only", {}),
    ],
    ids=str,
)
def test_training_step_is_one_graph_and_gives_what_it_gives_uncompiled(way: str, options: dict[str, Any]) -> None:
    features: dict[str, Any] = {"features_only": True} if way == "features_only" else {}
    model, graphs = network(**options, **features), Graphs()
    if way == "gradient checkpointing":
        model.set_grad_checkpointing()
    half = way == "bf16 autocast"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = graphs.compile(model)
        for batch in (2, 3, 5) if way == "dynamic batch" else (2,):
            x = torch.randn(batch, 3, 64, 64)
            if way == "dynamic batch":
                torch._dynamo.mark_dynamic(x, 0)
            results = [
                step(run, model, x, torch.autocast("cpu", torch.bfloat16) if half else nullcontext())
                for run in (compiled, model)
            ]
            for got, want in zip(*(outputs + grads for outputs, grads in results), strict=True):
                assert relative_error(got, want) <= (5e-2 if half else 1e-4)
    assert len(graphs) == 1
    assert not [str(warning.message) for warning in caught if "complex" in str(warning.message)]


def test_inference_at_five_sizes_is_two_graphs() -> None:
    """That of the first size, and one in which the sizes are open."""
    model, graphs = network().eval(), Graphs()
    compiled = graphs.compile(model)
    with torch.no_grad():
        for size in ((64, 64), (96, 128), (128, 160), (160, 96), (96, 96)):
            x = torch.randn(1, 3, *size)
            assert relative_error(compiled(x), model(x)) <= 1e-5
    assert len(graphs) == 2
    assert "index_select" not in "".join(graphs)
