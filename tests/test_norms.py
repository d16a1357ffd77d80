# SPDX-License-Identifier: Apache-2.0
"""Norm states against real vectors and matrices: closure, arithmetic, duality."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dplip.norms import Norms, OperatorNorms

SLACK = 1 + 1e-12
# Squares below 1e-100 would make numpy's own l_2 norm underflow.
numbers = st.floats(-1e6, 1e6).map(lambda v: v if abs(v) > 1e-100 else 0.0) | st.sampled_from([0.0, 1.0, -1.0, 1e6])


def vectors(dim: st.SearchStrategy[int] | int = 5) -> st.SearchStrategy[np.ndarray]:
    return (st.just(dim) if isinstance(dim, int) else dim).flatmap(lambda n: arrays(np.float64, n, elements=numbers))


def norms(v: np.ndarray) -> dict[str, float]:
    return {name: float(np.linalg.norm(v, p)) for name, p in (("l1", 1), ("l2", 2), ("linf", np.inf))}


def known(v: np.ndarray, which: int = 7) -> Norms:
    """What is true of ``v``, with only the norms in the bit mask ``which`` given."""
    return Norms(len(v), **{name: x for k, (name, x) in enumerate(norms(v).items()) if which >> k & 1})


def holds(v: np.ndarray, bound: Norms) -> bool:
    return all(x <= getattr(bound, name) * SLACK for name, x in norms(v).items())


@given(vectors(st.integers(1, 9)), st.integers(0, 7))
@example(np.ones(4), 4)
@example(np.eye(6)[0], 1)
def test_closure_never_understates(v: np.ndarray, which: int) -> None:
    assert holds(v, known(v, which))


@given(vectors(st.integers(1, 9)), st.integers(1, 7))
def test_closure_is_a_fixed_point(v: np.ndarray, which: int) -> None:
    n = known(v, which)
    again = Norms(n.dim, n.l1, n.l2, n.linf)
    assert [again.l1, again.l2, again.linf] == pytest.approx([n.l1, n.l2, n.linf], rel=1e-14)


def test_closure_by_hand() -> None:
    n = Norms(4, linf=1.0)
    assert (n.l1, n.l2, n.linf) == (4.0, 2.0, 1.0)
    n = Norms(100, l1=3.0)
    assert (n.l1, n.l2, n.linf) == pytest.approx((3.0, 3.0, 3.0), rel=1e-15)
    n = Norms(4, l1=4.0, linf=1.0)  # Hoelder
    assert n.l2 == 2.0
    n = Norms(9, l2=2.0)
    assert (n.l1, n.linf) == (6.0, 2.0)
    assert Norms(3) == Norms(3, math.inf, math.inf, math.inf)


@given(vectors(), vectors(), st.integers(1, 7), st.integers(1, 7))
def test_arithmetic_never_understates(u: np.ndarray, v: np.ndarray, a: int, b: int) -> None:
    x, y = known(u, a), known(v, b)
    assert holds(u + v, x + y)
    assert holds(-2.5 * u, -2.5 * x) and holds(u * 3, x * 3)
    assert holds(np.concatenate([u, v]), x.concat(y))
    assert abs(float(u @ v)) <= x.dot(y) * SLACK
    assert holds(u, x.meet(known(u, b)))


def test_unknown_stays_unknown_unless_scaled_by_zero() -> None:
    assert (Norms(3) * 2).l1 == math.inf
    assert (Norms(3) * 0).l1 == 0.0
    assert Norms(3, l1=0.0).dot(Norms(3)) == 0.0
    assert Norms(3).dot(Norms(3, l2=1.0)) == math.inf


@pytest.mark.parametrize("bad", [{"l1": -1.0}, {"l2": math.nan}, {"linf": math.nan}, {"linf": -1e-300}])
def test_invalid_bounds_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Norms: expected"):
        Norms(3, **bad)
    with pytest.raises(ValueError, match="Norms: expected"):
        Norms(-1)
    with pytest.raises(ValueError, match="OperatorNorms: expected"):
        OperatorNorms(**{"two_two": next(iter(bad.values()))})


def test_dimensions_must_agree() -> None:
    for operation in (lambda a, b: a + b, lambda a, b: a.meet(b)):
        with pytest.raises(ValueError, match="dimensions, got 3 and 4"):
            operation(Norms(3, linf=1.0), Norms(4, linf=1.0))


def exact(w: np.ndarray) -> dict[str, float]:
    a = np.abs(w)
    return {
        "inf_inf": float(a.sum(1).max()),
        "two_inf": float(np.linalg.norm(w, axis=1).max()),
        "two_two": float(np.linalg.norm(w, 2)),
        "one_one": float(a.sum(0).max()),
        "one_inf": float(a.max()),
    }


matrices = st.tuples(st.integers(1, 5), st.integers(1, 5)).flatmap(lambda s: arrays(np.float64, s, elements=numbers))


@given(matrices, st.integers(0, 31))
@example(np.ones((4, 3)), 16)
@example(np.eye(5), 2)
@example(np.ones((5, 1)), 1)
def test_closed_operator_norms_never_understate(w: np.ndarray, which: int) -> None:
    true = exact(w)
    given_ = {name: x for k, (name, x) in enumerate(true.items()) if which >> k & 1}
    closed = OperatorNorms(**given_).closed(w.shape[1], w.shape[0])
    for name, x in true.items():
        assert x <= getattr(closed, name) * SLACK, name
        assert getattr(closed, name) <= given_.get(name, math.inf)


@given(matrices, st.data())
def test_push_and_pull_never_understate(w: np.ndarray, data: st.DataObject) -> None:
    operator = OperatorNorms(**exact(w))
    x, g = data.draw(vectors(w.shape[1])), data.draw(vectors(w.shape[0]))
    which = data.draw(st.integers(1, 7))
    slack = 1e-9 * (1 + np.abs(w).sum()) * (1 + np.abs(x).sum() + np.abs(g).sum())
    for v, bound in (
        (w @ x, operator.push(known(x, which), len(w))),
        (w.T @ g, operator.pull(known(g, which), w.shape[1])),
    ):
        assert all(value <= getattr(bound, name) + slack * 1e-6 for name, value in norms(v).items())


def test_push_and_pull_are_attained() -> None:
    ones = OperatorNorms(**exact(np.ones((2, 3))))
    assert ones.push(Norms(3, linf=1.0), 2).linf == pytest.approx(3.0)
    assert ones.pull(Norms(2, linf=1.0), 3).linf == pytest.approx(2.0)
    g = ones.pull(Norms(2, l1=1.0), 3)
    assert (g.l1, g.l2, g.linf) == pytest.approx((3.0, math.sqrt(3), 1.0))


def test_a_zero_factor_beats_an_unknown_one_and_underflow_rounds_up() -> None:
    zero = OperatorNorms.uniform(0.0)
    assert zero.push(Norms(3), 2) == Norms(2, 0.0, 0.0, 0.0)
    tiny = OperatorNorms.uniform(1e-200).push(Norms(3, linf=1e-200), 3)
    assert tiny.linf > 0
    assert 0 < (Norms(3, linf=1e-200) * 1e-200).linf < 1e-300
