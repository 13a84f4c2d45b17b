"""The vocabulary of constructor signatures: a type with its range, under a name that can be read in an error.

A signature is the schema of its config node. `signatures.py` reads these names from the source, so that a value out of
range is refused before torch is imported; `build.py` asks the same question again when an object is made.
"""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """low <= value <= high, or strictly inside where an end is open."""

    low: float = float("-inf")
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below  # not-a-number fails both

    def __str__(self) -> str:
        if self.high == float("inf"):
            return f"{'>' if self.open_low else '>='} {self.low:g}"
        return f"{'above' if self.open_low else 'from'} {self.low:g} {'to below' if self.open_high else 'to'} {self.high:g}"


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, open_low=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]  # 0 and 1 included: a share of something
Rate = Annotated[float, Range(0, 1, open_high=True)]  # 1 excluded: dropout, a decay per step
