# SPDX-License-Identifier: Apache-2.0
"""The two tutorial scripts run, keep their budget, and differ in at most five lines."""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments/opacus"
NAMES = ("clip_free", "with_opacus")


def test_the_scripts_differ_in_at_most_five_lines():
    first, second = ((FOLDER / f"{name}.py").read_text().splitlines() for name in NAMES)
    matcher = difflib.SequenceMatcher(a=first, b=second, autojunk=False)
    differing = sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal")
    assert 1 <= differing <= 5
    assert all(len(line) <= 120 for line in (*first, *second))


@pytest.mark.parametrize("name", NAMES)
def test_a_script_trains_within_its_budget(name, tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, "-W", "ignore", str(FOLDER / f"{name}.py"), "--epochs", "2", "--json", str(out)]
    done = subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert 2.9 < result["epsilon"] <= 3.0
    assert result["clean"] > 0.2  # ten classes, two epochs under full noise
    assert 0 <= result["certified_l2_0.25"] <= result["clean"]
