"""Metrics of samples that users track, and their totals."""
