"""Draws eight held-out prompts before and after a run, from the same noise, with the judge's verdict: docs/before_after.png.

python gcpo.py --output-dir runs/first
python -m experiments.before_after --lora runs/first
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib

import arguments
import bookkeeping
import machine

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = 8


@dataclass
class Args(arguments.Examined):
    steps: int = 6
    """denoising steps, deterministic"""
    eval_images: int = 864
    """images of the evaluation that the eight are taken from, as in the run"""
    output: Path = Path("docs/before_after.png")
    """the picture"""


def draw(rows, path):
    """A row for each {name: Evaluation}: the first image of eight prompts, evenly spread over all, with the exact verdict, ✓ or ✗.

    Where another judge was trained on, its score stands below each image.
    """
    prompts = next(iter(rows.values())).prompts
    different = list(dict.fromkeys(prompts))
    picked = [prompts.index(different[i * len(different) // COLUMNS]) for i in range(min(COLUMNS, len(different)))]
    below = 0.2 * any(evaluation.rewards is not None for evaluation in rows.values())  # inches
    size = 8.3, (1.28 + below) * len(rows) + 0.35
    figure, axes = plt.subplots(len(rows), len(picked), figsize=size, squeeze=False)
    figure.subplots_adjust(left=0.045, right=0.998, top=0.88, bottom=0.01 + below / 3, wspace=0.04, hspace=0.04 + below / 1.3)
    for axis, i in zip(axes[0], picked):
        axis.set_title(textwrap.fill(prompts[i], 16), fontsize=7.5, pad=3)
    for row, (name, evaluation) in zip(axes, rows.items()):
        for axis, i in zip(row, picked):
            axis.imshow(evaluation.images[i].permute(1, 2, 0))
            axis.set(xticks=[], yticks=[])
            mark, colour = ("✓", "#4dd06a") if evaluation.scores[i] else ("✗", "#ff6a5a")
            if evaluation.rewards is not None:  # the score of the judge that was trained on, which may disagree
                axis.set_xlabel(f"{evaluation.rewards[i]:.2f}", fontsize=8, labelpad=2)
            axis.text(0.97, 0.97, mark, color=colour, fontsize=13, ha="right", va="top", transform=axis.transAxes)
        row[0].set_ylabel(name, fontsize=9)
    with bookkeeping.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


if __name__ == "__main__":
    args = arguments.parse_examined(Args, __doc__, steps="eval_steps")
    if not args.lora:
        machine.fail("--lora must name the folder of a run, of which before and after are drawn")
    arguments.check_model_and_reward(args)
    bookkeeping.require_writable(args.output.parent)
    args.gradient_checkpointing = False
    machine.resolve_device(args)
    pipe = bookkeeping.load(args)
    rows = {"before": bookkeeping.evaluate(pipe, args, args.steps, 0), "after": bookkeeping.evaluate(pipe, args, args.steps)}
    draw(rows, args.output)
    for name, evaluation in rows.items():
        print(f"{name}: " + ", ".join(f"{figure} {value:.3f}" for figure, value in evaluation.figures.items()))
