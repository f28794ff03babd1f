"""The import graph: packages in floors, arrows one way, vLLM in engine/ alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vllm_ppd"
# Each room may import what stands before it. Rooms of one set do not know each other.
FLOORS = (
    {"files", "__init__"},
    {"hub"},
    {"prompt_tokens", "trees"},
    {"kernels", "train", "config"},
    {"search"},
    {"adaptive", "calibrate"},
    {"engine"},
    {"cli"},
    {"plugin", "__main__"},
)
CORE = ("trees", "search", "adaptive", "prompt_tokens")
LOOSE = {"__init__", "__main__", "plugin", "config", "files", "hub"}


def room(module: str) -> str:
    """The package, or the loose module, that a module of ours belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


@cache
def imports() -> dict[str, set[str]]:
    """For each module of ours the modules that it imports, wherever it does."""
    graph = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: relative import"
                names.add(str(node.module))
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
        graph[module_name(path)] = names
    return graph


def own_imports() -> dict[str, set[str]]:
    graph = imports()
    return {
        name: {each for each in used if each in graph} for name, used in graph.items()
    }


def test_no_module_is_loose():
    assert {path.stem for path in PACKAGE.glob("*.py")} == LOOSE
    assert {
        p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()
    } | LOOSE == (set.union(*FLOORS))


def test_arrows_point_one_way():
    floor = {name: index for index, names in enumerate(FLOORS) for name in names}
    # The engine and the commands share a floor: commands start engines.
    wrong = [
        f"{name} -> {used}"
        for name, all_used in own_imports().items()
        for used in all_used
        if room(used) != room(name)
        and floor[room(used)] >= floor[room(name)]
        # The package's own name and version.
        and used != "vllm_ppd"
    ]
    assert not wrong


def test_no_circle():
    graph = {name: used - {"vllm_ppd"} for name, used in own_imports().items()}
    TopologicalSorter(graph).prepare()  # its error names a circle


def test_only_the_engine_imports_vllm():
    users = {
        name
        for name, used in imports().items()
        if any(each.split(".")[0] == "vllm" for each in used)
    }
    assert {room(name) for name in users} == {"engine"}


@pytest.mark.parametrize(
    ("rooms", "absent"),
    [
        *(({each}, {"vllm", "transformers"}) for each in CORE),
        (set.union(*FLOORS) - {"engine", "__main__"}, {"vllm"}),
    ],
)
def test_what_is_not_loaded(rooms, absent):
    names = sorted(name for name in imports() if room(name) in rooms)
    names = [name for name in names if not name.startswith("vllm_ppd.kernels.triton")]
    code = f"import sys, {', '.join(names)}\nassert not {absent} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
