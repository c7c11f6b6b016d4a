"""Pictures of what a network learnt: ``python -m sgconvnext.visualize kernels|footprint|energy|features|erf|...``."""
