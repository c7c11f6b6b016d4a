"""What every test starts from."""

import pytest
import torch

torch.set_num_threads(1)  # the tensors are tiny: on a busy machine threads would mostly wait for each other


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
