"""Counting and measuring models side by side: ``python -m sgconvnext.profile flops|throughput|ops|scaling|gpu``."""

from . import formulas as formulas  # registers what our operators cost with torch's FlopCounterMode
