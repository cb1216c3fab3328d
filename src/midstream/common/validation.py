"""Checks of arguments, with the same error texts everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["require_callable", "require_choice", "require_int", "require_name", "require_text"]


def require_int(value: Any, name: str, minimum: int, where: str) -> None:
    """Raise TypeError unless ``value`` is an integer, ValueError if it is below ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{where}: {name} is an integer; found {value!r}")
    if value < minimum:
        raise ValueError(f"{where}: {name} is at least {minimum}; found {value}")


def require_callable(value: Any, where: str) -> None:
    """Raise TypeError unless ``value`` is callable."""
    if not callable(value):
        raise TypeError(f"{where} takes a callable; found {type(value).__name__}")


def require_choice(value: Any, name: str, choices: Sequence[str], where: str) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(
            f"{where}: {name} is one of {', '.join(map(repr, choices))}; found {value!r}"
        )


def require_name(value: Any, where: str) -> None:
    """Raise ValueError unless ``value`` is a valid name of a node, or None for a default name."""
    if value is not None and (not isinstance(value, str) or not value or "|" in value):
        raise ValueError(f"{where}: a name is a string without '|'; found {value!r}")
    if value is not None:
        require_text(value, f"{where}: a name")


def require_text(value: str, what: str) -> None:
    """Raise ValueError if ``value`` cannot be encoded as UTF-8.

    Python decodes bytes of file names in other encodings to lone surrogates.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} is text that UTF-8 can write; found {value!r}, whose character {error.start}"
            " is a lone surrogate"
        ) from None
