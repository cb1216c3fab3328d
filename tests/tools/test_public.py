"""The public names, side effects of importing the package, and its structure (LAYOUT.md, section 1)."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

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

# Packages and top-level files in their one order: a file imports from what stands above it here, or
# from its own package. `midstream` is the package's `__init__`.
ORDER = [
    "errors",
    "common",
    "metrics",
    "transport",
    "pipeline",
    "distributed",
    "checkpoint",
    "nodes",
    "display",
    "dataset",
    "combine",
    "plot",
    "changes",
    "workers",
    "sources",
    "loader",
    "materialize",
    "lightning",
    "transformers",
    "midstream",
    "testing",
    "examples",
    "cli",
    "__main__",
]

# Packages that may be missing, or that take long to import: imported inside the functions that use
# them. Everything else is imported at the top of a file.
OPTIONAL = {
    "IPython",
    "PIL",
    "accelerate",
    "datasets",
    "dill",
    "lightning",
    "matplotlib",
    "orjson",
    "pandas",
    "pytorch_lightning",
    "ray",
    "rich",
    "tqdm",
    "transformers",
    "typer",
}

# Private names of other projects that are really needed. Nothing of ours is ever in this list.
FOREIGN_PRIVATE = {
    "_add_dataloader",  # accelerate: a loader registers itself while it is iterated
    "_remove_dataloader",
    "_data_fetcher",  # lightning: how far it has read ahead
    "_num_ready_batches_reached",
    "_mode",
    "_iterator",
    "_ex_iterable",  # datasets: shards of a stream
    "_extra_reducers",  # multiprocessing: reducers that other packages registered
    "_popen",
    "_remove_worker_pids",  # torch: its iterator over worker processes
    "_reader",
    "_shutdown",
    "_shutdown_workers",
    "_worker_result_queue",
    "_exit",  # the standard library's documented ones
    "_getframe",
    "_replace",
    "_fields",
    "_repr_html_",  # IPython's protocol
}

MAX_FILE_LINES, MAX_CLASS_LINES, MAX_FUNCTION_LINES = 500, 400, 60  # docstrings not counted
MAX_FILES_AT_THE_TOP = 14


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


@pytest.mark.processes
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
    ],
)
@pytest.mark.processes
def test_importing_midstream_does_not_import(module: str, imported: dict[str, Any]) -> None:
    assert module not in imported["modules"]


# -- structure ----------------------------------------------------------------------------------------

FILES = {
    ".".join(
        path.relative_to(PACKAGE.parent)
        .with_suffix("")
        .parts[: -1 if path.stem == "__init__" else None]
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}
every_file = pytest.mark.parametrize("module", FILES)

Function = (ast.FunctionDef, ast.AsyncFunctionDef)


class Import(NamedTuple):
    """One imported name.

    Attributes:
        module: The module that is imported, or that the name is imported from.
        name: The name, where it is not itself a module of the package.
        inside: Whether the import stands inside a function.
        for_types: Whether it stands under ``TYPE_CHECKING``.
        line: Its line.
    """

    module: str
    name: str
    inside: bool
    for_types: bool
    line: int


@functools.cache
def imports(module: str) -> list[Import]:
    """All imports of a file: at its top, in functions and under ``TYPE_CHECKING``."""
    found: list[Import] = []

    def visit(node: ast.AST, inside: bool, for_types: bool) -> None:
        inside = inside or isinstance(node, (*Function, ast.Lambda))
        if isinstance(node, ast.If):
            for_types = for_types or "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{module}: a relative import"
            whole = [(f"{node.module}.{alias.name}", alias.name) for alias in node.names]
            names = [(path, "") if path in FILES else (node.module, name) for path, name in whole]
        else:
            names = []
        found.extend(Import(path, name, inside, for_types, node.lineno) for path, name in names)
        for child in ast.iter_child_nodes(node):
            visit(child, inside, for_types)

    visit(TREES[module], False, False)
    return found


def package_of(module: str) -> str:
    """``nodes`` for ``midstream.nodes.map``, ``midstream`` for the package itself."""
    return module.split(".")[1] if "." in module else module


def own_imports(module: str) -> list[Import]:
    return [each for each in imports(module) if each.module.split(".")[0] == "midstream"]


def importers_of(*names: str) -> set[str]:
    """The files that import one of these modules, or a part of it."""
    return {
        module
        for module in FILES
        for each in imports(module)
        for name in names
        if f"{each.module}.{each.name}.".startswith(f"{name}.")
    }


@every_file
def test_a_file_imports_only_from_packages_above_it(module: str) -> None:
    here = package_of(module)
    assert here in ORDER, f"{module} has no place in ORDER: see LAYOUT.md, section 1"
    wrong = [
        f"line {each.line}: {each.module}"
        for each in own_imports(module)
        if (there := package_of(each.module)) != here and ORDER.index(there) > ORDER.index(here)
    ]
    assert wrong == []


def test_no_file_imports_another_in_a_circle() -> None:
    graph = {
        module: {each.module for each in own_imports(module)} & set(FILES) - {module}
        for module in FILES
    }
    while free := [module for module, needed in graph.items() if not needed & set(graph)]:
        for module in free:
            del graph[module]
    # What is left is in a circle or imports one: leave only what is imported as well.
    while last := [module for module in graph if not any(module in graph[each] for each in graph)]:
        for module in last:
            del graph[module]
    assert sorted(graph) == []


@every_file
def test_only_optional_packages_are_imported_inside_functions(module: str) -> None:
    wrong = [
        f"line {each.line}: {each.module}"
        for each in imports(module)
        if each.inside
        and (top := each.module.split(".")[0]) not in OPTIONAL
        and top not in sys.stdlib_module_names
    ]
    assert wrong == []


def test_optional_packages_are_imported_where_they_are_used() -> None:
    """Importing midstream must not import them; an adapter may, for it is imported by its users."""
    adapters = {"midstream.lightning", "midstream.transformers"}
    wrong = [
        f"{module}, line {each.line}: {each.module}"
        for module in FILES
        if module not in adapters
        for each in imports(module)
        if not (each.inside or each.for_types)
        and each.module.split(".")[0] in OPTIONAL - {"tqdm", "orjson", "dill"}
    ]
    assert wrong == []


def lines_without_docstrings(node: ast.AST, first: int, last: int) -> int:
    """Lines from ``first`` to ``last`` but for the docstrings of ``node`` and what is in it."""
    documented = (ast.Module, ast.ClassDef, *Function)
    docstrings = [
        each.body[0]
        for each in ast.walk(node)
        if isinstance(each, documented) and ast.get_docstring(each, clean=False) is not None
    ]
    return last - first + 1 - sum((text.end_lineno or 0) - text.lineno + 1 for text in docstrings)


@every_file
def test_files_classes_and_functions_are_short(module: str) -> None:
    num_lines = len(FILES[module].read_text(encoding="utf-8").splitlines())
    tree = TREES[module]
    long = {}
    if (size := lines_without_docstrings(tree, 1, num_lines)) > MAX_FILE_LINES:
        long["file"] = size
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, *Function)):
            size = lines_without_docstrings(node, node.lineno, node.end_lineno or 0)
            if size > (MAX_CLASS_LINES if isinstance(node, ast.ClassDef) else MAX_FUNCTION_LINES):
                long[node.name] = size
    assert long == {}


def test_few_files_stand_at_the_top() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_FILES_AT_THE_TOP


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined_names(tree: ast.Module) -> set[str]:
    """Names that a file defines: functions, classes, variables, attributes it assigns."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, *Function)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def is_of_the_object_itself(node: ast.expr) -> bool:
    """Whether an expression is ``self``, ``cls`` or ``super()``."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@every_file
def test_private_names_stay_in_their_file(module: str) -> None:
    own = defined_names(TREES[module]) | FOREIGN_PRIVATE
    attributes = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Attribute)
        and is_private(node.attr)
        and node.attr not in own
        and not is_of_the_object_itself(node.value)
    ]
    imported = [
        f"line {each.line}: {each.module}.{each.name}"
        for each in own_imports(module)
        if is_private(each.name or each.module.rpartition(".")[2])
    ]
    assert attributes + imported == []


# What only some files know, as LAYOUT.md section 1 has it.


def test_only_the_processes_and_the_loaders_base_class_know_torchdata() -> None:
    assert importers_of("torchdata") == {"midstream.loader.loader", "midstream.workers.processes"}


def test_only_transport_knows_shared_memory() -> None:
    users = importers_of("mmap", "multiprocessing.shared_memory")
    assert {package_of(module) for module in users} == {"transport"}


def test_only_distributed_knows_torch_distributed() -> None:
    """Examples are programs of users."""
    users = importers_of("torch.distributed") | {
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
    }
    assert {package_of(module) for module in users} - {"examples"} == {"distributed"}


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    """But in packages, where LAYOUT.md has some whose names say what they hold."""
    names = {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("_")}
    assert names & set(sys.stdlib_module_names) == set()


# -- files that documentation names ------------------------------------------------------------------

README = PACKAGE.parent.parent / "README.md"
NAMED_FILE = re.compile(r"\b((?:[a-z_]+/)+(?:[a-z_]+\.py|\{[a-z_,]+\})?|[a-z_]+\.py)(?![\w*])")


def named_files(text: str) -> list[str]:
    """Files and folders that a text names, with ``a/{b,c}`` as ``a/b.py`` and ``a/c.py``."""
    found = []
    for name in NAMED_FILE.findall(text):
        folder, brace, inner = name.partition("{")
        if brace:
            found += [f"{folder}{each}.py" for each in inner.rstrip("}").split(",")]
        else:
            found.append(name)
    return found


@pytest.mark.parametrize(
    ("module", "heading"),
    [
        ("midstream.pipeline", "The way of a sample"),
        ("midstream.checkpoint", "The way of a state"),
    ],
)
def test_the_files_on_the_way_exist(module: str, heading: str) -> None:
    text = ast.get_docstring(TREES[module]) or ""
    assert heading in text
    files = [name for name in named_files(text) if not name.endswith("/")]
    assert len(files) >= 4, "the docstring names the files on the way, as `pipeline/rows.py`"
    assert [name for name in files if not (PACKAGE / name).is_file()] == []


def test_the_folders_and_files_in_the_readmes_picture_exist() -> None:
    develop = README.read_text(encoding="utf-8").partition("## Develop")[2]
    assert develop
    roots = (PACKAGE, PACKAGE.parent.parent)
    names = named_files(develop)
    assert {name.rstrip("/") for name in names} >= {"pipeline", "loader"}
    assert [name for name in names if not any((root / name).exists() for root in roots)] == []
