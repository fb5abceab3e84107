"""Part 2: group advantages and the policy gradient."""

import torch

from checks import finite_differences, formula, gradient, holds, is_well_behaved, randn, same, worth

G = 5


def grouped(values):
    return values.view(-1, G)


@worth(3)
def test_advantages(s):
    """group_advantages centres and scales every group by its own mean and std"""
    rewards = randn(4 * G).abs() + torch.arange(4.0).repeat_interleave(G)
    groups = grouped(rewards)
    centred = groups - groups.mean(1, keepdim=True)
    unbiased, biased = groups.std(1, keepdim=True), groups.std(1, keepdim=True, correction=0)
    images_first = rewards.view(G, -1)
    columns = (images_first - images_first.mean(0)) / (images_first.std(0) + 1e-4)
    mistakes = {
        "the mean is that of all images, not of the group": (groups - groups.mean()) / (unbiased + 1e-4),
        "the std is that of all images, not of the group": centred / (groups.std() + 1e-4),
        "mean and std are those of all images, not of the group": (groups - groups.mean()) / (groups.std() + 1e-4),
        "the variance in place of the std": centred / (groups.var(1, keepdim=True) + 1e-4),
        "the std divides by n; here it divides by n - 1, as tensor.std() does": centred / (biased + 1e-4),
        "rewards are not centred on the group's mean": groups / (unbiased + 1e-4),
        "rewards are centred but not divided by the std": centred,
        "the rows of a group were taken apart: the first G rewards are the first group": columns,
        "the rows of a group were taken apart (view(G, -1).T?): the first G rewards are the first group, view(-1, G)": columns.T,
        "the sign is wrong: a better image has a larger advantage": -centred / (unbiased + 1e-4),
    }
    expected = (centred / (unbiased + 1e-4)).flatten()
    same("group_advantages", s.group_advantages(rewards, G), expected, {m: v.flatten().clamp(-5, 5) for m, v in mistakes.items()})


@worth(2)
def test_global_std(s):
    """With global_std the std is that of all rewards, the mean still the group's"""
    rewards = randn(4 * G) + torch.arange(4.0).repeat_interleave(G)
    groups = grouped(rewards)
    centred = groups - groups.mean(1, keepdim=True)
    mistakes = {
        "the std is still the group's": centred / (groups.std(1, keepdim=True) + 1e-4),
        "the mean is that of all images too; it stays the group's": (groups - groups.mean()) / (groups.std() + 1e-4),
        "the std of the centred rewards, not of the rewards": centred / (centred.std() + 1e-4),
    }
    got = s.group_advantages(rewards, G, True)
    same(
        "group_advantages with global_std",
        got,
        (centred / (groups.std() + 1e-4)).flatten(),
        {m: v.flatten() for m, v in mistakes.items()},
    )


@worth(1)
def test_no_spread(s):
    """A group of equal rewards gets exactly 0, whatever rounding makes of its mean"""
    for value, dtype in ((1.0, torch.float32), (0.1, torch.float32), (0.1, torch.float64)):
        got = s.group_advantages(torch.full((14,), value, dtype=dtype), 7)
        holds(not got.isnan().any(), "a group of equal rewards gives NaN: its std is 0, so add 1e-4 to it")
        holds(
            (got == 0).all(),
            "a group of equal rewards does not get exactly 0: 0.1 seven times has a mean that is not 0.1; compare max and min",
        )


@worth(1)
def test_clamp_and_damping(s):
    """Advantages are clamped to ±5, and 1e-4 damps a tiny std"""
    outlier = torch.zeros(100, dtype=torch.float64)
    outlier[0] = 1
    for sign in (1, -1):
        largest = s.group_advantages(sign * outlier, 100)[0].item()
        holds(abs(largest) <= 5, f"one image of 100 has advantage {largest:.2f}: advantages are not clamped to ±5")
        holds(largest == 5 * sign, f"one image of 100 should have the largest advantage, {5 * sign}, not {largest:.2f}")
    tiny = s.group_advantages(torch.tensor([0, 2e-4], dtype=torch.float64), 2)[1].item()
    holds(abs(tiny - 0.7071) > 1e-3, "1e-4 is not added to the std, so that rounding errors become advantages")
    same("advantage at a std of 1.4e-4", tiny, 1 / (2**0.5 + 1), tolerance=1e-6)


@worth(1)
def test_equivariance(s):
    """Permuting images in a group, or groups, permutes advantages; a constant added to a group changes none"""
    rewards = grouped(randn(3 * G))
    advantages, within, groups = (
        grouped(s.group_advantages(rewards.flatten(), G)),
        torch.tensor([3, 0, 4, 1, 2]),
        torch.tensor([2, 0, 1]),
    )
    for name, index in (("images of a group", (slice(None), within)), ("groups", groups)):
        same(
            f"advantages after a permutation of {name}", grouped(s.group_advantages(rewards[index].flatten(), G)), advantages[index]
        )
    shifted = rewards + torch.tensor([[1.0], [-2], [7]], dtype=torch.float64)
    same("advantages after adding a constant to each group", grouped(s.group_advantages(shifted.flatten(), G)), advantages)


@worth(2)
def test_gradient(s):
    """The gradient of policy_gradient_loss is -A, for every sample its own"""
    log_prob, advantages = randn(6), randn(6, seed=1)
    loss = s.policy_gradient_loss(log_prob, advantages)
    holds(loss.shape != (), "policy_gradient_loss looks like a mean or sum over the samples: give one loss for each")
    mistakes = {
        "the sign is wrong: an optimizer minimizes, so a good sample's probability would fall": advantages,
        "the advantage is missing": -torch.ones(6),
        "the gradient of the probability, not of its log": -advantages * log_prob.exp(),
    }
    function = lambda log_prob: s.policy_gradient_loss(log_prob, advantages)
    same("gradient of policy_gradient_loss", gradient(function, log_prob), -advantages, mistakes)
    same("gradient by finite differences", finite_differences(function, log_prob), -advantages, mistakes, tolerance=1e-5)


@worth(2)
def test_update_learns(s):
    """A working GRPO update: 150 steps move a Gaussian policy to the rewarded point"""
    generator = torch.Generator().manual_seed(0)
    target, std = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64), 0.5
    mean = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([mean], lr=0.03)
    for _ in range(150):
        x = mean.detach() + std * torch.randn(8 * 16, 4, generator=generator, dtype=torch.float64)
        difficulty = torch.arange(8.0).repeat_interleave(16)  # each prompt has its own level of reward
        advantages = s.group_advantages(difficulty - ((x - target) ** 2).mean(1), 16)
        log_prob = torch.distributions.Normal(mean, std).log_prob(x).mean(1)
        optimizer.zero_grad()
        s.policy_gradient_loss(log_prob, advantages).mean().backward()
        optimizer.step()
    before, after = (target.norm().item(), (mean.detach() - target).norm().item())
    holds(after < before, f"the policy runs away from the rewarded point (distance {before:.2f} -> {after:.2f}): look for a sign")
    holds(after < before / 3, f"the policy hardly moves to the rewarded point (distance {before:.2f} -> {after:.2f})")


@worth(1)
def test_well_behaved(s):
    """Inputs unchanged, dtype and device kept"""
    is_well_behaved(s.group_advantages, randn(15), G)
    is_well_behaved(s.group_advantages, randn(15), G, True)
    is_well_behaved(s.policy_gradient_loss, randn(6), randn(6, seed=1))


@worth(1)
def test_own_mean_factor(s):
    """Pen and paper: how much of the gradient is left when an image's own reward is in its group's mean"""
    mistakes = {
        lambda G: (G - 2) / G: "both factors were applied twice: E[(r_i - mean) grad_i] has one mean",
        lambda G: G / (G - 1): "the inverse: what the gradient must be multiplied by to be unbiased",
        lambda G: 1 / G: "the part that is lost: asked is the part that is left",
    }
    formula(s, "own_mean_factor", lambda G: 1 - 1 / G, mistakes, G=(2, 30))


@worth(1)
def test_variety(s):
    """Question 4: the variety of a policy that has a favourite"""
    mistakes = {
        lambda p, M: 1 - p: "the chance that one image is not drawn as the favourite: variety compares two images",
        lambda p, M: (1 - p**2) * (1 - 1 / M): "the share of pairs that differ: divide by that of equally likely looks",
        lambda p, M: p**2: "the share of pairs in which both images are the favourite by choice: variety is what is left",
        lambda p, M: (1 - p**2 - (1 - p) ** 2 / (M - 1)) / (1 - 1 / M): "one of M - 1 other looks otherwise: it is one of all M",
        lambda p, M: 1 - p**2 - (1 - p) ** 2: "two looks only, the favourite and the rest: there are M",
    }
    formula(s, "variety_with_favourite", lambda p, M: 1 - p**2, mistakes, p=(0.1, 0.9), M=(4, 100))
