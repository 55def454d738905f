"""What a report says of a circuit, in words."""

from __future__ import annotations

import pytest

from circuits.faithfulness import Recovery


@pytest.mark.parametrize(
    ("circuit", "gradient", "random", "said"),
    [
        (0.96, 0.91, (0.03, 0.1), "better than gradient x activation"),
        (0.95, 1.055, (0.03,), "as good as gradient x activation"),
        (0.5, 0.9, (0.0,), "gradient x activation does better"),
        (0.5, 0.9, (0.4, 1.2), "no better than random nodes"),
        (1.89, 0.9, (0.4,), "no better than random nodes; it overshoots by 89%"),
        (1.2, 2.0, (0.4,), "better than gradient x activation; it overshoots by 20%"),
    ],
)
def test_the_verdict_goes_by_the_distance_from_all_of_it(circuit, gradient, random, said):
    assert Recovery(7, circuit, gradient, random).verdict == said
