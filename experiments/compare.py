"""Trains methods side by side in several settings and seeds, and tests what they differ in: score and variety.

    python -m experiments.compare --settings default --jobs 2         # what the table lacks of a setting, then its report
    python -m experiments.compare --settings full                     # one after another, with all threads and compiled
    python -m experiments.compare --methods grpo "mine.py --flag 3" --settings default    # your own script, beside GRPO
    python -m experiments.compare --jobs 0                            # the report alone

Runs side by side have one thread each and are not compiled; more threads would wait for each other. A finished run is a row of
<output-dir>/runs.csv and is not repeated while that row is there and SETTINGS gives it the same command. A killed run goes on from
its folder in --runs-dir.

The endpoints, fixed beforehand, are the means of a run's last three evaluations: held-out score and variety. Of CONTRASTS each is
tested by a paired t test over the seeds that both methods have; Welch's test, which does not pair, and from ten pairs on the
sign-flip permutation test stand beside it. A contrast with a * pools the pairs of all methods that fit, the * standing for the same
on both sides. Where a contrast claims "same", the p-value is that of two one-sided tests (TOST) against MARGIN. Holm's correction
is over the contrasts of a setting, for score and variety separately.

Writes runs.csv, comparison.csv (a row per setting and method), contrasts.csv (a row per contrast) and <setting>.png. Rows of
runs.csv from before variety was measured are of older code: they are read as setting "<name>, older code", which no report shows.
"""

import csv
import json
import math
import os
import re
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from bookkeeping import read_scalars, replacing
from experiments import variants
from machine import fail

ROOT = Path(__file__).parent.parent
MARGIN = 0.02  # endpoints that differ by less are "the same"


class Setting(NamedTuple):
    title: str
    """what a reader is told that it is"""
    seeds: Sequence[int]
    flags: str
    """of every run"""
    methods: dict[str, str]
    """{name: script or variant and its own flags, which come later and win}; differences are drawn from the first"""


# At T = 17: the learning rate that `tuning-17` favours, and the clip of T = 6. For the first two `tuning-17-clip` favours half of
# it, with which `mechanism` has arms of their own.
TUNED = {
    "grpo": ("2e-3", "3e-4"),
    "grpo --step-weights std2": ("2e-3", "3e-4"),
    "gcpo --max-chunk 4": ("2e-3", "3e-4"),
    "stepwise_grpo": ("2e-3", "3e-4"),
}
GRPO, GRPO_STD2, GCPO, STEPWISE = (f" --lr {lr} --clip {clip}" for lr, clip in TUNED.values())

# Mean weight of each step in the loss of adaptive GCPO, S / (K c) in a chunk of c steps, one of K: what gcpo.py of commit 24e9f25
# logged as chunks/weight_<k> in iterations 1 to 37 with the flags of `mechanism` (--max-chunk was --min-chunk) and --seed 100
GCPO_WEIGHTS = "1.31 1.10 1.08 1.08 1.07 1.09 1.11 1.13 1.16 1.19 1.22 1.23 0.79 0.47 0.47 0.47"

KERNELS = {"flow": "--sde flow --eta 0.7", "ddim": "--sde ddim --eta 0.8"}
SCRIPTS = {"grpo": "grpo", "gcpo": "gcpo", "stepwise": "stepwise_grpo"}
WEIGHTS = {"": "--step-weights none", " std2": "--step-weights std2"}
LENGTH_17 = "--iterations 60 --steps 17 --ode-steps 1 --prompts 8 --group-size 8 --beta 0"
CPS = "--sde cps --eta 0.8 --step-weights none"
EARLY = "--sde cps --eta 0.8 --ode-steps 3 --beta 0"

SETTINGS = {
    "default": Setting("the scripts' defaults, 60 iterations", range(20, 25), "--iterations 60", {
        "grpo": "grpo",
        "gcpo, adaptive": "gcpo",
        "gcpo, one chunk": "gcpo --chunk-size 4",
        "stepwise": "stepwise_grpo",
    }),
    "early": Setting("T = 6, the three early steps trained", range(5), f"--iterations 60 {EARLY}", {
        "grpo": "grpo",
        "gcpo, adaptive": "gcpo",
        "gcpo, one chunk": "gcpo --chunk-size 3",
        "stepwise, ddim": "stepwise_grpo --sde ddim",
        "stepwise, cps": "stepwise_grpo --sde cps",
        "grpo, ddim": "grpo --sde ddim",
        "stepwise, cps, T' = 3": "stepwise_grpo --sde cps --substeps 3",
    }),
    "full": Setting("the scripts' defaults, and what keeps variety", range(23, 28), "", {
        "gcpo": "gcpo",
        "gcpo, beta 0": "gcpo --beta 0",
        "gcpo, beta 0, first three steps": "gcpo --beta 0 --ode-steps 3",
    }),
    "all-steps": Setting("T = 6, all steps but the last trained", range(5), f"--iterations 100 {EARLY} --ode-steps 1", {
        "grpo": "grpo",
        "gcpo, adaptive": "gcpo --max-chunk 4",
        "stepwise, ddim": "stepwise_grpo --sde ddim",
        "stepwise, cps": "stepwise_grpo --sde cps",
    }),
    "long": Setting("T = 17, nothing tuned", range(5), f"{LENGTH_17} {CPS}", {
        "grpo": "grpo",
        "gcpo, adaptive": "gcpo --max-chunk 4",
        "gcpo, 2 3 4 7": "gcpo --chunks 2 3 4 7",
        "gcpo, chunks of 8": "gcpo --chunk-size 8",
        "gcpo, one chunk": "gcpo --chunk-size 16",
        "stepwise, ddim": "stepwise_grpo --sde ddim",
        "stepwise, cps": "stepwise_grpo --sde cps",
        "grpo, first 8 steps": "grpo --ode-steps 9",
        "stepwise, cps, first 8 steps": "stepwise_grpo --sde cps --ode-steps 9",
        "gcpo, half of 2 3 4 7": "gcpo --chunks 2 3 4 7 --chunk-fraction 0.5",
        "gcpo, half of 2 3 4 7, weighted": "gcpo --chunks 2 3 4 7 --chunk-fraction 0.5 --weighted",
    }),
    "tuning-variety": Setting("what keeps variety", (100,), f"--iterations 150 {EARLY}", {
        f"gcpo {flags}": f"gcpo {flags}" for flags in (
            "--beta 0.01",
            "--sde flow --eta 0.7 --ode-steps 1",
            "--sde flow --eta 0.7 --ode-steps 1 --beta 0.003 --dtype float32",
            "--sde flow --eta 0.7 --ode-steps 1 --beta 0.01 --dtype float32",
            "--sde flow --eta 0.7 --ode-steps 2 --beta 0.003 --dtype float32",
            "--sde flow --eta 0.7 --ode-steps 2 --beta 0.003 --iterations 130",
            "--sde flow --eta 0.7 --ode-steps 2 --beta 0.01 --iterations 125",
        )
    }),
    "old-default": Setting("the default before this one, and its KL", range(20, 25), f"--iterations 150 {EARLY}", {
        "gcpo": "gcpo",
        "gcpo, beta 0.03": "gcpo --beta 0.03",
    }),
    "candidate": Setting("a fourth candidate for the default", range(30, 35), "", {"gcpo, beta 0.02": "gcpo --beta 0.02"}),
    "tuning": Setting("T = 6, the three early steps, rates and clips", (100,), f"--iterations 60 {EARLY}", {
        f"{script} --lr {lr} --clip {clip}": f"{script} --lr {lr} --clip {clip}"
        for script in ("grpo", "gcpo", "stepwise_grpo")
        for lr, clip in (("1e-3", "3e-4"), ("2e-3", "3e-4"), ("4e-3", "3e-4"), ("2e-3", "1e-4"))
    }),
    "tuning-17": Setting("T = 17, learning rates", (100, 101), f"{LENGTH_17} {CPS} --clip 3e-4", {
        f"{arm} --lr {lr}": f"{arm} --lr {lr}" for arm in TUNED for lr in ("1e-3", "2e-3", "4e-3")
    }),
    "tuning-17-clip": Setting("T = 17, clips at the best rate", (100, 101), f"{LENGTH_17} {CPS}", {
        f"{arm} --clip {clip}": f"{arm} --lr {rate} --clip {clip}"
        for arm, (rate, _) in TUNED.items() for clip in ("1.5e-4", "3e-4", "6e-4")
    }),
    "tuning-17-stepwise": Setting("T = 17, what else may raise Stepwise", (100, 101), f"{LENGTH_17} {CPS} --lr 2e-3 --clip 3e-4", {
        flags: f"stepwise_grpo {flags}" for flags in (
            "--substeps 3",
            "--step-weights std2 --lr 1e-3",
            "--step-weights guard",
            "--updates 4",
            "--prompts 4 --group-size 16",
            "--eta 0.5",
            "--ode-steps 5",
            "--sde flow --eta 0.5 --substeps 3",
            "--prompts 16 --group-size 4",
            "--prompts 32 --group-size 2",
        )
    }),
    "mechanism": Setting("T = 17, all steps but the last trained", range(20, 30), f"{LENGTH_17} {CPS}", {
        "grpo": "grpo" + GRPO,
        "grpo std2": "grpo --step-weights std2" + GRPO_STD2,
        "gcpo": "gcpo --max-chunk 4" + GCPO,
        "stepwise": "stepwise_grpo" + STEPWISE,
        "stepwise, lambda 1": "stepwise_lambda --lam 1" + STEPWISE,
        "stepwise std2": "stepwise_grpo --step-weights std2" + STEPWISE,
        "grpo, gcpo's weights": f"grpo_weights --weights {GCPO_WEIGHTS}" + GRPO,
        "gcpo, another's plan": "gcpo_other_plan --max-chunk 4" + GCPO,
        "gcpo std2": "gcpo --max-chunk 4 --step-weights std2" + GCPO,
        "stepwise, mean per step": "stepwise_lambda --mean step" + STEPWISE,
        "stepwise, iteration's std": "stepwise_lambda --std iteration" + STEPWISE,
        "stepwise, mean per step, iteration's std": "stepwise_lambda --mean step --std iteration" + STEPWISE,
        "stepwise, lambda 1, mean per step, iteration's std": "stepwise_lambda --lam 1 --mean step --std iteration" + STEPWISE,
        "stepwise, noise put back": "stepwise_noise" + STEPWISE,
        "stepwise, T' = 3": "stepwise_grpo --substeps 3" + STEPWISE,
        "gcpo, one chunk": "gcpo --chunk-size 16" + GCPO,
        "grpo, half the clip": "grpo --lr 2e-3 --clip 1.5e-4",
        "grpo std2, half the clip": "grpo --step-weights std2 --lr 2e-3 --clip 1.5e-4",
        "grpo, one update": "grpo --updates 1" + GRPO,
        "gcpo, one update": "gcpo --max-chunk 4 --updates 1" + GCPO,
        "gcpo, one chunk, one update": "gcpo --chunk-size 16 --updates 1" + GCPO,
    }),
    "kernels": Setting("T = 17, the papers' own kernels", range(20, 25), LENGTH_17, {
        f"{kernel}: {name}{weight}": f"{script} {flags} {own}{' --max-chunk 4' * (name == 'gcpo')}"
        for kernel, flags in KERNELS.items() for weight, own in WEIGHTS.items() for name, script in SCRIPTS.items()
    }),
    "six": Setting("T = 6, five or the three early steps trained", range(20, 25), "--iterations 60 --sde cps --eta 0.8 --beta 0", {
        f"{name}{weight}, {6 - ode} steps": f"{script} --ode-steps {ode} {own}"
        for ode in (1, 3) for weight, own in WEIGHTS.items() for name, script in SCRIPTS.items()
    }),
    "hacking": Setting("judges made of preferences, and remedies", range(20, 25), f"{EARLY} --eval-images 432", {
        "poor judge": "gcpo --reward preference-poor --iterations 30 --eval-every 3",
        "poor judge, grpo": "grpo --reward preference-poor --iterations 30 --eval-every 3",
        "poor judge, stepwise": "stepwise_grpo --reward preference-poor --iterations 30 --eval-every 3",
        "poor judge, beta 0.03": "gcpo --reward preference-poor --iterations 30 --eval-every 3 --beta 0.03",
        "poor judge, beta 0.1": "gcpo --reward preference-poor --iterations 30 --eval-every 3 --beta 0.1",
        "poor judge and exact reward": "gcpo --reward preference-poor=0.5,shapes=0.5 --iterations 30 --eval-every 3",
        "good judge": "gcpo --reward preference --iterations 90 --eval-every 9",
    }),
    "frontier": Setting("score against variety by beta", (20, 21, 22), "", {
        f"{name}, beta {beta}": f"{script} --beta {beta}"
        for beta in (0, 0.003, 0.01, 0.03, 0.1) for name, script in SCRIPTS.items()
    }),
}  # fmt: skip

# Planned before the runs: {setting: [(method, against, what is claimed)]}. A setting that is not here tests each method, and every
# setting someone's own, against its first.
CONTRASTS = {
    "tuning": [], "tuning-variety": [], "tuning-17": [], "tuning-17-clip": [], "tuning-17-stepwise": [],
    "candidate": [], "frontier": [], "hacking": [],
    "full": [("gcpo, beta 0", "gcpo", "differs"), ("gcpo, beta 0, first three steps", "gcpo, beta 0", "differs")],
    "mechanism": [
        ("grpo std2", "grpo", "differs"),  # weights of steps
        ("gcpo", "grpo", "differs"),
        ("stepwise", "grpo", "differs"),
        ("grpo, gcpo's weights", "gcpo", "same"),  # GCPO is its weights
        ("gcpo", "gcpo, another's plan", "differs"),  # the trajectory's own dynamics
        ("gcpo std2", "grpo std2", "differs"),  # chunks beyond weights
        ("stepwise", "stepwise, lambda 1", "differs"),  # locating the gain, against a baseline that knows the state
        ("stepwise, mean per step, iteration's std", "stepwise, lambda 1, mean per step, iteration's std", "differs"),
        ("stepwise", "stepwise, mean per step", "differs"),  # what the joint normalization gives
        ("stepwise", "stepwise, iteration's std", "differs"),
        ("stepwise", "stepwise, mean per step, iteration's std", "differs"),
        ("stepwise, noise put back", "stepwise", "differs"),  # noise as the cause
        ("stepwise std2", "grpo std2", "differs"),  # credit beyond weights
        ("stepwise, T' = 3", "stepwise", "differs"),  # better estimates
        ("stepwise", "grpo, half the clip", "differs"),  # against GRPO at the clip that was best for it on the tuning seed
        ("stepwise", "grpo std2, half the clip", "differs"),  # and with weights too
        ("gcpo, one chunk", "grpo", "differs"),  # long equal chunks, and without the clip
        ("gcpo, one chunk, one update", "grpo, one update", "same"),
        ("gcpo, one update", "grpo, one update", "differs"),
    ],
    "kernels": [
        *((f"{kernel}: {name}{weight}", f"{kernel}: grpo{weight}", "differs")
          for kernel in KERNELS for weight in WEIGHTS for name in ("gcpo", "stepwise")),
        *((f"{kernel}: grpo std2", f"{kernel}: grpo", "differs") for kernel in KERNELS),
    ],
    "six": [
        ("* std2, 5 steps", "*, 3 steps", "same"),  # the papers' rule, weighted, against the early steps alone
        ("stepwise*", "grpo*", "differs"),
        ("gcpo*", "grpo*", "differs"),
    ],
}  # fmt: skip


@dataclass
class Args:
    settings: tuple[str, ...] = tuple(SETTINGS)
    """which of SETTINGS"""
    methods: tuple[str, ...] = ()
    """which of their methods, or scripts with flags like "mine.py --flag 3"; none: all of the settings"""
    seeds: tuple[int, ...] = ()
    """seeds of each; none: the setting's own"""
    jobs: int = 1
    """runs side by side, or 1 with all threads; 0: none, report on those in the table"""
    output_dir: Path = Path("experiments/results")
    """folder of the tables and plots"""
    runs_dir: Path = Path("runs/compare")
    """folder of the runs"""


# The runs


def evaluations(folder):
    """(images, minutes of training, held-out score, variety or nan) of every evaluation of a run."""
    scalars, seconds = read_scalars(folder), defaultdict(float)
    for tag, points in scalars.items():
        for step, value in points if tag.startswith("time/") else ():
            seconds[step] += value
    args = json.loads((folder / "args.json").read_text())
    varieties = dict(scalars.get("charts/variety", ()))
    for step, score in scalars["charts/held_out_score"]:
        minutes = sum(value for at, value in seconds.items() if at <= step) / 60
        yield step * args["prompts"] * args["group_size"], minutes, score, varieties.get(step, math.nan)


def read_table(path):
    """Rows of runs.csv, with the curve (evaluations, 4) of images, minutes, scores and varieties as an array."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = [row | dict(seed=int(row["seed"]), curve=np.array(json.loads(row["curve"]))) for row in csv.DictReader(file)]
    for row in rows:
        if row["curve"].shape[1] == 3:
            row |= dict(curve=np.insert(row["curve"], 3, math.nan, axis=1), setting=f"{row['setting']}, older code")
    return rows


def add_row(path, row):
    """Adds a run to runs.csv, whose other rows stay as they are, those of older code too."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        file.write(path.read_bytes().decode() if path.exists() else "")
        writer = csv.DictWriter(file, row.keys())
        if not path.exists():
            writer.writeheader()
        writer.writerow(row | dict(curve=json.dumps(row["curve"].tolist())))


def write_table(path, rows):
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)


def command(setting, method):
    """The words of a run but for its seed and folders: the script, with .py, and its flags; `method` is a name or someone's own."""
    script, *own = SETTINGS[setting].methods.get(method, method).split()
    return [script if script.endswith(".py") else f"{script}.py", *SETTINGS[setting].flags.split(), *own]


def folder_name(setting, method, seed):
    """Name of a run's folder: the setting, the words of the method, the seed."""
    words = SETTINGS[setting].methods.get(method, method).replace("--", "")
    return "-".join([setting, *re.findall(r"[\w.]+", words), str(seed)])


def run(setting, method, seed, runs_dir, alone=False):
    """Trains, or goes on with an interrupted run, and gives its row of the table; RuntimeError says how a run failed."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    commit = git("describe", "--always") + "-dirty" * bool(git("status", "--porcelain", "--", "*.py"))
    script, *flags = command(setting, method)
    folder = runs_dir / folder_name(setting, method, seed)
    if not (folder / "result.json").exists():
        runs_dir.mkdir(parents=True, exist_ok=True)
        where = ["--resume", folder] if (folder / "args.json").exists() else ["--output-dir", folder, "--seed", str(seed), *flags]
        if Path(script).stem in variants.VARIANTS:
            path = variants.write(Path(script).stem, Path(f"{folder}.code"))  # not in the folder, which has to be new
        else:
            path = ROOT / script if (ROOT / script).exists() else script
        words = [sys.executable, path, "--device", "cpu", *where]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        environment |= {} if alone else {"OMP_NUM_THREADS": "1"}
        with open(f"{folder}.log", "w") as log:
            if subprocess.run(words if alone else [*words, "--no-compile"], stdout=log, stderr=log, env=environment).returncode:
                said = Path(f"{folder}.log").read_text().strip()
                raise RuntimeError(f"{folder} failed; its log ends: {said[said.rfind(chr(10)) + 1 :]}")
    row = dict(setting=setting, method=method, seed=seed, command=" ".join([script, *flags]), commit=commit)
    row["threads"] = os.cpu_count() if alone else 1
    curve = [[images, round(m, 3), round(score, 5), round(variety, 5)] for images, m, score, variety in evaluations(folder)]
    return row | dict(curve=np.array(curve))


# The report


def endpoints(curve):
    """{score, variety}: means of the last three evaluations of a curve (evaluations, 4); one evaluation wanders by about 0.03."""
    return dict(zip(("score", "variety"), curve[-3:, 2:].mean(0)))


def reached(curve, target):
    """(images, minutes) at which a curve (evaluations, 4) first has the score, between evaluations in proportion; or None."""
    for before, after in zip(curve, curve[1:]):
        if after[2] >= target:
            share = max(0.0, (target - before[2]) / (after[2] - before[2]))
            return tuple(before[:2] + share * (after - before)[:2])
    return None


def half_width(values):
    """Of the 95 % interval of the mean of values (seeds,), by Student's t; nan for one."""
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else math.nan


def paired_tests(own, other):
    """How the endpoints own (seeds,) differ from other (seeds,), paired: {difference, low, high, p, p_welch, ...}.

    `p_same` is that of TOST, `p_sign_flip` (ten seeds or more) exact or of 9,999 draws, and `detectable` the difference that so
    many seeds find four times in five at p < 0.05.
    """
    n, gaps, paired = len(own), own - other, stats.ttest_rel(own, other)
    low, high = paired.confidence_interval()
    line = dict(difference=gaps.mean(), low=low, high=high, p=paired.pvalue, p_same=ttost_paired(own, other, -MARGIN, MARGIN)[0])
    line["p_welch"] = stats.ttest_ind(own, other, equal_var=False).pvalue
    if n >= 10:
        line["p_sign_flip"] = stats.permutation_test((gaps,), np.mean, permutation_type="samples", rng=0).pvalue
    line["detectable"] = (stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)) * stats.sem(gaps)
    return line


def runs_of(rows, setting):
    """{method: {seed: curve}} of a setting's methods and then others' own, by the command that SETTINGS gives them now."""
    runs = {method: {} for method in SETTINGS[setting].methods}
    for row in rows:
        if row["setting"] == setting and row["command"] == " ".join(command(setting, row["method"])):
            runs.setdefault(row["method"], {})[row["seed"]] = row["curve"]
    return {method: curves for method, curves in runs.items() if curves}


def summary(runs):
    """A row per method: its endpoints with the half-widths of their intervals, and where base and last evaluation are."""
    for method, curves in runs.items():
        line = dict(method=method, seeds=len(curves))
        for name in ("score", "variety"):
            ends = np.array([endpoints(curve)[name] for curve in curves.values()])
            line |= {name: ends.mean(), f"{name}_half_width": half_width(ends)}
        base, last = (np.mean([curve[at] for curve in curves.values()], 0) for at in (0, -1))
        yield line | dict(base_score=base[2], base_variety=base[3], last_score=last[2], last_variety=last[3], minutes=last[1])


def planned(setting, runs):
    """The contrasts of a setting, and each method of someone's own against the first."""
    first, *others = runs or [None]
    ours = SETTINGS[setting].methods
    contrasts = CONTRASTS.get(setting, [(method, first, "differs") for method in others if method in ours])
    return [*contrasts, *((method, first, "differs") for method in others if method not in ours)]


def pairs(runs, method, against):
    """Curves (pairs, 2, evaluations, 4) of a method and another by the seeds that both have; a * pools what fits on both sides."""
    found = []
    for name, curves in runs.items():
        if fits := re.fullmatch(re.escape(method).replace(r"\*", "(.+)"), name):
            other = runs.get(against.replace("*", *fits.groups()) if fits.groups() else against, {})
            found += [(curves[seed], other[seed]) for seed in sorted(curves.keys() & other.keys())]
    return np.array(found)


def contrasts(runs, planned):
    """A row per planned contrast that has two pairs of runs or more: what `paired_tests` says, and the way there.

    `images_to_it` and `minutes_to_it` are what the mean curve takes to the other's score, `images_of_its_own` and so on what the
    other's mean curve takes; `relative_gain` is the gain over the base model, divided by the other's.
    """
    lines = []
    for method, against, claim in planned:
        both = pairs(runs, method, against)
        if len(both) < 2:
            continue
        own, other = both.swapaxes(0, 1)  # (pairs, evaluations, 4)
        line = dict(method=method, against=against, claim=claim, pairs=len(both))
        for name in ("score", "variety"):
            ends, others = (np.array([endpoints(curve)[name] for curve in curves]) for curves in (own, other))
            if np.isfinite([ends, others]).all():
                line |= {f"{name}_{key}": value for key, value in paired_tests(ends, others).items()}
            if name == "score":
                base, goal = other[:, 0, 2].mean(), others.mean()
                line |= dict(relative_gain=(ends.mean() - base) / (goal - base))
        for of, curves in (("to_it", own), ("of_its_own", other)):
            if arrival := reached(curves.mean(0), goal):
                line |= {f"images_{of}": arrival[0], f"minutes_{of}": arrival[1]}
        lines.append(line)
    for name in ("score", "variety"):
        tested = [line for line in lines if f"{name}_p" in line]
        if tested:
            p = [line[f"{name}_p_same" if line["claim"] == "same" else f"{name}_p"] for line in tested]
            for line, corrected in zip(tested, multipletests(np.nan_to_num(p, nan=1.0), method="holm")[1]):
                line[f"{name}_p_holm"] = corrected
    return lines


MARK = {False: dict(fmt="o"), True: dict(fmt="o", markerfacecolor="white")}  # whether the seeds are too few for an interval
LABEL = [dict(xytext=(x, y), textcoords="offset points", fontsize=9) for x in (3, -15) for y in (3, -11)]  # around its point


def draw(runs, title, path):
    """Differences from the first method in score and in variety with 95 % intervals, paired; and score against variety.

    Two seeds, whose interval would be wider than the picture, are a hollow mark without one.
    """
    figure, axes = plt.subplots(1, 3, figsize=(11, 1.8 + 0.32 * max(6, len(runs))), width_ratios=(1, 1, 2), layout="constrained")
    first, *others = runs
    for axis, name in zip(axes, ("score", "variety")):
        for y, method in enumerate(others):
            seeds = sorted(runs[method].keys() & runs[first].keys())
            gaps = np.array([endpoints(runs[method][seed])[name] - endpoints(runs[first][seed])[name] for seed in seeds])
            few = len(gaps) < 3
            if len(gaps):
                axis.errorbar(gaps.mean(), y, xerr=None if few else half_width(gaps), color="C0", capsize=3, **MARK[few])
        axis.axvline(0, color="grey", linewidth=1)
        labels = [f"{textwrap.fill(method, 28)}  {number}" if name == "score" else "" for number, method in enumerate(others, 2)]
        axis.set(yticks=range(len(others)), yticklabels=labels, ylim=(max(len(others), 1) - 0.5, -0.5))
        axis.set_xlabel(f"difference in {name}\nfrom {first} (1)")
        axis.grid(axis="x", alpha=0.3)
    for number, curves in enumerate(runs.values(), 1):
        ends = np.array([list(endpoints(curve).values()) for curve in curves.values()])  # (seeds, 2)
        few, (score, variety) = len(ends) < 3, ends.mean(0)
        dy, dx = (None, None) if few else (half_width(values) for values in ends.T)
        axes[2].errorbar(variety, score, xerr=dx, yerr=dy, color="C0", ecolor="lightgrey", markersize=4, **MARK[few])
        axes[2].annotate(str(number), (variety, score), **LABEL[number % 4])
    axes[2].set(xlabel="variety", ylabel="held-out score")
    axes[2].grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)


def show(setting, summaries, tests):
    print(f"\n{setting}: {SETTINGS[setting].title}")
    for line in summaries:
        text = "{score:.3f} ± {score_half_width:.3f}  variety {variety:.3f} ± {variety_half_width:.3f}  {seeds} seeds"
        print(f"{line['method']:50}  score {text.format(**line)}")
    for line in tests:
        print(f"{line['method']} against {line['against']} ({line['claim']}), {line['pairs']} pairs")
        for name in ("score", "variety"):
            if f"{name}_p" in line:
                numbers = {key.removeprefix(f"{name}_"): value for key, value in line.items() if key.startswith(f"{name}_")}
                text = "{difference:+.3f} [{low:+.3f}, {high:+.3f}]  p {p:.3f}, {p_holm:.3f} by Holm; same {p_same:.3f}"
                print(f"    {name:8} {text}; detectable {{detectable:.3f}}".format(**numbers))


def rounded(lines):
    return [{name: f"{v:.4g}" if isinstance(v, float) else v for name, v in line.items()} for line in lines]


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    for name in args.settings:
        if name not in SETTINGS:
            fail(f"--settings {name} is not one of {', '.join(SETTINGS)}")
    known = {method for setting in args.settings for method in SETTINGS[setting].methods}
    own = [method for method in args.methods if method not in known]
    for method in own:
        script = method.partition(" ")[0]
        if not (script in variants.VARIANTS or script.endswith(".py") and Path(script).is_file()):
            fail(f"--methods {method!r} is neither one of {', '.join(map(repr, sorted(known)))} nor a script that is there")
    chosen = {s: [m for m in SETTINGS[s].methods if m in args.methods or not args.methods] + own for s in args.settings}
    table = args.output_dir / "runs.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    rows = read_table(table)
    wanted = [  # seed by seed, so that whenever it is stopped all methods have about as many
        (setting, method, seed)
        for setting, methods in chosen.items()
        for seed in args.seeds or SETTINGS[setting].seeds
        for method in methods
        if seed not in runs_of(rows, setting).get(method, ())
    ]
    for script in {Path(command(setting, method)[0]).stem for setting, method, _ in wanted} & variants.VARIANTS.keys():
        variants.source(script)  # ends the program if the variant does not apply
    failed, pool = False, ThreadPoolExecutor(max(args.jobs, 1))
    try:
        jobs = {pool.submit(run, *job, args.runs_dir, args.jobs == 1): job for job in (wanted if args.jobs else ())}
        for future in as_completed(jobs):
            try:
                row = future.result()
            except RuntimeError as error:
                failed = True
                print(error, file=sys.stderr)
            else:
                add_row(table, row)
                rows = read_table(table)  # all of it: another program may have added rows meanwhile
                print(len(rows), *jobs[future], " ".join(f"{k} {v:.3f}" for k, v in endpoints(row["curve"]).items()), flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    report = {"comparison": [], "contrasts": []}
    for setting in SETTINGS:  # the tables hold them all, only those asked for are printed and drawn
        runs = runs_of(rows, setting)
        found = list(summary(runs)), contrasts(runs, planned(setting, runs))
        for table_of_all, lines in zip(report.values(), found):
            table_of_all += [dict(setting=setting, **line) for line in lines]
        if runs and setting in args.settings:
            show(setting, *found)
            draw(runs, SETTINGS[setting].title, args.output_dir / f"{setting}.png")
    if not report["comparison"]:
        fail(f"{table} has no runs to report on" + ", and --jobs 0 makes none" * (not args.jobs))
    for name, lines in report.items():
        if lines:
            write_table(args.output_dir / f"{name}.csv", rounded(lines))
    sys.exit(failed)
