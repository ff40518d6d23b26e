from __future__ import annotations

import ast
import types

import pytest
from helpers import ROOT, python

import nasplat


@pytest.mark.parametrize("call", ["", "; nasplat.Task.digits().load(); nasplat.Study"])
def test_import_nasplat_loads_neither_ray_nor_mlflow_nor_onnx(call):
    script = f"import sys, nasplat{call}; print(sorted(name for name in sys.modules if '.' not in name))"
    out, err = python(script).communicate(timeout=200)
    loaded = set(ast.literal_eval(out.strip() or "None") or ()) or pytest.fail(err)
    assert "torch" in loaded
    assert loaded.isdisjoint({"ray", "mlflow", "onnx", "onnxscript", "onnxruntime", "optuna"})
    assert loaded.isdisjoint({"search_spaces", "strategies"})


def test_all_lists_the_public_names_in_order():
    public = [
        name
        for name, value in vars(nasplat).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and name not in ("PackageNotFoundError", "version")
    ]
    assert nasplat.__all__ == sorted(public)
    assert len(set(nasplat.__all__)) == len(nasplat.__all__)


def test_the_stable_names_are_there():
    assert set(nasplat.__all__) >= {
        "Architecture", "Candidate", "Count", "Evaluate", "Explore", "Group", "History", "Latency", "NasplatError",
        "NasplatWarning", "Recipe", "Report", "Result", "SearchInterrupted", "SearchSpace", "Strategy", "Study",
        "Supernet", "Task", "Trial", "at_least", "at_most", "load", "maximise", "minimise", "space_from",
    }  # fmt: skip


def imports(path):
    """Modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            yield node.module or ""


@pytest.mark.parametrize("path", sorted((ROOT / "nasplat").rglob("*.py")), ids=lambda path: path.stem)
def test_the_core_imports_no_space_and_no_strategy(path):
    tops = {name.partition(".")[0] for name in imports(path)}
    assert tops.isdisjoint({"search_spaces", "strategies", "studies", "tests", "helpers"})
    if path.name != "ray_tune.py":
        assert "ray" not in tops
    if path.name != "mlflow_tracker.py":
        assert "mlflow" not in tops
