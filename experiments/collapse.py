"""Where variety goes: at which attribute, and at which of the denoising steps the LoRA makes it go.

    python -m experiments.collapse runs/compare/full-gcpo-beta-0-23 runs/compare/full-gcpo-beta-0-24

Held-out images of each run's LoRA are drawn with it at all steps, with it switched off at one of them, and with it at the first
few. Their score and variety stand beside what is left of place and colour: of right images of captions with one shape, the share of
pairs of one caption's images that differ in the attribute, over what it is where all are equally frequent; captions weigh as their
pairs. 1: all equally often, 0: always the same. A caption that names the colour has no colour to choose. Writes collapse.csv; a run
takes two or three minutes.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

import bookkeeping
import evaluate
import families
import machine
from experiments import frontier
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


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs of the miniature"""
    output_dir: Path = Path("experiments/results")
    """folder of collapse.csv, in which the rows of these runs are replaced"""


def rows_of(folder):
    """Rows of a run's LoRA, {run, lora_at, score, variety, place, colour, both}: at all steps, all but one, and the first few."""
    args = evaluate.Args(lora=str(folder), device="cpu", dtype="float32")
    args.gradient_checkpointing = False
    pipe, steps = bookkeeping.load(args), range(args.steps)
    for at in (tuple(steps), *([k for k in steps if k != off] for off in steps), *(steps[:first] for first in steps[1:-1])):
        found = bookkeeping.evaluate(pipe, args, args.steps, at)
        by_attribute = attributes(found.looks, found.prompts, found.scores)
        yield dict(run=folder.name, lora_at=" ".join(str(k + 1) for k in at), **found.figures, **by_attribute)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if not args.runs:
        machine.fail("name the folders of runs, such as runs/compare/full-gcpo-beta-0-23")
    for folder in args.runs:
        if not (folder / families.LORA_FILE).exists():
            machine.fail(f"{folder} is not the folder of a run: it has no {families.LORA_FILE}")
    table = args.output_dir / "collapse.csv"
    for folder in args.runs:
        rows = list(rows_of(folder))
        for row in rows:
            print(*(f"{value:.3f}" if isinstance(value, float) else value for value in row.values()), sep="  ")
        frontier.write(table, [row for row in frontier.read(table) if row["run"] != folder.name] + rows)
