"""Part 1: the likelihood of a step."""

import math

import torch

from checks import finite_differences, formula, gradient, holds, is_well_behaved, randn, same, worth

KERNELS = ("flow", "dance", "cps", "ddim")
SIGMA, SIGMA_NEXT = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64), torch.tensor([0.8, 0.45, 0.2], dtype=torch.float64)


def column(values):
    return values.view(-1, 1, 1)


@worth(2)
def test_posterior_mean(s):
    """posterior_mean finds the image at the end of a straight path"""
    image, noise = randn(3, 2, 4), randn(3, 2, 4, seed=1)
    x, v = (1 - column(SIGMA)) * image + column(SIGMA) * noise, noise - image
    mistakes = {
        "x + sigma v: the velocity points from the image to the noise, so go against it": x + column(SIGMA) * v,
        "x + (1 - sigma) v, which is the noise at the other end of the path": noise,
        "x - v: at noise level sigma only sigma of the path is left": x - v,
    }
    same("posterior_mean", s.posterior_mean(v, x, SIGMA), image, mistakes)


@worth(1)
def test_without_noise(s):
    """With eta = 0 every kernel is the Euler step of the ODE"""
    x, v, dt = randn(3, 2, 4), randn(3, 2, 4, seed=1), column(SIGMA_NEXT - SIGMA)
    mistakes = {"a step with the wrong sign of dt: dt = sigma_next - sigma is negative": x - v * dt}
    for sde in KERNELS:
        mean, std = s.sde_step(v, x, SIGMA, SIGMA_NEXT, 0.9, 0.0, sde)
        same(f"std of {sde} at eta = 0", std, torch.zeros(3, 1, 1))
        same(f"mean of {sde} at eta = 0", mean, x + v * dt, mistakes)


def std_of(s, sde, eta=0.7):
    return s.sde_step(randn(3, 2, 4), randn(3, 2, 4), SIGMA, SIGMA_NEXT, 0.9, eta, sde)[1]


@worth(2)
def test_std_of_flow_and_dance(s):
    """The std of flow and dance: noise in proportion to the root of the time step"""
    dt, a = column(SIGMA_NEXT - SIGMA), 0.7 * column(SIGMA / (1 - SIGMA)).sqrt()
    mistakes = {
        "the variance: std is its square root": a**2 * -dt,
        "a * (-dt) without the square root of -dt": a * -dt,
        "eta is missing": a / 0.7 * (-dt).sqrt(),
        "sigma / (1 - sigma) without its square root": a**2 / 0.7 * (-dt).sqrt(),
    }
    same("std of flow", std_of(s, "flow"), a * (-dt).sqrt(), mistakes)
    mistakes = {"the variance: std is its square root": 0.49 * -dt, "eta * (-dt) without the square root of -dt": 0.7 * -dt}
    same("std of dance", std_of(s, "dance"), 0.7 * (-dt).sqrt(), mistakes)


@worth(2)
def test_std_of_cps_and_ddim(s):
    """The std of cps and ddim: a share of the noise level that is reached"""
    sigma, sigma_next, angle = column(SIGMA), column(SIGMA_NEXT), 0.7 * math.pi / 2
    mistakes = {
        "sigma in place of sigma_next: the noise must fit the level that the step reaches": sigma * math.sin(angle),
        "the sine is missing": sigma_next * angle,
        "the variance: std is its square root": (sigma_next * math.sin(angle)) ** 2,
    }
    same("std of cps", std_of(s, "cps"), sigma_next * math.sin(angle), mistakes)
    mistakes = {
        "sigma in place of sigma_next: the noise must fit the level that the step reaches": 0.7 * sigma * (1 - sigma).sqrt(),
        "1 - sigma without its square root": 0.7 * sigma_next * (1 - sigma),
        "the variance: std is its square root": 0.49 * sigma_next**2 * (1 - sigma),
    }
    same("std of ddim", std_of(s, "ddim"), 0.7 * sigma_next * (1 - sigma).sqrt(), mistakes)


@worth(2)
def test_mean_of_flow_and_dance(s):
    """The mean of flow and dance: the Euler step, and a drift towards the image that makes up for the noise"""
    image, noise = randn(3, 2, 4), randn(3, 2, 4, seed=1)
    x, v, dt = (1 - column(SIGMA)) * image + column(SIGMA) * noise, noise - image, column(SIGMA_NEXT - SIGMA)
    for sde in ("flow", "dance"):
        mean, std = s.sde_step(v, x, SIGMA, SIGMA_NEXT, 0.9, 0.7, sde)
        strength = std**2 / (2 * column(SIGMA))
        drift = strength * noise  # over a step of length -dt it removes the variance that the noise adds
        mistakes = {
            "the ODE's step: what the noise adds to the variance must be taken away by a drift": x + v * dt,
            "the drift has the wrong sign: it leads away from the image": x + v * dt + drift,
            "x0_hat in place of x1_hat in the drift: it leads away from the noise": x + v * dt - strength * image,
            "the drift is twice as strong as it should be: the factor 1/2 is missing": x + v * dt - 2 * drift,
            "a step with the wrong sign of dt: dt = sigma_next - sigma is negative": x - v * dt + drift,
        }
        same(f"mean of {sde}", mean, x + v * dt - drift, mistakes)


@worth(2)
def test_mean_of_cps_and_ddim(s):
    """The mean of cps and ddim: the coefficients of image and noise are those of the level that is reached"""
    image, noise = randn(3, 2, 4), randn(3, 2, 4, seed=1)
    x, v, n = (1 - column(SIGMA)) * image + column(SIGMA) * noise, noise - image, column(SIGMA_NEXT)
    for sde in ("cps", "ddim"):
        mean, std = s.sde_step(v, x, SIGMA, SIGMA_NEXT, 0.9, 0.7, sde)
        mistakes = {
            "the full sigma_next of old noise is kept, so that the new noise comes on top of it": (1 - n) * image + n * noise,
            "sigma_next - std: variances add, not stds, so the rest is the root of sigma_next² - std²": (1 - n) * image
            + (n - std) * noise,
            "image and noise exchanged": (1 - n) * noise + (n**2 - std**2).sqrt() * image,
            "the image has the coefficient of sigma, not of sigma_next": (1 - column(SIGMA)) * image
            + (n**2 - std**2).sqrt() * noise,
        }
        same(f"mean of {sde}", mean, (1 - n) * image + (n**2 - std**2).sqrt() * noise, mistakes)


@worth(1)
def test_first_step(s):
    """At sigma = 1, where flow is singular and ddim has no noise, sigma_max stands in"""
    x, one, n = randn(2, 3), torch.ones(2, dtype=torch.float64), torch.full((2,), 0.9, dtype=torch.float64)
    for sde, expected in (("flow", 0.5 * math.sqrt(1 / (1 - 0.9)) * math.sqrt(0.1)), ("ddim", 0.5 * 0.9 * math.sqrt(1 - 0.9))):
        mean, std = s.sde_step(x, x, one, n, 0.9, 0.5, sde)
        holds(std.isfinite().all() and mean.isfinite().all(), f"{sde} is not finite at sigma = 1: use sigma_max in 1 - s there")
        mistakes = {"there is no noise at sigma = 1: use sigma_max in 1 - s there": torch.zeros(2, 1)}
        if sde == "flow":  # in the table sigma stays in the numerator
            mistakes["sigma_max is in the numerator too: it stands in for s alone"] = torch.full((2, 1), 0.5 * 0.9**0.5)
        same(f"std of {sde} at sigma = 1", std, torch.full((2, 1), expected), mistakes)


@worth(1)
def test_marginals(s):
    """Simulated with an exactly known flow, 10,000 samples end with the mean and std of the data"""
    m, spread, n = 0.7, 0.5, 10_000
    generator = torch.Generator().manual_seed(7)
    for sde in KERNELS:  # a few rows first: n x n numbers of a wrong broadcast would fill the memory
        few = torch.zeros(3, 1, dtype=torch.float64)
        mean, std = s.sde_step(few, few, SIGMA, SIGMA_NEXT, 0.9, 0.5, sde)
        reshape = "sigma (3,) was broadcast along the rows; reshape it to (3, 1)"
        holds(mean.shape == std.shape == (3, 1), f"{sde} gives {tuple(mean.shape)} for x of shape (3, 1): {reshape}")
    for sde, eta, T in (("flow", 0.7, 160), ("dance", 0.7, 160), ("cps", 0.5, 160), ("ddim", 0.3, 160)):
        u = torch.linspace(1, 0, T + 1, dtype=torch.float64)
        sigmas = 3 * u / (1 + 2 * u)
        x = torch.randn(n, 1, generator=generator, dtype=torch.float64)
        if sde in ("cps", "ddim"):
            spread = 0.0  # these keep the levels exactly where the image is known exactly
        for k in range(T):
            sigma = sigmas[k].item()
            variance = (1 - sigma) ** 2 * spread**2 + sigma**2
            centred = x - (1 - sigma) * m
            v = sigma / variance * centred - (m + (1 - sigma) * spread**2 / variance * centred)
            step = (sigmas[k].expand(n), sigmas[k + 1].expand(n), sigmas[1].item(), eta if k < T - 1 else 0.0, sde)
            mean, std = s.sde_step(v, x, *step)
            x = mean + std * torch.randn(n, 1, generator=generator, dtype=torch.float64)
        off = abs(x.mean().item() - m), abs(x.std().item() - spread)
        holds(max(off) < 0.04, f"{sde} ends with mean {x.mean():.3f} and std {x.std():.3f}; the data have {m} and {spread}")


@worth(2)
def test_log_prob(s):
    """log_prob is torch.distributions' log density, averaged over dimensions"""
    x, mean, std = randn(4, 2, 3), randn(4, 2, 3, seed=1), randn(4, 1, 1, seed=2).exp()
    density = lambda mean, std: torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x)
    expected, z2 = density(mean, std).mean((1, 2)), ((x - mean) / std) ** 2
    mistakes = {
        "the sum over the dimensions: take the mean": density(mean, std).sum((1, 2)),
        "one number for the whole batch: average over all dimensions but the first": density(mean, std).mean(),
        "std was taken for the variance: divide by std, and take log std": density(mean, std.sqrt()).mean((1, 2)),
        "log std is missing": expected + std.log().flatten(),
        "log(2 pi) / 2 is missing": expected + math.log(2 * math.pi) / 2,
        "the factor 1/2 before the square is missing": expected - (z2 / 2).mean((1, 2)),
        "the sign is wrong: the density is largest at the mean": -expected,
        "the density itself, not its log": density(mean, std).exp().mean((1, 2)),
    }
    same("log_prob", s.log_prob(x, mean, std), expected, mistakes)


@worth(1)
def test_gradients(s):
    """Gradients flow: autograd agrees with finite differences through step and log-probability"""
    x, x_next = randn(3, 2, 2), randn(3, 2, 2, seed=1)

    def total(v):
        return s.log_prob(x_next, *s.sde_step(v, x, SIGMA, SIGMA_NEXT, 0.9, 0.7, "cps"))

    v = randn(3, 2, 2, seed=2)
    same("gradient of log_prob by the velocity", gradient(total, v), finite_differences(total, v), tolerance=1e-5)


@worth(1)
def test_well_behaved(s):
    """Inputs unchanged, dtype and device kept, bfloat16 computed in float32"""
    v, x, std = randn(3, 2, 4), randn(3, 2, 4, seed=1), randn(3, 1, 1).exp()
    is_well_behaved(s.posterior_mean, v, x, SIGMA)
    is_well_behaved(s.log_prob, x, v, std)
    for sde in KERNELS:
        is_well_behaved(s.sde_step, v, x, SIGMA, SIGMA_NEXT, 0.9, 0.7, sde)
        mean, std = s.sde_step(v.bfloat16(), x.bfloat16(), SIGMA.float(), SIGMA_NEXT.float(), 0.9, 0.7, sde)
        holds(mean.dtype == std.dtype == torch.float32, "sde_step computes in bfloat16, too coarse for a ratio near 1: use float32")


@worth(1)
def test_expected_log_prob(s):
    """Pen and paper: the mean of log_prob over x_next drawn from the step itself"""
    mistakes = {
        lambda std: -math.log(2 * math.pi) / 2 - math.log(std): "the density at the mean: a drawn x_next has E[z²] = 1",
    }
    expected = lambda std: -(1 + math.log(2 * math.pi)) / 2 - math.log(std)
    formula(s, "expected_log_prob", expected, mistakes, std=(0.1, 2))
