"""What happens between noise and image: velocity, noise schedule, SDE step, decoding, and deterministic sampling.

Models are in families/: what is particular to a family of them, loading, and their text.

Notation, as in the algorithm scripts: noise levels sigmas[0] = 1 > ... > sigmas[T] = 0. Transition k moves x_k at
sigma = sigmas[k] to x_{k+1} at sigma_next = sigmas[k + 1]. Papers count the other way: their x_T is our x_0 index.
Latents are (B, C, H, W), scaled as the transformer sees them; images are (B, 3, H, W) in [0, 1].
"""

import math
from contextlib import nullcontext
from typing import Literal, get_args

import numpy as np
import torch

import families
from families.text import encode

SDE = Literal["flow", "dance", "cps", "ddim"]
STEP_WEIGHTS = Literal["none", "std", "std2", "guard"]
ONE_SHAPE = ("cuda",)  # devices on which every call of the transformer has the same number of rows


def batches(rows, size):
    """Rows (n, ...) in as few batches as have at most `size` rows, all of about the same number."""
    return rows.tensor_split(math.ceil(len(rows) / size)) if len(rows) else ()


def latent_shape(pipe, resolution=0):
    """(C, H, W) of the latents of one image; resolution 0 is the model's own."""
    size = resolution // pipe.vae_scale_factor if resolution else pipe.default_sample_size
    return pipe.vae.config.latent_channels, size, size


def velocity(pipe, x, sigma, text, args):
    """v_theta(x, sigma, prompt) (B, C, H, W) in float32, with guidance applied; sigma is (B,).

    How a product is rounded depends on the number of its rows. On a GPU any number may differ, so that every call has
    --micro-batch rows, the last ones copies whose outputs are dropped; on a CPU only a single row does, which is doubled.
    """
    family, dtype, n = families.of(pipe), getattr(torch, args.dtype), len(x)
    guided = args.guidance > 1 and family.contrasts(pipe)
    rows = torch.arange(args.micro_batch if x.device.type in ONE_SHAPE else max(n, 2), device=x.device) % n
    x, sigma, text = x[rows], sigma[rows], text.rows(rows)
    embeds, pooled = text.embeds, text.pooled
    if guided:
        embeds = torch.cat([text.empty_embeds.expand_as(embeds), embeds])
        pooled = torch.cat([text.empty_pooled.expand_as(pooled), pooled])
        x, sigma = torch.cat([x, x]), torch.cat([sigma, sigma])
    # A graph compiled without gradients rounds otherwise than one with them: a rollout goes through the graph of training.
    wanted, compiled = torch.is_grad_enabled(), getattr(pipe.transformer, "blocks_are_compiled", False)
    if compiled:  # inputs that want gradients, as later blocks' do: else the first block would need a graph of its own
        x, embeds = x.detach().requires_grad_(), embeds.detach().requires_grad_()
    with torch.set_grad_enabled(wanted or compiled), torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        v = family.velocity(pipe, x, sigma, embeds, pooled, args.guidance).float()
    if guided:
        v_empty, v = v.chunk(2)
        v = v_empty + args.guidance * (v - v_empty)
    return v[:n] if wanted else v[:n].detach()


def schedule(pipe, steps, device="cpu"):
    """The pipeline's own noise levels (T + 1,): sigmas[0] = 1 > ... > sigmas[T] = 0."""
    if steps == 1:  # of which a scheduler with shift_terminal makes 0 / 0
        return torch.tensor([1.0, 0.0], device=device)
    return families.of(pipe).schedule(pipe, steps).to(device)


def sde_step(v, x, sigma, sigma_next, sigma_max, eta, sde):
    """Mean (B, ...) and std (B, 1, ...) of x_{k+1} ~ N(mean, std² I) given x_k, in float32 or better.

    v and x are (B, ...), sigma and sigma_next (B,), or one number for all rows; with eta = 0 every kind is the Euler step
    x + v dt of the ODE. Where sigma = 1 the formulas of `flow` and `ddim` are singular or zero and sigma_max = sigmas[1]
    stands in. x0 and x1 are the image and the noise that v points from and to, not the states of steps 0 and 1.

    flow  Flow-GRPO eq. 9, GCPO eq. 7      dance  DanceGRPO
    cps   Coefficients-Preserving Sampling  ddim  Stepwise-Flow-GRPO
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    v, x = v.to(dtype), x.to(dtype)
    sigma, sigma_next = (s.to(dtype).view(-1, *[1] * (x.ndim - 1)) for s in (sigma, sigma_next))
    dt = sigma_next - sigma
    s = torch.where(sigma == 1, sigma_max, sigma)
    if sde == "flow":
        a2 = eta**2 * sigma / (1 - s)
        std = (a2 * -dt).sqrt()
        return x * (1 + a2 / (2 * sigma) * dt) + v * (1 + a2 * (1 - sigma) / (2 * sigma)) * dt, std
    if sde == "dance":
        x0 = x - sigma * v
        score = -(x - (1 - sigma) * x0) / sigma**2
        return x + (v - 0.5 * eta**2 * score) * dt, eta * (-dt).sqrt()
    if sde not in ("cps", "ddim"):
        raise ValueError(f"sde must be one of {', '.join(get_args(SDE))}, not {sde}")
    std = sigma_next * math.sin(eta * math.pi / 2) if sde == "cps" else eta * sigma_next * (1 - s).sqrt()
    # (1 - sigma_next) x0 + sqrt(sigma_next² - std²) x1, written so that std = 0 leaves exactly the Euler step. With
    # cps at eta = 1 rounding can make the root's argument a hair negative.
    x1 = x + (1 - sigma) * v
    return x + v * dt + ((sigma_next**2 - std**2).clamp(min=0).sqrt() - sigma_next) * x1, std


def step_weights(kind, std, dt):
    """Weights w_k (S,) of mean 1 for the log-probabilities of S steps, from each step's std (S,) and dt (S,).

    none   1: the Gaussian log density, Flow-GRPO's and GCPO's       std    std_k, as TempFlow-GRPO (arXiv 2508.04324)
    std2   std_k²: what public code for `cps` computes, which drops the variance from log p and leaves -(x_{k+1} - mean_k)²
    guard  std_k / |dt_k|, as GRPO-Guard in Flow-GRPO's repository: near the weights that make all steps equally noisy

    A weighted ratio is ratio_k^{w_k}: no likelihood ratio, but its gradient is w_k times that of one.
    """
    weights = {"none": torch.ones_like(std), "std": std, "std2": std**2, "guard": std / dt.abs()}[kind]
    return weights / weights.mean()


@torch.no_grad()
def decode(pipe, latents):
    """Images (B, 3, H, W) in [0, 1] on the CPU, decoded in bfloat16 where that is native."""
    images = []
    for z in latents.split(32):  # of the miniature, what stays in a processor's cache; on a GPU the VAE slices further
        z = families.of(pipe).to_vae(pipe, z)
        with torch.autocast(z.device.type, pipe.transformer.dtype, enabled=pipe.transformer.dtype != torch.float32):
            image = pipe.vae.decode(z, return_dict=False)[0]
        images.append((image.float() / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(images)


def rollout_noise(args, iteration, groups, shape):
    """Noise of an iteration's groups, on the CPU: (P, *shape) to start from, and (P * G, S, *shape) for the SDE.

    A stream of its own for every (seed, iteration, group), so that neither micro-batches nor ranks nor a resume change it.
    """
    start, steps, S = [], [], args.steps - args.ode_steps
    for group in groups:
        seed = np.random.SeedSequence((args.seed, iteration, group)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed >> 1))
        start.append(torch.randn(shape, generator=generator))
        steps.append(torch.randn(args.group_size, S, *shape, generator=generator))
    return torch.stack(start), torch.cat(steps)


@torch.no_grad()
def path_kl(pipe, prompts, noise, args):
    """KL divergence (N,) in nats of the stochastic path of N prompts from that of the model without LoRA, one path each.

    sum_k ||mean_k - mean_k without the LoRA||² / (2 std_k²) along a path that the LoRA draws from noise (N, S + 1, C, H, W): a sum
    over steps and dimensions, where the scripts' log-probabilities and their KL_k are means over dimensions.
    """
    text, sigmas, kl = encode(pipe, prompts, args), schedule(pipe, args.steps, args.device), torch.zeros(len(prompts))
    kernel = dict(sigma_max=sigmas[1].item(), eta=args.eta, sde=args.sde)
    for rows in batches(torch.arange(len(prompts)), args.micro_batch):
        x, *noises = noise[rows].to(args.device).unbind(1)
        for k, drawn in enumerate(noises):
            inputs = pipe, x, sigmas[k].expand(len(rows)), text.rows(rows), args
            mean, std = sde_step(velocity(*inputs), x, sigmas[k], sigmas[k + 1], **kernel)
            with families.adapter_off(pipe):
                mean_ref, _ = sde_step(velocity(*inputs), x, sigmas[k], sigmas[k + 1], **kernel)
            kl[rows] += ((mean - mean_ref) ** 2 / (2 * std**2)).flatten(1).sum(1).cpu()
            x = mean + std * drawn
    return kl


@torch.no_grad()
def sample_ode(pipe, prompts, noise, steps, args, tuned_steps=None):
    """Images (B, 3, H, W) of B prompts by `steps` Euler steps from noise (B, C, H, W).

    The LoRA takes part in those of range(steps) that are in `tuned_steps` (None: in all), the model without it does the rest.
    """
    text = encode(pipe, prompts, args)
    sigmas = schedule(pipe, steps, args.device)
    images = []
    for rows in batches(torch.arange(len(prompts)), args.micro_batch):
        x = noise[rows].to(args.device)
        for k in range(steps):
            with nullcontext() if tuned_steps is None or k in tuned_steps else families.adapter_off(pipe):
                v = velocity(pipe, x, sigmas[k].expand(len(rows)), text.rows(rows), args)
            x = x + v * (sigmas[k + 1] - sigmas[k])
        images.append(decode(pipe, x))
    return torch.cat(images)
