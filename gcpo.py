"""GCPO, chunk-level policy optimization for flow-matching image models (arXiv 2510.21583, ICML 2026).

    python gcpo.py                                  # miniature model, two CPU cores, minutes
    python gcpo.py --model sd3 --chunk-size 4 --reward jpeg-compressibility
    torchrun --nproc-per-node 8 gcpo.py --model sd3 --prompts 48 --group-size 24

The first S of T steps follow an SDE in place of the flow's ODE: step k < S draws x_{k+1} ~ N(mean_k, std_k² I), so it has a
likelihood p (log p is averaged, not summed, over the latent's dimensions) and ratio_k = (p_new / p_old)(x_{k+1} | x_k)^w_k, where
w_k is 1 without --step-weights. G images of one prompt, from the same noise, form a group; rewards are compared within it.

    A    = (r - mean of the group) / (std of the iteration, or of the group, + 1e-4), clamped to ±5: the advantage of all steps
    r_j  = (product of ratio_k over the cs_j steps k of chunk j)^(1 / cs_j), where cs_1 + ... + cs_K = S         (eq. 15)
    loss = mean over trajectories (A ≠ 0), then chunks j, of max(-A r_j, -A clip(r_j, 1 - eps, 1 + eps)) + beta mean_j KL_k (eq. 14)
    KL_k = mean over dimensions of (mean_k - mean_k without the LoRA)² / (2 std_k²)

Chunks of one step are GRPO; one chunk of all steps is GSPO's sequence-level ratio.
"""

import math
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import arguments
import bookkeeping
import families
import machine
import rewards
import sampler

Chunk = namedtuple("Chunk", "b first size weight")  # `size` steps of trajectory b from `first` on; weight in the loss


@dataclass
class Args(arguments.Training):  # which has the flags that all three scripts share
    iterations: int = 125
    """rollouts, each followed by --updates optimizer steps"""
    prompts: int = 16
    """P: prompts per iteration, over all processes"""
    group_size: int = 16
    """G: images per prompt, from the same initial noise"""
    steps: int = 6
    """T: denoising steps"""
    ode_steps: int = 2
    """the last of these T follow the ODE; the S before them are stochastic and trained"""
    eta: float = 0.7
    """strength of the noise that sampling adds"""
    sde: sampler.SDE = "flow"
    """transition kernel, see sampler.sde_step"""
    step_weights: sampler.STEP_WEIGHTS = "none"
    """weight of each step's log-probability, see sampler.step_weights"""
    lr: float = 2e-3
    """learning rate of AdamW"""
    clip: float = 3e-4
    """eps: how far a ratio may leave 1; tiny beside PPO's 0.2, since a log-probability is a mean over the latent's dimensions"""
    beta: float = 0.03
    """weight of the KL to the model without LoRA; at 0 it is not computed"""
    updates: int = 2
    """optimizer steps per rollout; all but the first are off-policy, which is what the clip is for"""
    global_std: bool = True
    """divide advantages by the std of all rewards of the iteration; --no-global-std: by each group's own"""
    chunk_size: int | None = None
    """chunks of this many steps, the remainder last; without it and --chunks the chunks are adaptive"""
    chunks: tuple[int, ...] | None = None
    """explicit chunk sizes, such as 2 1; they must sum to the stochastic steps S"""
    max_chunk: int = 2
    """adaptive chunks no longer than this are not split further"""
    distance: Literal["l1", "l2", "cosine"] = "l1"
    """relative distance between consecutive latents, which adaptive chunks and weights follow"""
    chunk_fraction: float = 1.0
    """share of a trajectory's chunks that is trained, drawn anew in each iteration"""
    weighted: bool = False
    """draw chunks in proportion to their mean relative distance instead of uniformly (eq. 17)"""


def group_advantages(rewards, group_size, global_std=False):
    """Advantages (B,) of group-major rewards (B,): (r - mean of its group) / (std + 1e-4), clamped to ±5.

    The std is the group's (GCPO eq. 4), or with `global_std`, Flow-GRPO's setting for SD3 and the default of Args, that of
    all B rewards. A group without spread gets 0, and not its mean's rounding times 1e4.
    """
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    std = groups.std() if global_std else groups.std(1, keepdim=True)
    has_spread = groups.amax(1, keepdim=True) > groups.amin(1, keepdim=True)
    return (centred / (std + 1e-4) * has_spread).clamp(-5, 5).flatten()


def log_prob(x_next, mean, std):
    """Log density (B,) of x_next (B, ...) under N(mean, std² I), averaged over all dimensions but the first."""
    z = (x_next - mean) / std
    return (-0.5 * (z * z + math.log(2 * math.pi)) - torch.log(std)).flatten(1).mean(1)


@torch.compile(dynamic=True)
def transition_log_prob(v, x, x_next, sigma, sigma_next, weight, sigma_max, eta, sde):
    """Log-probability (B,) of the step from x to x_next (B, ...) at velocity v, times its weight: one pass over the latents.

    Rollout and training call this one function, so that its rounding is the same, as v's is (sampler.velocity): ratios start at 1.
    """
    mean, std = sampler.sde_step(v, x, sigma, sigma_next, sigma_max, eta, sde)
    return weight * log_prob(x_next, mean, std)


def clipped_loss(ratio, advantages, clip):
    """max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)), elementwise."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def relative_distance(trajectory, distance="l1"):
    """d_k = ||x_k - x_{k+1}|| / ||x_k||, or 1 - cos(x_k, x_{k+1}): (B, S) from a trajectory (B, S + 1, ...). GCPO eq. 16."""
    x, x_next = trajectory[:, :-1].flatten(2), trajectory[:, 1:].flatten(2)
    if distance == "cosine":
        return 1 - torch.cosine_similarity(x, x_next, dim=-1)
    return (x - x_next).norm(int(distance[1]), dim=-1) / x.norm(int(distance[1]), dim=-1)  # the 1 of "l1", the 2 of "l2"


def fixed_chunks(num_steps, chunk_size):
    """Sizes of consecutive chunks of `chunk_size` steps, the remainder last: 7 steps by 3 are [3, 3, 1]."""
    return [min(chunk_size, num_steps - start) for start in range(0, num_steps, chunk_size)]


def adaptive_chunks(curve, max_chunk=4):
    """Sizes of chunks that follow the shape of a trajectory's distance curve (S,). GCPO section 4.3.

    A segment is cut where the curve's first difference changes its sign, and halved where it never does. Each part is cut again
    by the next order of difference, until it is no longer than `max_chunk`. Choices where the paper is silent: that number; step k
    has the sign of d_{k+1} - d_k, a segment's last steps the last sign; a segment too short for a difference is halved.
    """

    def split(segment, order):
        if len(segment) <= max_chunk:
            return [len(segment)]
        signs = np.sign(np.diff(segment, order))
        cuts = [k + 1 for k in range(len(signs) - 1) if signs[k] != signs[k + 1]] or [len(segment) // 2]
        return [chunk for part in np.split(segment, cuts) for chunk in split(part, order + 1)]

    return split(np.asarray(curve, np.float64), 1)


def chunk_means(values, chunk_sizes):
    """Means (..., K) over consecutive chunks of the given sizes of values (..., N)."""
    return torch.stack([chunk.mean(-1) for chunk in values.split(chunk_sizes, -1)], -1)


def chunk_log_ratio(log_prob_new, log_prob_old, chunk_sizes):
    """Log of the chunk ratios (..., K), the means over each chunk of its steps' log ratios, from (..., N) each. GCPO eq. 15."""
    return chunk_means(log_prob_new - log_prob_old, chunk_sizes)


def draw_chunks(plan, curve, fraction, weighted, rng):
    """Some of a trajectory's chunks, (first step, size): uniformly or, `weighted`, by their mean relative distance. GCPO eq. 17."""
    starts = np.cumsum([0, *plan[:-1]])
    moved = np.add.reduceat(curve, starts) / plan if weighted else np.ones(len(plan))
    drawn = rng.choice(len(plan), math.ceil(fraction * len(plan)), replace=False, p=moved / moved.sum())
    return [(starts[j], plan[j]) for j in drawn]


def batch_chunks(chunks, micro_batch):
    """Lists of whole chunks, at most `micro_batch` steps together: eq. 14 clips a chunk's ratio, which takes all of its steps."""
    batches, steps = [], micro_batch  # as if one were full: the first chunk opens a batch
    for chunk in sorted(chunks):  # by trajectory, so that rows that share a state share a batch
        steps += chunk.size
        if steps > micro_batch:
            batches.append([])
            steps = chunk.size
        batches[-1].append(chunk)
    return batches


if __name__ == "__main__":
    args = arguments.parse_args(Args, __doc__)
    run = bookkeeping.Run(args, Path(__file__).stem)
    pipe, rank, world = run.pipe, run.rank, run.world

    # Under torchrun every process samples whole groups of its own; advantages and gradients are those of all together
    S, G, P = args.steps - args.ode_steps, args.group_size, args.prompts // world
    B = P * G  # trajectories of this process, in group-major order
    mine = range(rank * B, (rank + 1) * B)  # their numbers among those of all processes
    own = torch.arange(B, device=args.device)  # their numbers here
    group = own // G  # (B,) prompt of each trajectory

    # Optimizer, prompts, noise schedule, and the kernel with its constants filled in
    parameters = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
    reward_function = rewards.build(args.reward)
    train_prompts, _ = rewards.prompt_set(args)
    sigmas = sampler.schedule(pipe, args.steps, args.device)
    kernel = dict(sigma_max=sigmas[1].item(), eta=args.eta, sde=args.sde)  # for sigma_max see sampler.sde_step
    sde_step, step_log_prob = partial(sampler.sde_step, **kernel), partial(transition_log_prob, **kernel)
    _, stds = sde_step(sigmas[:S], sigmas[:S], sigmas[:S], sigmas[1 : S + 1])  # (S,); v and x do not matter, so any will do
    step_weights = sampler.step_weights(args.step_weights, stds, sigmas[1 : S + 1] - sigmas[:S])

    # What a rollout fills, reused in every iteration
    shape = sampler.latent_shape(pipe, args.resolution)
    trajectory = torch.empty(B, args.steps + 1, *shape, device=args.device)  # x_0 ... x_T
    log_prob_old = torch.empty(B, S, device=args.device)

    def velocity(b, k):
        """v (n, C, H, W) of trajectories b (n,) at steps k (n,), for this iteration's text. Equal states are computed once."""
        b = torch.where(k == 0, b - b % G, b)  # at step 0 a group has one state, its noise: that of its first trajectory
        (b, k), inverse = torch.unique(torch.stack([b, k]), dim=1, return_inverse=True)
        v = sampler.velocity(pipe, trajectory[b, k], sigmas[k], text.rows(group[b]), args)
        return v.index_select(0, inverse)  # on a CPU its backward pass adds rows in a fixed order, that of v[inverse] does not

    first_iteration = run.start(optimizer)  # 0 after scoring the base model, or where an interrupted run left off
    for iteration in run.iterations(first_iteration):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.lr * (1 - iteration / args.iterations)
        rng = np.random.default_rng((args.seed, iteration))
        prompts = rewards.sample_prompts(train_prompts, args.prompts, rng)[rank * P : (rank + 1) * P]
        prompt_of = [prompt for prompt in prompts for _ in range(G)]  # (B,)
        text = sampler.encode(pipe, prompts, args)

        # Roll out: x_0 is the group's noise, step k < S draws x_{k+1}, the others follow the ODE
        start, noise = sampler.rollout_noise(args, iteration, range(rank * P, (rank + 1) * P), shape)  # on the CPU
        trajectory[:, 0] = start.to(args.device)[group]
        with torch.no_grad():
            for rows in sampler.batches(own, args.micro_batch):
                for k in range(args.steps):
                    x, v = trajectory[rows, k], velocity(rows, torch.full_like(rows, k))
                    if k < S:
                        mean, std = sde_step(v, x, sigmas[k], sigmas[k + 1])
                        x_next = mean + std * noise[rows.cpu(), k].to(args.device)
                        log_prob_old[rows, k] = step_log_prob(v, x, x_next, sigmas[k], sigmas[k + 1], step_weights[k])
                    else:
                        x_next = x + v * (sigmas[k + 1] - sigmas[k])
                    trajectory[rows, k + 1] = x_next
        del noise
        run.lap("sample")

        # Judge: the reward of every image
        images = sampler.decode(pipe, trajectory[:, -1])
        run.lap("decode")
        scores = machine.gather(reward_function.score(images, prompt_of).to(args.device))
        run.lap("reward")

        # Credit: advantages; a trajectory whose advantages are all 0 is left out
        advantages = group_advantages(scores, G, args.global_std)
        kept = advantages.nonzero()[:, 0].unique().cpu().numpy()  # numbers of the others, among those of all processes
        advantages = advantages[mine.start : mine.stop]

        # Chunks of every trajectory: given, of one size, or adapted to how far it moves at each step
        curves = machine.gather(relative_distance(trajectory[:, : S + 1], args.distance)).double().cpu().numpy()
        if args.chunks or args.chunk_size:
            plans = [list(args.chunks or fixed_chunks(S, args.chunk_size))] * len(curves)
        else:
            plans = [adaptive_chunks(curve, args.max_chunk) for curve in curves]

        # Update, in --updates parts; all processes draw the same for all trajectories, and each trains its own
        for update, part in enumerate(np.array_split(rng.permutation(kept), args.updates)):
            chunks = []
            for b in part.tolist():  # numbers among those of all processes
                drawn = draw_chunks(plans[b], curves[b], args.chunk_fraction, args.weighted, rng)
                if b in mine:  # weighted so that the sum is a mean over trajectories of the mean over their chunks
                    chunks += [Chunk(b - mine.start, first, size, 1 / (len(part) * len(drawn))) for first, size in drawn]
            for micro in batch_chunks(chunks, args.micro_batch):
                sizes, weight = [c.size for c in micro], torch.tensor([c.weight for c in micro], device=args.device)
                b, k = torch.tensor([(c.b, k) for c in micro for k in range(c.first, c.first + c.size)], device=args.device).T
                x, x_next, sigma, sigma_next = trajectory[b, k], trajectory[b, k + 1], sigmas[k], sigmas[k + 1]
                v = velocity(b, k)
                log_prob_new = step_log_prob(v, x, x_next, sigma, sigma_next, step_weights[k])
                ratio = torch.exp(chunk_log_ratio(log_prob_new, log_prob_old[b, k], sizes))
                surrogate = clipped_loss(ratio, advantages[[c.b for c in micro]], args.clip)
                loss = (weight * surrogate).sum()
                if args.beta > 0:
                    with torch.no_grad(), families.adapter_off(pipe):
                        mean_ref, std = sde_step(velocity(b, k), x, sigma, sigma_next)
                    mean, _ = sde_step(v, x, sigma, sigma_next)
                    kl = ((mean - mean_ref) ** 2 / (2 * std**2)).flatten(1).mean(1)
                    kl = chunk_means(kl, sizes)
                    loss = loss + args.beta * (weight * kl).sum()
                    run.average({f"losses/kl_{update}": kl}, weight)
                loss.backward()
                run.average({f"losses/policy_{update}": surrogate, f"losses/ratio_{update}": ratio}, weight)
                run.average({f"losses/clip_fraction_{update}": ((ratio - 1).abs() > args.clip).float()}, weight)
            if len(part):  # as on all other processes
                machine.sum_over_processes(parameters)
                norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                run.require_finite(norm)
                run.average({f"losses/grad_norm_{update}": norm[None]})
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        run.lap("train")

        done = iteration + 1
        metrics = {"charts/reward": scores.mean().item(), "charts/images_with_signal": len(kept) / len(scores)}
        metrics |= {"chunks/sizes": np.concatenate(plans)} | {f"chunks/distance_{k}": d for k, d in enumerate(curves.mean(0))}
        run.log(done, metrics)
        run.evaluate(done)  # on the held-out prompts, every --eval-every iterations and after the last
        run.save(done)  # every --save-every iterations and after the last
        run.stop_if_asked(done)  # after Ctrl-C
    run.report()
