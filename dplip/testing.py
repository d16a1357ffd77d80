# SPDX-License-Identifier: Apache-2.0
"""The contract that every Lipschitz layer signs, as a pytest class to inherit from.

A test of a new layer is a factory and a shape; all checks are inherited::

    class TestAbs(LayerContract):
        in_shape = (6,)

        def make(self):
            return Abs()

Each check runs on several draws of the parameters (as initialised, random, 1000 times larger and smaller, all
rows tied, zero) and on inputs of three scales, most of which are chosen to be hard: one-hot, constant, corners,
heavy tails, ties, exact and near copies of the weights. A search can refute a bound but never prove it.
"""

from __future__ import annotations

import copy
import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from dplip.audit.examples import boxes, hard_inputs, hard_pairs, jacobian, moves
from dplip.audit.layer import PAIRS, claims, measured_norms, rounding, search_gradients, search_moves
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import Norms

__all__ = ["LayerContract"]

_RELATIVE = 1e-9


def _require(found: float, bound: float, what: str, absolute: float = 0.0) -> None:
    if not found <= bound * (1 + _RELATIVE) + absolute:
        raise AssertionError(f"{what}: expected at most {bound:.9g}, found {found:.9g}")


def _require_equal(found: Tensor, expected: Tensor, what: str, scale: float = 1.0) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11 * scale, msg=lambda text: f"{what}: {text}")


class LayerContract:
    """Give :attr:`in_shape` and :meth:`make`; inherit every check.

    Attributes:
        in_shape: shape of one example, small (a few dozen entries: Jacobians are formed).
        tight: parameters whose bound the search must *reach* (ratio 0.99): not slack by mistake.
        constraint: operator norms that :meth:`LipschitzLayer.project_` must leave at most this large.
        parameter_draws: which draws of the parameters to test; remove those the layer does not allow.
        scales: sizes of the inputs.
        search_steps: Adam steps of the search.
    """

    in_shape: ClassVar[tuple[int, ...]]
    tight: ClassVar[frozenset[str]] = frozenset()
    constraint: ClassVar[dict[str, float]] = {}
    parameter_draws: ClassVar[tuple[str, ...]] = (
        "initial",
        "random",
        "random2",
        "large",
        "small",
        "tied",
        "zero",
    )
    scales: ClassVar[tuple[float, ...]] = (0.1, 1.0, 100.0)
    search_steps: ClassVar[int] = 15

    def make(self) -> LipschitzLayer:
        """A fresh layer."""
        raise NotImplementedError(f"{type(self).__name__}: expected make() to return a layer; override it")

    # Material

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "layer" in metafunc.fixturenames:
            metafunc.parametrize("layer", self.draws(), indirect=True)

    def draws(self) -> list[str]:
        """Names of the draws of the parameters; a layer without parameters has one."""
        some = any(True for _ in self.make().parameters())
        return [d for d in self.parameter_draws if some or d == "initial"]

    @pytest.fixture
    def layer(self, request: pytest.FixtureRequest) -> LipschitzLayer:
        return self.draw(request.param)

    def draw(self, name: str) -> LipschitzLayer:
        """The layer in float64 with one of the draws of its parameters."""
        torch.manual_seed(sum(map(ord, name)))
        layer = self.make().double()
        factor = {"large": 1e3, "small": 1e-3, "zero": 0.0}.get(name, 1.0)
        with torch.no_grad():
            for p in () if name == "initial" else layer.parameters():
                p.copy_(factor * torch.randn_like(p))
                if name == "tied":
                    p.copy_(p[:1].expand_as(p))
        return layer

    def shapes(self, layer: LipschitzLayer) -> Shapes:
        """One example's shapes; the output's is found by running the layer in float64."""
        y = layer(torch.zeros(1, *self.in_shape, dtype=torch.float64))
        return Shapes(tuple(self.in_shape), tuple(y.shape[1:]))

    def inputs(self, layer: LipschitzLayer, scale: float) -> Tensor:
        """A batch of random and of extreme examples; override where the layer has hard inputs of its own."""
        return hard_inputs(layer, self.in_shape, scale)

    def pairs(self, layer: LipschitzLayer, scale: float) -> tuple[Tensor, Tensor]:
        """Inputs, each with several cotangents."""
        return hard_pairs(layer, self.inputs(layer, scale))

    # Bounds

    def test_jacobians_obey_operator_norms(self, layer: LipschitzLayer) -> None:
        shapes = self.shapes(layer)
        claimed = layer.operator_norms(shapes).closed(shapes.in_dim, shapes.out_dim)
        for scale in self.scales:
            j = jacobian(layer, self.inputs(layer, scale))
            found = {
                "inf_inf": j.abs().sum(2),
                "two_inf": torch.linalg.vector_norm(j, dim=2),
                "two_two": torch.linalg.matrix_norm(j, 2),
                "one_one": j.abs().sum(1),
                "one_inf": j.abs(),
            }
            for name, value in found.items():
                _require(float(value.max()), getattr(claimed, name), f"operator_norms.{name}, scale {scale:g}")

    def test_finite_differences_obey_operator_norms(self, layer: LipschitzLayer) -> None:
        shapes = self.shapes(layer)
        claimed = layer.operator_norms(shapes).closed(shapes.in_dim, shapes.out_dim)
        for scale in self.scales:
            for x, d, moved in moves(layer, self.inputs(layer, scale), scale):
                before, after, slack = measured_norms(d), measured_norms(moved), rounding(layer, x + d)
                for name, (a, b) in PAIRS.items():
                    excess = after[b] - getattr(claimed, name) * (1 + _RELATIVE) * before[a]
                    _require(float(excess.max()), 0.0, f"operator_norms.{name}, excess move", slack)

    def test_output_and_range_bounds_hold(self, layer: LipschitzLayer) -> None:
        shapes = self.shapes(layer)
        reach = layer.range_bound(shapes)
        for scale in self.scales:
            for x, d, moved in moves(layer, self.inputs(layer, scale), scale):
                slack = rounding(layer, x + d)
                self._require_norms(moved, [[layer.output_bound(c, shapes) for c in cs] for cs in claims(d)], slack)
                if reach is not None:
                    self._require_norms(layer(x + d).detach(), [[reach]] * len(x), 0.0, "range_bound")

    def test_cotangent_bound_holds(self, layer: LipschitzLayer) -> None:
        shapes = self.shapes(layer)
        for scale in self.scales:
            x, g = self.pairs(layer, scale)
            x.requires_grad_()
            (dx,) = torch.autograd.grad(layer(x), x, g, materialize_grads=True)
            bounds = [[layer.cotangent_bound(c, shapes) for c in cs] for cs in claims(g)]
            self._require_norms(dx, bounds, 0.0, f"cotangent_bound, scale {scale:g}")

    @staticmethod
    def _require_norms(v: Tensor, bounds: list[list[Norms]], slack: float, what: str = "output_bound") -> None:
        for name, values in measured_norms(v).items():
            for value, several in zip(values.tolist(), bounds, strict=True):
                _require(value, min(getattr(b, name) for b in several), f"{what}.{name}", slack)

    def test_param_sensitivity_holds(self, layer: LipschitzLayer) -> None:
        shapes, names = self.shapes(layer), {n for n, _ in layer.named_parameters()}
        for scale in self.scales:
            x, g = self.pairs(layer, scale)
            with torch.no_grad():
                grads = layer.per_sample_grad(x, g)
            norms = {k: torch.linalg.vector_norm(v.flatten(1), dim=1).tolist() for k, v in grads.items()}
            for i, (of_x, of_g) in enumerate(zip(claims(x), claims(g), strict=True)):
                known = [(of_x[0], c) for c in of_g] + [(c, of_g[0]) for c in of_x[1:]]
                for bounds in (layer.param_sensitivity(a, b, shapes) for a, b in known):
                    if not set(bounds) == set(grads) == names:
                        raise AssertionError(
                            f"expected the names {sorted(names)}, got {sorted(bounds)} and {sorted(grads)}"
                        )
                    for name, bound in bounds.items():
                        _require(norms[name][i], bound, f"param_sensitivity[{name}], scale {scale:g}")

    def test_search_finds_no_violation(self) -> None:
        reached: dict[str, float] = {}
        for draw, scale in zip(("initial", "random"), (100.0, 1.0), strict=True):
            layer = self.draw(draw if draw in self.parameter_draws else "initial")
            x, g = self.pairs(layer, scale)
            shapes, lr = self.shapes(layer), 0.03 * scale
            ratios = search_gradients(layer, shapes, x, g, steps=self.search_steps, lr=lr)
            x = self.inputs(layer, scale)
            d = 1e-2 * scale * torch.randn_like(x)
            ratios |= search_moves(layer, shapes, x, d, steps=self.search_steps, lr=lr)
            reached = {name: max(ratio, reached.get(name, 0.0)) for name, ratio in ratios.items()}
        for name, ratio in reached.items():
            _require(ratio, 1.0, f"largest ratio found for {name}", 1e-6)
            if name in self.tight and ratio < 0.99:
                raise AssertionError(f"{name}: expected the search to reach its bound, found {ratio:.4f} of it")

    # Gradients and intervals

    def test_per_sample_grad_is_autograd(self, layer: LipschitzLayer) -> None:
        for scale in self.scales:
            x = self.inputs(layer, scale)
            g = torch.randn_like(layer(x))
            got = layer.per_sample_grad(x, g)
            size = max(1.0, float(x.abs().max()))
            for i in range(len(x)):
                expected = self._autograd(layer, x[i : i + 1], g[i : i + 1])
                if set(expected) != set(got):
                    raise AssertionError(f"per_sample_grad: expected {sorted(expected)}, got {sorted(got)}")
                for name, value in expected.items():
                    _require_equal(got[name][i], value, f"per_sample_grad[{name}], example {i}", size)
            for name, value in self._autograd(layer, x, g).items():
                _require_equal(got[name].sum(0), value, f"sum of per_sample_grad[{name}]", size * len(x))

    @staticmethod
    def _autograd(layer: LipschitzLayer, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        named = dict(layer.named_parameters())
        if not named:
            return {}
        grads = torch.autograd.grad(layer(x), list(named.values()), g, materialize_grads=True)
        return dict(zip(named, grads, strict=True))

    def test_interval_contains_the_box(self, layer: LipschitzLayer) -> None:
        if type(layer).interval is LipschitzLayer.interval:
            pytest.skip("the layer has no interval rule")
        for scale in self.scales:
            lower, upper = boxes(self.inputs(layer, scale), scale)
            low, high = (v.detach() for v in layer.interval(lower, upper))
            slack = rounding(layer, torch.maximum(lower.abs(), upper.abs()))
            shares = [torch.rand_like(lower) for _ in range(10)]
            shares += [(torch.rand_like(lower) < 0.5).to(lower.dtype) for _ in range(10)]
            points = [lower + (upper - lower) * s for s in shares] + [lower, upper, 0 * lower]
            points += [
                p.detach().flatten()[: lower[0].numel()].view(lower[0].shape).expand_as(lower)
                for p in layer.parameters()
                if p.numel() >= lower[0].numel()
            ]
            for x in points:
                y = layer(torch.clamp(x, lower, upper)).detach()
                _require(float((low - y).max()), 0.0, "interval: lower end above a value", slack)
                _require(float((y - high).max()), 0.0, "interval: upper end below a value", slack)
            x = self.inputs(layer, scale)
            for end in layer.interval(x, x):
                away = (end - layer(x)).detach().abs()
                _require(float(away.max()), 0.0, "interval of a point: not its value", slack)

    # Behaviour in a batch

    def test_examples_do_not_see_each_other(self, layer: LipschitzLayer) -> None:
        x = self.inputs(layer, 1.0)
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        alone = torch.cat([layer(row[None]) for row in x])
        for company in (torch.zeros_like(x[:1]), 1e30 + x[:3], torch.full_like(x[:2], math.nan)):
            _require_equal(layer(torch.cat([company, x]))[len(company) :], alone, "output in company")
            _require_equal(layer(torch.cat([x, company]))[: len(x)], alone, "output in company")
        for name, value in layer.state_dict().items():
            if not torch.equal(value, before[name]):
                raise AssertionError(f"forward changed '{name}' of the state")
        x.requires_grad_()
        y = layer(x)
        g = torch.randn_like(y)
        (together,) = torch.autograd.grad(y, x, g, materialize_grads=True)
        for i in range(len(x)):
            one = x[i : i + 1].detach().requires_grad_()
            (dx,) = torch.autograd.grad(layer(one), one, g[i : i + 1], materialize_grads=True)
            _require_equal(dx, together[i : i + 1], f"input gradient of example {i}")

    def test_empty_batch(self, layer: LipschitzLayer) -> None:
        x = torch.zeros(0, *self.in_shape, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        if tuple(y.shape) != (0, *self.shapes(layer).output):
            raise AssertionError(f"empty batch: expected [0, *{self.shapes(layer).output}], got {tuple(y.shape)}")
        torch.autograd.grad(y.sum(), [x, *layer.parameters()], materialize_grads=True)
        for name, grad in layer.per_sample_grad(x.detach(), torch.zeros_like(y)).items():
            if tuple(grad.shape) != (0, *layer.get_parameter(name).shape):
                raise AssertionError(f"empty batch: per_sample_grad[{name}] has shape {tuple(grad.shape)}")
        if type(layer).interval is not LipschitzLayer.interval:
            for end in layer.interval(x.detach(), x.detach()):
                if end.shape != y.shape:
                    raise AssertionError(f"empty batch: interval has shape {tuple(end.shape)}")

    def test_float32_and_strides(self, layer: LipschitzLayer) -> None:
        x = self.inputs(layer, 1.0)
        y = layer(x)
        g = torch.randn_like(y)
        half = copy.deepcopy(layer).float()
        single = half(x.float())
        if (y.dtype, single.dtype) != (torch.float64, torch.float32):
            raise AssertionError(f"expected outputs of the input's dtype, got {y.dtype} and {single.dtype}")
        size = 1 + max((float(p.detach().abs().max()) for p in layer.parameters()), default=0.0)
        torch.testing.assert_close(single.double(), y, rtol=1e-4, atol=1e-4 * size)
        grads = half.per_sample_grad(x.float(), g.float())
        if any(v.dtype != torch.float32 for v in grads.values()):
            raise AssertionError("per_sample_grad: expected float32 gradients for float32 inputs")
        for wide in (
            lambda v: v.repeat_interleave(2, 0)[::2],
            lambda v: v.transpose(0, -1).contiguous().transpose(0, -1),
        ):
            _require_equal(layer(wide(x)), y, "output of a strided input")
            got, expected = layer.per_sample_grad(wide(x), wide(g)), layer.per_sample_grad(x, g)
            for name, value in expected.items():
                _require_equal(got[name], value, f"per_sample_grad[{name}] of strided tensors")
            strided = wide(x).detach().requires_grad_()
            (dx,) = torch.autograd.grad(layer(strided), strided, wide(g), materialize_grads=True)
            plain = x.detach().requires_grad_()
            _require_equal(dx, torch.autograd.grad(layer(plain), plain, g, materialize_grads=True)[0], "strided dx")

    # Parameters

    def test_project_is_idempotent_and_keeps_the_constraint(self, layer: LipschitzLayer) -> None:
        shapes = self.shapes(layer)
        for dtype, slack in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            projected = copy.deepcopy(layer).to(dtype)
            projected.project_()
            claimed = projected.double().operator_norms(shapes)
            for name, value in self.constraint.items():
                _require(getattr(claimed, name), value, f"{name} after project_ in {dtype}", slack)
            once = {name: p.detach().clone() for name, p in projected.named_parameters()}
            projected.project_()
            for name, p in projected.named_parameters():
                size = 1 + float(once[name].abs().max())
                torch.testing.assert_close(p.detach(), once[name], rtol=0, atol=slack * size)
            self.test_jacobians_obey_operator_norms(projected)

    def test_state_and_copies(self, layer: LipschitzLayer) -> None:
        x = self.inputs(layer, 1.0)
        y = layer(x).detach().clone()
        layer.operator_norms(self.shapes(layer))
        other = self.make().double()
        other.load_state_dict(layer.state_dict())
        twin = copy.deepcopy(layer)
        for name, again in (("state_dict", other), ("deepcopy", twin)):
            if not torch.equal(again(x), y):
                raise AssertionError(f"{name}: expected the same function after a round trip")
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(2).add_(1)
        if not torch.equal(layer(x), y):
            raise AssertionError("deepcopy: changing the copy changes the original")
        self.test_jacobians_obey_operator_norms(twin)  # no bound may survive from before the parameters changed
