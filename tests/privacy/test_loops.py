# SPDX-License-Identifier: Apache-2.0
"""Training loops of other frameworks run unchanged: the module is called through wrappers, backward by somebody else.

The stand-ins below do what Lightning Fabric and Hugging Face Accelerate do to a module, an optimizer and a loss.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dplip.errors import BoundViolation, DataError, PlanError
from dplip.layers import BallClip, MaxMin, NormalizedLinear
from dplip.losses import CrossEntropy
from dplip.privacy import ClipFreeEngine, ClipFreeOptimizer, PrivateLoader, virtual_batches
from tests.privacy.toy import CLASSES, DIM, DOMAIN, attach, data, net, plan, same, weights

LOSS = CrossEntropy()


class FabricModule(nn.Module):
    """Calls the module inside a precision context and converts what goes in and out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._forward_module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext():
            args = tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
            return self._forward_module(*args, **kwargs).float()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_forward_module"), name)


class FabricOptimizer:
    """Fabric's: another class with the optimizer's attributes, whose step goes through a strategy."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("state_dict", "step")}
        self.__class__ = type("Fabric" + type(optimizer).__name__, (FabricOptimizer, type(optimizer)), {})
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self._optimizer.step() if closure is None else self._optimizer.step(closure)


class Fabric:
    def setup(self, module: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        return FabricModule(module), FabricOptimizer(optimizer)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


class AcceleratedOptimizer(Optimizer):
    """Accelerate's: a torch optimizer that forwards to the one it holds."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> Any:  # type: ignore[override]
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: Any) -> None:
        self.optimizer.defaults = defaults

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        self.optimizer.zero_grad(set_to_none=True if set_to_none is None else set_to_none)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.optimizer.step(closure)


class Accelerator:
    def prepare(self, module: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        module.forward = module.forward  # type: ignore[method-assign]  # patched on the instance, as Accelerate does
        return module, AcceleratedOptimizer(optimizer)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def fabric_loop(module: nn.Module, optimizer: Any, loader: Any) -> None:
    fabric = Fabric()
    module, optimizer = fabric.setup(module, optimizer)
    schedule = LambdaLR(optimizer._optimizer, lambda t: 0.9**t)
    for x, y in loader:
        optimizer.zero_grad()
        fabric.backward(LOSS(module(x), y))
        optimizer.step()
        schedule.step()


def accelerate_loop(module: nn.Module, optimizer: Any, loader: Any) -> None:
    accelerator = Accelerator()
    module, optimizer = accelerator.prepare(module, optimizer)
    schedule = LambdaLR(optimizer.optimizer, lambda t: 0.9**t)
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(LOSS(module(x), y))
        optimizer.step()
        schedule.step()


def closure_loop(module: nn.Module, optimizer: Any, loader: Any) -> None:
    """Lightning's automatic optimization calls everything from a closure."""
    schedule = LambdaLR(optimizer, lambda t: 0.9**t)
    for x, y in loader:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = LOSS(module(x), y)
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
        schedule.step()


def plain_loop(module: nn.Module, optimizer: Any, loader: Any) -> None:
    schedule = LambdaLR(optimizer, lambda t: 0.9**t)
    for x, y in loader:
        optimizer.zero_grad()
        LOSS(module(x), y).backward()
        optimizer.step()
        schedule.step()


def problem() -> tuple[nn.Module, ClipFreeEngine, ClipFreeOptimizer, PrivateLoader]:
    torch.manual_seed(0)
    module = net()
    engine = ClipFreeEngine(insecure_seed=5)
    _, optimizer, loader = engine.attach(module, SGD(module.parameters(), 0.1), data(), LOSS, plan(), DOMAIN)
    return module, engine, optimizer, loader


@pytest.mark.parametrize("loop", [fabric_loop, accelerate_loop, closure_loop])
def test_a_framework_loop_is_the_plain_loop(loop: Callable[[nn.Module, Any, Any], None]) -> None:
    module, engine, optimizer, loader = problem()
    plain_loop(module, optimizer, loader)
    again, other, wrapped, batches = problem()
    loop(again, wrapped, batches)
    assert same(weights(module), weights(again))
    assert other.accountant.ledger == engine.accountant.ledger and wrapped.steps_taken == 5


@pytest.mark.parametrize("loop", [fabric_loop, accelerate_loop])
def test_a_framework_loop_over_parts(loop: Callable[[nn.Module, Any, Any], None]) -> None:
    module, engine, optimizer, loader = problem()
    fabric = Fabric()
    wrapped = FabricModule(module)
    with virtual_batches(loader, optimizer, 4) as batches:
        for x, y in batches:
            optimizer.zero_grad()
            fabric.backward(LOSS(wrapped(x), y))
            optimizer.step()
    assert engine.accountant.steps == 5 == optimizer.steps_taken


def test_checks_hold_through_wrappers() -> None:
    module, engine, optimizer, _ = problem()
    wrapped, fabric_optimizer = Fabric().setup(module, optimizer)
    x, y = torch.rand(6, DIM), torch.arange(6) % CLASSES
    with pytest.raises(DataError):
        wrapped(x + 1)
    with pytest.raises(BoundViolation):
        (3 * LOSS(wrapped(x), y)).backward()
    optimizer.zero_grad()
    for _ in range(2):
        Fabric().backward(LOSS(wrapped(x), y))
    with pytest.raises(PlanError, match="one backward pass"):
        fabric_optimizer.step()
    assert engine.accountant.steps == 0


def test_scaled_losses_are_refused() -> None:
    """A gradient scaler multiplies the loss; the noise would be for the unscaled one."""
    module, engine, optimizer, _ = problem()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with pytest.raises(BoundViolation):
        scaler.scale(LOSS(module(torch.rand(6, DIM)), torch.arange(6) % CLASSES)).backward()
    assert engine.accountant.steps == 0 and optimizer.steps_taken == 0


def test_a_wrapped_module_can_be_made_private() -> None:
    """A wrapper of one positional argument is traced through."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.module(x)
            return out

    module = Wrapper(net())
    engine, optimizer = attach(module)
    LOSS(module(torch.rand(4, DIM)), torch.arange(4) % CLASSES).backward()
    optimizer.step()
    assert engine.accountant.steps == 1 and set(optimizer.released_sigma) == {n for n, _ in module.named_parameters()}


def test_calling_a_part_of_the_wrapped_module_is_refused() -> None:
    module, engine, optimizer, _ = problem()
    assert isinstance(module, nn.Sequential)
    x, y = torch.rand(6, DIM), torch.arange(6) % CLASSES
    LOSS(module[2](module[1](module[0](x))), y).backward()
    with pytest.raises(PlanError, match="unchecked"):
        optimizer.step()
    assert engine.accountant.steps == 0


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(BallClip(1.0), NormalizedLinear(DIM, 4), MaxMin(), NormalizedLinear(4, CLASSES))


def compiled(module: nn.Module, when: str) -> tuple[Any, ClipFreeEngine]:
    """``module`` compiled, and its engine; 'warm' runs it before it is private."""
    callee: Any = module
    if when == "in place":
        module.compile(backend="aot_eager")
    elif when != "after":
        callee = torch.compile(module, backend="aot_eager")
    if when == "warm":
        callee(torch.rand(4, DIM)).sum().backward()
    engine = ClipFreeEngine(insecure_seed=1)
    private, *_ = engine.attach(callee, SGD(callee.parameters(), 0.1), data(), LOSS, plan(), DOMAIN)
    assert private is callee
    return (torch.compile(module, backend="aot_eager") if when == "after" else callee), engine


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns itself while it compiles
@pytest.mark.parametrize("when", ["before", "after", "in place", "warm"])
def test_compiled_modules_have_exact_gradients_and_all_checks(when: str) -> None:
    torch.compiler.reset()
    eager, module = mlp(), mlp()
    attach(eager)
    callee, engine = compiled(module, when)
    optimizer = engine.optimizer
    assert optimizer is not None
    for n in (4, 1, 0):
        x, y = torch.rand(n, DIM), torch.arange(n) % CLASSES
        eager.zero_grad()
        optimizer.zero_grad()
        LOSS(eager(x), y).backward()
        LOSS(callee(x), y).backward()
        assert optimizer.guard.backward_passes == 1
        for p, q in zip(eager.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    optimizer.step()
    x, y = torch.rand(4, DIM), torch.arange(4) % CLASSES
    with pytest.raises(DataError):
        callee(x + 1)
    with pytest.raises(BoundViolation):
        (3 * LOSS(callee(x), y)).backward()
    optimizer.zero_grad()
    for _ in range(2):
        LOSS(callee(x), y).backward()
    with pytest.raises(PlanError, match="one backward pass"):
        optimizer.step()
    optimizer.zero_grad()
    LOSS(callee(x), y).backward()
    optimizer.step()
    assert engine.accountant.steps == 2


def test_code_compiled_without_the_guard_cannot_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where compiled code passes the module's hooks by, the parameters' own hooks notice."""
    module, engine, optimizer, _ = problem()
    monkeypatch.setattr(module, "_forward_pre_hooks", {})
    monkeypatch.setattr(module, "_forward_hooks", {})
    LOSS(module(torch.rand(4, DIM)), torch.arange(4) % CLASSES).backward()
    with pytest.raises(PlanError, match="unchecked"):
        optimizer.step()
    assert engine.accountant.steps == 0
