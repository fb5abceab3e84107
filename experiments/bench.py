"""How near the scripts are to the bare model, as ratios measured in one run: medians, with the range in brackets.

    python -m experiments.bench              # miniature model, about ten minutes on two CPU cores
    python -m experiments.bench --ode-steps 1 --against ../before --against-flags ""     # and over another checkout's, in turns
    python -m experiments.bench --model sd3 --random-weights --iterations 3      # full size without a download, on a GPU

(a) an iteration over the transformer's forward and backward calls alone, eager and as many as without shared states, and over
    the same calls compiled; where the rest goes, and how many latents went through the transformer
(b) the log-probability kernel, compiled over eager, forward and backward, and its bandwidth over that of a plain copy
(c) an iteration of GCPO and of Stepwise-Flow-GRPO over one of GRPO
(d) an iteration in one process over one shared by two (on a CPU with two cores or more)
(e) seconds from the start of a script to its first iteration: eager, compiled with an empty cache, with a full one
(f) an iteration beside one and two busy loops over an undisturbed one (on a CPU)
(g) on a GPU, model FLOPs utilisation of a GRPO iteration

Flags that are not its own go to the scripts.
"""

import contextlib
import io
import json
import multiprocessing
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import arguments
import bookkeeping
import gcpo
import grpo
import sampler
import stepwise_grpo
from experiments import random_weights

SCRIPTS = {"grpo": grpo, "gcpo": gcpo, "stepwise_grpo": stepwise_grpo}
ROOT = Path(__file__).parent.parent
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16, by the makers


@dataclass
class Args:
    model: str = "tiny"
    """as in the scripts"""
    random_weights: bool = False
    """a transformer and VAE of the size of --model, sd3 (3.5 medium), flux or klein, with random weights and random text"""
    iterations: int = 4
    """measured iterations of each script; one more warms up"""
    against: str = ""
    """folder of another checkout, whose grpo.py is run in turns with this one's"""
    against_flags: str | None = None
    """flags for that grpo.py, if it does not know those for the scripts here"""


def random_model(family, folder):
    """Saves an untrained pipeline of the family's full size, with small text encoders, which are run once a prompt."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        transformer = random_weights.transformer(family).bfloat16()
    random_weights.pipeline(family, transformer, random_weights.vae(family)).save_pretrained(folder)


def medians(functions, repeats):
    """Seconds of each function, {name: [repeats values]}, measured in turns so that a slow moment hits all alike."""
    seconds = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            began = bookkeeping.now()
            function()
            if repeat:  # the first warms up
                seconds[name].append(bookkeeping.now() - began)
    return seconds


def show(name, values, digits=2, unit=""):
    median, low, high = (f"{x:.{digits}f}{unit}" for x in (statistics.median(values), min(values), max(values)))
    print(f"{name:76} {median} [{low} to {high}]", flush=True)


def command_line(script, args, folder, iterations, flags=None):
    little_else = "--eval-images 6 --eval-steps 2 --eval-every 1000 --save-every 1000".split()
    flags = args.flags if flags is None else flags.split()
    run = ["--model", args.model, "--iterations", str(iterations), *little_else, *flags, "--output-dir", str(folder)]
    return [f"{script}.py", *run]


def logged(folder):
    """{tag: values of every iteration but the first, which warms up}."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: np.array([e.value for e in events.Scalars(tag)][1:]) for tag in events.Tags()["scalars"]}


def run(command, **options):
    done = subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, **options)
    if done.returncode:
        sys.exit(done.returncode)


def script_args(script, args):
    """The script's own arguments, as its run has them."""
    parsed = arguments.parse_args(SCRIPTS[script].Args, None, command_line(script, args, "nowhere", 1)[1:])
    arguments.resolve_device(parsed)
    return parsed


def bare_calls(parsed, pipe):
    """(sampling, training): functions that make an iteration's transformer calls and nothing else, for every state one row."""
    B, S = parsed.prompts * parsed.group_size, parsed.steps - parsed.ode_steps
    text = sampler.encode(pipe, ["two red circles"], parsed)
    sizes = lambda n: [len(rows) for rows in sampler.even_batches(torch.arange(n), parsed.micro_batch)]
    shape = sampler.latent_shape(pipe, parsed.resolution)
    x = torch.randn(parsed.micro_batch, *shape, device=parsed.device)
    sigma = torch.full((parsed.micro_batch,), 0.7, device=parsed.device)
    rows = torch.zeros(parsed.micro_batch, dtype=torch.long, device=parsed.device)

    def call(n):
        return sampler.velocity(pipe, x[:n], sigma[:n], text.rows(rows[:n]), parsed)

    @torch.no_grad()
    def sampling():
        for n in sizes(B):
            for _ in range(parsed.steps):
                call(n)

    def training():
        for _ in range(parsed.updates):
            for n in sizes(B // parsed.updates * S):
                v = call(n)
                if parsed.beta > 0:
                    with torch.no_grad(), sampler.adapter_off(pipe):
                        call(n)
                v.sum().backward()
        for p in pipe.transformer.parameters():
            p.grad = None

    return sampling, training


@contextlib.contextmanager
def eager(pipe):
    """Compiled blocks run as they are written, and without gradients where none are wanted."""
    compiled = getattr(pipe.transformer, "blocks_are_compiled", False)
    pipe.transformer.blocks_are_compiled = False
    with torch.compiler.set_stance("force_eager"):
        yield
    pipe.transformer.blocks_are_compiled = compiled


def measured_run(script, args, folder, compiled, bare=True):
    """Runs a script in this process, which should be a fresh one: (seconds to the first iteration, bare calls, latents).

    Bare calls (kinds, N, 2) are seconds for sampling and training, eager and, where the blocks are compiled, compiled too.
    They are measured on the script's own pipeline between its iterations: those of a row are the mean of right before and
    right after one of the N iterations that follow the first, so that a slow moment hits both alike. Latents (N, 2) went
    through the transformer in sampling and in training.
    """
    began, seconds, latents, velocity = bookkeeping.now(), [], [], sampler.velocity
    # Whether the blocks are compiled is what is compared here, not decided by the number of iterations
    bookkeeping.WORTH_COMPILING = dict.fromkeys(bookkeeping.WORTH_COMPILING, 0 if compiled else float("inf"))
    parsed, pipes, count = script_args(script, args), [], [0, 0]

    def load_pipeline(_, load=sampler.load_pipeline):
        pipes.append(load(parsed))
        return pipes[0]

    def counting(pipe, x, *rest):
        count[torch.is_grad_enabled()] += len(x)
        return velocity(pipe, x, *rest)

    class Bar(tqdm):
        def __iter__(self):
            to_first = bookkeeping.now() - began
            functions = bare_calls(parsed, pipes[0])
            for iteration in super().__iter__():
                count[:] = 0, 0
                yield iteration
                latents.append(tuple(count))
                stamps = []
                for kind in range(1 + compiled if bare else 0):
                    with contextlib.nullcontext() if kind else eager(pipes[0]):
                        stamps.append(np.diff([bookkeeping.now()] + [function() or bookkeeping.now() for function in functions]))
                seconds.append(stamps)
            seconds.append(to_first)

    bookkeeping.tqdm, sampler.load_pipeline, sampler.velocity = Bar, load_pipeline, counting
    sys.argv = command_line(script, args, folder, args.iterations + 1)
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(SCRIPTS[script].__file__, run_name="__main__")
    *seconds, to_first = seconds
    stamps = np.array(seconds)
    return to_first, (stamps[:-1] + stamps[1:]).swapaxes(0, 1) / 2, np.array(latents[1:])


def in_fresh_process(function, *arguments):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(function, *arguments).result()


def kernel_functions(device):
    """The fused log-probability forward and backward at the full model's latents, compiled and eager, and a copy."""
    generator = torch.Generator().manual_seed(0)
    v, x, x_next = (torch.randn(32, 16, 64, 64, generator=generator).to(device) for _ in range(3))
    v.requires_grad_()
    sigmas = torch.full((32,), 0.7, device=device), torch.full((32,), 0.6, device=device)
    arguments = (v, x, x_next, *sigmas, 0.9, 0.7, "flow")

    def step(stance):
        with torch.compiler.set_stance(stance):
            grpo.transition_log_prob(*arguments).sum().backward()
        v.grad = None

    return {"compiled": lambda: step("default"), "eager": lambda: step("force_eager"), "copy": lambda: x.clone()}


if __name__ == "__main__":
    args, args.flags = tyro.cli(Args, description=__doc__, return_unknown_args=True)
    if args.iterations < 1:
        arguments.fail("--iterations must be at least 1")
    if args.against and not (Path(args.against) / "grpo.py").exists():
        arguments.fail(f"--against {args.against} is not a checkout: it has no grpo.py")
    if args.random_weights and args.model not in random_weights.FULL:
        arguments.fail(f"--random-weights needs a --model of {', '.join(random_weights.FULL)}")
    workspace = tempfile.TemporaryDirectory()
    if args.random_weights:
        args.model, family = f"{workspace.name}/{args.model}", args.model
        random_model(family, args.model)
    parsed = script_args("grpo", args)
    print(f"{parsed.device}, {parsed.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{workspace.name}/cache"  # empty: the first compiled run starts cold
    images, at_all = parsed.prompts * parsed.group_size, bookkeeping.has_compiler(parsed.device) and parsed.compile
    S = parsed.steps - parsed.ode_steps

    runs, iteration, start = {}, {}, {}
    for script, compiled in [(script, compiled) for compiled in (False, True)[: 1 + at_all] for script in SCRIPTS]:
        folder = Path(workspace.name) / f"{script}-{compiled}"
        how, both = "compiled" if compiled else "eager", script != "stepwise_grpo"  # which calls the transformer more often
        start[script, compiled], bare, latents = in_fresh_process(measured_run, script, args, folder, compiled, both)
        runs[script, compiled] = logged(folder)
        peak = json.loads((folder / "result.json").read_text())["peak_memory_mb"]
        iteration[script, compiled] = images / runs[script, compiled]["charts/images_per_second"]
        show(f"{script}, {how}, peak memory {peak:.0f} MB: seconds an iteration", iteration[script, compiled])
        trained = runs[script, compiled]["charts/groups_with_spread"]
        for kind, calls in zip(("eager", "compiled"), bare):
            parts = {"sample": calls[:, 0], "train": calls[:, 1] * trained}
            limit = sum(parts.values())
            show(f"(a) {script}, {how}: iteration / bare {kind} calls", iteration[script, compiled] / limit)
            for name in ("sample", "decode", "reward", "train") if kind == "eager" else ():
                note = f", of it bare calls {statistics.median(parts[name] / limit):.2f}" if name in parts else ""
                show(f"      {name}{note}", runs[script, compiled][f"time/{name}"] / limit)
        if both:
            sampled, train = np.median(latents, axis=0)
            full = images * S * np.median(trained) * getattr(parsed, "step_fraction", 1.0)
            print(f"      latents through the transformer: {sampled:.0f} of {images * parsed.steps}, in training", end=" ")
            print(f"{train:.0f} of {full:.0f}")
    if at_all:
        functions = kernel_functions(parsed.device)
        seconds = medians(functions, 20)
        ratio = lambda a, b: [x / y for x, y in zip(seconds[a], seconds[b])]
        show("(b) log-probability kernel: eager / compiled time", ratio("eager", "compiled"))
        # Forward reads v, x and x_next; backward reads them again and writes v's gradient: 7 tensors. A copy reads one, writes one.
        show("      its bandwidth / a copy's", [7 / 2 * r for r in ratio("copy", "compiled")])
    for script, compiled in iteration:
        if script != "grpo":
            how = "compiled" if compiled else "eager"
            show(f"(c) {script} / grpo, {how}", iteration[script, compiled] / statistics.median(iteration["grpo", compiled]))
    if parsed.device == "cpu" and (os.cpu_count() or 1) > 1:
        folder, environment = Path(workspace.name) / "two", {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads() // 2)}
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        run([*torchrun, *command_line("grpo", args, folder, args.iterations + 1)], cwd=ROOT, env=environment)
        two = images / logged(folder)["charts/images_per_second"]
        show("(d) grpo, eager: one process / two processes", [statistics.median(iteration["grpo", False]) / t for t in two])
    if at_all:
        kinds = {"eager": ("grpo", False), "cold": ("grpo", True), "warm": ("gcpo", True)}  # the second to compile found a cache
        print("(e) seconds to the first iteration:", ", ".join(f"{name} {start[key]:.0f}" for name, key in kinds.items()))
    for n in (1, 2) if parsed.device == "cpu" else ():
        folder = Path(workspace.name) / f"busy-{n}"
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
        try:
            in_fresh_process(measured_run, "grpo", args, folder, at_all, False)
        finally:
            for loop in loops:
                loop.kill()
        slow = images / logged(folder)["charts/images_per_second"]
        show(f"(f) grpo beside {n} busy loops / undisturbed", slow / statistics.median(iteration["grpo", at_all]))
    before, now = [], []
    for turn in range(3 if args.against else 0):
        folders = [Path(workspace.name) / f"{name}-{turn}" for name in ("before", "now")]
        run(command_line("grpo", args, folders[0], args.iterations + 1, args.against_flags), cwd=args.against)
        in_fresh_process(measured_run, "grpo", args, folders[1], at_all, False)
        for values, folder in zip((before, now), folders):
            values += list(images / logged(folder)["charts/images_per_second"])
    if args.against:
        show("      grpo of the other checkout: seconds an iteration", before)
        show("      grpo / grpo of the other checkout", [t / statistics.median(before) for t in now])
    if parsed.device != "cpu":
        peak = next((flops for name, flops in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), None)
        pipe = sampler.load_pipeline(parsed)  # only now, so that a script has the GPU to itself
        x = torch.zeros(1, *sampler.latent_shape(pipe, parsed.resolution), device=parsed.device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            sampler.velocity(pipe, x, x.new_full((1,), 0.7), sampler.encode(pipe, ["two red circles"], parsed), parsed)
        # A trained step costs its forward, a backward for activations alone (the weights are frozen), and the KL's forward.
        share = runs["grpo", at_all]["charts/groups_with_spread"].mean()
        calls = parsed.steps + (2 + (parsed.beta > 0)) * S * share
        work = counter.get_total_flops() * images * calls
        if peak:
            show("(g) model FLOPs utilisation of a GRPO iteration", [work / t / peak for t in iteration["grpo", at_all]])
