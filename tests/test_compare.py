"""The comparison: its statistics by planted results, and that a run is made once, resumed and put down as it was."""

import csv
import importlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats
from test_runs import ROOT, SMALL

import arguments
from experiments import compare


def curve(*scores):
    return np.array([[100.0 * i, float(i), score] for i, score in enumerate(scores)])


def row(method, seed, *scores, setting="default"):
    return dict(setting=setting, method=method, seed=seed, curve=curve(*scores))


def test_the_endpoint_is_the_mean_of_the_last_three_evaluations():
    assert compare.endpoint(curve(0.1, 0.9, 0.6, 0.5, 0.7)) == pytest.approx(0.6)


def test_a_score_is_reached_between_evaluations_in_proportion():
    c = curve(0.4, 0.5, 0.45, 0.65)
    assert compare.reached(c, 0.55) == pytest.approx((250, 2.5)) and compare.reached(c, 0.45) == pytest.approx((50, 0.5))
    assert compare.reached(c, 0.7) is None and compare.reached(c, 0.3) == (0, 0)


def test_holms_correction():
    """0.01 times 4, 0.02 times 3, and 0.03 times 2 and 0.5 times 1, none below the one before; never above 1."""
    assert compare.holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert compare.holm([0.9, 0.8]) == pytest.approx([1, 1])


def test_interval_and_power_are_those_of_paired_t_tests():
    """The interval holds the truth 95 times in 100, and the smallest detectable difference is found about 80 times in 100."""
    rng, covered, sizes = np.random.default_rng(0), 0, []
    for _ in range(2000):
        half, _, smallest = compare.paired(sample := 0.3 + rng.standard_normal(8))
        covered += abs(sample.mean() - 0.3) < half
        sizes.append(smallest)
    assert abs(covered / 2000 - 0.95) < 0.015
    found = [compare.paired(np.mean(sizes) + rng.standard_normal(8))[1] < 0.05 for _ in range(2000)]
    assert abs(np.mean(found) - 0.8) < 0.05


def test_the_report_pairs_by_seed():
    """Seeds differ by far more than the method, which is 0.1 better on each: pairing sees it, and the gain is that over GRPO's."""
    noise = np.random.default_rng(1).normal(0, 0.001, 5)
    rows = [row("grpo", s, 0.4, *[0.5 + 0.05 * s] * 3) for s in range(5)]
    rows += [row("gcpo, adaptive", s, 0.4, *[0.6 + 0.05 * s + noise[s]] * 3) for s in range(5)]
    rows += [row("gcpo, one chunk", s, 0.4, *[0.5 + 0.05 * s + noise[s]] * 3) for s in range(4)]  # a seed is missing
    rows += [row("grpo", 7, 0.0, 0.0, 0.0, 0.0, setting="all-steps")]
    grpo, adaptive, one = compare.report(rows, "default", compare.SETTINGS["default"][1])
    assert (grpo["seeds"], one["seeds"], grpo["score"]) == (5, 4, pytest.approx(0.6)) and "p" not in grpo
    assert adaptive["difference"] == pytest.approx(0.1, abs=0.002) and adaptive["p_holm"] < 1e-4 < 0.05 < one["p_holm"]
    assert adaptive["p_holm"] == pytest.approx(2 * adaptive["p"]) and adaptive["smallest_detectable"] < 0.01
    assert adaptive["relative_gain"] == pytest.approx((0.7 - 0.4) / (0.6 - 0.4), abs=0.01)
    half = stats.t.ppf(0.975, 4) * np.std([0.5, 0.55, 0.6, 0.65, 0.7], ddof=1) / math.sqrt(5)
    assert grpo["half_width"] == pytest.approx(half)
    assert grpo["reached_by"] == 3 and adaptive["reached_by"] == 5 and "images_to_it" not in grpo
    assert adaptive["images_to_it"] == pytest.approx(75, abs=15)  # on the mean over seeds of 100 * 0.2 / gain


def test_every_run_of_every_setting_has_flags_its_script_knows():
    for common, methods in compare.SETTINGS.values():
        for command in methods.values():
            script, *own = command.split()
            arguments.parse_args(importlib.import_module(script).Args, None, [*common.split(), *own])


def test_a_run_is_made_once_and_put_down_as_it_was(tmp_path, monkeypatch):
    common = " ".join(
        ["--iterations 3 --eval-every 1", *[flag for flag in SMALL if flag not in ("--no-compile", "--device", "cpu")]]
    )
    monkeypatch.setattr(compare, "SETTINGS", {"default": (common, {"grpo": "grpo", "slow": "grpo --lr 0.000000001"})})
    rows = [compare.run("default", method, seed, tmp_path / "runs") for method in ("grpo", "slow") for seed in (0, 1)]
    logs = [f"default-grpo{flag}-{seed}.log" for flag in ("", "-lr-0.000000001") for seed in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "runs").glob("*.log")) == logs
    assert rows[0]["curve"].shape == (4, 3) and rows[0]["curve"][-1, 0] == 3 * 8 and rows[0]["command"].startswith("grpo.py --iter")
    result = json.loads((tmp_path / "runs" / "default-grpo-0" / "result.json").read_text())
    assert (result["base_score"], result["final_score"]) == pytest.approx(tuple(rows[0]["curve"][[0, -1], 2]), abs=1e-5)
    assert rows[0]["curve"][-1, 1] == pytest.approx(result["seconds"] / 60, abs=1e-3)

    compare.write_table(tmp_path / "runs.csv", rows)
    again = compare.read_table(tmp_path / "runs.csv")
    assert [r["seed"] for r in again] == [0, 1, 0, 1] and (again[0]["curve"] == rows[0]["curve"]).all()

    commands, own = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **o: commands.append(list(map(str, command))) or own(command, **o))
    done = compare.run("default", "grpo", 0, tmp_path / "runs")  # read, not made again
    assert (done["curve"] == rows[0]["curve"]).all() and {command[0] for command in commands} == {"git"}
    (tmp_path / "runs" / "default-grpo-0" / "result.json").unlink()  # as if killed before its end
    done = compare.run("default", "grpo", 0, tmp_path / "runs")
    assert any("--resume" in command for command in commands) and (done["curve"][:, 2] == rows[0]["curve"][:, 2]).all()


def test_the_program_repeats_nothing_and_reports(tmp_path):
    rows = [row(m, s, 0.4, *[0.5 + 0.01 * s + 0.1 * (m != "grpo")] * 3) for m in ("grpo", "gcpo, adaptive") for s in (0, 1)]
    for r in rows:
        r |= dict(command="", commit="", threads=1)
    rows = [{k: r[k] for k in ("setting", "method", "seed", "command", "commit", "threads", "curve")} for r in rows]
    compare.write_table(tmp_path / "runs.csv", rows)
    flags = "--settings default --seeds 0 1 --jobs 1 --methods grpo".split() + ["gcpo, adaptive", "--output-dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "experiments.compare", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "difference +0.100" in done.stdout, done.stderr
    with open(tmp_path / "comparison.csv", newline="") as file:
        assert [r["method"] for r in csv.DictReader(file)] == ["grpo", "gcpo, adaptive"]
    assert (tmp_path / "comparison.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--settings", "sd3"], "--settings sd3 is not one of default, full, all-steps"),
        (["--methods", "ppo"], "--methods 'ppo' is not one of"),
        (["--jobs", "0"], "has no runs to report on"),
    ],
)
def test_bad_input_is_answered_with_one_sentence(flags, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.compare", "--output-dir", str(tmp_path), *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
