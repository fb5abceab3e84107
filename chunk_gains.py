"""A trial: GCPO's chunk ratios (arXiv 2510.21583) with Stepwise-Flow-GRPO's gains (arXiv 2603.28718) as a chunk's advantage.

    python gcpo.py                                  # miniature model, two CPU cores, minutes
    python gcpo.py --model sd3 --chunk-size 4 --reward jpeg-compressibility
    torchrun --nproc-per-node 8 gcpo.py --model sd3 --prompts 48 --group-size 24

The first S of T steps follow an SDE in place of the flow's ODE: step k < S draws x_{k+1} ~ N(mean_k, std_k² I), so it has a
likelihood (its log is a mean, not a sum, over the latent's dimensions) and ratio_k = p_new(x_{k+1} | x_k) / p_old(x_{k+1} | x_k).
G images of one prompt, started from the same noise, form a group; rewards are compared within it.

    A    = (r - mean of the group) / (std of the iteration, or of the group, + 1e-4), the advantage of every step    (GCPO eq. 4)
    r_j  = (product of ratio_k over the cs_j steps k of chunk j)^(1 / cs_j), where cs_1 + ... + cs_K = S         (eq. 15)
    loss = mean over trajectories and trained chunks j of max(-A r_j, -A clip(r_j, 1 - eps, 1 + eps)) + beta mean_j KL_k (eq. 14)
    KL_k = mean over dimensions of (mean_k - mean_k without the LoRA)² / (2 std_k²)

Chunks of one step are GRPO; one chunk of all steps is GSPO's sequence-level ratio.
"""

import math
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import arguments
import bookkeeping
import rewards
import sampler

Chunk = namedtuple("Chunk", "b first size index weight")  # `size` steps of trajectory b from `first` on; weight in the loss


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
    """T': deterministic steps from a state to the image it is judged by"""
    normalize: Literal["joint", "step", "iteration"] = "joint"
    """mean and std over the group's images and chunks, or its images at each chunk, or mean so and std over the iteration"""
    lam: float = 0.0
    """lambda: a chunk is credited with its own gain and the later ones, each chunk on by this factor less"""
    chunk_size: int | None = None
    """chunks of this many steps, the remainder last; without it and --chunks the chunks are adaptive"""
    chunks: tuple[int, ...] | None = None
    """explicit chunk sizes, such as 2 3; they must sum to the stochastic steps S"""
    min_chunk: int = 2
    """adaptive chunks no longer than this are not split further"""
    distance: Literal["l1", "l2", "cosine"] = "l1"
    """relative distance between consecutive latents, which adaptive chunks and weights follow"""
    chunk_fraction: float = 1.0
    """share of a trajectory's chunks that is trained, drawn afresh each iteration"""
    weighted: bool = False
    """draw chunks in proportion to their mean relative distance instead of uniformly (eq. 17)"""
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


def relative_distance(trajectory, distance="l1"):
    """d_k = ||x_k - x_{k+1}|| / ||x_k||, or 1 - cos(x_k, x_{k+1}): (B, S) from a trajectory (B, S + 1, ...). GCPO eq. 16."""
    x, x_next = trajectory[:, :-1].flatten(2), trajectory[:, 1:].flatten(2)
    if distance == "cosine":
        return 1 - torch.cosine_similarity(x, x_next, dim=-1)
    order = {"l1": 1, "l2": 2}[distance]
    return (x - x_next).norm(order, dim=-1) / x.norm(order, dim=-1)


def fixed_chunks(num_steps, chunk_size):
    """Sizes of consecutive chunks of `chunk_size` steps, the remainder last: 7 steps by 3 are [3, 3, 1]."""
    return [min(chunk_size, num_steps - start) for start in range(0, num_steps, chunk_size)]


def adaptive_chunks(curve, min_chunk=4):
    """Sizes of chunks that follow the shape of a trajectory's distance curve (S,). GCPO section 4.3.

    Steps over which the curve's first difference keeps its sign belong together: a rise is one chunk, a fall another.
    Where the sign never changes the segment is halved. Each part is divided again by its next order of difference (its
    curvature, and so on) until it is no longer than `min_chunk`. Choices where the paper is silent: min_chunk is 4 (in the
    miniature 2); step k takes the sign of d_{k+1} - d_k, the last steps of a segment the last sign; a segment too short is halved.
    """

    def split(segment, order):
        size = len(segment)
        if size <= min_chunk:
            return [size]
        signs = np.sign(np.diff(segment, order))
        cuts = [k + 1 for k in range(len(signs) - 1) if signs[k] != signs[k + 1]] or [size // 2]
        return [chunk for part in np.split(segment, cuts) for chunk in split(part, order + 1)]

    return split(np.asarray(curve, np.float64), 1)


def chunk_means(values, chunk_sizes):
    """Means (..., K) over consecutive chunks of the given sizes of values (..., N)."""
    sizes = torch.tensor(chunk_sizes, device=values.device)
    chunk_of = torch.arange(len(sizes), device=values.device).repeat_interleave(sizes)  # (N,) the chunk of each value
    return values.new_zeros(*values.shape[:-1], len(sizes)).index_add(-1, chunk_of, values) / sizes


def chunk_log_ratio(log_prob_new, log_prob_old, chunk_sizes):
    """Log of the chunk ratios (..., K), the means over each chunk of its steps' log ratios, from (..., N) each. GCPO eq. 15."""
    return chunk_means(log_prob_new - log_prob_old, chunk_sizes)


def chunk_weights(curve, chunk_sizes):
    """Probability (K,) of drawing each chunk: its mean relative distance, from a curve (S,), over their sum. GCPO eq. 17."""
    moved = np.add.reduceat(curve, np.cumsum([0, *chunk_sizes[:-1]])) / chunk_sizes
    return moved / moved.sum()


def batch_chunks(chunks, micro_batch):
    """Chunks (b, first step, size, ...) in as few even batches of whole chunks as have at most `micro_batch` steps, or one chunk.

    The exponential and the clip of eq. 14 act on a chunk, so all of its steps must be there in one backward pass.
    """
    chunks = sorted(chunks)  # by trajectory, so that rows that share a state share a batch
    for n in range(1, len(chunks) + 1):
        batches = [chunks[len(chunks) * i // n : len(chunks) * (i + 1) // n] for i in range(n)]
        if n == len(chunks) or max(sum(chunk.size for chunk in batch) for batch in batches) <= micro_batch:
            return batches
    return []


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
    plan = list(args.chunks or ()) or fixed_chunks(S, args.chunk_size)
    ends = torch.tensor([0, *np.cumsum(plan)], device=args.device)  # (K + 1,) states between chunks

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
                    mean, std = sampler.sde_step(v, x, sigma, sigma_next, *kernel)
                    x_next = mean + std * noise[rows, k]
                    trajectory[rows, k + 1] = x_next
                    velocities[rows, k] = v
                    # mean and std once more: the very function that training uses, so that the ratio begins at exactly 1
                    log_prob_old[rows, k] = transition_log_prob(v, x, x_next, sigma, sigma_next, *kernel)
        del noise, noises
        run.lap("sample")

        # Reward and advantage; trajectories of groups without spread are not kept
        states = torch.ones(B, len(ends), dtype=torch.bool)
        states.view(P, G, -1)[:, 1:, 0] = False
        states = states.nonzero().to(args.device)
        prompt_of = [prompts[p] for p in group.tolist()]
        state_rewards = torch.empty(B, len(ends))
        for b, j in (rows.T for rows in sampler.even_batches(states, args.micro_batch)):
            x0_hat, early = trajectory[b, -1], j < len(plan)
            i, k = b[early], ends[j[early]]
            of_prompt = text.rows(group[i])
            x0_hat[early] = estimate_x0(pipe, trajectory[i, k], velocities[i, k], k, sigmas, of_prompt, args.substeps, args)
            images = sampler.decode(pipe, x0_hat)
            state_rewards[b.cpu(), j.cpu()] = reward_function.score(images, [prompt_of[i] for i in b.tolist()])
        state_rewards[:, 0] = state_rewards.view(P, G, -1)[:, 0, 0].repeat_interleave(G)
        state_rewards = bookkeeping.gather(state_rewards.to(args.device))
        scores = state_rewards[:, -1]
        advantages = gain_advantages(lambda_gains(gains(state_rewards), args.lam), G, args.normalize)
        kept = with_signal(advantages, G).cpu().numpy()
        advantages = advantages[mine.start : mine.stop]
        run.lap("reward")

        curves = bookkeeping.gather(relative_distance(trajectory[:, : S + 1], args.distance)).double().cpu().numpy()
        plans = [plan] * len(curves)
        step_weights = np.zeros(S)  # of a step in the loss, over its weight in GRPO's

        # Optimize, in --updates parts. Every process draws for all trajectories, so that their generators stay in step, and
        # trains its own
        for update, part in enumerate(np.array_split(rng.permutation(kept), args.updates)):
            chunks = []
            for b in part.tolist():
                plan, starts = plans[b], np.cumsum([0, *plans[b]])
                drawn = math.ceil(args.chunk_fraction * len(plan))
                for j in rng.choice(len(plan), drawn, replace=False, p=chunk_weights(curves[b], plan) if args.weighted else None):
                    weight = 1 / (len(part) * drawn)  # for the mean over trajectories of the mean over their chunks
                    step_weights[starts[j] : starts[j + 1]] += S * weight / plan[j] / args.updates
                    if b in mine:
                        chunks.append(Chunk(b - mine.start, starts[j], plan[j], j, weight))
            for micro in batch_chunks(chunks, args.micro_batch):
                sizes = [chunk.size for chunk in micro]
                weight = torch.tensor([chunk.weight for chunk in micro], device=args.device)
                rows = [(chunk.b, k) for chunk in micro for k in range(chunk.first, chunk.first + chunk.size)]
                b, k = torch.tensor(rows, device=args.device).T
                x, x_next, sigma, sigma_next = trajectory[b, k], trajectory[b, k + 1], sigmas[k], sigmas[k + 1]
                v = velocity(b, k)
                log_prob_new = transition_log_prob(v, x, x_next, sigma, sigma_next, *kernel)
                ratio = torch.exp(chunk_log_ratio(log_prob_new, log_prob_old[b, k], sizes))
                surrogate = clipped_loss(ratio, advantages[[c.b for c in micro], [c.index for c in micro]], args.clip)
                loss = (weight * surrogate).sum()
                if args.beta > 0:
                    with torch.no_grad(), sampler.adapter_off(pipe):
                        v_ref = velocity(b, k)
                    mean, std = sampler.sde_step(v, x, sigma, sigma_next, *kernel)
                    mean_ref, _ = sampler.sde_step(v_ref, x, sigma, sigma_next, *kernel)
                    kl = ((mean - mean_ref) ** 2 / (2 * std**2)).flatten(1).mean(1)
                    kl = chunk_means(kl, sizes)
                    loss = loss + args.beta * (weight * kl).sum()
                    run.record("losses", update, weight, kl=kl)
                loss.backward()
                clipped = ((ratio - 1).abs() > args.clip).float()
                run.record("losses", update, weight, policy=surrogate, ratio=ratio, clip_fraction=clipped)
                index = np.array([chunk.index for chunk in micro])
                for j in set(index.tolist()) if update + 1 == args.updates else ():  # in the update that is furthest off-policy
                    run.record("chunks", j, ratio=ratio[index == j], clip_fraction=clipped[index == j])
            if len(part):
                bookkeeping.sum_over_processes(parameters)
                norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                run.require_finite(norm)
                run.record("losses", update, grad_norm=norm[None])
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        run.lap("train")

        run.log({"charts/reward": scores.mean().item(), "charts/groups_with_spread": len(kept) / len(scores)})
        run.log({"chunks/sizes": np.concatenate(plans)})
        for name, values in dict(distance=curves.mean(0), distance_spread=curves.std(0), weight=step_weights).items():
            run.log({f"chunks/{name}_{k}": value for k, value in enumerate(values)})
