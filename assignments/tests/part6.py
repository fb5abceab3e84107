"""Part 6: measuring credit."""

import math

import torch

from checks import formula, holds, is_well_behaved, randn, same, worth

STD = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
S = len(STD)


class World:
    """A random walk x_{k+1} = x_k + STD[k] noise whose reward is x_S, so that the value of a state is the state itself."""

    def __init__(self):
        self.generator, self.calls = torch.Generator().manual_seed(0), []

    def transition(self, x, k):
        self.calls.append((len(x), k))
        return x + STD[k] * torch.randn(x.shape, generator=self.generator, dtype=x.dtype)

    def reward(self, x):
        return x[:, 0]


@worth(3)
def test_value(s):
    """value_of_state: the mean reward of independent continuations from step k on"""
    x = torch.tensor([[0.0], [10], [20], [30]], dtype=torch.float64)
    for k in range(S + 1):
        world = World()
        got = s.value_of_state(x, k, S, world.transition, world.reward, 5000)
        holds(getattr(got, "shape", None) == (4,), "value_of_state must give one value for each of the B states")
        steps = [step for _, step in world.calls]
        what = f"value_of_state of states at step {k} of {S}"
        holds(0 not in steps or k == 0, f"{what} starts again at step 0: continue from step k")
        holds(steps or k == S, f"{what} draws no continuation")
        holds(k == S or S - 1 in steps, f"{what} leaves out the last step, {S - 1}")
        holds(k == S or k in steps, f"{what} leaves out step {k} itself, shifted by one step")
        holds(set(steps) == set(range(k, S)), f"{what} takes the steps {sorted(set(steps))}, not {list(range(k, S))}")
        error = 4.5 * STD[k:].norm().item() / math.sqrt(5000) + 1e-9
        holds(abs(got - got.mean()).max() > 1, f"{what} mixes the states: rows of one state must stay together")
        one = "too noisy for a mean over 5000 continuations: are they independent, and as many?"
        holds((got - x[:, 0]).abs().max() < error, f"{what} is off by {(got - x[:, 0]).abs().max():.2g}: {one}")


@worth(1)
def test_true_advantages(s):
    """true_advantages: what a step changed in the value; they add up to R - V(x_0)"""
    values = randn(6, S + 1)
    expected = values.diff(dim=1)
    mistakes = {
        "the sign is wrong: a step that raises the value has a positive advantage": -expected,
        "shifted by one step: step k goes from state k to state k + 1": expected.roll(1, 1),
        "R - V(x_k): all that is still to come, not step k's share": values[:, -1:] - values[:, :-1],
        "R - V(x_0), GRPO's uniform credit": (values[:, -1:] - values[:, :1]).expand(6, S),
        "V(x_{k+1}) - V(x_0): what has come so far": values[:, 1:] - values[:, :1],
    }
    same("true_advantages", s.true_advantages(values), expected, mistakes)
    same("the sum of the true advantages", s.true_advantages(values).sum(1), values[:, -1] - values[:, 0])


@worth(3)
def test_shares(s):
    """variance_shares: exact without noise, and not moved by noise in the estimates"""
    truth = randn(4000, S) * STD
    exact = (truth**2).mean(0) / (truth**2).sum() * len(truth)
    mistakes = {
        "shares of the absolute advantages: a variance is a mean of squares": truth.abs().mean(0) / truth.abs().mean(0).sum(),
        "the mean over trajectories of each one's shares: divide the means": (truth**2 / (truth**2).sum(1, keepdim=True)).mean(0),
        "mean squares that are not divided by their sum": (truth**2).mean(0),
        "shares of each trajectory: take the mean over them": truth**2 / (truth**2).sum(1, keepdim=True),
        "shares of the stds: a variance is a mean of squares": exact.sqrt() / exact.sqrt().sum(),
    }
    same("variance_shares of the true advantages", s.variance_shares(truth, truth), exact, mistakes, tolerance=1e-3)
    first, second = (truth + 2 * randn(4000, S, seed=seed) for seed in (1, 2))
    got = s.variance_shares(first, second)
    same("the sum of the shares", got.sum(), 1.0)
    off = (got - exact).abs().max().item()
    inflated = lambda t: (t**2).mean(0) / (t**2).mean(0).sum()
    noisy = "the noise's own variance is counted: the product of the two estimates has none"
    for kind in (first, second, (first + second) / 2):
        holds(not torch.allclose(got, inflated(kind), atol=1e-6), f"variance_shares looks like squares of noisy estimates: {noisy}")
    holds(off < 0.06, f"variance_shares of noisy estimates is off by {off:.2g}: {noisy}")


@worth(2)
def test_sign_agreement(s):
    """sign_agreement: the share of pairs that point the same way, pairs with a 0 left out"""
    truth = randn(500, S)
    same("agreement of the truth with itself", s.sign_agreement(truth, truth), 1.0)
    same(
        "agreement with the opposite",
        s.sign_agreement(-truth, truth),
        0.0,
        {"a correlation or a mean of products: count the pairs": -1.0},
    )
    advantages = randn(500, S, seed=1) + truth
    advantages[:250, 0] = 0
    product = advantages * truth
    agree, counted = (product > 0).sum().item(), (product != 0).sum().item()
    mistakes = {
        "pairs with a 0 are counted as disagreement: leave them out": agree / product.numel(),
        "pairs with a 0 are counted as agreement: leave them out": (product >= 0).double().mean(),
        "the share of pairs that disagree": 1 - agree / counted,
        "one number for each step: take the share over all pairs": (product > 0).sum(0) / (product != 0).sum(0),
        "the mean of the signs' products, from -1 to 1: the share of agreement goes from 0 to 1": product.sign().sum() / counted,
        "the number of pairs, not their share": agree,
    }
    same("sign_agreement", s.sign_agreement(advantages, truth), agree / counted, mistakes)


@worth(1)
def test_uniform_credit(s):
    """Your functions on a walk: uniform credit agrees with the truth as often as theory says"""
    values = torch.cat([torch.zeros(20_000, 1), randn(20_000, 4)], 1).cumsum(1)  # four steps of equal variance
    truth = s.true_advantages(values)
    uniform = (values[:, -1:] - values[:, :1]).expand_as(truth)
    same(
        "sign agreement of uniform credit, four equal steps",
        s.sign_agreement(uniform, truth),
        0.5 + math.asin(0.5) / math.pi,
        tolerance=0.01,
    )


@worth(1)
def test_well_behaved(s):
    """Inputs unchanged, dtype and device kept"""
    is_well_behaved(s.true_advantages, randn(6, S + 1))
    is_well_behaved(s.variance_shares, randn(6, S), randn(6, S, seed=1))
    is_well_behaved(s.sign_agreement, randn(6, S), randn(6, S, seed=1))
    x, world = randn(3, 1), World()
    before = x.clone()
    s.value_of_state(x, 1, S, world.transition, world.reward, 4)
    holds(torch.equal(x, before), "value_of_state changes an input in place: work on a new tensor")


@worth(1)
def test_gradient_mean(s):
    """Pen and paper: uniform credit is unbiased"""
    wrong = {lambda a, b: a + b: "the credit of step 1 too: its noise has mean 0, so it adds nothing on average"}
    formula(s, "uniform_gradient_mean", lambda a, b: a, wrong, a=(0.5, 2), b=(0.5, 2))


@worth(1)
def test_gradient_variance(s):
    """Pen and paper: uniform credit is noisy"""
    mistakes = {
        lambda a, b: 3 * a**2 + b**2: "the mean square: subtract the square of the mean",
        lambda a, b: a**2 + b**2: "the variance of the reward: multiply by z_0 before",
        lambda a, b: 2 * a**2: "true credit's: uniform credit also carries step 1's noise",
    }
    formula(s, "uniform_gradient_variance", lambda a, b: 2 * a**2 + b**2, mistakes, a=(0.5, 2), b=(0.5, 2))
    of_true = {lambda a, b: 3 * a**2: "the mean square: subtract the square of the mean"}
    formula(s, "true_gradient_variance", lambda a, b: 2 * a**2, of_true, a=(0.5, 2), b=(0.5, 2))


@worth(1)
def test_share(s):
    """Pen and paper: Var(R | x_0) is the sum of the steps' E[A_k²]"""
    mistakes = {
        lambda a, b, c: a**2 / (a**2 + c**2): "z_0 z_1 is missing: it has variance 1 and belongs to step 1",
        lambda a, b, c: (a**2 + b**2) / (a**2 + b**2 + c**2): "b z_0 z_1 is step 1's: before z_1 is drawn its mean is 0",
        lambda a, b, c: a / (a + b + c): "shares of the coefficients: a variance is a mean of squares",
    }
    expected = lambda a, b, c: a**2 / (a**2 + b**2 + c**2)
    formula(s, "share_of_step_0", expected, mistakes, a=(0.5, 2), b=(0.5, 2), c=(0.5, 2))


@worth(1)
def test_agreement(s):
    """Pen and paper: the sign agreement of GRPO's advantage with K equal chunks"""
    mistakes = {
        lambda K: 1 / math.sqrt(K): "the correlation: Sheppard's formula makes a share of equal signs from it",
        lambda K: 2 / math.pi * math.asin(1 / math.sqrt(K)): "the mean of the signs' product, which goes from -1 to 1",
        lambda K: 0.5 + math.asin(1 / K) / math.pi: "the correlation is 1 / sqrt(K), not 1 / K",
    }
    formula(s, "sign_agreement_of_grpo", lambda K: 0.5 + math.asin(1 / math.sqrt(K)) / math.pi, mistakes, K=(1, 20))
