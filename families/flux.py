"""FLUX.1: CLIP and T5, latents in packs of 2 x 2; FLUX.1-dev learnt guidance by distillation and takes it as an input."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from families import sd3
from families.sd3 import to_vae  # noqa: F401  its autoencoder is of the same kind

PIPELINE = "FluxPipeline"
MODELS = {"flux": "black-forest-labs/FLUX.1-dev"}
# GCPO's (https://arxiv.org/abs/2510.21583). It trains all weights, at lr 1e-5; a LoRA takes the rank and the lr of Flow-GRPO's
# for FLUX.
PRESET = sd3.PRESET | dict(
    reward="hpsv3", group_size=12, steps=17, shift=3.0, guidance=3.5, clip=5e-5, beta=0.0, chunk_fraction=0.5, rank=64,
    resolution=720, text_length=512, micro_batch=4, eval_steps=28,
)  # fmt: skip
# Flow-GRPO's. The names of q, k and v in the single blocks end alike, so those learn too.
LORA_TARGETS = [*sd3.LORA_TARGETS, *(f"{ff}.net.{layer}" for ff in ("ff", "ff_context") for layer in ("0.proj", "2"))]


def resolutions(pipe):
    side = pipe.vae_scale_factor * 2
    return range(side, 1408 + 1, side)  # positions are rotations and have no end, but it was trained up to two megapixels


def contrasts(pipe):
    return False


def encode(pipe, prompt, length, device):
    return pipe.encode_prompt(prompt, device=device, max_sequence_length=length)[:2]


def pack(x):
    """Tokens (B, H/2 W/2, 4 C) of latents (B, C, H, W), as the pipeline packs them."""
    return F.pixel_unshuffle(x, 2).flatten(2).mT


def unpack(tokens, like):
    """Latents of the shape of `like` from the tokens that `pack` makes of them."""
    height, width = like.shape[2:]
    return F.pixel_shuffle(tokens.mT.unflatten(2, (height // 2, width // 2)), 2)


def positions(*lengths, device):
    """(product of lengths, number of lengths): every position on a grid with axes of these lengths, the last the fastest."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in lengths))


def velocity(pipe, x, sigma, embeds, pooled, guidance):
    height, width = x.shape[2:]
    tokens = pipe.transformer(
        pack(x),
        embeds,
        pooled,
        sigma,  # the transformer multiplies by 1000
        img_ids=positions(1, height // 2, width // 2, device=x.device),
        txt_ids=torch.zeros(embeds.shape[1], 3, dtype=torch.long, device=x.device),
        guidance=x.new_full((len(x),), guidance) if pipe.transformer.config.guidance_embeds else None,
        return_dict=False,
    )[0]
    return unpack(tokens, x)


def schedule(pipe, steps):
    config = pipe.scheduler.config
    mu = calculate_shift(
        pipe.image_tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    return shifted(pipe, steps, mu)


def shifted(pipe, steps, mu):
    """Noise levels from 1 to 1 / T and 0 behind the scheduler's shift: e^mu, or a constant that leaves mu aside."""
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    return pipe.scheduler.sigmas
