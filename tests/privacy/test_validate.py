# SPDX-License-Identifier: Apache-2.0
"""What breaks the proof is named before training, and what is replaced is sound, reported and trains."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from dplip.bounds import InputDomain
from dplip.errors import DplipError, NoRuleError
from dplip.layers import BallClip, LinfDistance, MeanShift, NormalizedConv2d, NormalizedLinear, ReferenceShift, Scale
from dplip.losses import CrossEntropy
from dplip.privacy import ClipFreeEngine, fix, validate
from tests.privacy.toy import DOMAIN, attach, net

IMAGES = InputDomain((1, 8, 8), 0.0, 1.0)


def classifier() -> nn.Sequential:
    """What somebody brings from elsewhere."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding="same"),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(64, 16),
        nn.LayerNorm(16),
        nn.GELU(),
        nn.Linear(16, 3),
    )


def test_everything_is_named_at_once() -> None:
    module = classifier()
    state = copy.deepcopy(module.state_dict())
    found = validate(module.eval(), domain=IMAGES)
    assert [(f.name, f.replacement) for f in found] == [
        ("0", "Conv2d"),
        ("1", "Identity"),
        ("2", "ReLU"),
        ("5", "Identity"),
        ("7", "Identity"),
        ("8", "ReLU"),
    ]
    assert "batch" in found[1].problem and "7: LayerNorm" in str(found[4])
    assert not module.training and all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert not ClipFreeEngine.is_compatible(module)
    with pytest.raises(NoRuleError, match="and 5 more") as error:
        ClipFreeEngine.validate(module, strict=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("normalize", [False, True])
def test_fixed_module_can_be_made_private_and_trains(normalize: bool) -> None:
    module = classifier()
    before = copy.deepcopy(module)
    fixed, changes = fix(module, normalize=normalize)
    assert str(module) == str(before)
    assert validate(fixed, domain=IMAGES) == [] and ClipFreeEngine.is_compatible(fixed, domain=IMAGES)
    assert len(changes) == 6 + 3 * normalize and all(c.why for c in changes)
    assert str(changes[1]) == f"1: BatchNorm2d -> Identity: {changes[1].why}" or normalize
    kinds = {type(m) for m in fixed.modules()}
    assert (NormalizedConv2d in kinds and NormalizedLinear in kinds) == normalize
    x, y = torch.rand(30, 1, 8, 8), torch.arange(30) % 3
    engine = ClipFreeEngine()
    _, optimizer, loader = engine.make_private(
        module=fixed,
        optimizer=SGD(fixed.parameters(), 0.1),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=10),
        loss=CrossEntropy(),
        noise_multiplier=1.0,
        steps=3,
        population=30,
        domain=IMAGES,
    )
    for x, y in loader:
        optimizer.zero_grad()
        CrossEntropy()(fixed(x), y).backward()
        optimizer.step()
    assert engine.accountant.steps == 3


def test_fixed_function_is_the_old_one_where_it_is_said_to_be() -> None:
    x = torch.randn(5, 3, 6, 6)
    for old in (nn.Conv2d(3, 4, (3, 5), padding="same", dilation=(2, 1)), nn.ReLU6(), nn.Hardtanh(-1, 2, inplace=True)):
        new, changes = fix(old)
        assert len(changes) == 1 and fix(new)[1] == []
        assert torch.equal(new(x.clone()), old(x.clone()))


def test_weights_start_from_the_old_ones() -> None:
    old = nn.Linear(6, 4)
    with torch.no_grad():
        old.weight.mul_(0.1)
    new, _ = fix(nn.Sequential(old), normalize=True)
    assert torch.equal(new[0].weight, old.weight) and torch.equal(new[0].bias, old.bias)
    with torch.no_grad():
        old.weight.mul_(100)
    new, _ = fix(nn.Sequential(old), normalize=True)
    assert float(torch.linalg.matrix_norm(new[0].weight.detach(), 2)) <= 1 + 1e-5


def test_mean_shift_behind_a_distance_becomes_a_reference_shift() -> None:
    module = nn.Sequential(LinfDistance(5, 4), MeanShift(4), LinfDistance(4, 3), nn.BatchNorm1d(3, affine=False))
    fixed, changes = fix(module)
    assert isinstance(fixed[0], ReferenceShift) and isinstance(fixed[2], ReferenceShift)
    assert [c.after for c in changes] == ["ReferenceShift(LinfDistance)"] * 2 and changes[0].name == "0"
    assert validate(fixed, domain=DOMAIN) == []
    assert torch.equal(fixed[0].layer.weight, module[0].weight) and fixed[0].layer.weight is not module[0].weight


def test_batch_norm_without_parameters_is_seen() -> None:
    """The hole in Opacus' validator: it looks at trainable modules only."""
    module = nn.Sequential(NormalizedLinear(5, 4), nn.BatchNorm1d(4, affine=False), NormalizedLinear(4, 3))
    assert [f.name for f in validate(module)] == ["1"]


def test_spectral_norm_becomes_a_normalised_layer() -> None:
    module = nn.Sequential(BallClip(1.0), parametrizations.spectral_norm(nn.Linear(5, 3)))
    assert [f.replacement for f in validate(module)] == ["NormalizedLinear"]
    fixed, _ = fix(module)
    assert validate(fixed, domain=DOMAIN) == [] and type(fixed[1]) is NormalizedLinear
    module = nn.Sequential(BallClip(1.0), parametrizations.orthogonal(nn.Linear(5, 3)))
    assert validate(fix(module)[0], domain=DOMAIN) == []


def test_half_precision_becomes_single() -> None:
    module = net().to(torch.bfloat16)
    (finding,) = validate(module)
    assert finding.replacement == "torch.float32"
    fixed, (change,) = fix(module)
    assert change.before == "torch.bfloat16" and validate(fixed, domain=DOMAIN) == []
    assert next(module.parameters()).dtype == torch.bfloat16


def test_a_module_in_two_places_stays_one() -> None:
    norm, act = nn.LayerNorm(4), nn.ReLU(inplace=True)
    module = nn.Sequential(nn.Linear(5, 4), norm, act, nn.Linear(4, 4), norm, act)
    fixed, changes = fix(module)
    assert fixed[2] is fixed[5] and fixed[1] is fixed[4] and len(changes) == 2
    assert validate(fixed) == []


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.inner = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.gain


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = NormalizedLinear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x - x.mean(0)


LEFT: dict[str, tuple[nn.Module, str]] = {
    "softmax": (nn.Sequential(nn.Linear(5, 3), nn.Softmax(1)), "no rule"),
    "embedding": (nn.Sequential(nn.Embedding(5, 3)), "no rule"),
    "lstm": (nn.Sequential(nn.LSTM(5, 3)), "no rule"),
    "attention": (nn.Sequential(nn.MultiheadAttention(4, 2)), "outside a layer"),
    "gain": (nn.Sequential(Gain()), r"trains \['gain'\]"),
    "square": (nn.Sequential(nn.Linear(5, 3), Square()), "no rule|mul"),
    "mean": (Mean(), "mixes examples"),
    "circular": (nn.Conv2d(1, 1, 3, padding_mode="circular"), "zero padding"),
    "pool": (nn.Sequential(nn.Conv2d(1, 1, 3), nn.MaxPool2d(2, ceil_mode=True)), "ceil_mode"),
    "lazy": (nn.Sequential(nn.Linear(5, 3), nn.LazyLinear(3)), "no shape|no rule"),
    "frozen": (nn.Sequential(nn.Linear(5, 3).requires_grad_(False)), "nothing can be trained"),
    "long": (nn.Sequential(NormalizedLinear(5, 3), nn.Linear(3, 3).double()), "several types"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("name", LEFT)
def test_what_has_no_replacement_is_explained_and_left(name: str) -> None:
    module, why = LEFT[name]
    found = validate(module)
    assert found and all(f.replacement is None and f.problem and f.remedy for f in found)
    with pytest.raises(NoRuleError, match=why) as error:
        ClipFreeEngine.get_compatible_module(module)
    assert "\n" not in str(error.value)


def test_unbounded_input_is_found_where_a_domain_is_given() -> None:
    module = nn.Sequential(NormalizedLinear(5, 3))
    assert validate(module) == []
    (finding,) = validate(module, domain=InputDomain((5,)))
    assert "finite bound" in finding.problem and "BallClip" in finding.remedy
    assert validate(nn.Sequential(BallClip(1.0), *module), domain=InputDomain((5,))) == []


@pytest.mark.parametrize("pieces", list(itertools.combinations(range(6), 2)))
def test_findings_are_what_make_private_refuses(pieces: tuple[int, ...]) -> None:
    """Random models: no finding if and only if attach accepts."""
    torch.manual_seed(sum(pieces))
    parts: list[Any] = [
        nn.BatchNorm1d(5),
        nn.Dropout(0.3),
        nn.ReLU(),
        Scale(0.5),
        nn.LayerNorm(5),
        NormalizedLinear(5, 5),
    ]
    module = nn.Sequential(*(parts[i] for i in pieces), NormalizedLinear(5, 3))
    if validate(module, domain=DOMAIN):
        with pytest.raises(DplipError):
            attach(module)
        module, _ = fix(module)
    assert validate(module, domain=DOMAIN) == []
    attach(module)


def test_own_models_have_no_findings() -> None:
    assert validate(net(), domain=DOMAIN) == [] and fix(net())[1] == []
    assert ClipFreeEngine.get_compatible_module(net()) is not None
