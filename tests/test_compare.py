"""The comparison: its statistics by planted results, that a run is made once, resumed and put down as it was, and the variants."""

import contextlib
import csv
import importlib
import importlib.util
import json
import math
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from scipy import stats
from test_runs import ROOT, SMALL

import arguments
import stepwise_grpo
from experiments import compare, variants


def curve(*scores, variety=0.9):
    return np.array([[100.0 * i, float(i), score, variety] for i, score in enumerate(scores)])


def row(method, seed, *scores, setting="default", variety=0.9):
    words = " ".join(compare.command(setting, method))
    return dict(setting=setting, method=method, seed=seed, command=words, curve=curve(*scores, variety=variety))


def test_the_endpoints_are_the_means_of_the_last_three_evaluations():
    c = curve(0.1, 0.9, 0.6, 0.5, 0.7)
    c[:, 3] = [1, 1, 0.9, 0.8, 0.4]
    assert compare.endpoints(c) == pytest.approx(dict(score=0.6, variety=0.7))


def test_a_score_is_reached_between_evaluations_in_proportion():
    c = curve(0.4, 0.5, 0.45, 0.65)
    assert compare.reached(c, 0.55) == pytest.approx((250, 2.5)) and compare.reached(c, 0.45) == pytest.approx((50, 0.5))
    assert compare.reached(c, 0.7) is None and compare.reached(c, 0.3) == (0, 0)


def test_intervals_power_and_equivalence_by_simulation():
    """The interval holds the truth 95 times in 100 and the detectable difference is found about 80 times in 100. Two methods a
    margin apart are called the same 5 times in 100, two of one mean almost always."""
    rng = np.random.default_rng(0)
    draw = lambda gap, scale: compare.paired_tests(gap + scale * rng.standard_normal(8), np.zeros(8))
    found = [draw(0.3, 1) for _ in range(600)]
    assert abs(np.mean([t["low"] < 0.3 < t["high"] for t in found]) - 0.95) < 0.03
    size = np.mean([t["detectable"] for t in found])
    assert abs(np.mean([draw(size, 1)["p"] < 0.05 for _ in range(600)]) - 0.8) < 0.06
    assert abs(np.mean([draw(compare.MARGIN, 0.005)["p_same"] < 0.05 for _ in range(600)]) - 0.05) < 0.03
    assert np.mean([draw(0, 0.005)["p_same"] < 0.05 for _ in range(100)]) > 0.95


def test_unpaired_and_sign_flip_tests():
    """Pairs that differ by 0.1 and seeds that differ by far more: pairing sees it, Welch's test does not. Ten equal signs come by
    chance 2 times in 2**10."""
    seeds = np.linspace(0, 5, 10)
    found = compare.paired_tests(seeds + 0.1 + 0.01 * np.arange(10), seeds)
    assert found["p"] < 0.001 < 0.5 < found["p_welch"] and found["p_sign_flip"] == pytest.approx(2 / 2**10)
    assert "p_sign_flip" not in compare.paired_tests(seeds[:9] + 0.1, seeds[:9])
    steady = 1e-6 * np.arange(10)  # where one method alone varies Welch's test has that one's 9 degrees of freedom
    found = compare.paired_tests(seeds, steady)
    assert found["p_welch"] == pytest.approx(2 * stats.t.sf((seeds - steady).mean() / stats.sem(seeds), 9), rel=1e-3)


def test_the_report_pairs_by_seed_and_corrects_over_the_contrasts():
    """Seeds differ by far more than the method, which is 0.1 better on each, and has 0.3 less variety."""
    noise = np.random.default_rng(1).normal(0, 0.001, 5)
    rows = [row("grpo", s, 0.4, *[0.5 + 0.05 * s] * 3, variety=0.9 + noise[s]) for s in range(5)]
    rows += [row("gcpo, adaptive", s, 0.4, *[0.6 + 0.05 * s + noise[s]] * 3, variety=0.6) for s in range(5)]
    rows += [row("gcpo, one chunk", s, 0.4, *[0.5 + 0.05 * s + noise[s]] * 3) for s in range(4)]  # a seed is missing
    rows += [row("grpo", 7, 0.0, 0.0, 0.0, 0.0, setting="all-steps")]
    rows += [row("grpo", 8, 0.0, 0.0, 0.0, 0.0) | dict(command="grpo.py --iterations 1")]  # of other flags
    runs = compare.runs_of(rows, "default")
    assert list(runs) == ["grpo", "gcpo, adaptive", "gcpo, one chunk"]
    grpo, adaptive, one = compare.summary(runs)
    assert (grpo["seeds"], one["seeds"], grpo["score"]) == (5, 4, pytest.approx(0.6)) and adaptive["variety"] == pytest.approx(0.6)
    half = stats.t.ppf(0.975, 4) * np.std([0.5, 0.55, 0.6, 0.65, 0.7], ddof=1) / math.sqrt(5)
    assert grpo["score_half_width"] == pytest.approx(half)

    planned = [("gcpo, adaptive", "grpo", "differs"), ("gcpo, one chunk", "grpo", "same"), ("grpo, ddim", "grpo", "differs")]
    adaptive, one = compare.contrasts(runs, planned)  # the third has no runs
    assert adaptive["score_difference"] == pytest.approx(0.1, abs=0.002)
    assert adaptive["variety_difference"] == pytest.approx(-0.3, abs=0.002)
    assert adaptive["relative_gain"] == pytest.approx((0.7 - 0.4) / (0.6 - 0.4), abs=0.01)
    # Holm: the smaller p-value times two, and that of the claim "same" is TOST's
    assert one["score_p_same"] < 0.001 < one["score_p"]
    small, large = sorted([adaptive["score_p"], one["score_p_same"]])
    assert sorted([adaptive["score_p_holm"], one["score_p_holm"]]) == pytest.approx([2 * small, max(2 * small, large)])
    assert adaptive["images_to_it"] == pytest.approx(100 * 0.2 / 0.3, abs=1) and adaptive["images_of_its_own"] == pytest.approx(100)


def test_a_contrast_with_a_star_pools_the_pairs_that_fit():
    """Weights add 0.1, Stepwise 0.2; GCPO has no weighted run, Stepwise one seed of it."""
    ends = {
        "grpo, 3 steps": 0.5,
        "grpo std2, 5 steps": 0.6,
        "gcpo, 3 steps": 0.5,
        "stepwise, 3 steps": 0.7,
        "stepwise std2, 5 steps": 0.8,
    }
    runs = {m: {s: curve(0.4, *[end + 0.01 * s] * 3) for s in range(2)} for m, end in ends.items()}
    del runs["stepwise std2, 5 steps"][1]
    rule, stepwise, gcpo = compare.contrasts(runs, compare.CONTRASTS["six"])
    assert [line["pairs"] for line in (rule, stepwise, gcpo)] == [3, 3, 2]
    assert [line["score_difference"] for line in (rule, stepwise, gcpo)] == pytest.approx([0.1, 0.2, 0.0])


def test_equal_runs_differ_by_nothing():
    runs = {m: {s: curve(0.4, *[0.5 + 0.01 * s] * 3) for s in range(3)} for m in ("grpo", "gcpo")}
    (line,) = compare.contrasts(runs, [("gcpo", "grpo", "differs")])
    assert (line["score_difference"], line["score_p_holm"]) == (0, 1)


def test_older_rows_are_read_and_kept_apart(tmp_path):
    old = row("grpo", 0, 0.4, 0.5, 0.6)
    old["curve"] = old["curve"][:, :3]
    compare.add_row(tmp_path / "runs.csv", old)
    before = (tmp_path / "runs.csv").read_bytes()
    compare.add_row(tmp_path / "runs.csv", row("grpo", 1, 0.4, 0.5, 0.6))
    assert (tmp_path / "runs.csv").read_bytes().startswith(before)
    first, second = rows = compare.read_table(tmp_path / "runs.csv")
    assert (first["setting"], second["setting"]) == ("default, older code", "default")
    assert np.isnan(first["curve"][:, 3]).all() and first["curve"][-1, 2] == 0.6
    assert list(compare.runs_of(rows, "default")["grpo"]) == [1]


def test_every_planned_contrast_is_of_methods_of_its_setting():
    for setting, planned in compare.CONTRASTS.items():
        runs = {method: {20: curve(0.4, 0.5, 0.6)} for method in compare.SETTINGS[setting].methods}
        assert all(len(compare.pairs(runs, method, against)) for method, against, _ in planned)
        assert {claim for *_, claim in planned} <= {"differs", "same"} and len(set(planned)) == len(planned)


def test_the_page_for_ones_own_method_names_a_command_that_is_understood():
    page = (ROOT / "docs" / "your_own_method.md").read_text()
    (words,) = (shlex.split(line) for line in page.splitlines() if "experiments.compare" in line)
    args = tyro.cli(compare.Args, args=words[3:])
    assert args.methods == ("grpo", "mine.py --flag 3") and set(args.settings) <= set(compare.SETTINGS)
    for name in ("runs.csv", "comparison.csv", "contrasts.csv"):
        assert f"`{name}`" in page and name in compare.__doc__


def load(variant, folder):
    spec = importlib.util.spec_from_file_location(variant, variants.write(variant, folder))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_run_of_every_setting_has_flags_its_script_knows(tmp_path):
    """So every variant applies to its script as it is, and compiles."""
    modules = {f"{variant}.py": load(variant, tmp_path) for variant in variants.VARIANTS}
    for setting, (_, seeds, _, methods) in compare.SETTINGS.items():
        assert len(seeds) > 0
        for method in methods:
            script, *flags = compare.command(setting, method)
            module = modules.get(script) or importlib.import_module(script.removesuffix(".py"))
            args = arguments.parse_args(module.Args, None, flags)
            if script == "grpo_weights.py":
                assert len(args.weights) == args.steps - args.ode_steps and np.mean(args.weights) == pytest.approx(1, abs=0.01)


def test_a_variant_that_does_not_apply_ends_the_program(monkeypatch, capsys):
    monkeypatch.setitem(variants.VARIANTS, "old", ("grpo", {"a line that was there once\n": ""}))
    monkeypatch.setitem(variants.VARIANTS, "twice", ("grpo", {"import": ""}))
    for variant, count in (("old", "0 times"), ("twice", "")):
        with pytest.raises(SystemExit) as ended:
            variants.source(variant)
        assert ended.value.code == 2 and count in capsys.readouterr().err


def credit(variant, seed=0, **flags):
    """Advantages (B, S) of a variant of stepwise_grpo by its own text, their gains and the rewards, on planted state rewards."""
    rewards = torch.randn(24, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(1)
    rewards.view(3, 8, 6)[:, :, 0], rewards.view(3, 8, 6)[2] = 0.5, 0.7  # the third group without spread
    (text,) = (new for old, new in variants.VARIANTS[variant][1].items() if old == variants.ADVANTAGES)
    args = stepwise_grpo.Args(seed=seed)
    for name, value in (dict(lam=0.0, mean="joint", std="group") | flags).items():
        setattr(args, name, value)
    names = vars(stepwise_grpo) | dict(step_gains=stepwise_grpo.gains(rewards), scores=rewards[:, -1], G=8, S=5, args=args)
    exec(text.replace("\n        ", "\n").strip(), names | (own := {"np": np, "iteration": 0}), own)
    return own["advantages"], names["step_gains"], names["scores"]


def test_the_lambda_variant():
    advantages, gains, scores = credit("stepwise_lambda")
    assert torch.allclose(advantages, stepwise_grpo.gain_advantages(gains, 8))
    advantages, gains, scores = credit("stepwise_lambda", lam=1.0, mean="step", std="iteration")
    to_come = gains.flip(1).cumsum(1).flip(1)  # R less the reward of the state
    centred = (to_come.view(3, 8, 5) - to_come.view(3, 8, 5).mean(1, keepdim=True)).view(24, 5)
    assert torch.allclose(advantages, centred / (centred.std() + 1e-4)) and not advantages[16:].any()
    assert torch.allclose(advantages.view(3, 8, 5).mean(1), torch.zeros(3, 5, dtype=torch.float64), atol=1e-12)
    half, _, _ = credit("stepwise_lambda", lam=0.5)
    returns = sum(0.5**j * torch.nn.functional.pad(gains, (0, 5))[:, j : j + 5] for j in range(5))
    assert torch.allclose(half, stepwise_grpo.gain_advantages(returns, 8))


def test_the_noise_variant_adds_what_makes_a_step_vary_like_the_reward():
    """What is added comes from other images alone, and gives each step's credit the variance of the reward."""
    added, rewards, variances = [], [], []
    for seed in range(300):
        advantages, gains, scores = credit("stepwise_noise", seed)
        extra = advantages - stepwise_grpo.gain_advantages(gains, 8)
        assert not extra[16:].any()
        std = gains.view(3, 8, 5).std((1, 2)).repeat_interleave(8)[:16, None]
        added.append(extra[:16] * std)
        rewards.append(scores[:16])
        within = lambda values: values[:16].view(2, 8, -1).var(1).mean(0)
        variances.append((within(gains), within(added[-1]), within(scores)))
    of_gains, of_added, of_scores = (torch.stack(values).mean(0) for values in zip(*variances))
    own = torch.corrcoef(torch.stack([torch.cat(added)[:, -1], torch.cat(rewards)]))[0, 1]
    assert own.abs() < 0.05  # less the mean of the whole group, its own reward in it, it would be about -1 / 8
    assert torch.allclose(of_added[1:], (of_scores - of_gains)[1:], rtol=0.1)


def test_a_run_is_made_once_and_put_down_as_it_was(tmp_path, monkeypatch):
    small = [flag for flag in SMALL if flag not in ("--no-compile", "--device", "cpu")]
    flags = " ".join([*small, "--iterations 2 --eval-every 1 --eval-images 48"])
    methods = {"grpo": "grpo", "weights": "grpo_weights --weights 0.5 1 1 1.5"}
    monkeypatch.setitem(compare.SETTINGS, "default", compare.Setting("", (0,), flags, methods))
    commands, own = [], subprocess.run

    def in_this_process(command, **options):
        """What a program of ours writes, without the seconds that importing everything takes."""
        commands.append(list(map(str, command)))
        if command[0] != sys.executable:
            return own(command, **options)
        monkeypatch.setattr(sys, "argv", commands[-1][1:])
        with contextlib.redirect_stdout(options["stdout"]):
            runpy.run_path(sys.argv[0], run_name="__main__")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", in_this_process)
    rows = [compare.run("default", method, seed, tmp_path / "runs") for method, seed in (("grpo", 0), ("weights", 1))]
    names = ["default-grpo-0", "default-grpo_weights-weights-0.5-1-1-1.5-1"]
    assert sorted(path.name for path in (tmp_path / "runs").glob("*.log")) == [f"{name}.log" for name in names]
    folder = tmp_path / "runs" / names[0]
    assert (
        rows[0]["curve"].shape == (3, 4)
        and rows[0]["curve"][-1, 0] == 2 * 8
        and rows[0]["command"].startswith("grpo.py --prompts 2")
    )
    result = json.loads((folder / "result.json").read_text())
    assert (result["base_score"], result["final_score"]) == pytest.approx(tuple(rows[0]["curve"][[0, -1], 2]), abs=1e-5)
    assert result["final_variety"] == pytest.approx(rows[0]["curve"][-1, 3], abs=1e-5)
    assert rows[0]["curve"][-1, 1] == pytest.approx(result["seconds"] / 60, abs=1e-3)
    # A variant's code is kept beside its run, which is of that name
    assert "args.weights" in Path(f"{tmp_path}/runs/{names[1]}.code/grpo_weights.py").read_text()
    assert json.loads((tmp_path / "runs" / names[1] / "result.json").read_text())["algorithm"] == "grpo_weights"

    for made in rows:
        compare.add_row(tmp_path / "runs.csv", made)
    again = compare.read_table(tmp_path / "runs.csv")
    assert [r["seed"] for r in again] == [0, 1] and np.array_equal(again[0]["curve"], rows[0]["curve"], equal_nan=True)

    commands.clear()
    done = compare.run("default", "grpo", 0, tmp_path / "runs")  # read, not made again
    assert (done["curve"][:, :3] == rows[0]["curve"][:, :3]).all() and {command[0] for command in commands} == {"git"}
    (folder / "result.json").unlink()  # as if killed before its end
    done = compare.run("default", "grpo", 0, tmp_path / "runs")
    assert any("--resume" in command for command in commands) and (done["curve"][:, 2] == rows[0]["curve"][:, 2]).all()


def program(monkeypatch, *flags):
    """The program's exit code, in this process, which has imported what takes seconds."""
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "experiments" / "compare.py"), run_name="__main__")
    return ended.value.code


def test_the_program_repeats_nothing_and_reports(tmp_path, monkeypatch, capsys):
    rows = [row(m, s, 0.4, *[0.5 + 0.01 * s + 0.1 * (m != "grpo")] * 3) for m in ("grpo", "gcpo, adaptive") for s in (0, 1)]
    for made in rows:
        compare.add_row(tmp_path / "runs.csv", made)
    flags = ["--settings", "default", "--seeds", 0, 1, "--methods", "grpo", "gcpo, adaptive", "--output-dir", tmp_path]
    assert program(monkeypatch, *flags) == 0 and "score    +0.100" in capsys.readouterr().out
    with open(tmp_path / "comparison.csv", newline="") as file:
        assert [(r["method"], r["variety"]) for r in csv.DictReader(file)] == [("grpo", "0.9"), ("gcpo, adaptive", "0.9")]
    with open(tmp_path / "contrasts.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    assert (line["method"], line["against"], line["score_difference"]) == ("gcpo, adaptive", "grpo", "0.1")
    assert (tmp_path / "default.png").stat().st_size > 5000


def test_a_script_of_ones_own_runs_beside_the_settings_methods(tmp_path, monkeypatch, capsys):
    """And one that fails says why, while the report of the others is made."""
    (tmp_path / "mine.py").write_text((ROOT / "grpo.py").read_text())
    (tmp_path / "broken.py").write_text("raise SystemExit('error: a word that ends it')")
    small = shlex.join(["--iterations", "1", *SMALL])
    flags = ["--settings", "default", "--methods", f"{tmp_path}/mine.py {small}", f"{tmp_path}/broken.py"]
    flags += ["--seeds", 3, "--jobs", 2, "--output-dir", tmp_path / "out", "--runs-dir", tmp_path / "runs"]
    assert program(monkeypatch, *flags) == 1
    assert "its log ends: error: a word that ends it" in capsys.readouterr().err
    (made,) = compare.read_table(tmp_path / "out" / "runs.csv")
    assert made["command"] == f"{tmp_path}/mine.py --iterations 60 {small}" and made["seed"] == 3
    (run,) = (tmp_path / "runs").glob("*/result.json")
    assert json.loads(run.read_text())["algorithm"] == "mine"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--settings", "sd3"], "--settings sd3 is not one of default, early, full, all-steps"),
        (["--methods", "ppo"], "--methods 'ppo' is neither one of"),
        (["--methods", "ppo.py --lr 1"], "nor a script that is there"),
        (["--jobs", "0"], "has no runs to report on"),
    ],
)
def test_bad_input_is_answered_with_one_sentence(flags, message, tmp_path, monkeypatch, capsys):
    assert program(monkeypatch, "--output-dir", tmp_path, *flags) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1
