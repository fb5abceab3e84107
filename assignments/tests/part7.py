"""Part 7: a judge that can be fooled."""

import math

import torch
from torch.nn.functional import logsigmoid

from checks import finite_differences, formula, gradient, holds, is_well_behaved, randn, same, worth

SHAPE = (5, 3, 2, 4, 4)  # B, S and the latent's


@worth(3)
def test_bradley_terry(s):
    """bradley_terry: minus the mean log probability of the annotator's answers"""
    preferred, other = 2 * randn(50), 2 * randn(50, seed=1)
    d = preferred - other
    mistakes = {
        "the sign is wrong: the loss falls where the preferred image has the higher score": -logsigmoid(-d).mean(),
        "the log probability itself: a loss is minus that": logsigmoid(d).mean(),
        "the sum over pairs: take the mean": -logsigmoid(d).sum(),
        "one number for each pair: take the mean": -logsigmoid(d),
        "minus the mean difference: the logistic function is missing": -d.mean(),
        "minus the mean probability: the logarithm is missing": -torch.sigmoid(d).mean(),
        "a square loss against probability 1": ((1 - torch.sigmoid(d)) ** 2).mean(),
        "each score through the logistic function by itself: it takes their difference": -logsigmoid(preferred).mean(),
    }
    same("bradley_terry", s.bradley_terry(preferred, other), -logsigmoid(d).mean(), mistakes)
    grad = gradient(lambda x: s.bradley_terry(x, other), preferred)
    by_hand = finite_differences(lambda x: -logsigmoid(x - other).mean(), preferred)
    same("the gradient of bradley_terry", grad, by_hand, tolerance=1e-5)
    far = s.bradley_terry(torch.tensor([-2000.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    overflow = "exp overflows there, softplus or logsigmoid do not"
    holds(math.isfinite(far), f"bradley_terry is {far:g} for scores that differ by 2000: {overflow}")


@worth(3)
def test_path_kl(s):
    """path_kl: of Gaussian steps with equal stds, in nats, summed over steps and dimensions"""
    mean, base, std = randn(*SHAPE), randn(*SHAPE, seed=1), torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    squares = ((mean - base) ** 2).flatten(2)  # (B, S, D)
    per_step = squares.sum(2) / (2 * std**2)
    closed = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std.view(1, 3, 1, 1, 1)), torch.distributions.Normal(base, std.view(1, 3, 1, 1, 1))
    )
    expected = closed.flatten(1).sum(1)
    mistakes = {
        "a mean over dimensions, as in the scripts' loss: nats are a sum": (squares.mean(2) / (2 * std**2)).sum(1),
        "a mean over steps: the path's KL is the sum of its steps'": per_step.mean(1),
        "a mean over steps and dimensions: nats are a sum": (squares.mean(2) / (2 * std**2)).mean(1),
        "divided by std² and not by 2 std²": 2 * per_step.sum(1),
        "divided by 2 std: the variance is std²": (squares.sum(2) / (2 * std)).sum(1),
        "the std is missing": squares.sum((1, 2)) / 2,
        "distances without the square": (squares.sum(2).sqrt() / (2 * std**2)).sum(1),
        "one number for each step: add them up": per_step,
        "the mean over trajectories: give one number for each": expected.mean(),
    }
    same("path_kl", s.path_kl(mean, base, std), expected, mistakes)
    same("path_kl of a policy that has not moved", s.path_kl(mean, mean, std), torch.zeros(5))


@worth(2)
def test_best_of_n(s):
    """best_of_n: the mean gold of the judge's favourites"""
    scores, gold = randn(40, 6), randn(40, 6, seed=1)
    favourite = gold.gather(1, scores.argmax(1, keepdim=True)).mean()
    mistakes = {
        "the best gold: the judge chooses, not the truth": gold.amax(1).mean(),
        "the judge's own score of its favourites: the gold is asked for": scores.amax(1).mean(),
        "the mean gold of all images: nothing was chosen": gold.mean(),
        "the judge's least favourites": gold.gather(1, scores.argmin(1, keepdim=True)).mean(),
        "the gold of one favourite among all captions: each caption has its own": gold.flatten()[scores.argmax()],
        "one number for each caption: take the mean": gold.gather(1, scores.argmax(1, keepdim=True)).squeeze(1),
    }
    same("best_of_n", s.best_of_n(scores, gold), favourite, mistakes)
    same("best_of_n of one image", s.best_of_n(scores[:, :1], gold[:, :1]), gold[:, 0].mean())


@worth(1)
def test_well_behaved(s):
    """Inputs unchanged, dtype and device kept"""
    is_well_behaved(s.bradley_terry, randn(6), randn(6, seed=1))
    is_well_behaved(s.path_kl, randn(*SHAPE), randn(*SHAPE, seed=1), randn(3, seed=2).abs() + 0.1)
    is_well_behaved(s.best_of_n, randn(6, 4), randn(6, 4, seed=1))


@worth(1)
def test_gradient(s):
    """Pen and paper: the gradient of Bradley and Terry's loss"""
    mistakes = {
        lambda d: -1 / (1 + math.exp(-d)): "that pulls hardest where the judge is sure: take the probability of the other answer",
        lambda d: 1 / (1 + math.exp(d)): "the sign is wrong: a step against the gradient raises the preferred score",
        lambda d: -1: "the gradient of -d: the logistic function is missing",
    }
    formula(s, "bradley_terry_gradient", lambda d: -1 / (1 + math.exp(d)), mistakes, d=(-2, 2))


@worth(2)
def test_best_of_n_kl(s):
    """Pen and paper: how far best-of-n is from the model that it draws from"""
    mistakes = {
        lambda n: math.log(n): "as if each image could be drawn once only: the favourite's rank is not fixed",
        lambda n: math.log(n) + (n - 1) / n: "the sign of the second term is wrong: E[log u] is negative",
        lambda n: (n - 1) * math.log(n): "E[log u] is -1 / n where u has the density n u^(n - 1), not -log(n)",
        lambda n: math.log(n) - 1: "the limit for large n of the second term only",
    }
    formula(s, "best_of_n_kl", lambda n: math.log(n) - (n - 1) / n, mistakes, n=(2, 64))
