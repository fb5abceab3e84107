"""The measurement of credit on a flow that is known exactly, where it must find the truth and what was planted; then end to end."""

import contextlib
import csv
import json
import math
import runpy
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import t as student
from scipy.stats import ttest_1samp
from test_math import F64, exact_velocity, sigmas_of

import families
import sampler
import stepwise_grpo
from experiments import compare, credit, credit_pictures, estimates

T, ETA, SDE, D = 6, 0.3, "cps", 3  # shares of 0.14 to 0.25
S, SIGMAS = T - 1, sigmas_of(T)
CENTRE = 0.3


class Flow:
    """Every transition of the Gaussian flow is x -> slope x + shift + std z, so x_T has mean a_k x_k + b_k and variance var_k."""

    def __init__(self, quadratic):
        self.quadratic = quadratic
        self.slope, self.shift, self.std = torch.zeros(T, **F64), torch.zeros(T, **F64), torch.zeros(T, **F64)
        self.a, self.b, self.var = torch.ones(T + 1, **F64), torch.zeros(T + 1, **F64), torch.zeros(T + 1, **F64)
        for k in reversed(range(T)):
            x, step = torch.tensor([[0.0], [1.0]], **F64), (SIGMAS[k].expand(2), SIGMAS[k + 1].expand(2), SIGMAS[1].item())
            mean, std = sampler.sde_step(exact_velocity(x, SIGMAS[k]), x, *step, ETA if k < S else 0.0, SDE)
            self.slope[k], self.shift[k], self.std[k] = mean[1, 0] - mean[0, 0], mean[0, 0], std[0, 0]
            self.a[k], self.b[k] = self.a[k + 1] * self.slope[k], self.a[k + 1] * self.shift[k] + self.b[k + 1]
            self.var[k] = self.var[k + 1] + (self.a[k + 1] * self.std[k]) ** 2
        self.world = estimates.World(lambda x, sigma, _: exact_velocity(x, sigma[0]), lambda x, _: self.reward(x), SIGMAS, ETA, SDE)

    def reward(self, x):
        return -((x - CENTRE) ** 2).sum(-1) if self.quadratic else x.sum(-1)

    def value(self, states):
        """V (B, S + 1) of states (B, S + 1, D)."""
        end = self.a[:-1, None] * states + self.b[:-1, None]
        return self.reward(end) - (D * self.var[:-1] if self.quadratic else 0)

    def shares(self):
        noise = (self.a[1:T] * self.std[:S]) ** 2  # what step k adds to the variance of x_T
        if not self.quadratic:
            return noise / noise.sum()
        distance = D * (self.a[0] ** 2 + (self.b[0] - CENTRE) ** 2) + D * (noise.cumsum(0) - noise)  # E|E[x_T | x_k] - centre|²
        second = 4 * noise * distance + 2 * D * noise**2
        return second / second.sum()

    def draw(self, groups, group_size, seed, continuations=4):
        """Trajectories, rewards and values by parts of groups of images from the same x_0."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(groups, D, generator=generator, **F64).repeat_interleave(group_size, 0)
        prompt = torch.zeros(len(x), dtype=torch.long)
        states, _, end = estimates.roll_out(self.world, x, 0, prompt, generator)
        rewards = self.reward(end)
        values, covariance = estimates.values(self.world, states, rewards, prompt, group_size, continuations, generator, 4096)
        return states, rewards, values


G, GROUPS, SEEDS = 8, 80, 20


@pytest.fixture(scope="module", params=["linear", "quadratic"])
def seeds(request):
    """A flow, and the trajectories, rewards and values of 20 independent measurements of it."""
    flow = Flow(request.param == "quadratic")
    return flow, [flow.draw(GROUPS, G, seed) for seed in range(SEEDS)]


def centred(credit):
    return estimates.centred(credit, G)


def centred_parts(rewards, parts):
    return centred(rewards[:, None].expand(len(parts), -1, S)), centred(parts.diff(dim=-1))


def assert_covered(measured, truth, units=GROUPS):
    """The truth lies within the 95 % interval of at least 17 of the 20 (value, error), in each of their entries."""
    assert len(measured) == SEEDS
    width = student.ppf(0.975, units - 1)
    hits = sum(((value - truth).abs() <= width * error).int() for value, error in measured)
    assert (hits >= 17).all(), hits


# Values, shares, correlations


def test_values_and_true_advantages_are_within_their_errors(seeds):
    """Of V and delta: the mean error, and the mean squared error less the variance that the parts state."""
    flow, runs = seeds
    for difference in (lambda v: v[..., :S], lambda v: v.diff(dim=-1)):
        measured = []
        for states, _, parts in runs:
            error, noise = difference(parts) - difference(flow.value(states)), difference(parts).var(0) / len(parts)
            both = torch.stack([error.mean(0), error.mean(0) ** 2 - noise]).unflatten(1, (GROUPS, G)).mean((2, 3))
            measured.append(estimates.jackknife(lambda kept, both=both: both[:, kept].mean(1), GROUPS))
        assert_covered(measured, torch.zeros(2, **F64))


def test_shares_are_within_their_errors_and_add_up(seeds):
    flow, runs = seeds
    measured = [estimates.credit_statistics(*centred_parts(rewards, parts), G) for _, rewards, parts in runs]
    truth = torch.cat([flow.shares(), torch.ones(1, **F64)])  # the last column is their sum
    assert_covered([(value[0], error[0]) for value, error in measured], truth)
    torch.testing.assert_close(torch.stack([value[0] for value, _ in measured]).mean(0), truth, rtol=0, atol=0.04)


def test_advantages_add_up_on_every_trajectory(seeds):
    _, runs = seeds
    _, rewards, parts = runs[0]
    torch.testing.assert_close(parts.diff(dim=-1).sum(-1), rewards - parts[..., 0])


@pytest.mark.parametrize("plan", [[1] * S, [2, 2, 1], [1, 4], [S]])
def test_the_reward_correlates_with_the_root_of_the_share(seeds, plan):
    """At each chunk with the root of its share, over all K together with 1 / sqrt(K): in any model, equal chunks or not."""
    flow, runs = seeds
    R, delta = (torch.cat(parts, 1) for parts in zip(*(centred_parts(rewards, parts) for _, rewards, parts in runs)))
    plans = [plan] * R.shape[1]
    value, error = estimates.credit_statistics(estimates.by_chunk(R, plans, mean=True), estimates.by_chunk(delta, plans), G)
    shares = torch.stack([part.sum() for part in flow.shares().split(plan)])
    truth = torch.cat([shares.sqrt(), torch.tensor([1 / math.sqrt(len(plan))], **F64)])
    torch.testing.assert_close(value[1], truth, rtol=0, atol=0.05)
    assert ((value[2] - 1).abs() < 4 * error[2] + 1e-9).all() and error[2].max() < 0.12  # slope
    if not flow.quadratic:  # Gaussian
        torch.testing.assert_close(value[3, :-1], torch.arccos(truth[:-1].clamp(max=1)) / math.pi, rtol=0, atol=0.015)


def test_advantages_of_different_steps_are_uncorrelated_and_the_test_finds_where_they_are_not(seeds):
    """Of 20 measurements at most four have p < 0.05, all together are no further from 0 than chance; credit that leaks is found."""
    _, runs = seeds
    measured = [centred_parts(rewards, parts)[1] for _, rewards, parts in runs]
    rows = [estimates.pairwise_covariances(delta, G) for delta in measured]
    assert rows[0].shape == (GROUPS, S * (S - 1) // 2)
    assert sum(estimates.wald_test(r) < 0.05 for r in rows) <= 4 and estimates.wald_test(torch.cat(rows)) > 0.01
    leaking = [estimates.pairwise_covariances(delta + 0.1 * delta.roll(1, -1), G) for delta in measured]
    assert estimates.wald_test(torch.cat(leaking)) < 1e-6
    assert math.isnan(estimates.wald_test(rows[0][: S * (S - 1) // 2]))  # as many groups as pairs


def test_walds_test_is_hotellings():
    """For one mean it is the t test, and no change of coordinates moves it."""
    rows = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), **F64) + 0.3
    assert estimates.wald_test(rows[:, :1]) == pytest.approx(ttest_1samp(rows[:, 0].numpy(), 0).pvalue)
    turned = rows @ torch.tensor([[1.0, 2, 0], [0, 1, 5], [0, 0, 0.1]], **F64)
    assert estimates.wald_test(turned) == pytest.approx(estimates.wald_test(rows))


def test_planted_wrong_credit_is_found(seeds):
    """Signs flipped at one step, and every step given what the step before it earned."""
    flow, runs = seeds
    states, rewards, parts = runs[0]
    exact, (_, delta) = flow.value(states).diff(dim=-1), centred_parts(rewards, parts)

    def statistics(planted):
        value, _ = estimates.credit_statistics(centred(planted).expand_as(delta), delta, G)
        return dict(zip(estimates.CREDIT, value))

    flipped = exact * torch.tensor([1, 1, -1, 1, 1])
    right, wrong, late = statistics(exact), statistics(flipped), statistics(exact.roll(1, -1))
    others = [0, 1, 3, 4]
    assert (right["slope"] > 0.8).all() and (right["wrong signs"] < 0.2).all()
    assert wrong["slope"][2] < -0.8 and wrong["wrong signs"][2] > 0.8
    assert torch.equal(wrong["slope"][others], right["slope"][others]) and wrong["correlation"][-1] < right["correlation"][-1] - 0.2
    assert late["correlation"][-1].abs() < 0.1 and late["wrong signs"][-1] > 0.45


# Lambda


def test_lambda_gains_go_from_the_gain_to_what_is_still_to_come():
    rewards = torch.randn(7, S + 1, generator=torch.Generator().manual_seed(0), **F64)
    gains = stepwise_grpo.gains(rewards)
    torch.testing.assert_close(credit.lambda_gains(gains, 0.0), gains, rtol=0, atol=0)
    torch.testing.assert_close(credit.lambda_gains(gains, 1.0), rewards[:, -1:] - rewards[:, :-1])
    half = sum(0.5**j * gains[:, 1 + j] for j in range(S - 1))
    torch.testing.assert_close(credit.lambda_gains(gains, 0.5)[:, 1], half)


def test_iteration_advantages_by_hand():
    gains = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 2.0], [5.0, 4.0]], **F64)
    by_step = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]], **F64)
    torch.testing.assert_close(credit.iteration_advantages(gains, 2), by_step / (math.sqrt(4 / 7) + 1e-4))
    torch.testing.assert_close(credit.iteration_advantages(gains, 2, std="group"), by_step / (math.sqrt(2 / 3) + 1e-4))
    jointly = torch.tensor([[0.0, -1.0], [2.0, -1.0], [1.0, -2.0], [1.0, 0.0]], **F64)
    torch.testing.assert_close(credit.iteration_advantages(gains, 2, "joint"), jointly / (math.sqrt(12 / 7) + 1e-4))
    own = stepwise_grpo.gain_advantages(gains, 2)
    torch.testing.assert_close(credit.iteration_advantages(gains, 2, "joint", "group"), own)


def score_gradients(flow, states):
    """grad log p_k (B, S, S · D) to a shift of every transition's mean."""
    z = (states[:, 1:] - flow.slope[:S, None] * states[:, :-1] - flow.shift[:S, None]) / flow.std[:S, None]
    return torch.einsum("bkd,kj->bkjd", z / flow.std[:S, None], torch.eye(S, **F64)).flatten(2)


def policy_gradient(flow):
    """dE[R] to a shift of every transition's mean, (S · D)."""
    slope = -2 * (flow.b[0] - CENTRE) if flow.quadratic else torch.ones((), **F64)  # of E[R] in each mean of x_T
    return (flow.a[1:T, None] * slope).expand(S, D).flatten()


@pytest.mark.parametrize("quadratic", [False, True])
def test_lambda_one_is_unbiased_whatever_the_states_are_judged_by(quadratic):
    """R_k is nonsense here: centred R - R_k gives (1 - 1/G) of the policy gradient all the same, and the gain does not."""
    flow, group = Flow(quadratic), 4
    states, rewards, _ = flow.draw(10_000, group, 0, continuations=2)
    nonsense = 2 * torch.sin(3 * states).sum(-1) + states[..., 0] ** 2
    gains = stepwise_grpo.gains(torch.cat([nonsense[:, :-1], rewards[:, None]], 1))
    scores, truth = score_gradients(flow, states), (1 - 1 / group) * policy_gradient(flow)

    def off(lam):
        groups = credit.lambda_gains(gains, lam).unflatten(0, (-1, group))
        per_group = torch.einsum("pgk,pgkj->pj", groups - groups.mean(1, keepdim=True), scores.unflatten(0, (-1, group))) / group
        return ((per_group.mean(0) - truth) / (per_group.std(0) / math.sqrt(len(per_group)))).abs().max()

    assert off(1.0) < 4 and off(0.0) > 10


@pytest.fixture(scope="module")
def many():
    """Trajectories, rewards and grad log p_k to the mean of each step (B, S, D) of 3,000 groups of four."""
    flow = Flow(True)
    states, rewards, _ = flow.draw(3_000, 4, 0, continuations=2)
    return flow, states, rewards, torch.einsum("bkkd->bkd", score_gradients(flow, states).unflatten(2, (S, D)))


@pytest.mark.parametrize("kind", ["weights", "own plans", "other's plans", "joint", "noise put back"])
def test_what_is_known_of_a_method_is_its_expected_gradient(kind, many):
    """E[what its loss weights grad log p with] is E[rest grad log p] + known t, t the policy gradient, with nonsense for R_k."""
    group, (flow, states, rewards, scores) = 4, many
    R = estimates.centred(rewards[:, None].expand(-1, S), group)
    weights, long = torch.tensor([2.0, 0.2, 1.0, 1.5, 0.3], **F64), rewards > rewards.mean()
    plans = [[4, 1] if more else [1, 2, 2] for more in (long.roll(group) if kind == "other's plans" else long).tolist()]
    nonsense = 0.3 * torch.sin(3 * states[:, :-1]).sum(-1) + 0.3 * states[:, :-1, 0]
    gains = stepwise_grpo.gains(torch.cat([nonsense, rewards[:, None]], 1))
    later, joint = estimates.centred(credit.lambda_gains(gains, 1.0), group), stepwise_grpo.gain_advantages(gains, group)
    method = {
        "weights": lambda: credit.method(R, R, group, step_weights=weights),
        "own plans": lambda: credit.method(R, R, group, plans, weights),
        "other's plans": lambda: credit.method(R, R, group, plans, weights, independent=True),
        "joint": lambda: credit.method(joint, later, group, step_weights=weights),
        "noise put back": lambda: credit.method(joint, later, group),
    }[kind]()
    assert method.rest.any() == (kind in ("own plans", "joint", "noise put back")) and not method.unbiased()
    if kind == "noise put back":
        noise = credit.put_back(rewards, gains, joint, group)
        method, g = method._replace(credit=method.credit + noise), estimates.centred(gains, group)
        noisy = g + noise * (g * g).sum() / (joint * g).sum()
        torch.testing.assert_close(noisy.var(0) / R.var(0), (g.var(0) / R.var(0)).clamp(min=1), rtol=0.05, atol=0)
        assert noise.any()
    off = S * method.loss_weights(torch.zeros(len(R), S, **F64), 1.0)[0] - method.rest[0]
    each = (off[..., None] * scores).unflatten(0, (-1, group)).mean(1)
    wrong = (each.mean(0) - method.known[:, None] * policy_gradient(flow).view(S, D)) / (each.std(0) / math.sqrt(len(each)))
    assert wrong.abs().max() < 4, wrong


# Gradients


def methods_of(flow, states, rewards, parts):
    """Gradients of each group by halves (2, 9, S · D): of GRPO, of credit a step late, of credit with a flipped step and of the
    true advantage; again, as differences from nothing known; and of what the policy gradient is known to be."""
    delta = centred(parts.unflatten(0, (2, -1)).mean(1).diff(dim=-1))
    R = centred(rewards[:, None].expand(2, -1, S))
    flipped = delta.clone()
    flipped[..., S - 1] *= -1
    weights = torch.stack([R, delta.roll(1, -1), flipped, delta], 1).unflatten(2, (-1, G))
    gradients = torch.einsum("hmpgk,pgkj->phmj", weights, score_gradients(flow, states).unflatten(0, (-1, G)))
    return torch.cat([gradients, gradients, gradients[:, :, -1:].mean(1, keepdim=True).expand(-1, 2, -1, -1)], 2)


def test_gradient_statistics_against_the_closed_form(seeds):
    """Signal and cosine of the expectation, and what is planted: a flipped step, and credit that comes a step too late."""
    flow, runs = seeds
    truth, measured = policy_gradient(flow), []
    for states, rewards, parts in runs:
        products = estimates.inner_products(methods_of(flow, states, rewards, parts), GROUPS)
        value, error = estimates.gradient_statistics(products, 4, G, 64)
        measured.append((dict(zip(estimates.GRADIENT, value)), dict(zip(estimates.GRADIENT, error))))

    def entries(quantity, methods):
        return [(value[quantity][methods], error[quantity][methods]) for value, error in measured]

    # centred credit is scaled by sqrt(G / (G - 1)), its mean by 1 - 1 / G
    assert_covered(entries("signal", [0, 2, 3]), (truth @ truth) * G**2 * (1 - 1 / G), 24)
    cosine = 1 - 2 * (truth[-D:] @ truth[-D:]) / (truth @ truth)
    assert_covered(entries("cosine of expectation", [0, 2]), torch.stack([cosine / cosine, cosine]), 24)
    assert_covered(entries("expected cosine", [1]), torch.zeros(1, **F64), 24)
    assert all(value["expected cosine"][2] < value["expected cosine"][3] - 0.1 for value, _ in measured)


def test_the_expected_cosine_and_the_equivalent_images_are_what_averages_show(seeds):
    """Averages of many groups are compared with the policy gradient itself; to know a method unbiased moves nothing."""
    flow, _ = seeds
    states, rewards, _ = flow.draw(6_000, G, 100, continuations=2)
    gradients, truth = methods_of(flow, states, rewards, flow.value(states).expand(2, -1, -1)), policy_gradient(flow)
    products = estimates.inner_products(gradients, 6_000)
    value, error = (dict(zip(estimates.GRADIENT, part)) for part in estimates.gradient_statistics(products, 4, G, 32))

    def shown(method, images):
        groups = gradients[: 6_000 * G // images * images // G, 0, method]
        return torch.cosine_similarity(groups.unflatten(0, (-1, images // G)).mean(1), truth, dim=-1).mean().item()

    for method in (0, 2, 3):
        assert value["expected cosine"][method].item() == pytest.approx(shown(method, 32), abs=0.03)
    images = value["log equivalent images"].exp()
    assert images[0].item() == pytest.approx(32) and images[2] < 16
    assert images[3] > 64 and shown(0, round(images[3].item() / G) * G) == pytest.approx(shown(3, 32), abs=0.03)

    gain = value["predicted gain"]
    assert gain[0] == 1 and all(gain[m] == pytest.approx(shown(m, 32) / shown(0, 32), abs=0.1) for m in (2, 3))

    gradients[:, :, [2, 6]] *= 3  # its scale changes neither cosines nor noise over signal
    scaled, _ = estimates.gradient_statistics(estimates.inner_products(gradients, 6_000), 4, G, 32)
    torch.testing.assert_close(scaled[2:], torch.stack(list(value.values()))[2:])

    gradients[:, :, [4, 7]] = gradients[:, :, [8]]  # GRPO and the true advantage are known to be unbiased
    known, known_error = estimates.gradient_statistics(estimates.inner_products(gradients, 6_000), 4, G, 32)
    torch.testing.assert_close(known[3, [0, 3]], torch.ones(2, **F64))
    assert known_error[3, [0, 3]].max() < 1e-9 and known[2, 3] == pytest.approx(value["relative noise"][3].item(), rel=0.1)
    assert (known[-1, 3] - value["log equivalent images"][3]).abs() < 3 * error["log equivalent images"][3]


def test_the_covariance_of_continuations_is_the_slope_of_the_value(seeds):
    """Cov(R, x_{k+1} | x_k) / std² is the gradient of E[V(x_{k+1})] to the mean of x_{k+1}, which true credit climbs."""
    flow, runs = seeds
    states, rewards, _ = runs[0]
    prompt, generator = torch.zeros(len(states), dtype=torch.long), torch.Generator().manual_seed(9)
    _, covariance = estimates.values(flow.world, states, rewards, prompt, G, 8, generator, 4096)
    end = flow.a[:S, None] * states[:, :S] + flow.b[:S, None]  # E[x_T | x_k]
    slope = flow.a[1:T, None] * (-2 * (end - CENTRE) if flow.quadratic else torch.ones_like(end))
    off = (covariance / flow.std[:S, None] ** 2 - slope).unflatten(0, (GROUPS, G)).mean((1, 3))
    assert (off.mean(0).abs() < 4 * off.std(0) / math.sqrt(GROUPS)).all()


def test_shares_of_noise_are_those_of_the_parts():
    """Independent parts of noise 1, 4 and 5 around a common signal, which is no noise; the shares add up to 1 exactly."""
    parts = torch.randn(3_000, 3, 20, generator=torch.Generator().manual_seed(0), **F64)
    parts = parts * torch.tensor([1.0, 4, 5], **F64).sqrt()[:, None] + 3
    rows = torch.cat([parts.sum(1, keepdim=True), parts], 1)[:, None].expand(-1, 2, -1, -1)
    share, error = estimates.noise_shares(estimates.inner_products(rows, len(rows)), 0, range(1, 4))
    torch.testing.assert_close(share, torch.tensor([0.1, 0.4, 0.5], **F64), rtol=0, atol=0.01)
    assert share.sum() == pytest.approx(1) and 0 < error.max() < 0.01


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("rows", [0, 5])
def test_weighted_gradients_are_those_of_each_sample(guidance, rows, monkeypatch):
    """Of two quantities, with guidance, and where sampler.velocity fills up a call as on a GPU."""
    args = SimpleNamespace(model="tiny", dtype="float32", device="cpu", rank=2, resolution=0, gradient_checkpointing=False, shift=0)
    args.text_length, args.guidance, args.micro_batch = 1, guidance, rows
    monkeypatch.setattr(sampler, "ONE_SHAPE", ("cpu",) if rows else ())
    torch.manual_seed(0)
    pipe = families.load_pipeline(args)
    parameters = [p for p in pipe.transformer.parameters() if p.requires_grad]
    for p in parameters:
        torch.nn.init.normal_(p, std=0.1)
    text, x = sampler.encode(pipe, ["a circle", "two red squares"], args), torch.randn(2, 16, 8, 8)
    layers = [layer for layer in pipe.transformer.modules() if any(p is getattr(layer, "weight", None) for p in parameters)]

    def log_probs():
        v = sampler.velocity(pipe, x, torch.tensor([0.5, 0.9]), text, args)
        return torch.stack([v.square().flatten(1).mean(1), v.flatten(1).mean(1)])

    weights = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.5, -2.0], [3.0, 1.0]]])
    got = estimates.weighted_gradients(layers, log_probs, weights, sides=round(guidance))
    for row, weight in zip(got, weights):
        expected = torch.autograd.grad((weight * log_probs()).sum(), [layer.weight for layer in layers])
        torch.testing.assert_close(row, torch.cat([part.flatten() for part in expected]), rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in parameters)


def test_loss_weights_are_the_scripts_losses():
    """On-policy A over the size of the step's chunk and their number; 0 where the clip stops the ratio."""
    advantages, steps = torch.tensor([[2.0] * 5, [-1.0] * 5]), [[1] * 5] * 2
    weights = credit.loss_weights(torch.zeros(2, 5), advantages, [[1] * 5, [2, 2, 1]], 0.1)
    torch.testing.assert_close(weights, torch.tensor([[0.4] * 5, [-1 / 6, -1 / 6, -1 / 6, -1 / 6, -1 / 3]]))
    moved = torch.zeros(2, 5)
    moved[:, 0], moved[:, 2] = 0.3, -0.3
    weights = credit.loss_weights(moved, advantages, steps, 0.1)
    assert weights[0, 0] == 0 < weights[0, 2] and weights[1, 2] == 0 > weights[1, 0]
    # A step's weight is a factor of its log-probability, so it reaches the clip as well
    weights = credit.loss_weights(moved, advantages, steps, 0.1, torch.tensor([0.2, 1, 2, 1, 1]))
    torch.testing.assert_close(weights[:, 0], torch.exp(torch.tensor(0.06)) * 0.2 * advantages[:, 0] / 5)
    torch.testing.assert_close(weights[:, 2], torch.tensor([math.exp(-0.6) * 2 * 2 / 5, 0.0]))


# From end to end

SMALL = "--images 16 --group-size 4 --continuations 2 --substeps 1 --dtype float32 --device cpu".split()


def run(module, *flags):
    argv, sys.argv = sys.argv, [module.__file__, *map(str, flags)]
    try:
        runpy.run_path(module.__file__, run_name="__main__")
    finally:
        sys.argv = argv


def figures_of(folder):
    with open(folder / "credit.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with LoRA and optimizer state, and the folder of its measurement."""
    folder = tmp_path_factory.mktemp("credit")
    (folder / "run").mkdir()
    settings = dict(model="tiny", reward="shapes", steps=4, sde="ddim", rank=2, group_size=8, prompts=8, updates=4, lr=1e-3)
    (folder / "run" / "args.json").write_text(json.dumps(settings))
    args = SimpleNamespace(model="tiny", dtype="float32", device="cpu", rank=2, resolution=0, gradient_checkpointing=False, shift=0)
    pipe = families.load_pipeline(args)
    families.save_lora(pipe, folder / "run" / families.LORA_FILE)
    parameters = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-9)
    for p in parameters:
        p.grad = torch.ones_like(p)  # past steps a thousand times as long as the measured one: it hardly moves
    optimizer.step()
    state = optimizer.state_dict()
    for moments in state["state"].values():
        moments.update(exp_avg=torch.zeros_like(moments["exp_avg"]), exp_avg_sq=torch.full_like(moments["exp_avg_sq"], 1e6))
    torch.save(dict(optimizer=state), folder / "run" / "state.pt")
    run(credit, *SMALL, "--lora", folder / "run", "--output-dir", folder / "out")
    return folder


def test_a_run_writes_its_files_and_takes_settings_and_optimizer_of_a_lora(folder):
    result = json.loads((folder / "out" / "credit.json").read_text())
    assert (result["args"]["steps"], result["args"]["sde"], result["images_of_an_update"]) == (4, "ddim", 8 * 4 // 4)
    second = result["second_update"]  # with the run's own second moments nothing moves
    assert (second["optimizer"], second["lr"], second["clipped_by_step"]) == ("the run's AdamW", 1e-3, [0, 0, 0])
    assert "step 2 accounts for" in " ".join(result["says"]) and "step 3 accounts for" not in " ".join(result["says"])
    rows = figures_of(folder / "out")
    assert {row["quantity"] for row in rows} == {*estimates.CREDIT, *estimates.GRADIENT, "share of noise"}
    methods = {row["method"] for row in rows}
    assert {"GRPO", "GRPO, std2", "GCPO, adaptive", "Stepwise, T' = 1", "R - R_k, T' = 1", "true advantage"} <= methods
    assert {*credit_pictures.SHOWN, *credit_pictures.ARMS} - methods == {"Stepwise, T' = 3"}  # SMALL measures T' = 1 alone
    assert {*credit_pictures.ARMS.values()} <= {*compare.SETTINGS["mechanism"].methods}
    constructed = {row["method"] for row in rows if row["by_construction"] and row["quantity"] == "cosine of expectation"}
    assert {"GRPO", "R - V(x_k)", "true advantage"} <= constructed and not {"GRPO, std2", "Stepwise, T' = 1"} & constructed
    noise = [float(row["value"]) for row in rows if row["quantity"] == "share of noise"]
    assert len(noise) == 3 and sum(noise) == pytest.approx(1, abs=1e-3)
    for name in ("credit.png", "shares.png", "gradient.png"):
        assert 400 < Image.open(folder / "out" / name).width <= 1200


def test_pooled_measurements_are_means_with_their_errors(folder, capsys):
    """Of one measurement twice: the same values, errors less by the root of 2, groups and covariances doubled."""
    run(credit, "--pool", folder / "out", folder / "out", "--output-dir", folder / "pooled")
    assert "has p = " in capsys.readouterr().out
    for one, two in zip(figures_of(folder / "out"), figures_of(folder / "pooled")):
        assert (one["method"], one["quantity"], 2 * int(one["groups"])) == (two["method"], two["quantity"], int(two["groups"]))
        assert float(one["value"]) == pytest.approx(float(two["value"]), nan_ok=True)
        assert float(one["error"]) / math.sqrt(2) == pytest.approx(float(two["error"]), rel=1e-3, nan_ok=True)
    # Adaptive chunks may be one more in another measurement; other differences are refused
    shutil.copytree(folder / "out", folder / "more")
    for level, refused in (("adaptive chunks", False), ("steps", True)):
        row = f"credit,reward,{level},99,share,0,1,,4"
        (folder / "more" / "credit.csv").write_text((folder / "out" / "credit.csv").read_text() + row + "\n")
        with pytest.raises(SystemExit) if refused else contextlib.nullcontext():
            run(credit, "--pool", folder / "out", folder / "more", "--output-dir", folder / "pooled")
        assert ("needs measurements of the same methods" in capsys.readouterr().err) == refused
        assert all(line["at"] != "99" for line in figures_of(folder / "pooled"))
    checks = json.loads((folder / "pooled" / "credit.json").read_text())["checks"]
    assert (checks["groups"], checks["pairs"]) == (8, 3) and 0 <= checks["wald_p"] <= 1


def test_predictions_are_held_against_what_was_measured(tmp_path, capsys):
    """Differences are of the seeds that an arm shares with GRPO; other settings and methods without a pair are left out."""
    gains = {
        "GRPO": 1.0,
        "GRPO, std2": 2.0,
        "GCPO, adaptive": 1.4,
        "Stepwise, std2, T' = 1": 3.0,
        "true advantage": 9.0,
        "Stepwise, T' = 1": 2.5,
    }
    gains["GCPO, one chunk"] = math.nan
    lines = (f'"{name}",first update,predicted gain,{gain},0.1\n' for name, gain in gains.items())
    (tmp_path / "credit.csv").write_text("method,at,quantity,value,error\n" + "".join(lines))
    ends = {"grpo": 0.5, "grpo std2": 0.6, "gcpo": 0.54, "stepwise std2": 0.7, "gcpo, one chunk": 0.1, "stepwise": 0.65}
    runs = {arm: {s: np.full((3, 4), end + 0.01 * s) for s in (20, 21)} for arm, end in ends.items()}
    runs["gcpo"][22] = np.zeros((3, 4))  # a seed that GRPO has not
    arms = credit_pictures.arms_of(tmp_path, runs)
    assert {name: arm[2] for name, arm in arms.items()} == pytest.approx(
        {"GRPO": 0, "GRPO, std2": 0.1, "GCPO, adaptive": 0.04, "Stepwise, std2, T' = 1": 0.2, "Stepwise, T' = 1": 0.15}
    )
    for setting in ("mechanism", "early"):
        (tmp_path / setting).mkdir()
        for arm, seed in ((name, seed) for name in ends for seed in runs[name]):
            words = " ".join(compare.command("mechanism", arm))
            row = dict(setting=setting, method=arm, seed=seed, command=words, curve=runs[arm][seed])
            compare.add_row(tmp_path / setting / "runs.csv", row)
    flags = ["--credit", tmp_path, "--output-dir"]
    run(credit_pictures, *flags, tmp_path / "mechanism")
    said = capsys.readouterr().out
    assert "over 4 arms: 1.00" in said and Image.open(tmp_path / "mechanism" / "predictions.png").width == 800
    with pytest.raises(SystemExit) as stop:
        run(credit_pictures, *flags, tmp_path / "early")
    assert stop.value.code == 2 and "it takes 5" in capsys.readouterr().err


def test_the_correlations_interval_covers_it():
    """Of 40 samples of 12 arms with a correlation of 0.8 the 95 % interval has it in at least 33."""
    generator = np.random.default_rng(0)
    draws = [generator.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], 12).T for _ in range(40)]
    found = [credit_pictures.correlation(*draw) for draw in draws]
    assert sum(low <= 0.8 <= high for _, low, high in found) >= 33 and all(low <= r <= high for r, low, high in found)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--images", "18"], "--images 18 must be a multiple of --group-size 4"),
        (["--continuations", "3"], "--continuations 3 must be an even number"),
        (["--steps", "2"], "at least 2 more than --ode-steps 1"),
        (["--max-chunk", "0"], "--max-chunk 0 must be at least 1"),
        (["--eta", "1.5"], "--eta 1.5 must be above 0"),
        (["--lora", "nowhere"], "--lora nowhere is not the folder of a run"),
        (["--pool", "nowhere"], "--pool nowhere is not the folder of a measurement"),
        (["--reward", "beauty"], "unknown name"),
    ],
)
def test_bad_input_is_answered_with_one_sentence(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(credit, *SMALL, *flags)
    captured = capsys.readouterr().err
    assert stop.value.code == 2 and message in captured and captured.count("\n") == 1


def test_an_unfit_optimizer_state_is_answered_with_one_sentence(folder, capsys):
    torch.save(dict(optimizer={}), folder / "run" / "state.pt")
    with pytest.raises(SystemExit) as stop:
        run(credit, *SMALL, "--lora", folder / "run", "--output-dir", folder / "unfit")
    assert stop.value.code == 2 and "state.pt does not fit" in capsys.readouterr().err
