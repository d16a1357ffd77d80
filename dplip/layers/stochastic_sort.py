# SPDX-License-Identifier: Apache-2.0
"""SortNet's training: the maximum over a random subset, whose expectation is the sort neuron that is deployed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dplip.errors import ConfigError, NoRuleError
from dplip.kernels.order_statistic import order_statistic, order_statistic_weight_grad
from dplip.kernels.order_statistic_interval import order_statistic_interval
from dplip.kernels.power_mean import power_mean, power_mean_interval, power_mean_weight_grad
from dplip.layers.base import Shapes
from dplip.layers.distance import RowNorms
from dplip.layers.sort_linear import SortLinear, geometric_weights
from dplip.norms import Norms

__all__ = ["StochasticSortLinear", "advance_masks", "example_keys"]


class StochasticSortLinear(SortLinear):
    r"""Evaluation: the sort neuron ``sum_k c_k |x - w_o|_(k)``, ``c_k`` proportional to ``keep (1 - keep)^(k-1)``.

    Training: ``max_{i in S} |x_i - w_oi|`` over a random set ``S`` that holds each coordinate with probability ``keep``
    (0 where it is empty), or its power mean ``d^(-1/p) ||(x - w_o)_S||_p`` while ``p`` is annealed. Without truncation
    ``E_S max = sum_k keep (1 - keep)^(k-1) |x - w_o|_(k)``: the sort neuron before its weights are divided by their
    sum.

    Masks are public: a counter-based generator makes them from ``seed``, the step and, with ``groups > 1``, the
    example's own key; never from its place in the batch, where removing one record would give others new masks.
    ``forward`` draws nothing, so the mask is fixed between two calls of :func:`advance_masks`.

    Guarantee in training, for every mask: rows of the Jacobian have norms at most (1, d^(-1/p), d^(-1/p)), at
    ``p = inf`` (1, 1, 1), so one example's gradient in ``weight`` is at most ``||g||_2``, not ``||c||_2 ||g||_2``: a
    draw is one-hot, and more noise is needed than for the exact neuron. With ``groups > 1`` the reference and an
    example may see different masks, so activations have no bound in training; layers that need one refuse.

    Source: Zhang, Jiang, He, Wang, Rethinking Lipschitz Neural Networks and Certified Robustness: A Boolean
    Function Perspective, NeurIPS 2022, proposition 4.3 and section 4.2.

    Args:
        in_features, out_features, bias, init, init_scale: see :class:`DistanceLayer`.
        keep: keep probability in (0, 1]; 1 is the l_inf distance.
        truncation: number of order statistics deployed, see :meth:`SortLinear.geometric`.
        p: exponent in training, in [2, inf]; the deployed neuron has none.
        groups: number of masks per step; an example with key ``k`` gets mask ``k mod groups``, see
            :func:`example_keys`.
        seed: of the masks; give every layer of a network its own.

    Raises:
        ConfigError: an argument is out of range.
    """

    mask_step: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        keep: float,
        truncation: int | None = 10,
        *,
        p: float = math.inf,
        groups: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if not 0 < keep <= 1 or groups < 1 or seed < 0 or (truncation is not None and truncation < 1):
            raise ConfigError(
                "StochasticSortLinear: expected 0 < keep <= 1, groups >= 1, seed >= 0 and truncation >= 1, "
                f"got {keep}, {groups}, {seed} and {truncation}; fix them"
            )
        super().__init__(in_features, out_features, geometric_weights(in_features, 1 - keep, truncation), **options)
        self.keep, self.groups, self.seed = float(keep), groups, seed
        self.p = p
        self.register_buffer("mask_step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("_one", torch.ones(1), persistent=False)
        self._keys: Tensor | None = None

    @classmethod
    def geometric(
        cls, in_features: int, out_features: int, rho: float, truncation: int | None = 10, **options: Any
    ) -> StochasticSortLinear:
        """``keep = 1 - rho``, see :meth:`SortLinear.geometric`."""
        return cls(in_features, out_features, 1 - rho, truncation, **options)

    @classmethod
    def top_k_mean(cls, in_features: int, out_features: int, k: int, **options: Any) -> StochasticSortLinear:
        """Not offered: the expectation of a random maximum has geometric weights."""
        raise ConfigError(
            "StochasticSortLinear: expected geometric weights, got a top-k mean; use SortLinear.top_k_mean"
        )

    @property
    def p(self) -> float:
        """Exponent of the training draw, in [2, inf]."""
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        if not 2 <= value:
            raise ConfigError(f"StochasticSortLinear: expected 2 <= p <= inf, got {value}; no bound is offered below 2")
        self._p = float(value)

    def mask(self, group: int = 0) -> Tensor:
        """[d] bool: the coordinates kept at the current step by the examples of ``group``."""
        bits = np.random.Philox(key=[self.seed, int(self.mask_step)], counter=[0, 0, group, 0])
        kept = np.random.Generator(bits).random(self.in_features) < self.keep
        return torch.from_numpy(kept).to(self.weight.device)

    def draw(self, x: Tensor, w: Tensor, kept: Tensor) -> Tensor:
        """The training neuron for the mask ``kept`` [d] bool: ``x`` [B, d], ``w`` [m, d] -> [B, m], without bias."""
        x, w = x[:, kept], w[:, kept]
        if x.shape[1] == 0:
            return F.linear(x, w)  # zeros that autograd knows
        if math.isinf(self.p):
            return order_statistic(x, w, self._one, self._low(x))
        return self._share(x) * power_mean(x, w, self.p).to(w.dtype)

    def _share(self, kept: Tensor) -> float:
        """From the mean over the kept coordinates to a sum divided by ``d``: below 1 for every mask."""
        return (kept.shape[1] / self.in_features) ** (1 / self.p)

    def _by_group(self, x: Tensor, apply: Callable[[slice | Tensor, Tensor], Tensor]) -> Tensor:
        """``apply(rows, mask)`` for every group of examples, put back in order."""
        if self.groups == 1 or self._keys is None:
            return apply(slice(None), self.mask())
        if len(self._keys) != len(x):
            raise ValueError(
                f"StochasticSortLinear: expected a batch of {len(self._keys)} examples, as example_keys was given, "
                f"got {len(x)}"
            )
        group = self._keys.to(x.device) % self.groups
        rows = [(group == g).nonzero()[:, 0] for g in group.unique().tolist()]
        if not rows:
            return apply(slice(None), self.mask())
        parts = [apply(r, self.mask(int(group[r[0]]))) for r in rows]
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def distance(self, x: Tensor, w: Tensor) -> Tensor:
        if not self.training:
            return super().distance(x, w)
        return self._by_group(x, lambda rows, kept: self.draw(x[rows], w, kept))

    def per_sample_weight_grad(self, x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        if not self.training:
            return super().per_sample_weight_grad(x, w, g)
        return self._by_group(x, lambda rows, kept: self._drawn_grad(x[rows], w, g[rows], kept))

    def _drawn_grad(self, x: Tensor, w: Tensor, g: Tensor, kept: Tensor) -> Tensor:
        grad = x.new_zeros(len(x), *w.shape)
        x, w = x[:, kept], w[:, kept]
        if x.shape[1] == 0:
            return grad
        if math.isinf(self.p):
            grad[:, :, kept] = order_statistic_weight_grad(x, w, self._one, g)
        else:
            grad[:, :, kept] = self._share(x) * power_mean_weight_grad(x, w, self.p, g)
        return grad

    def distance_interval(self, lower: Tensor, upper: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return super().distance_interval(lower, upper, w)
        if self.groups > 1:
            raise NoRuleError(
                "StochasticSortLinear.interval: expected evaluation mode or groups=1, got masks that differ between "
                "examples; call eval()"
            )
        kept = self.mask()
        low, high, w = lower[:, kept], upper[:, kept], w[:, kept]
        if low.shape[1] == 0:
            return F.linear(low, w), F.linear(high, w)
        if math.isinf(self.p):
            return order_statistic_interval(low, high, w, self._one)
        low, high = power_mean_interval(low, high, w, self.p)
        share = self._share(w)
        return share * low, share * high

    def row_norms(self) -> RowNorms:
        if not self.training:
            return super().row_norms()
        row = 1.0 if math.isinf(self.p) else self.in_features ** (-1 / self.p)
        return RowNorms(1.0, row, row)

    def output_bound(self, x: Norms, shapes: Shapes) -> Norms:
        if self.training and self.groups > 1:
            return Norms(shapes.out_dim)
        return super().output_bound(x, shapes)

    def refuses_certificate(self) -> str | None:
        return "a random draw is not the deployed sort neuron; call model.eval()" if self.training else None

    def fan_in(self, shapes: Shapes) -> int:
        if self.training:
            return 3 if math.isinf(self.p) else self.in_features + 16
        return super().fan_in(shapes)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keep={self.keep:g}, groups={self.groups}"


def advance_masks(model: nn.Module) -> None:
    """Move every :class:`StochasticSortLinear` of ``model`` to the masks of the next step; call it after each step."""
    for module in model.modules():
        if isinstance(module, StochasticSortLinear):
            module.mask_step.add_(1)


@contextlib.contextmanager
def example_keys(model: nn.Module, keys: Tensor) -> Iterator[None]:
    """Within the context, example ``b`` of every training batch takes mask ``keys[b] mod groups``.

    Args:
        model: holds the layers.
        keys: [B] int64, a property of each record that does not depend on the others, such as its public identifier.
            Layers inside a :class:`ReferenceShift` see the reference alone and cannot be keyed.

    Raises:
        ConfigError: ``keys`` is not int64 [B].
    """
    if keys.ndim != 1 or keys.dtype != torch.int64:
        raise ConfigError(f"example_keys: expected keys int64 [B], got {keys.dtype} {tuple(keys.shape)}; convert them")
    layers = [m for m in model.modules() if isinstance(m, StochasticSortLinear)]
    before = [m._keys for m in layers]
    for m in layers:
        m._keys = keys
    try:
        yield
    finally:
        for m, old in zip(layers, before, strict=True):
            m._keys = old
