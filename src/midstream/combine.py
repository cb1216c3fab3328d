"""Several datasets as one: interleave() and concatenate()."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from midstream.common.validation import require_choice, require_int, require_name
from midstream.dataset import Dataset, node_of
from midstream.nodes.concatenate import Concatenate
from midstream.nodes.mix.interleave import Interleave, StoppingStrategy
from midstream.nodes.mix.weights import Schedule, check_weights
from midstream.nodes.repeat import Repeat
from midstream.pipeline.node import Node


def interleave(
    datasets: Mapping[str, Dataset],
    weights: Mapping[str, float] | Schedule | None = None,
    *,
    seed: int = 0,
    stopping_strategy: StoppingStrategy | None = None,
    weights_by: str | Callable[[Any], int] | None = None,
    max_epochs: int | Mapping[str, int] | None = None,
    then: Literal["stop", "share"] | None = None,
    name: str | None = None,
) -> Dataset:
    """Mix datasets by weight.

    The result is random access where all inputs are and ``weights_by`` is not given; else it is a
    stream.

    The order of picks is random, yet close to the weights at any time. After any number of samples,
    each of k datasets is strictly within 1 + share * (k - 2) samples of its share, if the shares
    are ratios of small numbers. On streams this holds in every lane. With ``weights_by``, in every
    lane, a dataset is never more than one of its samples above its share.

    Args:
        datasets: By name. A source without a name of its own takes the name given here.
        weights: Relative weights by the same names, or a `midstream.schedule` of them. Default:
            equal. A dataset with weight 0 is not read, but stays in the tree.
        seed: Chooses the order of picks. The order is the same in every epoch, so ``len`` is too.
        stopping_strategy: As in Hugging Face ``datasets``; on streams, each lane stops by itself.

            - ``"first_exhausted"`` (default): end after the last sample of the first dataset to run
              out.
            - ``"all_exhausted"``: end after the last sample of the last dataset to run out. The
              others start over, in a new order where they are shuffled. A dataset whose pass gave
              nothing (with ``weights_by``: counted nothing) does not start over.
            - ``"all_exhausted_without_replacement"``: every sample once.
        weights_by: What weights are relative to, in place of samples: a function of a sample that
            returns a whole number, such as its number of tokens, or the name of a column whose
            length is that number.
        max_epochs: How often each dataset may be read, one number for all or by name. Datasets that
            are not named start over without end. Excludes ``stopping_strategy``.
        then: With ``max_epochs``, what happens when a dataset reaches its limit. ``"stop"``
            (default): the mix ends. ``"share"``: the others take over its weight, until all limited
            datasets that are not endless have reached theirs.
        name: Name of this node in paths and checkpoints.

    Raises:
        ValueError: If names do not match; if weights are negative, not finite, all 0, or below
            2**-17 of the sum; if two sources have one name; or if options contradict each other.
        TypeError: If a value of ``datasets`` is not a midstream dataset, or an argument has another
            type.

    >>> import midstream as ms
    >>> zeros, ones = ms.from_dataset([0] * 70), ms.from_dataset([1] * 30)
    >>> mix = ms.interleave({"a": zeros, "b": ones}, {"a": 7, "b": 3})
    >>> len(mix), sum(list(mix)[:50])
    (98, 15)
    >>> texts = {"short": ms.from_dataset(["ab"] * 90), "long": ms.from_dataset(["x" * 20] * 9)}
    >>> mix = list(ms.interleave(texts, weights_by=len))
    >>> sum(map(len, mix[:22])), mix[:22].count("ab")
    (80, 20)
    """
    if not isinstance(datasets, Mapping):
        raise TypeError(
            "interleave takes datasets by name, like interleave({'web': web, 'code': code}); "
            f"found {type(datasets).__name__}"
        )
    nodes = {key: node_of(dataset, f"interleave {key!r}") for key, dataset in datasets.items()}
    if weights is None:
        weights = dict.fromkeys(datasets, 1)
    if not isinstance(weights, (Mapping, Schedule)):
        raise TypeError(
            "interleave takes weights by name, as the datasets, like"
            f" {{{', '.join(f'{key!r}: 1' for key in datasets)}}}, or a midstream.schedule of them;"
            f" found {weights!r:.60}"
        )
    phases = weights.phases if isinstance(weights, Schedule) else ((0, tuple(weights.items())),)
    checked = tuple(
        (border, check_weights(dict(pairs), list(datasets), "interleave"))
        for border, pairs in phases
    )
    require_name(name, "interleave")
    if name is not None and "/" in name:
        raise ValueError(f"interleave: a name is part of paths, so it has no '/'; found {name!r}")
    if max_epochs is not None:
        if stopping_strategy is not None:
            raise ValueError(
                "interleave: max_epochs says when the mix ends, so it takes no stopping_strategy;"
                " use then="
            )
        require_choice("stop" if then is None else then, "then", ("stop", "share"), "interleave")
        nodes = _limited(nodes, max_epochs)
        stopping_strategy = (
            "all_exhausted_without_replacement" if then == "share" else "first_exhausted"
        )
    elif then is not None:
        raise ValueError(
            "interleave: then= says what follows max_epochs, and max_epochs is not given"
        )
    return Dataset(
        Interleave(
            tuple(nodes.items()),
            checked[0][1],
            seed,
            stopping_strategy or "first_exhausted",
            name,
            weights_by,
            checked[1:],
        )
    )


def _limited(datasets: Mapping[str, Node], max_epochs: int | Mapping[str, int]) -> dict[str, Node]:
    """Repeat each dataset as often as it may be read."""
    limits = (
        dict(max_epochs) if isinstance(max_epochs, Mapping) else dict.fromkeys(datasets, max_epochs)
    )
    unknown = sorted(set(limits) - set(datasets))
    if unknown or not limits:
        raise ValueError(
            "interleave: max_epochs takes names of the datasets; expected some of"
            f" {sorted(datasets)}, found {sorted(limits)}"
        )
    repeated = {}
    for key, dataset in datasets.items():
        if key in limits:
            require_int(limits[key], f"max_epochs of {key!r}", 1, "interleave")
            if dataset.infinite:
                raise ValueError(
                    f"interleave: {key!r} never ends, so its epochs cannot be counted; leave"
                    " .repeat() out, max_epochs does it"
                )
        repeated[key] = dataset if dataset.infinite else Repeat(dataset, limits.get(key))
    return repeated


def concatenate(datasets: Sequence[Dataset]) -> Dataset:
    """Read one dataset after the other.

    The result is random access where all inputs are; else it is a stream, in which every lane reads
    one dataset after the other.

    Args:
        datasets: At least one. All but the last must end.

    Raises:
        ValueError: If the list is empty, two sources have one name, or a dataset before the last
            never ends.
        TypeError: If one of them is not a midstream dataset.

    >>> import midstream as ms
    >>> first, second = ms.from_dataset([1, 2], name="a"), ms.from_dataset([3], name="b")
    >>> list(ms.concatenate([first, second]))
    [1, 2, 3]
    """
    if isinstance(datasets, Dataset) or not isinstance(datasets, Sequence):
        raise TypeError(
            "concatenate takes a list of datasets: concatenate([a, b]); found"
            f" {type(datasets).__name__}"
        )
    return Dataset(Concatenate(tuple(node_of(dataset, "concatenate") for dataset in datasets)))
