"""Runs the three methods side by side in several settings and seeds, and tells with tests of significance what they differ in.

    python -m experiments.compare --jobs 2                # every run that the table lacks, then the report; hours
    python -m experiments.compare --settings full         # one after another, with all threads and compiled, as users run them
    python -m experiments.compare --jobs 0                # the report alone
    python -m experiments.compare --settings default --methods grpo "gcpo, one chunk" --seeds 0 1

Runs side by side have one thread each and are not compiled; more threads would wait for each other. A finished run is a row of
<output-dir>/runs.csv and never repeated until that row is deleted. A killed one goes on from its folder in --runs-dir. The
endpoint, fixed beforehand, is the mean of a run's last three evaluations. Writes runs.csv, comparison.csv (a row a method and
setting) and comparison.png.
"""

import csv
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import arguments
from bookkeeping import replacing

ROOT = Path(__file__).parent.parent

# Flags of every run of a setting, and by method the script and its own flags, which come later and win. The first method is the
# one compared with.
# `default` and `full` are the scripts' defaults, at fewer iterations and at all of them; `all-steps` trains every step but the
# last, as both papers do; `long` so at GCPO's length, with fewer images in place of more transformer calls; `tuning` is each
# script's grid of learning rate and clip, on a seed of its own.
STEPWISE = {
    "stepwise, its paper's ddim": "stepwise_grpo --sde ddim",
    "stepwise, cps": "stepwise_grpo --sde cps",
}
SETTINGS = {
    "default": ("--iterations 60", {
        "grpo": "grpo",
        "gcpo, adaptive": "gcpo",
        "gcpo, one chunk": "gcpo --chunk-size 3",
        **STEPWISE,
        "grpo, ddim": "grpo --sde ddim",
        "stepwise, cps, T' = 3": "stepwise_grpo --sde cps --substeps 3",
    }),
    "full": ("", {"gcpo": "gcpo"}),
    "all-steps": ("--iterations 100 --ode-steps 1", {
        "grpo": "grpo",
        "gcpo, adaptive": "gcpo --min-chunk 4",
        **STEPWISE,
    }),
    "long": ("--iterations 60 --steps 17 --ode-steps 1 --prompts 8 --group-size 8", {
        "grpo": "grpo",
        "gcpo, adaptive": "gcpo --min-chunk 4",
        "gcpo, 2 3 4 7": "gcpo --chunks 2 3 4 7",
        "gcpo, chunks of 8": "gcpo --chunk-size 8",
        "gcpo, one chunk": "gcpo --chunk-size 16",
        **STEPWISE,
        "grpo, first 8 steps": "grpo --ode-steps 9",
        "stepwise, cps, first 8 steps": "stepwise_grpo --sde cps --ode-steps 9",
        "gcpo, half of 2 3 4 7": "gcpo --chunks 2 3 4 7 --chunk-fraction 0.5",
        "gcpo, half of 2 3 4 7, weighted": "gcpo --chunks 2 3 4 7 --chunk-fraction 0.5 --weighted",
    }),
    "tuning": ("--iterations 60", {
        f"{script} --lr {lr} --clip {clip}": f"{script} --lr {lr} --clip {clip}"
        for script in ("grpo", "gcpo", "stepwise_grpo")
        for lr, clip in (("1e-3", "3e-4"), ("2e-3", "3e-4"), ("4e-3", "3e-4"), ("2e-3", "1e-4"))
    }),
}  # fmt: skip
TUNING_SEED = 100


@dataclass
class Args:
    settings: tuple[str, ...] = ("default", "full", "all-steps", "long", "tuning")
    """which of SETTINGS"""
    methods: tuple[str, ...] = ()
    """which of their methods; none: all"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """seeds of each, but for tuning, which has its own"""
    jobs: int = 1
    """runs side by side, or 1 with all threads; 0: none, report on those in the table"""
    output_dir: Path = Path("experiments/results")
    """folder of the tables and the plot"""
    runs_dir: Path = Path("runs/compare")
    """folder of the runs"""


# The runs


def evaluations(folder):
    """(images, minutes of training, held-out score) of every evaluation of a run."""
    events = EventAccumulator(str(folder))
    events.Reload()
    args = json.loads((folder / "args.json").read_text())
    per_iteration = args["prompts"] * args["group_size"]
    minutes = np.cumsum([per_iteration / e.value / 60 for e in events.Scalars("charts/images_per_second")])
    for e in events.Scalars("charts/held_out_score"):
        yield e.step * per_iteration, minutes[e.step - 1] if e.step else 0.0, e.value


def read_table(path):
    """Rows of runs.csv, with the curve (evaluations, 3) of images, minutes and scores as an array."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [row | dict(seed=int(row["seed"]), curve=np.array(json.loads(row["curve"]))) for row in rows]


def write_table(path, rows):
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(row | ({"curve": json.dumps(row["curve"].tolist())} if "curve" in row else {}) for row in rows)


def run(setting, method, seed, runs_dir, alone=False):
    """Trains, or goes on with an interrupted run, and gives its row of the table; None if the run failed."""
    common, methods = SETTINGS[setting]
    script, *own = methods[method].split()
    folder = runs_dir / "-".join([setting, *methods[method].replace("--", "").split(), str(seed)])
    flags = [*common.split(), *own]
    if not (folder / "result.json").exists():
        where = ["--resume", folder] if (folder / "args.json").exists() else ["--output-dir", folder, "--seed", str(seed), *flags]
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, ROOT / f"{script}.py", "--device", "cpu", *where]
        environment = os.environ if alone else {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(f"{folder}.log", "w") as log:
            if subprocess.run(command if alone else [*command, "--no-compile"], stdout=log, stderr=log, env=environment).returncode:
                return None
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    commit = git("describe", "--always") + "-dirty" * bool(git("status", "--porcelain", "--", "*.py"))
    row = dict(
        setting=setting,
        method=method,
        seed=seed,
        command=" ".join([f"{script}.py", *flags]),
        commit=commit,
        threads=os.cpu_count() if alone else 1,
    )
    return row | dict(curve=np.array([[images, round(m, 3), round(s, 5)] for images, m, s in evaluations(folder)]))


# The report


def endpoint(curve):
    """Mean of the last three scores of a curve (evaluations, 3): one evaluation wanders by about 0.03."""
    return curve[-3:, 2].mean()


def reached(curve, target):
    """(images, minutes) at which a curve (evaluations, 3) first has the target, between evaluations in proportion; or None."""
    for before, after in zip(curve, curve[1:]):
        if after[2] >= target:
            share = max(0.0, (target - before[2]) / (after[2] - before[2]))
            return tuple(before[:2] + share * (after - before)[:2])
    return None


def holm(p_values):
    """Holm's correction: p-values of m tests such that the chance of any false one below alpha is at most alpha."""
    order, adjusted, least = np.argsort(p_values), np.empty(len(p_values)), 0.0
    for rank, i in enumerate(order):
        least = adjusted[i] = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
    return adjusted


def paired(difference):
    """(95 % half-width, p, smallest difference that so many seeds find four times in five) of differences (seeds,) by t tests."""
    n = len(difference)
    error = difference.std(ddof=1) / math.sqrt(n)
    t, power = stats.t.ppf(0.975, n - 1), stats.t.ppf(0.8, n - 1)
    return t * error, stats.ttest_1samp(difference, 0).pvalue, (t + power) * error


def report(rows, setting, methods):
    """A row a method with two seeds or more: its endpoint, and how it differs from the first method's on the same seeds."""
    runs = {m: {r["seed"]: r["curve"] for r in rows if (r["setting"], r["method"]) == (setting, m)} for m in methods}
    (first, baseline), lines = next(iter(runs.items())), []
    for method, curves in runs.items():
        if len(curves) < 2:
            continue
        ends = np.array([endpoint(c) for c in curves.values()])
        half = stats.t.ppf(0.975, len(ends) - 1) * ends.std(ddof=1) / math.sqrt(len(ends))
        line = dict(setting=setting, method=method, seeds=len(ends), base=np.mean([c[0, 2] for c in curves.values()]))
        line |= dict(score=ends.mean(), half_width=half, last=np.mean([c[-1, 2] for c in curves.values()]))
        shared = sorted(curves.keys() & baseline.keys())
        if method != first and len(shared) > 1:
            own, other = (np.array([endpoint(c[seed]) for seed in shared]) for c in (curves, baseline))
            base = np.array([baseline[seed][0, 2] for seed in shared])
            half, p, detectable = paired(own - other)
            line |= dict(difference=(own - other).mean(), difference_half_width=half, p=p, smallest_detectable=detectable)
            line |= dict(relative_gain=(own - base).mean() / (other - base).mean())
        goal = np.mean([endpoint(c) for c in baseline.values()]) if baseline else math.inf
        arrivals = [reached(c, goal) for c in curves.values()]
        line |= dict(reached_by=sum(a is not None for a in arrivals))
        if all(arrivals):
            line |= dict(zip(("images_to_it", "minutes_to_it"), np.mean(arrivals, 0)))
        lines.append(line)
    tested = [line for line in lines if "p" in line]
    for line, p in zip(tested, holm([line["p"] for line in tested])):
        line["p_holm"] = p
    return lines


def draw(rows, settings, path):
    """Mean held-out score, and the range over seeds, against images: a panel a setting, a line of its own a method."""
    methods = dict.fromkeys(method for setting in settings for method in SETTINGS[setting][1])
    style = {m: dict(color=f"C{i % 10}", linestyle="-" if i < 10 else "--") for i, m in enumerate(methods)}
    figure, axes = plt.subplots(1, len(settings), figsize=(4.5 * len(settings), 6), sharey=True, squeeze=False)
    for axis, setting in zip(axes[0], settings):
        for method in SETTINGS[setting][1]:
            curves = [r["curve"] for r in rows if (r["setting"], r["method"]) == (setting, method)]
            if curves:
                images, scores = curves[0][:, 0], np.array([c[:, 2] for c in curves])
                axis.plot(images, scores.mean(0), label=f"{method} ({len(curves)} seeds)", **style[method])
                axis.fill_between(images, scores.min(0), scores.max(0), color=style[method]["color"], alpha=0.12, linewidth=0)
        axis.set(title=setting, xlabel="images generated")
        axis.locator_params("x", nbins=5)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    axes[0, 0].set_ylabel("held-out strict score")
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    for name in args.settings:
        if name not in SETTINGS:
            arguments.fail(f"--settings {name} is not one of {', '.join(SETTINGS)}")
    known = {method for setting in args.settings for method in SETTINGS[setting][1]}
    for method in args.methods:
        if method not in known:
            arguments.fail(f"--methods {method!r} is not one of {', '.join(map(repr, sorted(known)))}")
    table = args.output_dir / "runs.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    rows = read_table(table)
    done = {(row["setting"], row["method"], row["seed"]) for row in rows}
    wanted = [  # seed by seed, so that whenever it is stopped all methods have about as many
        (setting, method, seed)
        for setting in args.settings
        for seed in ((TUNING_SEED,) if setting == "tuning" else args.seeds)
        for method in SETTINGS[setting][1]
        if (method in args.methods or not args.methods) and (setting, method, seed) not in done
    ]
    with ThreadPoolExecutor(max(args.jobs, 1)) as pool:
        for job, row in zip(wanted, pool.map(lambda job: run(*job, args.runs_dir, args.jobs == 1), wanted if args.jobs else ())):
            if row is None:
                print(f"{job} failed; see its log in {args.runs_dir}", file=sys.stderr)
            else:
                rows.append(row)
                write_table(table, rows)
                print(len(rows), *job, f"{endpoint(row['curve']):.3f}", flush=True)
    if not rows:
        arguments.fail(f"{table} has no runs to report on, and --jobs 0 makes none")
    lines = [line for setting in args.settings if setting != "tuning" for line in report(rows, setting, SETTINGS[setting][1])]
    for line in lines:
        text = f"{line['setting']:10} {line['method']:36} {line['seeds']} seeds {line['score']:.3f} ± {line['half_width']:.3f}"
        if "p" in line:
            text += f"  difference {line['difference']:+.3f} ± {line['difference_half_width']:.3f}, p {line['p_holm']:.3f} (Holm)"
            text += f", could have seen {line['smallest_detectable']:.3f}; relative gain {line['relative_gain']:.2f}"
        print(text)
    for row in rows:
        if row["setting"] == "tuning":
            print(f"tuning     {row['method']:44} {endpoint(row['curve']):.3f}")
    fields = dict.fromkeys(name for line in lines for name in line)
    write_table(args.output_dir / "comparison.csv", [
        {f: (f"{line[f]:.4g}" if isinstance(line.get(f), float) else line.get(f, "")) for f in fields} for line in lines
    ])  # fmt: skip
    drawn = {row["setting"] for row in rows} - {"tuning"}
    draw(rows, [setting for setting in args.settings if setting in drawn], args.output_dir / "comparison.png")
