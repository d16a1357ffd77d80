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
    L2Pool2d,
    LinearSpline,
    LinfDistance,
    LinfDistanceConv2d,
    LipschitzLayer,
    MaxMin,
    MaxPool2d,
    NormalizedConv2d,
    NormalizedLinear,
    ReferenceShift,
    Scale,
    Shift,
    SortConv2d,
    SortLinear,
)

__all__ = ["MODELS", "build", "linf_conv", "linf_mlp", "lipschitz_conv", "lipschitz_mlp", "sort_mlp"]

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


def linf_conv(
    input_shape: Size,
    num_classes: int,
    reference: float,
    *,
    channels: Sequence[int] = (16, 32),
    kernel: int = 3,
    stride: int = 2,
    widths: Sequence[int] = (64,),
    p: float = math.inf,
    top_k: int | None = None,
    init: str = "templates",
    hidden_init: str = "normal",
    hidden_scale: float = 0.1,
    bias: bool = True,
) -> nn.Module:
    """Distance convolutions, then a dense distance network, 1-Lipschitz in l_inf; every layer but the last is shifted.

    Sharing weights over positions costs nothing here: the sensitivity of a convolution is that of a dense layer below
    another, ``||g||_1``.

    Args:
        channels: filters of the convolutions, padded by half their kernel.
        kernel, stride: theirs.
        widths: neurons of the hidden dense layers.
        p: exponent of the power mean, see :class:`dplip.layers.LinfDistance`.
        top_k: the mean of the ``top_k`` largest distances instead (at ``p = inf``).
        init, hidden_init, hidden_scale, bias: as in :func:`sort_mlp`.
    """
    if top_k is not None and not math.isinf(p):
        raise ConfigError(f"linf_conv: expected either top_k or p, got {top_k} and {p}; give one of them")
    c, *size = _image("linf_conv", input_shape)
    modules: list[nn.Module] = []
    for m in channels:
        options: dict[str, Any] = {"stride": stride, "padding": kernel // 2, "bias": False}
        options |= {"init": hidden_init, "init_scale": hidden_scale} if modules else {"init": init}
        if top_k is None:
            layer: LipschitzLayer = LinfDistanceConv2d(c, m, kernel, p=p, **options)
        else:
            layer = SortConv2d.top_k_mean(c, m, kernel, min(top_k, c * kernel**2), **options)
        modules.append(ReferenceShift(layer, 0.0 if modules else reference))
        size = [(n + 2 * (kernel // 2) - kernel) // stride + 1 for n in size]
        c = m

    def dense(i: int, d: int, m: int, **options: Any) -> LipschitzLayer:
        if top_k is None:
            return LinfDistance(d, m, p=p, **options)
        return SortLinear.top_k_mean(d, m, min(top_k, d), **options)

    start = (0.0, hidden_init) if modules else (reference, init)
    head = _distance_net((c, *size), num_classes, start[0], dense, widths, 1, start[1], hidden_init, hidden_scale, bias)
    return nn.Sequential(*modules, *head)


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
    modules: list[nn.Module] = [Flatten(), Shift(reference), BallClip(input_radius)]
    d = math.prod(input_shape)
    for m in widths:
        act = _activation(activation, m, spline_intervals, spline_reach, spline_scaled)
        modules += [NormalizedLinear(d, m, bias=bias, ball=ball, orthogonalize=orthogonalize), act]
        d = m
    return nn.Sequential(*modules, NormalizedLinear(d, num_classes, bias=bias, ball=ball))


def lipschitz_conv(
    input_shape: Size,
    num_classes: int,
    reference: float,
    *,
    channels: Sequence[int] = (16, 32),
    kernel: int = 3,
    pool: str = "l2",
    widths: Sequence[int] = (64,),
    activation: str = "maxmin",
    bias: bool = False,
    ball: str = "spectral",
    input_radius: float = 7.0,
    projection: str = "scale",
    orthogonalize: int = 0,
    spline_intervals: int = 20,
    spline_reach: float = 1.0,
    spline_scaled: bool = False,
) -> nn.Module:
    """Stages of normalised convolution, 1-Lipschitz activation and 2 x 2 pool, then dense layers as in
    :func:`lipschitz_mlp`; input clip, activations and splines as there.

    Args:
        channels: filters of the convolutions, whose padding keeps the image's size.
        kernel: their odd side.
        pool: ``"l2"`` (1-Lipschitz in l_2, keeps the norm), ``"max"`` or ``"average"``.
        widths: neurons of the hidden dense layers.
        ball: constraint of every weight, one of :data:`dplip.layers.normalized_conv2d.CONV_BALLS`.
        projection, orthogonalize: see :class:`dplip.layers.NormalizedConv2d`; the last layer is only scaled.
    """
    pools: dict[str, Callable[[int], nn.Module]] = {"l2": L2Pool2d, "max": MaxPool2d, "average": AveragePool2d}
    if pool not in pools or kernel % 2 == 0:
        raise ConfigError(
            f"lipschitz_conv: expected pool in {sorted(pools)} and an odd kernel, got {pool!r} and {kernel}"
        )
    c, *size = _image("lipschitz_conv", input_shape)
    modules: list[nn.Module] = [Shift(reference), BallClip(input_radius)]
    into = {"bias": bias, "ball": ball, "projection": projection, "orthogonalize": orthogonalize}
    spline = (spline_intervals, spline_reach, spline_scaled)
    for m in channels:
        convolution = NormalizedConv2d(c, m, kernel, padding=kernel // 2, **into)
        modules += [convolution, _activation(activation, m, *spline), pools[pool](2)]
        c, size = m, [n // 2 for n in size]
    modules.append(Flatten())
    d = c * math.prod(size)
    for m in widths:
        modules += [NormalizedLinear(d, m, **into), _activation(activation, m, *spline)]
        d = m
    return nn.Sequential(*modules, NormalizedLinear(d, num_classes, bias=bias, ball=ball))


def _activation(name: str, channels: int, intervals: int, reach: float, scaled: bool) -> nn.Module:
    activations: dict[str, Callable[[int], nn.Module]] = {
        "maxmin": lambda m: MaxMin(),
        "fullsort": lambda m: GroupSort(0),
        "abs": lambda m: Abs(),
        "spline": lambda m: LinearSpline(
            m,
            intervals=intervals,
            reach=reach,
            ends="match",
            init="maxmin",
            scaled=scaled,
            projection="nearest",
        ),
    }
    if name not in activations:
        raise ConfigError(f"model: expected activation in {sorted(activations)}, got {name!r}")
    return activations[name](channels)


def _image(where: str, shape: Size) -> Size:
    if len(shape) != 3:
        raise ConfigError(f"{where}: expected images [C, H, W], got {shape}; use a builder of dense models")
    return shape


def _per_layer(name: str, value: int | Sequence[int] | None, layers: int) -> list[int]:
    values = [value] * layers if isinstance(value, int) else list(value or [])
    if value is not None and len(values) != layers:
        raise ConfigError(f"model.{name}: expected one number or {layers}, got {value}; give one per layer")
    return values


MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "sort_mlp": sort_mlp,
    "linf_mlp": linf_mlp,
    "lipschitz_mlp": lipschitz_mlp,
    "linf_conv": linf_conv,
    "lipschitz_conv": lipschitz_conv,
}


def build(kind: str, options: Mapping[str, Any], *, input_shape: Size, num_classes: int, reference: float) -> nn.Module:
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
        raise ConfigError(
            f"model: expected options that fit {kind}, got {dict(options)} ({error}); fix them"
        ) from error
