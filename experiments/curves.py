"""Draws six metrics that a run logged, each under the question that it answers: the pictures of the pages in docs/.

python grpo.py --iterations 60 --output-dir runs/curves
python -m experiments.curves runs/curves docs/grpo.png
"""

import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from bookkeeping import read_scalars, replacing

# Tags that differ in their last number alone share a panel. Stepwise's signal is its gains, elsewhere it is the share of images
# whose group's rewards differ
PANELS = {
    "Does it learn?": ("charts/reward", "mean reward of training images"),
    "Also for new prompts?": ("charts/held_out_score", "held-out score"),
    "Does it keep its variety?": ("charts/variety", "variety"),
    "Is there something to learn from?": ("charts/images_with_signal", "share of images with a signal"),
    "Which steps gain?": (r"gain/step_\d+", "mean |gain| of a step"),
    "Do ratios stay near 1?": (r"losses/clip_fraction_\d+", "share of ratios that are clipped"),
    "Is the gradient steady?": (r"losses/grad_norm_\d+", "norm of the gradient"),
}


def draw(folder, path):
    scalars = read_scalars(folder)
    left_out = "Is there something to learn from?" if "gain/step_0" in scalars else "Which steps gain?"
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
    for axis, question in zip(axes.flat, (question for question in PANELS if question != left_out)):
        pattern, name = PANELS[question]
        tags = sorted((tag for tag in scalars if re.fullmatch(pattern, tag)), key=lambda tag: (len(tag), tag))
        for tag in tags:
            number = tag.rsplit("_", 1)[-1]
            axis.plot(*zip(*scalars[tag]), "o-" if len(scalars[tag]) < 20 else "-", label=number, linewidth=1, markersize=3)
        if len(tags) > 1:
            axis.legend(title="step" if "gain" in pattern else "update", fontsize=8, ncols=-(-len(tags) // 8))
        axis.set(title=question, xlabel="iteration", ylabel=name)
        axis.ticklabel_format(useOffset=False)
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
    plt.close(figure)


if __name__ == "__main__":
    draw(*sys.argv[1:])
