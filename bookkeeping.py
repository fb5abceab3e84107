"""What surrounds an algorithm and none is about: the run's folder, evaluation, saving and resuming, reports."""

import atexit
import json
import math
import os
import signal
import textwrap
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import families
import machine
import miniature
import rewards
import sampler
from families.text import encode_ahead
from machine import fail, gather_objects, rank_world
from miniature import shapes

WORTH_COMPILING = {"cpu": 1.5e13, "cuda": 1e16}  # latents x tokens x parameters that repay the minutes of compiling the blocks


@contextmanager
def replacing(path):
    """Yields a temporary name beside `path` and renames it to `path` at the end, so that a kill leaves old or new."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def require_writable(folder):
    """Ends the program if a folder cannot be made or written in; makes none, so that a start that fails leaves nothing behind."""
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        fail(f"--output-dir {folder} cannot be written: {parent} is not a folder that this user may write in")


def read_scalars(folder):
    """{tag: [(step, value), ...]} of all that a run has logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow to import

    events = EventAccumulator(str(folder), {"scalars": 0})  # 0: every point
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def save_grid(images, captions, path, columns=8):
    """A PNG of up to six rows of neighbouring images over their captions, also returned as a (H, W, 3) uint8 array.

    A last row has images of one caption alone, if there are so many, so that one sees whether they are all alike.
    """
    starts = range(0, len(images), max(columns, math.ceil(len(images) / 6)))  # of six categories one row each
    picked = [i for start in starts for i in range(start, min(start + columns, len(images)))]
    often = Counter(caption for caption in captions if caption != captions[0]).most_common(1)
    if often and often[0][1] >= columns:
        picked += [i for i, caption in enumerate(captions) if caption == often[0][0]][:columns]
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


# Evaluation


@dataclass
class Evaluation:
    """A model on N held-out prompts. The ranks share the work; each has all figures, and the images of its own prompts."""

    scores: np.ndarray  # (N,) the reward's strict verdict, or the reward; of the miniature always its verifier's verdict
    prompts: list
    categories: list
    images: torch.Tensor  # of prompts[rank::world]
    looks: list | None = None  # of the miniature's images, N
    rewards: np.ndarray | None = None  # (N,) what training maximizes, where the verifier's verdict is not of that

    @property
    def variety(self):
        """Of the miniature, see shapes.variety; None where it is not defined."""
        variety = math.nan if self.looks is None else shapes.variety(self.looks, self.prompts, self.scores)
        return None if math.isnan(variety) else variety

    @property
    def figures(self):
        """{name: value} of what an evaluation is summed up in."""
        figures = dict(score=float(self.scores.mean()))
        if self.variety is not None:
            figures["variety"] = self.variety
        if self.rewards is not None:
            figures["reward"] = float(self.rewards.mean())
        return figures


def evaluate(pipe, args, steps, tuned_steps=None):
    """The Evaluation of a model on held-out prompts, always from the same noise; see sampler.sample_ode."""
    rank, world = rank_world()
    prompts, categories = rewards.held_out_prompts(rewards.prompt_set(args)[1], args.eval_images)
    noise = torch.randn(len(prompts), *sampler.latent_shape(pipe, args.resolution), generator=torch.Generator().manual_seed(12345))
    own = prompts[rank::world]
    images = sampler.sample_ode(pipe, own, noise[rank::world], steps, args, tuned_steps)
    reward = rewards.build(args.reward)
    parts = {}
    if miniature.is_miniature(args.model) and images.shape[-1] == shapes.SIZE:
        parts["scores"], _, parts["looks"] = shapes.examine(images.numpy(), own)
        if args.reward != "shapes":
            parts["rewards"] = reward.score(images, own).numpy()
    else:
        parts["scores"] = reward.verdict(images, own).numpy()
    everyone, whole = gather_objects(parts), {}
    for name in parts:
        values = [None] * len(prompts)
        for r, theirs in enumerate(everyone):
            values[r::world] = theirs[name]
        whole[name] = values if name == "looks" else np.array(values, np.float64)
    return Evaluation(prompts=prompts, categories=categories, images=images, **whole)


def path_kl(pipe, args, prompts):
    """sampler.path_kl, the mean over about 32 of the prompts, always from the same noise; the ranks share the work."""
    rank, world = rank_world()
    some = prompts[:: max(1, len(prompts) // max(32, world))]
    shape = len(some), args.steps - args.ode_steps + 1, *sampler.latent_shape(pipe, args.resolution)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(12345))
    kl = sampler.path_kl(pipe, some[rank::world], noise[rank::world], args)
    return float(np.mean(np.concatenate(gather_objects(kl.numpy()))))


def category_means(scores, categories):
    """{category: mean of its scores}"""
    return {c: float(scores[[c == d for d in categories]].mean()) for c in dict.fromkeys(categories)}


def load(args):
    """The reward's networks and the pipeline with a fresh LoRA or that of the run args.lora; what does not fit ends the program."""
    try:
        families.of_model(args.model)  # first, since a reward's networks may take minutes
        rewards.load(args.reward)
        pipe = families.load_pipeline(args)
    except ValueError as error:
        fail(str(error))
    size = args.resolution or sampler.latent_shape(pipe)[-1] * pipe.vae_scale_factor
    if "shapes" in rewards.weights(args.reward) and size != shapes.SIZE:
        fail(f"--reward shapes judges {shapes.SIZE} x {shapes.SIZE} images, which this model does not make; take another reward")
    if getattr(args, "lora", ""):
        try:
            families.load_lora(pipe, args.lora)
        except Exception as error:
            fail(f"the LoRA in {args.lora} does not load into --model {args.model} ({type(error).__name__})")
    return pipe


class Run:
    """A training run: its processes, folder, TensorBoard page, held-out scores, saves and stops. Only rank 0 prints and writes."""

    def __init__(self, args, script):
        """Joins the other processes and loads pipeline and reward; what is wrong is found here."""
        self.args, self.script, self.held_out, self.seconds = args, script, {}, 0.0
        self.rank, self.world = rank_world()
        threads = machine.openmp_threads()
        machine.resolve_device(args)
        self.threads = threads if args.device == "cpu" else []
        if not args.output_dir:
            name = Path(args.model).name
            args.output_dir = f"runs/{script}__{name}__{args.reward}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        if "RANK" in os.environ:  # torchrun's, with one process too
            dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
            atexit.register(dist.destroy_process_group)
            args.output_dir = gather_objects(args.output_dir)[0]  # the ranks' clocks may have named it differently
        if args.compile and not machine.has_compiler(args.device):
            self.say("no C++ compiler found: the log-probability runs uncompiled, which is slower but the same")
            args.compile = False
        torch.compiler.set_stance("default" if args.compile else "force_eager")
        torch.manual_seed(args.seed)
        self.folder = Path(args.output_dir)
        self.say(f"{script}: " + ", ".join(f"{name} {value}" for name, value in asdict(args).items() if value not in (None, "")))
        if self.rank == 0:
            require_writable(self.folder)
        self.pipe = load(args)
        self.compiled = self.compile_blocks()

    def say(self, text):
        if self.rank == 0:
            print(text)

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
        why = "the planned iterations repay it" if compiled else "too few iterations to repay it, or --no-compile"
        self.say(f"the transformer's blocks are {'' if compiled else 'not '}compiled: {why}")
        if compiled:
            families.compile_blocks(self.pipe.transformer)
        return compiled

    def start(self, optimizer):
        """Makes the folder and scores the base model, or restores an interrupted run; gives the first iteration to do."""
        args, self.optimizer, self.stop_requested = self.args, optimizer, False

        def request_stop(*_):
            self.stop_requested = True
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C is Python's own

        signal.signal(signal.SIGINT, request_stop)
        first = self.restore() if args.resume else 0
        train, held_out = rewards.prompt_set(args)
        to_come = [np.random.default_rng((args.seed, i)) for i in range(first, args.iterations)]  # as the scripts draw
        drawn = [prompt for rng in to_come for prompt in rewards.sample_prompts(train, args.prompts, rng)]
        encode_ahead(self.pipe, [*rewards.held_out_prompts(held_out, args.eval_images)[0], *drawn], args)
        if self.rank == 0 and not args.resume:
            self.folder.mkdir(parents=True, exist_ok=True)
            content = {"script": self.script, "compiled_blocks": self.compiled, **asdict(args)}
            write_json(self.folder / "args.json", content)
        if self.rank == 0:  # purging drops what a killed run logged after its last save
            self.writer = SummaryWriter(self.folder, purge_step=first + bool(args.resume))
        if not args.resume:
            if self.rank == 0:
                self.writer.add_text("args", "|name|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in vars(args).items()))
            self.evaluate(0)
        return first

    def iterations(self, first):
        """The iterations from `first` on, behind a progress bar."""
        total = self.args.iterations
        self.bar = tqdm(range(first, total), initial=first, total=total, dynamic_ncols=True, disable=self.rank > 0)
        with machine.bound(self.threads):
            for iteration in self.bar:
                self.laps, self.sums, self.stamp = {}, defaultdict(float), machine.now()
                yield iteration

    def lap(self, name):
        """Books the seconds since the last lap, or the start of the iteration, as time/<name>."""
        stamp = machine.now()
        self.laps[f"time/{name}"], self.stamp = stamp - self.stamp, stamp

    def average(self, values, weight=1.0):
        """Adds {tag: values (n,)} with weights (n,) to the iteration's weighted means over all processes."""
        for tag, value in values.items():
            w = torch.as_tensor(weight, device=value.device).expand(len(value))
            self.sums[tag] += torch.stack([(w * value.detach()).sum(), w.sum()])

    def require_finite(self, norm):
        """Ends the run before a gradient whose norm is not finite spoils the weights."""
        if not norm.isfinite():
            raise SystemExit(f"the gradient is not finite; the last good state is kept in {self.folder}")

    def log(self, done, values):
        """Writes the iteration's {tag: number, or array for a histogram} with its averages, laps and rate."""
        sums = defaultdict(float)
        for theirs in gather_objects({tag: value.cpu() for tag, value in self.sums.items()}):  # a process may have trained nothing
            for tag, value in theirs.items():
                sums[tag] += value
        seconds = sum(self.laps.values())
        self.seconds += seconds
        values = values | {tag: (total / weight).item() for tag, (total, weight) in sums.items()} | self.laps
        values["charts/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        values["charts/images_per_second"] = self.args.prompts * self.args.group_size / seconds
        for tag, value in values.items() if self.rank == 0 else ():
            (self.writer.add_histogram if np.ndim(value) else self.writer.add_scalar)(tag, value, done)
        held_out = {f"held-out {name}": value for name, value in self.shown.items()}
        self.bar.set_postfix({"reward": f"{values['charts/reward']:.3f}"} | held_out)

    def picture(self, name, done, images, captions, columns=8, tag=None):
        """Saves a grid of images over their captions as <name>.png and shows it on the TensorBoard page."""
        if self.rank == 0:
            grid = save_grid(images, captions, self.folder / f"{name}.png", columns)
            self.writer.add_image(tag or name, grid, done, dataformats="HWC")

    def evaluates(self, done):
        """Whether the model is evaluated after so many iterations."""
        return done % self.args.eval_every == 0 or done == self.args.iterations

    def evaluate(self, done):
        """Every --eval-every iterations scores the model on the held-out prompts and draws them: before.png, then after.png."""
        if not self.evaluates(done):
            return
        found = evaluate(self.pipe, self.args, self.args.eval_steps)
        kl = path_kl(self.pipe, self.args, found.prompts) if done else 0.0  # as long as the LoRA is
        when, name, picture = ("final", f"iteration {done}", "after") if done else ("base", "base model", "before")
        self.held_out[f"{when}_path_kl"] = kl
        self.held_out |= {f"{when}_variety": found.variety}  # None takes the place of an earlier evaluation's
        self.held_out |= {f"{when}_{figure}": value for figure, value in found.figures.items()}
        self.held_out |= {f"{when}_categories": category_means(found.scores, found.categories)}
        self.held_out["best_score"] = max(found.scores.mean().item(), self.held_out.get("best_score", 0.0))
        self.shown = {figure: f"{value:.3f}" for figure, value in found.figures.items()}
        if self.rank == 0:
            self.writer.add_scalar("charts/path_kl", kl, done)
            for figure, value in found.figures.items():
                self.writer.add_scalar("charts/variety" if figure == "variety" else f"charts/held_out_{figure}", value, done)
            tqdm.write(f"{name}: held-out " + ", ".join(f"{figure} {value}" for figure, value in self.shown.items()))
            if found.looks is not None:
                kept = dict(prompts=found.prompts, verdicts=found.scores.astype(np.uint8), looks=found.looks)
                with replacing(self.folder / "evaluation.npz") as temporary, open(temporary, "wb") as file:
                    np.savez_compressed(file, **kept)
        self.picture(picture, done, found.images, found.prompts[self.rank :: self.world], tag="held_out")

    def save(self, done, due=False):
        """Every --save-every iterations the LoRA, and everything a run continues from in state.pt; each is replaced whole."""
        if not (due or done % self.args.save_every == 0 or done == self.args.iterations):
            return
        if self.rank == 0:
            with replacing(self.folder / families.LORA_FILE) as temporary:
                families.save_lora(self.pipe, temporary)
            state = dict(lora=families.lora_state(self.pipe), optimizer=self.optimizer.state_dict(), iteration=done)
            with replacing(self.folder / "state.pt") as temporary:
                torch.save({**state, "seconds": self.seconds, "held_out": self.held_out}, temporary)
        if self.world > 1:
            dist.barrier()  # when one process leaves torchrun ends the others, so none leaves while rank 0 writes

    def stop_if_asked(self, done):
        """After Ctrl-C saves and ends the run."""
        if any(gather_objects(self.stop_requested)) and done < self.args.iterations:
            self.save(done, due=True)
            raise SystemExit(f"stopped after iteration {done}; continue with --resume {self.folder}")

    def restore(self):
        """Gives LoRA and optimizer the state of an interrupted run and returns the number of iterations done.

        A missing, unfit or finished state ends the program.
        """
        args, path = self.args, self.folder / "state.pt"
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            families.set_lora(self.pipe, state["lora"])
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
            self.say(f"the learning rate goes on falling from {rate:.2g}")
        self.optimizer.param_groups[0]["lr"] = args.lr
        if self.world > 1:
            dist.barrier()  # all have read what rank 0 replaces now
        if self.rank == 0:
            (self.folder / "result.json").unlink(missing_ok=True)  # of the shorter run
            write_json(self.folder / "args.json", saved | asdict(args))
        self.seconds, self.held_out = state["seconds"], state["held_out"]
        self.shown = {name: f"{self.held_out[f'final_{name}']:.3f}" for name in ("score",) if f"final_{name}" in self.held_out}
        return done

    def report(self):
        """Writes result.json and prints, by category, what the run did to the held-out score and where to look."""
        if self.rank > 0:
            return
        self.writer.close()
        args, held_out, folder = self.args, self.held_out, self.folder
        result = dict(algorithm=self.script, model=args.model, reward=args.reward, seed=args.seed, iterations=args.iterations)
        result |= dict(base_variety=None, final_variety=None) | held_out | dict(seconds=self.seconds)
        result |= dict(train_images=args.iterations * args.prompts * args.group_size)
        result |= dict(peak_memory_mb=machine.peak_memory_mb(args.device))
        write_json(folder / "result.json", result)
        rows = {name: (base, held_out["final_categories"].get(name)) for name, base in held_out["base_categories"].items()}
        rows |= {f"all: {name}": (held_out.get(f"base_{name}"), held_out[f"final_{name}"]) for name in self.shown}
        for name, (base, final) in rows.items():
            print(f"{name:20} {math.nan if base is None else base:7.3f} -> {math.nan if final is None else final:7.3f}")
        print(f"{self.seconds / 60:.1f} min of training, peak memory {result['peak_memory_mb']:.0f} MB")
        print(f"Look at it: tensorboard --logdir {folder.parent}, or {folder}/before.png and after.png")
        print(f"Load it in diffusers: {type(self.pipe).__name__}.from_pretrained(...).load_lora_weights('{folder}')")
