"""Helpers without knowledge of pipelines: plain state, randomness, validation, tables."""
