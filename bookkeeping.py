"""What surrounds an algorithm and none is about: processes, the run's folder, evaluation, saving, reports."""

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

import numpy as np
import torch
import torch.distributed as dist
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import make_image_grid
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import rewards
import sampler
from arguments import fail, rank_world, resolve_device
from miniature import shapes

WORTH_COMPILING = {"cpu": 1.5e13, "cuda": 1e16}  # latents x tokens x parameters that repay the minutes of compiling the blocks


def sum_over_processes(parameters):
    """Replaces the gradients by their sum over all processes, sent in one piece; a process may have had nothing to train."""
    if not dist.is_initialized():
        return
    gradients = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    dist.all_reduce(gradients)
    for p, gradient in zip(parameters, gradients.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p)


def gather(rows):
    """The rows of all ranks (world · n, ...) in rank order, from this rank's (n, ...)."""
    if not dist.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def openmp_threads():
    """The threads [0 (this one), ...] that share the work of an operation, if nothing parallel has run yet; starts them."""
    if sys.platform != "linux":
        return []
    tasks = lambda: set(map(int, os.listdir("/proc/self/task")))
    before = tasks()
    torch.ones(1 << 20).mul_(2)
    return [0, *sorted(tasks() - before)]


@contextmanager
def bound(threads):
    """Each thread on a processor of its own, where there are just as many.

    Beside another program two threads would take turns on one processor, each waiting for the other in a loop, and an
    iteration would take four times as long and more. What is started meanwhile stays on the first processor.
    """
    processors = sorted(os.sched_getaffinity(0)) if threads else []
    if len(threads) == len(processors):
        for thread, processor in zip(threads, processors):
            os.sched_setaffinity(thread, {processor})
    try:
        yield
    finally:
        if processors:
            os.sched_setaffinity(0, processors)


def has_compiler(device):
    """Whether torch.compile finds what it needs on this machine."""
    compilers = (os.environ.get("CXX", "g++"),) if device == "cpu" else (os.environ.get("CC", "gcc"), "clang")
    return any(map(shutil.which, compilers))


def now():
    """Seconds on a clock that first waits for the GPU, whose calls return before their work is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.monotonic()


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
    """pytorch_lora_weights.safetensors, as load_lora_weights(run_dir) of the family's stock pipeline reads it."""
    # diffusers' own file has two metadata entries, which safetensors writes in random order: other bytes every time. With
    # this one alone, which holds the LoRA's alpha, the same weights are the same bytes.
    config = {f"transformer.{name}": value for name, value in pipe.transformer.peft_config["default"].to_dict().items()}
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(config, sort_keys=True, default=sorted)}
    with replacing(run_dir / "pytorch_lora_weights.safetensors") as temporary:
        pipe.save_lora_weights(
            run_dir,
            transformer_lora_layers=lora_state(pipe),
            weight_name=temporary.name,
            # not save_file, whose own temporary file would outlive a kill
            save_function=lambda weights, path: Path(path).write_bytes(save(weights, metadata)),
        )


def require_writable(folder):
    """Ends the program if a folder cannot be made or written in; makes none, so that a start that fails leaves nothing behind."""
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        fail(f"--output-dir {folder} cannot be written: {parent} is not a folder that this user may write in")


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
    """The reward's networks and the pipeline with a fresh LoRA or that of the run args.lora; what does not fit ends the program."""
    try:
        sampler.family_of(args.model)  # first, since a reward's networks may take minutes
        rewards.load(args.reward)
        pipe = sampler.load_pipeline(args)
    except ValueError as error:
        fail(str(error))
    size = args.resolution or sampler.latent_shape(pipe)[-1] * pipe.vae_scale_factor
    if "shapes" in rewards.weights(args.reward) and size != shapes.SIZE:
        fail(f"--reward shapes judges {shapes.SIZE} x {shapes.SIZE} images, which this model does not make; take another reward")
    if getattr(args, "lora", ""):
        try:
            weights = load_file(Path(args.lora) / "pytorch_lora_weights.safetensors")
            set_lora(pipe, {name.removeprefix("transformer."): weight for name, weight in weights.items()})
        except Exception as error:
            fail(f"the LoRA in {args.lora} does not load into --model {args.model} ({type(error).__name__})")
    return pipe


class Run:
    """A training run: its processes, folder, TensorBoard page, held-out scores, saves and stops. Only rank 0 prints and writes."""

    def __init__(self, args, script):
        """Joins the other processes, loads pipeline and reward, makes the folder; what is wrong is found before a loss."""
        self.args, self.script, self.held_out, self.seconds = args, script, {}, 0.0
        self.rank, self.world = rank_world()
        self.threads = openmp_threads()
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
        compiled = self.compile_blocks()
        train_prompts, _ = rewards.prompt_set(args)
        sampler.encode(self.pipe, sum(train_prompts.values(), [])[:512], args)  # a larger set goes on as its prompts are drawn
        if self.rank == 0 and not args.resume:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "args.json", {"script": script, "compiled_blocks": compiled, **asdict(args)})

    def compile_blocks(self):
        """Compiles the transformer's blocks where --compile is on and the planned work repays a minute or two of compiling.

        Decided when a run starts, by its plan alone, since the same seed must give the same bytes; a resumed run follows.
        """
        args = self.args
        if args.resume:
            compiled = json.loads((self.folder / "args.json").read_text()).get("compiled_blocks", False)
        else:
            latents = args.iterations * args.prompts * args.group_size * (2 * args.steps - args.ode_steps) // self.world
            work = latents * self.pipe.image_tokens * sum(p.numel() for p in self.pipe.transformer.parameters())
            compiled = work >= WORTH_COMPILING["cpu" if args.device == "cpu" else "cuda"]
        compiled = compiled and args.compile
        if self.rank == 0:
            why = "the planned iterations repay it" if compiled else "too few iterations to repay it, or --no-compile"
            print(f"the transformer's blocks are {'' if compiled else 'not '}compiled: {why}")
        if compiled:
            sampler.compile_blocks(self.pipe.transformer)
        return compiled

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
            with bound(self.threads):
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
        if self.world > 1:
            dist.barrier()  # all have read what rank 0 replaces now
        if self.rank == 0:
            (self.folder / "result.json").unlink(missing_ok=True)  # of the shorter run
            write_json(self.folder / "args.json", saved | asdict(args))
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
        print(f"Load it in diffusers: {type(self.pipe).__name__}.from_pretrained(...).load_lora_weights('{folder}')")
