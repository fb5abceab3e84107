"""Draws everything that a run logged, a panel a metric: the pictures of the pages in docs/.

python grpo.py --iterations 60 --output-dir runs/curves
python -m experiments.curves runs/curves docs/grpo.png
"""

import sys
from collections import defaultdict

import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def draw(folder, path, columns=5):
    """Tags that differ in their last number alone share a panel, and so do all of time/."""
    events, panels = EventAccumulator(str(folder), {"scalars": 0}), defaultdict(dict)  # 0: every point
    events.Reload()
    for tag in sorted(events.Tags()["scalars"]):
        section, name = tag.split("/")
        family, number = (section, name) if section == "time" else (tag.rstrip("_0123456789"), name.split("_")[-1])
        panels[family][number] = [(e.step, e.value) for e in events.Scalars(tag)]
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2 * rows), squeeze=False)
    for axis, (family, curves) in zip(axes.flat, panels.items()):
        for number, points in curves.items():
            axis.plot(*zip(*points), "o-" if len(points) < 20 else "-", label=number, linewidth=1, markersize=3)
        axis.set_title(family, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.ticklabel_format(useOffset=False)
        axis.legend(fontsize=6).set_visible(len(curves) > 1)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    draw(*sys.argv[1:])
