"""A run's state as data."""

from midstream.checkpoint.store import latest as latest
from midstream.checkpoint.store import load as load
from midstream.checkpoint.store import save as save
