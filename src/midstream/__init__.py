"""A stateful data pipeline and drop-in DataLoader for PyTorch that resumes mid-stream, exactly."""

from midstream import checkpoint as checkpoint
from midstream import plot as plot
from midstream.checkpoint.merge import merge_states
from midstream.checkpoint.progress import Progress, progress
from midstream.checkpoint.weights_history import asked_shares, weights_history
from midstream.checkpoint.whole_run import WholeRun
from midstream.combine import concatenate, interleave
from midstream.dataset import Dataset
from midstream.distributed.preemption import PreemptionGuard
from midstream.errors import (
    CheckpointError,
    MidstreamError,
    Origin,
    ReplayDiverged,
    SampleError,
    SourceError,
    TooManyErrors,
    WorkerError,
)
from midstream.loader.loader import DataLoader
from midstream.loader.replay import Replay, replay
from midstream.metrics.metric import count, distribution
from midstream.nodes import collate, flat, pad, ragged, schedule
from midstream.nodes.pack.attention import document_mask
from midstream.pipeline.failures import ErrorRate
from midstream.pipeline.quarantine import read_quarantine
from midstream.sources import from_dataset, from_iterable, read_json, read_parquet

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DataLoader",
    "Dataset",
    "ErrorRate",
    "MidstreamError",
    "Origin",
    "PreemptionGuard",
    "Progress",
    "Replay",
    "ReplayDiverged",
    "SampleError",
    "SourceError",
    "TooManyErrors",
    "WholeRun",
    "WorkerError",
    "asked_shares",
    "collate",
    "concatenate",
    "count",
    "distribution",
    "document_mask",
    "flat",
    "from_dataset",
    "from_iterable",
    "interleave",
    "merge_states",
    "pad",
    "progress",
    "ragged",
    "read_json",
    "read_parquet",
    "read_quarantine",
    "replay",
    "schedule",
    "weights_history",
]
