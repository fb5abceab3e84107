"""Which attribute variety goes at: of right images of captions with one shape, how differently place and colour are chosen.

    python -m experiments.collapse runs/compare/full-gcpo-23 runs/compare/full-gcpo-24

Reads evaluation.npz of each run's last evaluation. A figure is the share of pairs of right images of one caption that differ in the
attribute, over what it is where all are equally frequent; captions weigh as their pairs. 1: all equally often, 0: always the same.
A caption that names the colour has no colour to choose.
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from machine import fail
from miniature import shapes


def disagreement(values, kinds):
    """(share of ordered pairs of values that differ over that of `kinds` equally frequent ones, number of pairs)."""
    different, _ = shapes.pair_statistics(values, [True] * len(values))
    return different / (1 - 1 / kinds), len(values) * (len(values) - 1)


def attributes(looks, captions, verdicts):
    """{"place", "colour", "both": figure} of the looks of N images, their captions and strict verdicts."""
    right, figures = defaultdict(list), defaultdict(list)
    for look, caption, verdict in zip(looks, captions, verdicts):
        if verdict and len(shapes.SPECS[caption].objects) == 1:
            right[caption].append(look)  # such as "0rci": cell, colour, shape
    for caption, looks in right.items():
        if len(looks) > 1:
            cells, colours = len(shapes.CELLS), len(shapes.COLOURS)
            figures["place"].append(disagreement([look[0] for look in looks], cells))
            if shapes.SPECS[caption].objects[0][1] is None:
                figures["colour"].append(disagreement([look[1] for look in looks], colours))
                figures["both"].append(disagreement([look[:2] for look in looks], cells * colours))
    means = {}
    for name, values in figures.items():
        shares, pairs = zip(*values)
        means[name] = float(np.average(shares, weights=pairs))
    return means


if __name__ == "__main__":
    if not sys.argv[1:]:
        fail("name the folders of runs, such as runs/compare/full-gcpo-23")
    for folder in map(Path, sys.argv[1:]):
        try:
            with np.load(folder / "evaluation.npz", allow_pickle=False) as kept:
                found = attributes(kept["looks"].tolist(), kept["prompts"].tolist(), kept["verdicts"])
        except OSError:
            fail(f"{folder} has no evaluation.npz: it is not the folder of a miniature's run")
        print(folder.name, " ".join(f"{name} {value:.3f}" for name, value in found.items()))
