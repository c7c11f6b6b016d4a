"""Datasets of long sequences: pixels, text and speech."""
