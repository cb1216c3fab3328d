"""A line is parsed to the same value, or refused with the same words, with orjson as with json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import midstream as ms
import midstream.sources.jsonl as jsonl


def result(line: bytes) -> tuple[str, Any]:
    try:
        return "value", exact(jsonl.parse(line))
    except RecursionError:
        return "error", "RecursionError"
    except Exception as error:
        return "error", f"{type(error).__name__}: {error}"


def expected(line: bytes) -> tuple[str, Any]:
    try:
        return "value", exact(json.loads(str(line, "utf-8")))
    except RecursionError:
        return "error", "RecursionError"
    except Exception as error:
        return "error", f"{type(error).__name__}: {error}"


def exact(value: Any) -> Any:
    """Types, signs of zero, NaN and the order of keys told apart."""
    if isinstance(value, dict):
        return "dict", [(key, exact(item)) for key, item in value.items()]
    if isinstance(value, list):
        return "list", list(map(exact, value))
    return type(value).__name__, repr(value)


LINES = [
    b"0", b"-0", b"-0.0", b"1e5", b"1E400", b"-1e400", b"1e-400", b"5e-324", b"0.1", b"1.0", b"123456789.123456789123456",
    b"999999999999999999", b"1000000000000000000", b"9223372036854775807", b"9223372036854775808", b"-9223372036854775808",
    b"-9223372036854775809", b"18446744073709551615", b"18446744073709551616", b"123456789012345678901234567890",
    b"[1, 18446744073709551616]", b'{"a": -123456789012345678901}', b"NaN", b"Infinity", b"-Infinity", b"[NaN, 1]",
    b'{"a": 1, "b": 2, "a": 3}', b'{"": {}}', b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\\udc00x"', b'["\\u0000"]', b'"\x00"',
    b'"a\tb"', b'"\xff"', b'"\xc3\xa9\xe2\x80\xa8"', b'"\xed\xa0\x80"', b"\xef\xbb\xbf{}", b" { } \r\n", b"\x0c1",
    b"\xc2\xa01", b"",
    b"   ", b"{", b"[1,]", b"[01]", b"+1", b".5", b"1.", b"'a'", b"{a: 1}", b"nul", b"true", b"null", b"[1] 2",
    b"// x", b'"\\x"',
    b"[" * 90 + b"]" * 90, b"[[]" * 900, b"[" * 100_000, b'"' + b"9" * 40 + b'"',
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(LINES)))
def test_odd_lines_are_read_as_json_reads_them(number: int) -> None:
    assert jsonl._orjson is orjson
    assert result(LINES[number]) == expected(LINES[number])


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(values, st.booleans(), st.sampled_from([None, 1]))
def test_any_value_is_read_as_json_reads_it(
    value: Any, ascii_only: bool, indent: int | None
) -> None:
    line = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode(
        "utf-8", "surrogatepass"
    )
    assert result(line) == expected(line)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from([*b'{}[]",:0123456789.eE+-\\ud8nultrfasNI \t\n\xc3\xa9\xff']), max_size=24
    ).map(bytes)
)
@example(b"[-0]")
@example(b'{"a":1,"a":2}')
def test_any_bytes_are_read_as_json_reads_them(line: bytes) -> None:
    assert result(line) == expected(line)


@pytest.mark.parametrize("fast", [True, False])
def test_a_file_is_the_same_with_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    if not fast:
        monkeypatch.setattr(jsonl, "_orjson", None)
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"id": 0, "x": NaN}\n{"id": 1, "x": 123456789012345678901}\n{"id": 2, "x": \n{"id": 3, "x": [1.5]}\n'
    )
    rows, errors = [], []
    iterator = iter(ms.read_json(str(path)))
    while True:
        try:
            rows.append(next(iterator))
        except StopIteration:
            break
        except ms.SampleError as error:
            errors.append(error.original_message)
    assert [row["id"] for row in rows] == [0, 1, 3]
    assert math.isnan(rows[0]["x"])
    assert (rows[1]["x"], rows[2]["x"]) == (123456789012345678901, [1.5])
    assert len(errors) == 1
    assert "line 3 is not JSON: Expecting value (column 15)" in errors[0]
