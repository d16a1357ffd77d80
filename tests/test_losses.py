# SPDX-License-Identifier: Apache-2.0
"""Logit gradients of every loss stay below their bounds, which are reached; values are torch's."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dplip.errors import ConfigError, DataError, PlanError
from dplip.losses import BinaryCrossEntropy, BoundedLoss, CrossEntropy, LogitGradientClip, MulticlassMargin, bounded

ORDERS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}
MULTICLASS = {
    "ce": CrossEntropy(),
    "ce tau=0.1": CrossEntropy(0.1),
    "ce tau=64 margin": CrossEntropy(64.0, margin=0.3),
    "margin": MulticlassMargin(),
    "margin 5": MulticlassMargin(5.0),
    "clip l1": LogitGradientClip(CrossEntropy(), 0.7, "l1"),
    "clip l2": LogitGradientClip(MulticlassMargin(), 0.3, "l2"),
    "clip wide": LogitGradientClip(CrossEntropy(), 100.0, "l2"),
    "torch ce": bounded(nn.CrossEntropyLoss(reduction="sum")),
    "torch ce smoothed": bounded(nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.2)),
}
BINARY = {
    "bce": BinaryCrossEntropy(),
    "bce tau=9": BinaryCrossEntropy(9.0),
    "bce clip": LogitGradientClip(BinaryCrossEntropy(), 0.5, "l1"),
    "torch bce": bounded(nn.BCEWithLogitsLoss(reduction="sum")),
}


def logit_gradient(loss: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
    z = logits.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(z, targets), z)
    return g


def hard_logits(classes: int) -> Tensor:
    """Random of many scales, ties, one-hot of any size and sign, huge, subnormal, one class far below the others."""
    blocks = [scale * torch.randn(40, classes) for scale in (1e-3, 1.0, 30.0, 1e4, 1e30)]
    eye = torch.eye(classes)
    blocks += [size * eye for size in (1.0, -1.0, 40.0, -40.0, 1e20, -1e20, 1e-40)]
    blocks += [torch.full((classes, classes), value) for value in (0.0, -7.0, 1e25)]
    blocks += [50.0 - 100.0 * eye, torch.arange(classes).float().flip(0).expand(classes, classes)]
    return torch.cat(blocks).double()


def assert_bounded(loss: BoundedLoss, g: Tensor) -> dict[str, float]:
    claimed = loss.logit_gradient(g.shape[1])
    largest = {}
    for name, p in ORDERS.items():
        largest[name] = float(torch.linalg.vector_norm(g, p, dim=1).amax())
        assert largest[name] <= getattr(claimed, name) * (1 + 1e-12), (name, largest[name], getattr(claimed, name))
    return largest


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("name", MULTICLASS)
def test_multiclass_gradient_is_bounded(name: str, classes: int) -> None:
    logits = hard_logits(classes)
    for label in range(classes):
        labels = torch.full((len(logits),), label)
        g = logit_gradient(MULTICLASS[name], logits, labels)
        assert torch.isfinite(g).all()
        assert_bounded(MULTICLASS[name], g)


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("name", BINARY)
def test_binary_gradient_is_bounded(name: str, classes: int) -> None:
    logits = hard_logits(classes)
    for targets in (torch.zeros_like(logits), torch.ones_like(logits), torch.rand_like(logits).round()):
        assert_bounded(BINARY[name], logit_gradient(BINARY[name], logits, targets))


@pytest.mark.parametrize("name", ["ce", "ce tau=0.1", "ce tau=64 margin", "margin", "torch ce"])
def test_multiclass_bounds_are_reached(name: str) -> None:
    # All mass on one wrong class: the gradient is e_j - e_y.
    logits = torch.tensor([[0.0, 1e4, 0.0]], dtype=torch.float64)
    largest = assert_bounded(MULTICLASS[name], logit_gradient(MULTICLASS[name], logits, torch.tensor([0])))
    claimed = MULTICLASS[name].logit_gradient(3)
    assert all(largest[n] >= 0.99 * getattr(claimed, n) for n in ORDERS)


@pytest.mark.parametrize("name", ["bce", "bce tau=9", "torch bce"])
def test_binary_bounds_are_reached(name: str) -> None:
    logits = torch.full((1, 5), 1e3, dtype=torch.float64)
    largest = assert_bounded(BINARY[name], logit_gradient(BINARY[name], logits, torch.zeros(1, 5)))
    assert (largest["l1"], largest["l2"], largest["linf"]) == pytest.approx((5, math.sqrt(5), 1))


def test_gradient_ascent_does_not_pass_the_bounds() -> None:
    for name, loss in MULTICLASS.items():
        z = torch.randn(32, 4, dtype=torch.float64, requires_grad=True)
        labels = torch.arange(32) % 4
        search = torch.optim.Adam([z], lr=0.5)
        for _ in range(40):
            out = loss(z, labels)
            (g,) = torch.autograd.grad(out, z, create_graph=not name.startswith("clip"))
            assert_bounded(loss, g.detach())
            if not g.requires_grad:
                break
            search.zero_grad()
            (-g.norm(dim=1).sum()).backward()
            search.step()


def test_values_are_those_of_torch() -> None:
    z, y = torch.randn(20, 5), torch.arange(20) % 5
    assert CrossEntropy()(z, y) == pytest.approx(float(F.cross_entropy(z, y, reduction="sum")))
    torch.testing.assert_close(CrossEntropy(4.0)(z, y), F.cross_entropy(4 * z, y, reduction="sum") / 4)
    t = torch.rand(20, 5)
    torch.testing.assert_close(BinaryCrossEntropy()(z, t), F.binary_cross_entropy_with_logits(z, t, reduction="sum"))
    torch.testing.assert_close(
        BinaryCrossEntropy(3.0)(z, t), F.binary_cross_entropy_with_logits(3 * z, t, reduction="sum") / 3
    )
    by_hand = torch.tensor(0.0)
    for b in range(20):
        runner_up = max(float(z[b, j]) for j in range(5) if j != y[b])
        by_hand += max(0.0, 1.5 + runner_up - float(z[b, y[b]]))
    torch.testing.assert_close(MulticlassMargin(1.5)(z, y), by_hand)
    for ours, theirs in ((CrossEntropy(), nn.CrossEntropyLoss(reduction="sum")),):
        torch.testing.assert_close(bounded(theirs)(z, y), ours(z, y))


@pytest.mark.parametrize("name", MULTICLASS)
def test_loss_is_a_sum_over_examples(name: str) -> None:
    loss, z, y = MULTICLASS[name], torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 4
    parts = [loss(z[b : b + 1], y[b : b + 1]) for b in range(6)]
    torch.testing.assert_close(loss(z, y), torch.stack(parts).sum())
    alone = torch.cat([logit_gradient(loss, z[b : b + 1], y[b : b + 1]) for b in range(6)])
    torch.testing.assert_close(logit_gradient(loss, z, y), alone)


def test_margin_lowers_the_true_logit_only() -> None:
    z, y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 3
    lowered = z.clone()
    lowered[torch.arange(8), y] -= 0.75
    torch.testing.assert_close(CrossEntropy(2.0, margin=0.75)(z, y), CrossEntropy(2.0)(lowered, y))
    # A radius of eps = margin / 2 is asked for: an example right by less still has a large gradient.
    sure = torch.tensor([[0.7, 0.0]], dtype=torch.float64)
    assert float(logit_gradient(CrossEntropy(50.0, margin=0.75), sure, torch.tensor([0])).norm()) > 1


@pytest.mark.parametrize("name", [*MULTICLASS, *BINARY])
def test_empty_batch_gives_zero_with_a_gradient(name: str) -> None:
    loss = (MULTICLASS | BINARY)[name]
    z = torch.zeros(0, 3, requires_grad=True)
    value = loss(z, torch.zeros(0, dtype=torch.int64) if name in MULTICLASS else torch.zeros(0, 3))
    value.backward()
    assert value.shape == () and float(value.detach()) == 0 and z.grad is not None and z.grad.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_logit_gradient_clip_scales_to_the_bound_exactly(norm: str, dtype: torch.dtype) -> None:
    z = (5 * torch.randn(200, 6)).to(dtype)
    y = torch.arange(200) % 6
    raw = logit_gradient(CrossEntropy(), z, y)
    clipped = logit_gradient(LogitGradientClip(CrossEntropy(), 0.4, norm), z, y)
    before, after = (torch.linalg.vector_norm(g, ORDERS[norm], dim=1) for g in (raw, clipped))
    assert (before > 0.4).any() and (before < 0.4).any()
    torch.testing.assert_close(after, before.clamp_max(0.4))
    torch.testing.assert_close(clipped[before < 0.4], raw[before < 0.4], rtol=0, atol=0)
    torch.testing.assert_close(F.normalize(clipped), F.normalize(raw))


def test_logit_gradient_clip_leaves_values_and_reports_itself() -> None:
    z, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    loss = LogitGradientClip(CrossEntropy(2.0, 0.1), 0.25, "l1")
    assert float(loss(z, y)) == float(CrossEntropy(2.0, 0.1)(z, y))
    assert loss.clipping == {"bound": 0.25, "norm": "l1"}
    assert CrossEntropy().clipping is None and bounded(nn.CrossEntropyLoss(reduction="sum")).clipping is None
    claimed = loss.logit_gradient(3)
    assert (claimed.l1, claimed.l2, claimed.linf) == (0.25, 0.25, 0.25)
    assert LogitGradientClip(CrossEntropy(), 50.0).logit_gradient(10) == CrossEntropy().logit_gradient(10)


def test_clip_bounds_a_loss_of_unknown_gradient() -> None:
    loss = LogitGradientClip(nn.MSELoss(reduction="sum"), 2.0, "l2")
    z = 1e3 * torch.randn(50, 4, dtype=torch.float64)
    largest = assert_bounded(loss, logit_gradient(loss, z, torch.zeros_like(z)))
    assert largest["l2"] == pytest.approx(2.0)
    weighted = LogitGradientClip(nn.CrossEntropyLoss(torch.tensor([9.0, 1.0]).double(), reduction="sum"), 2.0, "l1")
    assert_bounded(weighted, logit_gradient(weighted, z[:, :2], torch.arange(50) % 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_clip_does_not_hide_what_is_not_finite(bad: float) -> None:
    z = torch.tensor([[bad, 0.0]])
    g = logit_gradient(LogitGradientClip(nn.MSELoss(reduction="sum"), 1.0), z, torch.zeros(1, 2))
    assert not torch.isfinite(g).all()


def test_bounded_returns_what_is_bounded_already() -> None:
    loss = CrossEntropy()
    assert bounded(loss) is loss


class Reweighted(nn.CrossEntropyLoss):
    """A subclass may do anything, so it is not taken for its parent."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 3 * super().forward(input, target)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (nn.CrossEntropyLoss(), "reduction='sum'"),
        (nn.CrossEntropyLoss(reduction="none"), "reduction='sum'"),
        (nn.BCEWithLogitsLoss(), "reduction='sum'"),
        (nn.CrossEntropyLoss(torch.ones(3), reduction="sum"), "weights"),
        (nn.BCEWithLogitsLoss(torch.ones(3), reduction="sum"), "weights"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3), reduction="sum"), "weights"),
        (nn.MSELoss(reduction="sum"), "LogitGradientClip"),
        (nn.Linear(2, 2), "Linear"),
        (Reweighted(reduction="sum"), "Reweighted"),
    ],
)
def test_bounded_refuses(loss: nn.Module, says: str) -> None:
    with pytest.raises(PlanError, match=says) as error:
        bounded(loss)
    assert "\n" not in str(error.value) and "expected" in str(error.value) and ", got " in str(error.value)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_arguments_out_of_range_are_refused(bad: float) -> None:
    for make in (
        lambda: CrossEntropy(temperature=bad),
        lambda: BinaryCrossEntropy(bad),
        lambda: MulticlassMargin(bad),
        lambda: LogitGradientClip(CrossEntropy(), bad),
    ):
        with pytest.raises(ConfigError) as error:
            make()
        assert "\n" not in str(error.value)


def test_other_arguments_are_refused() -> None:
    for make in (
        lambda: CrossEntropy(margin=float("nan")),
        lambda: CrossEntropy(margin=float("inf")),
        lambda: LogitGradientClip(CrossEntropy(), 1.0, "linf"),
        lambda: LogitGradientClip(nn.MSELoss(), 1.0),
    ):
        with pytest.raises(ConfigError):
            make()


@pytest.mark.parametrize("loss", [CrossEntropy(), MulticlassMargin()])
def test_labels_are_checked(loss: BoundedLoss) -> None:
    z = torch.randn(3, 4)
    for labels in (
        torch.tensor([0, 1]),
        torch.tensor([0.0, 1.0, 2.0]),
        torch.zeros(3, 4),
        torch.tensor([0, 1, 4]),
        torch.tensor([0, -1, 2]),
    ):
        with pytest.raises(DataError) as error:
            loss(z, labels)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError):
        loss(torch.randn(3), torch.tensor([0, 1, 2]))


def test_one_class_has_no_margin() -> None:
    with pytest.raises(DataError, match="two or more classes"):
        MulticlassMargin()(torch.zeros(2, 1), torch.tensor([0, 0]))


def test_binary_targets_are_checked() -> None:
    loss = BinaryCrossEntropy()
    for targets in (
        torch.tensor([0, 1]),
        torch.full((2, 3), 1.5),
        torch.full((2, 3), -1),
        torch.full((2, 3), math.nan),
    ):
        with pytest.raises(DataError):
            loss(torch.zeros(2, 3), targets)
    column = torch.randn(4, 1)
    torch.testing.assert_close(
        loss(column, torch.tensor([0, 1, 1, 0])), loss(column, torch.tensor([[0], [1], [1], [0]]))
    )
