"""The public surface, what happens at import, and the layers of the package."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import midstream as ms

PACKAGE = Path(ms.__file__).parent

PUBLIC = [
    "CheckpointError",
    "DataLoader",
    "Dataset",
    "ErrorRate",
    "MidstreamError",
    "Origin",
    "PreemptionGuard",
    "Progress",
    "Replay",
    "ReplayDiverged",
    "SampleError",
    "SourceError",
    "TooManyErrors",
    "WholeRun",
    "WorkerError",
    "asked_shares",
    "collate",
    "concatenate",
    "count",
    "distribution",
    "document_mask",
    "flat",
    "from_dataset",
    "from_iterable",
    "interleave",
    "merge_states",
    "pad",
    "progress",
    "ragged",
    "read_json",
    "read_parquet",
    "read_quarantine",
    "replay",
    "schedule",
    "weights_history",
]

# A file imports only from files above it. Folders count as one; `midstream` is the package itself.
LAYERS = [
    "errors",
    "_state",
    "_paths",
    "_random",
    "_check",
    "_bar",
    "_tables",
    "attention",
    "metrics",
    "quarantine",
    "failures",
    "breadcrumbs",
    "shield",
    "watch",
    "transport",
    "bundles",
    "preemption",
    "columns",
    "bare",
    "core",
    "nodes",
    "display",
    "dataset",
    "combine",
    "sources",
    "lanes",
    "readers",
    "threads",
    "storage",
    "checkpoint",
    "edits",
    "together",
    "rest",
    "position",
    "progress",
    "hosts",
    "loader",
    "replay",
    "plot",
    "midstream",
    "lightning",
    "transformers",
    "inspection",
    "testing",
    "demo",
    "examples",
    "cli",
    "__main__",
]

# The only imports against that order, and only inside functions: the fluent verbs, and how things
# look in a notebook.
LATE: set[tuple[str, str]] = set()


# -- names --------------------------------------------------------------------------------------------------------------


def test_the_public_names_are_these() -> None:
    assert sorted(ms.__all__) == PUBLIC
    there = {
        name
        for name, value in vars(ms).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert there == set(PUBLIC)


def test_the_version_is_that_of_the_distribution() -> None:
    assert ms.__version__ == importlib.metadata.version("midstream")


def test_type_checkers_are_told_that_there_are_types() -> None:
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_has_a_docstring_with_an_example(name: str) -> None:
    value = getattr(ms, name)
    text = inspect.getdoc(value) or ""
    assert len(text.splitlines()[0]) > 10
    assert not text.startswith(f"{name}("), "the docstring is the one that dataclass makes"
    if not (isinstance(value, type) and issubclass(value, Exception)):
        assert ">>> " in text


def public_methods(owner: type) -> Iterator[str]:
    for name, value in vars(owner).items():
        if not name.startswith("_") and (callable(value) or isinstance(value, property)):
            yield name


@pytest.mark.parametrize(
    "owner", [ms.Dataset, ms.DataLoader, ms.Progress], ids=lambda owner: owner.__name__
)
def test_every_public_method_has_a_docstring(owner: type) -> None:
    assert [
        name for name in public_methods(owner) if not inspect.getdoc(getattr(owner, name))
    ] == []


VERBS = ["batch", "filter", "flat_map", "map", "pack", "repeat", "shuffle", "skip", "take"]


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_an_example(name: str) -> None:
    assert ">>> " in (inspect.getdoc(getattr(ms.Dataset, name)) or "")


@pytest.mark.parametrize(
    "function",
    [getattr(ms, name) for name in PUBLIC if inspect.isfunction(getattr(ms, name))]
    + [getattr(ms.Dataset, name) for name in VERBS],
    ids=lambda function: function.__name__,
)
def test_options_are_keyword_only_and_typed(function: Any) -> None:
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(positional) <= (3 if function is ms.replay else 2)
    assert all(p.annotation is not p.empty for p in parameters)


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    names = {path.stem for path in PACKAGE.rglob("*.py") if not path.stem.startswith("_")}
    assert names & set(sys.stdlib_module_names) == set()


# -- import -------------------------------------------------------------------------------------------------------------

AT_IMPORT = """
import json, logging, os, random, sys, threading
import numpy as np, torch, torchdata.stateful_dataloader
def look():
    return {
        "environment": dict(os.environ),
        "threads": threading.active_count(),
        "handlers": [len(logging.getLogger(name).handlers) for name in (None, "midstream")],
        "generators": repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist())),
        "signals": repr([__import__("signal").getsignal(number) for number in range(1, 32)]),
        "folder": sorted(os.listdir(".")),
    }
before = look()
import midstream
after = look()
print(json.dumps({"changed": [key for key in before if before[key] != after[key]], "modules": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What importing midstream does to a fresh process in which every warning is an error."""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", AT_IMPORT],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path_factory.mktemp("empty"),
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def test_nothing_happens_at_import(imported: dict[str, Any]) -> None:
    assert imported["changed"] == []


@pytest.mark.parametrize(
    "module",
    [
        "typer",
        "rich",
        "matplotlib",
        "IPython",
        "datasets",
        "pytest",
        "midstream.cli",
        "midstream.display",
    ],
)
def test_importing_midstream_does_not_import(module: str, imported: dict[str, Any]) -> None:
    assert module not in imported["modules"]


# -- layers -------------------------------------------------------------------------------------------------------------

FILES = sorted(PACKAGE.rglob("*.py"))


def layer(module: str) -> str:
    """The layer of ``midstream``, ``midstream.pipeline.node``, ``midstream.nodes.map``, ..."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """What a file imports, and whether inside a function."""

    def visit(node: ast.AST, late: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, late
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: a relative import"
                assert child.module is not None
                for alias in child.names:
                    submodule = PACKAGE.parent.joinpath(
                        *child.module.split("."), f"{alias.name}.py"
                    )
                    yield (
                        (f"{child.module}.{alias.name}" if submodule.is_file() else child.module),
                        late,
                    )
            elif not (
                isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            ):  # names for types run nothing
                yield from visit(
                    child,
                    late or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)),
                )

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_files_above_it(path: Path) -> None:
    here = layer(module_of(path))
    assert here in LAYERS, (
        f"{path.name} has no place in the layers: add it to DESIGN.md section 7 and to LAYERS here"
    )
    wrong = []
    for name, late in imports(path):
        if name.split(".")[0] != "midstream":
            continue
        there = layer(name)
        below = LAYERS.index(there) > LAYERS.index(here) or (
            there == here and "." not in module_of(path)
        )
        if below and not (late and (here, there) in LATE):
            wrong.append(f"{here} imports {name}{' inside a function' if late else ''}")
    assert wrong == []


@pytest.mark.parametrize("folder", ["nodes", "sources"])
def test_files_of_one_folder_do_not_import_each_other_in_a_circle(folder: str) -> None:
    graph = {
        module_of(path): {
            name for name, _ in imports(path) if name.startswith(f"midstream.{folder}.")
        }
        for path in FILES
        if layer(module_of(path)) == folder and path.stem != "__init__"
    }
    while graph:
        free = {module for module, needed in graph.items() if not needed & set(graph)}
        assert free, f"these import each other: {sorted(graph)}"
        graph = {module: needed for module, needed in graph.items() if module not in free}


def test_only_the_loader_knows_torchdata() -> None:
    users = {
        module_of(path)
        for path in FILES
        for name, _ in imports(path)
        if name.split(".")[0] == "torchdata"
    }
    assert users == {"midstream.loader"}


def test_optional_packages_are_imported_where_they_are_used() -> None:
    for path in FILES:
        for name, late in imports(path):
            if name.split(".")[0] in (
                "typer",
                "rich",
                "matplotlib",
                "IPython",
                "datasets",
                "pandas",
            ):
                assert late, f"{path.name} imports {name} at import"
