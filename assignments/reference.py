"""The reference solution: the scripts' own functions under the names of student.py. `grade.py --solution` grades this file.

What no script has a function for stands here, and nowhere else.
"""

import math

import torch

import bugs
from gcpo import adaptive_chunks, chunk_log_ratio, fixed_chunks, relative_distance  # noqa: F401, they are graded
from grpo import clipped_loss, group_advantages, log_prob  # noqa: F401
from miniature.preference import bradley_terry  # noqa: F401
from sampler import sde_step  # noqa: F401
from stepwise_grpo import gain_advantages, gains  # noqa: F401


def posterior_mean(v, x, sigma):
    return x - sigma.view(-1, *[1] * (x.ndim - 1)) * v


def policy_gradient_loss(log_p, advantages):
    return clipped_loss(log_p, advantages, math.inf)  # without a limit only -A times the first argument is left


def ratio(log_prob_new, log_prob_old):
    return torch.exp(chunk_log_ratio(log_prob_new, log_prob_old, [1] * log_prob_new.shape[-1]))


def stopped_fraction(ratio, advantages, clip):
    ratio = ratio.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(clipped_loss(ratio, advantages, clip).sum(), ratio)
    return ((gradient == 0) & (advantages != 0)).to(ratio.dtype).mean()


def value_of_state(x, k, num_steps, transition, reward, continuations):
    copies = x.repeat_interleave(continuations, 0)
    for step in range(k, num_steps):
        copies = transition(copies, step)
    return reward(copies).view(len(x), continuations).mean(1)


def true_advantages(values):
    return gains(values)


def variance_shares(first, second):
    squares = (first * second).mean(0)
    return squares / squares.sum()


def sign_agreement(advantages, true_advantages):
    product = advantages * true_advantages
    return (product > 0).to(product.dtype).sum() / (product != 0).sum()


def path_kl(mean, mean_base, std):
    return (((mean - mean_base) ** 2).flatten(2).sum(2) / (2 * std**2)).sum(1)


def best_of_n(scores, gold):
    return gold.gather(1, scores.argmax(1, keepdim=True)).mean()


ANSWERS = {
    "expected_log_prob": "-(1 + log(2 * pi)) / 2 - log(std)",
    "own_mean_factor": "1 - 1 / G",
    "variety_with_favourite": "1 - p**2",
    "log_ratio_mean": "-(d**2) / 2",
    "log_ratio_std": "d / sqrt(D)",
    "mean_ratio": "exp(-KL / D + KL / D**2)",
    "clip_at_other_size": "eps * sqrt(D / D_new)",
    "step_weight": "1 / (K * c)",
    "product_weight_over_grpo": "S / K",
    "hidden_weight": "2 * std**2",
    "mean_gain": "(R_S - R_0) / S",
    "ddim_std_over_cps": "eta * sqrt(1 - sigma) / sin(eta * pi / 2)",
    "uniform_gradient_mean": "a",
    "uniform_gradient_variance": "2 * a**2 + b**2",
    "true_gradient_variance": "2 * a**2",
    "share_of_step_0": "a**2 / (a**2 + b**2 + c**2)",
    "sign_agreement_of_grpo": "1 / 2 + asin(1 / sqrt(K)) / pi",
    "bradley_terry_gradient": "-1 / (1 + exp(d))",
    "best_of_n_kl": "log(n) - (n - 1) / n",
    "remedy": "--beta 0.1",
}
for number, bug in bugs.BUGS.items():
    ANSWERS |= {f"bug_{number}_line": bug.replacement or bug.line, f"bug_{number}_symptom": bug.symptom}
