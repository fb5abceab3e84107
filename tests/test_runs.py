"""Each script from end to end on a few small iterations: its files, its arithmetic, resuming, and bad input."""

import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

import arguments
import bookkeeping
import families
import grpo
import machine
import miniature
import rewards
from experiments import compare
from miniature import pretrain

ROOT = Path(__file__).parent.parent
SCRIPTS = ("grpo", "gcpo", "stepwise_grpo")
SMALL = "--prompts 2 --group-size 4 --steps 5 --ode-steps 1 --eval-images 12 --eval-steps 3 --updates 2".split()
SMALL += "--sde cps --eta 0.8 --beta 0 --no-compile --dtype float32 --device cpu".split()


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")


def run(script, folder, *flags, small=True):
    """Runs a script in this process, as `python script.py` would, and returns its folder."""
    argv, sys.argv = sys.argv, [f"{script}.py", *(SMALL if small else ()), *flags]
    if "--resume" not in flags:
        sys.argv += ["--output-dir", str(folder)]
    try:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    finally:
        sys.argv = argv
    return folder


def scalars(folder):
    return {tag: [value for _, value in points] for tag, points in bookkeeping.read_scalars(folder).items()}


@pytest.fixture(scope="module", params=SCRIPTS)
def finished(request, tmp_path_factory):
    return request.param, run(request.param, tmp_path_factory.mktemp("run") / request.param, "--iterations", "2")


def test_a_run_writes_its_files(finished):
    script, folder = finished
    result = json.loads((folder / "result.json").read_text())
    keys = "algorithm model reward seed iterations base_score final_score base_categories final_categories seconds train_images"
    assert set(f"{keys} peak_memory_mb".split()) <= set(result)
    assert result["algorithm"] == script and result["train_images"] == 16 and len(result["base_categories"]) == 6
    assert json.loads((folder / "args.json").read_text())["group_size"] == 4
    assert Image.open(folder / "before.png").size == Image.open(folder / "after.png").size
    logged = scalars(folder)
    assert {"charts/reward", "charts/held_out_score", "losses/ratio_0", "losses/clip_fraction_0", "losses/grad_norm_0"} <= set(
        logged
    )
    if script == "gcpo":
        assert "chunks/distance_3" in logged
    if script == "stepwise_grpo":
        assert "gain/step_3" in logged and (folder / "tweedie.png").exists()
    assert not list(folder.glob(".*tmp"))


def test_compare_reads_a_runs_curve(finished):
    _, folder = finished
    result = json.loads((folder / "result.json").read_text())
    (images, minutes, score, variety), (images_end, minutes_end, score_end, variety_end) = compare.evaluations(folder)
    assert (images, minutes, images_end) == (0, 0, 16) and 0 < minutes_end == pytest.approx(result["seconds"] / 60, rel=1e-3)
    assert (score, score_end) == pytest.approx((result["base_score"], result["final_score"]))
    for logged, name in ((variety, "base_variety"), (variety_end, "final_variety")):
        assert logged == pytest.approx(math.nan if result[name] is None else result[name], nan_ok=True)


def test_stock_diffusers_loads_the_lora(finished):
    _, folder = finished
    pipe = StableDiffusion3Pipeline.from_pretrained(miniature.FOLDER)
    options = dict(num_inference_steps=4, output_type="pt", max_sequence_length=1)

    def draw():
        return pipe("two red circles", generator=torch.Generator().manual_seed(0), **options).images

    before = draw()
    pipe.load_lora_weights(folder)
    assert not torch.equal(draw(), before)
    lora = next(m for m in pipe.transformer.modules() if hasattr(m, "scaling"))
    assert set(lora.scaling.values()) == {2.0}  # alpha 64 over rank 32
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert any(w.abs().max() > 0 for n, w in weights.items() if "lora_B" in n)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("sde", ["flow", "cps"])
def test_the_ratio_is_one_before_the_first_update(script, sde, tmp_path):
    """One update a rollout is on-policy: with the clip at 1e-5 no ratio of any step is clipped."""
    flags = ["--iterations", "1", "--updates", "1", "--clip", "1e-5", "--sde", sde, "--micro-batch", "3"]
    logged = scalars(run(script, tmp_path / "run", *flags))
    assert logged["losses/clip_fraction_0"] == [0.0]
    assert logged["losses/ratio_0"][0] == pytest.approx(1, abs=1e-5)


def test_gcpo_with_chunks_of_one_step_trains_what_grpo_trains(tmp_path):
    flags = ["--iterations", "1", "--updates", "1"]
    a = load_file(run("grpo", tmp_path / "grpo", *flags) / "pytorch_lora_weights.safetensors")
    b = load_file(run("gcpo", tmp_path / "gcpo", "--chunk-size", "1", *flags) / "pytorch_lora_weights.safetensors")
    c = load_file(run("gcpo", tmp_path / "unequal", "--chunks", "1", "3", *flags) / "pytorch_lora_weights.safetensors")
    assert max((a[n] - b[n]).abs().max() for n in a) < 1e-5 < max((a[n] - c[n]).abs().max() for n in a)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_logged_objective_is_the_losss_and_every_update_has_its_own(script, tmp_path):
    """On-policy the advantages of whole groups add up to 0, and with them the objective; the second update has moved on."""
    chunks = ["--steps", "6"] if script == "gcpo" else []  # not all have as many, nor weigh the same
    logged = scalars(run(script, tmp_path / "one", "--iterations", "1", "--updates", "1", *chunks))
    assert logged["losses/policy_0"][0] == pytest.approx(0, abs=1e-6) and "losses/policy_1" not in logged
    logged = scalars(run(script, tmp_path / "two", "--iterations", "1", *chunks))
    assert logged["losses/clip_fraction_0"] == [0] and logged["losses/ratio_0"][0] == pytest.approx(1, abs=1e-6)
    assert logged["losses/clip_fraction_1"][0] > 0 and logged["losses/ratio_1"][0] != logged["losses/ratio_0"][0]


def test_kl_is_zero_at_the_reference_and_positive_away_from_it(finished, tmp_path):
    script, _ = finished
    logged = scalars(run(script, tmp_path / "run", "--iterations", "2", "--updates", "1", "--beta", "0.1"))
    assert logged["losses/kl_0"][0] == 0 and logged["losses/kl_0"][1] > 0


def test_the_saved_optimizer_has_made_every_update_at_the_annealed_rate(finished):
    _, folder = finished
    optimizer = torch.load(folder / "state.pt", weights_only=True)["optimizer"]
    assert {state["step"].item() for state in optimizer["state"].values()} == {4}  # two iterations of two updates
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(1e-3)  # half of 2e-3 in the second of two
    names = {n.split(".attn.")[1].rsplit(".lora", 1)[0] for n in load_file(folder / "pytorch_lora_weights.safetensors")}
    assert names == set("to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split())


def interrupt(monkeypatch, presses=1):
    """Presses Ctrl-C while the first iteration's images are judged."""
    honest, left = rewards.REWARDS["shapes"], [presses]

    def score(images, prompts):
        while left[0] > 0:
            left[0] -= 1
            signal.raise_signal(signal.SIGINT)
        return honest.score(images, prompts)

    monkeypatch.setitem(rewards.REWARDS, "shapes", rewards.Reward(score, "shapes", honest.verdict))


def test_the_same_seed_gives_the_same_bytes_and_a_resumed_run_too(finished, tmp_path, monkeypatch):
    script, folder = finished
    first = (folder / "pytorch_lora_weights.safetensors").read_bytes()
    half = tmp_path / "half"
    interrupt(monkeypatch)
    with pytest.raises(SystemExit, match="stopped after iteration 1; continue with --resume"):
        run(script, half, "--iterations", "2")
    assert (half / "pytorch_lora_weights.safetensors").read_bytes() != first
    run(script, half, "--resume", str(half), small=False)
    assert (half / "pytorch_lora_weights.safetensors").read_bytes() == first
    other = run(script, tmp_path / "other", "--iterations", "2", "--seed", "1")
    assert (other / "pytorch_lora_weights.safetensors").read_bytes() != first


def test_a_second_ctrl_c_is_pythons_own(tmp_path, monkeypatch):
    interrupt(monkeypatch, presses=2)
    with pytest.raises(KeyboardInterrupt):
        run("grpo", tmp_path / "run", "--iterations", "1")


def test_more_iterations_go_on_from_the_rate_that_the_run_had(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    interrupt(monkeypatch)
    with pytest.raises(SystemExit, match="stopped after iteration 1"):
        run("grpo", folder, "--iterations", "4", "--lr", "4e-3")
    run("grpo", folder, "--resume", str(folder), "--iterations", "3", small=False)
    assert scalars(folder)["charts/learning_rate"] == pytest.approx([4e-3, 3e-3, 1.5e-3])
    with pytest.raises(SystemExit) as stop:
        run("grpo", folder, "--resume", str(folder), "--iterations", "5", small=False)
    assert stop.value.code == 2 and "say with --lr from which rate" in capsys.readouterr().err
    run("grpo", folder, "--resume", str(folder), "--iterations", "5", "--lr", "1e-3", small=False)
    assert scalars(folder)["charts/learning_rate"][3:] == pytest.approx([1e-3, 5e-4])


@needs_compiler
def test_compiled_blocks_keep_the_ratio_and_a_resumed_runs_bytes(tmp_path, monkeypatch):
    """In bfloat16, where a graph without gradients rounds otherwise, with guidance, which amplifies that, whole chunks, and blocks
    that are run again in the backward pass: no ratio of the first update leaves 1 by 1e-5."""
    monkeypatch.setattr(bookkeeping, "WORTH_COMPILING", {"cpu": 0})
    flags = "--iterations 2 --compile --dtype bfloat16 --clip 1e-5 --beta 0.01 --micro-batch 7 --guidance 4.5".split()
    flags += ["--gradient-checkpointing", "--chunks", "1", "3", "--save-every", "1"]
    half, stop_if_asked = tmp_path / "half", bookkeeping.Run.stop_if_asked

    def left_behind(self, done):
        if done == 1:
            shutil.copytree(self.folder, half)
        stop_if_asked(self, done)

    with monkeypatch.context() as patch:
        patch.setattr(bookkeeping.Run, "stop_if_asked", left_behind)
        whole = run("gcpo", tmp_path / "whole", *flags)
    logged = scalars(whole)
    assert logged["losses/clip_fraction_0"] == [0, 0] and logged["losses/clip_fraction_1"][0] > 0
    monkeypatch.setattr(bookkeeping, "WORTH_COMPILING", {"cpu": math.inf})  # decided when the run started
    run("gcpo", half, "--resume", str(half), small=False)
    assert json.loads((half / "args.json").read_text())["compiled_blocks"] is True
    a, b = ((folder / "pytorch_lora_weights.safetensors").read_bytes() for folder in (whole, half))
    assert a == b


def test_blocks_are_compiled_where_the_plan_repays_it(tmp_path, monkeypatch):
    compiled, plan = [], bookkeeping.Run.compile_blocks
    monkeypatch.setattr(families, "compile_blocks", compiled.append)
    pipe = families.load_pipeline(grpo.Args(device="cpu", dtype="float32"))
    for flags, expected in (({}, True), ({"iterations": 40}, False), ({"compile": False}, False)):
        alone = object.__new__(bookkeeping.Run)
        alone.args, alone.pipe, alone.rank, alone.world = grpo.Args(device="cpu", **flags), pipe, 0, 1
        assert plan(alone) is expected and bool(compiled) is expected
        compiled.clear()


@pytest.mark.skipif(sys.platform != "linux", reason="threads are bound on Linux alone")
def test_threads_are_bound_one_to_a_processor_and_freed_again():
    processors, stop = os.sched_getaffinity(0), threading.Event()
    helpers = [threading.Thread(target=stop.wait) for _ in processors][1:]
    for helper in helpers:
        helper.start()
    threads = [0, *(helper.native_id for helper in helpers)]
    with machine.bound(threads):
        assert [os.sched_getaffinity(thread) for thread in threads] == [{p} for p in sorted(processors)]
    assert os.sched_getaffinity(0) == processors
    with machine.bound([0] * (len(processors) + 1)):
        assert os.sched_getaffinity(0) == processors
    stop.set()


@needs_compiler
def test_compiled_and_eager_agree(tmp_path):
    a, b = (scalars(run("grpo", tmp_path / flag, "--iterations", "1", flag)) for flag in ("--compile", "--no-compile"))
    assert a["charts/reward"] == b["charts/reward"]
    assert a["losses/grad_norm_0"][0] == pytest.approx(b["losses/grad_norm_0"][0], rel=1e-3)


def test_the_pipeline_that_ships_draws_in_stock_diffusers():
    pipe = StableDiffusion3Pipeline.from_pretrained(miniature.FOLDER)
    assert pipe("two red circles", num_inference_steps=8).images[0].size == (64, 64)
    assert sum(f.stat().st_size for f in (miniature.FOLDER).rglob("*")) < 12e6


def test_pretraining_makes_a_pipeline_and_resumes(tmp_path, monkeypatch):
    render = pretrain.render_scenes
    monkeypatch.setattr(pretrain, "render_scenes", lambda n, seed: render(100, seed))
    evaluate = pretrain.evaluate
    monkeypatch.setattr(pretrain, "evaluate", lambda pipe, steps: evaluate(pipe, 2))
    small = dict(vae_steps=2, vae_batch=2, steps=2, batch=8, scenes=3000, loosen_steps=1, eval_every=2)
    pretrain.main(pretrain.Args(output_dir=tmp_path / "mini", **small))
    pretrain.main(pretrain.Args(output_dir=tmp_path / "mini", **{**small, "steps": 3, "loosen_steps": 2}))
    assert torch.load(tmp_path / "mini-training" / "flow.pt", weights_only=True)["step"] >= 4
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "mini")
    assert pipe("a circle", num_inference_steps=2).images[0].size == (64, 64)
    assert (pipe.encode_prompt(["a"], None, None, do_classifier_free_guidance=False)[0][:, 10:] == 0).all()


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("grpo", "--model huge", "neither tiny"),
        ("grpo", "--model tests", "model_index.json"),
        ("grpo", "--reward beauty", "choose of shapes"),
        ("grpo", "--reward shapes=0.5,beauty=0.5", "choose of shapes"),
        ("grpo", "--reward shapes=much", "must be a number"),
        ("grpo", "--reward ocr", "no text in double quotes"),
        ("grpo", "--reward geneval", "GenEval's templates"),
        ("grpo", "--prompt-file nowhere.txt", "cannot be read: No such file"),
        ("grpo", "--prompt-file tests", "cannot be read: Is a directory"),
        ("grpo", "--prompt-file /dev/null", "holds no prompt"),
        ("grpo", "--prompt-file docs/before_after.png", "not UTF-8"),
        ("grpo", "--prompt-file LICENSE", "not a caption of the shapes world"),
        ("grpo", "--prompt-file LICENSE --reward ocr", "no text in double quotes"),
        ("grpo", "--resolution 100", "multiple of 16"),
        ("grpo", "--resolution 128", "up to 64"),
        ("grpo", "--resolution 32", "judges 64 x 64 images"),
        ("grpo", "--sde euler", "flow"),
        ("grpo", "--dtype int8", "bfloat16"),
        ("grpo", "--device tpu9", "not available"),
        ("grpo", "--device mps", "not available"),
        ("grpo", "--group-size 1", "at least 2"),
        ("grpo", "--seed -1", "from 0 up"),
        ("grpo", "--seed 9223372036854775808", "below 2**63"),
        ("grpo", "--resume tests --output-dir elsewhere", "leave --output-dir away"),
        ("grpo", "--resolution -16", "from 0 up"),
        ("grpo", "--text-length 0", "at least 1"),
        ("grpo", "--resume=nowhere", "not the folder of a run"),
        ("grpo", "--steps 1 --ode-steps 1", "less than --steps 1"),
        ("grpo", "--iterations 0", "at least 1"),
        ("grpo", "--prompts 0", "at least 1"),
        ("grpo", "--updates 0", "at least 1"),
        ("grpo", "--updates 100000", "more than the 256 images"),
        ("grpo", "--micro-batch 0", "at least 1"),
        ("grpo", "--lr 0", "positive"),
        ("grpo", "--lr nan", "positive"),
        ("grpo", "--clip -1", "positive"),
        ("grpo", "--beta -1", "from 0 up"),
        ("grpo", "--eta 0", "above 0"),
        ("grpo", "--sde cps --eta 1.5", "at most 1"),
        ("grpo", "--step-weights late", "guard"),
        ("grpo", "--output-dir tests", "already holds files"),
        ("grpo", "--output-dir /dev/null/run", "cannot be written"),
        ("grpo", "--resume nowhere", "not the folder of a run"),
        ("grpo", "--colour red", "colour"),
        ("gcpo", "--chunk-size 0", "at least 1"),
        ("gcpo", "--chunk-size 6", "S = 4"),
        ("gcpo", "--chunks 2 1", "S = 4"),
        ("gcpo", "--chunks 5 -1", "S = 4"),
        ("gcpo", "--chunk-size 2 --chunks 3 2", "exclude each other"),
        ("gcpo", "--chunk-fraction 0", "at most 1"),
        ("gcpo", "--max-chunk 0", "at least 1"),
        ("gcpo", "--chunk-fraction 1.1", "at most 1"),
        ("gcpo", "--weighted", "give --chunk-fraction below 1"),
        ("gcpo", "--chunk-size 3 --micro-batch 2", "up to 3"),
        ("gcpo", "--micro-batch 1", "up to 2"),
        ("gcpo", "--distance l3", "cosine"),
        ("stepwise_grpo", "--substeps 0", "at least 1"),
        ("stepwise_grpo", "--normalize all", "joint"),
    ],
)
def test_bad_input_is_answered_in_a_sentence(script, flags, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_start_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(SystemExit):
        run("grpo", tmp_path / "run", "--resolution", "100")
    assert not (tmp_path / "run").exists()


def test_a_longer_run_that_breaks_off_leaves_no_result_of_the_shorter(finished, tmp_path, monkeypatch):
    script, folder = finished
    longer = shutil.copytree(folder, tmp_path / "longer")
    broken = rewards.Reward(lambda images, prompts: torch.full((len(prompts),), torch.nan), "shapes", rewards.shapes_verdict)
    monkeypatch.setitem(rewards.REWARDS, "shapes", broken)
    with pytest.raises(SystemExit, match="not finite"):
        run(script, longer, "--resume", str(longer), "--iterations", "3", "--lr", "1e-3", small=False)
    assert (folder / "result.json").exists() and not (longer / "result.json").exists()


def test_a_run_of_another_script_a_finished_or_a_damaged_one_is_not_resumed(finished, tmp_path, capsys):
    script, folder = finished
    other = SCRIPTS[SCRIPTS.index(script) - 1]
    with pytest.raises(SystemExit) as stop:
        run(other, folder, "--resume", str(folder), small=False)
    assert stop.value.code == 2 and f"was written by {script}.py" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run(script, folder, "--resume", str(folder), small=False)
    assert stop.value.code == 2 and "already has its 2 iterations" in capsys.readouterr().err
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:1000])
    with pytest.raises(SystemExit) as stop:
        run(script, damaged, "--resume", str(damaged), "--iterations", "3", small=False)
    assert stop.value.code == 2 and "cannot be resumed from" in capsys.readouterr().err


def test_a_reward_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    broken = rewards.Reward(lambda images, prompts: torch.full((len(prompts),), torch.nan), "shapes", rewards.shapes_verdict)
    monkeypatch.setitem(rewards.REWARDS, "broken", broken)
    for script in SCRIPTS:
        with pytest.raises(SystemExit, match="reward broken is not finite"):
            run(script, tmp_path / script, "--reward", "shapes=0.5,broken=0.5")


def test_ctrl_c_saves_and_leaves(tmp_path):
    command = [sys.executable, "-u", "grpo.py", *SMALL, "--iterations", "1000", "--output-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "base model" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "continue with --resume" in errors and "Traceback" not in errors
    done = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["iteration"]
    assert done >= 1
    with pytest.raises(SystemExit) as stop:  # that many iterations are done but were never evaluated
        run("grpo", tmp_path / "run", "--resume", str(tmp_path / "run"), "--iterations", str(done), small=False)
    assert stop.value.code == 2


def test_pickled_weights_are_refused(tmp_path, capsys):
    folder = shutil.copytree(miniature.FOLDER, tmp_path / "pickled")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(SystemExit) as stop:
        run("grpo", tmp_path / "run", "--model", str(folder))
    assert stop.value.code == 2 and "safetensors" in capsys.readouterr().err


def test_a_copy_of_the_miniature_is_one_whatever_its_name(tmp_path):
    folder = shutil.copytree(miniature.FOLDER, tmp_path / "copy")
    args = arguments.parse_args(grpo.Args, None, ["--model", str(folder), "--reward", "jpeg-compressibility"])
    assert (args.resolution, args.steps) == (0, 6) and rewards.prompt_set(args) == rewards.PROMPT_SETS["shapes"]


def test_from_the_command_line_there_is_no_traceback():
    done = subprocess.run([sys.executable, "gcpo.py", "--group-size", "1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == "error: --group-size 1 leaves nothing to compare within a group; it must be at least 2"
