"""Differences of two pipelines, in words."""

from __future__ import annotations

from midstream.common.plain_state import State, encode


def diff_specs(saved: State, here: State, path: str = "") -> list[str]:
    """How a saved pipeline and this one differ, a line each.

    Args:
        saved: The spec of the saved one.
        here: The spec of this one.
        path: Of the node that both specs are of; empty at the root.

    >>> diff_specs({"node": "shuffle", "seed": 1}, {"node": "shuffle", "seed": 2})
    ['shuffle: seed 1 → 2']
    """
    title = f"{saved.get('node')}{f' {path!r}' if path else ''}"
    if saved.get("node") != here.get("node"):
        return [f"{path or 'the root'}: {saved.get('node')} → {here.get('node')}"]
    lines = []
    for key in sorted((set(saved) | set(here)) - {"inputs", "node"}):
        before, after = saved.get(key), here.get(key)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            changes = [
                f"{name} {before.get(name)} → {after.get(name)}"
                for name in sorted(set(before) | set(after))
                if before.get(name) != after.get(name)
            ]
            lines.append(f"{key} of {title}: {', '.join(changes)}")
        else:
            lines.append(f"{title}: {key} {_value(before)} → {_value(after)}")
    old, new = saved.get("inputs", {}), here.get("inputs", {})
    for name in sorted(set(old) | set(new)):
        below = "/".join(part for part in (path, name) if part)
        if name not in new:
            lines.append(f"{title}: input {name!r} was removed")
        elif name not in old:
            lines.append(f"{title}: input {name!r} is new")
        else:
            lines.extend(diff_specs(old[name], new[name], below))
    return lines


def _value(value: State) -> str:
    return "(none)" if value is None else encode(value)
