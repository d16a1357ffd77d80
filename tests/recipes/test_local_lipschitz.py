# SPDX-License-Identifier: Apache-2.0
"""The local bound as a loss: an upper bound on every attack, differentiable, useful, and never private."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dplip import ClipFreeEngine, CrossEntropy, InputDomain
from dplip.certify import certify, local_lipschitz
from dplip.errors import ConfigError, DataError, NoRuleError, PlanError
from dplip.layers import Clamp, ClippedReLU, LinfDistance, MaxMin, NormalizedLinear, Scale
from dplip.losses import LogitGradientClip
from dplip.recipes import LocalLipschitzLoss

NETS = {
    "clipped": lambda: nn.Sequential(
        nn.Linear(4, 8), ClippedReLU(8, 0.5), nn.Linear(8, 8), ClippedReLU(8, 0.5), nn.Linear(8, 3)
    ),
    "clamped sort": lambda: nn.Sequential(
        nn.Linear(4, 8), MaxMin(), Clamp(-0.3, 0.3), NormalizedLinear(8, 3), Scale(-2.0)
    ),
    "conv": lambda: nn.Sequential(_Image(), nn.Conv2d(1, 4, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)),
}


class _Image(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 1, 2, 2)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]().double()


@pytest.mark.parametrize("domain", [None, (0.0, 1.0)])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", sorted(NETS))
def test_worst_margins_contain_every_attack(name: str, norm: str, domain: tuple[float, float] | None) -> None:
    model, eps = make(name), 0.2
    x, y = torch.rand(10, 4, dtype=torch.float64), torch.randint(3, (10,))
    loss = LocalLipschitzLoss(model, norm, domain=domain)
    loss.eps = eps
    found = loss.bounds(x, y)
    assert torch.equal(found.logits, model(x))
    assert bool((found.worst.gather(1, y[:, None]) == 0).all())
    worst = torch.full_like(found.worst, -math.inf)
    for target in range(3):
        for _ in range(3):
            move = (eps * torch.randn_like(x)).requires_grad_()
            for _step in range(25):
                z = model(_clip(x, move, eps, norm, domain))
                gain = z - z.gather(1, y[:, None])
                worst = torch.maximum(worst, gain.detach())
                (g,) = torch.autograd.grad(gain[:, target].sum(), move, allow_unused=True)
                with torch.no_grad():
                    move += 0.1 * eps * (g.sign() if norm == "linf" else 4 * F.normalize(g, dim=1))
    assert bool((worst <= found.worst + 1e-9).all())


def _clip(x: Tensor, move: Tensor, eps: float, norm: str, domain: tuple[float, float] | None) -> Tensor:
    size = move.abs().amax(1, keepdim=True) if norm == "linf" else move.norm(dim=1, keepdim=True)
    short = move * (eps / size.clamp_min(1e-12)).clamp_max(1)
    return x + short if domain is None else (x + short).clamp(*domain)


@pytest.mark.parametrize("kind", ["robust", "gloro"])
@pytest.mark.parametrize("name", sorted(NETS))
def test_the_gradient_is_that_of_the_loss(name: str, kind: str) -> None:
    model = make(name)
    x, y = torch.rand(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    loss = LocalLipschitzLoss(model, "l2", kind, sparsity=0.1)
    loss.eps, loss.kappa = 0.1, 0.4
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(x, y), parameters)
    for p, g in zip(parameters, gradients, strict=True):
        direction = torch.randn_like(p)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(sign * 1e-6 * direction)
                ends.append(loss(x, y).item())
                p.sub_(sign * 1e-6 * direction)
        slope = (ends[0] - ends[1]) / 2e-6
        # The multiplier's twelve bisections leave about 1e-3 of it.
        assert slope == pytest.approx(float((g * direction).sum()), rel=1e-2, abs=1e-4)


def test_at_radius_zero_it_is_the_cross_entropy() -> None:
    model = make("clipped")
    x, y = torch.rand(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    plain = F.cross_entropy(model(x), y, reduction="sum").item()
    loss = LocalLipschitzLoss(model, sparsity=0.0)
    assert loss(x, y).item() == pytest.approx(plain)
    loss.kappa = 0.0
    assert loss(x, y).item() == pytest.approx(plain, rel=1e-9)
    found = LocalLipschitzLoss(model).bounds(x, y)
    pre = model[0](x)
    expected = (pre.relu() + (model[1].theta - pre).relu()).mean(1)
    pre = model[2](model[1](pre))
    expected = expected + (pre.relu() + (model[3].theta - pre).relu()).mean(1)
    torch.testing.assert_close(found.unsettled, expected)


def test_gloro_adds_one_logit() -> None:
    model = make("clipped")
    x, y = torch.rand(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    loss = LocalLipschitzLoss(model, kind="gloro", sparsity=0.0)
    loss.eps, loss.kappa = 0.2, 0.0
    found = loss.bounds(x, y)
    z = found.logits
    expected = 0.0
    for i, label in enumerate(y.tolist()):
        extra = z[i, label] + max(found.worst[i, j] for j in range(3) if j != label)
        expected += float((torch.logsumexp(torch.cat([z[i], extra[None]]), 0) - z[i, label]).detach())
    assert loss(x, y).item() == pytest.approx(expected)


def test_training_with_it_raises_what_is_certified() -> None:
    """Three clusters: the local loss with its sparsity term against plain cross-entropy, at one radius."""
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]])
    y = torch.arange(150) % 3
    x = centres[y] + 0.15 * torch.randn(150, 4)
    eps, certified, ratio, unsettled = 0.4, [], [], []
    for local in (False, True):
        model = make("clipped").float()
        loss = LocalLipschitzLoss(model, "l2", sparsity=0.1)
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for step in range(100):
            loss.kappa, loss.eps = (0.1, eps * min(step / 30, 1)) if local else (1.0, 0.0)
            optimizer.zero_grad()
            (loss(x, y) / len(x)).backward()
            optimizer.step()
            for layer in (model[1], model[3]):
                layer.project_()
        loss.eps = eps
        unsettled.append(float(loss.bounds(x, y).unsettled.mean().detach()))
        model.double().eval()
        certified.append(certify(model, x.double(), "l2", method="local").certified_accuracy(y, eps))
        whole = local_lipschitz(model, x.double(), 100.0, "l2")
        ratio.append(float((local_lipschitz(model, x.double(), eps, "l2") / whole).mean()))
    assert certified[1] > certified[0] + 0.2
    assert ratio[1] < 0.7 * ratio[0] and unsettled[1] < unsettled[0]


def test_private_training_refuses_it_by_name() -> None:
    model = make("clipped").float()
    domain = InputDomain((4,), lower=0.0, upper=1.0)
    arguments = dict(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.rand(40, 4), torch.randint(3, (40,))), batch_size=20),
        noise_multiplier=1.0,
        delta=1e-3,
        epochs=1,
        population=40,
        domain=domain,
    )
    for loss in (LocalLipschitzLoss(model), LogitGradientClip(LocalLipschitzLoss(model), 1.0)):
        with pytest.raises(PlanError, match="LocalLipschitzLoss"):
            ClipFreeEngine().make_private(loss=loss, **arguments)
    # Nor can it be used in place of the loss that was declared.
    engine = ClipFreeEngine()
    private, optimizer, loader = engine.make_private(loss=CrossEntropy(), **arguments)
    for x, y in loader:
        loss = LocalLipschitzLoss(private)
        optimizer.zero_grad()
        loss(x, y).backward()
        with pytest.raises(PlanError, match="unchecked"):
            optimizer.step()
        break


def test_refusals() -> None:
    for options in ({"norm": "l1"}, {"kind": "other"}, {"sparsity": -1.0}, {"iterations": 0}, {"domain": (1.0, 0.0)}):
        with pytest.raises(ConfigError):
            LocalLipschitzLoss(make("clipped"), **options)
    loss = LocalLipschitzLoss(make("clipped"))
    for name, value in (("eps", -1.0), ("eps", math.inf), ("kappa", 1.5), ("kappa", math.nan)):
        with pytest.raises(ConfigError):
            setattr(loss, name, value)
    with pytest.raises(DataError, match="int64"):
        loss(torch.rand(3, 4).double(), torch.rand(3))
    with pytest.raises(NoRuleError, match="another head"):
        LocalLipschitzLoss(nn.Sequential(nn.Linear(4, 4), LinfDistance(4, 3)))
    unknown = LocalLipschitzLoss(nn.Sequential(LinfDistance(4, 4), nn.Linear(4, 3)).double())
    with pytest.raises(NoRuleError, match="LinfDistance"):
        unknown(torch.rand(3, 4).double(), torch.zeros(3, dtype=torch.int64))
