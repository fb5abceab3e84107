"""What happens between noise and image: loading a pipeline, text, velocity, noise schedule, SDE step, decoding, ODE sampling.

What is particular to a family of models is in families/, a file each.

Notation, as in the algorithm scripts: noise levels sigmas[0] = 1 > ... > sigmas[T] = 0. Transition k moves x_k at
sigma = sigmas[k] to x_{k+1} at sigma_next = sigmas[k + 1]. Papers count the other way: their x_T is our x_0 index.
Latents are (B, C, H, W), scaled as the transformer sees them; images are (B, 3, H, W) in [0, 1].
"""

import math
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns at import that torchvision is missing
import numpy as np
import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

import families
import miniature

MODELS = {
    "tiny": str(miniature.FOLDER),
    "sd3": "stabilityai/stable-diffusion-3.5-medium",
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "flux": "black-forest-labs/FLUX.1-dev",
    "klein": "black-forest-labs/FLUX.2-klein-base-4B",
}
SDES = ("flow", "dance", "cps", "ddim")
TEXT_CACHE = 4 << 30  # bytes of encoded prompts kept in CPU memory: of klein's 8 MB the 512 that a run encodes when it starts


def family_of(model):
    """The family, a file of families/, of a name in MODELS, folder or hub id; ValueError says in a sentence why there is none."""
    return families.find(MODELS.get(model, model))


def load_pipeline(args):
    """The pipeline with a fresh LoRA on its transformer: frozen weights in args.dtype, LoRA weights in float32.

    ValueError says in a sentence why the weights cannot be loaded, or that args.resolution does not fit them.
    """
    name, dtype = MODELS.get(args.model, args.model), getattr(torch, args.dtype)
    # On a GPU the text encoders are too large for float32 (T5 alone 19 GB); on a CPU there is room for exactness.
    dtypes = {"vae": torch.float32, "transformer": dtype, "default": torch.float32 if args.device == "cpu" else dtype}
    pipe = families.load(name, dtypes)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    family = families.of(pipe)
    fitting, size = family.resolutions(pipe), args.resolution or pipe.default_sample_size * pipe.vae_scale_factor
    if size not in fitting:
        raise ValueError(
            f"--resolution {size} must be a multiple of {fitting.step} up to {fitting[-1]} for this model, or 0 for its own"
        )
    pipe.image_tokens = (size // fitting.step) ** 2  # of one image, in the transformer
    if args.shift:
        constant = dict(shift=args.shift, use_dynamic_shifting=False)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **constant)
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, init_lora_weights="gaussian", target_modules=family.LORA_TARGETS)
    pipe.transformer.add_adapter(lora)
    cast_training_params(pipe.transformer, torch.float32)
    if args.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    pipe.transformer.to(args.device)
    pipe.vae.to(args.device)
    if args.device != "cpu":
        pipe.vae.enable_slicing()  # decodes one image at a time, whose activations are what fills a GPU's memory
    return pipe


def compile_blocks(transformer):
    """Compiles the transformer's repeated blocks: one graph serves all that are alike, in batches of any size."""
    torch._dynamo.config.recompile_limit = 32  # inner and last block; LoRA on and off
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # instead of a silent fall to eager
    names = transformer._repeated_blocks or ["JointTransformerBlock"]
    for block in transformer.modules():
        if type(block).__name__ in names:
            block.compile(fullgraph=True, dynamic=True)
    transformer.blocks_are_compiled = True


@contextmanager
def adapter_off(pipe):
    """The reference policy: the same model without its LoRA."""
    pipe.transformer.disable_adapters()
    yield
    pipe.transformer.enable_adapters()


def even_batches(rows, micro_batch):
    """Rows (n, ...) in as few batches as have at most `micro_batch` rows, all of even size."""
    return rows.tensor_split(math.ceil(len(rows) / micro_batch)) if len(rows) else ()


def latent_shape(pipe, resolution=0):
    """(C, H, W) of the latents of one image; resolution 0 is the model's own."""
    size = resolution // pipe.vae_scale_factor if resolution else pipe.default_sample_size
    return pipe.vae.config.latent_channels, size, size


@dataclass
class Text:
    """Encoded prompts, a row each, and the empty prompt that classifier-free guidance contrasts them with."""

    embeds: torch.Tensor  # (P, L, D)
    pooled: torch.Tensor  # (P, E)
    empty_embeds: torch.Tensor  # (1, L, D)
    empty_pooled: torch.Tensor  # (1, E)

    def rows(self, index):
        return Text(self.embeds[index], self.pooled[index], self.empty_embeds, self.empty_pooled)


@torch.no_grad()
def encode(pipe, prompts, args):
    """Text of P prompts, each encoded once. The text encoders are on the device only while a prompt is new to them."""
    encoded = pipe.__dict__.setdefault("encoded_prompts", {})  # prompt -> (embeds (L, D), pooled (E,)), on the CPU
    if sum(t.nbytes for tensors in encoded.values() for t in tensors) > TEXT_CACHE:
        encoded.clear()
    new = [p for p in dict.fromkeys([*prompts, ""]) if p not in encoded]
    if new:
        text_encoders = [m for name, m in pipe.components.items() if name.startswith("text_encoder") and m is not None]
        for encoder in text_encoders:
            encoder.to(args.device)
        for prompt in new:  # one by one: rounding depends on a batch's size, and a resumed run knows other prompts already
            encoded[prompt] = [t[0].cpu() for t in families.of(pipe).encode(pipe, prompt, args.text_length, args.device)]
        if args.device != "cpu":
            for encoder in text_encoders:
                encoder.to("cpu")
    rows = [torch.stack(t).to(args.device) for t in zip(*(encoded[p] for p in prompts))]
    empty = [t[None].to(args.device) for t in encoded[""]]
    return Text(*rows, *empty)


def velocity(pipe, x, sigma, text, args):
    """v_theta(x, sigma, prompt) (B, C, H, W) in float32, with guidance applied; sigma is (B,)."""
    family, dtype, rows = families.of(pipe), getattr(torch, args.dtype), len(x)
    guided = args.guidance > 1 and family.contrasts(pipe)
    if rows == 1:  # alone a row goes through other kernels, which round otherwise
        x, sigma, text = x.expand(2, -1, -1, -1), sigma.expand(2), text.rows([0, 0])
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
    return v[:rows] if wanted else v[:rows].detach()


def schedule(pipe, steps, device="cpu"):
    """The pipeline's own noise levels (T + 1,): sigmas[0] = 1 > ... > sigmas[T] = 0."""
    if steps == 1:  # of which a scheduler with shift_terminal makes 0 / 0
        return torch.tensor([1.0, 0.0], device=device)
    return families.of(pipe).schedule(pipe, steps).to(device)


def sde_step(v, x, sigma, sigma_next, sigma_max, eta, sde):
    """Mean (B, ...) and std (B, 1, ...) of x_{k+1} ~ N(mean, std² I) given x_k, in float32 or better.

    v and x are (B, ...), sigma and sigma_next (B,); with eta = 0 every kind is the Euler step x + v dt of the ODE.
    Where sigma = 1 the formulas of `flow` and `ddim` are singular or zero and sigma_max = sigmas[1] stands in.

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
        raise ValueError(f"sde must be one of {', '.join(SDES)}, not {sde}")
    std = sigma_next * math.sin(eta * math.pi / 2) if sde == "cps" else eta * sigma_next * (1 - s).sqrt()
    # (1 - sigma_next) x0 + sqrt(sigma_next² - std²) x1, written so that std = 0 leaves exactly the Euler step. With
    # cps at eta = 1 rounding can make the root's argument a hair negative.
    x1 = x + (1 - sigma) * v
    return x + v * dt + ((sigma_next**2 - std**2).clamp(min=0).sqrt() - sigma_next) * x1, std


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


def group_noise(args, iteration, group, shape):
    """Noise of one group in one iteration: (*shape) to start from and (G, S, *shape) for the SDE, on the CPU.

    A stream of its own for every (seed, iteration, group), so that neither micro-batches nor ranks nor a resume change it.
    """
    seed = np.random.SeedSequence((args.seed, iteration, group)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(seed >> 1))
    start = torch.randn(shape, generator=generator)
    return start, torch.randn(args.group_size, args.steps - args.ode_steps, *shape, generator=generator)


@torch.no_grad()
def sample_ode(pipe, prompts, noise, steps, args, tuned_steps=None):
    """Images (B, 3, H, W) of B prompts by `steps` Euler steps from noise (B, C, H, W).

    The LoRA takes part in the first `tuned_steps` of them (None: in all), the model without it does the rest.
    """
    text = encode(pipe, prompts, args)
    sigmas = schedule(pipe, steps, args.device)
    images = []
    for rows in even_batches(torch.arange(len(prompts)), args.micro_batch):
        x = noise[rows].to(args.device)
        for k in range(steps):
            with nullcontext() if tuned_steps is None or k < tuned_steps else adapter_off(pipe):
                v = velocity(pipe, x, sigmas[k].expand(len(rows)), text.rows(rows), args)
            x = x + v * (sigmas[k + 1] - sigmas[k])
        images.append(decode(pipe, x))
    return torch.cat(images)
