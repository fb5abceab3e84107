"""The mathematics: closed forms, limits, equalities between the methods, marginals by simulation."""

import math
import shutil
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import gcpo
import grpo
import sampler
import stepwise_grpo

torch.compiler.set_stance("force_eager")
F64 = dict(dtype=torch.float64)
SDES = get_args(sampler.SDE)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **F64)


def sigmas_of(T, shift=3.0):
    u = torch.linspace(1, 0, T + 1, **F64)
    return shift * u / (1 + (shift - 1) * u)


# An exactly known flow: data N(m, s²) in every dimension, noise N(0, 1), x = (1 - sigma) x0 + sigma noise.
M, SD = 0.7, 0.5


def posterior_mean(x, sigma, s=SD):
    return M + (1 - sigma) * s**2 / ((1 - sigma) ** 2 * s**2 + sigma**2) * (x - (1 - sigma) * M)


def exact_velocity(x, sigma, s=SD):
    noise = sigma / ((1 - sigma) ** 2 * s**2 + sigma**2) * (x - (1 - sigma) * M)
    return noise - posterior_mean(x, sigma, s)


# SDE steps


@pytest.mark.parametrize("sde", SDES)
def test_without_noise_every_step_is_the_euler_step(sde):
    v, x, sigmas = randn(3, 4, 5), randn(3, 4, 5, seed=1), sigmas_of(6)
    for k in range(6):
        sigma, sigma_next = sigmas[k].expand(3), sigmas[k + 1].expand(3)
        mean, std = sampler.sde_step(v, x, sigma, sigma_next, sigmas[1].item(), 0.0, sde)
        assert (std == 0).all() and std.shape == (3, 1, 1)
        torch.testing.assert_close(mean, x + v * (sigma_next - sigma).view(3, 1, 1), rtol=0, atol=1e-15)


def test_sde_steps_against_the_papers_formulas():
    x, v, s, n, eta = 0.3, -1.1, 0.6, 0.45, 0.7
    dt, x0, x1 = n - s, x - s * v, x + (1 - s) * v
    a = eta * math.sqrt(s / (1 - s))
    c = n * math.sin(eta * math.pi / 2)
    d = eta * n * math.sqrt(1 - s)
    expected = {
        "flow": (x + (v + a**2 / (2 * s) * (x + (1 - s) * v)) * dt, a * math.sqrt(-dt)),
        "dance": (x + (v + 0.5 * eta**2 * (x - (1 - s) * x0) / s**2) * dt, eta * math.sqrt(-dt)),
        "cps": ((1 - n) * x0 + math.sqrt(n**2 - c**2) * x1, c),
        "ddim": ((1 - n) * x0 + math.sqrt(n**2 - d**2) * x1, d),
    }
    for sde, (mean, std) in expected.items():
        tensors = [torch.tensor(t, **F64) for t in ([[v]], [[x]], [s], [n])]
        got = sampler.sde_step(*tensors, 0.9, eta, sde)
        assert got[0].item() == pytest.approx(mean, abs=1e-12) and got[1].item() == pytest.approx(std, abs=1e-12)


def test_sigma_max_stands_in_at_sigma_one():
    one, n = torch.ones(1, **F64), torch.tensor([0.9], **F64)
    args = (torch.ones(1, 2, **F64), torch.ones(1, 2, **F64), one, n, 0.9, 0.5)
    assert sampler.sde_step(*args, "flow")[1].item() == pytest.approx(0.5 * math.sqrt(1 / 0.1) * math.sqrt(0.1))
    assert sampler.sde_step(*args, "ddim")[1].item() == pytest.approx(0.5 * 0.9 * math.sqrt(0.1))


def test_bfloat16_is_computed_in_float32():
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    mean, std = sampler.sde_step(x, x, torch.tensor([0.5, 0.5]), torch.tensor([0.4, 0.4]), 0.9, 0.5, "flow")
    assert mean.dtype == std.dtype == torch.float32


def test_a_schedule_falls_from_one_to_zero_even_with_one_step(monkeypatch):
    monkeypatch.setattr(sampler.families, "of", lambda pipe: sampler.families.sd3)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.2)
    for steps in (1, 2, 6):
        sigmas = sampler.schedule(SimpleNamespace(scheduler=scheduler), steps)
        assert len(sigmas) == steps + 1 and sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


@pytest.mark.parametrize("sde", ["cps", "ddim"])
def test_the_most_noise_there_can_be_is_still_a_number(sde):
    sigma = torch.linspace(0.01, 0.99, 999)
    mean, _ = sampler.sde_step(torch.ones(999, 2), torch.ones(999, 2), (sigma + 0.01), sigma, 0.9, 1.0, sde)
    assert mean.isfinite().all()


@pytest.mark.parametrize("sde", SDES)
def test_one_number_serves_for_all_rows(sde):
    v, x, sigma, sigma_next = randn(3, 4, 5), randn(3, 4, 5, seed=1), torch.tensor(0.7, **F64), torch.tensor(0.6, **F64)
    mean, std = sampler.sde_step(v, x, sigma, sigma_next, 0.9, 0.7, sde)
    for_rows, std_of_rows = sampler.sde_step(v, x, sigma.expand(3), sigma_next.expand(3), 0.9, 0.7, sde)
    assert torch.equal(mean, for_rows) and torch.equal(std.expand(3, 1, 1), std_of_rows)


def test_an_unknown_sde_is_named():
    with pytest.raises(ValueError, match="flow, dance, cps, ddim"):
        sampler.sde_step(*[torch.ones(1, 1)] * 2, *[torch.ones(1) * 0.5] * 2, 0.9, 0.5, "euler")


def roll_out(sde, T, eta=0.7, n=40_000, s=SD):
    sigmas = sigmas_of(T)
    x, generator = randn(n, 1), torch.Generator().manual_seed(7)
    for k in range(T):
        step = (sigmas[k].expand(n), sigmas[k + 1].expand(n), sigmas[1].item(), eta if k < T - 1 else 0.0, sde)
        mean, std = sampler.sde_step(exact_velocity(x, sigmas[k], s), x, *step)
        x = mean + std * torch.randn(x.shape, generator=generator, **F64)
        yield sigmas[k + 1].item(), x


@pytest.mark.parametrize("sde", ["flow", "dance"])
def test_sde_marginals_approach_the_odes_as_steps_shrink(sde):
    errors = []
    for T in (20, 160):
        *_, (_, x) = roll_out(sde, T, n=20_000)
        errors.append(abs(x.mean().item() - M) + abs(x.std().item() - SD))
    assert errors[1] < 0.012 and errors[1] < errors[0] / 3  # statistical error of 20,000 samples: about 0.006


@pytest.mark.parametrize("sde", ["cps", "ddim"])
@pytest.mark.parametrize("T", [5, 50])
def test_coefficient_preserving_steps_keep_signal_and_noise_levels(sde, T):
    """Where the prediction of x0 is exact, x_k has mean (1 - sigma) x0 and standard deviation sigma at any step size."""
    for sigma, x in roll_out(sde, T, s=0.0):
        assert x.mean().item() == pytest.approx((1 - sigma) * M, abs=0.02)
        assert x.std().item() == pytest.approx(sigma, abs=0.015)


# Log-probability, advantages, loss


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("sde", ["flow", "cps"])  # each takes seconds to compile
def test_the_compiled_kernel_agrees_and_is_compiled_once_for_ragged_batches(sde):
    def step(batch, stance, one_step=False):
        v, x, x_next = (randn(batch, 4, 8, 8, seed=i).float() for i in range(3))
        levels = [torch.tensor(value).expand(() if one_step else batch) for value in (0.7, 0.6, 1.5)]  # sigmas and weight
        v.requires_grad_(not one_step)
        with torch.compiler.set_stance(stance):
            value = grpo.transition_log_prob(v, x, x_next, *levels, sigma_max=0.9, eta=0.7, sde=sde)
            if not one_step:
                value.sum().backward()
        return value.detach(), v.grad

    for batch, stance in ((32, "default"), (17, "fail_on_recompile"), (5, "fail_on_recompile")):
        (a, grad_a), (b, grad_b) = step(batch, stance), step(batch, "force_eager")
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad_a, grad_b, rtol=1e-4, atol=1e-6)
    for batch, stance in ((32, "default"), (17, "fail_on_recompile")):  # a rollout, whose rows are all at one step
        rolled_out = step(batch, stance, one_step=True)[0]
        torch.testing.assert_close(rolled_out, step(batch, "fail_on_recompile")[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("module", [grpo, gcpo, stepwise_grpo])
def test_log_prob_is_the_mean_gaussian_log_density(module):
    x, mean, std = randn(4, 2, 3), randn(4, 2, 3, seed=1), torch.rand(4, 1, 1, **F64) + 0.1
    expected = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x).mean((1, 2))
    torch.testing.assert_close(module.log_prob(x, mean, std), expected)


@pytest.mark.parametrize("module", [grpo, gcpo])
def test_group_advantages_by_hand(module):
    rewards = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0], **F64)
    torch.testing.assert_close(module.group_advantages(rewards, 3), torch.tensor([-1, 0, 1, 0, 0, 0], **F64), rtol=0, atol=2e-4)
    std = rewards.std()
    scaled = torch.tensor([-1 / std, 0, 1 / std, 0, 0, 0], **F64)
    torch.testing.assert_close(module.group_advantages(rewards, 3, global_std=True), scaled, rtol=0, atol=2e-4)
    outlier = torch.zeros(100, **F64)
    outlier[0] = 1.0
    assert module.group_advantages(outlier, 100).max() == 5  # (1 - 0.01) / 0.1 = 9.9, clamped


def test_the_clip_stops_the_gradient_where_the_ratio_has_gone_far_enough():
    for advantage, ratio, flows in [(1, 1.2, False), (1, 0.8, True), (-1, 1.2, True), (-1, 0.8, False), (1, 1.05, True)]:
        r = torch.tensor(ratio, requires_grad=True, **F64)
        loss = grpo.clipped_loss(r, torch.tensor(float(advantage), **F64), 0.1)
        loss.backward()
        assert (r.grad != 0).item() is flows


# GCPO


def loss_and_gradient(chunk_sizes, log_ratio, advantages, clip=0.1):
    """GCPO's loss over all chunks and its gradient to the steps' log-probabilities (B, S)."""
    new = log_ratio.clone().requires_grad_()
    ratio = torch.exp(gcpo.chunk_log_ratio(new, torch.zeros_like(new), chunk_sizes))
    loss = gcpo.clipped_loss(ratio, advantages[:, None].expand_as(ratio), clip).mean()
    loss.backward()
    return loss.detach(), new.grad


def grpo_loss_and_gradient(log_ratio, advantages, clip=0.1):
    new = log_ratio.clone().requires_grad_()
    loss = grpo.clipped_loss(torch.exp(new), advantages[:, None].expand_as(new), clip).mean()
    loss.backward()
    return loss.detach(), new.grad


B, S = 5, 8


def test_chunks_of_one_step_are_grpo():
    log_ratio, advantages = 0.2 * randn(B, S), randn(B, seed=1)
    for got, expected in zip(loss_and_gradient([1] * S, log_ratio, advantages), grpo_loss_and_gradient(log_ratio, advantages)):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_one_chunk_is_the_sequence_level_ratio():
    log_ratio, advantages = 0.2 * randn(B, S), randn(B, seed=1)
    sequence = torch.exp(log_ratio).prod(1) ** (1 / S)
    torch.testing.assert_close(torch.exp(gcpo.chunk_log_ratio(log_ratio, 0 * log_ratio, [S]))[:, 0], sequence)
    assert loss_and_gradient([S], log_ratio, advantages)[0].item() == pytest.approx(
        grpo.clipped_loss(sequence, advantages, 0.1).mean().item()
    )


def test_chunk_ratio_is_the_geometric_mean():
    ratio = torch.tensor([[1.1, 0.9, 1.2, 0.8, 1.0]], **F64)
    expected = torch.tensor([[(1.1 * 0.9) ** 0.5, (1.2 * 0.8 * 1.0) ** (1 / 3)]], **F64)
    torch.testing.assert_close(torch.exp(gcpo.chunk_log_ratio(ratio.log(), torch.zeros(1, 5, **F64), [2, 3])), expected)


@pytest.mark.parametrize("chunk_size", [2, 4, 8])
def test_on_policy_with_equal_chunks_the_gradient_is_grpos(chunk_size):
    advantages = randn(B, seed=1)
    on_policy = torch.zeros(B, S, **F64)
    expected = grpo_loss_and_gradient(on_policy, advantages)[1]
    torch.testing.assert_close(loss_and_gradient([chunk_size] * (S // chunk_size), on_policy, advantages)[1], expected)
    off_policy = 0.2 * randn(B, S)
    assert not torch.allclose(
        loss_and_gradient([chunk_size] * (S // chunk_size), off_policy, advantages)[1],
        grpo_loss_and_gradient(off_policy, advantages)[1],
    )


def test_on_policy_with_unequal_chunks_a_step_weighs_s_over_k_c_times_as_much():
    sizes, advantages, on_policy = [1, 2, 5], randn(B, seed=1), torch.zeros(B, S, **F64)
    factor = torch.tensor([S / (len(sizes) * c) for c in sizes for _ in range(c)], **F64)
    expected = grpo_loss_and_gradient(on_policy, advantages)[1] * factor
    torch.testing.assert_close(loss_and_gradient(sizes, on_policy, advantages)[1], expected)


def test_relative_distance_by_hand():
    trajectory = torch.tensor([[[3.0, -4.0], [3.0, 4.0], [0.0, 4.0]]], **F64)  # (1, S + 1, 2)
    torch.testing.assert_close(gcpo.relative_distance(trajectory), torch.tensor([[8 / 7, 3 / 7]], **F64))
    torch.testing.assert_close(gcpo.relative_distance(trajectory, "l2"), torch.tensor([[8 / 5, 3 / 5]], **F64))
    cosine = torch.tensor([[1 - (9 - 16) / 25, 1 - 16 / 20]], **F64)
    torch.testing.assert_close(gcpo.relative_distance(trajectory, "cosine"), cosine)


def test_fixed_chunks():
    assert gcpo.fixed_chunks(7, 3) == [3, 3, 1] and gcpo.fixed_chunks(8, 4) == [4, 4] and gcpo.fixed_chunks(3, 1) == [1, 1, 1]


@pytest.mark.parametrize(
    "curve, max_chunk, expected",
    [
        ([1, 2, 3, 4], 4, [4]),  # short enough as it is
        ([1, 2, 4, 8, 9, 7, 5, 4], 4, [4, 4]),  # rises over steps 0-3, falls over 4-7
        ([1, 2, 3, 4, 5, 6, 7, 8], 4, [4, 4]),  # always rising: halved
        ([1, 2, 3, 4, 5, 6, 7, 8], 2, [2, 2, 2, 2]),  # straight: second and third differences have one sign too
        ([5, 5, 5, 5, 5, 5], 4, [3, 3]),  # constant: halved
        # Rises over 0-2, falls from 3 on, to the end: [3, 6]. The second differences of 9, 7, 6, 5.5, 4.5, 2.5 are
        # 1, 0.5, -0.5, -1: the fall slows down over two steps and then speeds up.
        ([1, 3, 6, 9, 7, 6, 5.5, 4.5, 2.5], 4, [3, 2, 4]),
        ([2, 1, 2, 1, 2, 1], 1, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_adaptive_chunks_on_hand_worked_curves(curve, max_chunk, expected):
    assert gcpo.adaptive_chunks(curve, max_chunk) == expected


def test_adaptive_chunks_partition_any_curve_whatever_its_scale():
    rng = np.random.default_rng(0)
    for _ in range(300):
        steps, max_chunk = int(rng.integers(1, 40)), int(rng.integers(1, 6))
        curve = rng.random(steps)
        sizes = gcpo.adaptive_chunks(curve, max_chunk)
        assert sum(sizes) == steps and min(sizes) >= 1 and max(sizes) <= max(max_chunk, 1)
        assert gcpo.adaptive_chunks(1000 * curve, max_chunk) == sizes


def draws(plan, curve, fraction, weighted, repeats=4000):
    """Chunks that a trajectory's draws hold, one list for each of many independent draws."""
    rng = np.random.default_rng(0)
    return [gcpo.draw_chunks(plan, curve, fraction, weighted, rng) for _ in range(repeats)]


def test_weighted_chunks_are_drawn_as_often_as_eq_17_says():
    """The mean distances are 2, 6, 1.5; the first chunk drawn is each in this proportion, the second so among the rest."""
    plan, curve, p = [2, 1, 2], np.array([1.0, 3.0, 6.0, 1.0, 2.0]), np.array([2.0, 6.0, 1.5]) / 9.5
    chunks = [(0, 2), (2, 1), (3, 2)]
    one, two = draws(plan, curve, 0.3, True), draws(plan, curve, 0.5, True)
    assert {len(drawn) for drawn in one} == {1} and {len(set(drawn)) for drawn in two} == {2}
    np.testing.assert_allclose([np.mean([c in drawn for drawn in one]) for c in chunks], p, atol=0.025)
    second = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(3) if j != i) for i in range(3)]
    np.testing.assert_allclose([np.mean([c in drawn for drawn in two]) for c in chunks], second, atol=0.025)
    uniform = draws(plan, curve, 0.5, False)
    np.testing.assert_allclose([np.mean([c in drawn for drawn in uniform]) for c in chunks], 2 / 3, atol=0.025)


def test_a_fraction_of_the_chunks_is_drawn_rounded_up_and_all_of_them_by_one():
    for fraction, count in ((0.01, 1), (0.25, 1), (0.26, 2), (0.5, 2), (1.0, 4)):
        assert {len(set(drawn)) for drawn in draws([1, 2, 3, 4], np.ones(10), fraction, False, 20)} == {count}
    assert sorted(draws([1, 2, 3], np.ones(6), 1.0, False, 1)[0]) == [(0, 1), (1, 2), (3, 3)]


def test_chunks_are_batched_whole_and_each_batch_is_filled():
    chunk = lambda b, size: gcpo.Chunk(b, 0, size, 1.0)
    batches = gcpo.batch_chunks([chunk(b, 2) for b in range(65)], 128)
    assert [[c.size for c in batch] for batch in batches] == [[2] * 64, [2]]
    assert [len(batch) for batch in gcpo.batch_chunks([chunk(0, 3), chunk(1, 7), chunk(2, 3), chunk(3, 4)], 7)] == [1, 1, 2]
    assert gcpo.batch_chunks([], 7) == []
    rng = np.random.default_rng(0)
    for _ in range(100):
        chunks = [chunk(b, int(rng.integers(1, 6))) for b in range(rng.integers(1, 60))]
        batches = gcpo.batch_chunks(chunks[::-1], 8)
        assert [c for batch in batches for c in batch] == chunks
        assert all(0 < sum(c.size for c in batch) <= 8 for batch in batches)
        assert all(sum(c.size for c in a) + b[0].size > 8 for a, b in zip(batches, batches[1:]))


def test_batches_are_even():
    assert [len(rows) for rows in sampler.batches(torch.arange(130), 64)] == [44, 43, 43]
    assert [len(rows) for rows in sampler.batches(torch.arange(128), 64)] == [64, 64]
    assert sampler.batches(torch.zeros(0, 2), 64) == ()


# Stepwise-Flow-GRPO


def test_gains_telescope():
    rewards = randn(6, S + 1)
    gains = stepwise_grpo.gains(rewards)
    assert gains.shape == (6, S)
    torch.testing.assert_close(gains.sum(1), rewards[:, -1] - rewards[:, 0])


def test_gain_advantages_by_hand():
    gains = torch.tensor([[1.0, 0.0], [3.0, 0.0], [7.0, 7.0], [7.0, 7.0]], **F64)  # two groups of two images, two steps
    mean, std = 1.0, math.sqrt(2.0)  # of 1, 0, 3, 0
    joint = torch.tensor([[(1 - mean) / std, -mean / std], [(3 - mean) / std, -mean / std], [0, 0], [0, 0]], **F64)
    torch.testing.assert_close(stepwise_grpo.gain_advantages(gains, 2), joint, rtol=0, atol=2e-4)
    r = 1 / math.sqrt(2)
    step = torch.tensor([[-r, 0], [r, 0], [0, 0], [0, 0]], **F64)
    torch.testing.assert_close(stepwise_grpo.gain_advantages(gains, 2, "step"), step, rtol=0, atol=2e-4)


def test_a_step_without_gain_gets_no_gradient_under_step_normalization():
    gains = randn(4, 3)
    gains[:, 1] = 0
    log_prob = torch.zeros(4, 3, requires_grad=True, **F64)
    advantages = stepwise_grpo.gain_advantages(gains, 4, "step")
    stepwise_grpo.clipped_loss(torch.exp(log_prob), advantages, 0.1).sum().backward()
    assert (log_prob.grad[:, 1] == 0).all() and (log_prob.grad[:, [0, 2]] != 0).all()


@pytest.mark.parametrize("module", [grpo, gcpo, stepwise_grpo])
def test_clipped_loss_by_hand(module):
    ratio, advantages = torch.tensor([1.2, 0.8, 1.2, 0.8, 1.05], **F64), torch.tensor([1.0, 1, -1, -1, 1], **F64)
    expected = torch.tensor([-1.1, -0.8, 1.2, 0.9, -1.05], **F64)
    torch.testing.assert_close(module.clipped_loss(ratio, advantages, 0.1), expected)


ADVANTAGES = {
    "grpo": grpo.group_advantages,
    "gcpo": gcpo.group_advantages,
    "joint": lambda rewards, group_size: stepwise_grpo.gain_advantages(rewards[:, None], group_size)[:, 0],
    "step": lambda rewards, group_size: stepwise_grpo.gain_advantages(rewards[:, None], group_size, "step")[:, 0],
}


@pytest.mark.parametrize("advantages", ADVANTAGES.values(), ids=ADVANTAGES)
def test_advantages_are_clamped_on_both_sides_damped_and_zero_without_spread(advantages):
    outlier = torch.zeros(100, **F64)
    outlier[0] = 1
    assert advantages(outlier, 100).max() == 5 and advantages(-outlier, 100).min() == -5
    assert (advantages(torch.full((14,), 0.1), 7) == 0).all()  # in float32 the mean of seven 0.1s is not 0.1
    assert advantages(torch.tensor([0, 2e-4], **F64), 2)[1].item() == pytest.approx(1 / (math.sqrt(2) + 1))  # std √2e-4, + 1e-4


@pytest.mark.parametrize("module", [grpo, gcpo, stepwise_grpo])
@pytest.mark.parametrize("sde", SDES)
def test_the_transitions_log_prob_is_that_of_its_sde_step_times_its_weight(module, sde):
    v, x, x_next = (randn(3, 4, 5, seed=i) for i in range(3))
    levels, kernel = (torch.full((3,), 0.7, **F64), torch.full((3,), 0.6, **F64)), dict(sigma_max=0.9, eta=0.5, sde=sde)
    weight = torch.tensor([1.0, 0.5, 2.0], **F64)
    expected = grpo.log_prob(x_next, *sampler.sde_step(v, x, *levels, **kernel))
    torch.testing.assert_close(module.transition_log_prob(v, x, x_next, *levels, weight, **kernel), weight * expected)


# Weights of steps


def test_step_weights_by_hand():
    std, dt = torch.tensor([0.4, 0.2, 0.1], **F64), torch.tensor([-0.1, -0.2, -0.4], **F64)
    expected = {"none": [1, 1, 1], "std": [0.4, 0.2, 0.1], "std2": [0.16, 0.04, 0.01], "guard": [4, 1, 0.25]}
    assert set(expected) == set(get_args(sampler.STEP_WEIGHTS))
    for kind, proportions in expected.items():
        weights, proportions = sampler.step_weights(kind, std, dt), torch.tensor(proportions, **F64)
        assert weights.mean().item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(weights, proportions / proportions.mean())


@pytest.mark.parametrize("old", ["on-policy", "off-policy"])
def test_std2_is_the_log_prob_of_public_cps_code(old):
    """log p = -(x_next - mean)², a mean over dimensions, of Flow-GRPO's cps: ours is a factor times it, the same at every step."""
    T, eta = 6, 0.8
    sigmas, steps = sigmas_of(T), T - 1
    kernel = dict(sigma_max=sigmas[1].item(), eta=eta, sde="cps")
    sigma, sigma_next = sigmas[:steps], sigmas[1 : steps + 1]
    _, std = sampler.sde_step(sigma, sigma, sigma, sigma_next, **kernel)
    weights = sampler.step_weights("std2", std, sigma_next - sigma)
    x, z, v_old = (randn(steps, 4, 3, seed=i) for i in range(3))  # a trajectory's steps, one to a row
    mean_old, std_of_rows = sampler.sde_step(v_old, x, sigma, sigma_next, **kernel)
    x_next = mean_old + std_of_rows * z
    v = (v_old + (0 if old == "on-policy" else 0.05 * randn(steps, 4, 3, seed=3))).requires_grad_()

    def gradient(log_prob, log_prob_old):
        loss = grpo.clipped_loss(torch.exp(log_prob - log_prob_old), randn(steps, seed=4), 0.002).sum()
        return *torch.autograd.grad(loss, v, retain_graph=True), (log_prob - log_prob_old).detach()

    ours = [grpo.transition_log_prob(u, x, x_next, sigma, sigma_next, weights, **kernel) for u in (v, v_old)]
    factor = 1 / (2 * (std**2).mean())
    public = [-((x_next - sampler.sde_step(u, x, sigma, sigma_next, **kernel)[0]) ** 2).flatten(1).mean(1) for u in (v, v_old)]
    (grad, log_ratio), (expected, public_log_ratio) = gradient(*ours), gradient(*(factor * lp for lp in public))
    assert (grad - expected).abs().max() <= 1e-9 and (log_ratio - public_log_ratio).abs().max() <= 1e-9 < grad.abs().max()
    if old == "off-policy":
        clipped = (grad == 0).all((1, 2))
        assert log_ratio.abs().max() > 0.002 and clipped.any() and not clipped.all()  # or the clip would not have been compared


# Estimates of the final image


def estimates(monkeypatch, substeps, T=10):
    """(estimates of one trajectory's states (T, 2, 3, 3), states, velocities, sigmas)"""
    sigmas, x = sigmas_of(T), randn(T, 2, 3, 3)
    monkeypatch.setattr(sampler, "velocity", lambda pipe, x, sigma, text, args: exact_velocity(x, sigma.view(-1, 1, 1, 1)))
    v = exact_velocity(x, sigmas[:T].view(-1, 1, 1, 1))
    made = [stepwise_grpo.estimate_x0(None, x[k, None], v[k, None], k, sigmas, None, substeps, None) for k in range(T)]
    return torch.cat(made), x, v, sigmas


def test_the_one_step_estimate_is_the_posterior_mean(monkeypatch):
    got, x, _, sigmas = estimates(monkeypatch, 1)
    torch.testing.assert_close(got, posterior_mean(x, sigmas[:-1].view(-1, 1, 1, 1)))


def test_more_substeps_approach_the_odes_end_and_the_last_state_takes_one(monkeypatch):
    # The ODE keeps (x - (1 - sigma) m) / sqrt((1 - sigma)² s² + sigma²) constant.
    got, x, v, sigmas = estimates(monkeypatch, 100, T=100)
    level = sigmas[:-1].view(-1, 1, 1, 1)
    end = M + SD * (x - (1 - level) * M) / ((1 - level) ** 2 * SD**2 + level**2).sqrt()
    torch.testing.assert_close(got[0], end[0], rtol=0, atol=0.05)
    torch.testing.assert_close(got[-1], x[-1] - sigmas[-2] * v[-1])


@pytest.mark.parametrize("substeps", [2, 3, 5])
def test_substeps_are_euler_steps_of_equal_size(monkeypatch, substeps):
    got, x, v, sigmas = estimates(monkeypatch, substeps, T=7)
    for k in range(7):
        grid, z = torch.linspace(sigmas[k], 0, min(substeps, 7 - k) + 1, **F64), x[k]
        for sigma, sigma_next in zip(grid, grid[1:]):
            z = z + (sigma_next - sigma) * exact_velocity(z, sigma)
        torch.testing.assert_close(got[k], z)
