"""Maps row by row against the definition: shapes with one row, one column, and odd and even sides."""

import pytest
import torch
from helpers import relative_error

from sgconvnext.longconv import reference
from sgconvnext.longconv.rows import convolve_rows


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (3, 1), (2, 3), (5, 7), (14, 17)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_convolution_of_rows_is_that_of_the_definition(
    height: int, width: int, dtype: torch.dtype, error: float
) -> None:
    x = torch.randn(2, 3, height, width, dtype=dtype)
    taps = torch.randn(3, 2 * height * width - 1, dtype=dtype)
    want = reference.long_conv(x.flatten(2).double(), taps.double()).view(x.shape)
    assert relative_error(convolve_rows(x, taps), want) <= error
