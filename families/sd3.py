"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): two CLIPs and T5, patches of 2 x 2 latents, classifier-free guidance."""

PIPELINE = "StableDiffusion3Pipeline"
MODELS = {
    "sd3": "stabilityai/stable-diffusion-3.5-medium",
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
}
# Flow-GRPO's for SD3.5-medium (https://arxiv.org/abs/2505.05470). Their `flow` kernel is the one for a stock schedule, whose
# last but one sigma is 0.009: the std that `cps` and `ddim` then give the last trained step is as small, and its gradient
# drowns the others.
PRESET = dict(
    reward="jpeg-compressibility", prompts=8, group_size=8, steps=10, ode_steps=1, eta=0.7, sde="flow", guidance=4.5, lr=3e-4,
    anneal_lr=False, clip=1e-4, max_chunk=4, beta=0.04, resolution=512, text_length=128, micro_batch=8, eval_steps=40,
    eval_images=64, gradient_checkpointing=True,
)  # fmt: skip
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
