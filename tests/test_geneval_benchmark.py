"""GenEval's benchmark: its prompts are the published ones, none is trained on, and its score is the published arithmetic."""

import hashlib
import json
import runpy
import sys

import numpy as np
import pytest
import torch
from test_runs import ROOT

import evaluate
import rewards
import sampler
from judges import geneval, geneval_benchmark
from judges.geneval_benchmark import MEANINGS, PROMPTS, REQUESTS, holds, meaning
from miniature import shapes


def test_the_sentences_are_the_published_ones():
    """The hash is of `tag: prompt` of each line of the published evaluation_metadata.jsonl, joined by newlines."""
    lines = [f"{task}: {prompt}" for task, prompts in PROMPTS.items() for prompt in prompts]
    assert len(lines) == len(set(lines)) == 553
    assert [len(prompts) for prompts in PROMPTS.values()] == [80, 99, 80, 94, 100, 100]
    assert (
        hashlib.sha256("\n".join(lines).encode()).hexdigest() == "4cbc0c6cd06d04b990637153688d1f017ffc6249bea828a45b40ab94b7f58488"
    )
    for line in (
        "single_object: a photo of an umbrella",
        "two_object: a photo of a bench and a sports ball",
        "counting: a photo of three buses",
        "counting: a photo of four knifes",
        "counting: a photo of three benchs",
        "colors: a photo of an orange scissors",
        "position: a photo of a wine glass above a kite",
        "color_attr: a photo of a white dog and a blue potted plant",
    ):
        assert line in lines


def test_the_judge_reads_in_each_sentence_what_was_requested():
    for task, requests in REQUESTS.items():
        assert [geneval.parse(prompt) for prompt in PROMPTS[task]] == requests


def test_no_training_prompt_asks_for_what_the_benchmark_asks_for():
    train, held_out = rewards.PROMPT_SETS["geneval"]
    everything = rewards.by_category(geneval.template_prompts())
    assert not any(holds(prompt) for prompts in train.values() for prompt in prompts)
    assert held_out == everything[1] and set(held_out) - set(train) == {"single object"}
    left, before = sum(map(len, train.values())), sum(map(len, everything[0].values()))
    assert (before, left) == (1330, 1182)
    assert sum(holds(prompt) for prompts in everything[0].values() for prompt in prompts) == 148


def test_the_order_of_the_objects_is_no_difference():
    asks = lambda scene: meaning(geneval.parse(f"a photo of {scene}"))
    assert asks("a dog and a cat") == asks("a cat and a dog") != asks("a dog and a cow")
    assert asks("a dog left of a cat") == asks("a cat right of a dog") != asks("a cat left of a dog")
    assert asks("a red dog and a blue cat") == asks("a blue cat and a red dog") != asks("a blue dog and a red cat")
    assert asks("two knives") == asks("two knifes") != asks("three knives")
    assert len(MEANINGS) == 552  # 553, less "a laptop left of a cow", which is "a cow right of a laptop"


def test_the_score_is_the_mean_of_the_tasks_means_and_its_error_that_of_prompts(full_sd3, tmp_path, monkeypatch, capsys):
    """Only two tasks have prompts of unequal scores: 4 of 16 always succeed; of two, one does in all four images and one in two."""
    planted = dict(single_object=[[1, 1, 1, 1]] * 4 + [[0, 0, 0, 0]] * 12, two_object=[[1, 1, 1, 1]])
    planted |= dict(
        counting=[[1, 1, 1, 1], [1, 0, 0, 1]], colors=[[0, 0, 0, 0]], position=[[1, 0, 0, 0]], color_attr=[[1, 1, 0, 1]]
    )
    prompts = {task: PROMPTS[task][: len(hits)] for task, hits in planted.items()}
    requests = [request for task, hits in planted.items() for request in REQUESTS[task][: len(hits)] for _ in range(4)]
    hits, sample_ode, calls = np.concatenate([*planted.values()]).ravel(), sampler.sample_ode, []

    def detect(image, threshold):
        request, hit = requests[len(seen)], hits[len(seen)]
        seen.append(threshold)
        x, y = shapes.RELATIONS.get(request[-1].relation, (0, 0))
        found = {r.name: [geneval.Box(32 + 20 * i * x, 32 + 20 * i * y, 8, 8)] * r.count for i, r in enumerate(request)}
        return found if hit else {}

    def name_colours(image, boxes, name):
        return [r.colour for r in requests[len(seen) - 1] if r.name == name]

    def record(pipe, part, noise, *args):
        calls.append((part, noise))
        return sample_ode(pipe, part, noise, *args)

    monkeypatch.setattr(geneval_benchmark, "PROMPTS", prompts)
    monkeypatch.setattr(geneval, "load_detector", lambda: None)
    monkeypatch.setattr(geneval.clip, "load", lambda name: None)
    monkeypatch.setattr(geneval, "detect", detect)
    monkeypatch.setattr(geneval, "name_colours", name_colours)
    monkeypatch.setattr(sampler, "sample_ode", record)
    for micro_batch in ("8", "64"):
        seen = []
        flags = f"--model {full_sd3} --benchmark geneval --steps 2 --guidance 1 --resolution 64 --text-length 8 --dtype float32"
        flags += f" --device cpu --micro-batch {micro_batch} --output-dir {tmp_path}"
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags.split()])
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    result, out = json.loads((tmp_path / "geneval.json").read_text()), capsys.readouterr().out
    assert seen == [0.3] * 68 + [0.9] * 8 + [0.3] * 12
    assert list(result["categories"].values()) == [0.25, 1, 0.75, 0, 0.25, 0.75] and result["score"] == 0.5
    error = (0.25 * 0.75 / 16 + 0.25**2 / 2) ** 0.5 / 6
    assert result["error_over_captions"] == pytest.approx(error, rel=0.05)
    assert (result["images"], result["captions"], result["reward"]) == (88, 22, "geneval")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert rows["overall"][0] == "0.500" and rows["overall"][3:] == ["0.63", "0.95", "0.66", "0.67", "0.69", "0.67"]
    assert rows["counting"] == ["0.750", "0.50", "0.95"] and "46.3" in out and "22 prompts, 88 images" in out
    assert (tmp_path / "geneval.png").exists()
    # In parts of 16 prompts; every image has noise of its own, which is the same in each evaluation.
    (first, noise), (second, rest), *again = calls
    assert [*first, *second] == [prompt for task in prompts.values() for prompt in task for _ in range(4)] and len(first) == 64
    noise = torch.cat([noise, rest])
    assert torch.equal(noise, torch.cat([n for _, n in again])) and len(noise.flatten(1).unique(dim=0)) == 88


def test_the_benchmark_replaces_what_the_run_was_trained_for(full_sd3, tmp_path, monkeypatch):
    saved = dict(model=str(full_sd3), reward="pickscore", prompt_file="gone.txt", eval_images=64, eval_steps=3, resolution=64)
    (tmp_path / "args.json").write_text(json.dumps(saved))
    monkeypatch.setattr(sys, "argv", f"evaluate.py --lora {tmp_path} --benchmark geneval --reward geneval".split())
    args = evaluate.parse_args()
    assert (args.reward, args.prompt_file, args.eval_images, args.steps, args.resolution) == ("geneval", "", 2212, 3, 64)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "the miniature has no words for"),
        ("--model sd3 --reward pickscore", "leave --reward away"),
        ("--model sd3 --reward shapes", "leave --reward away"),
        ("--model sd3 --prompt_file=mine.txt", "leave --prompt-file away"),
        ("--model sd3 --eval-images 8", "leave --eval-images away"),
    ],
)
def test_the_benchmark_refuses_what_would_not_be_it(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--benchmark", "geneval", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        evaluate.parse_args()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
