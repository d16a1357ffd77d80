# SPDX-License-Identifier: Apache-2.0
"""Low precision is refused in training where it touches the model, and only there."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from dplip.bounds import InputDomain, trace
from dplip.errors import PlanError
from dplip.layers import Abs, BallClip, LinfDistance, MaxMin, NormalizedConv2d, NormalizedLinear, PositionBias, Scale
from dplip.losses import CrossEntropy
from dplip.privacy.arithmetic import Arithmetic, _lowered
from tests.privacy.toy import CLASSES, DIM, attach, net

LOSS = CrossEntropy()


def spectral() -> nn.Sequential:
    return nn.Sequential(BallClip(1.0), NormalizedLinear(DIM, 4), MaxMin(), NormalizedLinear(4, CLASSES))


def selecting() -> nn.Sequential:
    return nn.Sequential(PositionBias(DIM), Abs(), PositionBias(DIM))


@pytest.fixture
def precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_that_lowers_a_product_is_refused_by_node(dtype: torch.dtype) -> None:
    module = spectral()
    engine, optimizer = attach(module)
    with torch.autocast("cpu", dtype), pytest.raises(PlanError, match="node '_1'") as error:
        module(torch.rand(3, DIM))
    assert "\n" not in str(error.value) and engine.accountant.steps == 0
    LOSS(module(torch.rand(3, DIM)), torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    with torch.autocast("cpu", dtype), torch.no_grad():
        module(torch.rand(3, DIM))  # nothing is released from it
    with torch.autocast("cpu", dtype):
        module.eval()(torch.rand(3, DIM))


def test_why_bfloat16_is_refused_one_example_moves_a_rounded_sum_by_more_than_its_bound() -> None:
    """The counterexample behind the refusal: gradients of norm 0.997, added one by one."""
    grads = torch.full((2000, 1), 0.997)
    rounded = torch.stack([grads[:n].sum(0).to(torch.bfloat16).double() for n in range(1900, 2001)])
    assert float(rounded.diff(dim=0).max()) == 8.0


def test_autocast_that_changes_nothing_is_accepted_and_gives_the_same_gradients() -> None:
    module = selecting()
    _, optimizer = attach(module)
    x, y = torch.rand(6, DIM), torch.arange(6) % DIM
    LOSS(module(x), y).backward()
    plain = [p.grad.clone() for p in module.parameters()]
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        LOSS(module(x), y).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), plain, strict=True))
    optimizer.step()
    assert optimizer.steps_taken == 1


def test_a_model_that_is_one_layer_is_checked_too() -> None:
    module = NormalizedLinear(DIM, CLASSES)
    attach(module)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(PlanError, match="node 'model'"):
        module(torch.rand(3, DIM))
    module = PositionBias(DIM)
    attach(module)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.rand(3, DIM)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_distances_in_half_precision_are_refused_by_node(dtype: torch.dtype) -> None:
    """Left alone, autocast does not reach them; asked for, half precision is seen."""
    module = nn.Sequential(LinfDistance(DIM, 4), LinfDistance(4, CLASSES))
    attach(module)
    with torch.autocast("cpu", dtype):
        plain = module(torch.rand(3, DIM))
    assert plain.dtype == torch.float32
    module[1].half_training = True
    with torch.autocast("cpu", dtype), pytest.raises(PlanError, match="node '_1'"):
        module(torch.rand(3, DIM))
    module(torch.rand(3, DIM))


def test_float64_is_left_alone() -> None:
    module = spectral().double()
    _, optimizer = attach(module)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(torch.rand(3, DIM, dtype=torch.float64))
    assert out.dtype == torch.float64
    LOSS(out, torch.tensor([0, 1, 2])).backward()
    optimizer.step()


@pytest.mark.parametrize("level", ["high", "medium"])
def test_lowered_products_are_refused(precision: None, level: str) -> None:
    module = spectral()
    attach(module)
    torch.set_float32_matmul_precision(level)
    with pytest.raises(PlanError, match=r"mkldnn\.matmul"):
        module(torch.rand(3, DIM))
    torch.set_float32_matmul_precision("highest")
    module(torch.rand(3, DIM))


def test_convolutions_on_cuda_are_tf32_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert "cudnn.conv" in (_lowered("cuda", True) or "")
    assert _lowered("cuda", False) is None
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert _lowered("cuda", True) is None


def test_convolutions_are_seen() -> None:
    module = nn.Sequential(BallClip(1.0), NormalizedConv2d(1, 2, 3), nn.Flatten(), Scale(1.0))
    graph, domain = trace(module), InputDomain((1, 5, 5), 0.0, 1.0)
    assert Arithmetic(graph, domain.centre(torch.float32, torch.device("cpu")))._convolves
    assert not Arithmetic(trace(net()), domain.centre(torch.float32, torch.device("cpu")))._convolves
