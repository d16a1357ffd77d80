# SPDX-License-Identifier: Apache-2.0
"""Imports point downwards only, heavy packages stay behind their doors, and every layer has its test."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BASE = {"dplip.errors", "dplip.norms"}
MATRICES = {"dplip.aol", "dplip.conv_norm", "dplip.conv_symbol", "dplip.operator_norm"}
UP_TO_LAYERS = BASE | MATRICES | {"dplip.kernels", "dplip.layers"}
PROOFS = {"accountants", "dplip.audit", "dplip.bounds", "dplip.certify", "dplip.losses", "dplip.privacy"}
PARTS = {"dplip.checkpoint", "dplip.config", "dplip.data", "dplip.features", "dplip.models", "dplip.plots"}
UP_TO_REPORT = UP_TO_LAYERS | PROOFS | PARTS | {"dplip.report"}

BELOW = {  # package or module -> what it may import, itself aside
    "accountants": set(),
    "dplip.errors": set(),
    "dplip.norms": {"dplip.errors"},
    "dplip.operator_norm": BASE,
    "dplip.aol": BASE | {"dplip.operator_norm"},
    "dplip.conv_symbol": BASE | {"dplip.operator_norm"},
    "dplip.conv_norm": BASE | {"dplip.aol", "dplip.conv_symbol", "dplip.operator_norm"},
    "dplip.kernels": {"dplip.errors"},
    "dplip.layers": BASE | MATRICES | {"dplip.kernels"},
    "dplip.features": UP_TO_LAYERS,
    "dplip.bounds": BASE | {"dplip.layers", "dplip.operator_norm"},
    "dplip.losses": BASE | {"dplip.bounds"},
    "dplip.margin_losses": BASE | {"dplip.losses"},
    "dplip.lipschitz_losses": BASE | {"dplip.losses"},
    "dplip.multiplicity": BASE | {"dplip.losses"},
    "dplip.privacy": BASE | {"accountants", "dplip.bounds", "dplip.checkpoint", "dplip.layers", "dplip.losses"},
    "dplip.certify": BASE | {"dplip.bounds", "dplip.layers", "dplip.operator_norm"},
    "dplip.audit": UP_TO_LAYERS | PROOFS - {"dplip.audit"},
    "dplip.recipes": BASE | {"dplip.bounds", "dplip.certify", "dplip.layers", "dplip.losses", "dplip.margin_losses"},
    "dplip.models": BASE | {"dplip.layers"},
    "dplip.data": {"dplip.errors"},
    "dplip.checkpoint": {"dplip.errors"},
    "dplip.config": {"dplip.errors"},
    "dplip.plots": {"dplip.errors"},
    "dplip.report": BASE | PROOFS - {"dplip.audit"} | {"dplip.plots"},
    "dplip.progress": UP_TO_REPORT,
    "dplip.session": UP_TO_REPORT,
    "dplip.trainer": UP_TO_REPORT | {"dplip.session"},
    "dplip.planning": UP_TO_REPORT | {"dplip.session"},
    "dplip.auditing": UP_TO_REPORT | {"dplip.session", "dplip.trainer"},
    "dplip.testing": UP_TO_REPORT,
    "dplip.interop": UP_TO_REPORT | {"dplip.session", "dplip.trainer"},
    "dplip.cli": UP_TO_REPORT
    | {
        "dplip.auditing",
        "dplip.interop",
        "dplip.planning",
        "dplip.progress",
        "dplip.session",
        "dplip.testing",
        "dplip.trainer",
    },
}

TYPES_ONLY = {"dplip.plots": {"dplip.report"}}  # may be named for annotations, under `if TYPE_CHECKING:`

DOORS = {  # third-party package -> the only files of ours (a file, or a folder ending in /) that import it
    "dp_accounting": ("accountants/",),
    "mlflow": ("dplip/interop/mlflow.py",),
    "opacus": ("dplip/interop/opacus/",),
    "triton": ("dplip/kernels/triton/",),
}

MODULES = sorted(p.relative_to(ROOT) for top in ("accountants", "dplip") for p in (ROOT / top).rglob("*.py"))
LAYERS = sorted(p.stem for p in (ROOT / "dplip/layers").glob("*.py") if p.stem not in ("__init__", "base"))


def dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def package(name: str) -> str:
    parts = name.split(".")
    return parts[0] if parts[0] == "accountants" else ".".join(parts[:2])


def type_checking(tree: ast.AST) -> set[ast.AST]:
    """Returns the nodes that only a type checker reads."""
    blocks = (
        node.body
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    )
    return {inner for body in blocks for statement in body for inner in ast.walk(statement)}


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[ast.AST, str]]:
    """Yields every import in ``tree``, wherever it stands, as its node and its dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            stem = ".".join([*parents, *(node.module.split(".") if node.module else [])])
            # `from dplip import report` names the module dplip.report.
            yield from ((node, f"{stem}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("__import__", "import_module") and isinstance(node.args[0].value, str):
                yield node, node.args[0].value


def offences(path: Path, source: str) -> list[str]:
    """Returns each import of ``source`` that a file at ``path`` may not have."""
    module, found = dotted(path), []
    tree = ast.parse(source)
    unread = type_checking(tree)
    for node, name in imports(tree, module, path.name == "__init__.py"):
        top = name.split(".")[0]
        if top in ("accountants", "dplip"):
            if name == "dplip.__version__" or package(name) == package(module):
                continue
            if node in unread and package(name) in TYPES_ONLY.get(module, set()):
                continue
            if package(name) not in BELOW.get(package(module), set()):
                found.append(f"{module} must not import {name}")
        elif top in DOORS and not any(
            path.as_posix() == door or (door.endswith("/") and path.as_posix().startswith(door)) for door in DOORS[top]
        ):
            found.append(f"only {', '.join(DOORS[top])} may import {top}")
        elif top == "torch" and package(module) == "accountants":
            found.append("accountants must not import torch")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.as_posix())
def test_imports_point_down(path: Path) -> None:
    assert dotted(path) == "dplip" or package(dotted(path)) in BELOW, "a new package needs its line in BELOW"
    assert offences(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_below_has_no_cycle() -> None:
    assert all(below <= set(BELOW) for below in BELOW.values())
    order = list(graphlib.TopologicalSorter(BELOW).static_order())
    assert set(order) == set(BELOW)


def test_privacy_and_certify_never_meet() -> None:
    for start, other in (("dplip.privacy", "dplip.certify"), ("dplip.certify", "dplip.privacy")):
        seen, waiting = set(), {start}
        while waiting:
            seen |= waiting
            waiting = set().union(*(BELOW[name] for name in waiting)) - seen
        assert other not in seen


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dplip/privacy/plan.py", "from dplip.certify.margin import certify"),
        ("dplip/privacy/plan.py", "from dplip import certify"),
        ("dplip/privacy/plan.py", "from ..certify import margin"),
        ("dplip/privacy/__init__.py", "from ..certify import margin"),
        ("dplip/certify/margin.py", "def f():\n    import dplip.privacy.plan"),
        ("dplip/layers/linear.py", "import importlib\nimportlib.import_module('dplip.bounds')"),
        ("dplip/norms.py", "from . import layers"),
        ("dplip/unknown.py", "import dplip.norms"),
        ("dplip/__init__.py", "from dplip.trainer import train"),
        ("accountants/pld.py", "import torch.nn"),
        ("accountants/pld.py", "from dplip.errors import DplipError"),
        ("dplip/cli.py", "import mlflow.pytorch"),
        ("dplip/interop/mlflow.py", "from opacus import PrivacyEngine"),
        ("dplip/layers/linear.py", "import triton.language as tl"),
        ("dplip/report.py", "from dp_accounting import pld"),
        ("dplip/plots.py", "from dplip.report import Report"),
        ("dplip/plots.py", "if TYPE_CHECKING:\n    pass\nelse:\n    from dplip.report import Report"),
        ("dplip/privacy/plan.py", "if TYPE_CHECKING:\n    from dplip.certify import Certificate"),
    ],
)
def test_offence_is_seen(path: str, source: str) -> None:
    assert len(offences(Path(path), source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dplip/layers/linear.py", "from .base import LipschitzLayer\nfrom ..norms import Norms"),
        ("dplip/layers/__init__.py", "from . import base"),
        ("dplip/interop/mlflow.py", "import mlflow\nfrom dplip.report import Report"),
        ("dplip/kernels/triton/distance.py", "import triton"),
        ("dplip/plots.py", "if TYPE_CHECKING:\n    from dplip.report import Report"),
        ("dplip/cli.py", "from dplip import __version__, trainer"),
    ],
)
def test_rightful_import_is_let_through(path: str, source: str) -> None:
    assert offences(Path(path), source) == []


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("dplip", ("dp_accounting", "matplotlib", "mlflow", "opacus", "sklearn", "triton")),
        ("dplip.data", ("matplotlib", "mlflow", "opacus", "sklearn")),
        ("accountants", ("dplip", "torch")),
    ],
)
def test_import_is_light(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("stem", LAYERS)
def test_every_layer_has_its_test(stem: str) -> None:
    assert (ROOT / "tests/layers" / f"test_{stem}.py").is_file()


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_check_is_an_assert(path: Path) -> None:
    """``python -O`` drops them, and ``assert (condition, message)`` never fails: one of the original privacy bugs."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree))
