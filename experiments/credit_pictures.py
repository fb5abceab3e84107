"""The two pictures of experiments/credit.py, and what its errors allow to say."""

import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import bookkeeping


def interval(log_images, error):
    """The 95 % interval of the images."""
    return np.exp(np.clip(log_images + 1.96 * error * np.array([-1, 1]), -20, 20)) if math.isfinite(error) else (0.0, math.inf)


def images_told(log_images, error, reference=256):
    """Whether the 95 % interval of equivalent images leaves out the reference, and the images with it as text."""
    low, high = interval(log_images, error)
    if error == 0 or not low <= reference <= high:
        return True, f"{np.exp(log_images):,.0f} [{low:,.0f}, {high:,.0f}]"
    return False, "cannot be told"


def draw_trajectory(path, images, value, error, credits):
    """Images (S + 1, 3, H, W) estimated at the states, over value and error (S + 1,), over {name: credit of each step (S,)}."""
    S = len(images) - 1
    figure = plt.figure(figsize=(1.9 * (S + 1), 6.6))
    grid = figure.add_gridspec(
        3, S + 1, height_ratios=(1.9, 1.5, 1.9), hspace=0.12, wspace=0.06, left=0.08, right=0.99, top=0.99, bottom=0.06
    )
    for k, image in enumerate(images):
        axis = figure.add_subplot(grid[0, k])
        axis.imshow(image.permute(1, 2, 0).float())
        axis.axis("off")
    curve = figure.add_subplot(grid[1, :], xlim=(-0.5, S + 0.5))
    curve.fill_between(range(S + 1), value - 1.96 * error, value + 1.96 * error, color="black", alpha=0.2, linewidth=0)
    curve.plot(range(S + 1), value, "o-", color="black")
    curve.set_ylabel("value")
    bars = figure.add_subplot(grid[2, :], xlim=(-0.5, S + 0.5))
    width = 0.8 / len(credits)
    for i, (name, credit) in enumerate(credits.items()):
        x = np.arange(S) + 0.5 + (i - (len(credits) - 1) / 2) * width
        bars.bar(x, credit, width * 0.9, label=name, color="black" if i == 0 else f"C{i - 1}")
    bars.axhline(0, color="black", linewidth=0.8)
    bars.set_ylabel("credit")
    bars.legend(fontsize=8, frameon=False, ncols=len(credits), loc="upper center", bbox_to_anchor=(0.5, 0.02))
    for axis in (curve, bars):
        axis.set_xticks([])
        axis.vlines(range(S + 1), *axis.get_ylim(), color="black", alpha=0.12, linewidth=0.8, zorder=0)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    with bookkeeping.replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def draw_gradient(path, names, gradient):
    """Images that give GRPO the expected cosine of 256 of each method, at both updates; hollow where the interval spans 256."""
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(names) + 1))
    left, right = 8, 65536
    for u, (colour, (value, error)) in enumerate(zip(("tab:blue", "tab:orange"), gradient)):
        axis.barh(0, 0, 0, 256, color=colour, label=("first update", "second update")[u])
        for i, (v, e) in enumerate(zip(value[-1].tolist(), error[-1].tolist())):
            if math.isfinite(e):
                y, low_high = i + (u - 0.5) * 0.38, np.clip(interval(v, e), left, right)
                axis.barh(y, np.exp(v) - 256, 0.34, 256, color=colour if images_told(v, e)[0] else "none", edgecolor=colour)
                axis.plot(low_high, [y, y], color="black", linewidth=1)
    axis.axvline(256, color="black", linewidth=1)
    axis.set(xscale="log", xlim=(left, right), yticks=range(len(names)), yticklabels=names)
    axis.set_xticks([16, 64, 256, 1024, 4096, 16384], ["16", "64", "256 images", "1,024", "4,096", "16,384"])
    axis.minorticks_off()
    axis.legend(frameon=False, loc="lower left")
    axis.invert_yaxis()
    axis.spines[["top", "right", "left"]].set_visible(False)
    figure.tight_layout()
    with bookkeeping.replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
