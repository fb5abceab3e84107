"""The ratio after one update, measured: the tables of docs/ratio.md.

    python grpo.py --iterations 1 --updates 1 --sde cps --eta 0.8 --ode-steps 1 --beta 0 --eval-images 6 --no-compile \\
        --dtype float32 --output-dir runs/one-update
    python -m experiments.ratio --lora runs/one-update

The new policy is the model with that LoRA, the old one the model without it, from which the run started.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import numpy as np
import torch

import arguments
import bookkeeping
import families
import grpo
import machine
import rewards
import sampler


@dataclass
class Args(arguments.Examined):
    steps: int = 6
    """T: denoising steps, of which all but the last are stochastic"""
    sde: sampler.SDE = "cps"
    """transition kernel, see sampler.sde_step"""
    eta: float = 0.8
    """strength of the noise that sampling adds"""
    clip: float = 3e-4
    """eps, whose share of stopped ratios is told"""
    images: int = 256
    """trajectories, a prompt each"""
    draws: int = 32
    """x_next drawn from the old policy at every state"""
    seed: int = 0
    """seed of prompts and noise"""


def predicted_mean(kl, dimensions):
    """Mean of exp(mean log ratio) over x from the old step N(m, std² I), for the new N(m', std² I), from their KL in nats.

    The log ratio, a mean over D dimensions, is Gaussian with mean -KL / D and variance 2 KL / D².
    """
    return torch.exp(-kl / dimensions + kl / dimensions**2)


class Step(NamedTuple):
    """One step of B trajectories of the old policy, and what the update did to it."""

    x: torch.Tensor  # (B, C, H, W)
    sigma: torch.Tensor  # (B,)
    sigma_next: torch.Tensor  # (B,)
    std: torch.Tensor  # a number
    moved: torch.Tensor  # (B, D), by how many stds the update moves the step's mean in each dimension
    log_ratio: torch.Tensor  # (draws, B), of fresh x_next from the old policy

    @property
    def kl(self):
        """(B,), in nats, of the whole step: a sum over dimensions."""
        return (self.moved**2).sum(1) / 2


def trajectory(pipe, args, text, shape):
    """The trained steps, a list of Step, of a rollout of the old policy on latents of a shape (C, H, W)."""
    generator = torch.Generator().manual_seed(args.seed)
    sigmas = sampler.schedule(pipe, args.steps, args.device)
    x, steps = torch.randn(args.images, *shape, generator=generator).to(args.device), []
    for k in range(args.steps - 1):
        sigma, sigma_next = sigmas[k].expand(len(x)), sigmas[k + 1].expand(len(x))
        kernel = (sigma, sigma_next, sigmas[1].item(), args.eta, args.sde)
        with families.adapter_off(pipe):
            mean_old, std = sampler.sde_step(velocity(pipe, args, x, sigma, text).double(), x.double(), *kernel)
        mean_new, _ = sampler.sde_step(velocity(pipe, args, x, sigma, text).double(), x.double(), *kernel)
        log_ratios = []
        for _ in range(args.draws):
            x_next = mean_old + std * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(args.device)
            log_ratios.append(grpo.log_prob(x_next, mean_new, std) - grpo.log_prob(x_next, mean_old, std))
        moved = ((mean_new - mean_old) / std).flatten(1)
        steps.append(Step(x, sigma, sigma_next, std.flatten()[0], moved, torch.stack(log_ratios)))
        x = x_next.float()
    return steps


@torch.no_grad()
def velocity(pipe, args, x, sigma, text, batch=None):
    """Velocity (B, C, H, W), `batch` rows at a time (None: all)."""
    rows = torch.arange(len(x)).split(batch or len(x))
    return torch.cat([sampler.velocity(pipe, x[r], sigma[r], text.rows(r), args) for r in rows])


def table(*rows):
    """Prints rows of cells, columns aligned."""
    width = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    print(*("  ".join(str(cell).rjust(w) for cell, w in zip(row, width)) for row in rows), sep="\n", end="\n\n")


def outside(log_ratio, clip):
    return f"{(log_ratio.expm1().abs() > clip).double().mean():.1%}"


def by_step(steps, clip):
    """What one update does to every step's ratio, and what the formulas say."""
    D = steps[0].moved.shape[1]
    yield "step", "std", "d", "KL", "mean ratio - 1", "formula", "std of log ratio", "d/sqrt(D)", "outside", "sum's ratio"
    for k, step in enumerate(steps):
        kl, log_ratio, d = step.kl, step.log_ratio, (step.moved**2).mean().sqrt()
        error = (log_ratio.exp() - predicted_mean(kl, D)).std() / log_ratio.numel() ** 0.5
        mean, of_sum = f"{log_ratio.expm1().mean():.2e} ± {error:.0e}", (D * log_ratio).exp()
        row = k, f"{step.std:.3f}", f"{d:.4f}", f"{kl.mean():.3f}", mean, f"{predicted_mean(kl, D).mean() - 1:.2e}"
        row += f"{log_ratio.std():.2e}", f"{d / D**0.5:.2e}", outside(log_ratio, clip)
        yield *row, f"{of_sum.mean():.3f} ± {of_sum.std():.3f}"


def by_size(sizes, k, clip):
    """The same update at step k on latents of other sizes, and the clip that stops as many ratios as `clip` at the first size."""
    yield "latents", "D", "d", "std of log ratio", "d/sqrt(D)", "outside", "equal clip", "clip sqrt(D0/D)"
    D0 = share = None
    for side, steps in sizes.items():
        moved, log_ratio = steps[k].moved, steps[k].log_ratio
        D, d, distance = moved.shape[1], (moved**2).mean().sqrt(), log_ratio.expm1().abs().flatten()
        D0, share = D0 or D, share or (distance > clip).double().mean()
        row = f"{side} x {side}", D, f"{d:.4f}", f"{log_ratio.std():.2e}", f"{d / D**0.5:.2e}", outside(log_ratio, clip)
        yield *row, f"{distance.quantile(1 - share):.1e}", f"{clip * (D0 / D) ** 0.5:.1e}"


def by_weight(steps, sigmas, clip):
    """Std of the weighted log ratio of every step, and the share outside the clip."""
    std, dt = torch.stack([step.std for step in steps]), sigmas.diff()[: len(steps)].double().cpu()
    yield "weights", *(f"step {k}: w, std, outside" for k in range(len(steps)))
    for kind in get_args(sampler.STEP_WEIGHTS):
        cells = []
        for w, step in zip(sampler.step_weights(kind, std, dt), steps):
            cells.append(f"{w:.2f}, {w * step.log_ratio.std():.1e}, {outside(w * step.log_ratio, clip)}")
        yield kind, *cells


def by_rounding(pipes, args, text, steps, kernel):
    """How far a policy is from itself where precision or batch differ: the largest |ratio - 1| and the share outside the clip."""
    whole, part = args.images, args.images // 6 + 1

    def distribution(step, dtype, batch):
        v = velocity(pipes[dtype], replace(args, dtype=dtype), step.x, step.sigma, text, batch)
        return sampler.sde_step(v, step.x, step.sigma, step.sigma_next, *kernel)

    yield "sampling", "training", *(f"step {k}" for k in range(len(steps)))
    for sampled, trained in (
        (("bfloat16", whole), ("bfloat16", whole)),
        (("bfloat16", whole), ("bfloat16", part)),
        (("bfloat16", whole), ("float32", whole)),
    ):
        cells = []
        for step in steps:
            (mean, std), (mean_again, _) = distribution(step, *sampled), distribution(step, *trained)
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(args.seed))
            x_next = mean + std * noise.to(args.device)
            log_ratio = grpo.log_prob(x_next, mean_again, std) - grpo.log_prob(x_next, mean, std)
            cells.append(f"{log_ratio.expm1().abs().max():.0e}, {outside(log_ratio, args.clip)}")
        yield *(f"{dtype}, {rows} rows" for dtype, rows in (sampled, trained)), *cells


def main():
    args = arguments.parse_examined(Args, __doc__)
    if not args.lora:
        arguments.fail("--lora is missing: name the folder of the run of one update")
    arguments.check_model_and_reward(args)
    machine.resolve_device(args)
    args.gradient_checkpointing, pipes = False, {}
    for args.dtype in ("bfloat16", "float32"):
        pipes[args.dtype] = pipe = bookkeeping.load(args)
    prompts = rewards.sample_prompts(rewards.prompt_set(args)[0], args.images, np.random.default_rng(args.seed))
    text, sigmas = sampler.encode(pipe, prompts, args), sampler.schedule(pipe, args.steps, args.device)
    C, side, _ = sampler.latent_shape(pipe)
    sizes = {n: trajectory(pipe, args, text, (C, n, n)) for n in (side, side // 2, side // 4)}
    print(f"One update, {args.images} states and {args.draws} draws a step; outside: the share of ratios beyond 1 ± {args.clip:g}")
    table(*by_step(sizes[side], args.clip))
    table(*by_size(sizes, (args.steps - 1) // 2, args.clip))
    table(*by_weight(sizes[side], sigmas, args.clip))
    table(*by_rounding(pipes, args, text, sizes[side], (sigmas[1].item(), args.eta, args.sde)))


if __name__ == "__main__":
    main()
