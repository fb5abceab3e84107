"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): two CLIPs and T5, patches of 2 x 2 latents, classifier-free guidance."""

NAME = "sd3"
LORA_TARGETS = [f"attn.{name}" for name in "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()]


def resolutions(pipe):
    config = pipe.transformer.config
    side = pipe.vae_scale_factor * config.patch_size
    return range(side, config.pos_embed_max_size * side + 1, side)  # its table of positions ends there


def contrasts(pipe):
    return True


def encode(pipe, prompt, length, device):
    options = dict(do_classifier_free_guidance=False, max_sequence_length=length, device=device)
    embeds, _, pooled, _ = pipe.encode_prompt(prompt, None, None, **options)
    return embeds, pooled


def velocity(pipe, x, sigma, embeds, pooled, guidance):
    return pipe.transformer(x, embeds, pooled, sigma * 1000, return_dict=False)[0]


def schedule(pipe, steps):
    pipe.scheduler.set_timesteps(steps)
    return pipe.scheduler.sigmas


def to_vae(pipe, z):
    return z / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0.0)
