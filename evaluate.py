"""Scores a model, or the LoRA of a run, on held-out prompts: ODE-sampled, always from the same noise.

    python evaluate.py                                     # the miniature without LoRA
    python evaluate.py --lora runs/gcpo__... --steps 28
    python evaluate.py --lora runs/gcpo__... --hybrid 0.6  # the LoRA for the first 60 % of the steps, then the base model
    python evaluate.py --lora runs/gcpo__... --benchmark geneval

The third is how GCPO (arXiv 2510.21583) evaluates: its LoRA makes 30 of 50 steps, which shape the image, and the base model the
rest, which fill in what the reward has no say in. Writes evaluation.json and evaluation.png to --output-dir.

The last scores GenEval as published, whatever the LoRA was trained for: 553 prompts, four images each, the share of correct images
of each task, and the mean over the six tasks; its standard error is by bootstrap over each task's prompts. Writes geneval.json and
geneval.png.
"""

import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import arguments
import bookkeeping
import miniature
import sampler
from judges import geneval, geneval_benchmark


@dataclass
class Args(arguments.Examined):
    benchmark: Literal["geneval"] | None = None
    """score the published prompts of a benchmark instead of held-out prompts"""
    steps: int = 6
    """denoising steps, deterministic"""
    hybrid: float = 1.0
    """share of the steps, from the first, in which the LoRA takes part"""
    eval_images: int = 864
    """images, the same number for every category"""
    output_dir: str = ""
    """folder of the results; empty: the run's folder, or runs/evaluation"""


def parse_args():
    args = arguments.parse_examined(Args, __doc__, steps="eval_steps")
    if min(args.steps, args.eval_images, args.micro_batch, args.rank, args.text_length) < 1:
        arguments.fail("--steps, --eval-images, --micro-batch, --rank and --text-length must be at least 1")
    if arguments.rank_world()[1] > 1:
        arguments.fail("evaluate.py runs in one process; start it without torchrun")
    if not 0 <= args.hybrid <= 1:
        arguments.fail(f"--hybrid {args.hybrid} must be from 0 to 1")
    if args.benchmark:
        set_benchmark(args)
    arguments.check_model_and_reward(args)
    args.output_dir = args.output_dir or args.lora or "runs/evaluation"
    return args


def set_benchmark(args):
    """Gives args what the benchmark prescribes, in the place of the run's own; a flag that says otherwise ends the program."""
    if miniature.is_miniature(args.model):
        arguments.fail(
            "--benchmark geneval asks for what the miniature has no words for; give --model sd3 or the LoRA of another model"
        )
    flags = [word.split("=")[0].replace("_", "-") for word in sys.argv[1:]]
    for name, value in dict(reward="geneval", prompt_file="", eval_images=geneval_benchmark.IMAGES * 553).items():
        flag = f"--{name.replace('_', '-')}"
        if flag in flags and getattr(args, name) != value:
            arguments.fail(f"--benchmark geneval brings its own prompts, number of images and judge; leave {flag} away")
        setattr(args, name, value)


def benchmark(pipe, args, steps, tuned_steps):
    """As bookkeeping.evaluate, for GenEval's prompts: (scores (N,), prompts, tasks, the first image of each prompt, small)."""
    pairs = [(prompt, task) for task, prompts in geneval_benchmark.PROMPTS.items() for prompt in prompts]
    each, generator, scores, images = geneval_benchmark.IMAGES, torch.Generator().manual_seed(12345), [], []
    prompts, tasks = zip(*(pair for pair in pairs for _ in range(each)))
    for start in tqdm(range(0, len(prompts), 16 * each), desc="geneval"):  # all images of 512 x 512 would be 7 GB
        part = prompts[start : start + 16 * each]
        # drawn image by image, so that a prompt's noise does not depend on what else is in its part
        noise = torch.stack([torch.randn(sampler.latent_shape(pipe, args.resolution), generator=generator) for _ in part])
        made = sampler.sample_ode(pipe, part, noise, steps, args, tuned_steps)
        scores.append(geneval.verdict(made, part))
        images.append(torch.nn.functional.interpolate(made[::each], 128, mode="area"))
    return torch.cat(scores).double().numpy(), prompts, tasks, torch.cat(images)


def standard_errors(scores, prompts, categories, repeats=2000):
    """Standard errors of the mean of scores (N,): over images, the captions being what they are, and over captions.

    The second is a bootstrap that draws captions anew within their category; a category of one caption adds nothing to it.
    """
    rng, by_caption = np.random.default_rng(0), defaultdict(lambda: defaultdict(list))
    for score, prompt, category in zip(scores, prompts, categories):
        by_caption[category][prompt].append(score)
    variance = sum(len(s) * np.var(s) for captions in by_caption.values() for s in captions.values())
    means = [[np.mean(s) for s in captions.values()] for captions in by_caption.values()]
    drawn = [np.mean([rng.choice(m, len(m)).mean() for m in means]) for _ in range(repeats)]
    return math.sqrt(variance) / len(scores), float(np.std(drawn))


if __name__ == "__main__":
    args = parse_args()
    args.gradient_checkpointing = False
    arguments.resolve_device(args)
    folder = Path(args.output_dir)
    bookkeeping.require_writable(folder)
    pipe = bookkeeping.load(args)
    folder.mkdir(parents=True, exist_ok=True)
    tuned_steps = round(args.hybrid * args.steps)
    evaluate, name = (benchmark, args.benchmark) if args.benchmark else (bookkeeping.evaluate, "evaluation")
    scores, prompts, categories, images = evaluate(pipe, args, args.steps, tuned_steps)
    by_category = bookkeeping.category_means(scores, categories)
    over_images, over_captions = standard_errors(scores, prompts, categories)
    result = dict(model=args.model, lora=args.lora, reward=args.reward, steps=args.steps, tuned_steps=tuned_steps)
    result |= dict(guidance=args.guidance, images=len(prompts), captions=len(set(prompts)), score=float(scores.mean()))
    result |= dict(error_over_images=over_images, error_over_captions=over_captions, categories=by_category)
    if args.benchmark:  # its tasks have unequal numbers of prompts and the same weight
        del result["error_over_images"]
        result |= dict(score=float(np.mean(list(by_category.values()))), published=geneval_benchmark.PUBLISHED)
        print(geneval_benchmark.table(result["score"], over_captions, by_category))
        print(f"standard error by bootstrap over {len(set(prompts))} prompts, {len(prompts)} images")
    else:
        for category, value in {**by_category, "all": result["score"]}.items():
            print(f"{category:20} {value:7.3f}")
        print(f"standard error {over_images:.3f} over {len(prompts)} images, {over_captions:.3f} over {len(set(prompts))} captions")
    bookkeeping.write_json(folder / f"{name}.json", result)
    bookkeeping.save_grid(images, prompts[:: len(prompts) // len(images)], folder / f"{name}.png")
    print(f"{tuned_steps} of {args.steps} steps with the LoRA; written to {folder}/{name}.json and {name}.png")
