"""What no algorithm changes: loading a pipeline, text, velocity, noise schedule, SDE step, decoding, evaluation, saving.

Notation, as in the algorithm scripts: noise levels sigmas[0] = 1 > ... > sigmas[T] = 0. Transition k moves x_k at
sigma = sigmas[k] to x_{k+1} at sigma_next = sigmas[k + 1]. Papers count the other way: their x_T is our x_0 index.
Latents are (B, C, H, W), scaled as the transformer sees them; images are (B, 3, H, W) in [0, 1].
"""

import atexit
import json
import math
import os
import resource
import shutil
import sys
import textwrap
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns at import that torchvision is missing
import diffusers
import numpy as np
import torch
import torch.distributed as dist
import transformers
import tyro
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.training_utils import cast_training_params
from diffusers.utils import make_image_grid
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import save

import rewards
import shapes

MODELS = {
    "tiny": str(Path(__file__).parent / "tiny-sd3"),
    "sd3": "stabilityai/stable-diffusion-3.5-medium",
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
}
# The defaults in each script's Args are for the miniature. Everything else starts from Flow-GRPO's settings for
# SD3.5-medium (https://arxiv.org/abs/2505.05470); a flag given on the command line always wins. Their `flow` kernel is the
# one for a stock schedule, whose last but one sigma is 0.009: the std that `cps` and `ddim` then give the last trained
# step is as small, and its gradient drowns the others.
PRESETS = {
    "tiny": {},
    "other": dict(
        reward="jpeg-compressibility", prompts=8, group_size=8, steps=10, eta=0.7, sde="flow", guidance=4.5, lr=3e-4,
        anneal_lr=False, clip=1e-4, beta=0.04, resolution=512, text_length=128, micro_batch=8, eval_steps=40, eval_images=64,
        gradient_checkpointing=True,
    ),
}  # fmt: skip
LORA_TARGETS = [f"attn.{name}" for name in "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()]
SDES = ("flow", "dance", "cps", "ddim")


def fail(message):
    """Bad input: one sentence on stderr, exit code 2, no traceback."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def preset_of(model):
    """The settings that a model starts from."""
    return PRESETS["tiny" if rewards.is_miniature(model) else "other"]


def parse_args(Args, description, argv=None):
    """The command line (or `argv`) over the model's preset over the defaults of `Args`, checked."""
    argv = sys.argv[1:] if argv is None else argv
    if not any(flag.split("=")[0] == "--resume" for flag in argv) or "--help" in argv:
        model = tyro.cli(Args, description=description, args=[flag for flag in argv if flag not in ("--help", "-h")]).model
        preset = preset_of(model)
        known = {name: value for name, value in preset.items() if name in Args.__dataclass_fields__}
        args = tyro.cli(Args, description=description, default=Args(**known), args=argv)
    else:  # a run is resumed with the arguments it was started with; those given now win
        folder = Path(tyro.cli(Args, description=description, args=argv).resume)
        if any(flag.split("=")[0] in ("--output-dir", "--output_dir") for flag in argv):
            fail("--resume writes on in the folder it names; leave --output-dir away")
        try:
            saved = json.loads((folder / "args.json").read_text())
            script = saved.pop("script")
            if script != Path(sys.argv[0]).stem:
                fail(f"--resume {folder} was written by {script}.py; resume it with that script")
            saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
            args = Args(**{**saved, "resume": str(folder)})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            fail(f"--resume {folder} is not the folder of a run: it has no readable args.json")
        args = tyro.cli(Args, description=description, default=args, args=argv)
        args.output_dir = str(folder)
    check(args)
    if args.resume and not (Path(args.resume) / "state.pt").exists():
        args.resume = ""  # it was killed before its first save, so it begins again in its folder
    return args


def rank_world():
    """This process's rank and the number of processes, as torchrun sets them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def gather(rows):
    """The rows of all ranks (world · n, ...) in rank order, from this rank's (n, ...)."""
    if not dist.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def check_model_and_reward(args):
    """What the scripts and evaluate.py have in common."""
    try:
        rewards.prompt_set(args)
    except (OSError, ValueError) as error:
        fail(str(error))
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if args.device not in ("auto", "cpu", *gpus) and not (args.device == "cuda" and gpus):
        fail(f"--device {args.device} is not available; use {' or '.join(['auto', 'cpu', *gpus])}")
    if args.model not in MODELS and not Path(args.model).is_dir() and args.model.count("/") != 1:
        fail(f"--model {args.model} is neither {', '.join(MODELS)} nor a folder nor a hub id like owner/name")
    if Path(args.model).is_dir() and not (Path(args.model) / "model_index.json").is_file():
        fail(f"--model {args.model} has no model_index.json, so it is not a pipeline saved by diffusers")
    if getattr(args, "seed", 0) >= 2**63:
        fail(f"--seed {args.seed} must be below 2**63")
    for name in ("guidance", "resolution", "beta", "seed"):
        if not 0 <= getattr(args, name, 0) < math.inf:
            fail(f"--{name} {getattr(args, name)} must be a number from 0 up")


def check(args):
    """Answers bad values with one sentence, before anything slow starts."""
    check_model_and_reward(args)
    if args.group_size < 2:
        fail(f"--group-size {args.group_size} leaves nothing to compare within a group; it must be at least 2")
    if args.steps < 2:
        fail(f"--steps {args.steps} leaves no step to train, since the last one is deterministic; it must be at least 2")
    counts = "iterations prompts updates micro_batch rank text_length eval_every eval_images eval_steps save_every"
    for name in f"{counts} chunk_size min_chunk substeps".split():
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    for name in ("lr", "clip", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be a positive number")
    for name in ("step_fraction", "chunk_fraction"):
        if not 0 < getattr(args, name, 1.0) <= 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be above 0 and at most 1")
    S, chunk_size, chunks = args.steps - 1, getattr(args, "chunk_size", None), getattr(args, "chunks", None)
    if chunk_size and chunks:
        fail("--chunk-size and --chunks exclude each other; give one, or neither for adaptive chunks")
    if chunk_size and chunk_size > S:
        fail(f"--chunk-size {chunk_size} must be from 1 to S = {S}, one less than --steps")
    if chunks and (sum(chunks) != S or min(chunks) < 1):
        fail(f"--chunks {' '.join(map(str, chunks))} must be positive and sum to S = {S}, one less than --steps")
    limit = 1.0 if args.sde in ("cps", "ddim") else math.inf
    if not 0 < args.eta <= limit:
        fail(f"--eta {args.eta} must be above 0{' and at most 1' if limit == 1 else ''} for --sde {args.sde}")
    if args.prompts % rank_world()[1]:
        fail(f"--prompts {args.prompts} cannot be shared equally by {rank_world()[1]} processes; it must be a multiple of that")
    if len(rewards.held_out_prompts(rewards.prompt_set(args)[1], args.eval_images)[0]) < rank_world()[1]:
        fail(f"--eval-images {args.eval_images} cannot be shared by {rank_world()[1]} processes; it must be at least that many")
    if args.updates > args.prompts * args.group_size:
        fail(f"--updates {args.updates} is more than the {args.prompts * args.group_size} images of an iteration")
    if rank_world()[0] == 0 and not args.resume and args.output_dir and Path(args.output_dir).exists():
        if not Path(args.output_dir).is_dir() or any(Path(args.output_dir).glob("[!.]*")):
            fail(f"--output-dir {args.output_dir} already holds files; name a new folder, or continue the run with --resume")


def resolve_device(args):
    """Replaces `auto` in args.device and args.dtype by what this machine is fastest with; quiets the libraries."""
    sys.excepthook = explain_exception
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" or args.device.startswith("cuda") and rank_world()[1] > 1:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        if int(args.device[5:]) >= torch.cuda.device_count():
            fail(f"torchrun starts more processes than this machine has GPUs; --nproc-per-node may be {torch.cuda.device_count()}")
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    else:
        # PyTorch's fused CPU attention is slow in the backward pass of short sequences. Switched off here and not around
        # the forward pass, because gradient checkpointing runs that again during the backward pass.
        torch.backends.cuda.enable_flash_sdp(False)
    if args.dtype == "auto":
        # bfloat16 only where the processor multiplies it natively; elsewhere it is emulated and slower than float32.
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if args.device.startswith("cuda") else native
        args.dtype = "bfloat16" if fast else "float32"


def has_compiler(device):
    """Whether torch.compile finds what it needs on this machine."""
    compilers = (os.environ.get("CXX", "g++"),) if device == "cpu" else (os.environ.get("CC", "gcc"), "clang")
    return any(map(shutil.which, compilers))


def now():
    """Seconds on a clock that first waits for the GPU, whose calls return before their work is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.monotonic()


def start_run(args, script):
    """Resolves what args leaves open, joins the other processes, makes the run's folder with args.json, loads the pipeline.

    Returns (folder, pipeline with a fresh LoRA). A folder that cannot be written or weights that cannot be loaded end
    the program before anything is lost. Only rank 0 prints and writes.
    """
    rank, world = rank_world()
    resolve_device(args)
    if not args.output_dir:
        name = Path(args.model).name
        args.output_dir = f"runs/{script}__{name}__{args.reward}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    if world > 1:
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
        atexit.register(dist.destroy_process_group)
        shared = [args.output_dir]  # the ranks' clocks may have named it differently
        dist.broadcast_object_list(shared)
        args.output_dir = shared[0]
    if args.compile and not has_compiler(args.device):
        print("no C++ compiler found: the log-probability runs uncompiled, which is slower but the same" * (rank == 0))
        args.compile = False
    torch.compiler.set_stance("default" if args.compile else "force_eager")
    torch.manual_seed(args.seed)
    run_dir = Path(args.output_dir)
    if rank == 0:
        print(f"{script}: " + ", ".join(f"{name} {value}" for name, value in asdict(args).items() if value not in (None, "")))
        try:
            fresh = not run_dir.exists()
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / ".writable").touch()
            (run_dir / ".writable").unlink()
            if fresh:  # a start that fails leaves nothing behind
                run_dir.rmdir()
        except OSError as error:
            fail(f"--output-dir {run_dir} cannot be written: {error.strerror}")
    try:
        rewards.load(args.reward)
    except ValueError as error:
        fail(str(error))
    pipe = load_pipeline(args)
    train_prompts, _ = rewards.prompt_set(args)
    encode(pipe, sum(train_prompts.values(), [])[:512], args)  # a larger set goes on as its prompts are drawn
    if rank == 0 and not args.resume:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / "args.json", {"script": script, **asdict(args)})
    return run_dir, pipe


def explain_exception(kind, error, traceback):
    """Python's own report of an uncaught exception, except that an out-of-memory error names the flags that lower memory."""
    if not issubclass(kind, torch.OutOfMemoryError):
        return sys.__excepthook__(kind, error, traceback)
    print(
        "error: the GPU is out of memory; the last saved state is kept. These flags lower it: --micro-batch, "
        "--gradient-checkpointing, --resolution, --dtype bfloat16, --rank",
        file=sys.stderr,
    )


def load_pipeline(args):
    """The pipeline with a fresh LoRA on its transformer: frozen weights in args.dtype, LoRA weights in float32."""
    dtype = getattr(torch, args.dtype)
    # On a GPU the text encoders are too large for float32 (T5 alone 19 GB); on a CPU there is room for exactness.
    dtypes = {"vae": torch.float32, "transformer": dtype, "default": torch.float32 if args.device == "cpu" else dtype}
    try:
        pipe = StableDiffusion3Pipeline.from_pretrained(MODELS.get(args.model, args.model), dtype=dtypes)
    except (OSError, ValueError, SafetensorError) as error:
        name = MODELS.get(args.model, args.model)
        if Path(name).is_dir() or not isinstance(error, OSError):
            fail(f"{name} could not be loaded as a StableDiffusion3Pipeline: {error}")
        fail(
            f"the weights of {name} are neither on disk nor to be had ({type(error).__name__}); accept their licence on "
            f"https://huggingface.co/{name} and run `hf auth login`, or take --model tiny, which needs no download"
        )
    for module in (pipe.vae, pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        if module is not None:
            module.requires_grad_(False)
    size, factor = pipe.transformer.config.sample_size, pipe.vae_scale_factor * pipe.transformer.config.patch_size
    if args.resolution % factor or args.resolution > pipe.transformer.config.pos_embed_max_size * factor:
        limit = pipe.transformer.config.pos_embed_max_size * factor
        fail(f"--resolution {args.resolution} must be a multiple of {factor} up to {limit} for this model, or 0 for its own")
    if "shapes" in rewards.weights(args.reward) and (args.resolution or size * pipe.vae_scale_factor) != shapes.SIZE:
        fail(f"--reward shapes judges {shapes.SIZE} x {shapes.SIZE} images, which this model does not make; take another reward")
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
    pipe.transformer.add_adapter(lora)
    cast_training_params(pipe.transformer, torch.float32)
    if args.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    pipe.transformer.to(args.device)
    pipe.vae.to(args.device)
    if args.device != "cpu":
        pipe.vae.enable_slicing()  # decodes one image at a time, whose activations are what fills a GPU's memory
    return pipe


def latent_shape(pipe, resolution=0):
    """(C, H, W) of the latents of one image; resolution 0 is the model's own."""
    size = resolution // pipe.vae_scale_factor if resolution else pipe.transformer.config.sample_size
    return pipe.transformer.config.in_channels, size, size


class Text(NamedTuple):
    """Encoded prompts, a row each, and the empty prompt that guidance contrasts them with."""

    embeds: torch.Tensor  # (P, L, D)
    pooled: torch.Tensor  # (P, E)
    empty_embeds: torch.Tensor  # (1, L, D)
    empty_pooled: torch.Tensor  # (1, E)

    def __getitem__(self, rows):
        return Text(self.embeds[rows], self.pooled[rows], self.empty_embeds, self.empty_pooled)


@torch.no_grad()
def encode(pipe, prompts, args):
    """Text of P prompts, each encoded once. The text encoders are on the device only while a prompt is new to them."""
    encoded = pipe.__dict__.setdefault("encoded_prompts", {})  # prompt -> (embeds (L, D), pooled (E,)), on the CPU
    new = [p for p in dict.fromkeys([*prompts, ""]) if p not in encoded]
    if len(encoded) + len(new) > 4096:  # a prompt of the full model is 2 MB
        encoded.clear()
        new = list(dict.fromkeys([*prompts, ""]))
    if new:
        text_encoders = [e for e in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3) if e is not None]
        for encoder in text_encoders:
            encoder.to(args.device)
        for prompt in new:  # one by one: rounding depends on a batch's size, and a resumed run knows other prompts already
            options = dict(do_classifier_free_guidance=False, max_sequence_length=args.text_length, device=args.device)
            embeds, _, pooled, _ = pipe.encode_prompt(prompt, None, None, **options)
            encoded[prompt] = embeds[0].cpu(), pooled[0].cpu()
        if args.device != "cpu":
            for encoder in text_encoders:
                encoder.to("cpu")
    rows = [torch.stack(t).to(args.device) for t in zip(*(encoded[p] for p in prompts))]
    empty = [t[None].to(args.device) for t in encoded[""]]
    return Text(*rows, *empty)


def velocity(pipe, x, sigma, text, args):
    """v_theta(x, sigma, prompt) (B, C, H, W) in float32, with classifier-free guidance applied; sigma is (B,)."""
    dtype = getattr(torch, args.dtype)
    embeds, pooled = text.embeds, text.pooled
    guided = args.guidance > 1
    if guided:
        embeds = torch.cat([text.empty_embeds.expand_as(embeds), embeds])
        pooled = torch.cat([text.empty_pooled.expand_as(pooled), pooled])
        x, sigma = torch.cat([x, x]), torch.cat([sigma, sigma])
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        v = pipe.transformer(x, embeds, pooled, sigma * 1000, return_dict=False)[0].float()
    if guided:
        v_empty, v = v.chunk(2)
        v = v_empty + args.guidance * (v - v_empty)
    return v


def schedule(pipe, steps, device="cpu"):
    """The pipeline's own noise levels (T + 1,): sigmas[0] = 1 > ... > sigmas[T] = 0."""
    if steps == 1:  # of which a scheduler with shift_terminal makes 0 / 0
        return torch.tensor([1.0, 0.0], device=device)
    pipe.scheduler.set_timesteps(steps)
    return pipe.scheduler.sigmas.to(device)


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
    # (1 - sigma_next) x0 + sqrt(sigma_next² - std²) x1, written so that std = 0 leaves exactly the Euler step.
    x1 = x + (1 - sigma) * v
    return x + v * dt + ((sigma_next**2 - std**2).sqrt() - sigma_next) * x1, std


@torch.no_grad()
def decode(pipe, latents):
    """Images (B, 3, H, W) in [0, 1] on the CPU, decoded in bfloat16 where that is native."""
    vae = pipe.vae
    images = []
    for z in latents.split(32):  # of the miniature, what stays in a processor's cache; on a GPU the VAE slices further
        z = z / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        with torch.autocast(z.device.type, pipe.transformer.dtype, enabled=pipe.transformer.dtype != torch.float32):
            image = vae.decode(z, return_dict=False)[0]
        images.append((image.float() / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(images)


def group_noise(args, iteration, group, shape):
    """Noise of one group in one iteration: (*shape) to start from and (G, S, *shape) for the SDE, on the CPU.

    A stream of its own for every (seed, iteration, group), so that neither micro-batches nor ranks nor a resume change it.
    """
    seed = np.random.SeedSequence((args.seed, iteration, group)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(seed >> 1))
    start = torch.randn(shape, generator=generator)
    return start, torch.randn(args.group_size, args.steps - 1, *shape, generator=generator)


@torch.no_grad()
def sample_ode(pipe, prompts, noise, steps, args, tuned_steps=None):
    """Images (B, 3, H, W) of B prompts by `steps` Euler steps from noise (B, C, H, W).

    The LoRA takes part in the first `tuned_steps` of them (None: in all), the model without it does the rest.
    """
    text = encode(pipe, prompts, args)
    sigmas = schedule(pipe, steps, args.device)
    images = []
    for rows in torch.arange(len(prompts)).split(args.micro_batch):
        x = noise[rows].to(args.device)
        for k in range(steps):
            with nullcontext() if tuned_steps is None or k < tuned_steps else adapter_off(pipe):
                v = velocity(pipe, x, sigmas[k].expand(len(rows)), text[rows], args)
            x = x + v * (sigmas[k + 1] - sigmas[k])
        images.append(decode(pipe, x))
    return torch.cat(images)


def evaluate(pipe, args, steps, tuned_steps=None):
    """Scores the model on held-out prompts, always from the same noise: (mean score, {category: score}, (images, prompts)).

    The ranks share the images; those returned are the rank's own.
    """
    rank, world = rank_world()
    prompts, categories = rewards.held_out_prompts(rewards.prompt_set(args)[1], args.eval_images)
    noise = torch.randn(len(prompts), *latent_shape(pipe, args.resolution), generator=torch.Generator().manual_seed(12345))
    mine = prompts[rank::world]
    images = sample_ode(pipe, mine, noise[rank::world], steps, args, tuned_steps)
    scores = np.zeros(len(prompts))
    scores[rank::world] = rewards.build(args.reward).verdict(images, mine).double().numpy()
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, scores)
        scores = np.sum(parts, axis=0)
    by_category = {c: float(scores[[c == d for d in categories]].mean()) for c in dict.fromkeys(categories)}
    return float(scores.mean()), by_category, (images, mine)


@contextmanager
def adapter_off(pipe):
    """The reference policy: the same model without its LoRA."""
    pipe.transformer.disable_adapters()
    try:
        yield
    finally:
        pipe.transformer.enable_adapters()


def lora_state(pipe):
    return {name: p.detach().cpu() for name, p in get_peft_model_state_dict(pipe.transformer).items()}


def set_lora(pipe, weights):
    """Gives the LoRA the weights of another, named as in `lora_state`; a ValueError says that they are of other layers."""
    if set_peft_model_state_dict(pipe.transformer, weights).unexpected_keys:
        raise ValueError("other layers")


@contextmanager
def replacing(path):
    """Yields a temporary name beside `path` and renames it to `path` at the end, so that a kill leaves old or new."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_lora(pipe, run_dir):
    """pytorch_lora_weights.safetensors, as StableDiffusion3Pipeline.load_lora_weights(run_dir) reads it."""
    # diffusers' own file has two metadata entries, which safetensors writes in random order: other bytes every time. With
    # this one alone, which holds the LoRA's alpha, the same weights are the same bytes.
    config = {f"transformer.{name}": value for name, value in pipe.transformer.peft_config["default"].to_dict().items()}
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(config, sort_keys=True, default=sorted)}
    with replacing(run_dir / "pytorch_lora_weights.safetensors") as temporary:
        StableDiffusion3Pipeline.save_lora_weights(
            run_dir,
            transformer_lora_layers=lora_state(pipe),
            weight_name=temporary.name,
            # not save_file, whose own temporary file would outlive a kill
            save_function=lambda weights, path: Path(path).write_bytes(save(weights, metadata)),
        )


def save_state(run_dir, pipe, optimizer, **rest):
    """The LoRA, and everything a run continues from in one file, state.pt; each is replaced whole."""
    save_lora(pipe, run_dir)
    with replacing(run_dir / "state.pt") as temporary:
        torch.save({"lora": lora_state(pipe), "optimizer": optimizer.state_dict(), **rest}, temporary)


def load_state(run_dir, pipe, optimizer, args):
    """Restores LoRA and optimizer of a run and returns the rest; a missing, unfit or finished state ends the program."""
    path = run_dir / "state.pt"
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        set_lora(pipe, state.pop("lora"))
        optimizer.load_state_dict(state.pop("optimizer"))
    except Exception as error:
        fail(f"{path} cannot be resumed from ({type(error).__name__}): it is damaged or was made with other settings")
    done, planned = state["iteration"], json.loads((run_dir / "args.json").read_text())["iterations"]
    if done > args.iterations or done == args.iterations and (done < planned or (run_dir / "result.json").exists()):
        fail(f"the run already has its {done} iterations; give a larger --iterations to go on")
    if rank_world()[0] == 0:
        (run_dir / "result.json").unlink(missing_ok=True)  # of the shorter run
        write_json(run_dir / "args.json", {**json.loads((run_dir / "args.json").read_text()), **asdict(args)})
    return state


def write_json(path, content):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def save_grid(images, captions, path, columns=8):
    """A PNG of up to six rows of neighbouring images over their captions, also returned as a (H, W, 3) uint8 array."""
    starts = range(0, len(images), max(columns, math.ceil(len(images) / 6)))  # of six categories one row each
    picked = [i for start in starts for i in range(start, min(start + columns, len(images)))]
    width = max(128, images.shape[-1])
    tiles = []
    for i in picked[: len(picked) // columns * columns or len(picked)]:
        image = Image.fromarray((images[i].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
        tile = Image.new("RGB", (width + 4, width + 30), "white")
        tile.paste(image.resize((width, width)), (2, 2))
        ImageDraw.Draw(tile).text((4, width + 3), textwrap.fill(captions[i], width // 6, max_lines=2), fill="black")
        tiles.append(tile)
    grid = make_image_grid(tiles, rows=-(-len(tiles) // columns), cols=min(columns, len(tiles)))
    with replacing(path) as temporary:
        grid.save(temporary, format="PNG")
    return np.asarray(grid)


def report(args, algorithm, run_dir, held_out, seconds):
    """Writes result.json and prints, by category, what the run did to the held-out score and where to look."""
    result = dict(algorithm=algorithm, model=args.model, reward=args.reward, seed=args.seed, iterations=args.iterations)
    result |= dict(**held_out, seconds=seconds, train_images=args.iterations * args.prompts * args.group_size)
    result |= dict(peak_memory_mb=peak_memory_mb(args.device))
    write_json(run_dir / "result.json", result)
    for name, base in held_out["base_categories"].items():
        print(f"{name:20} {base:7.3f} -> {held_out['final_categories'].get(name, math.nan):7.3f}")
    print(f"{'all':20} {held_out['base_score']:7.3f} -> {held_out['final_score']:7.3f}")
    print(f"{seconds / 60:.1f} min of training, peak memory {result['peak_memory_mb']:.0f} MB")
    print(f"Look at it: tensorboard --logdir {run_dir.parent}, or {run_dir}/before.png and after.png")
    print(f"Load it in diffusers: StableDiffusion3Pipeline.from_pretrained(...).load_lora_weights('{run_dir}')")


def peak_memory_mb(device):
    """Most memory the run has held: of the GPU, or of the process on a CPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
