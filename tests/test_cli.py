# SPDX-License-Identifier: Apache-2.0
"""The command line: results on stdout, refusals in one line with exit code 2 before anything is spent."""

import gzip
import json
import math
import re
from pathlib import Path

import pytest
from torch import nn

from dplip import data, models
from dplip.cli import main
from dplip.config import load_config
from dplip.session import prepare

TINY = """
name = "tiny"
[data]
name = "digits"
reference = 0.3
[model]
kind = "lipschitz_mlp"
widths = [8]
input_radius = 3.0
[privacy]
population = 1437
batch_size = 360
delta = 1e-4
steps = 8
noise_multiplier = 1.5
[optimizer]
kind = "sgd"
lr = 0.3
[certify]
linf = [0.01]
l2 = [0.1]
method = "margin"
examples = 40
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def refused(capsys, *argv):
    """Run, require exit code 2 and one line on stderr, and return that line."""
    assert main(list(map(str, argv))) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert captured.out == ""
    return lines[0]


def test_epsilon_is_the_first_number(capsys):
    argv = "epsilon --noise-multiplier 1 --sampling-prob 0.01 --steps 1000 --delta 1e-5".split()
    assert main(argv) == 0
    value = float(re.search(r"[\d.]+", capsys.readouterr().out).group())
    assert 1.828243 <= value <= 1.8293
    assert main([*argv, "--accountant", "rdp"]) == 0
    assert 2.10 <= float(capsys.readouterr().out.split()[0]) <= 2.11
    assert main([*argv, "--neighbors", "replace_one"]) == 0
    assert float(capsys.readouterr().out.split()[0]) > 2.8


def test_calibrate_prints_enough_noise(capsys):
    terms = "--sampling-prob 0.1 --steps 100 --delta 1e-5".split()
    assert main(["calibrate", "--epsilon", "3", *terms]) == 0
    z = capsys.readouterr().out.split()[0]
    assert main(["epsilon", "--noise-multiplier", z, *terms]) == 0
    assert 2.99 <= float(capsys.readouterr().out.split()[0]) <= 3.0


def test_plan_reads_no_data(capsys, config, monkeypatch):
    monkeypatch.setenv("DPLIP_DATA", "/nowhere")
    text = TINY.replace("digits", "mnist")
    config.write_text(text)
    assert main(["plan", "--config", str(config), "--format", "json"]) == 0
    table = json.loads(capsys.readouterr().out)
    tensors = table["sensitivity"]["tensors"]
    assert set(tensors) == {"3.weight", "5.weight"}
    assert all(t["sigma"] > 0 and t["signal_to_noise"] > 0 for t in tensors.values())
    assert table["sensitivity"]["total"] ** 2 == pytest.approx(sum(t["bound"] ** 2 for t in tensors.values()))
    assert main(["plan", "--config", str(config)]) == 0
    assert capsys.readouterr().out.startswith("epsilon ")


def test_train_certify_report(capsys, config, tmp_path):
    out = tmp_path / "runs" / "one"
    assert main(["train", "--config", str(config), "--out", str(out), "--no-mlflow", "--seed", "4"]) == 0
    assert "certified linf 0.01" in capsys.readouterr().out
    assert main(["certify", "--run", str(out)]) == 0
    captured = capsys.readouterr()
    report = json.loads((out / "report.json").read_text())
    assert json.loads(captured.out) == report["robustness"]
    assert "matches" in captured.err
    assert report["seed"] == 4
    assert main(["audit", "--run", str(out), "--points", "10", "--restarts", "2", "--steps", "5"]) == 0
    audit = json.loads(capsys.readouterr().out)
    assert not audit["refuted"] and audit["certificates"]["l2"] == {"attacked": 10, "flipped": 0}
    assert all(0 < row["ratio"] <= 1 + 1e-6 for row in audit["gradients"].values())
    assert main(["report", "--run", str(out), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == report
    assert main(["report", "--run", str(out)]) == 0
    assert capsys.readouterr().out.startswith("# tiny")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["privacy.delta=1.0"], "delta"),
        (["privacy.delta=0.0"], "delta"),
        (["privacy.noise_multiplier=-1.0"], "noise_multiplier"),
        (["privacy.sigma=1"], "sigma"),
        (["model.kind=transformer"], "transformer"),
        (["model.width=[3]"], "width"),
        (["privacy.accountant=gdp"], "accountant"),
        (["privacy.allocation=guess"], "allocation"),
        (["data.name=imagenet"], "imagenet"),
        (["loss.temperature=-1"], "temperature"),
        (["nonsense"], "nonsense"),
        (["privacy.sampling=truncated_poisson"], "max_batch_size"),
    ],
)
def test_train_refuses_before_writing(capsys, config, tmp_path, overrides, named):
    out = tmp_path / "runs" / "refused"
    argv = [arg for o in overrides for arg in ("--set", o)]
    line = refused(capsys, "train", "--config", config, "--out", out, *argv)
    assert named in line
    assert not out.parent.exists()


def test_missing_data_dir(capsys, config, tmp_path):
    line = refused(capsys, "train", "--config", config, "--data-dir", tmp_path / "absent", "--out", tmp_path / "o")
    assert "absent" in line and "--data-dir" in line
    config.write_text(TINY.replace('"digits"', '"mnist"'))
    line = refused(capsys, "train", "--config", config, "--data-dir", tmp_path, "--out", tmp_path / "o")
    assert "mnist" in line


def test_truncated_idx(capsys, config, tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part in ("train", "t10k"):
        for kind, header in (("images-idx3", (0x803, 4, 28, 28)), ("labels-idx1", (0x801, 4))):
            size = 4 * 784 if "images" in kind else 4
            body = b"".join(n.to_bytes(4, "big") for n in header) + bytes(size)
            cut = body[:-7] if (part, kind) == ("train", "images-idx3") else body
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(cut))
    config.write_text(TINY.replace('"digits"', '"mnist"'))
    line = refused(capsys, "train", "--config", config, "--data-dir", tmp_path, "--out", tmp_path / "o")
    assert "train-images" in line
    assert not (tmp_path / "o").exists()


def test_resume_with_a_changed_plan(capsys, config, tmp_path):
    out = tmp_path / "runs" / "one"
    assert main(["train", "--config", str(config), "--out", str(out), "--no-mlflow"]) == 0
    capsys.readouterr()
    base = ("train", "--config", config, "--out", out, "--no-mlflow")
    assert "--resume" in refused(capsys, *base)
    assert "privacy" in refused(capsys, *base, "--resume", "--set", "privacy.steps=16")
    assert "--out" in refused(capsys, "train", "--config", config, "--resume")


def test_a_refuted_claim_is_exit_code_one(capsys, config, tmp_path, monkeypatch):
    out = tmp_path / "runs" / "one"
    assert main(["train", "--config", str(config), "--out", str(out), "--no-mlflow"]) == 0
    monkeypatch.setattr("dplip.auditing.search", lambda *_, **__: {"3.weight": (1.1, 1.0)})
    capsys.readouterr()
    assert main(["audit", "--run", str(out), "--points", "2", "--restarts", "1", "--steps", "1"]) == 1
    assert json.loads(capsys.readouterr().out)["refuted"]


def test_reports_of_nothing(capsys, tmp_path):
    for command in ("report", "certify"):
        assert str(tmp_path) in refused(capsys, command, "--run", tmp_path)
    (tmp_path / "report.json").write_text('{"schema": 99}')
    assert "schema 1" in refused(capsys, "report", "--run", tmp_path)


@pytest.mark.parametrize(
    "argv",
    [
        "epsilon --noise-multiplier 1 --sampling-prob 1.5 --steps 10 --delta 1e-5",
        "epsilon --noise-multiplier nan --sampling-prob 0.5 --steps 10 --delta 1e-5",
        "epsilon --noise-multiplier 1 --sampling-prob 0.5 --steps 0 --delta 1e-5",
        "epsilon --noise-multiplier 1 --sampling-prob 0.5 --steps 10 --delta 1",
        "epsilon --noise-multiplier 1 --sampling-prob 0.5 --steps 10 --delta 1e-5 --accountant gdp",
        "epsilon --noise-multiplier 1 --sampling-prob 0.5 --steps 10 --delta 1e-5 --neighbors friends",
        "calibrate --epsilon -1 --sampling-prob 0.5 --steps 10 --delta 1e-5",
        "calibrate --epsilon inf --sampling-prob 0.5 --steps 10 --delta 1e-5",
    ],
)
def test_accounting_refusals(capsys, argv):
    refused(capsys, *argv.split())


def test_readme_names_only_commands_that_exist():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    commands = set(re.findall(r"`dplip (\w+)", text))
    assert commands == {"plan", "train", "certify", "audit", "report", "epsilon", "calibrate"}


def test_damaged_data(capsys, config, tmp_path, monkeypatch):
    digits = data.load("digits")
    broken = digits.train.x.clone()
    broken[3, 0, 2, 2] = math.nan
    none = data.Split(digits.train.x[:0], digits.train.y[:0])
    for train, named in ((data.Split(broken, digits.train.y), "NaN"), (none, "at least one example")):
        monkeypatch.setitem(
            data.DATASETS,
            "digits",
            lambda _, part=train: data.Dataset("digits", part, digits.test, 10, (1, 8, 8)),
        )
        assert named in refused(capsys, "train", "--config", config, "--out", tmp_path / "o")
        assert not (tmp_path / "o").exists()


def test_a_model_that_mixes_examples(capsys, config, tmp_path, monkeypatch):
    def normalised(input_shape, num_classes, reference, *, widths):
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, widths[0]), nn.BatchNorm1d(widths[0]), nn.Linear(widths[0], 10)
        )

    monkeypatch.setitem(models.MODELS, "normalised", normalised)
    config.write_text(TINY.replace("lipschitz_mlp", "normalised").replace("input_radius = 3.0\n", ""))
    line = refused(capsys, "train", "--config", config, "--out", tmp_path / "o")
    assert "'2' (BatchNorm1d) mixes examples" in line and "ReferenceShift" in line
    assert not (tmp_path / "o").exists()


def test_plan_announces_the_noise_that_training_adds(capsys, config, tmp_path):
    config.write_text(TINY.replace("widths = [8]", 'widths = [8]\nactivation = "spline"'))
    assert main(["plan", "--config", str(config), "--format", "json"]) == 0
    announced = json.loads(capsys.readouterr().out)["sensitivity"]["tensors"]
    session = prepare(load_config(config), data.load("digits"))
    added = session.optimizer.tensors()
    assert set(announced) == set(added)
    for name, (tensor, sigma) in added.items():
        assert (announced[name]["bound"], announced[name]["sigma"]) == pytest.approx((tensor.bound, sigma))
