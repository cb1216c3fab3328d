"""Measures how far mixes are from the asked shares: the worst deviation, in samples, over all
prefixes, here and in the peers.

    python benchmarks/ratios.py [--only PEER] [--json]

Three sources at 0.5 : 0.3 : 0.2, a million rows each. Every one of 1 or 64 ranks makes 200 batches
of 8; a run is the batches of all ranks, step by step. Grain has an environment of its own (``pip
install grain``): ``--only grain`` needs nothing else; a peer that is not installed is left out, and
said to be.
"""

from __future__ import annotations

import argparse
import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

SHARES = {"a": 0.5, "b": 0.3, "c": 0.2}
BATCH, STEPS, ROWS = 8, 200, 1_000_000
Ranks = list[Iterator[int]]


def midstream_rows(ranks: int, *, stream: bool = False, by: Any = None) -> Ranks:
    """A loader per rank; samples are the numbers of their sources."""
    import midstream as ms

    warnings.simplefilter("ignore")
    parts = {name: ms.from_dataset(Same(index), name=name) for index, name in enumerate(SHARES)}
    made = {name: part.filter(lambda row: True) if stream else part for name, part in parts.items()}
    mix = ms.interleave(made, SHARES, weights_by=by)
    loaders = [
        ms.DataLoader(mix, batch_size=BATCH, rank=rank, world_size=ranks, lanes=64)
        for rank in range(ranks)
    ]
    return [(int(row) for batch in loader for row in batch) for loader in loaders]


class Same:
    """A million times one number."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> int:
        return self.value


def hub(ranks: int) -> Ranks:
    """``datasets.interleave_datasets`` of streams with 64 shards each, split by node."""
    import datasets
    from datasets.distributed import split_dataset_by_node

    def rows(shard: list[int], value: int) -> Iterator[dict[str, int]]:
        for _ in range(ROWS // 64 * len(shard)):
            yield {"x": value}

    parts = [
        datasets.IterableDataset.from_generator(
            rows, gen_kwargs={"shard": list(range(64)), "value": index}
        )
        for index in range(len(SHARES))
    ]
    mix = datasets.interleave_datasets(parts, probabilities=list(SHARES.values()), seed=0)
    split = [split_dataset_by_node(mix, rank, ranks) if ranks > 1 else mix for rank in range(ranks)]
    return [(sample["x"] for sample in part) for part in split]


def torchdata(ranks: int) -> Ranks:
    """torchdata's ``MultiNodeWeightedSampler``."""
    from torchdata.nodes import IterableWrapper, MultiNodeWeightedSampler

    found = []
    for rank in range(ranks):
        nodes = {name: IterableWrapper(Same(index)) for index, name in enumerate(SHARES)}
        sampler = MultiNodeWeightedSampler(nodes, SHARES, seed=0, rank=rank, world_size=ranks)
        sampler.reset()
        found.append(iter(sampler))
    return found


def grain(ranks: int) -> Ranks:
    """``grain.MapDataset.mix``, each rank a slice of it."""
    import grain.python as pygrain

    parts = [pygrain.MapDataset.source(Same(index)) for index in range(len(SHARES))]
    mix = pygrain.MapDataset.mix(parts, weights=list(SHARES.values()))
    return [iter(mix[rank::ranks].to_iter_dataset()) for rank in range(ranks)]


def grain_below(ranks: int) -> Ranks:
    """The same, each source sliced below the mix: every rank a mix of its own."""
    import grain.python as pygrain

    parts = [pygrain.MapDataset.source(Same(index)) for index in range(len(SHARES))]
    weights = list(SHARES.values())
    mixes = [
        pygrain.MapDataset.mix([part[rank::ranks] for part in parts], weights=weights)
        for rank in range(ranks)
    ]
    return [iter(mix.to_iter_dataset()) for mix in mixes]


PEERS: dict[str, Callable[[int], Ranks]] = {
    "midstream": midstream_rows,
    "midstream, streams": lambda ranks: midstream_rows(ranks, stream=True),
    "midstream, weights_by": lambda ranks: midstream_rows(ranks, by=lambda row: 1),
    "grain": grain,
    "grain, sliced below": grain_below,
    "torchdata": torchdata,
    "datasets": hub,
}


def deviation(rows: Any) -> float:
    """The worst deviation from the asked shares over all prefixes, in samples."""
    picked = np.fromiter(rows, dtype=np.int64)
    shares = np.array(list(SHARES.values()))
    counts = np.cumsum(picked[:, None] == np.arange(len(shares)), axis=0)
    return float(np.abs(counts - np.arange(1, len(picked) + 1)[:, None] * shares).max())


def measure(peer: str, ranks: int) -> dict[str, float]:
    """Of the worst rank by itself, and of the run: its batches in turn."""
    made = [list(itertools.islice(rows, BATCH * STEPS)) for rows in PEERS[peer](ranks)]
    alone = max(deviation(rows) for rows in made)
    turns = [
        row
        for step in range(STEPS)
        for rows in made
        for row in rows[step * BATCH : (step + 1) * BATCH]
    ]
    return {"rank": alone, "run": deviation(turns)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PEERS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for peer in [options.only] if options.only else PEERS:
        try:
            found[peer] = {ranks: measure(peer, ranks) for ranks in (1, 64)}
        except ImportError as error:
            found[peer] = f"left out: {error}"
    if options.json:
        print(json.dumps(found))
        return
    print(f"{'worst deviation in samples':28}{'1 rank':>10}{'64 ranks: one':>16}{'the run':>10}")
    for peer, values in found.items():
        if isinstance(values, str):
            print(f"{peer:28}{values}")
        else:
            print(
                f"{peer:28}{values[1]['run']:10.1f}{values[64]['rank']:16.1f}{values[64]['run']:10.1f}"
            )


if __name__ == "__main__":
    main()
