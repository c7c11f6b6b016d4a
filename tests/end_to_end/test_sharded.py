"""Networks whose parameters FSDP2 shards over two processes."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from helpers import GAP, GATED, SMALL, mixers, refused, relative_error, small_model
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_helpers import environment

PROCESSES = 2
LR = 1e-2


def sharded(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for stage in model.stages:
        for block in stage.blocks:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gathered(model: Any) -> dict[str, Tensor]:
    """The whole weights; for rank 0 alone."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def take_steps(model: Any, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Two steps of AdamW; the gradients of the second."""
    # with the default eps its first step has size lr whatever the gradient, so rounding could turn it around
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return [parameter.grad for parameter in model.parameters()]


def steps_agree(rank: int) -> None:
    for options in ({}, GAP, GATED):
        torch.manual_seed(0)
        images, labels = torch.randn(4, 3, 64, 96), torch.arange(4)
        torch.manual_seed(0)
        whole = small_model(**options).train()
        torch.manual_seed(0)
        start = small_model(**options).train()
        model = sharded(start)
        model.set_grad_checkpointing()
        grads = take_steps(whole, images, labels)
        shares: Any = take_steps(model, images[rank::PROCESSES], labels[rank::PROCESSES])
        for (name, _), share, grad in zip(whole.named_parameters(), shares, grads, strict=True):
            assert relative_error(share.full_tensor(), grad) <= 1e-4, name
        weights = gathered(model)
        if rank == 0:
            for name, value in whole.state_dict().items():
                assert relative_error(weights[name], value) <= 1e-5, name
            again = small_model(**options)
            again.load_state_dict(weights)
            fast = timm.utils.reparameterize_model(again)
            with torch.no_grad():
                assert relative_error(fast(images), whole.eval()(images)) <= 1e-5


def starts_alike(rank: int) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = sharded(timm.create_model("sgconvnext_atto", **SMALL))
    model.to_empty(device="cpu").init_weights()
    for layer in mixers(model):
        norms: list[Any] = [None] * PROCESSES
        dist.all_gather_object(norms, layer.kernel_norm)
        assert torch.equal(*norms)
    weights = gathered(model)
    if rank == 0:
        whole = small_model()
        whole.load_state_dict(weights)
        for layer in mixers(whole):
            norm = layer.kernel().norm(dim=-1)
            assert torch.allclose(norm, torch.ones_like(norm), atol=1e-5)


def checked(rank: int, store: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    starts_alike(rank)
    steps_agree(rank)
    dist.destroy_process_group()


def test_sharded_network_starts_and_trains_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, environment()[name])
    torch.multiprocessing.spawn(checked, (tmp_path / "store",), nprocs=PROCESSES)


def test_shards_are_neither_reparameterized_nor_resized() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = sharded(small_model())
        with refused("sharded", "full_state_dict=True"):
            timm.utils.reparameterize_model(model, inplace=True)
        with refused("sharded", "full_state_dict=True"):
            model.set_input_size(96)
        assert all(layer.taps is None for layer in mixers(model))
        assert [layer.input_size for layer in mixers(model)] == [layer.input_size for layer in mixers(small_model())]
    finally:
        dist.destroy_process_group()
