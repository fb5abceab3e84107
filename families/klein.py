"""FLUX.2 klein: the text of Qwen3's inner layers and nothing pooled, latents normalised in packs of 2 x 2."""

import torch.nn.functional as F
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from families import sd3
from families.flux import pack, positions, shifted, unpack

PIPELINE = "Flux2KleinPipeline"
MODELS = {"klein": "black-forest-labs/FLUX.2-klein-base-4B"}
PRESET = sd3.PRESET | dict(guidance=4.0, text_length=512, micro_batch=4, beta=0.0)  # meant for one GPU of 24 GB, not measured there
LORA_TARGETS = [*sd3.LORA_TARGETS, "attn.to_qkv_mlp_proj"]  # the last is in the single blocks, which are twenty of 25


def resolutions(pipe):
    side = pipe.vae_scale_factor * 2
    return range(side, 2048 + 1, side)  # positions are rotations and have no end, but it was trained up to four megapixels


def contrasts(pipe):
    return not pipe.config.is_distilled


def encode(pipe, prompt, length, device):
    embeds, _ = pipe.encode_prompt(prompt, device=device, max_sequence_length=length)
    return embeds, embeds.new_empty(1, 0)


def velocity(pipe, x, sigma, embeds, pooled, guidance):
    height, width = x.shape[2:]
    tokens = pipe.transformer(
        pack(x),
        embeds,
        sigma,  # the transformer multiplies by 1000
        img_ids=positions(1, height // 2, width // 2, 1, device=x.device),
        txt_ids=positions(1, 1, 1, embeds.shape[1], device=x.device),
        return_dict=False,
    )[0]
    return unpack(tokens, x)


def schedule(pipe, steps):
    return shifted(pipe, steps, compute_empirical_mu(pipe.image_tokens, steps))


def to_vae(pipe, z):
    norm = pipe.vae.bn
    std = (norm.running_var + pipe.vae.config.batch_norm_eps).sqrt()
    z = F.pixel_unshuffle(z, 2) * std.view(1, -1, 1, 1) + norm.running_mean.view(1, -1, 1, 1)
    return F.pixel_shuffle(z, 2)
