"""Runs the three methods with several seeds and draws their held-out score against images and minutes.

    python -m experiments.compare                         # every default, three seeds; finished runs are not run again
    python -m experiments.compare --seeds 0 --runs-dir runs/flow --output-dir runs/flow --sde flow --eta 0.7

Flags that are not its own go to every run, so all scripts must know them; other flags need another --runs-dir. Writes
<output-dir>/comparison.csv, a row an evaluation, and comparison.png.
"""

import csv
import importlib
import itertools
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import arguments


@dataclass
class Args:
    methods: tuple[str, ...] = ("grpo", "gcpo", "stepwise_grpo")
    """scripts to run"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of each"""
    target: float = 0.55
    """held-out score for which images and minutes are told"""
    output_dir: Path = Path("experiments/results")
    """folder of the table and the plot"""
    runs_dir: Path = Path("runs/compare")
    """folder of the runs"""


# A run with another of these is the same experiment
IMMATERIAL = ("seed", "output_dir", "resume", "device", "dtype", "compile", "micro_batch", "save_every")


def settings(method, flags):
    """What makes a run of a script with these flags the experiment it is; a flag that the script does not know ends the program."""
    given = asdict(arguments.parse_args(importlib.import_module(method).Args, None, flags))
    return json.loads(json.dumps({name: value for name, value in given.items() if name not in IMMATERIAL}))


def check_folder(folder, wanted):
    """Ends the program if the folder holds a run with other settings than those wanted."""
    saved = json.loads((folder / "args.json").read_text()) if (folder / "args.json").exists() else wanted
    for name, value in wanted.items():
        if saved.get(name) != value:
            flag = name.replace("_", "-")
            arguments.fail(f"{folder} holds a run with --{flag} {saved.get(name)}, not {value}; name another --runs-dir")


def evaluations(folder):
    """(images, minutes of training, held-out score) of every evaluation of a run."""
    events = EventAccumulator(str(folder))
    events.Reload()
    args = json.loads((folder / "args.json").read_text())
    per_iteration = args["prompts"] * args["group_size"]
    minutes = np.cumsum([per_iteration / e.value / 60 for e in events.Scalars("charts/images_per_second")])
    for e in events.Scalars("charts/held_out_score"):
        yield e.step * per_iteration, minutes[e.step - 1] if e.step else 0.0, e.value


def reached(curve, target):
    """(images, minutes) at which a run's curve, rows in order, first has the target, between evaluations in proportion; or None."""
    for before, after in zip(curve, curve[1:]):
        if after["held_out"] >= target:
            share = max(0.0, (target - before["held_out"]) / (after["held_out"] - before["held_out"]))
            return tuple(before[key] + share * (after[key] - before[key]) for key in ("images", "minutes"))
    return None


if __name__ == "__main__":
    args, flags = tyro.cli(Args, description=__doc__, return_unknown_args=True)
    if {"--seed", "--output-dir", "--resume"} & {flag.split("=")[0] for flag in flags} or not (args.seeds and args.methods):
        arguments.fail("--seeds and --methods take one or more values, and --seed, --output-dir and --resume are set for each run")
    for method in args.methods:
        if not (Path(__file__).parent.parent / f"{method}.py").exists():
            arguments.fail(f"--methods {method}: there is no {method}.py")
        wanted = settings(method, flags)
        for seed in args.seeds:
            check_folder(args.runs_dir / f"{method}-{seed}", wanted)
    rows = []
    for seed in args.seeds:
        for method in args.methods:
            folder = args.runs_dir / f"{method}-{seed}"
            if not (folder / "result.json").exists():
                where = ["--resume", folder] if (folder / "args.json").exists() else ["--output-dir", folder]
                script = Path(__file__).parent.parent / f"{method}.py"
                run = subprocess.run([sys.executable, script, "--seed", str(seed), *where, *flags])
                if run.returncode:
                    sys.exit(run.returncode)
            for images, minutes, score in evaluations(folder):
                rows.append(dict(method=method, seed=seed, images=images, minutes=round(minutes, 3), held_out=round(score, 5)))

    args.output_dir.mkdir(parents=True, exist_ok=True)
    with open(args.output_dir / "comparison.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for method, colour in zip(args.methods, itertools.cycle(("tab:gray", "tab:blue", "tab:orange", "tab:green"))):
        curves = [[r for r in rows if r["method"] == method and r["seed"] == seed] for seed in args.seeds]
        scores = np.array([[r["held_out"] for r in curve] for curve in curves])
        print(f"{method:15} {scores[:, 0].mean():.3f} -> {scores[:, -1].mean():.3f}, by seed {scores[:, -1].round(3).tolist()}")
        arrivals = [reached(curve, args.target) for curve in curves]
        if all(arrivals):
            images, minutes = np.mean(arrivals, axis=0)
            print(f"{'':15} {args.target} after {images:,.0f} images, {minutes:.1f} minutes")
        else:
            print(f"{'':15} {args.target} not reached by seeds {[seed for seed, a in zip(args.seeds, arrivals) if not a]}")
        for axis, key in zip(axes, ("images", "minutes")):
            x = np.mean([[r[key] for r in curve] for curve in curves], axis=0)
            axis.plot(x, scores.mean(0), color=colour, label=method)
            axis.fill_between(x, scores.min(0), scores.max(0), color=colour, alpha=0.2, linewidth=0)
            axis.set_xlabel({"images": "images generated", "minutes": "minutes of training"}[key])
    axes[0].set_ylabel("held-out strict score")
    axes[0].legend()
    axes[0].set_title(f"mean, and range over {len(args.seeds)} seeds", fontsize=10)
    figure.tight_layout()
    figure.savefig(args.output_dir / "comparison.png", dpi=120)
