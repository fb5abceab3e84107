"""Part 5: gains."""

import math

import torch

from checks import formula, holds, is_well_behaved, randn, same, worth

G, S = 4, 3


@worth(3)
def test_gains(s):
    """gains: what the reward is after a step, less what it was before"""
    rewards = randn(6, S + 1)
    expected = rewards.diff(dim=1)
    zero = torch.zeros(6, 1)
    mistakes = {
        "the sign is wrong: a step that raises the reward gains": -expected,
        "shifted by one step: step k goes from state k to state k + 1": expected.roll(1, 1),
        "shifted by one step: the first step's gain is not 0": torch.cat([zero, expected[:, :-1]], 1),
        "shifted by one step: the last step's gain is not 0": torch.cat([expected[:, 1:], zero], 1),
        "the gain since the start, not since the state before": rewards[:, 1:] - rewards[:, :1],
        "the gain still to come, R_S - R_k, not that of step k": rewards[:, -1:] - rewards[:, :-1],
        "the rewards of the states after, not their differences": rewards[:, 1:],
        "one value for every state: there is one step less": torch.cat([zero, expected], 1),
    }
    same("gains", s.gains(rewards), expected, mistakes)


@worth(1)
def test_gains_telescope(s):
    """Gains add up to the last reward less the first"""
    rewards = randn(6, S + 1)
    got = s.gains(rewards)
    holds(tuple(got.shape) == (6, S), f"gains has shape {tuple(got.shape)}, expected (6, {S})")
    same(
        "the sum of the gains",
        got.sum(1),
        rewards[:, -1] - rewards[:, 0],
        {"the sum has the wrong sign": rewards[:, 0] - rewards[:, -1]},
    )


def scaled(gains, over):
    """Gains (P, G, S) centred and divided over the given dimensions."""
    return ((gains - gains.mean(over, keepdim=True)) / (gains.std(over, keepdim=True) + 1e-4)).flatten(0, 1)


def image_major(groups, over):
    """The mistake of taking row i for one of group i % P, as view(G, -1, S) does: laid out in that order, and as transposed."""
    taken = scaled(groups.reshape(G, -1, S).transpose(0, 1), over)
    apart = "the rows of a group were taken apart"
    return {
        f"{apart}: the first G rows are the first group": taken.view(-1, G, S).transpose(0, 1).flatten(0, 1),
        f"{apart} (view(G, -1, S) transposed?): the first G rows are the first group, view(-1, G, S)": taken,
    }


@worth(3)
def test_joint(s):
    """Joint normalization: one mean and one std over the images and steps of a group"""
    groups = randn(3, G, S) * torch.tensor([1.0, 2, 4]) + torch.tensor([0.0, 1, 3]) + torch.arange(3.0).view(3, 1, 1)
    mean, std = groups.mean((1, 2), keepdim=True), groups.std((1, 2), keepdim=True)
    biased = groups.std((1, 2), keepdim=True, correction=0)
    mistakes = {
        "mean and std are taken per step, not jointly over images and steps": scaled(groups, (1,)),
        "mean and std are taken per image, so that images are no longer compared": scaled(groups, (2,)),
        "mean and std are those of all images, not of the group": scaled(groups, (0, 1, 2)),
        "the mean is taken per step, only the std jointly": ((groups - groups.mean(1, keepdim=True)) / (std + 1e-4)).flatten(0, 1),
        "gains are not centred": (groups / (std + 1e-4)).flatten(0, 1),
        "the variance in place of the std": ((groups - mean) / (std**2 + 1e-4)).flatten(0, 1),
        "the std divides by n; here it divides by n - 1, as tensor.std() does": ((groups - mean) / (biased + 1e-4)).flatten(0, 1),
    }
    expected = scaled(groups, (1, 2))
    same("gain_advantages", s.gain_advantages(groups.flatten(0, 1), G), expected, mistakes | image_major(groups, (1, 2)))


@worth(2)
def test_step(s):
    """With normalize="step" every step has its own mean and std"""
    groups = randn(3, G, S) * torch.tensor([1.0, 2, 4])
    mistakes = {
        "the joint normalization: mean and std are per step here": scaled(groups, (1, 2)),
        "per step, but over all images, not the group's": scaled(groups, (0, 1)),
        "mean and std are taken per image": scaled(groups, (2,)),
        **image_major(groups, (1,)),
    }
    same("gain_advantages per step", s.gain_advantages(groups.flatten(0, 1), G, "step"), scaled(groups, (1,)), mistakes)


@worth(1)
def test_no_spread(s):
    """Equal gains give exactly 0, per step too"""
    for value, dtype in ((1.0, torch.float32), (0.1, torch.float32), (0.1, torch.float64)):
        for normalize in ("joint", "step"):
            got = s.gain_advantages(torch.full((14, S), value, dtype=dtype), 7, normalize)
            holds(not got.isnan().any(), "equal gains give NaN: their std is 0, so add 1e-4 to it")
            holds(
                (got == 0).all(),
                "equal gains do not give exactly 0: 0.1 seven times has a mean that is not 0.1; compare max and min",
            )
    gains = randn(7, S).float()
    gains[:, 1] = 0.1
    got = s.gain_advantages(gains, 7, "step")
    holds(
        (got[:, 1] == 0).all() and (got[:, [0, 2]] != 0).all(),
        "per step: a step at which all images gain the same must get exactly 0, and only that step",
    )


@worth(1)
def test_clamp(s):
    """Advantages are clamped to ±5"""
    for sign in (1, -1):
        gains = torch.zeros(100, 1, dtype=torch.float64)
        gains[0] = sign
        largest = s.gain_advantages(gains, 100)[0, 0].item()
        holds(largest == 5 * sign, f"one gain of 100 has advantage {largest:.2f}, not {5 * sign}: advantages are clamped to ±5")


@worth(1)
def test_equivariance(s):
    """Permuting the images of a group permutes their advantages"""
    gains, order = randn(2 * G, S), torch.tensor([2, 0, 3, 1, 4, 7, 6, 5])
    same("advantages of permuted images", s.gain_advantages(gains[order], G), s.gain_advantages(gains, G)[order])


@worth(1)
def test_well_behaved(s):
    """Inputs unchanged, dtype and device kept"""
    is_well_behaved(s.gains, randn(6, S + 1))
    for normalize in ("joint", "step"):
        is_well_behaved(s.gain_advantages, randn(2 * G, S), G, normalize)


@worth(1)
def test_mean_gain(s):
    """Pen and paper: the mean that joint normalization takes away"""
    mistakes = {
        lambda R_S, R_0, S: R_S - R_0: "the mean over images of all gains of one: there are S steps",
        lambda R_S, R_0, S: (R_S - R_0) / (S + 1): "divided by the number of states: there are S gains",
        lambda R_S, R_0, S: 0: "the mean advantage: the gains of an image add up to R_S - R_0",
        lambda R_S, R_0, S: (R_0 - R_S) / S: "the sign is wrong: a step that raises the reward gains",
    }
    formula(s, "mean_gain", lambda R_S, R_0, S: (R_S - R_0) / S, mistakes, R_S=(0.5, 1), R_0=(0, 0.4), S=(2, 20))


@worth(1)
def test_ddim_over_cps(s):
    """Pen and paper: the noise of ddim over that of cps, which decides what a step can gain"""
    expected = lambda eta, sigma: eta * math.sqrt(1 - sigma) / math.sin(eta * math.pi / 2)
    mistakes = {
        lambda eta, sigma: 1 / expected(eta, sigma): "cps over ddim",
        lambda eta, sigma: expected(eta, sigma) ** 2: "the ratio of the variances",
    }
    formula(s, "ddim_std_over_cps", expected, mistakes, eta=(0.2, 0.9), sigma=(0.2, 0.9))
