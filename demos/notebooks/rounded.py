"""Printed output compared across machines.

Processors, thread counts and scan backends add numbers in different orders, so a figure that is rounded for print may
lie on either side of a rounding edge: 0.125 prints as 0.12 here and as 0.13 there. A rounded figure may therefore
differ by one unit of its last printed digit. Everything else is compared exactly: words, spaces and whole numbers.
"""

from __future__ import annotations

import re
from decimal import Decimal

ROUNDED = re.compile(r"[-+]?\d[\d,]*(?:\.\d+(?:[eE][-+]?\d+)?|(?:\.\d+)?(?=%)|[eE][-+]?\d+)")
"""Numbers with decimals, an exponent or a percent sign. An integer is a count, and no rounding decides it."""


def alike(shown: str, printed: str) -> bool:
    """Whether two texts are the same but for the last digit of rounded figures."""
    if ROUNDED.split(shown) != ROUNDED.split(printed):
        return False
    pairs = zip(ROUNDED.findall(shown), ROUNDED.findall(printed), strict=True)
    return all(one == other or _one_unit_apart(one, other) for one, other in pairs)


def _one_unit_apart(one: str, other: str) -> bool:
    """At most one unit of the last digit: of the coarser figure, where 9.99 and 10.0 differ in their exponents."""
    a, b = Decimal(one.replace(",", "")), Decimal(other.replace(",", ""))
    unit = Decimal(1).scaleb(max(a.as_tuple().exponent, b.as_tuple().exponent))
    same_form = len(one.partition(".")[2]) == len(other.partition(".")[2]) and ("e" in one) == ("e" in other)
    return same_form and abs(a - b) <= unit
