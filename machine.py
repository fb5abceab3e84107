"""The machine under a program: device, precision, threads, processes, clock and memory, and what to say when it will not do."""

import os
import shutil
import sys
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist


def fail(message):
    """Bad input: one sentence on stderr, exit code 2, no traceback."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if sys.platform == "win32":
    fail("this code runs on Linux and macOS; on Windows use it inside WSL, the Windows Subsystem for Linux")
import resource  # noqa: E402  only now, since Windows has none


def rank_world():
    """This process's rank and the number of processes, as torchrun sets them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def resolve_device(args):
    """Replaces `auto` in args.device and args.dtype by what this machine is fastest with; quiets the libraries."""
    import diffusers  # slow to import, and not needed to answer bad input
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
        # On a processor only with AMX: on the one measured without it, which has AVX-512's bfloat16 instructions, an iteration of
        # the miniature took 1.4 times as long in bfloat16 as in float32.
        on_gpu = args.device.startswith("cuda")
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else torch.cpu._is_amx_tile_supported()
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


def has_compiler(device):
    """Whether torch.compile finds what it needs on this machine."""
    compilers = (os.environ.get("CXX", "g++"),) if device == "cpu" else (os.environ.get("CC", "gcc"), "clang")
    return any(map(shutil.which, compilers))


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


def now():
    """Seconds on a clock that first waits for the GPU, whose calls return before their work is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.monotonic()


def peak_memory_mb(device):
    """Most memory the run has held: of the GPU, or of the process on a CPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def gather(rows):
    """The rows of all ranks (world · n, ...) in rank order, from this rank's (n, ...)."""
    if not dist.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def gather_objects(thing):
    """A list of what each rank has, in rank order."""
    if not dist.is_initialized():
        return [thing]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, thing)
    return parts


def sum_over_processes(parameters):
    """Replaces the gradients by their sum over all processes, sent in one piece; a process may have had nothing to train."""
    if not dist.is_initialized():
        return
    gradients = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    dist.all_reduce(gradients)
    for p, gradient in zip(parameters, gradients.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p)
