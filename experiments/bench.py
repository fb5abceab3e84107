"""Seconds per iteration of the three scripts, eager and compiled, and how near they are to what the machine can do.

    python -m experiments.bench                         # miniature model, about a quarter of an hour on two CPU cores
    python -m experiments.bench --against ../before     # only grpo.py, in turns with the grpo.py of another checkout
    python -m experiments.bench --model sd3 --random-weights --iterations 3 --turns 1     # full size without a download, on a GPU

A machine's speed wanders from minute to minute, so everything is measured in turns and compared with GRPO's iteration of the
same turn: medians, with the range in brackets. It prints

    what a script calls the transformer with: rows without and with gradients, counted in a run, and their FLOPs
    seconds of an iteration: its parts, over GRPO's, over the bare calls of the transformer that it makes, the share of the
    peak that the model's FLOPs have in it (model FLOPs utilisation; recomputed activations do not count)
    grpo.py beside one and two busy loops, and shared by two processes, over grpo.py alone (on a CPU)
    seconds that are no iteration's: starting, compiling from an empty cache and from a full one, two small evaluations
    the log-probability kernel: eager over compiled time, and its bandwidth over that of a plain copy

Flags that are not its own go to the scripts. Eager is --no-compile; compiled is compiled however few the iterations are.
"""

import contextlib
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

import arguments
import bookkeeping
import families
import gcpo
import grpo
import machine
import sampler
import stepwise_grpo
from experiments.random_weights import FULL, random_model

SCRIPTS = {"grpo": grpo, "gcpo": gcpo, "stepwise_grpo": stepwise_grpo}
ROOT = Path(__file__).parent.parent
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16, by the makers
LITTLE_ELSE = "--eval-images 6 --eval-steps 2 --eval-every 1000 --save-every 1000".split()
# Runs the script that the next word names, its blocks compiled even in a run too short to repay it
COMPILED = """import runpy, sys, bookkeeping
bookkeeping.WORTH_COMPILING = dict.fromkeys(bookkeeping.WORTH_COMPILING, 0)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")"""


@dataclass
class Args:
    model: str = "tiny"
    """as in the scripts"""
    random_weights: bool = False
    """a transformer and VAE of the size of --model, sd3 (3.5 medium), flux or klein, with random weights and random text"""
    iterations: int = 4
    """measured iterations of a run; one more warms up"""
    turns: int = 3
    """runs of every script"""
    against: str = ""
    """folder of another checkout, whose grpo.py is compared with the one here"""
    against_flags: str | None = None
    """flags for that grpo.py, if it does not know those for the script here"""


def command(script, flags, compiled):
    """The words that run a script eager, or compiled whatever its length."""
    return [*(["-c", COMPILED, f"{script}.py"] if compiled else [f"{script}.py", "--no-compile"]), *flags]


def logged(folder):
    """{name: seconds of every iteration but the first, which warms up} of a run's laps, and of the whole `iteration`."""
    scalars = bookkeeping.read_scalars(folder)
    seconds = {tag: np.array([value for _, value in scalars[tag][1:]]) for tag in scalars if tag.startswith("time/")}
    return {tag.removeprefix("time/"): values for tag, values in seconds.items()} | {"iteration": sum(seconds.values())}


def measured_run(script, flags, iterations, compiled, checkout=ROOT, processes=1, busy=0):
    """Runs a script of a checkout: its `logged` laps, and the seconds that are no iteration's, as `other`."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads() // processes)} if processes > 1 else {}
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = [*command(script, flags, compiled), *LITTLE_ELSE, "--iterations", str(iterations + 1), "--output-dir", folder]
            began = time.monotonic()
            options = dict(cwd=checkout, env=os.environ | threads, stdout=subprocess.DEVNULL)
            done = subprocess.run([sys.executable, *torchrun, *run], **options)
            if done.returncode:
                sys.exit(done.returncode)
            laps, whole = logged(folder), time.monotonic() - began
    finally:
        for loop in loops:
            loop.kill()
    return laps | {"other": np.array([whole - np.median(laps["iteration"]) * (iterations + 1)])}


def in_fresh_process(function, *arguments):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(function, *arguments).result()


def bare_call(pipe, args):
    """A function (n, trained) that makes one call of the transformer with n rows, and the backward pass of one in training."""
    text, alone = sampler.encode(pipe, [""], args), partial(replace, args, guidance=1.0)

    def call(n, trained):
        x = torch.randn(n, *sampler.latent_shape(pipe, args.resolution), device=args.device)
        rows = text.rows(torch.zeros(n, dtype=torch.long, device=args.device))
        with torch.set_grad_enabled(trained):
            v = sampler.velocity(pipe, x, x.new_full((n,), 0.7), rows, alone(micro_batch=n))
        if trained:
            v.sum().backward()

    return call


def watched(script, flags, iterations, compiled=False, folder=None):
    """Runs a script here, in `folder` or one that is dropped: [(rows, whether with gradients)] of its calls, and its names.

    Calls are those of the transformer; evaluations before and after the iterations are left out.
    """
    calls = []

    def count(module, inputs):
        if type(module).__name__.endswith("Transformer2DModel"):
            calls.append((len(inputs[0]), torch.is_grad_enabled()))

    if compiled:
        bookkeeping.WORTH_COMPILING = dict.fromkeys(bookkeeping.WORTH_COMPILING, 0)
    with tempfile.TemporaryDirectory() as temporary, register_module_forward_pre_hook(count):
        where = ["--iterations", str(iterations), "--output-dir", str(folder or temporary)]
        sys.argv = [f"{script}.py", *flags, *LITTLE_ELSE, *where, *([] if compiled else ["--no-compile"])]
        with contextlib.redirect_stdout(io.StringIO()):
            names = runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        n, pipe, args = len(calls), names["pipe"], names["args"]
        prompts = bookkeeping.evaluate(pipe, args, args.eval_steps).prompts
        of_first_evaluation = len(calls) - n
        bookkeeping.path_kl(pipe, args, prompts)  # which only later ones have
        of_last_evaluation = len(calls) - n
    return calls[of_first_evaluation : n - of_last_evaluation], names


def row_flops(pipe, args):
    """{whether with gradients: FLOPs of the transformer for one row}; activations that are computed again do not count."""
    pipe.transformer.disable_gradient_checkpointing()
    flops = {}
    for trained in (False, True):
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            bare_call(pipe, args)(2, trained)
        flops[trained] = counter.get_total_flops() / 2
    return flops


def counted(script, flags, iterations):
    """What `watched` gives of the calls of a script run eager, and `row_flops`."""
    calls, names = watched(script, flags, iterations)
    return calls, row_flops(names["pipe"], names["args"])


def script_args(script, flags):
    """The script's own arguments, as its run has them."""
    args = arguments.parse_args(SCRIPTS[script].Args, None, flags)
    machine.resolve_device(args)
    return args


def bare_seconds(script, flags, calls, compiled):
    """Seconds of the transformer's calls alone, forward and backward, after one of each kind has warmed up."""
    threads, args = machine.openmp_threads(), script_args(script, flags)
    pipe = families.load_pipeline(args)
    if compiled:
        families.compile_blocks(pipe.transformer)
    call = bare_call(pipe, args)
    with machine.bound(threads if args.device == "cpu" else []):
        for kind in dict.fromkeys(calls):
            call(*kind)
        began = machine.now()
        for kind in calls:
            call(*kind)
        return machine.now() - began


def in_turns(functions, turns, clock=None):
    """{name: what the function returned, or by the clock how long it took, in each turn}; every other turn goes backwards."""
    results = {name: [] for name in functions}
    for turn in range(turns):
        for name, function in list(functions.items())[:: -1 if turn % 2 else 1]:
            began = clock and clock()
            result = function()
            results[name].append(clock() - began if clock else result)
    return results


def kernel_functions(device):
    """The fused log-probability forward and backward at the full model's latents, compiled and eager, and a copy."""
    generator = torch.Generator().manual_seed(0)
    v, x, x_next = (torch.randn(32, 16, 64, 64, generator=generator).to(device) for _ in range(3))
    v.requires_grad_()
    numbers = torch.full((32,), 0.7, device=device), torch.full((32,), 0.6, device=device), torch.ones(32, device=device)

    def step(stance):
        with torch.compiler.set_stance(stance):
            grpo.transition_log_prob(v, x, x_next, *numbers, 0.9, 0.7, "flow").sum().backward()
        v.grad = None

    return {"compiled": lambda: step("default"), "eager": lambda: step("force_eager"), "copy": lambda: x.clone()}


def peak_flops(args):
    """FLOPs per second that the maker of the GPU promises, or else those of a large matrix product here; and which."""
    name = torch.cuda.get_device_name() if args.device != "cpu" else ""
    for gpu, peak in PEAK_FLOPS.items():
        if gpu in name and args.dtype == "bfloat16":
            return peak, f"the {gpu}'s peak"
    a = torch.randn(2048, 2048, device=args.device, dtype=getattr(torch, args.dtype))
    return 2 * 2048**3 / min(in_turns({"product": lambda: a @ a}, 10, machine.now)["product"]), "a large product's rate"


def over(runs, others, name="iteration"):
    """Of every turn the median of one over that of the other."""
    return [np.median(a[name]) / np.median(b[name]) for a, b in zip(runs, others)]


def show(name, values, digits=2):
    median, low, high = (f"{f(values):.{digits}f}" for f in (np.median, np.min, np.max))
    print(f"{name:72} {median} [{low} to {high}]", flush=True)


if __name__ == "__main__":
    args, flags = tyro.cli(Args, description=__doc__, return_unknown_args=True)
    if min(args.iterations, args.turns) < 1:
        machine.fail("--iterations and --turns must be at least 1")
    if args.against and not (Path(args.against) / "grpo.py").exists():
        machine.fail(f"--against {args.against} is not a checkout: it has no grpo.py")
    if args.random_weights and args.model not in FULL:
        machine.fail(f"--random-weights needs a --model of {', '.join(FULL)}")
    workspace = tempfile.TemporaryDirectory()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{workspace.name}/cache"  # empty: the first compiled run starts cold
    if args.random_weights:
        args.model, family = f"{workspace.name}/{args.model}", args.model
        random_model(family, args.model)
    flags = [*flags, "--model", args.model]
    parsed = script_args("grpo", flags)
    print(f"{parsed.device}, {parsed.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    kinds = ("eager", "compiled")[: 1 + (parsed.compile and machine.has_compiler(parsed.device))]

    run = lambda script, kind, **how: partial(measured_run, script, flags, args.iterations, kind == "compiled", **how)
    contestants, calls, flops = {}, {}, defaultdict(float)
    if args.against:
        theirs = flags if args.against_flags is None else [*args.against_flags.split(), "--model", args.model]
        for kind in kinds:
            other = partial(measured_run, "grpo", theirs, args.iterations, kind == "compiled", checkout=args.against)
            contestants |= {("grpo", kind): run("grpo", kind), ("grpo of the other checkout", kind): other}
    else:
        for script in SCRIPTS:
            calls[script], of_row = in_fresh_process(counted, script, flags, args.iterations + 1)
            rows = {trained: sum(n for n, kind in calls[script] if kind == trained) for trained in of_row}
            flops[script] = sum(rows[trained] * of_row[trained] for trained in of_row) / (args.iterations + 1)
            per = {trained: f"{n / (args.iterations + 1):.0f}" for trained, n in rows.items()}
            print(f"{script}: rows per iteration {per[False]} without and {per[True]} with gradients, {flops[script]:.3g} FLOPs")
            for kind in kinds:
                contestants[script, kind] = run(script, kind)
                bare = (bare_seconds, script, flags, calls[script], kind == "compiled")
                contestants[f"{script}, bare calls", kind] = partial(in_fresh_process, *bare)
        if parsed.device == "cpu":
            for n in (1, 2):
                contestants[f"grpo beside {n} busy loop{'s' * (n > 1)}", kinds[-1]] = run("grpo", kinds[-1], busy=n)
            if parsed.prompts % 2 == 0 and torch.get_num_threads() > 1:
                contestants["grpo, two processes", kinds[-1]] = run("grpo", kinds[-1], processes=2)
    results = in_turns(contestants, args.turns)

    peak, which = peak_flops(parsed)
    for (name, kind), found in results.items():
        if name.endswith("bare calls"):
            continue
        seconds = np.concatenate([turn["iteration"] for turn in found])
        show(f"{name}, {kind}: seconds of an iteration", seconds)
        for part in found[0] if name in SCRIPTS else ():
            if part not in ("iteration", "other"):
                show(f"    {part}", np.concatenate([turn[part] for turn in found]))
        if name != "grpo":
            show("    over grpo", over(found, results["grpo", kind]))
        elif kind != "eager":
            show("    over grpo, eager", over(found, results["grpo", "eager"]))
        if name in calls:
            alone = [{"iteration": turn / (args.iterations + 1)} for turn in results[f"{name}, bare calls", kind]]
            show("    over its bare calls of the transformer", over(found, alone))
            show(f"    model FLOPs utilisation, of {which}", flops[name] / seconds / peak)
    other = {key: np.concatenate([turn["other"] for turn in results[key]]) for key in results if key[0] in SCRIPTS}
    show("seconds of a run that are no iteration's, eager", other["grpo", "eager"], 0)
    if "compiled" in kinds and not args.against:
        show("    compiled, from an empty cache", other["grpo", "compiled"][:1], 0)
        show("    from a full one", np.concatenate([other["grpo", "compiled"][1:], other["gcpo", "compiled"]]), 0)
        functions = kernel_functions(parsed.device)
        in_turns(functions, 1)  # compiles
        kernel = {name: np.array(seconds) for name, seconds in in_turns(functions, 20, machine.now).items()}
        show("log-probability kernel: eager / compiled time", kernel["eager"] / kernel["compiled"])
        # Forward reads v, x and x_next; backward reads them again and writes v's gradient: 7 tensors. A copy reads one, writes one.
        show("    its bandwidth / a copy's", 7 / 2 * kernel["copy"] / kernel["compiled"])
