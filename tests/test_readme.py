# SPDX-License-Identifier: Apache-2.0
"""The README's training script runs as printed and keeps its promises."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_training_script(capsys):
    (script,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "ClipFreeEngine" in b]
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(script, "README.md", "exec"), names)
    certified = float(capsys.readouterr().out)
    clean = (names["certificate"].predicted == names["y"]).double().mean().item()
    assert clean > 0.6 and 0.2 < certified < clean
    assert names["optimizer"].plan.epsilon() <= 3.0
    assert names["optimizer"].steps_taken == names["optimizer"].plan.steps


def test_files_named_in_the_readme_exist():
    root = Path(__file__).parents[1]
    for path in re.findall(r"`((?:dplip|experiments|tests)/[\w./]+)`", README):
        assert (root / path).exists(), path
