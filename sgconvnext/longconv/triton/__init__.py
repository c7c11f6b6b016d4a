"""What runs on a GPU in Triton; nothing here is imported before it is needed but `tiles` and `toeplitz`."""
