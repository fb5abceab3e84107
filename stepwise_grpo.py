"""Stepwise-Flow-GRPO, step-level credit assignment for flow-matching image models (arXiv 2603.28718, CVPR 2026).

    python stepwise_grpo.py                         # miniature model, two CPU cores, minutes
    python stepwise_grpo.py --model sd3 --reward jpeg-compressibility
    torchrun --nproc-per-node 8 stepwise_grpo.py --model sd3 --prompts 48 --group-size 24

The first S of T steps follow an SDE in place of the flow's ODE: step k < S draws x_{k+1} ~ N(mean_k, std_k² I), so it has a
likelihood (its log is a mean, not a sum, over the latent's dimensions) and ratio_k = p_new(x_{k+1} | x_k) / p_old(x_{k+1} | x_k).
G images of one prompt, started from the same noise, form a group; rewards are compared within it.

    R_k  = reward of x0_hat(x_k), the image that state x_k is estimated to become
    g_k  = R_{k+1} - R_k, the gain of step k; over a trajectory the gains add up to R_S - R_0, and R_0 is the group's
    A_k  = (g_k - mean of the group's gains) / (their std + 1e-4), over images and steps together
    loss = mean over trajectories and trained steps k of max(-A_k ratio_k, -A_k clip(ratio_k, 1 - eps, 1 + eps)) + beta KL_k
    KL_k = mean over dimensions of (mean_k - mean_k without the LoRA)² / (2 std_k²)
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import arguments
import bookkeeping
import rewards
import sampler


@dataclass
class Args:
    model: str = "tiny"
    """tiny, sd3, sd3-medium, flux, klein, or a local folder or hub id of a pipeline of their families (families/)"""
    reward: str = "shapes"
    """what images are rewarded for: a name in rewards.REWARDS, or a sum like ocr=0.8,pickscore=0.2"""
    prompt_file: str = ""
    """text file of prompts, one a line, instead of the reward's own; every fourth is held out"""
    iterations: int = 150
    """rollouts, each followed by --updates optimizer steps"""
    prompts: int = 16
    """P: prompts an iteration, over all processes"""
    group_size: int = 16
    """G: images a prompt, from the same initial noise"""
    steps: int = 6
    """T: denoising steps"""
    ode_steps: int = 3
    """the last of these T follow the ODE; the S before them are stochastic and trained"""
    eta: float = 0.8
    """strength of the noise that sampling adds"""
    sde: Literal["flow", "dance", "cps", "ddim"] = "cps"
    """transition kernel, see sampler.sde_step"""
    shift: float = 0.0
    """constant shift s of the noise schedule, sigma -> s sigma / (1 + (s - 1) sigma); 0 is the model's own schedule"""
    guidance: float = 1.0
    """guidance scale: classifier-free, where at most 1 is without, or for a guidance-distilled model (FLUX.1-dev) its input"""
    lr: float = 2e-3
    """learning rate of AdamW"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0 over --iterations"""
    clip: float = 3e-4
    """eps: how far a ratio may leave 1; tiny beside PPO's 0.2, since a log-probability is a mean over the latent's dimensions"""
    beta: float = 0.0
    """weight of the KL to the model without LoRA; at 0 it is not computed"""
    updates: int = 2
    """optimizer steps a rollout; all but the first are off-policy, which is what the clip is for"""
    substeps: int = 1
    """T': deterministic steps from a state to the image it is judged by; 1 is the one-step Tweedie estimate"""
    normalize: Literal["joint", "step", "iteration"] = "joint"
    """mean and std over the group's images and steps, or its images at each step, or mean so and std over the iteration"""
    lam: float = 0.0
    """lambda: a step is credited with its own gain and the later ones, each step on by this factor less"""
    step_fraction: float = 1.0
    """share of a trajectory's stochastic steps that is trained, drawn afresh each iteration"""
    rank: int = 32
    """rank of the LoRA; its alpha is twice that"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    seed: int = 0
    """seed of everything; on CPU the same seed gives the same bytes"""
    output_dir: str = ""
    """folder of the run; empty: runs/<script>__<model>__<reward>__<seed>__<time>"""
    resume: str = ""
    """folder of an interrupted run to continue"""
    eval_every: int = 10
    """iterations between evaluations on the held-out prompts"""
    eval_steps: int = 6
    """denoising steps of an evaluation, deterministic"""
    eval_images: int = 864
    """images of an evaluation, the same number for every category"""
    save_every: int = 10
    """iterations between saves of the state"""
    resolution: int = 0
    """height and width of the images; 0 is the model's own"""
    text_length: int = 1
    """rows that T5 makes of a prompt (zeros in a model without T5), or Qwen3 in its place"""
    micro_batch: int = 128
    """latents that go through the model at a time (with guidance twice that)"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    compile: bool = True
    """compile the log-probability, and in a run long enough to repay it the transformer's blocks"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of the model's matrix products; LoRA weights and log-probabilities are float32"""
    device: str = "auto"
    """auto, cpu or cuda"""


def gains(rewards):
    """Gain of every step (B, S), g_k = R_{k+1} - R_k, from the reward of every state (B, S + 1)."""
    return rewards[:, 1:] - rewards[:, :-1]


def lambda_gains(gains, lam):
    """Sums (B, S) of a step's gain and the later ones, sum over j >= k of lam^(j - k) g_j, from gains (B, S)."""
    sums = gains.clone()
    for k in reversed(range(gains.shape[1] - 1)):
        sums[:, k] += lam * sums[:, k + 1]
    return sums


def gain_advantages(gains, group_size, normalize="joint"):
    """Advantages (B, S) of group-major gains (B, S): (g - mean) / (std + 1e-4), clamped to ±5.

    Mean and std are the group's, over images and steps ("joint") or over images at each step ("step", the paper's
    ablation). Where they are taken over values without spread the advantages are 0.
    """
    groups = gains.view(-1, group_size, gains.shape[1])
    over = {"joint": (1, 2), "step": (1,), "iteration": (1,)}[normalize]
    has_spread = groups.amax(over, keepdim=True) > groups.amin(over, keepdim=True)
    centred = groups - groups.mean(over, keepdim=True)
    std = centred.std() if normalize == "iteration" else groups.std(over, keepdim=True)
    return (centred / (std + 1e-4) * has_spread).clamp(-5, 5).view_as(gains)


@torch.no_grad()
def estimate_x0(pipe, x, v, k, sigmas, text, substeps, args):
    """Estimates (N, C, H, W) of the latents at sigma = 0 that states x at steps k (N,) with velocities v lead to.

    min(T', T - k) Euler steps of equal size from sigmas[k] to 0, of which the first reuses v; one step is the posterior
    mean x - sigma v. A choice: state T - 1 takes one step, which gives exactly the final image.
    """
    n = (len(sigmas) - 1 - k).clamp(max=substeps)
    step = (sigmas[k] / n).view(-1, 1, 1, 1)
    x = x - step * v
    for i in range(1, substeps):
        rows = (n > i).nonzero().flatten()
        if len(rows):
            sigma = (sigmas[k] * (1 - i / n))[rows]
            x[rows] = x[rows] - step[rows] * sampler.velocity(pipe, x[rows], sigma, text.rows(rows), args)
    return x


def with_signal(advantages, group_size):
    """Indices of the trajectories whose group has any advantage but 0; the others would train nothing."""
    groups = advantages.view(len(advantages) // group_size, -1)
    return groups.any(1).repeat_interleave(group_size).nonzero().flatten()


def distinct_states(b, k, group_size):
    """Rows that share a state share a call: a group starts from one noise, so at step 0 its trajectories have one state.

    Of transitions (n,), steps k of trajectories b: the distinct states (b (m,), k (m,)) and which one each transition has (n,).
    """
    first_of_group = b - b % group_size
    (b, k), state = torch.unique(torch.stack([torch.where(k == 0, first_of_group, b), k]), dim=1, return_inverse=True)
    return b, k, state


def log_prob(x_next, mean, std):
    """Log density (B,) of x_next (B, ...) under N(mean, std² I), averaged over all dimensions but the first."""
    z = (x_next - mean) / std
    return (-0.5 * (z * z + math.log(2 * math.pi)) - torch.log(std)).flatten(1).mean(1)


@torch.compile(dynamic=True)
def transition_log_prob(v, x, x_next, sigma, sigma_next, sigma_max, eta, sde):
    """Log-probability (B,) of the transition from x to x_next (B, ...) at velocity v: one fused pass over the latents."""
    mean, std = sampler.sde_step(v, x, sigma, sigma_next, sigma_max, eta, sde)
    return log_prob(x_next, mean, std)


def clipped_loss(ratio, advantages, clip):
    """max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)), elementwise."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


if __name__ == "__main__":
    args = arguments.parse_args(Args, __doc__)
    run = bookkeeping.Run(args, Path(__file__).stem)
    pipe = run.pipe

    # Under torchrun every process samples whole groups of its own; advantages and gradients are those of all together
    rank, world = run.rank, run.world
    S, G, P = args.steps - args.ode_steps, args.group_size, args.prompts // world
    B = P * G  # of this process: trajectories `mine` of the world's, in group-major order
    mine = range(rank * B, (rank + 1) * B)
    group = torch.arange(P, device=args.device).repeat_interleave(G)  # (B,) prompt of each trajectory

    # Optimizer, prompts, noise schedule
    parameters = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
    reward_function = rewards.build(args.reward)
    train_prompts, _ = rewards.prompt_set(args)
    sigmas = sampler.schedule(pipe, args.steps, args.device)
    kernel = (sigmas[1].item(), args.eta, args.sde)
    shape = sampler.latent_shape(pipe, args.resolution)

    # What a rollout fills, made once: two iterations' are never held at a time
    trajectory = torch.empty(B, args.steps + 1, *shape, device=args.device)  # x_0 ... x_T
    log_prob_old = torch.empty(B, S, device=args.device)
    velocities = torch.empty(B, S, *shape, device=args.device)

    def velocity(b, k):
        """v (n, C, H, W) of the trajectories b (n,) at their steps k (n,)."""
        b, k, state = distinct_states(b, k, G)
        v = sampler.velocity(pipe, trajectory[b, k], sigmas[k], text.rows(group[b]), args)
        return v.index_select(0, state)  # whose backward pass adds rows in a fixed order, other than that of v[state]

    for iteration in run.iterations(optimizer):  # in between it logs, scores the held-out prompts, saves, and stops
        optimizer.param_groups[0]["lr"] = args.lr * (1 - iteration / args.iterations) if args.anneal_lr else args.lr
        rng = np.random.default_rng((args.seed, iteration))
        prompts = rewards.sample_prompts(train_prompts, args.prompts, rng)[rank * P : (rank + 1) * P]
        text = sampler.encode(pipe, prompts, args)

        # Rollout: x_0 is the group's noise, step k < S draws x_{k+1}, the others follow the ODE
        noises = [sampler.group_noise(args, iteration, rank * P + p, shape) for p in range(P)]
        trajectory[:, 0] = torch.stack([start for start, _ in noises]).to(args.device)[group]
        noise = torch.cat([steps for _, steps in noises]).to(args.device)  # (B, S, C, H, W)
        with torch.no_grad():
            for rows in sampler.even_batches(torch.arange(B, device=args.device), args.micro_batch):
                for k in range(args.steps):
                    x, sigma, sigma_next = trajectory[rows, k], sigmas[k].expand(len(rows)), sigmas[k + 1].expand(len(rows))
                    v = velocity(rows, torch.full_like(rows, k))
                    if k >= S:
                        trajectory[rows, k + 1] = x + v * (sigma_next - sigma).view(-1, 1, 1, 1)
                        continue
                    velocities[rows, k] = v
                    mean, std = sampler.sde_step(v, x, sigma, sigma_next, *kernel)
                    x_next = mean + std * noise[rows, k]
                    trajectory[rows, k + 1] = x_next
                    # mean and std once more: the very function that training uses, so that the ratio begins at exactly 1
                    log_prob_old[rows, k] = transition_log_prob(v, x, x_next, sigma, sigma_next, *kernel)
        del noise, noises
        run.lap("sample")

        # Reward and advantage; trajectories of groups without spread are not kept
        # The reward of every state; x_0 is the same for a whole group, so it is judged once
        states = torch.ones(B, S + 1, dtype=torch.bool)
        states.view(P, G, S + 1)[:, 1:, 0] = False
        states = states.nonzero().to(args.device)
        prompt_of = [prompts[p] for p in group.tolist()]
        state_rewards, estimates = torch.empty(B, S + 1), {}
        for b, k in (rows.T for rows in sampler.even_batches(states, args.micro_batch)):
            x0_hat, early = trajectory[b, -1], k < S  # from x_S on there is only the ODE, so there it is the image itself
            i, j = b[early], k[early]
            of_prompt = text.rows(group[i])
            x0_hat[early] = estimate_x0(pipe, trajectory[i, j], velocities[i, j], j, sigmas, of_prompt, args.substeps, args)
            images = sampler.decode(pipe, x0_hat)
            state_rewards[b.cpu(), k.cpu()] = reward_function.score(images, [prompt_of[i] for i in b.tolist()])
            estimates.update({j: image for i, j, image in zip(b.tolist(), k.tolist(), images) if i == 0})
        state_rewards[:, 0] = state_rewards.view(P, G, S + 1)[:, 0, 0].repeat_interleave(G)
        state_rewards = bookkeeping.gather(state_rewards.to(args.device))
        scores, step_gains = state_rewards[:, -1], gains(state_rewards)
        advantages = gain_advantages(lambda_gains(step_gains, args.lam), G, args.normalize)
        kept = with_signal(advantages, G).cpu().numpy()
        advantages = advantages[mine.start : mine.stop]
        run.lap("reward")

        # Optimize, in --updates parts. Every process draws for all trajectories, so that their generators stay in step, and
        # trains its own
        for update, part in enumerate(np.array_split(rng.permutation(kept), args.updates)):
            drawn = math.ceil(args.step_fraction * S)
            weight = 1 / max(len(part) * drawn, 1)  # for the mean over all pairs, of which a micro-batch has only some
            pairs = [(k, b - mine.start) for b in part.tolist() for k in rng.permutation(S)[:drawn] if b in mine]
            pairs = torch.tensor(sorted(pairs), device=args.device)  # sorted, so that rows that share a state share a batch
            for k, b in (micro.T for micro in sampler.even_batches(pairs, args.micro_batch)):
                x, x_next, sigma, sigma_next = trajectory[b, k], trajectory[b, k + 1], sigmas[k], sigmas[k + 1]
                v = velocity(b, k)
                log_prob_new = transition_log_prob(v, x, x_next, sigma, sigma_next, *kernel)
                ratio = torch.exp(log_prob_new - log_prob_old[b, k])
                surrogate = clipped_loss(ratio, advantages[b, k], args.clip)
                loss = (weight * surrogate).sum()
                if args.beta > 0:
                    with torch.no_grad(), sampler.adapter_off(pipe):
                        v_ref = velocity(b, k)
                    mean, std = sampler.sde_step(v, x, sigma, sigma_next, *kernel)
                    mean_ref, _ = sampler.sde_step(v_ref, x, sigma, sigma_next, *kernel)
                    kl = ((mean - mean_ref) ** 2 / (2 * std**2)).flatten(1).mean(1)
                    loss = loss + args.beta * (weight * kl).sum()
                    run.record("losses", update, weight, kl=kl)
                loss.backward()
                clipped = ((ratio - 1).abs() > args.clip).float()
                run.record("losses", update, weight, policy=surrogate, ratio=ratio, clip_fraction=clipped)
            if len(part):
                bookkeeping.sum_over_processes(parameters)
                norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                run.require_finite(norm)
                run.record("losses", update, grad_norm=norm[None])
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        run.lap("train")

        run.log({"charts/reward": scores.mean().item(), "charts/groups_with_spread": len(kept) / len(scores)})
        run.log({f"gain/step_{k}": gain for k, gain in enumerate(step_gains.abs().mean(0).tolist())})
        if run.evaluates:
            captions = [f"{prompt_of[0]}: {r:.2f}" for r in state_rewards[0].tolist()]
            run.picture("tweedie", iteration + 1, torch.stack([estimates[k] for k in range(S + 1)]), captions, S + 1)
