# SPDX-License-Identifier: Apache-2.0
"""Local bounds hold for every pair of points, are never above the global ones, and attacks never refute them."""

import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dplip.audit.robustness import flips
from dplip.bounds import lipschitz, trace
from dplip.certify import certify, local_lipschitz, masked_norm, moves
from dplip.certify.local_lipschitz import LocalCertifier
from dplip.certify.margin import MarginCertifier
from dplip.certify.subject import Subject
from dplip.data import load
from dplip.errors import ConfigError, NoRuleError
from dplip.layers import (
    Clamp,
    ClippedReLU,
    Flatten,
    GroupSort,
    LearnedScale,
    LinearSpline,
    MaxMin,
    MaxPool2d,
    NormalizedLinear,
    Residual,
    Scale,
    Shift,
)
from tests.certify.zoo import NETS, C, D, build, inputs


def _clipped() -> nn.Module:
    net = nn.Sequential(nn.Linear(D, 8), ClippedReLU((8,), 0.3), nn.Linear(8, 6), ClippedReLU(6, 0.5), nn.Linear(6, C))
    with torch.no_grad():
        net[1].theta[:2] = torch.tensor([0.0, 1e-3])  # constant, and almost
    return net


def _spline(scaled: bool) -> nn.Module:
    """Slopes up to about 3."""
    spline = LinearSpline(6, intervals=5, reach=0.7, init="maxmin", scaled=scaled)
    with torch.no_grad():
        spline.coefficients.add_(0.3 * torch.randn_like(spline.coefficients))
    return nn.Sequential(nn.Linear(D, 6), spline, nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, C))


def _dead() -> nn.Module:
    """Nothing passes the ReLU near the unit cube."""
    net = nn.Sequential(nn.Linear(D, 5), nn.ReLU(), nn.Linear(5, 4), MaxMin(), nn.Linear(4, C))
    with torch.no_grad():
        net[0].bias.fill_(-20.0)
    return net


def _images(*body: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(Shift(0.0), _Square(), *body, Flatten(), nn.Linear(features, C))


class _Square(nn.Module):
    """[B, D] as an image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 1, 2, 2)


LOCAL: dict[str, Callable[[], nn.Module]] = {
    "clipped": _clipped,
    "spline slopes": lambda: _spline(False),
    "scaled spline": lambda: _spline(True),
    "dead": _dead,
    "clamped sort": lambda: nn.Sequential(
        nn.Linear(D, 6), GroupSort(3), Clamp(-0.2, 0.3), nn.Linear(6, 6), MaxMin(), Scale(-0.5), nn.Linear(6, C)
    ),
    "residual relu": lambda: nn.Sequential(
        Residual(nn.Sequential(nn.Linear(D, 6), nn.ReLU(), nn.Linear(6, D))),
        nn.Linear(D, 5),
        nn.Tanh(),
        nn.Linear(5, C),
    ),
    "conv": lambda: _images(nn.Conv2d(1, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 2), MaxMin(), features=16),
    "pooled": lambda: _images(nn.Conv2d(1, 2, 2, padding=1), ClippedReLU(2, 0.4), MaxPool2d(2, 1), features=8),
    "learned scale": lambda: nn.Sequential(nn.Linear(D, 6), nn.ReLU(), LearnedScale(3.0), nn.Linear(6, C)),
}


def make(name: str, seed: int = 0) -> nn.Module:
    if name in NETS:
        return build(name, seed)
    torch.manual_seed(seed)
    return LOCAL[name]().eval()


ALL = sorted({*NETS, *LOCAL})


def machinery(model: nn.Module, x: Tensor, norm: str, domain: tuple[float, float] | None = None):
    subject = Subject(model, x.dtype)
    point = subject.at(x)
    return LocalCertifier(MarginCertifier(subject, norm, point.values), domain, point.values), subject, point


def steps(count: int, norm: str) -> Tensor:
    """Moves of length at most 1, many of them on the sphere."""
    move = torch.cat([torch.rand(count, D) * 2 - 1, torch.randn(count, D).sign(), torch.eye(D)]).double()
    length = move.abs().amax(1) if norm == "linf" else move.norm(dim=1)
    shrink = torch.where(torch.arange(len(move)) % 3 == 0, torch.rand(len(move)).double(), 1.0)
    return move / length[:, None] * shrink[:, None] * (1 - 1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ALL)
def test_every_bound_of_every_node_holds(name: str, norm: str) -> None:
    """Boxes, entries, three norms, weighted norms and the scaled ball, for centres and for pairs of points."""
    local, subject, point = machinery(make(name), inputs(2), norm)
    near = local.centres(point)
    move = steps(60, norm)
    for eps in (1e-3, 0.2):
        size = torch.full((len(point.x),), eps, dtype=torch.float64)
        boxes, from_centre = local.regions(point.x, size, near)
        _, pairs = local.regions(point.x, size, near, pairs=True)
        for i in range(len(point.x)):
            values = subject.graph.evaluate(point.x[i] + eps * move)
            first, second = torch.arange(len(move)), torch.randperm(len(move))
            apart = (move[first] - move[second]) * eps
            apart = apart.abs().amax(1) if norm == "linf" else apart.norm(dim=1)
            for node, value in values.items():
                low, high = boxes[node][0][i], boxes[node][1][i]
                rounding = 1e-14 * (1 + float(value.abs().amax()))  # of the samples
                assert bool(((value >= low - rounding) & (value <= high + rounding)).all()), node
                ones = torch.ones(len(move)).double()
                _contains(from_centre[node], i, value - point.values[node][i], ones, rounding, node)
                _contains(pairs[node], i, value[first] - value[second], apart, rounding, node)


def _contains(move: moves.Move, i: int, d: Tensor, length: Tensor, rounding: float, node: str) -> None:
    assert bool((d.abs() <= move.size[i] * length.view(-1, *[1] * (d.ndim - 1)) + rounding).all()), node
    for p, bound in zip((1, 2, math.inf), move.tight_norms()[:, i], strict=True):
        assert bool((torch.linalg.vector_norm(d.flatten(1), p, dim=1) <= bound * length + 10 * rounding).all()), node
    left = torch.rand_like(move.size) * (torch.rand_like(move.size) > 0.3)
    seen = torch.linalg.vector_norm((left[i] * d).flatten(1), dim=1)
    assert bool((seen <= move.weighted(left)[i] * length + 10 * rounding).all()), node
    right, radius = move.ball
    still = right[i] == 0
    assert bool((d[:, still].abs() <= rounding).all()), node
    u = torch.where(still, 0.0, d / torch.where(still, 1.0, right[i]))
    assert bool((u.flatten(1).norm(dim=1) <= radius[i] * length + 1e4 * rounding).all()), node


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ALL)
def test_never_below_the_margin_and_never_beyond_an_attack(name: str, norm: str) -> None:
    model, x = make(name, 1), inputs(8)
    margin, local = (certify(model, x, norm, method=m) for m in ("margin", "local"))
    assert bool((local.radius >= margin.radius).all()) and local.method == "margin+interval+local"
    assert flips(model, x, local, restarts=4, steps=8) == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("domain", [None, (0.0, 1.0)])
def test_local_constants_are_at_most_the_global_ones(norm: str, domain: tuple[float, float] | None) -> None:
    x = torch.rand(1000, D)
    for name in ("relu", "clipped", "clamped sort", "spline slopes", "conv"):
        model = make(name)
        graph = trace(make(name).double())
        whole = getattr(lipschitz(graph, graph.evaluate(x[:1].double())), norm)
        last = torch.zeros(1000, dtype=torch.float64)
        for eps in (0.0, 0.02, 0.3):
            found = local_lipschitz(model, x, eps, norm, domain=domain)
            assert bool((found <= whole).all())
            assert bool((found >= last * (1 - 1e-9)).all())  # larger balls settle fewer neurons
            last = found
        assert 0 < float(found.mean()) < 0.95 * whole


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["relu", "clipped", "scaled spline", "clamped sort", "conv"])
def test_gradient_ascent_finds_no_steeper_pair(name: str, norm: str) -> None:
    """The output's change per unit of distance, maximised over pairs in the ball."""
    model, x, eps = make(name).double(), inputs(6).double(), 0.25
    bound = local_lipschitz(model, x, eps, norm)
    best = torch.zeros_like(bound)
    for _start in range(4):
        a, b = (eps * (torch.rand_like(x) - 0.5).requires_grad_() for _ in "ab")
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        optimizer = torch.optim.Adam([a, b], lr=0.02)
        for _ in range(60):
            d, z = a - b, model(x + a) - model(x + b)
            size = [v.abs().amax(1) if norm == "linf" else v.norm(dim=1) for v in (d, z)]
            ratio = size[1] / size[0].clamp_min(1e-6)
            best = torch.where(size[0] > 1e-4, torch.maximum(best, ratio.detach()), best)
            optimizer.zero_grad()
            (-ratio.sum()).backward()
            optimizer.step()
            with torch.no_grad():
                for v in (a, b):
                    length = v.abs().amax(1) if norm == "linf" else v.norm(dim=1)
                    v.mul_((eps / length.clamp_min(1e-12)).clamp_max(1)[:, None])
    assert bool((best <= bound * (1 + 1e-9)).all())
    assert float(best.sum()) > 0


def test_dead_neurons_drop_out() -> None:
    """relu(x - 10) is constant in the ball; a second neuron at x = 0 is not."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.copy_(torch.tensor([-10.0, 1.0]))
        model[2].weight.copy_(torch.tensor([[0.0, 0.0], [100.0, 1.0]]))
        model[2].bias.copy_(torch.tensor([5.0, 0.0]))
    x = torch.zeros(1, 2, dtype=torch.float64)
    assert local_lipschitz(model, x, 1.0, "l2").item() == pytest.approx(1.0)
    assert local_lipschitz(model, x, 9.999, "l2").item() == pytest.approx(1.0)
    assert local_lipschitz(model, x, 10.1, "l2").item() == pytest.approx(math.hypot(100, 1), rel=1e-3)
    assert certify(model, x, "l2", method="local").radius.item() == pytest.approx(4.0, rel=2e-3)
    assert certify(model, x, "l2", method="margin").radius.item() < 0.05


def test_a_region_on_which_all_is_constant() -> None:
    model, x = make("dead"), torch.rand(6, D)
    assert local_lipschitz(model, x, 0.5, "l2").tolist() == [0.0] * 6
    local = certify(model, x, "l2", method="local")
    assert bool((local.radius > 1.0).all()) and flips(model, x, local, restarts=3, steps=8) == 0
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[4].bias[0] = 1.0
    assert local_lipschitz(model, x, 0.5, "linf").tolist() == [0.0] * 6
    assert bool((certify(model, x, method="local").radius > 1e5).all())


def saturating(theta: float) -> nn.Module:
    """z = (min(max(x, 0), theta), c): slope 1 below theta, 0 above."""
    model = nn.Sequential(nn.Linear(1, 1), ClippedReLU(1, theta), nn.Linear(1, 2)).double().eval()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.zero_()
        model[1].theta.fill_(theta)
        model[2].weight.copy_(torch.tensor([[1.0], [0.0]]))
        model[2].bias.zero_()
    return model


@pytest.mark.parametrize("theta", [0.1, 0.3, 0.7, 1 / 3])
def test_masks_at_the_threshold_to_the_last_bit(theta: float) -> None:
    model = saturating(theta)
    eps = 0.25
    for centre in (theta + eps, theta - eps, -eps):
        for x in (centre, math.nextafter(centre, -math.inf), math.nextafter(centre, math.inf)):
            point = torch.tensor([[x]], dtype=torch.float64)
            found = local_lipschitz(model, point, eps, "linf").item()
            ends = [min(max(x + s * eps, 0.0), theta) for s in (-1, 1)]
            assert found in (0.0, pytest.approx(1.0)) and (found > 0 or ends[0] == ends[1])
    inside = torch.tensor([[theta / 2]], dtype=torch.float64)
    assert local_lipschitz(model, inside, theta, "linf").item() == pytest.approx(1.0)
    beyond = torch.tensor([[theta + 2 * eps]], dtype=torch.float64)
    assert local_lipschitz(model, beyond, eps, "linf").item() == 0.0


def test_ties_of_sorted_pairs_are_not_settled() -> None:
    """At a tie either entry may become the larger one, so the weight of the steeper one counts."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), MaxMin(), nn.Linear(2, 2, bias=False)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([10.0, 1.0])))
        model[2].weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))  # the larger of the pair
    tied = torch.zeros(1, 2, dtype=torch.float64)
    assert local_lipschitz(model, tied, 0.01, "linf").item() == pytest.approx(10.0)
    apart = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    assert local_lipschitz(model, apart, 0.01, "linf").item() == pytest.approx(1.0)
    touching = torch.tensor([[0.0, 0.11]], dtype=torch.float64)  # 10 * 0.01 = 0.11 - 0.01
    assert local_lipschitz(model, touching, 0.01, "linf").item() in (pytest.approx(1.0), pytest.approx(10.0))


def test_nan_is_not_certified() -> None:
    model, x = make("clipped"), torch.rand(4, D)
    x[1, 0] = math.nan
    assert certify(model, x, "l2", method="local").radius[1].item() == 0.0
    assert local_lipschitz(model, x, 0.1, "l2").isnan().tolist() == [False, True, False, False]
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    assert certify(model, x, "l2", method="local").radius.tolist() == [0.0] * 4
    assert bool(local_lipschitz(model, x, 0.1).isnan().all())


def test_a_bound_that_is_nan_certifies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original code replaced such bounds by 0."""
    model, x = make("clipped"), inputs(6)
    whole = certify(model, x, "l2", method="local").radius

    def undefined(c: Tensor, *_: object) -> Tensor:
        return torch.full(c.shape[:-1], math.nan, dtype=c.dtype)

    monkeypatch.setattr(sys.modules[LocalCertifier.__module__], "ball_box_bound", undefined)
    assert bool((certify(model, x, "l2", method="local").radius <= whole).all())
    local, _, point = machinery(model, x, "l2")
    part = torch.full_like(local._difference_bound(point, whole, local.centres(point)), math.nan)
    assert not bool(local._holds(point, whole, part).any())


def tight() -> tuple[nn.Module, Tensor]:
    """Two affine maps around a halving, all along one direction: the certified radius is the exact distance, 2."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), Scale(0.5), nn.Linear(2, 2, bias=False)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 2.9]]))
        model[2].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    return model, torch.tensor([[2.0, 0.0]], dtype=torch.float64)


def _power_step(gram: Tensor, terms: int) -> Tensor:
    v = torch.ones_like(gram[:, :, :1]) / math.sqrt(gram.shape[1])
    return torch.linalg.vector_norm(gram @ v, dim=(1, 2))


MUTANTS: dict[str, tuple[str, object]] = {
    "power iteration": ("dplip.certify.masked_norm._eigenvalue", _power_step),
    "slopes on both sides": ("dplip.certify.moves.root", lambda slope: slope),
    "half the norm": ("dplip.certify.moves._UP", 0.5),
}


@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_the_attack_catches_mutants(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tight()
    honest = certify(model, x, "l2", method="local")
    assert honest.radius.item() == pytest.approx(2.0, rel=1e-3) and flips(model, x, honest) == 0
    monkeypatch.setattr(*MUTANTS[mutant])
    monkeypatch.setattr(MarginCertifier, "radius", lambda self, point: torch.zeros_like(point.x[:, 0]))
    assert flips(model, x, certify(model, x, "l2", method="local")) == 1


def test_the_attack_catches_masks_that_ignore_the_box(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slopes read at the centre instead of over its box: the ReLU looks dead although the ball reaches its kink."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double().eval()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(-0.5)
        model[2].weight.copy_(torch.tensor([[0.0], [10.0]]))
        model[2].bias.copy_(torch.tensor([1.0, 0.0]))
    x = torch.zeros(1, 1, dtype=torch.float64)
    honest = certify(model, x, "l2", method="local")
    assert honest.radius.item() == pytest.approx(0.6, rel=2e-3) and flips(model, x, honest) == 0
    slopes = moves.elementwise_slopes

    def at_centre(layer, box, shape):
        middle = (box[0] + box[1]) / 2
        return slopes(layer, (middle, middle), shape)

    monkeypatch.setattr("dplip.certify.moves.elementwise_slopes", at_centre)
    assert flips(model, x, certify(model, x, "l2", method="local")) == 1


def test_large_layers_fall_back_and_stay_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("COST", "ENTRIES"):
        monkeypatch.setattr(masked_norm, limit, 0)
        for name in ("clipped", "conv", "spline slopes"):
            model, x = make(name), inputs(4)
            local = certify(model, x, "l2", method="local")
            assert bool((local.radius >= certify(model, x, "l2", method="margin").radius).all())
            assert flips(model, x, local, restarts=2, steps=6) == 0


def test_domain_batches_and_refusals() -> None:
    model, x = make("clipped"), torch.rand(20, D)
    cut = certify(model, x, "l2", method="local", domain=(0.0, 1.0))
    free = certify(model, x, "l2", method="local")
    assert "[0, 1]" in cut.method and bool((cut.radius >= free.radius * (1 - 2e-3)).all())
    assert flips(model, x, cut, domain=(0.0, 1.0), restarts=3, steps=8) == 0
    parts = [local_lipschitz(model, x, 0.2, batch_size=n) for n in (3, 256)]
    torch.testing.assert_close(*parts, rtol=1e-9, atol=0)
    assert local_lipschitz(model, x[:0], 0.2).shape == (0,)
    with pytest.raises(ConfigError, match="eps >= 0"):
        local_lipschitz(model, x, -1.0)
    with pytest.raises(ConfigError, match="norm in"):
        local_lipschitz(model, x, 0.1, "l1")

    class Sine(NormalizedLinear):
        def interval(self, lower, upper):
            raise NoRuleError("none")

    with pytest.raises(NoRuleError):
        certify(nn.Sequential(Sine(D, C)).eval(), x, method="local")


@pytest.mark.slow
def test_mnist(data_dir) -> None:
    """A thousand test points: local at most global, and a certificate where the global one has none."""
    data = load("mnist", data_dir)
    x, y = data.train.x[:6000].flatten(1), data.train.y[:6000]
    model = nn.Sequential(nn.Linear(784, 32), ClippedReLU(32), nn.Linear(32, 32), ClippedReLU(32), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(6):
        for rows in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    points, labels = data.test.x[:1000].flatten(1).double(), data.test.y[:1000]
    model = model.double().eval()
    graph = trace(model)
    for norm, eps in (("l2", 0.1), ("linf", 0.005)):
        whole = getattr(lipschitz(graph, graph.evaluate(points[:1])), norm)
        found = local_lipschitz(model, points, eps, norm, domain=(0.0, 1.0))
        assert bool((found <= whole).all()) and float(found.mean()) < 0.7 * whole
        margin, local = (
            certify(model, points[:100], norm, method=m, domain=(0.0, 1.0)).certified_accuracy(labels[:100], eps)
            for m in ("margin", "local")
        )
        assert local > margin + 0.05
