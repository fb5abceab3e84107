"""What surrounds an algorithm and none is about: arguments and checks, processes, the run's folder, evaluation, saving, reports."""

import atexit
import json
import math
import os
import resource
import shutil
import signal
import sys
import textwrap
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.distributed as dist
import transformers
import tyro
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import make_image_grid
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image, ImageDraw
from safetensors.torch import save
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import miniature
import rewards
import sampler
from miniature import shapes

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


def fail(message):
    """Bad input: one sentence on stderr, exit code 2, no traceback."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def preset_of(model):
    """The settings that a model starts from."""
    return PRESETS["tiny" if miniature.is_miniature(model) else "other"]


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


def sum_over_processes(parameters):
    """Replaces the gradients by their sum over all processes, sent in one piece; a process may have had nothing to train."""
    if not dist.is_initialized():
        return
    gradients = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    dist.all_reduce(gradients)
    for p, gradient in zip(parameters, gradients.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p)


def check_model_and_reward(args):
    """What the scripts and evaluate.py have in common."""
    try:
        rewards.prompt_set(args)
    except (OSError, ValueError) as error:
        fail(str(error))
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if args.device not in ("auto", "cpu", *gpus) and not (args.device == "cuda" and gpus):
        fail(f"--device {args.device} is not available; use {' or '.join(['auto', 'cpu', *gpus])}")
    if args.model not in sampler.MODELS and not Path(args.model).is_dir() and args.model.count("/") != 1:
        fail(f"--model {args.model} is neither {', '.join(sampler.MODELS)} nor a folder nor a hub id like owner/name")
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


def explain_exception(kind, error, traceback):
    """Python's own report of an uncaught exception, except that an out-of-memory error names the flags that lower memory."""
    if not issubclass(kind, torch.OutOfMemoryError):
        return sys.__excepthook__(kind, error, traceback)
    print(
        "error: the GPU is out of memory; the last saved state is kept. These flags lower it: --micro-batch, "
        "--gradient-checkpointing, --resolution, --dtype bfloat16, --rank",
        file=sys.stderr,
    )


def evaluate(pipe, args, steps, tuned_steps=None):
    """Scores the model on held-out prompts, always from the same noise: (scores (N,), prompts, categories, images).

    The ranks share the work and each has all scores; the images are the rank's own, of prompts[rank::world].
    """
    rank, world = rank_world()
    prompts, categories = rewards.held_out_prompts(rewards.prompt_set(args)[1], args.eval_images)
    noise = torch.randn(len(prompts), *sampler.latent_shape(pipe, args.resolution), generator=torch.Generator().manual_seed(12345))
    images = sampler.sample_ode(pipe, prompts[rank::world], noise[rank::world], steps, args, tuned_steps)
    scores = np.zeros(len(prompts))
    scores[rank::world] = rewards.build(args.reward).verdict(images, prompts[rank::world]).double().numpy()
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, scores)
        scores = np.sum(parts, axis=0)
    return scores, prompts, categories, images


def category_means(scores, categories):
    """{category: mean of its scores}"""
    return {c: float(scores[[c == d for d in categories]].mean()) for c in dict.fromkeys(categories)}


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


def require_writable(folder):
    """Ends the program if a folder cannot be written; makes none, so that a start that fails leaves nothing behind."""
    try:
        fresh = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
        if fresh:
            folder.rmdir()
    except OSError as error:
        fail(f"--output-dir {folder} cannot be written: {error.strerror}")


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


def peak_memory_mb(device):
    """Most memory the run has held: of the GPU, or of the process on a CPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def load(args):
    """The reward's networks and the pipeline with a fresh LoRA; what cannot be loaded or does not fit ends the program."""
    try:
        rewards.load(args.reward)
        pipe = sampler.load_pipeline(args)
    except ValueError as error:
        fail(str(error))
    size = args.resolution or sampler.latent_shape(pipe)[-1] * pipe.vae_scale_factor
    if "shapes" in rewards.weights(args.reward) and size != shapes.SIZE:
        fail(f"--reward shapes judges {shapes.SIZE} x {shapes.SIZE} images, which this model does not make; take another reward")
    return pipe


class Run:
    """A training run: its processes, folder, TensorBoard page, held-out scores, saves and stops. Only rank 0 prints and writes."""

    def __init__(self, args, script):
        """Joins the other processes, loads pipeline and reward, makes the folder; what is wrong is found before a loss."""
        self.args, self.script, self.held_out, self.seconds = args, script, {}, 0.0
        self.rank, self.world = rank_world()
        resolve_device(args)
        if not args.output_dir:
            name = Path(args.model).name
            args.output_dir = f"runs/{script}__{name}__{args.reward}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        if self.world > 1:
            dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
            atexit.register(dist.destroy_process_group)
            shared = [args.output_dir]  # the ranks' clocks may have named it differently
            dist.broadcast_object_list(shared)
            args.output_dir = shared[0]
        if args.compile and not has_compiler(args.device):
            print("no C++ compiler found: the log-probability runs uncompiled, which is slower but the same" * (self.rank == 0))
            args.compile = False
        torch.compiler.set_stance("default" if args.compile else "force_eager")
        torch.manual_seed(args.seed)
        self.folder = Path(args.output_dir)
        if self.rank == 0:
            print(f"{script}: " + ", ".join(f"{name} {value}" for name, value in asdict(args).items() if value not in (None, "")))
            require_writable(self.folder)
        self.pipe = load(args)
        train_prompts, _ = rewards.prompt_set(args)
        sampler.encode(self.pipe, sum(train_prompts.values(), [])[:512], args)  # a larger set goes on as its prompts are drawn
        if self.rank == 0 and not args.resume:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "args.json", {"script": script, **asdict(args)})

    def iterations(self, optimizer):
        """Yields the iterations left to do. Before the first it scores the base model, or restores an interrupted run.

        After each it logs, saves, scores, and leaves if Ctrl-C was pressed; a second Ctrl-C is Python's own.
        """
        args, self.optimizer = self.args, optimizer
        stop_requested = []

        def request_stop(*_):
            stop_requested.append(True)
            signal.signal(signal.SIGINT, signal.default_int_handler)

        signal.signal(signal.SIGINT, request_stop)
        first = self.restore() if args.resume else 0
        if self.rank == 0:  # purging drops what a killed run logged after its last save
            self.writer = SummaryWriter(self.folder, purge_step=first + bool(args.resume))
        if not args.resume:
            if self.rank == 0:
                self.writer.add_text("args", "|name|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in vars(args).items()))
            self.evaluate(0)
        bar = tqdm(range(first, args.iterations), initial=first, total=args.iterations, dynamic_ncols=True, disable=self.rank > 0)
        for iteration in bar:
            self.laps, self.stats, self.logged, self.stamp = {}, defaultdict(float), {}, now()
            self.evaluates = (iteration + 1) % args.eval_every == 0 or iteration + 1 == args.iterations
            yield iteration
            self.write_scalars(iteration + 1)
            bar.set_postfix(reward=f"{self.logged['charts/reward']:.3f}", best=f"{self.held_out['best_score']:.3f}")
            if self.evaluates:
                self.evaluate(iteration + 1)
            stop = gather(torch.tensor([len(stop_requested)], device=args.device)).any()
            if (iteration + 1) % args.save_every == 0 or iteration + 1 == args.iterations or stop:
                self.save(iteration + 1)
            if stop and iteration + 1 < args.iterations:
                raise SystemExit(f"stopped after iteration {iteration + 1}; continue with --resume {self.folder}")
        if self.rank == 0:
            self.writer.close()
            self.report()

    def lap(self, name):
        """Books the seconds since the last lap, or the start of the iteration, as time/<name>."""
        stamp = now()
        self.laps[f"time/{name}"], self.stamp = stamp - self.stamp, stamp

    def record(self, section, number, weight=1.0, **values):
        """Adds values (n,) with weights (n,) to the iteration's <section>/<name>_<number>, a weighted mean over all processes."""
        for name, value in values.items():
            weight = torch.as_tensor(weight, device=value.device).expand(len(value))
            self.stats[f"{section}/{name}_{number}"] += torch.stack([(weight * value.detach()).sum(), weight.sum()])

    def require_finite(self, norm):
        """Ends the run before a gradient whose norm is not finite spoils the weights."""
        if not norm.isfinite():
            raise SystemExit(f"the gradient is not finite; the last good state is kept in {self.folder}")

    def log(self, values):
        """Numbers, and arrays as histograms, of this iteration by their names on the TensorBoard page."""
        self.logged |= values

    def picture(self, name, step, images, captions, columns=8, tag=None):
        """Saves a grid of images over their captions as <name>.png and shows it on the TensorBoard page."""
        if self.rank == 0:
            grid = save_grid(images, captions, self.folder / f"{name}.png", columns)
            self.writer.add_image(tag or name, grid, step, dataformats="HWC")

    def write_scalars(self, step):
        sums = {name: value.tolist() for name, value in self.stats.items()}
        if self.world > 1:  # a process may have had nothing to train, and so other names
            parts = [None] * self.world
            dist.all_gather_object(parts, sums)
            sums = {name: np.sum([part[name] for part in parts if name in part], axis=0) for part in parts for name in part}
        seconds = sum(self.laps.values())
        self.seconds += seconds
        images = self.args.prompts * self.args.group_size
        scalars = {name: total / weight for name, (total, weight) in sums.items()} | self.logged | self.laps
        scalars |= {"charts/learning_rate": self.optimizer.param_groups[0]["lr"], "charts/images_per_second": images / seconds}
        for name, value in scalars.items() if self.rank == 0 else ():
            (self.writer.add_histogram if np.ndim(value) else self.writer.add_scalar)(name, value, step)

    def evaluate(self, step):
        """Scores the model on the held-out prompts and draws them: before.png at step 0, then after.png."""
        scores, prompts, categories, images = evaluate(self.pipe, self.args, self.args.eval_steps)
        score = float(scores.mean())
        when, name, picture = ("final", f"iteration {step}", "after") if step else ("base", "base model", "before")
        self.held_out |= {f"{when}_score": score, f"{when}_categories": category_means(scores, categories)}
        self.held_out["best_score"] = max(score, self.held_out.get("best_score", score))
        if self.rank == 0:
            self.writer.add_scalar("charts/held_out_score", score, step)
            tqdm.write(f"{name}: held-out score {score:.3f}")
        self.picture(picture, step, images, prompts[self.rank :: self.world], tag="held_out")

    def save(self, done):
        """The LoRA, and everything a run continues from in one file, state.pt; each is replaced whole."""
        if self.rank == 0:
            save_lora(self.pipe, self.folder)
            state = dict(lora=lora_state(self.pipe), optimizer=self.optimizer.state_dict(), iteration=done)
            with replacing(self.folder / "state.pt") as temporary:
                torch.save({**state, "seconds": self.seconds, "held_out": self.held_out}, temporary)
        if self.world > 1:
            dist.barrier()  # when one process leaves torchrun ends the others, so none leaves while rank 0 writes

    def restore(self):
        """Gives LoRA and optimizer the state of an interrupted run and returns the number of iterations done.

        A missing, unfit or finished state ends the program.
        """
        args, path = self.args, self.folder / "state.pt"
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            set_lora(self.pipe, state["lora"])
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:
            fail(f"{path} cannot be resumed from ({type(error).__name__}): it is damaged or was made with other settings")
        saved = json.loads((self.folder / "args.json").read_text())
        done, planned = state["iteration"], saved["iterations"]
        if done > args.iterations or done == args.iterations and (done < planned or (self.folder / "result.json").exists()):
            fail(f"the run already has its {done} iterations; give a larger --iterations to go on")
        if args.anneal_lr and (args.iterations, args.lr) != (planned, saved["lr"]) and done < args.iterations:
            # The rate goes on falling from where it was, or from a given one: the line through (done, rate) and (iterations, 0)
            rate = args.lr if args.lr != saved["lr"] else saved["lr"] * (1 - done / planned)
            if rate == 0:
                fail("the run's learning rate has fallen to 0; say with --lr from which rate the further iterations start")
            args.lr = rate / (1 - done / args.iterations)
            print(f"the learning rate goes on falling from {rate:.2g}" * (self.rank == 0))
        if self.rank == 0:
            (self.folder / "result.json").unlink(missing_ok=True)  # of the shorter run
            write_json(self.folder / "args.json", {**saved, **asdict(args)})
        self.seconds, self.held_out = state["seconds"], state["held_out"]
        return done

    def report(self):
        """Writes result.json and prints, by category, what the run did to the held-out score and where to look."""
        args, held_out, folder = self.args, self.held_out, self.folder
        result = dict(algorithm=self.script, model=args.model, reward=args.reward, seed=args.seed, iterations=args.iterations)
        result |= dict(**held_out, seconds=self.seconds, train_images=args.iterations * args.prompts * args.group_size)
        result |= dict(peak_memory_mb=peak_memory_mb(args.device))
        write_json(folder / "result.json", result)
        for name, base in held_out["base_categories"].items():
            print(f"{name:20} {base:7.3f} -> {held_out['final_categories'].get(name, math.nan):7.3f}")
        print(f"{'all':20} {held_out['base_score']:7.3f} -> {held_out['final_score']:7.3f}")
        print(f"{self.seconds / 60:.1f} min of training, peak memory {result['peak_memory_mb']:.0f} MB")
        print(f"Look at it: tensorboard --logdir {folder.parent}, or {folder}/before.png and after.png")
        print(f"Load it in diffusers: StableDiffusion3Pipeline.from_pretrained(...).load_lora_weights('{folder}')")
