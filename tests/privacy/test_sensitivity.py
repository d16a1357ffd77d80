# SPDX-License-Identifier: Apache-2.0
"""Step sensitivities: numbers by hand, refusals, and no measured gradient above them."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from dplip.bounds import InputDomain
from dplip.bounds.rounding import FLOOR
from dplip.errors import DplipError, MixesExamplesError, NoRuleError, PlanError, UnboundedInputError
from dplip.layers import Clamp, LinearSpline, LinfDistance, MaxMin, NormalizedLinear, Residual, Scale, SortLinear
from dplip.losses import BoundedLoss, CrossEntropy, LogitGradientClip, MulticlassMargin
from dplip.privacy import StepSensitivity
from tests.privacy.toy import CLASSES, DIM, DOMAIN, net


def linf_net(depth: int, width: int = 6, bias: bool = True) -> nn.Sequential:
    sizes = [DIM, *[width] * (depth - 1), CLASSES]
    return nn.Sequential(*(LinfDistance(a, b, bias=bias) for a, b in pairwise(sizes)))


@pytest.mark.parametrize("domain", [InputDomain((DIM,)), DOMAIN, InputDomain((DIM,), -1e30, 1e30)])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_linf_network_by_hand(depth: int, domain: InputDomain) -> None:
    found = StepSensitivity(linf_net(depth), domain, CrossEntropy()).tensors()
    for layer in range(depth):
        bound = math.sqrt(2) if layer == depth - 1 else 2.0
        for name in ("weight", "bias"):
            assert found[f"{layer}.{name}"].bound == pytest.approx(bound * 1.001, rel=1e-6)
    assert StepSensitivity.total(found) == pytest.approx(1.001 * math.sqrt(4 + 8 * (depth - 1)), rel=1e-6)
    assert found["0.weight"].dim == DIM * (CLASSES if depth == 1 else 6)


def test_without_biases_by_hand() -> None:
    found = StepSensitivity(linf_net(3, bias=False), DOMAIN, MulticlassMargin()).tensors()
    assert set(found) == {"0.weight", "1.weight", "2.weight"}
    assert StepSensitivity.total(found) == pytest.approx(1.001 * math.sqrt(2 + 4 * 2), rel=1e-6)


def test_affine_network_by_hand() -> None:
    model = nn.Sequential(nn.Linear(DIM, CLASSES)).double()
    found = StepSensitivity(model, DOMAIN, CrossEntropy()).tensors()
    assert found["0.weight"].bound == pytest.approx(math.sqrt(2) * math.sqrt(DIM))
    assert found["0.bias"].bound == pytest.approx(math.sqrt(2))


def test_clipped_loss_shrinks_every_bound() -> None:
    found = StepSensitivity(linf_net(2), DOMAIN, LogitGradientClip(CrossEntropy(), 0.1, "l1")).tensors()
    assert all(t.bound == pytest.approx(0.1 * 1.001, rel=1e-6) for t in found.values())


def test_bounds_follow_the_current_weights() -> None:
    model = nn.Sequential(nn.Linear(DIM, 4), nn.ReLU(), nn.Linear(4, CLASSES))
    sensitivity = StepSensitivity(model, DOMAIN, CrossEntropy())
    before = sensitivity.tensors()["0.weight"].bound
    with torch.no_grad():
        model[2].weight.mul_(10)
    assert sensitivity.tensors()["0.weight"].bound == pytest.approx(10 * before, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_slack_has_a_floor(dtype: torch.dtype) -> None:
    sensitivity = StepSensitivity(net().to(dtype), DOMAIN, CrossEntropy())
    assert sensitivity.numerical_slack >= FLOOR[dtype]
    exact = math.sqrt(2)
    assert sensitivity.tensors()["1.bias"].bound >= exact * (1 + FLOOR[dtype])


def test_rounding_slack_grows_with_the_length_of_sums() -> None:
    wide = nn.Sequential(nn.Linear(4000, 2))
    sensitivity = StepSensitivity(wide, InputDomain((4000,), 0, 1), CrossEntropy())
    assert sensitivity.numerical_slack == pytest.approx(4001**1.5 * 2**-24, rel=1e-2)
    assert sensitivity.tensors()["0.bias"].bound >= math.sqrt(2) * (1 + sensitivity.numerical_slack) * (1 - 1e-12)


def test_only_trainable_parameters_are_counted() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    assert set(StepSensitivity(model, DOMAIN, CrossEntropy()).tensors()) == {"0.bias", "1.weight", "1.bias"}
    model.requires_grad_(False)
    with pytest.raises(PlanError, match="trainable"):
        StepSensitivity(model, DOMAIN, CrossEntropy())


class Unused(nn.Module):
    """Holds a parameter that the output ignores."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.ignored = LinfDistance(DIM, CLASSES), LinfDistance(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_parameter_that_the_output_ignores_has_no_sensitivity() -> None:
    found = StepSensitivity(Unused(), DOMAIN, CrossEntropy()).tensors()
    assert found["ignored.weight"].bound == 0 and found["ignored.weight"].dim == 2 * DIM
    assert found["used.weight"].bound > 0


class Tied(nn.Module):
    """Uses one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = LinfDistance(DIM, DIM), LinfDistance(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(PlanError, match="lower precision"):
        StepSensitivity(net().to(dtype), DOMAIN, CrossEntropy())


def test_mixed_precision_is_refused() -> None:
    model = net()
    model[1].double()
    with pytest.raises(PlanError, match="one type"):
        StepSensitivity(model, DOMAIN, CrossEntropy())


class BatchCentred(nn.Module):
    """Subtracts the batch mean, which couples all examples."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Sequential(LinfDistance(DIM, 4), nn.BatchNorm1d(4), LinfDistance(4, CLASSES)), MixesExamplesError),
        (nn.Sequential(BatchCentred(), LinfDistance(DIM, CLASSES)), MixesExamplesError),
        (nn.Sequential(nn.Linear(DIM, 4), nn.Dropout(), nn.Linear(4, CLASSES)), NoRuleError),
        (nn.Sequential(nn.Linear(DIM, 4), nn.LayerNorm(4)), NoRuleError),
        (nn.Sequential(nn.Linear(DIM, 4), nn.Softmax(1)), NoRuleError),
    ],
)
def test_what_has_no_bound_is_refused(module: nn.Module, kind: type[DplipError]) -> None:
    with pytest.raises(kind) as error:
        StepSensitivity(module, DOMAIN, CrossEntropy())
    assert "\n" not in str(error.value)


def test_unbounded_inputs_and_shapes_are_refused() -> None:
    with pytest.raises(UnboundedInputError):
        StepSensitivity(nn.Sequential(nn.Linear(DIM, CLASSES)), InputDomain((DIM,)), CrossEntropy())
    with pytest.raises(PlanError, match="logits"):
        StepSensitivity(nn.Sequential(nn.ReLU(), Maps()), InputDomain((2, 4), 0, 1), CrossEntropy())


class Maps(nn.Module):
    """A [B, C, H] output of a layer with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.spline = LinearSpline(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.spline(x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linf": lambda: linf_net(3),
    "linf logits": net,
    "power mean": lambda: nn.Sequential(LinfDistance(DIM, 6, p=4.0), LinfDistance(6, CLASSES, p=8.0)),
    "plain lp": lambda: nn.Sequential(
        LinfDistance(DIM, 6, p=4.0, power_mean=False), LinfDistance(6, CLASSES, p=4.0, power_mean=False)
    ),
    "sort": lambda: nn.Sequential(SortLinear.geometric(DIM, 6, 0.3), SortLinear.top_k_mean(6, CLASSES, 2)),
    "affine": lambda: nn.Sequential(nn.Linear(DIM, 8), nn.ReLU(), nn.Linear(8, CLASSES)),
    "spectral": lambda: nn.Sequential(NormalizedLinear(DIM, 8), LinearSpline(8), NormalizedLinear(8, CLASSES)),
    "rows": lambda: nn.Sequential(
        NormalizedLinear(DIM, 8, ball="rows_l1"), MaxMin(), NormalizedLinear(8, CLASSES, ball="rows_l1")
    ),
    "residual": lambda: nn.Sequential(Residual(LinfDistance(DIM, DIM)), LinfDistance(DIM, CLASSES)),
    "tied": Tied,
    "scaled": lambda: nn.Sequential(Clamp(), nn.Linear(DIM, CLASSES), Scale(3.0)),
}
LOSSES: dict[str, BoundedLoss] = {
    "ce": CrossEntropy(4.0, 0.1),
    "margin": MulticlassMargin(),
    "clip": LogitGradientClip(CrossEntropy(), 0.3, "l2"),
}


def hard_batch(model: nn.Module) -> Tensor:
    """Random, corner, one-hot, constant and weight-valued inputs of the domain."""
    rows = [torch.rand(6, DIM), torch.rand(6, DIM).round(), torch.eye(DIM), torch.zeros(1, DIM), torch.ones(1, DIM)]
    rows += [p.detach().float().clamp(0, 1) for p in model.parameters() if p.ndim == 2 and p.shape[1] == DIM]
    return torch.cat(rows)


def example_gradients(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = []
    for b in range(len(x)):
        value = loss(model(x[b : b + 1]), y[b : b + 1])
        grads = torch.autograd.grad(value, list(named.values()))
        found.append(dict(zip(named, grads, strict=True)))
    return found


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_no_example_exceeds_its_bounds(name: str, loss: str) -> None:
    reached = 0.0
    for draw in range(3):
        torch.manual_seed(draw)
        model = MODELS[name]().double()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_((1.0, 0.1, 3.0)[draw])
        sensitivity = StepSensitivity(model, DOMAIN, LOSSES[loss])
        bounds, x = sensitivity.tensors(), hard_batch(model).double()
        for label in range(CLASSES):
            for gradient in example_gradients(model, LOSSES[loss], x, torch.full((len(x),), label)):
                for parameter, g in gradient.items():
                    ratio = float(g.norm()) / bounds[parameter].bound
                    assert ratio <= 1, (parameter, ratio)
                    reached = max(reached, ratio)
                joint = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
                assert joint <= StepSensitivity.total(bounds)
    assert reached > 0.3, "a bound this loose would hide an error"


@pytest.mark.parametrize("name", ["linf", "sort", "spectral"])
def test_removing_an_example_moves_the_sum_by_at_most_the_total(name: str) -> None:
    model = MODELS[name]()
    sensitivity = StepSensitivity(model, DOMAIN, CrossEntropy(8.0))
    total, x = StepSensitivity.total(sensitivity.tensors()), hard_batch(model)
    y = torch.arange(len(x)) % CLASSES

    def summed(keep: Tensor) -> Tensor:
        grads = torch.autograd.grad(CrossEntropy(8.0)(model(x[keep]), y[keep]), list(model.parameters()))
        return torch.cat([g.flatten() for g in grads])

    everyone = torch.arange(len(x))
    for b in range(len(x)):
        assert float((summed(everyone) - summed(everyone[everyone != b])).norm()) <= total
