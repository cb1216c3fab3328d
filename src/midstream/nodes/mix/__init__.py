"""Interleave: several datasets mixed by weight."""
