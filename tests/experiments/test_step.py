# SPDX-License-Identifier: Apache-2.0
"""The step benchmark: modes take the step they claim, and what cannot run says why."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "benchmarks"))

import modes
import step as benchmark
from modes import MODES, Skipped, build


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {name: lambda: modes.lipschitz_mlp(modes.SHAPE, modes.CLASSES, 0.0, widths=[8]) for name in modes.MODELS}
    monkeypatch.setattr(modes, "MODELS", tiny)


def test_rows_and_figure(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    out, picture = tmp_path / "rows.json", tmp_path / "step.png"
    arguments = "--models mlp --batches 4 6 --modes plain projected clip_free vmap --seconds 0 --peak-modes --threads 1"
    try:
        assert benchmark.main([*arguments.split(), "--json", str(out), "--figure", str(picture)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(out.read_text())
    assert [(r["batch"], r["mode"]) for r in rows] == [
        (b, m) for b in (4, 6) for m in ("plain", "projected", "clip_free", "vmap")
    ]
    for row in rows:
        assert row["ms"] > 0 and row["rounds"] >= 3 and row["peak_mib"] is None
        assert row["ratio_to_plain"] > 0 and row["ratio_to_projected"] > 0
    assert all(r["ratio_to_plain"] == 1.0 for r in rows if r["mode"] == "plain")
    assert picture.stat().st_size > 1000
    again = tmp_path / "again.png"
    assert benchmark.main(["--saved", str(out), "--processor", "--figure", str(again)]) == 0
    assert again.stat().st_size > 1000


@pytest.mark.parametrize("mode", ["clip_free", "opacus_hooks", "opacus_ghost", "vmap"])
def test_private_modes_move_the_weights_noisily_and_plain_ones_do_not(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[nn.Module] = []
    tiny = modes.MODELS["mlp"]
    monkeypatch.setitem(modes.MODELS, "mlp", lambda: made.append(tiny()) or made[-1])
    for kind in (mode, mode, "plain", "plain"):
        build("mlp", 5, kind, "cpu", 1.0)()
    noisy, again, plain, same = (torch.cat([p.detach().flatten() for p in net.parameters()]) for net in made)
    assert torch.equal(plain, same) and not torch.equal(noisy, plain)
    assert (mode == "clip_free") == (not torch.equal(noisy, again)), "the others draw from torch's seeded generator"


def test_what_does_not_fit_is_skipped_with_a_reason() -> None:
    for mode in ("vmap", "opacus_hooks"):
        with pytest.raises(Skipped, match="GiB"):
            build("mlp", 1000, mode, "cpu", 1e-6)


def test_every_mode_is_described() -> None:
    assert all(f"``{mode}``" in benchmark.__doc__ for mode in MODES)
