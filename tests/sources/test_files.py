"""Names of sources and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import midstream as ms


@pytest.mark.parametrize(
    "make",
    [
        lambda name, folder: ms.from_dataset([1], name=name),
        lambda name, folder: ms.from_iterable(lambda: [1], name=name),
        lambda name, folder: ms.read_json("x.jsonl", name=name),
        lambda name, folder: ms.read_parquet("x.parquet", name=name),
        lambda name, folder: ms.read_json(name),
        lambda name, folder: ms.read_parquet([f"{folder}/{name}"]),
        lambda name, folder: ms.interleave({"a": ms.from_dataset([1])}, name=name),
        lambda name, folder: ms.interleave({name: ms.from_dataset([1]), "b": ms.from_dataset([2])}),
    ],
)
def test_a_name_that_is_no_text_is_refused_where_it_is_given(make: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"text that UTF-8 can write; found '.*bad\\udc80'.*lone surrogate"
    ) as told:
        make("bad\udc80", tmp_path)
    assert not isinstance(told.value, UnicodeError)


@pytest.mark.parametrize("read", [ms.read_json, ms.read_parquet])
def test_a_file_whose_name_is_no_text_is_named_when_it_is_found(
    read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = str(
        tmp_path / "bad\udc80"
    )  # as Linux lists a name in another encoding; other systems refuse to make one
    monkeypatch.setattr("midstream.sources.files.glob.glob", lambda *_, **__: [found])
    monkeypatch.setattr("midstream.sources.files.os.path.isfile", lambda path: True)
    with pytest.raises(ValueError, match=r"the name of a file is text.*bad\\udc80'"):
        len(read(f"{tmp_path}/*"))
