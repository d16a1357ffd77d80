# SPDX-License-Identifier: Apache-2.0
"""Named builders, the models a configuration file can ask for.

A builder takes the shape of one input, the number of classes, the public reference input and its own options, and
returns a module whose output is [B, num_classes] logits. Add one as a function in :data:`MODELS`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from dplip.errors import ConfigError
from dplip.layers import (
    Abs,
    AveragePool2d,
    BallClip,
    Flatten,
    GroupSort,
    LinearSpline,
    LinfDistance,
    LipschitzLayer,
    MaxMin,
    NormalizedLinear,
    ReferenceShift,
    Scale,
    Shift,
    SortLinear,
)

__all__ = ["MODELS", "build", "linf_mlp", "lipschitz_mlp", "sort_mlp"]

Size = tuple[int, ...]


def sort_mlp(
    input_shape: Size,
    num_classes: int,
    reference: float,
    *,
    widths: Sequence[int] = (64,),
    top_k: int | Sequence[int] | None = None,
    rho: float | None = None,
    truncation: int | None = 10,
    pool: int = 1,
    init: str = "templates",
    hidden_init: str = "normal",
    hidden_scale: float = 0.1,
    bias: bool = True,
) -> nn.Module:
    """Order-statistic network, 1-Lipschitz in l_inf: pool, distances with reference shift, minus the last distances.

    Args:
        widths: neurons of the hidden layers.
        top_k: each neuron takes the mean of its ``top_k`` largest distances; one number or one per layer, the last
            included.
        rho: SortNet's geometric weights instead (exactly one of ``top_k`` and ``rho`` is given).
        truncation: number of order statistics kept with ``rho``.
        pool: side of the average-pooling window put first (1: none).
        init: initial weights of the first layer; ``"templates"`` are random binary images.
        hidden_init, hidden_scale: initial weights of the later layers.
        bias: learned bias of the last layer; the others have none, since a shift follows.
    """
    if (top_k is None) == (rho is None):
        raise ConfigError(f"sort_mlp: expected either top_k or rho, got {top_k} and {rho}; give one of them")
    ks = _per_layer("top_k", top_k, len(widths) + 1)

    def layer(i: int, d: int, m: int, **options: Any) -> LipschitzLayer:
        if rho is not None:
            return SortLinear.geometric(d, m, rho, truncation, **options)
        return SortLinear.top_k_mean(d, m, min(ks[i], d), **options)

    return _distance_net(
        input_shape, num_classes, reference, layer, widths, pool, init, hidden_init, hidden_scale, bias
    )


def linf_mlp(
    input_shape: Size,
    num_classes: int,
    reference: float,
    *,
    widths: Sequence[int] = (64,),
    p: float = math.inf,
    pool: int = 1,
    init: str = "templates",
    hidden_init: str = "normal",
    hidden_scale: float = 0.1,
    bias: bool = True,
) -> nn.Module:
    """l_inf-distance network (power mean of exponent ``p``), 1-Lipschitz in l_inf; other options as
    :func:`sort_mlp`."""

    def layer(i: int, d: int, m: int, **options: Any) -> LipschitzLayer:
        return LinfDistance(d, m, p=p, **options)

    return _distance_net(
        input_shape, num_classes, reference, layer, widths, pool, init, hidden_init, hidden_scale, bias
    )


def _distance_net(
    input_shape: Size,
    num_classes: int,
    reference: float,
    layer: Callable[..., LipschitzLayer],
    widths: Sequence[int],
    pool: int,
    init: str,
    hidden_init: str,
    hidden_scale: float,
    bias: bool,
) -> nn.Module:
    modules: list[nn.Module] = []
    d = math.prod(input_shape)
    if pool > 1:
        if len(input_shape) != 3 or input_shape[1] % pool or input_shape[2] % pool:
            raise ConfigError(f"model: expected images divisible by pool={pool}, got {input_shape}; change pool")
        modules.append(AveragePool2d(pool))
        d //= pool**2
    modules.append(Flatten())
    for i, m in enumerate([*widths, num_classes]):
        first, last = i == 0, i == len(widths)
        scale = 1.0 if first else hidden_scale
        distance = layer(i, d, m, bias=last and bias, init=init if first else hidden_init, init_scale=scale)
        # The average of the constant reference is the reference itself; behind a shift it is 0.
        modules.append(distance if last else ReferenceShift(distance, reference if first else 0.0))
        d = m
    return nn.Sequential(*modules, Scale(-1.0))


def lipschitz_mlp(
    input_shape: Size,
    num_classes: int,
    reference: float,
    *,
    widths: Sequence[int] = (256,),
    activation: str = "maxmin",
    bias: bool = False,
    ball: str = "spectral",
    input_radius: float = 7.0,
    orthogonalize: int = 0,
    spline_intervals: int = 20,
    spline_reach: float = 1.0,
    spline_scaled: bool = False,
) -> nn.Module:
    """Normalised affine layers with a 1-Lipschitz activation, behind a clip of the centred input to an l_2 ball.

    Args:
        widths: neurons of the hidden layers.
        activation: ``"maxmin"``, ``"fullsort"``, ``"abs"`` or ``"spline"`` (learned, starting as alternating |x| and
            x).
        bias: learned biases; each takes a share of the noise and the centred input hardly needs them.
        ball: constraint of every weight, see :class:`dplip.layers.NormalizedLinear`.
        input_radius: radius of the ball, in which ``x - reference`` is clipped; it bounds the first layer's gradient.
        orthogonalize: Bjorck steps at each projection of the hidden layers (spectral ball).
        spline_intervals, spline_reach, spline_scaled: grid of the splines, and whether each learns its scale.
    """
    activations: dict[str, Callable[[int], nn.Module]] = {
        "maxmin": lambda m: MaxMin(),
        "fullsort": lambda m: GroupSort(0),
        "abs": lambda m: Abs(),
        "spline": lambda m: LinearSpline(
            m,
            intervals=spline_intervals,
            reach=spline_reach,
            ends="match",
            init="maxmin",
            scaled=spline_scaled,
            projection="nearest",
        ),
    }
    if activation not in activations:
        raise ConfigError(f"lipschitz_mlp: expected activation in {sorted(activations)}, got {activation!r}")
    modules: list[nn.Module] = [Flatten(), Shift(reference), BallClip(input_radius)]
    d = math.prod(input_shape)
    for m in widths:
        modules += [NormalizedLinear(d, m, bias=bias, ball=ball, orthogonalize=orthogonalize), activations[activation](m)]
        d = m
    return nn.Sequential(*modules, NormalizedLinear(d, num_classes, bias=bias, ball=ball))


def _per_layer(name: str, value: int | Sequence[int] | None, layers: int) -> list[int]:
    values = [value] * layers if isinstance(value, int) else list(value or [])
    if value is not None and len(values) != layers:
        raise ConfigError(f"model.{name}: expected one number or {layers}, got {value}; give one per layer")
    return values


MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "sort_mlp": sort_mlp,
    "linf_mlp": linf_mlp,
    "lipschitz_mlp": lipschitz_mlp,
}


def build(
    kind: str, options: Mapping[str, Any], *, input_shape: Size, num_classes: int, reference: float
) -> nn.Module:
    """The model ``kind`` with its ``options``.

    Raises:
        ConfigError: the kind or an option is unknown, or a value does not fit.
    """
    if kind not in MODELS:
        raise ConfigError(f"model.kind: expected one of {sorted(MODELS)}, got {kind!r}; choose one of them")
    builder = MODELS[kind]
    known = [n for n, p in inspect.signature(builder).parameters.items() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"model: expected options of {kind} among {known}, got {unknown}; remove or rename them")
    try:
        return builder(input_shape, num_classes, reference, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: expected options that fit {kind}, got {dict(options)} ({error}); fix them") from error
