"""The "triton" backend at the length of the first stage at 224 px: on a GPU if there is one, else interpreted."""

import pytest
import torch
from helpers import case, relative_error, run

pytest.importorskip("triton")


@pytest.mark.parametrize(("dtype", "causal"), [(torch.bfloat16, False), (torch.float16, True)], ids=str)
def test_backend_matches_definition_at_the_length_of_the_first_stage(dtype: torch.dtype, causal: bool) -> None:
    x, taps, dy, truth = case(3136, causal, dtype, (2, 1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    got = run(x.to(device), taps.to(device), dy.to(device), "triton")
    bound = {torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    for name, want in truth.items():
        assert relative_error(got[name].cpu(), want) <= (2e-6 if name == "dtaps" else bound), name
