"""Score against variety: runs by the weight of their KL, each stopped early or at its end, and controls that need no training.

    python -m experiments.frontier                                                    # table and figure of what is measured
    python -m experiments.frontier --lora runs/compare/full-gcpo-beta-0-23 runs/...   # adds the controls of these runs first

Runs are those of `compare`'s settings `full`, `candidate` and `tuning-variety`, and beside them, by method, of `six` and
`old-default`; their curves are in runs.csv. Controls are a run's LoRA scaled down, left out of the last steps (evaluate.py
--hybrid) or drawn with guidance, and the base model with guidance; they go to frontier.csv. The table compares at equal score:
variety where a run first has it, between neighbouring evaluations in proportion; the least, the middle one and the most of the
seeds that reach it. Description, no test. Writes frontier.csv and frontier.png.
"""

import csv
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

import bookkeeping
import evaluate
import families
import machine
from experiments import compare

BY_KL = {  # name in the figure: setting and method in runs.csv
    "beta 0, first three steps": ("full", "gcpo, beta 0, first three steps"),
    "beta 0": ("full", "gcpo, beta 0"),
    "beta 0.003": ("tuning-variety", "gcpo --sde flow --eta 0.7 --ode-steps 2 --beta 0.003 --iterations 130"),
    "beta 0.01": ("tuning-variety", "gcpo --sde flow --eta 0.7 --ode-steps 2 --beta 0.01 --iterations 125"),
    "beta 0.02": ("candidate", "gcpo, beta 0.02"),
    "beta 0.03, the default": ("full", "gcpo"),
}
BY_METHOD = {
    f"{script}, {steps} steps{weight}": ("six", f"{name}{weight}, {steps} steps")
    for weight, steps in (("", 3), (" std2", 5)) for name, script in compare.SCRIPTS.items()
} | {
    "gcpo, 3 steps, 150 iterations": ("old-default", "gcpo"),
    "the same, beta 0.03": ("old-default", "gcpo, beta 0.03"),
}  # fmt: skip
PANELS = {"gcpo.py by its KL, kernel flow": BY_KL, "by method, kernel cps, 60 iterations and no KL unless said": BY_METHOD}
FOLDERS = {  # of LoRAs, without their seed: name in the figure; `default` is python gcpo.py --output-dir runs/default-0
    "full-gcpo-beta-0": "beta 0",
    "candidate-gcpo-beta-0.02": "beta 0.02",
    "default": "beta 0.03, the default",
}
MARKS = {  # how a control's name begins: its mark, and what the figure calls it
    "LoRA times": ("x", "LoRA scaled"),
    "LoRA in": ("+", "LoRA in the first steps"),
    "LoRA, guidance": ("v", "LoRA, guidance 1.5 and 2"),
    "guidance": ("^", "base model, guidance 1 to 3"),
}
SCALES, HYBRIDS, GUIDANCES, BASE_GUIDANCES = (0.25, 0.5, 0.75, 1.0), (1 / 3, 2 / 3), (1.5, 2.0), (1.0, 1.5, 2.0, 3.0)
SCORES = (0.65, 0.70, 0.75, 0.80)  # at which variety is compared
COLUMNS = ("run", "control", "score", "variety")


@dataclass
class Args:
    lora: tuple[Path, ...] = ()
    """folders of runs whose controls are measured and added"""
    output_dir: Path = Path("experiments/results")
    """folder of runs.csv and of what is written"""


def controls(folder):
    """Rows (run, control, score, variety) of a run's LoRA, left out at the end, scaled and guided; no folder: of the base model."""
    args = evaluate.Args(lora=str(folder or ""), device="cpu", dtype="float32")
    args.gradient_checkpointing = False
    pipe = bookkeeping.load(args)

    def row(control, tuned_steps=None):
        found = bookkeeping.evaluate(pipe, args, args.steps, tuned_steps)
        return dict(zip(COLUMNS, (folder.name if folder else "base", control, *found.figures.values())))

    if not folder:
        for args.guidance in BASE_GUIDANCES:
            yield row(f"guidance {args.guidance:g}")
        return
    for share in HYBRIDS:
        yield row(f"LoRA in {share:.2f} of the steps", range(round(share * args.steps)))
    whole = {name: w.clone() for name, w in families.lora_state(pipe).items()}  # on a CPU it shares the LoRA's own memory
    for scale in SCALES:
        families.set_lora(pipe, {name: w * scale if "lora_B" in name else w for name, w in whole.items()})
        yield row(f"LoRA times {scale:g}")
    families.set_lora(pipe, whole)
    for args.guidance in GUIDANCES:
        yield row(f"LoRA, guidance {args.guidance:g}")


def arm_of(run):
    """The setting and flags of a run: its folder's name without the seed."""
    return re.sub(r"-\d+$", "", run)


def variety_at(curve, score):
    """Variety of a curve (evaluations, 2) where it first has the score; nan if it never has."""
    for before, after in zip(curve, curve[1:]):
        if before[0] < score <= after[0]:
            return before[1] + (score - before[0]) / (after[0] - before[0]) * (after[1] - before[1])
    return math.nan


def read(path):
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [row | dict(score=float(row["score"]), variety=float(row["variety"])) for row in csv.DictReader(file)]


def write(path, points):
    """A table of points, their figures with four digits."""
    text = [{k: f"{v:.4f}" if isinstance(v, float) else v for k, v in point.items()} for point in points]
    compare.write_table(path, text)


def draw(curves, points, path):
    figure, halves = plt.subplots(1, 2, figsize=(13, 5.5), sharex=True, sharey=True, layout="constrained")
    for axes, (title, names) in zip(halves, PANELS.items()):
        colours = {name: f"C{i}" for i, name in enumerate(names)}
        for name in filter(curves.get, names):
            for n, curve in enumerate(curves[name]):  # (evaluations, 2) of score and variety
                label = f"{name}, runs: {len(curves[name])}" if n == 0 else None
                axes.plot(curve[:, 1], curve[:, 0], "-", color=colours[name], linewidth=0.8, label=label)
                axes.plot(*curve[-1, ::-1], "o", color=colours[name], markersize=5)
        for begins, (mark, label) in MARKS.items() if names is BY_KL else ():
            for point in (point for point in points if point["control"].startswith(begins)):
                colour = colours.get(FOLDERS.get(arm_of(point["run"])), "k")
                axes.plot(point["variety"], point["score"], mark, color=colour, markersize=6)
            axes.plot([], [], mark, color="k", label=label)
        axes.set(xlabel="variety", ylabel="held-out score", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower left")
    with bookkeeping.replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    for folder in args.lora:
        if not (folder / families.LORA_FILE).exists():
            machine.fail(f"--lora {folder} is not the folder of a run: it has no {families.LORA_FILE}")
    table = args.output_dir / "frontier.csv"
    points = read(table)
    for folder in (*args.lora, *([None] if args.lora else ())):
        name = folder.name if folder else "base"
        points = [point for point in points if point["run"] != name] + list(controls(folder))
        write(table, points)
    rows = compare.read_table(args.output_dir / "runs.csv")
    found = {
        name: [row["curve"][:, 2:] for row in rows if (row["setting"], row["method"]) == of]
        for name, of in (BY_KL | BY_METHOD).items()
    }
    curves = {name: own for name, own in found.items() if own}
    print("variety where the score is first reached, [least, middle, most] of the seeds that reach it")
    for name, own in curves.items():
        for score in SCORES:
            at = [v for v in (variety_at(curve, score) for curve in own) if not math.isnan(v)]
            low, middle, high = np.quantile(at, (0, 0.5, 1)) if at else (math.nan,) * 3
            print(f"{name:30} score {score:.2f}: {len(at)} of {len(own)} seeds  [{low:.2f}, {middle:.2f}, {high:.2f}]")
    grouped = defaultdict(list)  # by setting and flags, which are a folder's name without its seed
    for point in points:
        grouped[arm_of(point["run"]), point["control"]].append((point["score"], point["variety"]))
    for (arm, control), values in grouped.items():
        score, variety = np.mean(values, 0)
        print(f"{arm:28} {control:26} {len(values)} runs  score {score:.3f}  variety {variety:.3f}")
    draw(curves, points, args.output_dir / "frontier.png")
