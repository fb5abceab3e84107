"""The command line: presets, the flags over them, what `auto` stands for, and a sentence for every value that will not do."""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

import miniature
import rewards
import sampler

# The defaults in each script's Args are for the miniature. Everything else starts from the settings of its family; a flag
# given on the command line always wins. These are Flow-GRPO's for SD3.5-medium (https://arxiv.org/abs/2505.05470). Their
# `flow` kernel is the one for a stock schedule, whose last but one sigma is 0.009: the std that `cps` and `ddim` then give the
# last trained step is as small, and its gradient drowns the others.
SD3 = dict(
    reward="jpeg-compressibility", prompts=8, group_size=8, steps=10, ode_steps=1, eta=0.7, sde="flow", guidance=4.5, lr=3e-4,
    anneal_lr=False, clip=1e-4, min_chunk=4, beta=0.04, resolution=512, text_length=128, micro_batch=8, eval_steps=40,
    eval_images=64, gradient_checkpointing=True,
)  # fmt: skip
PRESETS = {
    "tiny": {},
    "sd3": SD3,
    "sd3-medium": SD3,
    # GCPO's for FLUX.1-dev (https://arxiv.org/abs/2510.21583). It trains all weights, at lr 1e-5; a LoRA takes the rank and
    # the lr of Flow-GRPO's for FLUX.
    "flux": SD3 | dict(
        reward="hpsv3", group_size=12, steps=17, shift=3.0, guidance=3.5, clip=5e-5, beta=0.0, chunk_fraction=0.5, rank=64,
        resolution=720, text_length=512, micro_batch=4, eval_steps=28,
    ),
    # Meant for one GPU of 24 GB, not measured there.
    "klein": SD3 | dict(guidance=4.0, text_length=512, micro_batch=4, beta=0.0),
}  # fmt: skip


def fail(message):
    """Bad input: one sentence on stderr, exit code 2, no traceback."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def preset_of(model):
    """The settings that a model starts from: its own or its family's. A model of none ends the program."""
    check_model(model)
    if model in PRESETS or miniature.is_miniature(model):
        return PRESETS.get(model, PRESETS["tiny"])
    try:
        return PRESETS[sampler.family_of(model).NAME]
    except ValueError as error:
        fail(str(error))


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
            script, _ = saved.pop("script"), saved.pop("compiled_blocks", None)
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


@dataclass
class Examined:
    """Flags of the programs that examine a model, or what a run made of it: evaluate.py and experiments/credit.py."""

    model: str = "tiny"
    """tiny, sd3, sd3-medium, flux, klein, or a local folder or hub id of a pipeline of their families (families/)"""
    lora: str = ""
    """folder of a run; its model, reward, steps, guidance and so on are the defaults then. Empty: the model as it is"""
    reward: str = "shapes"
    """what images are scored for: a name in rewards.REWARDS, or a sum like ocr=0.8,pickscore=0.2"""
    prompt_file: str = ""
    """text file of prompts, one a line, instead of the reward's own; every fourth is held out"""
    shift: float = 0.0
    """constant shift s of the noise schedule, sigma -> s sigma / (1 + (s - 1) sigma); 0 is the model's own schedule"""
    guidance: float = 1.0
    """guidance scale: classifier-free, where at most 1 is without, or for a guidance-distilled model (FLUX.1-dev) its input"""
    resolution: int = 0
    """height and width of the images; 0 is the model's own"""
    text_length: int = 1
    """rows that T5 makes of a prompt (zeros in a model without T5), or Qwen3 in its place"""
    micro_batch: int = 128
    """latents that go through the model at a time"""
    rank: int = 32
    """rank of the LoRA"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of the model's matrix products"""
    device: str = "auto"
    """auto, cpu or cuda"""


def parse_examined(Args, description, steps="steps"):
    """The command line over the settings of --lora's run over the model's preset; `steps` is what a run calls --steps."""
    given = tyro.cli(Args, description=description)
    saved = dict(preset_of(given.model))
    if given.lora:
        try:
            saved = json.loads((Path(given.lora) / "args.json").read_text())
        except (OSError, ValueError):
            fail(f"--lora {given.lora} is not the folder of a run: it has no readable args.json")
    saved["steps"] = saved.get(steps, Args.steps)
    own = ("output_dir", "substeps", "seed", "device", "dtype")  # not taken from a run
    defaults = {name: saved[name] for name in Args.__dataclass_fields__ if name in saved and name not in own}
    return tyro.cli(Args, description=description, default=Args(**defaults))


def rank_world():
    """This process's rank and the number of processes, as torchrun sets them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def check_model(model):
    """Ends the program if a --model is no name of ours, no saved pipeline and nothing like a hub id."""
    if model not in sampler.MODELS and not Path(model).is_dir() and model.count("/") != 1:
        fail(f"--model {model} is neither {', '.join(sampler.MODELS)} nor a folder nor a hub id like owner/name")
    if Path(model).is_dir() and not (Path(model) / "model_index.json").is_file():
        fail(f"--model {model} has no model_index.json, so it is not a pipeline saved by diffusers")


def check_model_and_reward(args):
    """What the scripts and evaluate.py have in common."""
    try:
        rewards.prompt_set(args)
    except (OSError, ValueError) as error:
        fail(str(error))
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if args.device not in ("auto", "cpu", *gpus) and not (args.device == "cuda" and gpus):
        fail(f"--device {args.device} is not available; use {' or '.join(['auto', 'cpu', *gpus])}")
    check_model(args.model)
    if getattr(args, "seed", 0) >= 2**63:
        fail(f"--seed {args.seed} must be below 2**63")
    for name in ("shift", "guidance", "resolution", "beta", "seed"):
        if not 0 <= getattr(args, name, 0) < math.inf:
            fail(f"--{name} {getattr(args, name)} must be a number from 0 up")


def check(args):
    """Answers bad values with one sentence, before anything slow starts."""
    check_model_and_reward(args)
    if args.group_size < 2:
        fail(f"--group-size {args.group_size} leaves nothing to compare within a group; it must be at least 2")
    if not 1 <= args.ode_steps < args.steps:
        fail(f"--ode-steps {args.ode_steps} must be at least 1, as the last step has no noise, and less than --steps {args.steps}")
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
    S, chunk_size, chunks = args.steps - args.ode_steps, getattr(args, "chunk_size", None), getattr(args, "chunks", None)
    if chunk_size and chunks:
        fail("--chunk-size and --chunks exclude each other; give one, or neither for adaptive chunks")
    if chunk_size and chunk_size > S:
        fail(f"--chunk-size {chunk_size} must be from 1 to S = {S}, which is --steps less --ode-steps")
    if chunks and (sum(chunks) != S or min(chunks) < 1):
        fail(f"--chunks {' '.join(map(str, chunks))} must be positive and sum to S = {S}, which is --steps less --ode-steps")
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
    import diffusers  # not above: sampler sets what they say when they are imported
    import transformers

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


def explain_exception(kind, error, traceback):
    """Python's own report of an uncaught exception, except that an out-of-memory error names the flags that lower memory."""
    if not issubclass(kind, torch.OutOfMemoryError):
        return sys.__excepthook__(kind, error, traceback)
    print(
        "error: the GPU is out of memory; the last saved state is kept. These flags lower it: --micro-batch, "
        "--gradient-checkpointing, --resolution, --dtype bfloat16, --rank",
        file=sys.stderr,
    )
