"""The course: the reference gets full points, the file as handed out none, every common wrong answer the message that names it,
and a hostile submission harms nothing but its own points."""

import ast
import dataclasses
import io
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
COURSE = ROOT / "assignments"
sys.path += [str(COURSE), str(COURSE / "tests")]

import bugs  # noqa: E402, the course's folders have to be on the path before
import checks  # noqa: E402
import gcpo  # noqa: E402
import reference as r  # noqa: E402
import run_part  # noqa: E402
import sampler  # noqa: E402
import train  # noqa: E402


def messages(part, **replaced):
    """What the tests of a part say of the reference with some of its functions or answers replaced."""
    answers = r.ANSWERS | {name: replaced.pop(name) for name in list(replaced) if name in r.ANSWERS}
    submission = SimpleNamespace(**{**vars(r), **replaced, "ANSWERS": answers})
    return [run_part.run_test(test, submission) for test in run_part.tests_of(part)]


@pytest.mark.parametrize("part", range(1, 8))
def test_the_reference_passes_every_test(part):
    assert not any(messages(part))


def test_the_course_has_as_many_points_as_its_readme_says():
    points = sum(test.points for part in range(1, 8) for test in run_part.tests_of(part))
    assert points == 112 and "112 + 25 points" in (COURSE / "README.md").read_text()


def numbers(text):
    """Numbers of a list's points, in order."""
    return re.findall(r"(?m)^(\d+)\. ", text)


def test_the_teacher_has_an_answer_to_every_question():
    notes = re.split(r"(?m)^## ", (COURSE / "teachers.md").read_text())[1:]
    sheets = sorted(COURSE.glob("[1-7]_*.md"))
    assert len(notes) == len(sheets) == 7
    for sheet, answers in zip(sheets, notes):
        title, questions = sheet.read_text().split("**Questions.**")
        assert answers.startswith(title.splitlines()[0].removeprefix("# "))
        assert numbers(answers.split("\n", 1)[1]) == numbers(questions) != []


def test_what_is_handed_out_has_no_teachers_notes():
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("the archive that is handed out is made from a git repository, which this is not")
    archive = subprocess.run(
        ["git", "archive", "--worktree-attributes", "HEAD", "assignments"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    names = {Path(name).name for name in tarfile.open(fileobj=io.BytesIO(archive)).getnames()}
    assert "student.py" in names and "teachers.md" not in names


def grade(folder, *arguments):
    """Output of the grader, run in a folder, and its grade.json."""
    command = [sys.executable, COURSE / "grade.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400)
    assert not done.returncode and not done.stderr, done.stderr
    return done.stdout, json.loads((folder / "grade.json").read_text())


def test_the_file_as_handed_out_gets_no_points_and_is_told_what_to_write(tmp_path):
    printed, (result,) = grade(tmp_path)
    assert result["points"] == 0 and result["of"] == 112
    tree = ast.parse((COURSE / "student.py").read_text())
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        assert f"write {function.name}," in printed
    said = [test["message"] for part in result["parts"].values() for test in part["tests"]]
    assert all(message.startswith(("part ", "answer ANSWERS")) for message in said)


def simulated_ratio(KL, D):
    """Mean of exp(mean log ratio) over x drawn from the old step, whose mean moves by another number of stds in each dimension."""
    moved = checks.randn(D)
    moved *= math.sqrt(2 * KL) / moved.norm()
    x, normal = checks.randn(400_000, D, seed=1), torch.distributions.Normal(0, 1)
    return (normal.log_prob(x - moved) - normal.log_prob(x)).mean(1).exp().mean().item()


def simulated_clip(eps, D, D_new):
    """The clip that stops at D_new dimensions the share of ratios that eps stops at D, where each moves by d = 0.01 stds."""
    log_ratio = lambda D, seed: (0.01 * checks.randn(40_000, D, seed=seed) - 0.01**2 / 2).mean(1).abs()
    stopped = (log_ratio(D, 1) > eps).double().mean()
    return log_ratio(D_new, 2).quantile(1 - stopped).item()


def simulated_variety(p, M):
    """Share of pairs of looks that differ, over 1 - 1/M; a look is 0 with probability p, else any of the M."""
    rng = np.random.default_rng(0)
    first, second = np.where(rng.random((2, 400_000)) < p, 0, rng.integers(0, int(M), (2, 400_000)))
    return (first != second).mean() / (1 - 1 / M)


def simulated_best_of_n(n):
    """KL of the best of n draws from the draws themselves, by the log of the densities' quotient in u, a draw's rank."""
    best = torch.rand(400_000, int(n), generator=torch.Generator().manual_seed(0), dtype=torch.float64).amax(1)
    return (math.log(n) + (n - 1) * best.log()).mean().item()


def gradient_quotient(std):
    """Gradient of -(x_next - mean)², averaged over dimensions, over that of the course's log_prob."""
    x, mean, std = checks.randn(1, 6), checks.randn(1, 6, seed=1), torch.full((1, 1), std, dtype=torch.float64)
    squares = checks.gradient(lambda mean: -((x - mean) ** 2).mean(1), mean)
    return (squares / checks.gradient(lambda mean: r.log_prob(x, mean, std), mean)).mean().item()


@pytest.mark.parametrize(
    "name, simulate, variables, tolerance",
    [
        ("mean_ratio", simulated_ratio, dict(KL=2.0, D=8), 0.002),  # seven errors of the mean; exp(-KL/D) is 0.03 away
        ("clip_at_other_size", simulated_clip, dict(eps=1e-3, D=64, D_new=256), 3e-5),
        ("variety_with_favourite", simulated_variety, dict(p=0.6, M=6), 0.006),
        ("best_of_n_kl", simulated_best_of_n, dict(n=8), 0.007),
        ("hidden_weight", gradient_quotient, dict(std=0.3), 1e-12),
    ],
)
def test_an_answer_agrees_with_a_simulation(name, simulate, variables, tolerance):
    assert abs(checks.evaluate(r.ANSWERS[name], variables) - simulate(**variables)) < tolerance


def test_an_assertion_of_the_submission_counts_as_wrong():
    def gains(rewards):
        raise AssertionError

    assert messages(5, gains=gains)[0].startswith("AssertionError in the test")


def test_the_reference_is_graded_in_processes_of_its_own(tmp_path):
    assert grade(tmp_path, "--solution", "--only", "4")[1][0]["points"] == 17


# Wrong answers: part, what replaces the reference's, what the message must say


def on(sigma, x):
    return sigma.view(-1, *[1] * (x.ndim - 1))


def kl(of):
    """path_kl from squares (B, S, D) of the means' differences and std (S,)."""
    return lambda mean, base, std: of(((mean - base) ** 2).flatten(2), std)


def step(mean=lambda mean, std, v, x, dt: mean, std=lambda std, sigma, sigma_next: std):
    """sde_step with another mean or std."""

    def sde_step(v, x, sigma, sigma_next, sigma_max, eta, sde):
        m, s = r.sde_step(v, x, sigma, sigma_next, sigma_max, eta, sde)
        sigma, sigma_next = on(sigma, x), on(sigma_next, x)
        return mean(m, s, v, x, sigma_next - sigma), std(s, sigma, sigma_next)

    return sde_step


def wrong_end(v, x, sigma, sigma_next, sigma_max, eta, sde):
    """sde_step with the estimate of the image in the drift of flow and dance, in place of the noise's."""
    mean, std = r.sde_step(v, x, sigma, sigma_next, sigma_max, eta, sde)
    dt = on(sigma_next - sigma, x)
    return (mean, std) if sde in ("cps", "ddim") else (x + v * dt - std**2 / (2 * on(sigma, x)) * (x - on(sigma, x) * v), std)


def density(z_scale=1.0, constant=1.0, log_scale=1.0, square=0.5, over=lambda t: t.flatten(1).mean(1)):
    """log_prob with parts of it changed."""

    def log_prob(x, mean, std):
        z = (x - mean) / std**z_scale
        return over(-square * z * z - constant * math.log(2 * math.pi) / 2 - log_scale * std.log())

    return log_prob


def own_std(groups, of_all):
    return (groups.std(1, keepdim=True) if of_all is None else of_all) + 1e-4


def advantages(mean=lambda g: g.mean(1, keepdim=True), std=own_std, limit=5, spread=True, sign=1):
    """group_advantages with parts of it changed."""

    def group_advantages(rewards, group_size, global_std=False):
        groups = rewards.view(-1, group_size)
        result = sign * (groups - mean(groups)) / std(groups, groups.std() if global_std else None)
        if spread:
            result = result * (groups.amax(1, keepdim=True) > groups.amin(1, keepdim=True))
        return result.clamp(-limit, limit).flatten()

    return group_advantages


def normalized(over=None, centre=True, limit=5, joint=(1, 2)):
    """gain_advantages with parts of it changed."""

    def gain_advantages(gains, group_size, normalize="joint"):
        groups = gains.view(-1, group_size, gains.shape[1])
        dims = over or {"joint": joint, "step": (1,)}[normalize]
        mean = groups.mean(dims, keepdim=True) if centre else 0
        return ((groups - mean) / (groups.std(dims, keepdim=True) + 1e-4)).clamp(-limit, limit).flatten(0, 1)

    return gain_advantages


def zero_if_all_are_equal(gains, group_size, normalize="joint"):
    """gain_advantages that asks the whole group whether its gains are equal, per step too."""
    groups = gains.view(-1, group_size, gains.shape[1])
    equal = (groups.amax((1, 2)) == groups.amin((1, 2))).repeat_interleave(group_size)[:, None]
    return normalized()(gains, group_size, normalize).masked_fill(equal, 0)


def image_major(rewards, group_size, global_std=False, transposed=False):
    groups = rewards.view(group_size, -1)
    result = ((groups - groups.mean(0)) / (groups.std(0) + 1e-4)).clamp(-5, 5)
    return (result.T if transposed else result).flatten()


def image_major_gains(transposed):
    """gain_advantages of gains regrouped by view(G, -1, S), put back in their order or left transposed."""

    def gain_advantages(gains, group_size, normalize="joint"):
        S = gains.shape[1]
        result = r.gain_advantages(gains.view(group_size, -1, S).transpose(0, 1).reshape(-1, S), group_size, normalize)
        return result if transposed else result.view(-1, group_size, S).transpose(0, 1).flatten(0, 1)

    return gain_advantages


def chunk(reduce):
    return lambda new, old, sizes: torch.stack([reduce(part) for part in (new - old).split(sizes, -1)], -1)


def distance(of):
    """relative_distance with other norms in l1 and l2."""

    def relative_distance(trajectory, distance="l1"):
        if distance == "cosine":
            return r.relative_distance(trajectory, distance)
        x, x_next = trajectory[:, :-1].flatten(2), trajectory[:, 1:].flatten(2)
        return of(x, x_next, lambda t: t.norm({"l1": 1, "l2": 2}[distance], dim=-1))

    return relative_distance


def adaptive(shift=0, halve=lambda size: [size // 2], recurse=True, sign=np.sign, next_order=lambda turns: 1):
    """adaptive_chunks with parts of it changed."""

    def adaptive_chunks(curve, max_chunk=4):
        def split(segment, order):
            if len(segment) <= max_chunk:
                return [len(segment)]
            signs = sign(np.diff(segment, order))
            turns = [k + 1 + shift for k in range(len(signs) - 1) if signs[k] != signs[k + 1]]
            parts = [part for part in np.split(segment, turns or halve(len(segment))) if len(part)]
            return [size for part in parts for size in (split(part, order + next_order(turns)) if recurse else [len(part)])]

        return split(np.asarray(curve, float), 1)

    return adaptive_chunks


def value(first=lambda k: k, last=0, copies=lambda x, m: x.repeat_interleave(m, 0), draws=None):
    """value_of_state with parts of it changed."""

    def value_of_state(x, k, num_steps, transition, reward, continuations):
        many = copies(x, draws or continuations)
        for step in range(first(k), num_steps - last):
            many = transition(many, step)
        return reward(many).view(len(x), -1).mean(1)

    return value_of_state


def sde_step_without_reshape(v, x, sigma, sigma_next, *rest):
    """sde_step as the formulas read, when sigma (B,) meets x (B, 1)."""
    return tuple(t + 0 * sigma for t in r.sde_step(v, x, sigma, sigma_next, *rest))


def stopped(at_zero):
    """stopped_fraction that counts samples of advantage 0 above the clip, or on both sides."""

    def stopped_fraction(ratio, A, clip):
        above, below = ratio > 1 + clip, ratio < 1 - clip
        zero = (A == 0) & ((above | below) if at_zero == "both" else above)
        return ((A > 0) & above | (A < 0) & below | zero).to(A.dtype).mean()

    return stopped_fraction


def clipped(low, high, take=torch.maximum):
    return lambda ratio, A, clip: take(-A * ratio, -A * ratio.clamp(low(clip), high(clip)))


below, above = lambda clip: 1 - clip, lambda clip: 1 + clip

WRONG = [
    (1, dict(posterior_mean=lambda v, x, sigma: x + on(sigma, x) * v), "go against it"),
    (1, dict(posterior_mean=lambda v, x, sigma: x + (1 - on(sigma, x)) * v), "noise at the other end"),
    (1, dict(posterior_mean=lambda v, x, sigma: x - v), "only sigma of the path is left"),
    (1, dict(posterior_mean=lambda v, x, sigma: x.sub_(on(sigma, x) * v)), "in place"),
    (1, dict(sde_step=lambda v, *rest: r.sde_step(-v, *rest)), "wrong sign of dt"),
    (1, dict(sde_step=step(std=lambda std, *_: std**2)), "std of flow looks like the variance"),
    (1, dict(sde_step=step(std=lambda std, s, n: std * (s - n).sqrt())), "without the square root of -dt"),
    (1, dict(sde_step=step(std=lambda std, s, n: std * s / n)), "sigma in place of sigma_next"),
    (1, dict(sde_step=step(mean=lambda m, std, v, x, dt: x + v * dt)), "the ODE's step"),
    (1, dict(sde_step=step(mean=lambda m, std, v, x, dt: x + v * dt)), "full sigma_next of old noise is kept"),
    (1, dict(sde_step=step(mean=lambda m, std, v, x, dt: 2 * (x + v * dt) - m)), "drift has the wrong sign"),
    (1, dict(sde_step=step(mean=lambda m, std, v, x, dt: 2 * m - (x + v * dt))), "factor 1/2 is missing"),
    (1, dict(sde_step=wrong_end), "x0_hat in place of x1_hat in the drift"),
    (1, dict(sde_step=sde_step_without_reshape), "reshape it to (3, 1)"),
    (1, dict(sde_step=lambda v, x, s, n, _, *rest: r.sde_step(v, x, s, n, 1.0, *rest)), "use sigma_max in 1 - s there"),
    (1, dict(sde_step=lambda v, x, *rest: tuple(t.to(x.dtype) for t in r.sde_step(v, x, *rest))), "computes in bfloat16"),
    (1, dict(log_prob=density(over=lambda t: t.flatten(1).sum(1))), "sum over the dimensions: take the mean"),
    (1, dict(log_prob=density(over=torch.mean)), "one number for the whole batch"),
    (1, dict(log_prob=density(z_scale=0.5, log_scale=0.5)), "std was taken for the variance"),
    (1, dict(log_prob=density(log_scale=0)), "log std is missing"),
    (1, dict(log_prob=density(constant=0)), "log(2 pi) / 2 is missing"),
    (1, dict(log_prob=density(square=1)), "factor 1/2 before the square is missing"),
    (1, dict(log_prob=lambda *args: r.log_prob(*args).detach()), "no gradient flows"),
    (1, dict(log_prob=lambda *args: r.log_prob(*args).float().to(torch.float32)), "keep the dtype"),
    (1, dict(log_prob=lambda *args: r.log_prob(*args).float()), "differs by float32 rounding only"),
    (1, dict(log_prob=lambda *args: r.log_prob(*args) + torch.zeros(len(args[0]), dtype=args[0].dtype)), "without device="),
    (1, dict(expected_log_prob="-log(2*pi)/2 - log(std)"), "the density at the mean"),
    (1, dict(expected_log_prob="__import__('os').system('true')"), "cannot be evaluated"),
    (2, dict(group_advantages=advantages(mean=torch.mean)), "the mean is that of all images"),
    (2, dict(group_advantages=advantages(std=lambda g, _: g.std() + 1e-4)), "the std is that of all images"),
    (2, dict(group_advantages=advantages(std=lambda g, _: g.var(1, keepdim=True) + 1e-4)), "variance in place of the std"),
    (2, dict(group_advantages=advantages(std=lambda g, _: g.std(1, keepdim=True, correction=0) + 1e-4)), "divides by n - 1"),
    (2, dict(group_advantages=advantages(mean=lambda g: 0)), "not centred"),
    (2, dict(group_advantages=advantages(std=lambda g, _: 1)), "not divided by the std"),
    (2, dict(group_advantages=image_major), "rows of a group were taken apart"),
    (2, dict(group_advantages=lambda *args: image_major(*args, transposed=True)), "view(G, -1).T?"),
    (2, dict(group_advantages=advantages(sign=-1)), "a better image has a larger advantage"),
    (2, dict(group_advantages=lambda rewards, size, _=False: r.group_advantages(rewards, size)), "the std is still the group's"),
    (2, dict(group_advantages=advantages(std=lambda g, _: g.std(1, keepdim=True), spread=False)), "gives NaN"),
    (2, dict(group_advantages=advantages(spread=False)), "not get exactly 0"),
    (2, dict(group_advantages=advantages(limit=99)), "not clamped"),
    (2, dict(group_advantages=advantages(std=lambda g, all: g.std(1, keepdim=True) if all is None else all)), "1e-4 is not added"),
    (2, dict(policy_gradient_loss=lambda log_p, A: A * log_p), "an optimizer minimizes"),
    (2, dict(policy_gradient_loss=lambda log_p, A: A * log_p), "runs away from the rewarded point"),
    (2, dict(policy_gradient_loss=lambda log_p, A: (-A * log_p).mean()), "give one loss for each"),
    (2, dict(policy_gradient_loss=lambda log_p, A: -log_p + 0 * A), "the advantage is missing"),
    (2, dict(own_mean_factor="G / (G - 1)"), "the inverse"),
    (2, dict(variety_with_favourite="1 - p"), "variety compares two images"),
    (2, dict(variety_with_favourite="(1 - p**2) * (1 - 1/M)"), "divide by that of equally likely looks"),
    (2, dict(variety_with_favourite="p**2"), "variety is what is left"),
    (2, dict(variety_with_favourite="(1 - p**2 - (1-p)**2 / (M-1)) / (1 - 1/M)"), "it is one of all M"),
    (2, dict(variety_with_favourite="2*p*(1-p)"), "two looks only"),
    (3, dict(ratio=lambda new, old: (old - new).exp()), "old over new"),
    (3, dict(ratio=lambda new, old: new - old), "exp is missing"),
    (3, dict(ratio=lambda new, old: new / old), "quotient of the log-probabilities"),
    (3, dict(clipped_loss=clipped(below, lambda clip: math.inf)), "on one side only: ratios above"),
    (3, dict(clipped_loss=clipped(lambda clip: 0, above)), "on one side only: ratios below"),
    (3, dict(clipped_loss=clipped(below, above, torch.minimum)), "the smaller of the two losses"),
    (3, dict(clipped_loss=clipped(below, above, lambda free, clipped: clipped)), "always clipped"),
    (3, dict(clipped_loss=clipped(lambda clip: -clip, lambda clip: clip)), "±clip instead of 1 ± clip"),
    (3, dict(clipped_loss=lambda *args: -r.clipped_loss(*args)), "an optimizer minimizes the loss"),
    (3, dict(clipped_loss=lambda ratio, A, clip: -A * ratio), "never clipped"),
    (3, dict(stopped_fraction=lambda ratio, A, clip: ((ratio - 1).abs() > clip).to(A.dtype).mean()), "still have a gradient"),
    (3, dict(stopped_fraction=stopped("both")), "samples of advantage 0 are counted"),
    (3, dict(stopped_fraction=stopped("above")), "one sample of advantage 0 in two is counted"),
    (3, dict(stopped_fraction=lambda *args: r.stopped_fraction(*(a[args[1] != 0] for a in args[:2]), args[2])), "one of all"),
    (3, dict(log_ratio_std="d"), "varies less"),
    (3, dict(mean_ratio="exp(-KL/D)"), "exp of the mean log ratio"),
    (3, dict(mean_ratio="1 - KL/D + KL/D**2"), "the first terms of its series"),
    (3, dict(log_ratio_mean="0"), "fits the old samples less well"),
    (3, dict(ratio=lambda new, old: new - old), "if another test of ratio fails"),
    (3, dict(mean_ratio="1"), "the ratio of the sum over dimensions"),
    (3, dict(mean_ratio="-KL/D"), "the mean of the log ratio, not of the ratio"),
    (3, dict(mean_ratio="exp(-KL/D + 2*KL/D**2)"), "E[exp] takes half of it"),
    (3, dict(mean_ratio="exp(-KL + KL/D)"), "the sum over dimensions in the mean"),
    (3, dict(mean_ratio="exp(-KL/D - KL/D**2)"), "half the variance with the wrong sign"),
    (3, dict(mean_ratio="exp(KL/D + KL/D**2)"), "samples of the new policy"),
    (3, dict(clip_at_other_size="eps"), "the same clip"),
    (3, dict(clip_at_other_size="eps*D_new/D"), "upside down, without the root"),
    (3, dict(clip_at_other_size="eps*sqrt(D_new/D)"), "upside down: the mean of more"),
    (3, dict(clip_at_other_size="eps*D/D_new"), "for the same KL of the whole step"),
    (3, dict(bug_1_line="loss.backward()"), "bug 1 is not in this line"),
    (3, dict(bug_1_line=bugs.BUGS[1].line), "the line as it should be"),
    (3, dict(bug_2_symptom="b"), "its symptom is not 'b'"),
    (4, dict(fixed_chunks=lambda steps, size: [size] * (steps // size)), "the remainder is dropped"),
    (4, dict(fixed_chunks=lambda steps, size: r.fixed_chunks(steps, size)[::-1]), "the remainder comes last"),
    (4, dict(chunk_log_ratio=chunk(lambda part: part.exp().mean(-1).log())), "log of the mean of the ratios"),
    (4, dict(chunk_log_ratio=chunk(lambda part: part.sum(-1))), "exponent 1 / chunk size is missing"),
    (4, dict(chunk_log_ratio=chunk(lambda part: part.mean(-1).exp())), "the ratio, not its log"),
    (4, dict(relative_distance=distance(lambda x, y, norm: norm(y - x) / norm(y))), "it is x_k's"),
    (4, dict(relative_distance=distance(lambda x, y, norm: norm(y - x))), "not divided by the norm"),
    (4, dict(relative_distance=distance(lambda x, y, norm: (norm(x) - norm(y)).abs() / norm(x))), "difference of the norms"),
    (4, dict(adaptive_chunks=adaptive(shift=1)), "one step late"),
    (4, dict(adaptive_chunks=adaptive(recurse=False)), "longer than max_chunk"),
    (4, dict(adaptive_chunks=adaptive(halve=lambda size: [1])), "not two halves"),
    (4, dict(adaptive_chunks=adaptive(halve=lambda size: [(size + 1) // 2])), "of which the first has 7 // 2 steps"),
    (4, dict(adaptive_chunks=adaptive(sign=lambda d: d > 0)), "cut wherever two signs differ"),
    (4, dict(adaptive_chunks=adaptive(sign=lambda d: d >= 0)), "cut wherever two signs differ"),
    (4, dict(adaptive_chunks=adaptive(next_order=lambda turns: bool(turns))), "also where the segment was cut in half"),
    (4, dict(step_weight="1/S"), "GRPO's weight"),
    (4, dict(step_weight="c/K"), "multiplied by c"),
    (4, dict(product_weight_over_grpo="S/(K*c)"), "the geometric mean's"),
    (4, dict(hidden_weight="std**2"), "the density's factor 1/2 is forgotten"),
    (4, dict(hidden_weight="1/(2*std**2)"), "the Gaussian's gradient over this one"),
    (4, dict(hidden_weight="2*std"), "std in place of the variance"),
    (4, dict(hidden_weight="2"), "the factor without the variance"),
    (5, dict(gains=lambda rewards: -r.gains(rewards)), "a step that raises the reward gains"),
    (5, dict(gains=lambda rewards: r.gains(rewards).roll(1, 1)), "shifted by one step"),
    (5, dict(gains=lambda rewards: rewards[:, 1:] - rewards[:, :1]), "the gain since the start"),
    (5, dict(gains=lambda rewards: rewards[:, -1:] - rewards[:, :-1]), "the gain still to come"),
    (5, dict(gain_advantages=normalized(joint=(1,))), "per step, not jointly"),
    (5, dict(gain_advantages=normalized(joint=(2,))), "images are no longer compared"),
    (5, dict(gain_advantages=normalized(joint=(0, 1, 2))), "those of all images"),
    (5, dict(gain_advantages=image_major_gains(False)), "rows of a group were taken apart: the first"),
    (5, dict(gain_advantages=image_major_gains(True)), "view(G, -1, S) transposed?"),
    (5, dict(gain_advantages=normalized(centre=False)), "gains are not centred"),
    (5, dict(gain_advantages=normalized(over=(1, 2))), "the joint normalization: mean and std are per step here"),
    (5, dict(gain_advantages=normalized(limit=99)), "clamped to ±5"),
    (5, dict(gain_advantages=normalized()), "not give exactly 0"),
    (5, dict(gain_advantages=zero_if_all_are_equal), "per step: a step at which all images gain the same"),
    (5, dict(mean_gain="R_S - R_0"), "there are S steps"),
    (5, dict(mean_gain="0"), "the mean advantage"),
    (6, dict(value_of_state=value(first=lambda k: 0)), "starts again at step 0"),
    (6, dict(value_of_state=value(first=lambda k: k + 1)), "leaves out step"),
    (6, dict(value_of_state=value(last=1)), "leaves out the last step"),
    (6, dict(value_of_state=value(draws=1)), "too noisy"),
    (6, dict(value_of_state=value(copies=lambda x, m: x.repeat(m, 1))), "mixes the states"),
    (6, dict(true_advantages=lambda values: values[:, -1:] - values[:, :-1]), "all that is still to come"),
    (6, dict(variance_shares=lambda a, b: (a**2).mean(0) / (a**2).mean(0).sum()), "squares of noisy estimates"),
    (6, dict(variance_shares=lambda a, b: (a * b / (a * b).sum(1, keepdim=True)).mean(0)), "divide the means"),
    (6, dict(sign_agreement=lambda a, b: (a * b > 0).to(a.dtype).mean()), "counted as disagreement"),
    (6, dict(sign_agreement=lambda a, b: (a * b).sign().sum() / (a * b != 0).sum()), "mean of products"),
    (6, dict(uniform_gradient_variance="3*a**2 + b**2"), "subtract the square of the mean"),
    (6, dict(share_of_step_0="(a**2 + b**2)/(a**2 + b**2 + c**2)"), "is step 1's"),
    (7, dict(bradley_terry=lambda p, o: F.softplus(p - o).mean()), "the loss falls where"),
    (7, dict(bradley_terry=lambda p, o: F.logsigmoid(p - o).mean()), "a loss is minus that"),
    (7, dict(bradley_terry=lambda p, o: F.softplus(o - p).sum()), "the sum over pairs"),
    (7, dict(bradley_terry=lambda p, o: F.softplus(o - p)), "one number for each pair"),
    (7, dict(bradley_terry=lambda p, o: (o - p).mean()), "the logistic function is missing"),
    (7, dict(bradley_terry=lambda p, o: -torch.sigmoid(p - o).mean()), "the logarithm is missing"),
    (7, dict(bradley_terry=lambda p, o: (1 + (o - p).exp()).log().mean()), "exp overflows there"),
    (7, dict(bradley_terry=lambda p, o: F.softplus(o - p).mean().detach()), "no gradient flows"),
    (7, dict(path_kl=kl(lambda squares, std: (squares.mean(2) / (2 * std**2)).sum(1))), "nats are a sum"),
    (7, dict(path_kl=kl(lambda squares, std: (squares.sum(2) / (2 * std**2)).mean(1))), "the sum of its steps'"),
    (7, dict(path_kl=kl(lambda squares, std: (squares.sum(2) / std**2).sum(1))), "not by 2 std²"),
    (7, dict(path_kl=kl(lambda squares, std: (squares.sum(2) / (2 * std)).sum(1))), "the variance is std²"),
    (7, dict(path_kl=kl(lambda squares, std: squares.sum((1, 2)) / 2)), "the std is missing"),
    (7, dict(path_kl=kl(lambda squares, std: squares.sum(2) / (2 * std**2))), "one number for each step"),
    (7, dict(path_kl=kl(lambda squares, std: (squares.sum(2) / (2 * std**2)).sum(1).mean())), "give one number for each"),
    (7, dict(best_of_n=lambda scores, gold: gold.amax(1).mean()), "the judge chooses, not the truth"),
    (7, dict(best_of_n=lambda scores, gold: scores.amax(1).mean()), "the gold is asked for"),
    (7, dict(best_of_n=lambda scores, gold: gold.flatten()[scores.argmax()]), "each caption has its own"),
    (7, dict(best_of_n=lambda scores, gold: gold.gather(1, scores.argmin(1, keepdim=True)).mean()), "least favourites"),
    (7, dict(bradley_terry_gradient="1 / (1 + exp(d))"), "the sign is wrong"),
    (7, dict(bradley_terry_gradient="-1 / (1 + exp(-d))"), "where the judge is sure"),
    (7, dict(best_of_n_kl="log(n)"), "rank is not fixed"),
    (7, dict(best_of_n_kl="log(n) + (n - 1) / n"), "sign of the second term"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:std")  # of one value, which one of the wrong answers takes
@pytest.mark.parametrize("part, replaced, said", WRONG, ids=[f"{part}-{said}" for part, _, said in WRONG])
def test_a_wrong_answer_is_named(part, replaced, said):
    assert any(said in message for message in messages(part, **replaced)), messages(part, **replaced)


def test_a_symptom_may_be_copied_with_its_dot():
    assert not any(messages(3, bug_3_symptom=f"{r.ANSWERS['bug_3_symptom'].upper()}."))


FORMULAS = ["9**9**9**9**9", "(" * 90 + "a", "a.__class__", "[a for a in 'b']", "open('x')", "1e400*0", "a" * 300, "a b"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_never_run_as_code(text):
    with pytest.raises(AssertionError, match="cannot be evaluated|is not the answer"):
        checks.formula(SimpleNamespace(ANSWERS={"x": text}), "x", lambda a: a, a=(1, 2))


# Hostile submissions

HOSTILE = {
    "loop": ("while True: pass", "TimeoutError in line 11, `while True: pass`: it took longer than 2 seconds", 4),
    "stubborn": ("import signal; signal.signal(14, signal.SIG_IGN)\n    while True: pass", "endless loop", 2),
    "exit": ("import os; os._exit(0)", "os._exit", 2),
    "crash": ("import ctypes; ctypes.string_at(0)", "SIGSEGV", 2),
    "flood": ("while True: print('x' * 2**20)", "printed", 0),
    "writes": ("open('{root}/grpo.py', 'a').write('#')", "may write only in its own folder", 4),
}  # what a function does, what is said, the points that the others' tests of its part keep


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_submission_loses_its_own_points_alone(kind, tmp_path):
    attack, said, kept = HOSTILE[kind]
    before = {path: path.read_bytes() for path in [*ROOT.glob("*.py"), *COURSE.rglob("*.py")]}
    good = "def ratio(new, old):\n    return (new - old).exp()\n\ndef gains(rewards):\n    return rewards.diff(dim=1)\n"
    source = f"import torch\nANSWERS = dict(log_ratio_mean='-d**2/2', log_ratio_std='d/sqrt(D)')\n\n{good}\n"
    source += f"def clipped_loss(ratio, advantages, clip):\n    {attack}\n"
    (tmp_path / "submission.py").write_text(source.replace("{root}", str(ROOT)))
    printed, (result,) = grade(tmp_path, "submission.py", "--only", 3, "--only", 5, "--limit", 2)
    assert said in printed and result["parts"]["5"]["points"] == 4
    assert result["parts"]["3"]["points"] == kept
    assert before == {path: path.read_bytes() for path in before}
    assert {path.name for path in tmp_path.iterdir()} == {"submission.py", "grade.json"}


def test_a_folder_of_submissions_becomes_a_table(tmp_path):
    folder = tmp_path / "submissions"
    folder.mkdir()
    (folder / "ada.py").write_text("def gains(rewards):\n    return rewards.diff(dim=1)\n")
    (folder / "bob.py").write_text("this is no Python\n")
    printed, _ = grade(tmp_path, folder, "--only", 5, "--csv", "grades.csv")
    assert "bob.py cannot be imported: SyntaxError in line 1, `this is no Python`" in printed
    assert (tmp_path / "grades.csv").read_text().split() == ["submission,part", "5,points,of", "ada.py,4,4,15", "bob.py,0,0,15"]


@pytest.mark.parametrize("name, owner", [("copy", "Python"), ("sampler", "this project"), ("miniature", "this project")])
@pytest.mark.parametrize("command", [["grade.py"], ["train.py", "2", "--functions"]])
def test_a_submission_named_like_a_module_is_refused(command, name, owner, tmp_path):
    (tmp_path / f"{name}.py").write_text("")
    done = subprocess.run(
        [sys.executable, COURSE / command[0], *command[1:], f"{name}.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not (tmp_path / "grade.json").exists()
    assert f"error: {name}.py has the name of a module of {owner}" in done.stderr


@pytest.mark.parametrize("arguments", [["nowhere.py"], ["--only", "8"], ["--limit", "0"], ["--csv", "no/where.csv"]])
def test_bad_input_is_answered_with_exit_code_2(arguments, tmp_path):
    command = [sys.executable, COURSE / "grade.py", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "error:" in done.stderr and "Traceback" not in done.stderr


# Training and bugs

SMALL = "--iterations 1 --prompts 2 --group-size 4 --steps 5 --eval-images 6 --eval-steps 1 --dtype float32 --device cpu".split()


@pytest.fixture
def main_restored(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.mark.parametrize("part", train.FUNCTIONS)
def test_the_functions_given_are_the_ones_that_train(part, tmp_path, monkeypatch, main_restored):
    monkeypatch.setattr(sampler, "sde_step", sampler.sde_step)
    called = set()

    def spy(name, function):
        return lambda *args, **kwargs: called.add(name) or function(*args, **kwargs)

    bar = json.loads((COURSE / "bars.json").read_text())[str(part)]
    written = train.written(train.load(COURSE / "reference.py"), COURSE / "reference.py", part)
    functions = {name: spy(name, f) for name, f in written.items()}
    train.run_script(bar["script"], functions, [*bar["flags"], *SMALL, "--output-dir", str(tmp_path / "run")])
    assert called == {*functions} - {"fixed_chunks"}  # the default chunks are adaptive
    train.draw(train.reward_curve(tmp_path / "run"), [0.5], tmp_path / "curve.png")


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--reward shapes", "--reward is no remedy of part 7"),
        ("--beta 0.01 --guidance=3", "--guidance is no remedy"),
        ("--iterations 31", "--iterations 31 is not within the budget"),
        ("--iterations=300", "--iterations 300 is not within the budget"),
        (None, 'ANSWERS["remedy"] has to be a string'),
        ("--lr '1e-3", 'ANSWERS["remedy"] has to be a string'),
    ],
)
def test_a_remedy_that_changes_more_than_the_training_is_refused(flags, said, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(f"ANSWERS = dict(remedy={flags!r})")
    with pytest.raises(SystemExit) as error:
        train.remedy(train.load(tmp_path / "mine.py"))
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_a_remedy_is_a_list_of_flags_of_the_script(tmp_path):
    assert train.remedy(train.load(COURSE / "student.py")) == []
    (tmp_path / "mine.py").write_text("ANSWERS = dict(remedy='--lr=1e-3 --iterations 30')")
    assert train.remedy(train.load(tmp_path / "mine.py")) == ["--lr", "1e-3", "--iterations", "30"]
    assert {name.replace("-", "_") for name in train.REMEDY_FLAGS} <= {field.name for field in dataclasses.fields(gcpo.Args)}


def test_the_sheet_of_part_7_says_what_its_bar_is():
    bar = json.loads((COURSE / "bars.json").read_text())["7"]
    sheet = (COURSE / "7_fooled.md").read_text()
    assert f"has to be {bar['bar']:.3f} or more" in sheet and f"{bar['base']:.3f} on the 864 images" in sheet
    assert all(f"`--{name}`" in sheet for name in train.REMEDY_FLAGS) and f"({train.MAX_ITERATIONS} at most)" in sheet


def test_functions_that_are_not_written_are_named(capsys):
    with pytest.raises(SystemExit) as error:
        train.written(train.load(COURSE / "student.py"), COURSE / "student.py", 3)
    assert error.value.code == 2 and "clipped_loss" in capsys.readouterr().err


@pytest.mark.parametrize("number", bugs.BUGS)
def test_every_bug_runs_and_changes_what_is_trained(number, tmp_path, main_restored):
    weights = []
    source = (ROOT / "grpo.py").read_text()
    for name, text in (("grpo", source), ("bug", bugs.apply(bugs.BUGS[number], source))):
        (tmp_path / f"{name}.py").write_text(text)
        flags = ["--iterations", "2", "--no-compile", "--output-dir", str(tmp_path / name)]
        sys.argv = [str(tmp_path / f"{name}.py"), *SMALL, *flags]
        runpy.run_path(str(tmp_path / f"{name}.py"), run_name="__main__")
        weights.append((tmp_path / name / "pytorch_lora_weights.safetensors").read_bytes())
    assert weights[0] != weights[1]


def test_a_bug_whose_line_is_gone_says_so():
    with pytest.raises(ValueError, match="choose another line"):
        bugs.apply(bugs.BUGS[1], "no such line")


def test_the_training_bar_is_graded_in_a_copy(tmp_path):
    for part in ("*.py", "*/*.py", "judges/*.txt", "*/*.json"):
        for path in ROOT.glob(part):
            (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / path.relative_to(ROOT))
    shutil.copytree(COURSE / "tests", tmp_path / "assignments/tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "miniature", tmp_path / "miniature", dirs_exist_ok=True)
    bars = json.loads((COURSE / "bars.json").read_text())
    bars["5"] |= dict(bar=2.0, flags=[*bars["5"]["flags"], *SMALL, "--output-dir", "elsewhere"])
    (tmp_path / "assignments/bars.json").write_text(json.dumps(bars))
    command = [sys.executable, tmp_path / "assignments/grade.py", "--solution", "--train", "--only", "5"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400).stdout
    assert "0/5 Training bar: held-out score of 2.000 or more" in printed and "the held-out score is 0." in printed
    assert not (tmp_path / "run").exists() and not (tmp_path / "elsewhere").exists()
