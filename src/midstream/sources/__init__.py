"""Sources: the leaves of a pipeline, one file per kind of data."""

from midstream.sources.arrow import ArrowSource
from midstream.sources.choose import from_dataset
from midstream.sources.huggingface import IterableSource
from midstream.sources.iterable import FromIterable, from_iterable
from midstream.sources.jsonl import JsonSource, read_json
from midstream.sources.parquet import ParquetSource, read_parquet
from midstream.sources.sequence import SequenceSource

__all__ = [
    "ArrowSource",
    "FromIterable",
    "IterableSource",
    "JsonSource",
    "ParquetSource",
    "SequenceSource",
    "from_dataset",
    "from_iterable",
    "read_json",
    "read_parquet",
]
