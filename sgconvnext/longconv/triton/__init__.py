"""What runs on a GPU in Triton. `toeplitz` is the backend, `block` the norm and the residual sum of a block.

Their programs are in `programs` and `block_programs`, which import triton and are imported when one first runs.
"""
