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
from scipy import stats
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


CREDIT = "share|correlation|slope|wrong signs|wrong above|wrong below".split("|")


def unbiased_product(x, y):
    """The mean product of different parts (M, ...) of x and y: their product without the variance of the sampling."""
    return (x.sum(0) * y.sum(0) - (x * y).sum(0)) / (len(x) * (len(x) - 1))


def credit_statistics(credit, delta, group_size):
    """How credit (M, B, K) knows the true delta (M, B, K), both by parts and centred: value, error (6, K + 1) of CREDIT.

    The last column takes all steps together. With the reward as credit, share is the step's of its variance. slope is that of
    credit on delta; of unbiased credit it is the same at every step. Wrong signs are of all credit, of what is above and what is
    below 0: with p counted, arccos(cos(pi p) / sqrt(reliability of delta)) / pi, which is exact for Gaussians; they are not given
    of credit that is itself estimated by parts.
    """
    mean, by_parts = delta.mean(0), (credit[0] != credit[1]).any()
    wrong = (1 - credit[0].sign() * mean.sign()) / 2  # a tie is half wrong
    above, below = (credit[0] > 0).to(mean), (credit[0] < 0).to(mean)
    moments = [unbiased_product(x, y) for x, y in ((credit, delta), (credit, credit), (delta, delta))]
    moments = torch.stack([*moments, mean**2, above * wrong, above, below * wrong, below], 1).double()  # (B, 8, K)
    moments = torch.cat([moments, moments.sum(2, keepdim=True)], 2).unflatten(0, (-1, group_size)).mean(1)

    def statistic(kept):
        cross, own, true, raw_true, wrong_above, above, wrong_below, below = moments[kept].mean(0)
        p = torch.stack([(wrong_above + wrong_below) / (above + below), wrong_above / above, wrong_below / below])
        p = torch.arccos((torch.cos(torch.pi * p) * (raw_true / true).sqrt()).clamp(-1, 1)) / torch.pi
        rows = torch.stack([true / own[:-1].mean(), cross / (own * true).sqrt(), cross / true])
        return torch.cat([rows, torch.nan * p if by_parts else p])

    return jackknife(statistic, len(moments))


def pairwise_covariances(delta, group_size):
    """Covariances (P, S (S - 1) / 2) within each group of the true advantages of two steps, from centred parts (M, B, S).

    Their expectation is 0 in any model, since E[delta_k | x_k] = 0: it follows that shares add up to 1 and that the reward
    correlates with a step's advantage as the root of its share.
    """
    j, k = torch.triu_indices(delta.shape[-1], delta.shape[-1], 1)
    return unbiased_product(delta[..., j], delta[..., k]).double().unflatten(0, (-1, group_size)).mean(1)


def wald_test(rows):
    """p that all means of independent rows (n, p) are 0: Wald's statistic by Hotelling's F, nan if p is not less than n."""
    n, p = rows.shape
    if p >= n:
        return math.nan
    mean = rows.mean(0)
    wald = n * mean @ torch.linalg.solve(rows.T.cov().view(p, p), mean)
    return stats.f.sf(wald.item() * (n - p) / (p * (n - 1)), p, n - p)


# Gradients


def weighted_gradients(layers, log_probs, weights, sides=1):
    """weights (W, Q, n) times the gradients of log_probs() (Q, n) to the weights of Linear layers, summed over both, (W, D).

    A sample's gradient is the sum over its tokens of output gradient ⊗ input, which hooks on the layers see for all samples. They
    see as many rows for each of `sides` (2 with classifier-free guidance), of which those after n are not used (sampler.velocity).
    """
    n, grads = weights.shape[2], {}

    def watch(layer, inputs, output):
        def collect(grad):  # of outputs (rows, L, O)
            grad, x = (t.float().view(sides, -1, *t.shape[1:])[:, :n] for t in (grad, inputs[0]))
            grads[layer] = torch.einsum("gnlo,gnli->noi", grad, x).flatten(1)

        output.register_hook(collect)

    hooks, total = [layer.register_forward_hook(watch) for layer in layers], 0
    for w, row in zip(weights.unbind(1), log_probs()):
        row.sum().backward(retain_graph=True)
        total = total + torch.cat([w @ grads[layer] for layer in layers], 1)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        layer.weight.grad = None
    return total


class Products(NamedTuple):
    """Inner products of M rows of gradients, summed over the groups of J blocks that a jackknife leaves out one at a time."""

    across: torch.Tensor  # (J, M, J, M) of the blocks' summed gradients
    within: torch.Tensor  # (J, M, M) of every group's gradient with its own
    squared: torch.Tensor  # (J, M) squared norm of every group's gradient, without the sampling variance of V
    groups: torch.Tensor  # (J,)

    def of_rows(self, index):
        return Products(self.across[:, index][..., index], self.within[:, index][..., index], self.squared[:, index], self.groups)


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


GRADIENT = "signal|noise|relative noise|cosine of expectation|expected cosine|predicted gain|log equivalent images".split("|")


def average(products, kept):
    """Mean inner product (R, R) of the rows' gradients in two different groups of the blocks kept: that of their expectations."""
    n = products.groups[kept].sum()
    return (products.across[kept][:, :, kept].sum((0, 2)) - products.within[kept].sum(0)) / (n * (n - 1))


def gradient_statistics(products, M, group_size, images):
    """Value and error (7, M) of GRADIENT for M methods, of which the first is GRPO.

    products are of rows: the methods' gradients, M gradients that have the same expectations (the less noise, the better), the true
    policy gradient, and any others. signal is the squared norm of a group's expected gradient; noise its variance, summed over
    all directions; relative noise is noise over signal, over GRPO's. Both cosines are with the true gradient, the expected one
    that of an average over `images`. Over GRPO's it is the predicted gain: AdamW's steps have a size of their own, so progress
    goes with their direction. The last is the log of the number of images that give GRPO the same expected cosine, infinite if
    none do; where noise rules it goes with the cosine's square.
    """

    def statistic(kept):
        mean = average(products, kept)
        signal, along, true = mean.diag()[M : 2 * M], mean[M : 2 * M, 2 * M], mean[2 * M, 2 * M]
        noise = products.squared[kept].sum(0)[:M] / products.groups[kept].sum() - signal
        spread = signal + noise * group_size / images  # mean squared norm of an average over `images`
        need = noise[0] / ((along[0] / along) ** 2 * spread - signal[0])  # groups
        equivalent = torch.where(along / along[0] > 0, torch.where(need > 0, need, torch.inf) * group_size, 0.0)
        relative = torch.where(signal > 0, noise / signal, torch.nan)
        cosine, expected = along / signal.sqrt(), along / spread.sqrt()
        rows = [signal, noise, relative / relative[0], cosine / true.sqrt(), expected / true.sqrt(), expected / expected[0]]
        return torch.stack([*rows, equivalent.log()])

    return jackknife(statistic, len(products.groups))


def noise_shares(products, whole, parts):
    """Share (S,) of the row `whole`'s noise that each of the rows `parts`, whose sum it is, makes, and its error."""

    def statistic(kept):
        covariance = products.within[kept].sum(0) / products.groups[kept].sum() - average(products, kept)
        return covariance[parts, whole] / covariance[parts, whole].sum()

    return jackknife(statistic, len(products.groups))
