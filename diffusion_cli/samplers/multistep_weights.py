"""How much each of several foreseen values weighs in a move: the exponential integral of the polynomial through them.

In the unit of the move, v = 0 where it starts and v = 1 where it ends, value m_j was foreseen at v = places[j], and

    weight_j = integral from 0 to 1 of e^(z (1 - v)) l_j(v) dv,        l_j Lagrange's polynomials of the places
             = sum over k of (v^k of l_j) k! phi_(k + 1)(z),           phi_k(z) = sum over i of z^i / (i + k)!

(Hochbruck and Ostermann 2010, "Exponential integrators", section 2.) z = 0 is Adams' rule. Python floats, in
float64; every z from -1000 to 700 keeps its digits.
"""

import math
from collections.abc import Sequence
from itertools import accumulate


def phis(count: int, z: float) -> list[float]:
    """phi_1(z) ... phi_count(z). Near 0 the series, for phi_(k + 1) = (phi_k - 1 / k!) / z has no digits left there."""
    if abs(z) < 1:
        return [sum(z**i / math.factorial(i + k) for i in reversed(range(20))) for k in range(1, count + 1)]
    recurrence = accumulate(range(1, count), lambda phi, k: (phi - 1 / math.factorial(k)) / z, initial=math.expm1(z) / z)
    return list(recurrence)


def moments(count: int, z: float) -> list[float]:
    """Integrals from 0 to 1 of e^(z (1 - v)) v^k for k = 0 ... count - 1."""
    return [math.factorial(k) * phi for k, phi in enumerate(phis(count, z))]


def lagrange(places: Sequence[float]) -> list[list[float]]:
    """For each place the coefficients (1, v, v^2 ...) of the polynomial that is 1 there and 0 at the others."""
    found = []
    for j, here in enumerate(places):
        polynomial = [1.0]
        for away in (p for k, p in enumerate(places) if k != j):
            longer = zip([0.0, *polynomial], [*polynomial, 0.0], strict=True)  # times (v - away) / (here - away)
            polynomial = [(shifted - away * same) / (here - away) for shifted, same in longer]
        found.append(polynomial)
    return found


def weights(places: Sequence[float], integrals: Sequence[float]) -> list[float]:
    """Of each value, when v^k integrates to integrals[k]."""
    return [sum(c * integral for c, integral in zip(row, integrals, strict=True)) for row in lagrange(places)]
