"""What is shown of pipelines, samples and loaders, as text, in a notebook and as pictures; and that
looking changes nothing.
"""

from __future__ import annotations

import re
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch

import midstream as ms

matplotlib.use("Agg")


def rows(name: str, count: int) -> ms.Dataset:
    return ms.from_dataset(
        [{"id": i, "ids": np.arange(i, dtype=np.int32)} for i in range(count)], name=name
    )


def mixed() -> ms.Dataset:
    return ms.interleave(
        {"web": rows("web", 70).shuffle(1), "code": rows("code", 30)}, {"web": 7, "code": 3}
    )


def boom(row: dict[str, Any]) -> dict[str, Any]:
    if row["id"] == 3:
        raise ValueError("a bad <row>")
    return row


# -- trees --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "again"),
    [
        (lambda: rows("web", 9).filter(bool), ""),
        (
            lambda: rows("web", 9).filter(bool).shuffle(0, buffer_size=4800),
            "at most 5,400/lanes + 1 inputs of a lane",
        ),
        (lambda: rows("web", 9).flat_map(lambda row: [row]), "at most 16 inputs of a lane"),
        (lambda: rows("web", 9).pack(4, key="ids"), "at most 17 inputs of a lane"),
        (
            lambda: rows("web", 9).pack(4, key="ids", mode="fit", window=7),
            "at most two windows of 7 inputs of a lane",
        ),
        (
            lambda: ms.from_iterable(lambda: range(3), name="net"),
            "the shard in progress, from its start",
        ),
    ],
)
def test_a_stream_says_what_a_resume_reads_again(made: Any, again: str) -> None:
    ds = made()
    assert ds.access() == ("stream, a resume reads again " + again if again else "stream")
    assert f"# {ds.access()}" in repr(ds).splitlines()[0]
    assert ds.access() in ds._repr_html_()


def test_random_access_says_its_length() -> None:
    assert rows("web", 1234).access() == "random access, 1,234"
    assert rows("web", 9).repeat().access() == "random access, endless"
    assert rows("web", 9).filter(bool).repeat().access() == "stream, endless"


def test_html_shows_every_node_and_weight_and_escapes() -> None:
    html = mixed().map(lambda row: row).filter(bool)._repr_html_()
    for text in (
        "web",
        "code",
        "random access, 70",
        "stream",
        "weights={web: 7, code: 3}",
        "&lt;lambda&gt;",
    ):
        assert text in html
    assert "<lambda>" not in html


# -- previews -----------------------------------------------------------------------------------------------------------


def test_preview_shows_origins_keys_and_values() -> None:
    shown = mixed().preview(3)
    lines = str(shown).splitlines()
    assert re.split(r"\s{2,}", lines[0]) == ["origin", "id", "ids"]
    order = [(sample["id"], len(sample["ids"])) for sample in mixed().take(3)]
    assert [re.split(r"\s{2,}", line)[1] for line in lines[1:]] == [
        str(number) for number, _ in order
    ]
    assert all(f"int32[{length}]" in line for line, (_, length) in zip(lines[1:], order))
    assert {origin.partition("[")[0] for origin in shown.origins} <= {"web", "code"}
    html = shown._repr_html_()
    assert html.count("<tr>") == 4 and shown.origins[0] in html


@pytest.mark.parametrize(
    ("made", "first"),
    [
        (lambda: ms.from_dataset([5, 6], name="n"), ["n[0]", "5"]),
        (
            lambda: ms.from_dataset(["a\nb" * 40], name="n"),
            ["n[0]", "'a\\nba\\nba\\nba\\nba\\nba\\nba\\nba\\…"],
        ),
        (
            lambda: ms.from_dataset([torch.zeros(2, 3)], name="n"),
            ["n[0]", "float32[2, 3] 0.0 0.0 0.0 0.0 0…"],
        ),
        (
            lambda: ms.from_dataset(range(9), name="n").batch(4),
            ["n[0] + 3 more", "int64[4] 0 1 2 3"],
        ),
        (lambda: ms.from_dataset([list(range(20))], name="n"), ["n[0]", "list[20] 0, 1, 2, 3, …"]),
        (lambda: ms.from_dataset([], name="n"), ["origin", "sample"]),
    ],
)
def test_preview_of_other_samples(made: Any, first: list[str]) -> None:
    lines = str(made().preview(2)).splitlines()
    assert re.split(r"\s{2,}", lines[1] if len(lines) > 1 else lines[0]) == first


def test_preview_shows_a_failed_sample_and_goes_on() -> None:
    shown = rows("web", 5).map(boom).preview()
    assert len(shown.samples) == 5 and isinstance(shown.samples[3], ms.SampleError)
    assert shown.origins[3] == "web[3]" and "a bad <row>" in str(shown).splitlines()[4]
    assert "a bad &lt;row&gt;" in shown._repr_html_()


def test_looking_changes_nothing() -> None:
    ds = mixed().filter(lambda row: True).shuffle(2, buffer_size=20)
    torch.manual_seed(0)
    np.random.seed(0)
    iterator = iter(ds)
    begun = [next(iterator)["id"] for _ in range(5)]
    state, generators = ds.state_dict(), (torch.get_rng_state(), np.random.get_state()[1].copy())
    ds.preview(7)
    ms.plot.shuffle(ds, n=50)
    ms.plot.lengths(ds, "ids", n=50)
    repr(ds), ds._repr_html_()
    assert ds.state_dict() == state
    assert (
        torch.equal(torch.get_rng_state(), generators[0])
        and (np.random.get_state()[1] == generators[1]).all()
    )
    assert begun + [row["id"] for row in iterator] == [
        row["id"] for row in mixed().filter(lambda row: True).shuffle(2, buffer_size=20)
    ]
    loaded = mixed().filter(lambda row: True).shuffle(2, buffer_size=20)
    loaded.load_state_dict(state)
    loaded.preview(3)
    assert loaded.state_dict() == state


def test_preview_wants_a_count() -> None:
    with pytest.raises((TypeError, ValueError), match="preview"):
        rows("web", 3).preview(-1)


# -- loaders ------------------------------------------------------------------------------------------------------------


def test_a_loader_tells_where_it_stands_and_starts_no_worker() -> None:
    loader = ms.DataLoader(mixed(), 8, num_workers=2, collate_fn=list)
    assert repr(loader).startswith(
        "DataLoader(batch_size=8, num_workers=2): epoch 0, batch 0 of 13\nbatch("
    )
    assert loader._iterator is None
    plain = ms.DataLoader(mixed(), 8, collate_fn=list)
    next(iter(plain))
    assert (
        "epoch 0, batch 1 of 13" in repr(plain) and "epoch 0, batch 1 of 13" in plain._repr_html_()
    )
    stream = ms.DataLoader(mixed().filter(bool), 8, collate_fn=list, rank=1, world_size=2)
    assert repr(stream).startswith(
        "DataLoader(batch_size=8, num_workers=0, rank 1 of 2, 48 lanes): epoch 0, batch 0\nbatch("
    )
    again = ms.DataLoader(mixed(), 8, collate_fn=list)
    again.load_state_dict(plain.state_dict())
    assert "batch 1 of 13" in repr(again)


def test_a_foreign_loader_has_a_plain_repr() -> None:
    loader = ms.DataLoader(range(4), sampler=torch.utils.data.SequentialSampler(range(4)))
    assert "StatefulDataLoader" in repr(loader) and loader._repr_html_() is None


# -- pictures -----------------------------------------------------------------------------------------------------------


def test_plot_shuffle_draws_rows_where_they_come_out() -> None:
    ds = rows("web", 200).shuffle(1)
    ax = ms.plot.shuffle(ds, n=150)
    (points,) = ax.collections
    drawn = np.asarray(points.get_offsets())
    assert drawn.tolist() == [[out, row["id"]] for out, row in enumerate(ds.take(150))]


def test_plot_shuffle_has_a_colour_for_each_source() -> None:
    ax = ms.plot.shuffle(mixed())
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"web", "code"}
    assert sum(len(part.get_offsets()) for part in ax.collections) == len(mixed())


def test_plot_lengths_counts_samples() -> None:
    ax = ms.plot.lengths(mixed(), "ids", n=1000)
    assert sum(bar.get_height() for bar in ax.patches) == len(mixed())
    assert "length of ids" in ax.get_xlabel()
    assert ms.plot.lengths(mixed(), lambda row: row["id"]).get_xlabel() == "length"
    with pytest.raises(TypeError, match="length"):
        ms.plot.lengths(ms.from_dataset([1, 2]))


def test_plot_mix_of_one_moment_and_of_a_run() -> None:
    loader = ms.DataLoader(mixed(), 10, collate_fn=list)
    states = [loader.state_dict() for _ in loader]
    shares = {name: source.share for name, source in loader.progress().sources.items()}
    bars = ms.plot.mix(states[-1])
    assert [bar.get_width() for bar in bars.patches] == pytest.approx(
        [shares[label.get_text()] for label in bars.get_yticklabels()]
    )
    ax = ms.plot.mix(states)
    lines = {
        line.get_label(): line
        for line in ax.lines
        if len(line.get_xdata()) and line.get_label() in shares
    }
    assert {name: float(line.get_ydata()[-1]) for name, line in lines.items()} == pytest.approx(
        shares
    )
    assert len(lines["web"].get_xdata()) == len(states)
    with pytest.raises(ValueError, match="tokens"):
        ms.plot.mix(states, unit="tokens")
    with pytest.raises(ValueError, match="empty"):
        ms.plot.mix([])
