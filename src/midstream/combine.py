"""Several datasets as one: `interleave` and `concatenate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from midstream.common.validation import require_choice, require_int, require_name
from midstream.dataset import Dataset
from midstream.nodes.concatenate import Concatenate
from midstream.nodes.mix.interleave import Interleave, StoppingStrategy
from midstream.nodes.mix.weights import Schedule, check_weights
from midstream.nodes.repeat import Repeat
from midstream.pipeline.node import Node, require_dataset


def _node(value: Any, where: str) -> Node:
    found = value.node if isinstance(value, Dataset) else value
    require_dataset(found, where)
    return found


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

    After any number of samples each of k sources is strictly within 1 + share * (k - 2) samples of
    its share, as long as the shares are ratios of small numbers (on streams: in every lane). With
    ``weights_by`` the same is asked of tokens: in every lane a source is never more than one of its
    documents above its share.

    Args:
        datasets: By name. A source that has no name of its own takes it from here.
        weights: Relative, by the same names; equal when left out. A weight of 0 leaves a dataset
            out but in the tree. Or a `midstream.schedule` of them.
        seed: Chooses the order of picks. The order is the same every epoch, so that ``len`` is too.
        stopping_strategy: As Hugging Face ``datasets`` has them. ``"first_exhausted"``, the
            default: the end is the last sample of the first dataset to run out.
            ``"all_exhausted"``: the last sample of the last one; the others start over, in a new
            order where they are shuffled, but not after a pass that gave (with ``weights_by``:
            counted) nothing. ``"all_exhausted_without_replacement"``: every sample once. On streams
            each lane stops by itself, when it would pick from a dataset that has run out.
        weights_by: What a sample counts: a function that returns a whole number (of tokens, say),
            or the name of a column whose length it is. Makes the mix a stream.
        max_epochs: How often each dataset may be gone through, one number for all or by name; those
            not named start over without end. Takes the place of a stopping strategy.
        then: With ``max_epochs``, when a dataset has had them: ``"stop"``, the default, ends the
            mix; ``"share"`` shares its weight out among the others, until all that are limited and
            not endless have had theirs.
        name: Name of this node in paths and checkpoints.

    Raises:
        ValueError: On names that do not match, weights that are negative, not finite, all 0 or too
            small to be kept (under 2**-17 of the whole), or two sources of one name.
        TypeError: If something is not a midstream dataset.

    >>> import midstream as ms
    >>> mix = ms.interleave({"a": ms.from_dataset([0] * 70), "b": ms.from_dataset([1] * 30)}, {"a": 7, "b": 3})
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
    nodes = {key: _node(dataset, f"interleave {key!r}") for key, dataset in datasets.items()}
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
        raise ValueError("interleave: then= says what follows max_epochs, and none are given")
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
    """The datasets, each repeated as often as it may be gone through."""
    limits = (
        dict(max_epochs) if isinstance(max_epochs, Mapping) else dict.fromkeys(datasets, max_epochs)
    )
    unknown = sorted(set(limits) - set(datasets))
    if unknown or not limits:
        raise ValueError(
            "interleave: max_epochs are by the names of the datasets; expected some of"
            f" {sorted(datasets)}, found {sorted(limits)}"
        )
    made = {}
    for key, dataset in datasets.items():
        if key in limits:
            require_int(limits[key], f"max_epochs of {key!r}", 1, "interleave")
            if dataset.infinite:
                raise ValueError(
                    f"interleave: {key!r} never ends, so its epochs cannot be counted; leave"
                    " .repeat() to max_epochs"
                )
        made[key] = dataset if dataset.infinite else Repeat(dataset, limits.get(key))
    return made


def concatenate(datasets: Sequence[Dataset]) -> Dataset:
    """One dataset after the other.

    Args:
        datasets: At least one. All but the last must have an end.

    Raises:
        ValueError: If there are none, two sources have one name, or one that is not the last never
            ends.
        TypeError: If one is not a midstream dataset.

    >>> import midstream as ms
    >>> list(ms.concatenate([ms.from_dataset([1, 2], name="a"), ms.from_dataset([3], name="b")]))
    [1, 2, 3]
    """
    if isinstance(datasets, Dataset) or not isinstance(datasets, Sequence):
        raise TypeError(
            "concatenate takes a list of datasets: concatenate([a, b]); found"
            f" {type(datasets).__name__}"
        )
    return Dataset(Concatenate(tuple(_node(dataset, "concatenate") for dataset in datasets)))
