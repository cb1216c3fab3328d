"""Nodes: the operations of a pipeline, one file each.

A file holds the node (a frozen description with its random access) and its stream iterator.
"""

from midstream.nodes.batch import Batch
from midstream.nodes.collate import collate, flat, pad, ragged
from midstream.nodes.concatenate import Concatenate
from midstream.nodes.filter import Filter
from midstream.nodes.flat_map import FlatMap
from midstream.nodes.map import Map
from midstream.nodes.map_batched import MapBatched
from midstream.nodes.mix.interleave import Interleave
from midstream.nodes.mix.weights import Schedule, schedule
from midstream.nodes.pack.pack import Pack
from midstream.nodes.repeat import Repeat
from midstream.nodes.shuffle import BufferedShuffle, Shuffle
from midstream.nodes.skip import Skip
from midstream.nodes.take import Take
from midstream.nodes.track import Track

__all__ = [
    "Batch",
    "BufferedShuffle",
    "Concatenate",
    "Filter",
    "FlatMap",
    "Interleave",
    "Map",
    "MapBatched",
    "Pack",
    "Repeat",
    "Schedule",
    "Shuffle",
    "Skip",
    "Take",
    "Track",
    "collate",
    "flat",
    "pad",
    "ragged",
    "schedule",
]
