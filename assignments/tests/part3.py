"""Part 3: ratio and clip."""

import math

import torch

import bugs
from checks import answer, finite_differences, formula, gradient, holds, is_well_behaved, randn, same, worth


@worth(1)
def test_ratio_starts_at_one(s):
    """Before the first update the ratio is exactly 1"""
    log_prob = randn(4, 5)
    same(
        "ratio of equal log-probabilities",
        s.ratio(log_prob, log_prob),
        torch.ones(4, 5),
        {"the log of the ratio": torch.zeros(4, 5)},
    )
    holds((s.ratio(log_prob, log_prob.clone()) == 1).all(), "the ratio is only near 1: subtract first, then take exp")


@worth(1)
def test_ratio(s):
    """ratio is that of the probabilities"""
    new, old = randn(4, 5), randn(4, 5, seed=1)
    mistakes = {
        "old over new": (old - new).exp(),
        "the log of the ratio: exp is missing": new - old,
        "the quotient of the log-probabilities": new / old,
        "the ratio of whole trajectories: every step has its own": (new - old).sum(1).exp(),
    }
    same("ratio", s.ratio(new, old), new.exp() / old.exp(), mistakes)


RATIOS = torch.tensor([1.3, 0.7, 1.3, 0.7, 1.05, 0.95, 1.05, 0.95], dtype=torch.float64)
ADVANTAGES = torch.tensor([2.0, 2, -2, -2, 2, 2, -2, -2], dtype=torch.float64)


def value(ratio, low=0.9, high=1.1, take=torch.maximum):
    return take(-ADVANTAGES * ratio, -ADVANTAGES * ratio.clamp(low, high))


@worth(2)
def test_clipped_loss(s):
    """clipped_loss: too far in the good direction is worth no more, too far in the bad one still costs"""
    mistakes = {
        "the clip on one side only: ratios below 1 - clip are not clipped": value(RATIOS, low=0),
        "the clip on one side only: ratios above 1 + clip are not clipped": value(RATIOS, high=9),
        "the smaller of the two losses: the objective takes the smaller objective, so the loss the larger": value(
            RATIOS, take=torch.minimum
        ),
        "the ratio is always clipped: without the max a step that went wrong can never come back": -ADVANTAGES
        * RATIOS.clamp(0.9, 1.1),
        "the ratio is never clipped": -ADVANTAGES * RATIOS,
        "clamped to ±clip instead of 1 ± clip": value(RATIOS, -0.1, 0.1),
        "the sign is wrong: this is the objective, an optimizer minimizes the loss": -value(RATIOS),
    }
    got = s.clipped_loss(RATIOS, ADVANTAGES, 0.1)
    holds(getattr(got, "shape", None) != (), "clipped_loss looks like a mean or sum: give one loss for each ratio")
    same("clipped_loss", got, value(RATIOS), mistakes)


@worth(2)
def test_clip_gradient(s):
    """Autograd agrees with finite differences, and is 0 exactly where the ratio has gone far enough"""
    function = lambda ratio: s.clipped_loss(ratio, ADVANTAGES, 0.1)
    got = gradient(function, RATIOS)
    same("gradient of clipped_loss", got, finite_differences(function, RATIOS), tolerance=1e-6)
    stopped = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.float64)
    beyond = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0], dtype=torch.float64)
    wrong = {"every ratio beyond the clip: those that moved against their advantage must be able to come back": beyond}
    same("where the gradient of clipped_loss is 0", got == 0, stopped, wrong)


@worth(1)
def test_clip_holds(s):
    """Two hundred updates on one batch leave every ratio at the clip"""
    log_prob, advantages = torch.zeros(40, dtype=torch.float64), randn(40)
    for _ in range(200):
        log_prob -= 0.01 * gradient(lambda new: s.clipped_loss(s.ratio(new[None], 0 * new[None])[0], advantages, 0.1), log_prob)
    ratio = log_prob.exp()
    against = "after 200 updates ratios have moved against their advantages"
    holds(((ratio - 1) * advantages > 0).all(), f"{against}: if another test of ratio fails, mend that; else look for a sign")
    for name, of in (("good", advantages > 0), ("bad", advantages < 0)):
        far = (ratio[of] - 1).abs().max().item()
        holds(
            far < 0.15,
            f"after 200 updates the ratios of {name} samples are up to {far:.2g} from 1: a clip of 0.1 does not hold them",
        )
    holds(((ratio - 1).abs() > 0.04).sum() > 30, "after 200 updates most ratios are still near 1: the gradient stops too early")


@worth(2)
def test_stopped_fraction(s):
    """stopped_fraction counts the samples that the clip keeps from moving on"""
    mistakes = {
        "every ratio beyond the clip is counted: those that moved against their advantage still have a gradient": 0.5,
        "the ratios that are not stopped are counted": 0.75,
        "only ratios above 1 + clip are counted: with a negative advantage the ratio stops below 1 - clip": 0.125,
        "a number of samples, not a share": 2.0,
    }
    same("stopped_fraction", s.stopped_fraction(RATIOS, ADVANTAGES, 0.1), 0.25, mistakes)
    ratios, advantages = (torch.cat([t, torch.tensor(more)]) for t, more in ((RATIOS, [1.3, 0.7]), (ADVANTAGES, [0.0, 0])))
    wrong = {
        "samples of advantage 0 are counted: they have no gradient, clip or not": 0.4,
        "one sample of advantage 0 in two is counted: it has no gradient, clip or not": 0.3,
        "a share of the samples whose advantage is not 0: it is one of all": 0.25,
    }
    same("stopped_fraction with advantages of 0", s.stopped_fraction(ratios, advantages, 0.1), 0.2, wrong)


@worth(1)
def test_well_behaved(s):
    """Inputs unchanged, dtype and device kept"""
    is_well_behaved(s.ratio, randn(4, 5), randn(4, 5, seed=1))
    is_well_behaved(s.clipped_loss, RATIOS, ADVANTAGES, 0.1)
    is_well_behaved(s.stopped_fraction, RATIOS, ADVANTAGES, 0.1)


@worth(1)
def test_log_ratio_mean(s):
    """Pen and paper: the mean of the log ratio of a step after its mean has moved by d stds"""
    mistakes = {
        lambda d, D: d**2 / 2: "the sign is wrong: old samples become less probable on average",
        lambda d, D: -D * d**2 / 2: "the sum over dimensions: log_prob is their mean",
        lambda d, D: 0: "the mean under equal policies: the new mean fits the old samples less well",
        lambda d, D: -(d**2): "the factor 1/2 is missing",
    }
    formula(s, "log_ratio_mean", lambda d, D: -(d**2) / 2, mistakes, d=(0.1, 2), D=(4, 100))


@worth(1)
def test_log_ratio_std(s):
    """Pen and paper: the std of the log ratio, which says how small a clip must be"""
    mistakes = {
        lambda d, D: d**2 / D: "the variance: std is its square root",
        lambda d, D: d * D**0.5: "the sum over dimensions: log_prob is their mean",
        lambda d, D: d: "one dimension's: a mean of D of them varies less",
    }
    formula(s, "log_ratio_std", lambda d, D: d / D**0.5, mistakes, d=(0.1, 2), D=(4, 100))


@worth(1)
def test_mean_ratio(s):
    """Question 4: the mean of the ratio itself"""
    mistakes = {
        lambda KL, D: math.exp(-KL / D): "exp of the mean log ratio: the mean of exp is larger, by half the log ratio's variance",
        lambda KL, D: 1 - KL / D + KL / D**2: "the first terms of its series: the answer is exact",
        lambda KL, D: 1: "the mean of p_new / p_old, the ratio of the sum over dimensions: here the log is a mean over D",
        lambda KL, D: -KL / D: "the mean of the log ratio, not of the ratio",
        lambda KL, D: math.exp(-KL / D + 2 * KL / D**2): "the whole variance of the log ratio: E[exp] takes half of it",
        lambda KL, D: math.exp(-KL + KL / D): "the sum over dimensions in the mean of the log ratio: log_prob is their mean",
        lambda KL, D: math.exp(-KL / D - KL / D**2): "half the variance with the wrong sign: exp is convex, so its mean is larger",
        lambda KL, D: math.exp(KL / D + KL / D**2): "samples of the new policy: they are the old one's",
    }
    formula(s, "mean_ratio", lambda KL, D: math.exp(-KL / D + KL / D**2), mistakes, KL=(0.5, 3), D=(2, 6))


@worth(1)
def test_clip_at_other_size(s):
    """Question 5: the clip for a latent of another size"""
    mistakes = {
        lambda eps, D, D_new: eps: "the same clip: the std of the log ratio depends on the number of dimensions",
        lambda eps, D, D_new: eps * D_new / D: "upside down, without the root: more dimensions vary less",
        lambda eps, D, D_new: eps * math.sqrt(D_new / D): "upside down: the mean of more dimensions varies less",
        lambda eps, D, D_new: eps * D / D_new: "for the same KL of the whole step; here each dimension moves by the same d",
    }
    expected = lambda eps, D, D_new: eps * math.sqrt(D / D_new)
    formula(s, "clip_at_other_size", expected, mistakes, eps=(0.1, 1), D=(4, 50), D_new=(60, 200))


def bug(s, number):
    known, line = bugs.BUGS[number], answer(s, f"bug_{number}_line")
    faulty = known.replacement or known.line
    code = lambda text: "".join(text.split("#")[0].split())
    squeeze = code if known.replacement else lambda text: code(text).split("(")[0]  # of a missing call its name is enough
    repaired = known.replacement and code(line) == code(known.line)
    holds(not repaired, f"bug {number}: this is the line as it should be; give the faulty one, as it stands in bug_{number}.py")
    holds(squeeze(line) == squeeze(faulty), f"bug {number} is not in this line (copy the whole line): {line.strip()!r:.80}")
    symptom = answer(s, f"bug_{number}_symptom").strip().rstrip(".").lower()
    holds(symptom == known.symptom, f"bug {number}: its line is found, but its symptom is not {symptom!r:.10}")


@worth(2)
def test_bug_1(s):
    """Bug 1: its line and its symptom"""
    bug(s, 1)


@worth(2)
def test_bug_2(s):
    """Bug 2: its line and its symptom"""
    bug(s, 2)


@worth(2)
def test_bug_3(s):
    """Bug 3: its line and its symptom"""
    bug(s, 3)
