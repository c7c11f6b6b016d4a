"""Counting and measuring models side by side: ``python -m sgconvnext.profile flops|throughput|ops|tune|...``."""
