"""The pictures of experiments/credit.py, and one that holds its predictions against what training measured.

    python -m experiments.compare --settings mechanism --jobs 2
    python -m experiments.credit --steps 17 --images 288 --group-size 8 --prompts 8 --max-chunk 4 --output-dir runs/credit-17
    python -m experiments.credit_pictures --credit runs/credit-17

An arm is a pair of ARMS. Predicted is the gain over GRPO by credit.csv, measured the difference of scores from GRPO's on the same
seeds, whose own is 0.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from scipy import stats

import bookkeeping
from experiments import compare
from machine import fail

SHOWN = (  # rows of the gradient's picture
    "GRPO, std2", "GRPO, without the last step", "GCPO, one chunk", "GCPO, adaptive", "Stepwise, T' = 1", "Stepwise, std2, T' = 1",
    "R - R_k, T' = 1", "true advantage",
)  # fmt: skip
ARMS = {  # methods of the measurement: arms of compare.py's setting `mechanism`
    "GRPO": "grpo",
    "GRPO, std2": "grpo std2",
    "GCPO, adaptive": "gcpo",
    "Stepwise, T' = 1": "stepwise",
    "R - R_k, joint mean, group std, T' = 1": "stepwise, lambda 1",
    "Stepwise, std2, T' = 1": "stepwise std2",
    "GRPO, GCPO's mean weights": "grpo, gcpo's weights",
    "GCPO, another's chunks": "gcpo, another's plan",
    "GCPO, adaptive, std2": "gcpo std2",
    "Stepwise by step, T' = 1": "stepwise, mean per step",
    "Stepwise, joint mean, iteration std, T' = 1": "stepwise, iteration's std",
    "Stepwise, step mean, iteration std, T' = 1": "stepwise, mean per step, iteration's std",
    "R - R_k, T' = 1": "stepwise, lambda 1, mean per step, iteration's std",
    "Stepwise, noise put back, T' = 1": "stepwise, noise put back",
    "Stepwise, T' = 3": "stepwise, T' = 3",
    "GCPO, one chunk": "gcpo, one chunk",
}


def interval(log_images, error):
    """The 95 % interval of the images."""
    return np.exp(np.clip(log_images + 1.96 * error * np.array([-1, 1]), -20, 20)) if math.isfinite(error) else (0.0, math.inf)


def images_told(log_images, error, reference):
    """Equivalent images with their 95 % interval as text, unless that includes the reference."""
    low, high = interval(log_images, error)
    return "inconclusive" if error > 1e-9 and low <= reference <= high else f"{np.exp(log_images):,.0f} [{low:,.0f}, {high:,.0f}]"


def save(figure, path):
    with bookkeeping.replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)


def draw_trajectory(path, images, value, error, credits):
    """Images (S + 1, 3, H, W) estimated at the states, over value and error (S + 1,), over {name: credit of each step (S,)}."""
    S = len(images) - 1
    figure = plt.figure(figsize=(min(1.9 * (S + 1), 12), 6.6))
    grid = figure.add_gridspec(
        3, S + 1, height_ratios=(1.6, 1.6, 2), hspace=0.25, wspace=0.06, left=0.09, right=0.99, top=0.95, bottom=0.14
    )
    for k, image in enumerate(images):
        axis = figure.add_subplot(grid[0, k])
        axis.imshow(image.permute(1, 2, 0).float())
        axis.set_title(f"$x_{{{k}}}$", fontsize=9)
        axis.axis("off")
    curve = figure.add_subplot(grid[1, :], xlim=(-0.5, S + 0.5), ylabel="value of the state")
    curve.fill_between(range(S + 1), value - 1.96 * error, value + 1.96 * error, color="black", alpha=0.2, linewidth=0)
    curve.plot(range(S + 1), value, "o-", color="black")
    curve.set_xticks([])
    bars = figure.add_subplot(grid[2, :], xlim=(-0.5, S + 0.5), ylabel="credit in its\nstandard deviations")
    width = 0.8 / len(credits)
    for i, (name, credit) in enumerate(credits.items()):
        x = np.arange(S) + 0.5 + (i - (len(credits) - 1) / 2) * width
        bars.bar(x, credit, width * 0.9, label=name, color="black" if i == 0 else f"C{i - 1}")
    bars.axhline(0, color="black", linewidth=0.8)
    bars.set_xticks(np.arange(S) + 0.5, [f"step {k}" if S < 10 else k for k in range(S)])
    bars.tick_params(length=0)
    bars.legend(fontsize=9, frameon=False, ncols=len(credits), loc="upper center", bbox_to_anchor=(0.5, -0.12))
    for axis in (curve, bars):
        axis.vlines(range(S + 1), *axis.get_ylim(), color="black", alpha=0.12, linewidth=0.8, zorder=0)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    save(figure, path)


def draw_shares(path, figures, S):
    """Each step's share of the variation in reward beside its share of the noise in GRPO's gradient."""
    figure, axis = plt.subplots(figsize=(min(1.5 * S + 2, 10), 4))
    sides = ("reward", "share", "variation in reward"), ("GRPO", "share of noise", "noise in GRPO's gradient")
    for i, (method, quantity, label) in enumerate(sides):
        share, error = 100 * np.array([figures[method, "steps", str(k), quantity] for k in range(S)]).T
        axis.bar(np.arange(S) + 0.4 * (i - 0.5), share, 0.38, yerr=1.96 * error, label=label, color=f"C{i}", error_kw=dict(lw=1))
    axis.set(xlabel="step", ylabel="the step's share (%)", xticks=range(S))
    axis.axhline(0, color="black", linewidth=0.8)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save(figure, path)


def draw_gradient(path, figures, methods, batch):
    """Images of which GRPO's gradient is as good as that of `batch` images of a method, at both updates."""
    names = [name for name in SHOWN if name in methods]
    figure, axis = plt.subplots(figsize=(10, 0.5 * len(names) + 1.8))
    left, right = batch / 32, batch * 256
    for i, name in enumerate(names):
        for u, update in enumerate(("first update", "second update")):
            value, error = figures[name, "", update, "log equivalent images"]
            if math.isfinite(error):
                y, ends = i + (u - 0.5) * 0.35, np.clip(interval(value, error), left, right)
                apart = images_told(value, error, batch) != "inconclusive"
                axis.plot(ends, [y, y], color=f"C{u}", linewidth=1.5)
                axis.plot(np.clip(np.exp(value), left, right), y, "o", color=f"C{u}", markerfacecolor=f"C{u}" if apart else "white")
    for u, update in enumerate(("first update", "second update")):
        axis.plot([], [], "o-", color=f"C{u}", label=update)
    axis.plot([], [], "o", color="grey", markerfacecolor="white", label="hollow: the 95 % interval includes GRPO (inconclusive)")
    axis.axvline(batch, color="black", linewidth=1)
    axis.set(xscale="log", xlim=(left, right), yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.6))
    ticks = [batch * 4**i for i in range(-2, 5)]
    axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axis.set_xlabel(f"images that GRPO needs for the gradient that {batch} images of a method give")
    axis.minorticks_off()
    axis.legend(
        frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.35, -0.55 / (0.5 * len(names) + 1) - 0.05), fontsize=9
    )
    axis.spines[["top", "right", "left"]].set_visible(False)
    figure.tight_layout()
    save(figure, path)


def correlation(predicted, measured):
    """Pearson's correlation over the arms, and its 95 % interval by Fisher's transformation."""
    found = stats.pearsonr(predicted, measured)
    return (float(found.statistic), *map(float, found.confidence_interval()))


def draw_predictions(path, arms):
    """Measured difference in score against predicted gain, {name: (gain, its error, difference, its 95 % half-width)}."""
    gain, error, difference, half_width = np.array(list(arms.values())).T
    others = [name != "GRPO" for name in arms]  # whose own point is (1, 0) by construction
    r, low, high = correlation(gain[others], difference[others])
    figure, axis = plt.subplots(figsize=(8, 6))
    axis.errorbar(gain, difference, half_width, 1.96 * error, "o", elinewidth=0.8)
    for number, (name, x, y) in enumerate(zip(arms, gain, difference), 1):
        axis.annotate(str(number), (x, y), (4, 4 - 14 * (number % 2)), textcoords="offset points", fontsize=9)
        axis.plot([], [], " ", label=f"{number}  {name}")
    axis.legend(fontsize=8, loc="lower right", handlelength=0)
    axis.set_ylim(difference.min() - 0.15, difference.max() + 0.1)  # intervals of two seeds go on outside
    axis.set(xlabel="predicted gain over GRPO (expected cosine of the gradient)", ylabel="measured difference from GRPO (score)")
    axis.set_title(f"correlation {r:.2f}, 95 % interval {low:.2f} to {high:.2f}, {sum(others)} arms and GRPO", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save(figure, path)
    return r, low, high


@dataclass
class Args:
    credit: str
    """folder of a measurement by experiments/credit.py, best a pooled one"""
    output_dir: Path = Path("experiments/results")
    """folder of compare.py's runs.csv, where predictions.png is written too"""


def arms_of(folder, runs):
    """What `draw_predictions` takes, of the methods with a prediction in the folder's credit.csv and runs on seeds of GRPO's."""
    with open(f"{folder}/credit.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if (r["at"], r["quantity"]) == ("first update", "predicted gain")]
    ends = {arm: {seed: compare.endpoints(curve)["score"] for seed, curve in curves.items()} for arm, curves in runs.items()}
    arms, grpo = {}, ends.get("grpo", {})
    for name, value, error in ((r["method"], float(r["value"]), float(r["error"])) for r in rows):
        own = ends.get(ARMS.get(name), {})
        gaps = np.array([own[seed] - grpo[seed] for seed in sorted(own.keys() & grpo.keys())])
        if len(gaps) and math.isfinite(value):
            arms[name] = value, error, gaps.mean(), compare.half_width(gaps) if name != "GRPO" else 0.0
    return arms


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    try:
        arms = arms_of(args.credit, compare.runs_of(compare.read_table(args.output_dir / "runs.csv"), "mechanism"))
    except OSError as error:
        fail(f"{error.filename} cannot be read: {error.strerror}")
    if len(arms) < 5:
        fail(f"only {len(arms)} methods have a prediction and runs of the setting mechanism; it takes 5")
    r, low, high = draw_predictions(args.output_dir / "predictions.png", arms)
    for name, (gain, error, difference, half_width) in arms.items():
        print(f"{name:44}predicted gain {gain:.2f} ± {error:.2f}, measured difference {difference:+.3f} ± {half_width:.3f}")
    print(f"correlation of predicted and measured gain over {len(arms) - 1} arms: {r:.2f}, 95 % interval {low:.2f} to {high:.2f}")
