"""Timings that can be compared on a machine that others use too: contestants take turns, disturbed samples are dropped.

Figures are medians; a row of the table compares ours with a peer. What the columns mean stands at the top of bench.py.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOREIGN = 0.10  # of a core that others may use before a sample counts as disturbed
ENOUGH = 3  # clean samples of each contestant; with fewer, the disturbed ones are kept

# -- timing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One timed call. foreign: cores that other processes used meanwhile; own: CPU seconds of this one; None: not known."""

    seconds: float
    foreign: float | None = None
    own: float | None = None

    @property
    def clean(self) -> bool:
        return self.foreign is None or self.foreign <= FOREIGN


@dataclass(frozen=True)
class Contestant:
    """call: the work that is timed; amount: how many images one call makes, or 1 where seconds are what counts."""

    name: str
    call: Callable[[], object]
    amount: float = 1.0


def cpu_seconds() -> tuple[float, float] | None:
    """(of all processes, of this one and its ended children) since the start; None without /proc/stat."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, words[1:9])
    own = os.times()
    mine = own.user + own.system + own.children_user + own.children_system
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), mine


def timed(call: Callable[[], object]) -> Sample:
    before, began = cpu_seconds(), time.perf_counter()
    call()
    seconds, after = time.perf_counter() - began, cpu_seconds()
    if before is None or after is None:
        return Sample(seconds)
    own = after[1] - before[1]
    return Sample(seconds, max(0.0, after[0] - before[0] - own) / seconds, own)


def take_turns(contestants: Sequence[Contestant], least: int, most: int) -> dict[str, list[Sample]]:
    """Samples by name, one for each round: `least` rounds, and up to `most` until all have `least` clean samples."""
    samples: dict[str, list[Sample]] = {c.name: [] for c in contestants}
    for turn in range(most):
        first = turn % len(contestants)
        for contestant in [*contestants[first:], *contestants[:first]]:
            samples[contestant.name].append(timed(contestant.call))
        if turn + 1 >= least and all(sum(s.clean for s in found) >= least for found in samples.values()):
            break
    return samples


# -- the table ---------------------------------------------------------------------------------------------------------


def kept(samples: Sequence[Sample]) -> list[Sample]:
    """The clean samples, or all of them where fewer than ENOUGH are clean."""
    clean = [s for s in samples if s.clean]
    return clean if len(clean) >= ENOUGH else list(samples)


def figures(samples: Sequence[Sample], amount: float, unit: str) -> dict[str, Any]:
    """min, median and max in the unit (s, or images/s), how many samples were taken, and how many of them dropped."""
    values = [s.seconds if unit == "s" else amount / s.seconds for s in kept(samples)]
    return {
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
        "samples": len(samples),
        "disturbed": sum(not s.clean for s in samples),
        "dropped": len(samples) - len(values),
    }


def compare(
    what: str, unit: str, ours: Contestant, peer: Contestant, samples: Mapping[str, Sequence[Sample]]
) -> dict[str, Any]:
    """A row of the table. ratio and paired are how many times faster ours is: above 1 for the better, whatever the unit."""
    mine, theirs = samples[ours.name], samples[peer.name]
    both = [(a, b) for a, b in zip(mine, theirs, strict=True) if a.clean and b.clean]
    pairs = both if len(both) >= ENOUGH else list(zip(mine, theirs, strict=True))
    here, there = figures(mine, ours.amount, unit), figures(theirs, peer.amount, unit)
    faster = there["median"] / here["median"] if unit == "s" else here["median"] / there["median"]
    paired = statistics.median((b.seconds / peer.amount) / (a.seconds / ours.amount) for a, b in pairs)
    used = [(a.own / ours.amount, b.own / peer.amount) for a, b in zip(mine, theirs, strict=True) if a.own and b.own]
    cpu = statistics.median(b / a for a, b in used) if len(used) == len(mine) else None
    return {
        "what": what, "unit": unit, "peer_is": peer.name, "ours": here, "peer": there, "ratio": faster, "paired": paired,
        "cpu": cpu, "pairs": len(pairs),
    }  # fmt: skip


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row's texts in the order of HEAD; without a peer it has figures of ours alone."""
    sides = [row["ours"], row["peer"]] if row.get("peer") else [row["ours"]]
    shown = ["/".join(number(side[key]) for key in ("min", "median", "max")) for side in sides]
    kept = [" (kept)" if side["disturbed"] > side["dropped"] else "" for side in sides]
    count = " + ".join(f"{side['disturbed']} of {side['samples']}{word}" for side, word in zip(sides, kept))
    if len(sides) == 1:
        return [row["what"], row["unit"], shown[0], "", "", "", "", count, ""]
    ratios = [f"{row[key]:.2f}" if row[key] is not None else "" for key in ("ratio", "paired", "cpu")]
    return [row["what"], row["unit"], *shown, *ratios, count, row["peer_is"]]


HEAD = ["", "unit", "ours min/median/max", "peer min/median/max", "ratio", "paired", "cpu", "disturbed", "peer"]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [HEAD, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where ours is behind, in words. By less than 5 % in either ratio is called level: clean samples swing more than that."""
    behind, level = [], []
    for row in rows:
        if not row.get("peer"):
            continue
        low, high = sorted((row["ratio"], row["paired"]))
        says = f"{row['what']}: {row['ratio']:.2f} by the medians, {row['paired']:.2f} by pairs"
        if any(side["disturbed"] > side["dropped"] for side in (row["ours"], row["peer"])):
            says += ", from disturbed samples: run it again on a quiet machine"
        if high < 0.95:
            behind.append(f"BEHIND {row['peer_is']} in {says}")
        elif low < 1.05:
            level.append(f"level with {row['peer_is']} in {says}")
    return [*behind, *level] or ["ahead in every row that has a peer"]
