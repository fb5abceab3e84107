"""Judges made of preferences, followed from the base model until they are fooled or a remedy holds: proxy, gold and variety.

    python -m experiments.compare --settings hacking --jobs 2    # the runs
    python -m experiments.hacking                                # this report on them

The proxy is what training maximizes, the gold the exact verdict, both of the same held-out images. A run is hacked if gold ends by
DROP below its own peak while the proxy is higher at the end than at that peak, each taken as the mean over three neighbouring
evaluations; a remedy works in a run whose gold ends at KEPT of its peak or more. Whether a method hacks sooner is asked at equal
distance, of its gold where the path's KL first passes NATS. Variety is nan where hardly an image is right. Writes hacking.csv, a
row for each evaluation of each run, and overoptimization.png; runs whose folders are gone are read from the former.
"""

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from statsmodels.stats.multitest import multipletests

from bookkeeping import read_scalars, replacing
from experiments import compare
from machine import fail

DROP, KEPT, NATS = 0.05, 0.95, 5.0
METHODS = ["poor judge, grpo", "poor judge", "poor judge, stepwise"]  # one judge, three methods: "poor judge" is gcpo.py's
REMEDIES = ["poor judge", "poor judge, beta 0.03", "poor judge, beta 0.1", "poor judge and exact reward"]
COLOURS = {arm: f"C{i}" for i, arm in enumerate(compare.SETTINGS["hacking"].methods)}
TAGS = dict(proxy="charts/held_out_reward", gold="charts/held_out_score", variety="charts/variety", kl="charts/path_kl")
COLUMNS = ("arm", "seed", "iteration", *TAGS)


@dataclass
class Args:
    output_dir: Path = Path("experiments/results")
    """folder of hacking.csv and overoptimization.png"""
    runs_dir: Path = Path("runs/compare")
    """folder of the runs"""


def read(args):
    """{(arm, seed): {iteration, proxy, gold, variety, kl: (evaluations,)}} of the runs that are done, and of hacking.csv."""
    curves, table = {}, defaultdict(list)
    if (args.output_dir / "hacking.csv").exists():
        with open(args.output_dir / "hacking.csv", newline="") as file:
            for row in csv.DictReader(file):
                table[row["arm"], int(row["seed"])].append([float(row[name]) for name in COLUMNS[2:]])
    for run, rows in table.items():
        curves[run] = dict(zip(COLUMNS[2:], np.array(rows).T))
    for arm in compare.SETTINGS["hacking"].methods:
        for seed in compare.SETTINGS["hacking"].seeds:
            folder = args.runs_dir / compare.folder_name("hacking", arm, seed)
            if (folder / "result.json").exists():
                scalars = read_scalars(folder)
                points = {name: dict(scalars[tag]) for name, tag in TAGS.items()}
                steps = sorted(points["gold"])
                values = {name: np.array([points[name].get(step, np.nan) for step in steps]) for name in TAGS}
                curves[arm, seed] = {"iteration": np.array(steps, float)} | values
    return dict(sorted(curves.items()))


def verdict(curve):
    """What is said of a run, {peak, peak_iteration, end, ..., hacked, works}: means over three neighbouring evaluations."""
    smooth = {name: np.convolve(values, np.ones(3) / 3, "valid") for name, values in curve.items()}
    at = smooth["gold"].argmax()
    found = dict(peak=smooth["gold"][at], peak_iteration=smooth["iteration"][at], end=smooth["gold"][-1])
    found |= dict(proxy_at_peak=smooth["proxy"][at], proxy_at_end=smooth["proxy"][-1])
    found |= dict(variety=smooth["variety"][-1], kl=smooth["kl"][-1])
    fooled = found["end"] <= found["peak"] - DROP and found["proxy_at_end"] > found["proxy_at_peak"]
    return found | dict(hacked=bool(fooled), works=bool(found["end"] >= KEPT * found["peak"]))


def gold_at(curve, nats):
    """Gold of a run where the path's KL first passes `nats`, between evaluations in proportion; nan if it never does."""
    after = np.argmax(curve["kl"] > nats)
    if not curve["kl"][after] > nats:
        return np.nan
    return np.interp(nats, curve["kl"][after - 1 : after + 1], curve["gold"][after - 1 : after + 1])


def draw(curves, path):
    """Proxy, gold and variety against the square root of the path's KL, a thin line per run: methods, remedies, the good judge."""
    figure, axes = plt.subplots(3, 3, figsize=(11, 10), layout="constrained", sharex=True)
    titles = dict(proxy="proxy: what training maximizes", gold="gold: share of images fully correct", variety="variety")
    limits = dict(gold=(0, 0.7), variety=(0.3, 1.1))
    for row, arms in zip(axes, (METHODS, REMEDIES, ["good judge"])):
        for axis, (name, title) in zip(row, titles.items()):
            for arm in arms:
                for i, curve in enumerate(curve for (own, _), curve in curves.items() if own == arm):
                    label = (arm if arm != "poor judge" else "poor judge, gcpo") if i == 0 else None
                    axis.plot(curve["kl"] ** 0.5, curve[name], color=COLOURS[arm], linewidth=1, alpha=0.8, label=label)
            axis.set(title=title, ylim=limits.get(name))
            axis.grid(alpha=0.3)
        if any(arm in arms for arm, _ in curves):
            row[1].legend(fontsize=8)
    for axis in axes[-1]:
        axis.set(xlabel="distance from the base model, √KL in √nats")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    curves = read(args)
    if not curves:
        fail(f"{args.runs_dir} has no finished run of the setting hacking; make them with python -m experiments.compare")
    rows = [
        dict(arm=arm, seed=seed, **{name: f"{curve[name][i]:.5g}" for name in COLUMNS[2:]})
        for (arm, seed), curve in curves.items()
        for i in range(len(curve["iteration"]))
    ]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    compare.write_table(args.output_dir / "hacking.csv", rows)
    draw(curves, args.output_dir / "overoptimization.png")
    for arm in dict.fromkeys(arm for arm, _ in curves):
        found = {seed: verdict(curve) for (a, seed), curve in curves.items() if a == arm}
        hacked, works = (sum(f[name] for f in found.values()) for name in ("hacked", "works"))
        print(f"{arm}: of {len(found)} runs {hacked} are hacked, in {works} gold keeps {KEPT:.0%} of its peak")
        for seed, f in found.items():
            text = "gold {peak:.3f} around iteration {peak_iteration:.0f}, at the end {end:.3f}, {kept:.0%} of it; "
            text += "proxy {proxy_at_peak:.3f} and {proxy_at_end:.3f}; at the end variety {variety:.3f}, KL {kl:.1f} nats"
            text += f"; gold at {NATS:g} nats {gold_at(curves[arm, seed], NATS):.3f}"
            print(f"  seed {seed}: {text.format(**f, kept=f['end'] / f['peak'])}")
    tested = {}
    for method in METHODS[1:]:
        seeds = [seed for arm, seed in curves if arm == method and (METHODS[0], seed) in curves]
        pairs = np.array([[gold_at(curves[arm, seed], NATS) for arm in (method, METHODS[0])] for seed in seeds]).reshape(-1, 2)
        pairs = pairs[np.isfinite(pairs).all(1)]  # of seeds where both come that far
        if len(pairs) >= 2:
            tested[method] = dict(seeds=len(pairs)) | compare.paired_tests(*pairs.T)
    corrected = multipletests([line["p"] for line in tested.values()], method="holm")[1] if tested else []
    for (method, line), p_holm in zip(tested.items(), corrected):
        text = "{difference:+.3f} [{low:+.3f}, {high:+.3f}], p {p:.3f}, {p_holm:.3f} by Holm; detectable {detectable:.3f}"
        print(f"gold at {NATS:g} nats, {method} - {METHODS[0]}:", text.format(**line, p_holm=p_holm), f"({line['seeds']} seeds)")
