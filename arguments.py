"""The command line: flags that all programs share, presets, and a sentence for every value that will not do."""

import json
import math
import sys
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

import families
import miniature
import rewards
from machine import fail, rank_world


@dataclass
class Model:
    """What every program that loads a model has to know of it."""

    model: str = "tiny"
    """tiny, sd3, sd3-medium, flux, klein, or a local folder or hub id of a pipeline of their families (families/)"""
    reward: str = "shapes"
    """what images are rewarded for: a name in rewards.REWARDS, or a sum like ocr=0.8,pickscore=0.2"""
    prompt_file: str = ""
    """text file of prompts, one per line, instead of the reward's own; every fourth is held out"""
    guidance: float = 1.0
    """guidance scale. Classifier-free: 1 is without, above 1 costs a second row for each image; FLUX.1-dev takes it as an input"""
    shift: float = 0.0
    """constant shift s of the noise schedule, sigma -> s sigma / (1 + (s - 1) sigma); 0 is the model's own schedule"""
    resolution: int = 0
    """height and width of the images; 0 is the model's own"""
    text_length: int = 1
    """tokens of T5 (or Qwen3) that a prompt is padded or cut to; a model without T5 gets zeros in their place"""
    micro_batch: int = 128
    """latents that go through the model at a time (with classifier-free guidance twice as many rows)"""
    rank: int = 32
    """rank of the LoRA; its alpha is twice that"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of the model's matrix products; LoRA weights and log-probabilities are float32"""
    device: str = "auto"
    """auto, cpu or cuda"""


@dataclass
class Training(Model):
    """What the three training scripts share beside their algorithm."""

    anneal_lr: bool = True
    """let the learning rate fall linearly to 0 over --iterations"""
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
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    compile: bool = True
    """compile the log-probability, and in a run long enough to repay it the transformer's blocks"""


@dataclass
class Examined(Model):
    """What the programs share that examine a model, or what a run made of it: evaluate.py and experiments/credit.py."""

    lora: str = ""
    """folder of a run; its model, reward, steps, guidance and so on are the defaults then. Empty: the model as it is"""


def preset_of(model):
    """The settings that a model starts from: its family's, or none for the miniature. A model of no family ends the program."""
    check_model(model)
    if miniature.is_miniature(model):
        return {}
    try:
        return families.of_model(model).PRESET
    except ValueError as error:
        fail(str(error))


def cli(Args, description, argv=None, default=None):
    """An Args from the command line (or `argv`) over `default`; --help lists the class's own flags and those it inherits apart."""
    shared, default = Args.__bases__[0], default or Args()
    inherited = {f.name: f for f in fields(shared)}
    hidden = {name: tyro.conf.Fixed[tyro.conf.Suppress[f.type]] for name, f in inherited.items()}
    own = dataclass(type("Own", (Args,), {"__annotations__": hidden, **{name: f.default for name, f in inherited.items()}}))
    groups = [(name, tyro.conf.OmitArgPrefixes[kind]) for name, kind in (("algorithm", own), ("run", shared))]
    both = make_dataclass("Both", groups)
    start = both(own(**vars(default)), shared(**{name: getattr(default, name) for name in inherited}))
    found = tyro.cli(both, description=description, args=argv, default=start)
    return Args(**vars(found.algorithm) | vars(found.run))


def parse_args(Args, description, argv=None):
    """The command line (or `argv`) over the model's preset over the defaults of `Args`, checked."""
    argv = sys.argv[1:] if argv is None else argv
    if not any(flag.split("=")[0] == "--resume" for flag in argv) or "--help" in argv:
        model = cli(Args, description, [flag for flag in argv if flag not in ("--help", "-h")]).model
        known = {name: value for name, value in preset_of(model).items() if name in Args.__dataclass_fields__}
        args = cli(Args, description, argv, Args(**known))
    else:  # a run is resumed with the arguments it was started with; those given now win
        folder = Path(cli(Args, description, argv).resume)
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
        args = cli(Args, description, argv, args)
        args.output_dir = str(folder)
    check(args)
    if args.resume and not (Path(args.resume) / "state.pt").exists():
        args.resume = ""  # it was killed before its first save, so it begins again in its folder
    return args


def parse_examined(Args, description, steps="steps"):
    """The command line over the settings of --lora's run over the model's preset; `steps` is what a run calls --steps."""
    given = cli(Args, description)
    saved = dict(preset_of(given.model))
    if given.lora:
        try:
            saved = json.loads((Path(given.lora) / "args.json").read_text())
        except (OSError, ValueError):
            fail(f"--lora {given.lora} is not the folder of a run: it has no readable args.json")
    saved["steps"] = saved.get(steps, Args.steps)
    own = ("output_dir", "substeps", "seed", "device", "dtype")  # not taken from a run
    defaults = {name: saved[name] for name in Args.__dataclass_fields__ if name in saved and name not in own}
    return cli(Args, description, default=Args(**defaults))


def check_model(model):
    """Ends the program if a --model is no name of ours, no saved pipeline and nothing like a hub id."""
    if model not in families.MODELS and not Path(model).is_dir() and model.count("/") != 1:
        fail(f"--model {model} is neither {', '.join(families.MODELS)} nor a folder nor a hub id like owner/name")
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
    for name in f"{counts} chunk_size max_chunk substeps".split():
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    for name in ("lr", "clip", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be a positive number")
    limit = 1.0 if args.sde in ("cps", "ddim") else math.inf
    if not 0 < args.eta <= limit:
        fail(f"--eta {args.eta} must be above 0{' and at most 1' if limit == 1 else ''} for --sde {args.sde}")
    if hasattr(args, "chunks"):
        check_chunks(args, args.steps - args.ode_steps)
    if args.prompts % rank_world()[1]:
        fail(f"--prompts {args.prompts} cannot be shared equally by {rank_world()[1]} processes; it must be a multiple of that")
    if len(rewards.held_out_prompts(rewards.prompt_set(args)[1], args.eval_images)[0]) < rank_world()[1]:
        fail(f"--eval-images {args.eval_images} cannot be shared by {rank_world()[1]} processes; it must be at least that many")
    if args.updates > args.prompts * args.group_size:
        fail(f"--updates {args.updates} is more than the {args.prompts * args.group_size} images of an iteration")
    if rank_world()[0] == 0 and not args.resume and args.output_dir and Path(args.output_dir).exists():
        if not Path(args.output_dir).is_dir() or any(Path(args.output_dir).glob("[!.]*")):
            fail(f"--output-dir {args.output_dir} already holds files; name a new folder, or continue the run with --resume")


def check_chunks(args, S):
    """What is particular to gcpo.py, with its S stochastic steps."""
    if not 0 < args.chunk_fraction <= 1:
        fail(f"--chunk-fraction {args.chunk_fraction} must be above 0 and at most 1")
    if args.weighted and args.chunk_fraction == 1:
        fail("--weighted draws chunks where not all are trained; give --chunk-fraction below 1 with it")
    if args.chunk_size and args.chunks:
        fail("--chunk-size and --chunks exclude each other; give one, or neither for adaptive chunks")
    if args.chunk_size and args.chunk_size > S:
        fail(f"--chunk-size {args.chunk_size} must be from 1 to S = {S}, which is --steps less --ode-steps")
    if args.chunks and (sum(args.chunks) != S or min(args.chunks) < 1):
        sizes = " ".join(map(str, args.chunks))
        fail(f"--chunks {sizes} must be positive and sum to S = {S}, which is --steps less --ode-steps")
    longest = max(args.chunks) if args.chunks else args.chunk_size or min(args.max_chunk, S)
    if longest > args.micro_batch:
        fail(f"--micro-batch {args.micro_batch} must hold the steps of a whole chunk, of which there are up to {longest}")
