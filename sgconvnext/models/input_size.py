"""What a model does with another image size than that its kernels are built for."""

from timm.layers import to_2tuple

STEM_STRIDE = 4
MIN_SIZE = 32  # pixels: one token is left in the last stage


def stage_grids(img_size: int | tuple[int, int]) -> list[tuple[int, int]]:
    """H, W of the four stages' maps at stride 4, 8, 16, 32."""
    height, width = to_2tuple(img_size)
    if min(height, width) < MIN_SIZE:
        raise ValueError(
            f"img_size={height}x{width} leaves the last stage no token; use at least {MIN_SIZE}x{MIN_SIZE}"
        )
    strides = [STEM_STRIDE * 2**i for i in range(4)]
    return [(height // stride, width // stride) for stride in strides]
