# SPDX-License-Identifier: Apache-2.0
"""The validator finds what Opacus' misses, blames the right module, and is silent about sound models."""

from __future__ import annotations

import pytest
import torch
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dplip.errors import IncompatibleModelError
from dplip.interop.opacus import fix, prepare, validate
from dplip.layers import LinfDistance, LipschitzLayer, MeanShift, NormalizedLinear, ReferenceShift
from dplip.norms import OperatorNorms
from tests.interop.opacus_zoo import CASES, mixed

pytestmark = pytest.mark.filterwarnings("ignore:Secure RNG turned off", "ignore:Full backward hook is firing")

X = torch.linspace(-1, 1, 48).view(6, 8).sin()


class Isometry(LipschitzLayer):
    def operator_norms(self, shapes):
        return OperatorNorms.uniform(1.0)


class MaskByPlace(Isometry):
    """Drops rows by their place in the batch: a record that leaves gives all later ones new masks."""

    def forward(self, x):
        generator = torch.Generator().manual_seed(0)
        return x * (torch.rand(len(x), 1, generator=generator) < 0.5)


class Counts(Isometry):
    """Keeps a count of its passes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return x


class RunningShift(Isometry):
    """Subtracts a running mean kept in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(8)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return x - self.mean


class Centred(nn.Module):
    """Mixes examples in a function call that belongs to no module."""

    def __init__(self):
        super().__init__()
        self.layer = LinfDistance(8, 4)

    def forward(self, x):
        y = self.layer(x)
        return y - y.mean(0)


class WrongRule(NormalizedLinear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Takes(nn.Linear):
    def forward(self, x, factor=1.0):
        return factor * super().forward(x)


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Takes(8, 4)

    def forward(self, x):
        return self.layer(x, factor=5.0)


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.layer = nn.Parameter(torch.ones(1)), LinfDistance(8, 4)

    def forward(self, x):
        return self.gain * self.layer(x)


def behind(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), *modules)


STRUCTURE = [
    ("batch_statistics", "1", lambda: behind(nn.BatchNorm1d(8, affine=False))),
    ("batch_statistics", "1", lambda: behind(nn.BatchNorm1d(8))),
    ("batch_statistics", "1", lambda: behind(nn.BatchNorm1d(8, affine=False, track_running_stats=False).eval())),
    ("batch_statistics", "1", lambda: behind(nn.BatchNorm1d(8).requires_grad_(False))),
    ("batch_statistics", "1", lambda: behind(nn.SyncBatchNorm(8, affine=False))),
    ("batch_statistics", "1", lambda: behind(MeanShift(8))),
    (
        "running_statistics",
        "1",
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.InstanceNorm2d(3, track_running_stats=True)),
    ),
    ("captured", "1", lambda: behind(Holder())),
    ("buffers", "0", lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)))),
    ("opacus", "0", lambda: nn.Sequential(nn.LSTM(8, 4))),
    ("evaluation", "", lambda: behind().eval()),
]
BEHAVIOUR = [
    ("coupling", "1", lambda: behind(MaskByPlace())),
    ("state", "1", lambda: behind(Counts())),
    ("state", "1", lambda: behind(RunningShift())),
    ("coupling", "", Centred),
    ("gradients", "", lambda: nn.Sequential(WrongRule(8, 4))),
    ("gradients", "", ByKeyword),
    ("refused", "", lambda: behind(nn.ReLU(inplace=True))),
]


@pytest.mark.parametrize(("kind", "name", "make"), STRUCTURE)
def test_structure_is_enough_to_find(kind, name, make):
    found = [f for f in validate(make()) if f.blocking]
    assert (kind, name) in {(f.kind, f.name) for f in found}
    for finding in found:
        assert finding.problem and finding.remedy and finding.remedy in str(finding)


@pytest.mark.parametrize(("kind", "name", "make"), BEHAVIOUR)
def test_behaviour_shows_on_examples(kind, name, make):
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert [(f.kind, f.name) for f in validate(model, X) if f.blocking] == [(kind, name)]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("name", CASES)
def test_no_layer_of_ours_is_blamed(name, mode):
    found = validate(mixed(name), torch.randn(3, *CASES[name][1]), mode)
    shared = mode == "ghost" and name.startswith("ConvexMix")
    assert shared or [f for f in found if f.blocking] == []


def test_sound_models_of_others_are_not_blamed():
    model = nn.Sequential(
        nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU(), nn.LayerNorm(8), nn.BatchNorm1d(8).eval(), nn.Linear(8, 2)
    )
    model[4].requires_grad_(False)
    assert [f for f in validate(model, X) if f.blocking] == []


def test_random_modules_are_named_but_not_blamed():
    found = validate(behind(nn.RReLU()), X)
    assert [(f.kind, f.name, f.blocking) for f in found] == [("random", "1", False)]


def test_the_global_generator_is_left_alone():
    model = behind(nn.RReLU())
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    validate(model, X)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "module", [nn.BatchNorm1d(8, affine=False), MeanShift(8), MaskByPlace(), RunningShift(), Counts()]
)
def test_opacus_itself_overlooks_them(module):
    """The reason for a validator of our own: Opacus makes each of these private without a word."""
    model = behind(module)
    assert ModuleValidator.is_valid(model)
    PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(X), batch_size=2),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert [f for f in validate(behind(module), X) if f.blocking]


@pytest.mark.parametrize("module", [nn.BatchNorm1d(8, affine=False), MeanShift(8), Holder()])
def test_prepare_refuses_what_opacus_overlooks(module):
    with pytest.raises(IncompatibleModelError, match=r"^1: "):
        prepare(behind(module))


def test_ghost_clipping_and_shared_parameters():
    model = nn.Sequential(NormalizedLinear(8, 8, bias=False), NormalizedLinear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert [f for f in validate(model, X) if f.blocking] == []
    (found,) = (f for f in validate(model, X, "ghost") if f.blocking)
    assert (found.kind, found.name) == ("shared_parameter", "0")


FIXED = [
    lambda: behind(nn.BatchNorm1d(8, affine=False)),
    lambda: behind(nn.BatchNorm1d(8)),
    lambda: nn.Sequential(LinfDistance(8, 8), MeanShift(8), nn.Linear(8, 2)),
    lambda: behind(nn.ReLU(inplace=True)),
    lambda: nn.Sequential(behind(nn.BatchNorm1d(8)), nn.Sequential(nn.Linear(8, 8), MeanShift(8).eval())),
    lambda: nn.Sequential(behind(behind(LinfDistance(8, 8), MeanShift(8)))),
]


@pytest.mark.parametrize("make", FIXED)
def test_fixed_models_have_no_findings_and_originals_stay(make):
    model = make()
    kinds = [type(m) for m in model.modules()]
    fixed = fix(model)
    assert [f for f in validate(fixed, X) if f.blocking] == []
    assert [type(m) for m in model.modules()] == kinds
    y = fixed(X)
    assert float(y.detach().std(0).min()) > 1e-3  # the replacement did not flatten the examples


def test_fixes_keep_what_can_be_kept():
    model = nn.Sequential(
        nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), nn.InstanceNorm2d(64, affine=True, track_running_stats=True)
    )
    nn.init.normal_(model[1].weight)
    fixed = fix(model)
    assert isinstance(fixed[1], nn.GroupNorm) and fixed[1].num_groups == 32
    assert torch.equal(fixed[1].weight, model[1].weight)
    assert not fixed[2].track_running_stats and fixed[2].affine
    shifted = fix(nn.Sequential(LinfDistance(8, 4), MeanShift(4)))
    assert isinstance(shifted[0], ReferenceShift) and isinstance(shifted[1], nn.Identity)


def test_what_has_no_sound_replacement_stays_a_finding():
    model = nn.Sequential(nn.Linear(8, 2), nn.BatchNorm1d(2))  # a group of two leaves signs only
    assert isinstance(fix(model)[1], nn.BatchNorm1d)
    assert [f.kind for f in validate(fix(nn.Sequential(nn.Linear(8, 4), MeanShift(4))))] == ["batch_statistics"]


def test_the_root_itself_is_replaced():
    assert isinstance(fix(nn.BatchNorm2d(8)), nn.GroupNorm)


def test_one_example_is_too_few():
    with pytest.raises(ValueError, match="B >= 2"):
        validate(behind(), X[:1])
