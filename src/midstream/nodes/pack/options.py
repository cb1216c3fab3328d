"""The checked arguments of `Dataset.pack`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from midstream.common.plain_state import State
from midstream.common.validation import require_choice, require_int

OUTPUT_COLUMNS = ("input_ids", "labels", "position_ids", "seq_lens")
"""Columns that every packed row has."""

_WINDOW, _MAX_WINDOW = 256, 1024  # documents

_MIN_FILL = 0.95  # of a row


@dataclass(frozen=True)
class PackOptions:
    """The arguments of `Dataset.pack`, checked; see there for their meaning.

    Raises:
        ValueError, TypeError: If an argument is out of range, or two of them contradict.
    """

    seq_len: int
    mode: str = "concat"
    overflow: str = "split"
    key: str = "input_ids"
    columns: tuple[str, ...] = ()
    mask: str | None = None
    separator: tuple[int, ...] = ()
    pad_id: int = 0
    last: str = "pad"
    window: int | None = None
    min_fill: float | None = None

    def __post_init__(self) -> None:
        require_int(self.seq_len, "seq_len", 1, "pack")
        require_choice(self.mode, "mode", ("concat", "fit"), "pack")
        require_choice(self.overflow, "overflow", ("split", "truncate", "drop", "error"), "pack")
        require_choice(self.last, "last", ("pad", "drop"), "pack")
        for token in self.separator:
            require_int(token, "separator", 0, "pack")
        require_int(self.pad_id, "pad_id", 0, "pack")
        if len(self.separator) >= self.seq_len:
            raise ValueError(
                f"pack: a separator of {len(self.separator)} tokens leaves no room in"
                f" {self.seq_len}"
            )
        names = self.names
        if len(set(names)) < len(names) or any(not isinstance(name, str) for name in names):
            raise ValueError(f"pack: key, columns and mask are different names; found {names}")
        for name in self.columns:
            if name in OUTPUT_COLUMNS:
                raise ValueError(
                    f"pack: {name!r} is a column that pack makes. Rename yours with .map before it;"
                    " to leave tokens out of the labels, give mask= a column that is 0 there"
                )
        if self.window is not None:
            require_int(self.window, "window", 1, "pack")
            if self.window > _MAX_WINDOW:
                raise ValueError(
                    f"pack: window is at most {_MAX_WINDOW:,} documents, which a resume reads"
                    f" again; found {self.window}"
                )
        if self.min_fill is not None and not 0 <= self.min_fill <= 1:
            raise ValueError(
                f"pack: min_fill is a fraction of seq_len, 0 to 1; found {self.min_fill}"
            )
        if self.mode == "concat" and (self.window is not None or self.min_fill is not None):
            raise ValueError(
                'pack: window and min_fill are for mode="fit"; "concat" fills every row'
            )

    @property
    def names(self) -> list[str]:
        """The columns that are read of a sample: token ids first, the mask last."""
        return [self.key, *self.columns, *([] if self.mask is None else [self.mask])]

    @property
    def fit_window(self) -> int:
        """Documents in a window of ``mode="fit"``."""
        return _WINDOW if self.window is None else int(self.window)

    @property
    def fit_min_fill(self) -> float:
        """Fraction of a row, 0 to 1: documents of a row that is filled less wait for the next
        window.
        """
        return _MIN_FILL if self.min_fill is None else float(self.min_fill)

    def spec_fields(self) -> dict[str, State]:
        """Row length, mode, and every option that differs from its default."""
        fields: dict[str, State] = {"seq_len": int(self.seq_len), "mode": self.mode}
        if self.mode == "fit":
            fields["window"], fields["min_fill"] = self.fit_window, self.fit_min_fill
        for name, default in _DEFAULTS.items():
            if (value := getattr(self, name)) != default:
                fields[name] = (
                    list(map(_plain, value)) if isinstance(value, tuple) else _plain(value)
                )
        return fields


_DEFAULTS: dict[str, Any] = {
    "overflow": "split",
    "key": "input_ids",
    "columns": (),
    "mask": None,
    "separator": (),
    "pad_id": 0,
    "last": "pad",
}


def _plain(value: Any) -> State:
    """A numpy integer as Python's; other values unchanged."""
    return int(value) if isinstance(value, np.integer) else value
