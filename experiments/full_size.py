"""The scripts at the real size of Stable Diffusion 3.5 medium and FLUX.2 klein, with random weights, and what a GPU has to hold.

    python -m experiments.full_size                         # every part that experiments/results/full_size.json lacks
    python -m experiments.full_size --gpu                   # the parts of a GPU, of which it takes no more than 24 GiB; minutes
    python -m experiments.full_size --parts sd3-grpo memory # these; several minutes each on two CPU cores
    python -m experiments.full_size --small                 # the same on small models, into runs/full_size-small/: minutes

A part is written down as soon as it is done, and skipped from then on; one that was killed begins again. sd3-... and klein-...
run a script for an iteration or two (256 x 256; guidance, KL and gradient checkpointing as in the preset; bfloat16) and tell
seconds, peak memory, the ratio before the first update, which LoRA matrices did not move, and whether stock diffusers loads the
LoRA. sd3-resume kills such a run and resumes it, which has to end in the bytes of sd3-grpo. memory adds up, without a GPU, what
training has to hold: weights from their real shapes, and the most that the tensors of a training step take together, by running
it on tensors that have shapes but no content.

gpu-... are runs with the presets, at their own resolution and number of steps, but for fewer prompts; they also tell the share of
the GPU's peak that the model's FLOPs have in the second iteration. gpu-tiny is `python gcpo.py`, gpu-nccl the same under torchrun
for two iterations, and gpu-kernel compares the log-probability kernel with its eager form and with a copy.
"""

import json
import shutil
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bookkeeping
import families
import machine
import sampler
from experiments import bench, random_weights
from families.text import Text

ROOT = Path(__file__).parent.parent
FLAGS = "--steps 2 --resolution 256 --prompts 1 --group-size 2 --updates 1 --micro-batch 2 --dtype bfloat16 --save-every 1".split()
FLAGS += "--reward jpeg-compressibility --eval-images 1 --eval-steps 1".split()
RUNS = {  # part: family, script, whether compiled, flags
    "sd3-gcpo": ("sd3", "gcpo", False, "--iterations 1 --chunk-size 1"),
    "sd3-grpo": ("sd3", "grpo", False, "--iterations 2"),
    "sd3-resume": ("sd3", "grpo", False, "--iterations 2"),
    "sd3-stepwise_grpo": ("sd3", "stepwise_grpo", False, "--iterations 1"),
    "sd3-compiled": ("sd3", "grpo", True, "--iterations 1"),
    "klein-gcpo": ("klein", "gcpo", False, "--iterations 1 --chunk-size 1"),
}
GPU_RUNS = {  # the same for a GPU
    "gpu-sd3-grpo": ("sd3", "grpo", False, "--prompts 2"),
    "gpu-sd3-gcpo": ("sd3", "gcpo", False, "--prompts 2 --chunk-size 4"),
    "gpu-sd3-stepwise_grpo": ("sd3", "stepwise_grpo", False, "--prompts 2"),
    "gpu-sd3-compiled": ("sd3", "grpo", True, "--prompts 2"),
    "gpu-klein-gcpo": ("klein", "gcpo", False, "--prompts 1 --chunk-size 4"),
}
GPU_PARTS = (*GPU_RUNS, "gpu-tiny", "gpu-nccl", "gpu-kernel")
GPU_MEMORY = 24  # GiB that a program may take of a GPU
FAMILIES = ("sd3", "klein", "flux")  # of which the memory is added up
MICRO_BATCHES = (2, 4, 8)
RANK = 32
GIB = 2**30


@dataclass
class Args:
    parts: tuple[str, ...] = ()
    """what to do, if the results lack it; none: all but those of a GPU, or with --gpu those"""
    gpu: bool = False
    """the parts that need a GPU"""
    small: bool = False
    """small models of the same classes at 64 x 64, to try this program"""


# The runs


def saved_model(family, folder, small):
    """The folder of the family's untrained pipeline, made once."""
    if not (folder / family).exists():
        folder.mkdir(parents=True, exist_ok=True)
        random_weights.random_model(family, folder / f".{family}", small)
        (folder / f".{family}").rename(folder / family)
    return folder / family


def killed_and_resumed(words, folder):
    """Kills a run as soon as it has saved its first iteration, and resumes it."""
    run = subprocess.Popen([sys.executable, *words], cwd=ROOT)
    while not (folder / "state.pt").exists():
        if run.poll() is not None:
            sys.exit("the run ended before it was killed")
        time.sleep(0.02)
    run.kill()
    run.wait()
    if (folder / "result.json").exists():
        sys.exit("the run was over before it was killed")
    subprocess.run([sys.executable, words[0], "--resume", str(folder)], cwd=ROOT, check=True)


def loads_in_diffusers(model, folder):
    """Whether the stock pipeline loads the run's LoRA, all of it, with the values and the scale that the run saved."""
    pipe, saved = DiffusionPipeline.from_pretrained(model, dtype=torch.bfloat16), load_file(folder / families.LORA_FILE)
    pipe.load_lora_weights(folder)
    (adapter,) = pipe.get_list_adapters()["transformer"]
    loaded = get_peft_model_state_dict(pipe.transformer, adapter_name=adapter)
    config = pipe.transformer.peft_config[adapter]
    same = all(torch.equal(weight, saved[f"transformer.{name}"].to(weight.dtype)) for name, weight in loaded.items())
    return same and len(loaded) == len(saved) and config.lora_alpha == 2 * config.r


def do_run(part, workspace, small):
    """Does a part's run and gives what there is to tell of it."""
    family, script, compiled, flags = RUNS[part]
    model, folder = saved_model(family, workspace, small), workspace / part
    shutil.rmtree(folder, ignore_errors=True)
    words = bench.command(script, ["--model", str(model), *FLAGS, *flags.split(), "--output-dir", str(folder)], compiled)
    words += ["--resolution", "64", "--text-length", "8"] if small else []
    found = {}
    if part == "sd3-resume":
        killed_and_resumed(words, folder)
        found["same_bytes"] = (folder / families.LORA_FILE).read_bytes() == (
            workspace / "sd3-grpo" / families.LORA_FILE
        ).read_bytes()
    else:
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    found["loads_in_diffusers"] = bench.in_fresh_process(loads_in_diffusers, str(model), folder)  # its memory is gone afterwards
    return found | findings(folder)


def findings(folder):
    """What there is to tell of a finished run."""
    scalars, result = bookkeeping.read_scalars(folder), json.loads((folder / "result.json").read_text())
    lora = load_file(folder / families.LORA_FILE)
    ups = {name.removeprefix("transformer.").removesuffix(".lora_B.weight"): w for name, w in lora.items() if "lora_B" in name}
    seconds = {tag.removeprefix("time/"): [round(s, 1) for _, s in scalars[tag]] for tag in scalars if tag.startswith("time/")}
    return dict(
        compiled=json.loads((folder / "args.json").read_text())["compiled_blocks"],
        seconds=seconds,
        peak_memory_mb=round(result["peak_memory_mb"]),
        ratio_0=[value for _, value in scalars["losses/ratio_0"]],
        clip_fraction_0=[value for _, value in scalars["losses/clip_fraction_0"]],
        pairs=len(ups),
        unmoved=[name for name, up in ups.items() if not up.any()],  # B starts at 0
    )


# On a GPU


def limit_memory(gib):
    """Lets this process take no more than so many GiB of the GPU."""
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / torch.cuda.get_device_properties(0).total_memory))


def limited_run(script, flags, compiled, folder):
    """Runs a script for two iterations within GPU_MEMORY: (rows, FLOPs) of an iteration, and the GPU's peak."""
    limit_memory(GPU_MEMORY)
    calls, names = bench.watched(script, flags, 2, compiled, folder)
    limit_memory(1000)  # without gradient checkpointing, as the FLOPs are counted, klein takes more
    rows = {trained: sum(n for n, kind in calls if kind == trained) / 2 for trained in (False, True)}
    flops = sum(rows[trained] * each for trained, each in bench.row_flops(names["pipe"], names["args"]).items())
    return rows, flops, *bench.peak_flops(names["args"])


def do_gpu_run(part, workspace, small):
    """Does a part's run on the GPU and gives what there is to tell of it."""
    family, script, compiled, flags = GPU_RUNS[part]
    model, folder = saved_model(family, workspace, small), workspace / part
    shutil.rmtree(folder, ignore_errors=True)
    preset = families.of_model(family).PRESET | (dict(resolution=64, text_length=8) if small else {})
    words = ["--model", str(model), *flags.split(), *(["--resolution", "64", "--text-length", "8"] if small else [])]
    rows, flops, peak, which = bench.in_fresh_process(limited_run, script, words, compiled, folder)
    seconds = bench.logged(folder)["iteration"][0]  # of the second; the first warms up
    found = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, micro_batch=preset["micro_batch"])
    if not compiled:  # compiled, a rollout's rows have gradients too, though nothing goes backwards
        found |= dict(rows_without_gradients=rows[False], rows_with_gradients=rows[True], flops=flops)
        found[f"utilisation, of {which}"] = round(flops / seconds / peak, 3)
    return found | findings(folder)


def miniature_on_gpu(workspace, torchrun):
    """Runs gcpo.py as it is, or under torchrun for two iterations, whose sums then go through NCCL."""
    folder = workspace / ("gpu-nccl" if torchrun else "gpu-tiny")
    shutil.rmtree(folder, ignore_errors=True)
    how = "-m torch.distributed.run --standalone --nproc-per-node 1".split() if torchrun else []
    short = "--iterations 2 --eval-images 6".split() if torchrun else []
    began = time.monotonic()
    subprocess.run([sys.executable, *how, "gcpo.py", *short, "--output-dir", str(folder)], cwd=ROOT, check=True)
    found = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, seconds_in_all=round(time.monotonic() - began))
    found["seconds_of_an_iteration"] = round(float(np.median(bench.logged(folder)["iteration"])), 3)
    result = json.loads((folder / "result.json").read_text())
    return found | {name: result[name] for name in ("base_score", "final_score", "final_variety")} | findings(folder)


def kernel_on_gpu():
    """The log-probability kernel: median milliseconds compiled, eager, and of a copy of one of its seven tensors."""
    functions = bench.kernel_functions("cuda")
    bench.in_turns(functions, 3)  # compiles, warms up
    times = {name: round(float(np.median(t)) * 1e3, 3) for name, t in bench.in_turns(functions, 50, machine.now).items()}
    return dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__) | times


def wrong(found):
    """What of a run's findings is not as it has to be."""
    return [
        what
        for what, right in {
            "the ratio before the first update is not 1": all(abs(ratio - 1) < 1e-5 for ratio in found["ratio_0"]),
            "a ratio is clipped before the first update": not any(found["clip_fraction_0"]),
            "stock diffusers does not load the LoRA": found.get("loads_in_diffusers", True),
            "the resumed run has other bytes": found.get("same_bytes", True),
        }.items()
        if not right
    ]


# The memory


class Peak(TorchDispatchMode):
    """Follows the bytes of all tensors made inside: how many there are now, and at the most."""

    def __init__(self):
        super().__init__()
        self.bytes, self.now, self.most = {}, 0, 0

    def forget(self, key):
        self.now -= self.bytes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]:
            if storage._cdata not in given and storage._cdata not in self.bytes:  # neither in place nor a view
                self.bytes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata)
        self.most = max(self.most, self.now)
        return result


def hollow(model):
    """Replaces a meta model's parameters and buffers by tensors of the CPU; within FakeTensorMode these have no content."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cpu"), p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cpu")


def training_peak(pipe, embeds, pooled, shape, n, args):
    """The most bytes that a training step with n latents holds beside the weights: activations, gradients, what is in between."""
    text = Text(*(torch.empty(t.shape) for t in (embeds, pooled, embeds, pooled)))
    args.micro_batch = n
    with Peak() as peak:
        rows = text.rows(torch.zeros(n, dtype=torch.long))
        sampler.velocity(pipe, torch.empty(n, *shape), torch.empty(n), rows, args).sum().backward()
    pipe.transformer.zero_grad(set_to_none=True)
    return peak.most


def memory(family, small):
    """GiB of all that training with the family's preset holds, part by part and together at its three fullest moments."""
    preset = families.of_model(family).PRESET | (dict(resolution=64, text_length=8) if small else {})
    changes = (random_weights.SMALL[family], random_weights.SMALL_VAE) if small else ({}, {})
    with torch.device("meta"):
        transformer = random_weights.transformer(family, **changes[0]).bfloat16().requires_grad_(False)
        vae = random_weights.vae(family, **changes[1]).requires_grad_(False)
        targets = families.of_model(family).LORA_TARGETS
        transformer.add_adapter(LoraConfig(r=RANK, init_lora_weights="gaussian", target_modules=targets))
    cast_training_params(transformer, torch.float32)
    pipe = random_weights.pipeline(family, transformer, vae)
    embeds, pooled = families.of(pipe).encode(pipe, "", preset["text_length"], "cpu")
    count = lambda model, learning=False: sum(p.numel() for p in model.parameters() if p.requires_grad == learning)
    latents, shape = preset["prompts"] * preset["group_size"], sampler.latent_shape(pipe, preset["resolution"])
    states = latents * (2 * preset["steps"] + 1 - preset["ode_steps"]) * torch.Size(shape).numel()
    parts = {
        "transformer, bfloat16": 2 * count(transformer) / GIB,
        f"LoRA of rank {RANK} and AdamW's two moments, float32": 12 * count(transformer, True) / GIB,
        "VAE, float32": 4 * count(vae) / GIB,
        "trajectories of an iteration and velocities of stepwise_grpo.py, float32": 4 * states / GIB,
        "text encoders, bfloat16": 2 * sum(count(m, True) for m in random_weights.text_encoders(family)) / GIB,
    }
    step, args = {}, SimpleNamespace(dtype="bfloat16", guidance=preset["guidance"])
    with FakeTensorMode():
        hollow(transformer), hollow(vae)
        with Peak() as peak:
            sampler.decode(pipe, torch.empty(1, *shape))
        parts["decoding one image"] = peak.most / GIB
        for checkpointing in (True, False):
            (transformer.enable_gradient_checkpointing if checkpointing else transformer.disable_gradient_checkpointing)()
            for n in MICRO_BATCHES:
                step[checkpointing, n] = training_peak(pipe, embeds, pooled, shape, n, args) / GIB
    weights, lora, decoder, trajectories, encoders, decoding = parts.values()
    always = weights + lora + decoder
    together = {"together while prompts are encoded": always + encoders}
    together["together while images are decoded"] = always + trajectories + decoding
    for (checkpointing, n), most in step.items():
        how = "with" if checkpointing else "without"
        parts[f"a training step, --micro-batch {n}, {how} gradient checkpointing"] = most
        together[f"together in training, --micro-batch {n}, {how}"] = always + trajectories + most
    return {name: round(value, 3) for name, value in (parts | together).items()}


def table(sizes):
    """Markdown of {family: {name: GiB}}."""
    rows = [["GiB", *sizes], ["-"] * (len(sizes) + 1)]
    rows += [[name, *(f"{sizes[family][name]:.2f}" for family in sizes)] for name in next(iter(sizes.values()))]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    possible = GPU_PARTS if args.gpu else (*RUNS, "memory")
    args.parts = args.parts or possible
    if unknown := set(args.parts) - {*possible}:
        machine.fail(f"--parts {' '.join(sorted(unknown))} is not among {', '.join(possible)}")
    if args.gpu and not torch.cuda.is_available():
        machine.fail("--gpu needs a GPU, and this machine has none that PyTorch can use")
    workspace = ROOT / "runs" / f"full_size{'-small' * args.small}"
    file = workspace / "full_size.json" if args.small else ROOT / "experiments" / "results" / "full_size.json"
    read = lambda: json.loads(file.read_text()) if file.exists() else {}
    results = read()
    todo = [part for part in possible if part in args.parts and part not in results]
    if "sd3-resume" in todo and "sd3-grpo" not in todo and not (workspace / "sd3-grpo" / families.LORA_FILE).exists():
        machine.fail("sd3-resume is compared with the run of sd3-grpo, whose folder is not here; delete sd3-grpo from the results")
    workspace.mkdir(parents=True, exist_ok=True)
    for part in todo:
        if part == "memory":
            found = {family: memory(family, args.small) for family in FAMILIES}
        elif part == "gpu-kernel":
            found = kernel_on_gpu()
        elif part in ("gpu-tiny", "gpu-nccl"):
            found = miniature_on_gpu(workspace, part == "gpu-nccl")
        elif args.gpu:
            found = do_gpu_run(part, workspace, args.small)
        else:
            found = do_run(part, workspace, args.small)
        results = read() | {part: found}  # another part may have been written meanwhile
        bookkeeping.write_json(file, results)
    for part in (part for part in args.parts if part != "memory"):
        print(part, json.dumps(results[part]))
    if "memory" in args.parts:
        print(table(results["memory"]))
    problems = [f"{part}: {what}" for part in args.parts if "ratio_0" in results[part] for what in wrong(results[part])]
    if problems:
        sys.exit("\n".join(problems))
