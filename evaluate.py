"""Scores a model, or the LoRA of a run, on held-out prompts: ODE-sampled, always from the same noise.

    python evaluate.py                                     # the miniature without LoRA
    python evaluate.py --lora runs/gcpo__... --steps 28
    python evaluate.py --lora runs/gcpo__... --hybrid 0.6  # the LoRA for the first 60 % of the steps, then the base model
    python evaluate.py --lora runs/gcpo__... --variety clip
    python evaluate.py --lora runs/gcpo__... --benchmark geneval

Of the miniature it also tells the variety (`miniature.shapes.variety`): 1 where the model draws everything that a caption allows
equally often, 0 where each caption has a single picture. A high score may hide the latter. For every other model --variety clip
measures how far apart the images of one caption are: the mean over pairs of 1 - cosine of their CLIP embeddings, with the LoRA and,
from the same noise, without it.

The third is how GCPO (arXiv 2510.21583) evaluates: its LoRA makes 30 of 50 steps, which shape the image, and the base model the
rest, which fill in what the reward has no say in. Writes evaluation.json and evaluation.png to --output-dir.

The last scores GenEval as published, whatever the LoRA was trained for: 553 prompts, four images each, the share of correct images
of each task, and the mean over the six tasks; its standard error is by bootstrap over each task's prompts. Writes geneval.json and
geneval.png.
"""

import math
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import arguments
import bookkeeping
import machine
import miniature
import rewards
import sampler
from judges import clip, geneval, geneval_benchmark
from miniature import shapes


@dataclass
class Args(arguments.Examined):
    benchmark: Literal["geneval"] | None = None
    """score the published prompts of a benchmark instead of held-out prompts"""
    variety: Literal["clip"] | None = None
    """also measure how far apart the images of one caption are, with the LoRA and without it"""
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
        machine.fail("--steps, --eval-images, --micro-batch, --rank and --text-length must be at least 1")
    if machine.rank_world()[1] > 1:
        machine.fail("evaluate.py runs in one process; start it without torchrun")
    if not 0 <= args.hybrid <= 1:
        machine.fail(f"--hybrid {args.hybrid} must be from 0 to 1")
    if args.benchmark:
        set_benchmark(args)
    arguments.check_model_and_reward(args)
    if args.variety:
        check_variety(args)
    args.output_dir = args.output_dir or args.lora or "runs/evaluation"
    return args


def set_benchmark(args):
    """Gives args what the benchmark prescribes, in the place of the run's own; a flag that says otherwise ends the program."""
    if miniature.is_miniature(args.model):
        machine.fail(
            "--benchmark geneval asks for what the miniature has no words for; give --model sd3 or the LoRA of another model"
        )
    flags = [word.split("=")[0].replace("_", "-") for word in sys.argv[1:]]
    for name, value in dict(reward="geneval", prompt_file="", eval_images=geneval_benchmark.IMAGES * 553).items():
        flag = f"--{name.replace('_', '-')}"
        if flag in flags and getattr(args, name) != value:
            machine.fail(f"--benchmark geneval brings its own prompts, number of images and judge; leave {flag} away")
        setattr(args, name, value)


def check_variety(args):
    """Ends the program where --variety has no two images of a caption to compare."""
    if args.benchmark:
        machine.fail("--variety clip compares images of held-out prompts; leave it or --benchmark away")
    held_out = rewards.prompt_set(args)[1]
    if min(Counter(rewards.held_out_prompts(held_out, args.eval_images)[0]).values()) < 2:
        enough = 2 * len(held_out) * max(map(len, held_out.values()))
        machine.fail(f"--variety clip compares images of one caption; --eval-images must be at least {enough}, two per caption")


def benchmark(pipe, args, steps, tuned_steps):
    """As bookkeeping.evaluate, for GenEval's prompts; the categories are its tasks, the images the first of each prompt, small."""
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
    scores, images = torch.cat(scores).double().numpy(), torch.cat(images)
    return SimpleNamespace(scores=scores, prompts=prompts, categories=tasks, images=images, variety=None)


def standard_errors(scores, prompts, categories, repeats=2000):
    """Standard errors of the mean of scores (N,): over images, the captions being what they are, and over captions.

    The first is nan if a caption has one image, which does not say how images of the caption differ. The second is a bootstrap
    that draws captions anew within their category; a category of one caption adds nothing to it.
    """
    rng, by_caption = np.random.default_rng(0), defaultdict(lambda: defaultdict(list))
    for score, prompt, category in zip(scores, prompts, categories):
        by_caption[category][prompt].append(score)
    variance = sum(len(s) * np.var(s) if len(s) > 1 else math.nan for captions in by_caption.values() for s in captions.values())
    means = [[np.mean(s) for s in captions.values()] for captions in by_caption.values()]
    drawn = [np.mean([rng.choice(m, len(m)).mean() for m in means]) for _ in range(repeats)]
    return math.sqrt(variance) / len(scores), float(np.std(drawn))


def clip_distances(pipe, args, evaluation):
    """{"lora", "base" and their "difference": {distance, error}}: `clip.distances` averaged as scores are, error over captions."""
    images = {"lora" if args.lora else "base": evaluation.images}
    if args.lora:
        images["base"] = bookkeeping.evaluate(pipe, args, args.steps, range(0)).images
    category_of = dict(zip(evaluation.prompts, evaluation.categories))
    captions, categories = list(category_of), list(category_of.values())
    distances = {name: np.array(list(clip.distances(x, evaluation.prompts).values())) for name, x in images.items()}
    if args.lora:
        distances["difference"] = distances["lora"] - distances["base"]
    result = {}
    for name, values in distances.items():
        mean = np.mean(list(bookkeeping.category_means(values, categories).values()))
        result[name] = dict(distance=float(mean), error=standard_errors(values, captions, categories)[1])
    return result


if __name__ == "__main__":
    args = parse_args()
    args.gradient_checkpointing = False
    machine.resolve_device(args)
    folder = Path(args.output_dir)
    bookkeeping.require_writable(folder)
    if args.variety:
        try:
            rewards.load("clip")
        except ValueError as error:
            machine.fail(str(error).replace("--reward", "--variety"))
    pipe = bookkeeping.load(args)
    folder.mkdir(parents=True, exist_ok=True)
    tuned_steps = range(round(args.hybrid * args.steps))
    evaluate, name = (benchmark, args.benchmark) if args.benchmark else (bookkeeping.evaluate, "evaluation")
    evaluation = evaluate(pipe, args, args.steps, tuned_steps)
    scores, prompts, categories = evaluation.scores, evaluation.prompts, evaluation.categories
    by_category = bookkeeping.category_means(scores, categories)
    over_images, over_captions = standard_errors(scores, prompts, categories)
    known = lambda value: None if math.isnan(value) else value  # JSON has no nan
    result = dict(model=args.model, lora=args.lora, reward=args.reward, steps=args.steps, tuned_steps=len(tuned_steps))
    result |= dict(guidance=args.guidance, images=len(prompts), captions=len(set(prompts)), score=float(scores.mean()))
    result |= dict(error_over_images=known(over_images), error_over_captions=over_captions, categories=by_category)
    if args.benchmark:  # its tasks have unequal numbers of prompts and the same weight
        del result["error_over_images"]
        result |= dict(score=float(np.mean(list(by_category.values()))), published=geneval_benchmark.PUBLISHED)
        print(geneval_benchmark.table(result["score"], over_captions, by_category))
        print(f"standard error by bootstrap over {len(set(prompts))} prompts, {len(prompts)} images")
    else:
        for category, value in {**by_category, "all": result["score"]}.items():
            print(f"{category:20} {value:7.3f}")
        captions = f"standard error {over_captions:.3f} over {len(set(prompts))} captions"
        if math.isnan(over_images):
            print(f"{captions}; over images it is not known, as a caption with one image does not tell how its images differ")
        else:
            print(f"{captions}, {over_images:.3f} over {len(prompts)} images")
    if evaluation.variety is not None:
        error = shapes.variety_error(evaluation.looks, prompts, scores)
        result |= dict(variety=evaluation.variety, variety_error=known(error))
        print(f"{'variety':20} {evaluation.variety:7.3f}")
        unknown = "its standard error is not known: variety takes two right images of a caption, the error three images of each"
        print(unknown if math.isnan(error) else f"standard error {error:.3f} over noises")
    if args.variety:
        result["clip_distances"] = clip_distances(pipe, args, evaluation)
        print(f"mean distance of the CLIP embeddings of a caption's images, standard error over {len(set(prompts))} captions")
        for which, row in result["clip_distances"].items():
            print(f"{which:20} {row['distance']:7.3f} ± {row['error']:.3f}")
    bookkeeping.write_json(folder / f"{name}.json", result)
    images = evaluation.images
    bookkeeping.save_grid(images, prompts[:: len(prompts) // len(images)], folder / f"{name}.png")
    print(f"{len(tuned_steps)} of {args.steps} steps with the LoRA; written to {folder}/{name}.json and {name}.png")
