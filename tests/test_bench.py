"""The instruments of speed and memory: rows and FLOPs are those that run, ratios and bytes those of the things compared."""

import gc
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

import families
import sampler
from experiments import bench, full_size, random_weights

FLAGS = "--prompts 2 --group-size 4 --steps 5 --ode-steps 1 --updates 1 --micro-batch 6 --dtype float32 --device cpu".split()
FLAGS += ["--beta", "0", "--reward", "jpeg-compressibility"]  # under which every image has an advantage, so that all are trained


@pytest.mark.parametrize(
    "script, flags, sampled, trained",
    [
        # 8 images in micro-batches of 4: of the first step one row each, which is doubled, then 4 steps of 4. 32 pairs in
        # batches of 6, 6, 5, 5, 5 and 5: of the first 8, which are two groups' noise, only 2 rows in one batch and 1 in the next.
        ("grpo", [], 2 * (2 + 4 * 4), 2 + (1 + 4) + 4 * 5),
        # Twice the rows, and one more call without gradients for each in training
        ("grpo", ["--guidance", "3", "--beta", "0.1"], 2 * 36 + 2 * 27, 2 * 27),
        # Chunks by trajectory, so that a batch has 6 steps of two trajectories: the first steps of a group's share a row
        ("gcpo", ["--chunks", "4"], 36, 8 * 4),
    ],
)
def test_rows_and_flops_are_those_of_what_runs(script, flags, sampled, trained, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    if not flags:  # a path's KL takes calls without the LoRA, which are fewer FLOPs
        monkeypatch.setattr(sampler, "path_kl", lambda pipe, prompts, noise, args: torch.zeros(len(prompts)))
    with FlopCounterMode(display=False) if not flags else nullcontext() as counter:
        calls, flops = bench.counted(script, [*FLAGS, *flags], 1)
    assert sum(n for n, gradients in calls if not gradients) == sampled
    assert sum(n for n, gradients in calls if gradients) == trained
    if counter:  # beside the iteration there were three evaluations, and the calls that tell the FLOPs of a row
        other = (3 * 2 * 6 + 2) * flops[False] + 2 * flops[True]
        done = sum(n * flops[gradients] for n, gradients in calls) + other
        assert sum(counter.get_flop_counts()["SD3Transformer2DModel"].values()) == done


def checkout(folder, seconds):
    """A folder whose grpo.py leaves the log of a run with so many seconds in an iteration, but more in the first."""
    with SummaryWriter(folder / "log") as writer:
        for step in range(1, 5):
            for lap, share in (("sample", 1), ("train", 2)):
                writer.add_scalar(f"time/{lap}", seconds * share if step > 1 else 50, step)
    script = "import shutil, sys; shutil.copytree('log', sys.argv[sys.argv.index('--output-dir') + 1], dirs_exist_ok=True)"
    (folder / "grpo.py").write_text(script)
    return folder


def test_an_iteration_twice_as_slow_is_over_by_two(tmp_path):
    fast, slow = (
        bench.measured_run("grpo", FLAGS, 3, False, checkout(tmp_path / str(seconds), seconds)) for seconds in (0.25, 0.5)
    )
    assert list(fast["sample"]) == [0.25] * 3 and list(fast["train"]) == [0.5] * 3 and list(slow["iteration"]) == [1.5] * 3
    assert bench.over([slow, slow], [fast, slow]) == [2, 1]


def test_the_command_compares_with_another_checkout(tmp_path):
    flags = f"--against {checkout(tmp_path / 'other', 0.5)} --iterations 1 --turns 1 --no-compile".split()
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench", *flags, *FLAGS], cwd=bench.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    printed = {line[:72].strip(): float(line[72:].split()[0]) for line in done.stdout.splitlines() if "[" in line}
    assert printed["grpo of the other checkout, eager: seconds of an iteration"] == 1.5
    ours = printed["grpo, eager: seconds of an iteration"]
    assert printed["over grpo"] == pytest.approx(1.5 / ours, abs=0.01 + 0.01 / ours**2)


def test_turns_go_forwards_and_backwards_and_the_clock_tells_each_function():
    now, order = [0.0], []

    def function(name, seconds):
        order.append(name)
        now[0] += seconds

    seconds = bench.in_turns({"a": lambda: function("a", 1), "b": lambda: function("b", 2)}, 2, lambda: now[0])
    assert seconds == {"a": [1, 1], "b": [2, 2]} and order == ["a", "b", "b", "a"]


def test_the_peak_counts_what_is_held_at_the_same_time():
    kb = lambda: torch.empty(256)
    with full_size.Peak() as peak:
        a = kb()
        a.view(16, 16).add_(1)  # neither a view nor in place is a new one
        b = a * 2
        del b
        b = a * 3  # noqa: F841
        gc.collect()
        assert peak.now == peak.most == 2048
        weight = torch.empty(256, requires_grad=True)
        (weight.exp() * a).sum().backward()
    # a, b, weight, its exp, the gradients of exp and of weight, the sum and the gradient of that
    assert peak.most == 6 * 1024 + 2 * 4


@pytest.mark.parametrize("checkpointing", [True, False])
def test_tensors_without_content_take_as_much_as_those_with(checkpointing):
    changes = random_weights.SMALL["sd3"]
    real, hollow = (random_weights.transformer("sd3", **changes).requires_grad_(False) for _ in range(2))
    peaks = []
    for transformer, mode in ((real, nullcontext()), (hollow, FakeTensorMode())):
        transformer.add_adapter(LoraConfig(r=4, target_modules=families.sd3.LORA_TARGETS))
        pipe = random_weights.pipeline("sd3", transformer, None)
        text = families.sd3.encode(pipe, "", 8, "cpu")
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        with mode:
            if transformer is hollow:
                full_size.hollow(transformer)
            peaks.append(full_size.training_peak(pipe, *text, (16, 8, 8), 4, SimpleNamespace(dtype="bfloat16", guidance=4.5)))
    assert peaks[0] == pytest.approx(peaks[1], rel=1e-3) and peaks[0] > 1e5


def test_full_size_names_what_is_not_as_it_has_to_be(tmp_path):
    right = dict(ratio_0=[1.0, 1.0], clip_fraction_0=[0.0, 0.0], loads_in_diffusers=True)
    assert full_size.wrong(right) == []
    faults = [dict(ratio_0=[1.0, 1.0001]), dict(clip_fraction_0=[0.0, 0.5]), dict(loads_in_diffusers=False), dict(same_bytes=False)]
    assert [len(full_size.wrong(right | fault)) for fault in faults] == [1, 1, 1, 1]
