"""Ranks and workers: which of them makes which batch, and how the ranks agree."""
