"""Unbiased estimates of values, credit and gradients of a policy, with errors: pure functions that experiments/credit.py calls.

No model is in them. A World is a policy and its reward, so an exactly known flow can stand where the model does. Values and
credit come in independent parts (M, B, S), one for each continuation or half of them: products of different parts have no
sampling variance. Groups of images from the same x_0 are independent, hence errors are jackknives over groups (of gradients,
over blocks of groups), and products of different groups' gradients are, on average, products of their expectations.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import sampler

# A policy, its trajectories and the value of their states


class World(NamedTuple):
    """A policy and its reward; `prompt` (N,) are indices. The tests put an exactly known flow in the model's place."""

    velocity: Callable  # (x (N, ...), sigma (N,), prompt) -> v (N, ...)
    reward: Callable  # (x_T (N, ...), prompt) -> (N,)
    sigmas: torch.Tensor  # (T + 1,)
    eta: float
    sde: str
    ode_steps: int = 1  # the last so many follow the ODE


@torch.no_grad()
def roll_out(world, x, k, prompt, generator):
    """States x_k ... x_S (N, S + 1 - k, ...), velocities there, and ends x_T (N, ...), drawn from states x (N, ...) at step k."""
    states, velocities, sigmas = [], [], world.sigmas
    S = len(sigmas) - 1 - world.ode_steps
    for j in range(k, len(sigmas) - 1):
        sigma, sigma_next = sigmas[j].expand(len(x)), sigmas[j + 1].expand(len(x))
        v = world.velocity(x, sigma, prompt)
        if j <= S:
            states.append(x)
            velocities.append(v)
        mean, std = sampler.sde_step(v, x, sigma, sigma_next, sigmas[1].item(), world.eta if j < S else 0.0, world.sde)
        x = mean + std * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    return torch.stack(states, 1), torch.stack(velocities, 1), x


def values(world, trajectory, scores, prompt, group_size, continuations, generator, micro_batch=128):
    """V of every state by M = continuations parts (M, B, S + 1), and the covariance (B, S, ...) of R and x_{k+1} given x_k.

    A part is the reward of one fresh end; V(x_S) is the trajectory's own. trajectory is (B, S + 1, ...) and group-major,
    scores and prompt (B,). A group's x_0 is one state.
    """
    B, S = len(trajectory), trajectory.shape[1] - 1
    starts = [torch.arange(0, B, 1 if k else group_size).repeat_interleave(continuations) for k in range(S)]
    drawn = [[] for _ in range(S)]
    for k, b in tqdm([(j, b) for j in range(S) for b in starts[j].split(micro_batch)], "continuations", disable=None):
        states, _, end = roll_out(world, trajectory[b, k], k, prompt[b], generator)
        drawn[k].append((world.reward(end, prompt[b]), states[:, 1]))
    parts, covariance = [], []
    for k, ends in enumerate(drawn):
        R, x_next = (torch.cat(batches).unflatten(0, (-1, continuations)) for batches in zip(*ends))
        cov = torch.einsum("nm,nm...->n...", (R - R.mean(1, keepdim=True)).to(x_next), x_next) / (continuations - 1)
        repeats = 1 if k else group_size
        parts.append(R.T.repeat_interleave(repeats, 1))
        covariance.append(cov.repeat_interleave(repeats, 0))
    return torch.stack([*parts, scores.expand(continuations, B)], 2), torch.stack(covariance, 1)


# Credit


def centred(credit, group_size):
    """credit (..., B, S) less its mean over the group's images at each step, times sqrt(G / (G - 1)).

    With that factor the mean product of two of them estimates the covariance within a group without bias.
    """
    groups = credit.unflatten(-2, (-1, group_size))
    return ((groups - groups.mean(-2, keepdim=True)) * math.sqrt(group_size / (group_size - 1))).flatten(-3, -2)


def jackknife(statistic, n):
    """Value and standard error of statistic(indices of the units kept), a tensor, by leaving out each of n independent units."""
    units = torch.arange(n)
    left_out = torch.stack([statistic(units[units != i]) for i in range(n)])
    return statistic(units), ((n - 1) * left_out.var(0, correction=0)).sqrt()


def by_chunk(steps, plans, mean=False):
    """Sums, or means, over chunks of steps (..., B, S): (..., B, K), 0 where a trajectory has fewer than the most chunks K."""
    member = steps.new_zeros(len(plans), max(map(len, plans)), steps.shape[-1])
    for b, plan in enumerate(plans):
        for j, (size, end) in enumerate(zip(plan, np.cumsum(plan))):
            member[b, j, end - size : end] = 1 / size if mean else 1
    return torch.einsum("bks,...bs->...bk", member, steps)


CREDIT = "share|correlation|correlation - sqrt(share)|uncorrected correlation|slope|wrong signs|wrong above|wrong below".split("|")


def unbiased_product(x, y):
    """The mean product of different parts (M, ...) of x and y: their product without the variance of the sampling."""
    return (x.sum(0) * y.sum(0) - (x * y).sum(0)) / (len(x) * (len(x) - 1))


def credit_statistics(credit, delta, group_size):
    """How credit (M, B, K) knows the true delta (M, B, K), both by parts and centred: value, error (8, K + 1) of CREDIT.

    The last column takes all steps together. With the reward as credit, share is the step's of its variance. slope is that of
    credit on delta; of unbiased credit it is the same at every step. Uncorrected is what means over the parts give. Wrong signs
    are of all credit, of what is above and what is below 0: with p counted, arccos(cos(pi p) / sqrt(reliability of delta)) / pi,
    which is exact for Gaussians; they are not given of credit that is itself estimated by parts.
    """
    mean, by_parts = delta.mean(0), (credit[0] != credit[1]).any()
    wrong = (1 - credit[0].sign() * mean.sign()) / 2  # a tie is half wrong
    above, below = (credit[0] > 0).to(mean), (credit[0] < 0).to(mean)
    moments = [unbiased_product(x, y) for x, y in ((credit, delta), (credit, credit), (delta, delta))]
    moments = [*moments, credit.mean(0) * mean, credit.mean(0) ** 2, mean**2]
    moments = torch.stack([*moments, above * wrong, above, below * wrong, below], 1).double()  # (B, 10, K)
    moments = torch.cat([moments, moments.sum(2, keepdim=True)], 2).unflatten(0, (-1, group_size)).mean(1)

    def statistic(kept):
        cross, own, true, raw_cross, raw_own, raw_true, wrong_above, above, wrong_below, below = moments[kept].mean(0)
        correlation = cross / (own * true).sqrt()
        p = torch.stack([(wrong_above + wrong_below) / (above + below), wrong_above / above, wrong_below / below])
        p = torch.arccos((torch.cos(torch.pi * p) * (raw_true / true).sqrt()).clamp(-1, 1)) / torch.pi
        rows = [true / own[:-1].mean(), correlation, correlation - (true / own).sqrt(), raw_cross / (raw_own * raw_true).sqrt()]
        return torch.cat([torch.stack([*rows, cross / true]), torch.nan * p if by_parts else p])

    return jackknife(statistic, len(moments))


# Gradients


def weighted_gradients(layers, log_prob, weights):
    """weights (W, n) times the gradients of log_prob() (n,) to the weights of Linear layers, (W, D), in one backward pass.

    A sample's gradient is the sum over its tokens of output gradient ⊗ input, which hooks on the layers see for all samples.
    """
    found, n = {}, weights.shape[1]

    def watch(layer, inputs, output):
        def collect(grad):  # of outputs (n, L, O); with guidance there are two rows a sample
            grad, x = (t.float().view(-1, n, *t.shape[1:]) for t in (grad, inputs[0]))
            found[layer] = weights @ torch.einsum("gnlo,gnli->noi", grad, x).flatten(1)

        output.register_hook(collect)

    hooks = [layer.register_forward_hook(watch) for layer in layers]
    log_prob().sum().backward()
    for hook in hooks:
        hook.remove()
    for layer in layers:
        layer.weight.grad = None
    return torch.cat([found[layer] for layer in layers], 1)


class Products(NamedTuple):
    """Inner products of M methods' gradients, summed over the groups of J blocks that a jackknife leaves out one at a time."""

    across: torch.Tensor  # (J, M, J, M) of the blocks' summed gradients
    within: torch.Tensor  # (J, M, M) of every group's gradient with its own
    squared: torch.Tensor  # (J, M) squared norm of every group's gradient, without the sampling variance of V
    groups: torch.Tensor  # (J,)


def inner_products(gradients, n, blocks=24):
    """Products of the gradients of n groups, which come one after another by halves of the continuations, (2, M, D) each."""
    blocks = min(blocks, n)
    for p, halves in enumerate(gradients):
        if p == 0:
            _, M, D = halves.shape
            sums, within = halves.new_zeros(blocks, M, D), halves.new_zeros(blocks, M, M).double()
            squared, groups = halves.new_zeros(blocks, M).double(), torch.zeros(blocks)
        j, mean = p * blocks // n, halves.mean(0)
        sums[j] += mean
        within[j] += mean @ mean.T
        squared[j] += (halves[0] * halves[1]).sum(1)
        groups[j] += 1
    flat = sums.flatten(0, 1)
    return Products((flat @ flat.T).view(blocks, M, blocks, M).double().cpu(), within.cpu(), squared.cpu(), groups)


GRADIENT = "signal|noise|relative noise|cosine of expectation|expected cosine|log equivalent images".split("|")


def gradient_statistics(products, scales, group_size, images=256):
    """Value and error (6, M) of GRADIENT for M methods, of which the first is GRPO.

    products are of 2 M + 1 rows: the methods' gradients, M differences d, and the true policy gradient t, where it is known that
    a method's expected gradient is scale t + E[d], with M scales. So what is known of an unbiased method (d = 0) need not be
    found in its noise; with scale 0 and the gradient itself as d nothing is presumed. signal is the squared norm of a group's
    expected gradient; noise its variance, summed over all directions; relative noise is noise at equal scale, over GRPO's. Both
    cosines are with t, the expected one that of an average over `images`. The last is the log of the number of images that give
    GRPO the same expected cosine, infinite if none do.
    """
    M = len(scales)

    def statistic(kept):
        n, across = products.groups[kept].sum(), products.across[kept][:, :, kept].sum((0, 2))
        mean = (across - products.within[kept].sum(0)) / (n * (n - 1))  # (2 M + 1, 2 M + 1) from pairs of different groups
        true, d_true, d_d = mean[-1, -1], mean[M:-1, -1], mean.diag()[M:-1]
        along = scales * true + d_true
        signal = scales**2 * true + 2 * scales * d_true + d_d
        noise = products.squared[kept].sum(0)[:M] / n - signal
        spread = signal + noise * group_size / images  # mean squared norm of an average over `images`
        need = noise[0] / ((along[0] / along) ** 2 * spread - signal[0])  # groups
        equivalent = torch.where(along / along[0] > 0, torch.where(need > 0, need, torch.inf) * group_size, 0.0)
        relative, cosine, expected = noise / scales**2 / (noise[0] / scales[0] ** 2), along / signal.sqrt(), along / spread.sqrt()
        return torch.stack([signal, noise, relative, cosine / true.sqrt(), expected / true.sqrt(), equivalent.log()])

    return jackknife(statistic, len(products.groups))
