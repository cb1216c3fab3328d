"""Pieces of documents as rows of fixed length."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from midstream.pipeline.rows import Origins, as_origin_array

IGNORED = -100

MOST_PIECES, MOST_TOKENS = 64, 1 << 14

OUTPUT_COLUMNS = ("input_ids", "labels", "position_ids", "seq_lens")

Piece = tuple[tuple[npt.NDArray[Any], ...], int, int, Origins]
"""Part of a document: its columns (token ids first), the tokens from where to where, and the
document's origins.
"""


def first_source(origins: Origins) -> int:
    return int(as_origin_array(origins)[0, 0])


def cut_document(
    columns: tuple[npt.NDArray[Any], ...], size: int, room: int, origins: Origins
) -> list[Piece]:
    """A document in pieces of at most a row."""
    if size <= room:
        return [(columns, 0, size, origins)]
    return [(columns, start, min(start + room, size), origins) for start in range(0, size, room)]
