"""Stepwise-Flow-GRPO, step-level credit assignment for flow-matching image models (arXiv 2603.28718, CVPR 2026).

    python stepwise_grpo.py                         # miniature model, two CPU cores, minutes
    python stepwise_grpo.py --model sd3 --reward jpeg-compressibility
    torchrun --nproc-per-node 8 stepwise_grpo.py --model sd3 --prompts 48 --group-size 24

The first S of T steps follow an SDE in place of the flow's ODE: step k < S draws x_{k+1} ~ N(mean_k, std_k² I), so it has a
likelihood p (log p is averaged, not summed, over the latent's dimensions) and ratio_k = (p_new / p_old)(x_{k+1} | x_k)^w_k, where
w_k is 1 without --step-weights. G images of one prompt, from the same noise, form a group; rewards are compared within it.

    R_k  = reward of x0_hat(x_k), the image that state x_k is estimated to become
    g_k  = R_{k+1} - R_k, the gain of step k; over a trajectory the gains add up to R_S - R_0, and R_0 is the group's
    A_k  = (g_k - mean of the group's gains) / (their std + 1e-4), over images and steps together
    loss = mean over steps k of trajectories with an A_k ≠ 0 of max(-A_k ratio_k, -A_k clip(ratio_k, 1 - eps, 1 + eps)) + beta KL_k
    KL_k = mean over dimensions of (mean_k - mean_k without the LoRA)² / (2 std_k²)
"""

import math
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
    substeps: int = 1
    """T': deterministic steps from a state to the image it is judged by; 1 is the one-step Tweedie estimate"""
    normalize: Literal["joint", "step"] = "joint"
    """mean and std of the gains over the group's images and steps, or over its images at each step"""


def gains(rewards):
    """Gain of every step (B, S), g_k = R_{k+1} - R_k, from the reward of every state (B, S + 1)."""
    return rewards[:, 1:] - rewards[:, :-1]


def gain_advantages(gains, group_size, normalize="joint"):
    """Advantages (B, S) of group-major gains (B, S): (g - mean) / (std + 1e-4), clamped to ±5.

    Mean and std are the group's, over images and steps ("joint") or over images at each step ("step", the paper's
    ablation). Where they are taken over values without spread the advantages are 0.
    """
    groups = gains.view(-1, group_size, gains.shape[1])
    over = {"joint": (1, 2), "step": (1,)}[normalize]
    has_spread = groups.amax(over, keepdim=True) > groups.amin(over, keepdim=True)
    centred = groups - groups.mean(over, keepdim=True)
    return (centred / (groups.std(over, keepdim=True) + 1e-4) * has_spread).clamp(-5, 5).view_as(gains)


@torch.no_grad()
def estimate_x0(pipe, x, v, k, sigmas, text, substeps, args):
    """Estimates (N, C, H, W) of the latents at sigma = 0 that states x at step k with velocities v (N, C, H, W) lead to.

    n = min(T', T - k) Euler steps of equal size from sigmas[k] to 0, of which the first reuses v; one step is the posterior
    mean x - sigma v. A choice: state T - 1 takes one step, which gives exactly the final image.
    """
    n = min(substeps, len(sigmas) - 1 - k)
    for i in range(n):
        if i > 0:
            v = sampler.velocity(pipe, x, (sigmas[k] * (1 - i / n)).expand(len(x)), text, args)
        x = x - sigmas[k] / n * v
    return x


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
    velocities = torch.empty(B, S, *shape, device=args.device)
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
                        velocities[rows, k] = v
                        mean, std = sde_step(v, x, sigmas[k], sigmas[k + 1])
                        x_next = mean + std * noise[rows.cpu(), k].to(args.device)
                        log_prob_old[rows, k] = step_log_prob(v, x, x_next, sigmas[k], sigmas[k + 1], step_weights[k])
                    else:
                        x_next = x + v * (sigmas[k + 1] - sigmas[k])
                    trajectory[rows, k + 1] = x_next
        del noise
        run.lap("sample")

        # Judge: the reward of every state, by the image that it is estimated to become; a group's x_0 is judged once
        state_rewards, estimates = torch.empty(B, S + 1, device=args.device), []
        for k in range(S + 1):
            for rows in sampler.batches(own[::G] if k == 0 else own, args.micro_batch):
                x, x0_hat = trajectory[rows, k], trajectory[rows, -1]  # from x_S on there is only the ODE, to the image itself
                if k < S:
                    x0_hat = estimate_x0(pipe, x, velocities[rows, k], k, sigmas, text.rows(group[rows]), args.substeps, args)
                images = sampler.decode(pipe, x0_hat)
                state_rewards[rows, k] = reward_function.score(images, [prompt_of[b] for b in rows]).to(state_rewards)
                estimates += [images[0]] if rows[0] == 0 else []  # of one trajectory, for the picture
        state_rewards[:, 0] = state_rewards[::G, 0].repeat_interleave(G)
        state_rewards = machine.gather(state_rewards)
        scores, step_gains = state_rewards[:, -1], gains(state_rewards)
        run.lap("reward")

        # Credit: advantages; a trajectory whose advantages are all 0 is left out
        advantages = gain_advantages(step_gains, G, args.normalize)
        kept = advantages.nonzero()[:, 0].unique().cpu().numpy()  # numbers of the others, among those of all processes
        advantages = advantages[mine.start : mine.stop]

        # Update, in --updates parts; all processes draw the same for all trajectories, and each trains its own
        for update, part in enumerate(np.array_split(rng.permutation(kept), args.updates)):
            weight = 1 / max(len(part) * S, 1)  # makes the sum over micro-batches and processes a mean over pairs
            pairs = [(b - mine.start, k) for k in range(S) for b in sorted(part.tolist()) if b in mine]
            for micro in sampler.batches(torch.tensor(pairs, device=args.device), args.micro_batch):
                b, k = micro.T
                x, x_next, sigma, sigma_next = trajectory[b, k], trajectory[b, k + 1], sigmas[k], sigmas[k + 1]
                v = velocity(b, k)
                log_prob_new = step_log_prob(v, x, x_next, sigma, sigma_next, step_weights[k])
                ratio = torch.exp(log_prob_new - log_prob_old[b, k])
                surrogate = clipped_loss(ratio, advantages[b, k], args.clip)
                loss = (weight * surrogate).sum()
                if args.beta > 0:
                    with torch.no_grad(), families.adapter_off(pipe):
                        mean_ref, std = sde_step(velocity(b, k), x, sigma, sigma_next)
                    mean, _ = sde_step(v, x, sigma, sigma_next)
                    kl = ((mean - mean_ref) ** 2 / (2 * std**2)).flatten(1).mean(1)
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
        metrics |= {f"gain/step_{k}": gain for k, gain in enumerate(step_gains.abs().mean(0).tolist())}
        run.log(done, metrics)
        if run.evaluates(done):
            run.picture("tweedie", done, torch.stack(estimates), [f"reward {r:.2f}" for r in state_rewards[0].tolist()], S + 1)
        run.evaluate(done)  # on the held-out prompts, every --eval-every iterations and after the last
        run.save(done)  # every --save-every iterations and after the last
        run.stop_if_asked(done)  # after Ctrl-C
    run.report()
