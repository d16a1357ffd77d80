# SPDX-License-Identifier: Apache-2.0
"""End to end on a few hundred digits: train, certify, report, interrupt, resume."""

import itertools
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dplip.auditing import audit_run
from dplip.config import OptimizerConfig, parse_config
from dplip.data import Dataset, Split, load, schema
from dplip.errors import CheckpointError, ConfigError, PlanError
from dplip.planning import plan_table
from dplip.report import Report
from dplip.session import learning_rate_factor, prepare
from dplip.trainer import certify_run, load_model, train


def make_config(**changes):
    values = {
        "name": "tiny",
        "data": {"name": "digits", "reference": 0.3},
        "model": {"kind": "lipschitz_mlp", "widths": [16], "input_radius": 3.0},
        "loss": {"temperature": 4.0},
        "privacy": {"population": 1437, "batch_size": 360, "delta": 1e-4, "steps": 24, "noise_multiplier": 1.0},
        "optimizer": {"kind": "sgd", "lr": 0.3, "average": 0.5},
        "certify": {"linf": [0.01], "l2": [0.1], "method": "margin", "examples": 50},
    }
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    return parse_config(values)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


class Recorder:
    """An observer that notes what was on disk when it was told, and can stop the run."""

    def __init__(self, out, stop_after=None):
        self.out, self.stop_after, self.events, self.ledgers = out, stop_after, [], []

    def start(self, config, plan, first_step):
        self.events.append(("start", first_step))

    def step(self, steps_taken):
        self.events.append(("step", steps_taken))
        if steps_taken == self.stop_after:
            raise KeyboardInterrupt

    def epoch(self, metrics):
        saved = torch.load(self.out / "checkpoint.pt", weights_only=True)
        self.ledgers.append((metrics["steps"], saved["engine"]["steps_taken"]))

    def finish(self, report, out):
        self.events.append(("finish", report.privacy["steps"]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits):
    out = tmp_path_factory.mktemp("runs") / "run"
    recorder = Recorder(out)
    return out, train(make_config(), digits, out, [recorder]), recorder


def test_local_certificates_in_the_joint_report_and_the_audit(finished, digits, tmp_path):
    out, report, _ = finished
    for name in ("config.json", "model.safetensors"):
        shutil.copy(out / name, tmp_path / name)
    config = json.loads((tmp_path / "config.json").read_text())
    config["certify"]["method"] = "local"
    (tmp_path / "config.json").write_text(json.dumps(config))
    section = certify_run(tmp_path, digits, schema)
    assert section["methods"] == ["margin+interval+local in [0, 1]"]
    for norm, rows in section["certified_accuracy"].items():
        assert all(rows[eps] >= report.robustness["certified_accuracy"][norm][eps] for eps in rows)
    audit = audit_run(tmp_path, digits, schema, points=8, restarts=2, steps=5)
    assert not audit.refuted and audit.flips["l2"] == (8, 0)


def test_report_follows_the_schema(finished):
    out, report, _ = finished
    values = json.loads((out / "report.json").read_text())
    assert values["schema"] == 1
    assert {"privacy", "robustness", "model", "data", "seed", "seconds", "versions"} <= set(values)
    privacy = values["privacy"]
    assert {
        "epsilon", "delta", "neighbors", "accountant", "noise_multiplier", "sampling", "sampling_prob", "steps",
        "expected_batch_size", "logit_clipping", "sensitivity",
    } <= set(privacy)  # fmt: skip
    assert privacy["logit_clipping"] is None and privacy["steps"] == 24
    assert privacy["expected_batch_size"] == pytest.approx(360)
    spent = sum((t["bound"] / t["sigma"]) ** 2 for t in privacy["sensitivity"]["tensors"].values())
    assert spent == pytest.approx(1 / privacy["noise_multiplier"] ** 2)
    robustness = values["robustness"]
    assert robustness["n_test"] == 50 and set(robustness["certified_accuracy"]) == {"linf", "l2"}
    assert 0.3 < robustness["clean_accuracy"] <= 1
    assert robustness["certified_accuracy"]["l2"]["0.1"] <= robustness["clean_accuracy"]
    assert Report.read(out / "report.json").to_dict() == report.to_dict()
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "differentially private" in (out / "report.md").read_text()


def test_epsilon_is_the_plans(finished, digits):
    _, report, _ = finished
    assert report.privacy["epsilon"] == prepare(make_config(), digits).plan.epsilon()


def test_ledger_is_on_disk_before_an_epoch_is_shown(finished):
    _, _, recorder = finished
    assert recorder.ledgers and all(shown == saved for shown, saved in recorder.ledgers)


def test_certify_reproduces_the_report(finished, digits):
    out, report, _ = finished
    assert certify_run(out, digits, schema) == report.robustness


def test_model_is_loaded_as_saved(finished):
    out, _, _ = finished
    _, model = load_model(out, schema)
    assert not model.training
    saved = load_file(out / "model.safetensors")
    assert all(torch.equal(t, saved[name]) for name, t in model.state_dict().items())


def test_a_run_is_never_overwritten(finished, digits):
    out, _, _ = finished
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="--resume"):
        train(make_config(), digits, out)
    assert (out / "model.safetensors").read_bytes() == before


def test_interrupted_and_resumed(tmp_path, digits):
    out = tmp_path / "run"
    config = make_config()
    with pytest.raises(KeyboardInterrupt):
        train(config, digits, out, [Recorder(out, stop_after=10)])
    saved = torch.load(out / "checkpoint.pt", weights_only=True)["engine"]["steps_taken"]
    assert saved == 8  # two epochs of four steps; steps 9 and 10 were never released
    with pytest.raises(KeyboardInterrupt):
        train(config, digits, out, [Recorder(out, stop_after=13)], resume=True)
    recorder = Recorder(out)
    report = train(config, digits, out, [recorder], resume=True)
    assert recorder.events[0] == ("start", 12)
    assert report.privacy["steps"] == 24
    assert report.privacy["epsilon"] == prepare(config, digits).plan.epsilon()
    assert [m["steps"] for m in report.history] == [4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize("change", [{"privacy__steps": 48}, {"privacy__delta": 1e-6}, {"optimizer__lr": 0.4}])
def test_resume_refuses_another_plan(tmp_path, digits, change):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(make_config(), digits, out, [Recorder(out, stop_after=5)])
    before = (out / "checkpoint.pt").read_bytes()
    with pytest.raises(CheckpointError, match="changes in"):
        train(make_config(**change), digits, out, resume=True)
    assert (out / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_damaged_checkpoints_are_refused(tmp_path, digits, damage):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(make_config(), digits, out, [Recorder(out, stop_after=5)])
    path = out / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-200] if damage is None else damage)
    with pytest.raises(CheckpointError):
        train(make_config(), digits, out, resume=True)


def test_without_noise_nothing_is_claimed(tmp_path, digits):
    report = train(make_config(privacy={**PRIVACY, "noise_multiplier": 0.0}), digits, tmp_path / "run")
    assert report.privacy["epsilon"] is None
    assert report.robustness["clean_accuracy"] > 0.8
    assert "none (no noise)" in report.to_markdown()


PRIVACY = {"population": 1437, "batch_size": 360, "delta": 1e-4, "steps": 60}


@pytest.mark.parametrize(
    ("keys", "table"),
    [
        ({"noise_gamma": 0.5, "noise_every": 20}, [[1.0, 20], [0.5, 4]]),
        ({"noise_gamma": 0.5, "noise_milestones": [8, 16]}, [[1.0, 8], [0.5, 8], [0.25, 8]]),
    ],
)
def test_noise_schedules_are_planned_accounted_and_resumed(tmp_path, digits, keys, table):
    config = make_config(**{f"privacy__{k}": v for k, v in keys.items()})
    plan, constant = prepare(config, digits).plan, prepare(make_config(), digits).plan
    assert plan.to_dict()["noise_schedule"] == table and plan.epsilon() > constant.epsilon()
    assert parse_config(config.to_dict()) == config
    assert f"times 1 to {table[-1][0]:g} over the run" in plan_table(config).to_markdown()
    with pytest.raises(KeyboardInterrupt):
        train(config, digits, tmp_path / "run", [Recorder(tmp_path / "run", stop_after=10)])
    with pytest.raises(CheckpointError, match="changes in"):
        train(make_config(), digits, tmp_path / "run", resume=True)
    report = train(config, digits, tmp_path / "run", resume=True)
    assert report.privacy["epsilon"] == plan.epsilon() and report.privacy["plan"]["noise_schedule"] == table
    assert "times the plan's noise schedule" in report.to_markdown()


def test_noise_is_calibrated_for_its_schedule(digits):
    privacy = {k: v for k, v in PRIVACY.items() if k != "noise_multiplier"} | {"epsilon": 2.0}
    moving = prepare(make_config(privacy=privacy | {"noise_gamma": 0.9, "noise_every": 10}), digits).plan
    constant = prepare(make_config(privacy=privacy), digits).plan
    assert moving.epsilon() <= 2.0 and moving.noise_multiplier > constant.noise_multiplier


@pytest.mark.parametrize("keys", [{"noise_every": 0}, {"noise_milestones": [5, 5]}, {"noise_milestones": [0]}])
def test_schedules_that_make_no_sense(digits, keys):
    with pytest.raises(PlanError, match="noise schedule"):
        prepare(make_config(**{f"privacy__{k}": v for k, v in ({"noise_gamma": 0.9} | keys).items()}), digits)


def test_logit_clipping_is_reported(tmp_path, digits):
    report = train(make_config(loss__logit_clip=0.5), digits, tmp_path / "run")
    assert report.privacy["logit_clipping"] == {"bound": 0.5, "norm": "l2"}


def test_seed_fixes_the_initial_weights_only(digits):
    first, second = prepare(make_config(seed=3), digits), prepare(make_config(seed=3), digits)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert not torch.equal(first.loader.sampler.draw(), second.loader.sampler.draw())
    fixed = [prepare(make_config(seed=3, insecure_seed=5), digits) for _ in range(2)]
    assert torch.equal(fixed[0].loader.sampler.draw(), fixed[1].loader.sampler.draw())


def test_population_is_configuration(digits):
    """Dropping records changes neither q nor the divisor nor the number of steps."""
    fewer = Dataset(
        "digits",
        Split(digits.train.x[:100], digits.train.y[:100]),
        digits.test,
        digits.num_classes,
        digits.input_shape,
    )
    assert prepare(make_config(), fewer).plan == prepare(make_config(), digits).plan


def test_learning_rate_schedule():
    config = OptimizerConfig(warmup=0.1, decay=0.5, final=0.1)
    factors = [learning_rate_factor(config, step, 100) for step in range(101)]
    assert factors[0] < factors[5] < 1 and factors[20] == factors[50] == 1
    assert math.isclose(factors[100], 0.1) and all(a >= b for a, b in itertools.pairwise(factors[50:]))
