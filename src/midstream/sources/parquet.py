"""Placeholder while this is written."""

from midstream.core import Dataset


class ParquetSource(Dataset):
    """To come."""


def read_parquet(*a: object, **k: object) -> Dataset:
    """To come."""
    raise NotImplementedError
