"""Draws one image's way from noise, how each method shares its reward among the steps, and what each step was really worth.

    python -m experiments.trajectory                              # docs/trajectory.png, the miniature without LoRA
    python -m experiments.trajectory --lora runs/grpo__... --output runs/trajectory.png

The image is one of an iteration's rollout, --trajectory of it, chosen since a single step decides it; in others several steps do.
The truth is delta_k = V(x_{k+1}) - V(x_k), where the value V(x_k) is the mean reward of --continuations fresh ends that are drawn
from the state x_k (estimates.py).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch

import arguments
import bookkeeping
import gcpo
import grpo
import machine
import rewards
import sampler
import stepwise_grpo
from experiments import estimates

matplotlib.use("Agg")
import matplotlib.pyplot as plt

UP, DOWN = "#2b7a3d", "#b5402f"


@dataclass
class Args(arguments.Examined):
    steps: int = 6
    """T: denoising steps"""
    ode_steps: int = 1
    """the last of these T follow the ODE; the S before them are stochastic"""
    eta: float = 0.8
    """strength of the noise that sampling adds"""
    sde: sampler.SDE = "cps"
    """transition kernel, see sampler.sde_step"""
    max_chunk: int = 2
    """adaptive chunks are at most this long, see gcpo.py"""
    prompts: int = 16
    """P: prompts of the rollout"""
    group_size: int = 16
    """G: images per prompt, from the same initial noise"""
    trajectory: int = 226
    """which of the rollout's P G images is drawn"""
    continuations: int = 256
    """fresh ends drawn from every state to estimate its value"""
    seed: int = 0
    """seed of everything"""
    output: Path = Path("docs/trajectory.png")
    """the picture"""


def parse_args():
    args = arguments.parse_examined(Args, __doc__)
    arguments.check_model_and_reward(args)
    if args.steps - args.ode_steps < 2 or args.ode_steps < 1:
        machine.fail(f"--steps {args.steps} must be at least 2 more than --ode-steps {args.ode_steps}, and that at least 1")
    if min(args.prompts, args.max_chunk, args.micro_batch) < 1 or min(args.group_size, args.continuations) < 2:
        machine.fail("--group-size and --continuations must be at least 2; --prompts, --max-chunk and --micro-batch at least 1")
    if not 0 <= args.trajectory < args.prompts * args.group_size:
        machine.fail(
            f"--trajectory {args.trajectory} must be from 0 to {args.prompts * args.group_size - 1}, an image of the rollout"
        )
    bookkeeping.require_writable(args.output.parent)
    return args


def show(axis, latent, pipe, title):
    axis.imshow(sampler.decode(pipe, latent[None])[0].permute(1, 2, 0))
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_title(title, pad=3)


def bars(axis, heights, name, errors=None):
    """A bar for each step between its two states, with its figure."""
    steps = np.arange(len(heights)) + 0.5
    axis.bar(steps, heights, 0.5, yerr=errors, color=[UP if h > 0 else DOWN for h in heights], error_kw=dict(linewidth=1))
    reach = max(abs(h) + (0 if errors is None else e) for h, e in zip(heights, errors or heights)) or 1
    for k, height in enumerate(heights):
        error = errors[k] if errors else 0
        side = 1 if height >= 0 else -1
        label = f"{height:+.2f}".replace("-", "−")
        axis.text(k + 0.5, height + side * (error + 0.06 * reach), label, ha="center", va="bottom" if side > 0 else "top")
    axis.axhline(0, color="black", linewidth=0.8)
    low, high = min(0, *heights), max(0, *heights)
    axis.set(xlim=(-0.5, len(heights) + 0.5), xticks=[], yticks=[])
    axis.set_ylim(low - (0.75 if low < 0 else 0.1) * reach, high + (0.75 if high > 0 else 0.1) * reach)
    axis.spines[:].set_visible(False)
    axis.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=4)
    for k in range(len(heights) + 1):
        axis.axvline(k, color="black", alpha=0.12, linewidth=0.8)


if __name__ == "__main__":
    args = parse_args()
    args.gradient_checkpointing = False
    machine.resolve_device(args)
    torch.compiler.set_stance("force_eager")
    pipe, G, S = bookkeeping.load(args), args.group_size, args.steps - args.ode_steps
    prompts = rewards.sample_prompts(rewards.prompt_set(args)[0], args.prompts, np.random.default_rng((args.seed, 0)))
    text, sigmas = sampler.encode(pipe, prompts, args), sampler.schedule(pipe, args.steps, args.device)
    score = rewards.build(args.reward).score
    world = estimates.World(
        lambda x, sigma, prompt: sampler.velocity(pipe, x, sigma, text.rows(prompt), args),
        lambda x, prompt: score(sampler.decode(pipe, x), [prompts[p] for p in prompt]),
        sigmas,
        args.eta,
        args.sde,
        args.ode_steps,
    )

    # Roll out as a training iteration does, and judge all images and all states of the group that is drawn
    generator = torch.Generator().manual_seed(args.seed)
    prompt = torch.arange(args.prompts).repeat_interleave(G).to(args.device)
    start = torch.randn(args.prompts, *sampler.latent_shape(pipe, args.resolution), generator=generator).to(args.device)[prompt]
    parts = [
        estimates.roll_out(world, start[b], 0, prompt[b], generator) for b in torch.arange(len(prompt)).split(args.micro_batch)
    ]
    states, velocities, ends = (torch.cat(part) for part in zip(*parts))
    scores = world.reward(ends, prompt)
    first = args.trajectory // G * G
    group, b = range(first, first + G), args.trajectory - first
    x, v, text_of = states[group], velocities[group], text.rows(prompt[group])
    estimated = [stepwise_grpo.estimate_x0(pipe, x[:, k], v[:, k], k, sigmas, text_of, 1, args) for k in range(S)] + [ends[group]]
    R = torch.stack([world.reward(estimate, prompt[group]) for estimate in estimated], 1)

    # What each method rewards the steps of this image with, and the truth
    A = grpo.group_advantages(scores, G, global_std=True)[args.trajectory].item()
    plan = gcpo.adaptive_chunks(gcpo.relative_distance(x)[b].tolist(), args.max_chunk)
    weights = [S / (len(plan) * size) for size in plan for _ in range(size)]
    gain_advantages = stepwise_grpo.gain_advantages(stepwise_grpo.gains(R), G)[b].tolist()
    V, _ = estimates.values(
        world, x[b : b + 1], R[b, -1:], prompt[group][b : b + 1], 1, args.continuations, generator, args.micro_batch
    )
    V = V[:, 0].double()  # (M, S + 1); V(x_S) is the image's own reward
    V, variance = V.mean(0), V.var(0) / len(V)
    delta, error = (V[1:] - V[:-1]).tolist(), (variance[1:] + variance[:-1]).sqrt().tolist()

    plt.rcParams.update({"font.size": 8.5, "axes.titlesize": 8.5, "axes.labelsize": 8.5})
    figure = plt.figure(figsize=(8.3, 7.2))
    grid = figure.add_gridspec(
        6,
        S + 1,
        height_ratios=(1.5, 1.5, 0.8, 1.0, 1.1, 1.25),
        left=0.17,
        right=0.995,
        top=0.93,
        bottom=0.055,
        hspace=0.22,
        wspace=0.08,
    )
    figure.text(0.5825, 0.992, f'"{prompts[prompt[args.trajectory]]}"', ha="center", va="top", fontsize=10)
    for k in range(S + 1):
        top = "noise $x_0$" if k == 0 else f"$x_{k}$"
        show(figure.add_subplot(grid[0, k]), x[b, k], pipe, top)
        show(figure.add_subplot(grid[1, k]), estimated[k][b], pipe, f"$R_{k}$ = {R[b, k]:.2f}")
    for row, label in ((0, "the state,\ndecoded"), (1, "the image it is\nestimated to\nbecome, and\nits reward $R_k$")):
        box = grid[row, 0].get_position(figure)
        figure.text(0.16, (box.y0 + box.y1) / 2, label, ha="right", va="center")
    bars(figure.add_subplot(grid[2, :]), [A] * S, "GRPO:\nadvantage of the\nimage, for all steps")
    axis = figure.add_subplot(grid[3, :])
    bars(axis, [A * w for w in weights], "GCPO:\nadvantage × weight\nof its chunk")
    low, high = axis.get_ylim()
    y = low if A > 0 else high
    for end, size in zip(np.cumsum(plan), plan):
        ticks = [y, y + 0.07 * (high - low) * (1 if A > 0 else -1)]
        left, right = end - size + 0.1, end - 0.1
        axis.plot([left, left, right, right], [ticks[1], ticks[0], ticks[0], ticks[1]], color="black", linewidth=1.2, clip_on=False)
    bars(figure.add_subplot(grid[4, :]), gain_advantages, "Stepwise:\nadvantage of the\nstep's own gain\n$R_{k+1} - R_k$")
    axis = figure.add_subplot(grid[5, :])
    bars(axis, delta, f"Truth: change of\nthe mean reward of\n{args.continuations} continuations", [1.96 * e for e in error])
    axis.set_xticks(np.arange(S) + 0.5, [f"step {k}" for k in range(S)])
    axis.tick_params(length=0)
    with bookkeeping.replacing(args.output) as temporary:
        figure.savefig(temporary, dpi=140, format="png")
    print(
        f"values of the states: {', '.join(f'{value:.2f}' for value in V)}; standard errors at most {math.sqrt(variance.max()):.3f}"
    )
    print(f"written to {args.output}")
