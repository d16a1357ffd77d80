# SPDX-License-Identifier: Apache-2.0
"""The layer contract must reject layers that are wrong by little: 1 % of a tight bound, a sign, a bias, a tie."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dplip.layers import BallClip, GroupSort, LinearSpline, LinfDistance, NormalizedLinear, Scale, SortLinear
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import Norms, OperatorNorms
from dplip.testing import LayerContract


def rejected_by(make: Callable[[], LipschitzLayer], shape: tuple[int, ...], **attributes: Any) -> set[str]:
    """Names of the contract's tests that fail for ``make()``."""
    fewer = {"parameter_draws": ("initial", "large", "tied"), "search_steps": 5}
    body = {"in_shape": shape, "make": lambda self: make(), **fewer, **attributes}
    contract = type("Contract", (LayerContract,), body)()
    failed = set()
    for name, test in inspect.getmembers(contract, inspect.ismethod):
        if not name.startswith("test_"):
            continue
        draws = contract.draws() if "layer" in inspect.signature(test).parameters else [None]
        for draw in draws:
            torch.manual_seed(0)
            try:
                test(contract.draw(draw)) if draw else test()
            except pytest.skip.Exception:
                continue
            except Exception:
                failed.add(name)
                break
    return failed


class Linf(LinfDistance):
    def __init__(self) -> None:
        super().__init__(5, 4)


class Linear(NormalizedLinear):
    def __init__(self) -> None:
        super().__init__(5, 4)


def shrink(n: Norms) -> Norms:
    return Norms(n.dim, *(0.99 * v for v in (n.l1, n.l2, n.linf)))


def test_sound_layers_pass() -> None:
    assert rejected_by(Linf, (5,), tight={"weight", "bias"}) == set()
    assert rejected_by(Linear, (5,), constraint={"two_two": 1.0}) == set()


@pytest.mark.parametrize("base", [Linf, Linear])
@pytest.mark.parametrize("field", ["inf_inf", "two_inf", "two_two", "one_one", "one_inf"])
def test_understated_operator_norm(base: type[LipschitzLayer], field: str) -> None:
    class Mutant(base):
        def operator_norms(self, shapes: Shapes) -> OperatorNorms:
            norms = super().operator_norms(shapes)
            return dataclasses.replace(norms, **{field: 0.99 * getattr(norms, field)})

    assert rejected_by(Mutant, (5,)) >= {"test_jacobians_obey_operator_norms"}


def test_understated_output_bound() -> None:
    class Mutant(Linf):
        def output_bound(self, x: Norms, shapes: Shapes) -> Norms:
            return shrink(super().output_bound(x, shapes))

    assert rejected_by(Mutant, (5,)) == {"test_output_and_range_bounds_hold"}


def test_understated_range_bound() -> None:
    class Mutant(BallClip):
        def range_bound(self, shapes: Shapes) -> Norms:
            return Norms(shapes.out_dim, l2=0.99 * self.radius)

    assert rejected_by(lambda: Mutant(1.0), (4,)) == {"test_output_and_range_bounds_hold"}


@pytest.mark.parametrize("base", [Linf, Linear])
def test_understated_cotangent_bound(base: type[LipschitzLayer]) -> None:
    class Mutant(base):
        def cotangent_bound(self, g: Norms, shapes: Shapes) -> Norms:
            return shrink(super().cotangent_bound(g, shapes))

    assert rejected_by(Mutant, (5,)) == {"test_cotangent_bound_holds"}


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("base", [Linf, Linear])
def test_understated_param_sensitivity(base: type[LipschitzLayer], name: str) -> None:
    class Mutant(base):
        def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
            bounds = super().param_sensitivity(x, g, shapes)
            return bounds | {name: 0.99 * bounds[name]}

    expected = {"test_param_sensitivity_holds", "test_search_finds_no_violation"}
    assert rejected_by(Mutant, (5,)) == expected


def test_overstated_param_sensitivity_where_tightness_is_asked() -> None:
    class Mutant(Linf):
        def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
            return {name: 1.02 * bound for name, bound in super().param_sensitivity(x, g, shapes).items()}

    assert rejected_by(Mutant, (5,)) == set()
    assert rejected_by(Mutant, (5,), tight={"weight"}) == {"test_search_finds_no_violation"}


def test_wrong_sign_of_per_sample_grad() -> None:
    class Mutant(Linf):
        def per_sample_weight_grad(self, x: Tensor, w: Tensor, g: Tensor) -> Tensor:
            return -super().per_sample_weight_grad(x, w, g)

    assert rejected_by(Mutant, (5,)) == {"test_per_sample_grad_is_autograd"}


def test_forgotten_bias_in_interval() -> None:
    class Mutant(Linear):
        def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
            low, high = super().interval(lower, upper)
            return low - self.bias, high - self.bias

    assert rejected_by(Mutant, (5,)) == {"test_interval_contains_the_box"}


def test_interval_from_the_ends_of_a_map_that_is_not_monotone() -> None:
    class Mutant(Linf):
        def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
            a, b = self(lower), self(upper)
            return torch.minimum(a, b), torch.maximum(a, b)

    assert rejected_by(Mutant, (5,)) == {"test_interval_contains_the_box"}


def test_forgotten_parameter() -> None:
    class NoBound(Linf):
        def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
            return {"weight": super().param_sensitivity(x, g, shapes)["weight"]}

    class NoGrad(Linf):
        def per_sample_grad(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
            return {"weight": super().per_sample_grad(x, g)["weight"]}

    assert "test_param_sensitivity_holds" in rejected_by(NoBound, (5,))
    assert rejected_by(NoGrad, (5,)) >= {"test_param_sensitivity_holds", "test_per_sample_grad_is_autograd"}


def test_batch_mean_shift() -> None:
    class Mutant(Linf):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y - y.mean(0, keepdim=True).nan_to_num()

    assert "test_examples_do_not_see_each_other" in rejected_by(Mutant, (5,))


def test_mask_by_place_in_the_batch() -> None:
    class Mutant(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor * (torch.arange(len(x)) % 2)[:, None].to(x.dtype)

    assert "test_examples_do_not_see_each_other" in rejected_by(lambda: Mutant(1.0), (5,))


def test_running_average() -> None:
    class Mutant(Linf):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += len(x)
            return super().forward(x)

    assert "test_examples_do_not_see_each_other" in rejected_by(Mutant, (5,))


def test_bound_that_trusts_the_projection() -> None:
    class Mutant(Linear):
        def operator_norms(self, shapes: Shapes) -> OperatorNorms:
            return OperatorNorms(two_two=1.0)

    assert "test_jacobians_obey_operator_norms" in rejected_by(Mutant, (5,))


def test_bound_that_outlives_its_weight() -> None:
    class Mutant(Linear):
        def operator_norms(self, shapes: Shapes) -> OperatorNorms:
            if self._norms is None:
                return super().operator_norms(shapes)
            return self._norms[1]

    assert "test_state_and_copies" in rejected_by(Mutant, (5,))


def test_projection_that_drifts_or_misses() -> None:
    class Drifts(Linear):
        @torch.no_grad()
        def project_(self) -> None:
            self.weight.mul_(0.9)

    class Misses(Linear):
        @torch.no_grad()
        def project_(self) -> None:
            norm = torch.linalg.matrix_norm(self.weight, 2)
            self.weight.mul_((1.01 / norm).clamp_max(1))

    name = "test_project_is_idempotent_and_keeps_the_constraint"
    assert name in rejected_by(Drifts, (5,))
    assert rejected_by(Misses, (5,), constraint={"two_two": 1.0}) == {name}


def test_l2_clip_that_claims_one_in_linf() -> None:
    class Mutant(BallClip):
        def operator_norms(self, shapes: Shapes) -> OperatorNorms:
            return OperatorNorms.uniform(1.0)

    failed = rejected_by(lambda: Mutant(0.7), (8,))
    assert failed >= {"test_jacobians_obey_operator_norms", "test_finite_differences_obey_operator_norms"}


def test_spline_with_linear_extrapolation() -> None:
    class Mutant(LinearSpline):
        """Continues its last pieces, so coefficient gradients grow with the input."""

        def _locate(self, x: Tensor) -> tuple[Tensor, Tensor]:
            t = (x + self.reach) * (self.intervals / (2 * self.reach))
            index = t.detach().floor().clamp(0, self.intervals - 1)
            return index.long(), t - index

        def forward(self, x: Tensor) -> Tensor:
            index, fraction = self._locate(x)
            rows = torch.arange(self.channels)[None]
            return self.coefficients[rows, index] * (1 - fraction) + self.coefficients[rows, index + 1] * fraction

        def per_sample_grad(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
            index, fraction = (v[..., None] for v in self._locate(x))
            grad = x.new_zeros(len(x), *self.coefficients.shape)
            grad.scatter_add_(2, index, g[..., None] * (1 - fraction))
            return {"coefficients": grad.scatter_add_(2, index + 1, g[..., None] * fraction)}

    failed = rejected_by(lambda: Mutant(3, intervals=4), (3,))
    assert "test_param_sensitivity_holds" in failed
    assert "test_per_sample_grad_is_autograd" not in failed  # the gradient is right, its bound is not


def test_equality_mask_at_ties() -> None:
    class Mutant(LinfDistance):
        """Credits every coordinate that attains the maximum in full."""

        def per_sample_weight_grad(self, x: Tensor, w: Tensor, g: Tensor) -> Tensor:
            t = x[:, None] - w
            top = t.abs() == t.abs().amax(-1, keepdim=True)
            return -t.sign() * top * g[..., None]

    assert "test_param_sensitivity_holds" in rejected_by(lambda: Mutant(5, 4), (5,))


def test_order_weights_that_sum_past_one() -> None:
    class Mutant(SortLinear):
        def distance(self, x: Tensor, w: Tensor) -> Tensor:
            return 1.01 * super().distance(x, w)

    failed = rejected_by(lambda: Mutant.geometric(6, 4, rho=0.3), (6,))
    assert failed >= {"test_jacobians_obey_operator_norms", "test_per_sample_grad_is_autograd"}


def test_precision_and_layout() -> None:
    class Single(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return x.float() * self.factor

    class Viewed(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1).view(x.shape) * self.factor

    class Cut(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_empty(x.shape) if len(x) == 0 else super().forward(x)

    class FlatBatch(GroupSort):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten().sort()[0].reshape(x.shape)

    assert "test_float32_and_strides" in rejected_by(lambda: Single(1.0), (5,))
    assert rejected_by(lambda: Viewed(1.0), (5,)) == {"test_float32_and_strides"}
    assert rejected_by(lambda: Cut(1.0), (5,)) == {"test_empty_batch"}
    assert "test_examples_do_not_see_each_other" in rejected_by(lambda: FlatBatch(0), (4,))


def test_slope_that_grows_with_the_input() -> None:
    class Mutant(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return F.softplus(x) * x

    failed = rejected_by(lambda: Mutant(2.0), (3,))
    assert failed >= {"test_jacobians_obey_operator_norms", "test_search_finds_no_violation"}
