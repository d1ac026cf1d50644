"""Small arithmetic of apex.transformer.

Room apex/. Proof: tests/apex/test_transformer.py.
"""

from __future__ import annotations

__all__ = ["divide", "ensure_divisibility"]


def ensure_divisibility(numerator: int, denominator: int) -> None:
    """Raise ValueError naming both if the division has a remainder."""
    if numerator % denominator:
        raise ValueError(f"{numerator} is not divisible by {denominator}")


def divide(numerator: int, denominator: int) -> int:
    """The quotient of an exact division."""
    ensure_divisibility(numerator, denominator)
    return numerator // denominator
