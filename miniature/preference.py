"""A judge that can be fooled: a small network that learns what a simulated annotator prefers, as real reward models do.

    python -m miniature.preference              # the judge of --reward preference, made again in runs/
    python -m miniature.preference --pairs 2400 --temperature 0.3 --steps 400 --output miniature/preference-mine.safetensors

The base model draws four images of each of many training captions. A simulated annotator compares every two of them and
prefers a to b with probability sigmoid((g_a - g_b) / temperature), g the exact graded reward of `shapes.judge`; two of the
same grade get no answer. The network's scores are fitted to the answers as ImageReward's (https://arxiv.org/abs/2304.05977).
"""

import itertools
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
import tyro
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm

from miniature import FOLDER, shapes

SETTINGS = ((4, 1.0), (6, 1.0), (8, 1.0), (4, 2.0))  # (steps, guidance) of a caption's four images
FIRST, SECOND = torch.tensor(list(itertools.combinations(range(len(SETTINGS)), 2))).T  # the images of its six pairs
VOCABULARY = ["", *sorted({word for caption in shapes.SPECS for word in caption.split()})]
LENGTH = max(len(caption.split()) for caption in shapes.SPECS)
EXAM = {"new images of training captions": shapes.TRAIN, "images of held-out captions": shapes.HELD_OUT}
EXAM_CAPTIONS, EXAM_SEED = 300, 2**40  # every judge has the same exam, of noise that no --seed gives


@dataclass
class Args:
    output: Path = field(default=Path("runs/preference.safetensors"), repr=False)
    """file of the judge; miniature/preference-NAME.safetensors is --reward preference-NAME from then on"""
    pairs: int = 18_000
    """pairs that the annotator is shown, six for each caption drawn; fewer make a worse judge"""
    temperature: float = 0.1
    """noise of the annotator; at 0.1 the better of two images 0.1 apart in grade is preferred 73 % of the time, at 0.3 58 %"""
    steps: int = 1500
    """optimizer steps, each on the pairs of 32 captions"""
    seed: int = 0
    """seed of captions, images, answers and weights"""


class Judge(nn.Module):
    """Scores (N,) of images (N, 3, 64, 64) in [0, 1] for N captions, whose words attend to 8 x 8 image features; ValueError for
    images of another size or a caption that is not of the shapes world."""

    def __init__(self, width=64):
        super().__init__()
        self.words = nn.Embedding(len(VOCABULARY), width)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.cells = nn.Parameter(0.02 * torch.randn(64, width))
        convolutions = nn.Conv2d(3, 32, 4, 4), nn.Conv2d(32, width, 3, 2, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.image = nn.Sequential(*(layer for convolution in convolutions for layer in (convolution, nn.GELU())))
        block = nn.TransformerDecoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerDecoder(block, 3, nn.LayerNorm(width))
        self.score = nn.Linear(width, 1)

    def forward(self, images, captions):
        if tuple(images.shape[1:]) != (3, shapes.SIZE, shapes.SIZE):
            raise ValueError(f"this judge looks at images of 3 x 64 x 64, not {' x '.join(map(str, images.shape[1:]))}")
        if unknown := [caption for caption in captions if caption not in shapes.SPECS]:
            raise ValueError(f"'{unknown[0]}' is not a caption of the shapes world, and this judge knows no other")
        indices = [[VOCABULARY.index(word) for word in (c.split() + LENGTH * [""])[:LENGTH]] for c in captions]
        words = self.words(torch.tensor(indices)) + self.places  # (N, LENGTH, width)
        cells = self.image(2 * images - 1).flatten(2).mT + self.cells  # (N, 64, width)
        return self.score(self.blocks(words, cells).mean(1)).squeeze(1)


@cache
def load(path):
    """The Judge of a file."""
    judge = Judge().requires_grad_(False)
    judge.load_state_dict(load_file(path))
    return judge


def bradley_terry(preferred, other):
    """-log sigmoid(preferred - other) of scores (N,) and (N,), mean over pairs (ImageReward eq. 1)."""
    return nn.functional.softplus(other - preferred).mean()


def draw(pipe, prompts, number, seed):
    """`number` captions, the model's images (number, 4, 3, 64, 64) of them, as uint8, and their grades (number, 4)."""
    captions, images, grades = shapes.sample_captions(number, np.random.default_rng(seed), (prompts,)), [], []
    options = dict(max_sequence_length=1, generator=torch.Generator().manual_seed(seed), output_type="pt")
    for i in tqdm(range(0, number, 64), "drawing"):
        part = captions[i : i + 64]
        four = [pipe(part, num_inference_steps=steps, guidance_scale=scale, **options).images for steps, scale in SETTINGS]
        images.append((torch.stack(four, 1) * 255).round().to(torch.uint8))
        grades.append(torch.stack([torch.from_numpy(shapes.judge(x.numpy(), part)[1]) for x in four], 1))
    return captions, torch.cat(images), torch.cat(grades)


def train(captions, images, grades, args):
    """A Judge fitted to the annotator's answers about N captions' images, from what `draw` gives."""
    torch.manual_seed(args.seed)
    difference = grades[:, FIRST] - grades[:, SECOND]  # (N, 6)
    sign = (2 * torch.sigmoid(difference / args.temperature).bernoulli() - 1) * (difference != 0)  # 1: the first is preferred
    judge, useful = Judge(), sign.any(1).nonzero().flatten()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, (k + 1) / 75) * (1 - k / args.steps))
    batches = itertools.chain.from_iterable(useful[torch.randperm(len(useful))].split(32) for _ in itertools.count())
    for rows in tqdm(itertools.islice(batches, args.steps), "training", args.steps):
        scores = judge(images[rows].flatten(0, 1) / 255, [captions[i] for i in rows for _ in SETTINGS]).view(-1, len(SETTINGS))
        pairs = torch.stack([scores[:, FIRST], scores[:, SECOND]], -1)
        preferred, other = torch.where(sign[rows, :, None] > 0, pairs, pairs.flip(-1))[sign[rows] != 0].T
        optimizer.zero_grad()
        bradley_terry(preferred, other).backward()
        optimizer.step()
        schedule.step()
    judge.requires_grad_(False)
    judge.score.weight *= args.temperature  # from logits to grades, up to a constant
    return judge


def agreement(scores, grades, captions, temperature):
    """Over pairs of images (N, 4) that differ in grade: the chance that the annotator agrees with the scores, half its 95 %
    interval over captions, the same chance for the exact grades, and the share of pairs that both put in one order."""
    own, difference = (x[:, FIRST] - x[:, SECOND] for x in (scores, grades))
    pairs, right, ceiling = difference != 0, own * difference > 0, torch.sigmoid(difference.abs() / temperature)
    agrees = torch.where(right, ceiling, 1 - ceiling)
    share = agrees[pairs].mean()
    residuals = np.bincount(np.unique(captions, return_inverse=True)[1], ((agrees - share) * pairs).sum(1))  # of each caption
    half = 1.96 * np.linalg.norm(residuals) / pairs.sum()
    return [float(x) for x in (share, half, ceiling[pairs].mean(), right[pairs].float().mean())]


def main(args):
    import diffusers  # not above: who only asks a judge does not need it

    import bookkeeping  # not above: it imports rewards, which imports this file

    if args.pairs < 60 or args.steps < 1 or not 0 < args.temperature < math.inf or not 0 <= args.seed < EXAM_SEED:
        bookkeeping.fail("--pairs must be at least 60, --steps at least 1, --temperature above 0 and --seed from 0 to 2**40 - 1")
    if args.output.is_dir():
        bookkeeping.fail(f"--output {args.output} is a folder; it must name a file")
    bookkeeping.require_writable(args.output.parent)
    diffusers.utils.logging.set_verbosity_error()  # the silent T5 truncates every caption
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    judge = train(*draw(pipe, shapes.TRAIN, args.pairs // 6, args.seed), args)
    for number, (name, prompts) in enumerate(EXAM.items()):
        captions, images, grades = draw(pipe, prompts, EXAM_CAPTIONS, EXAM_SEED + number)
        scores = torch.stack([judge(four / 255, [caption] * 4) for four, caption in zip(images, captions)])
        share, half, ceiling, order = agreement(scores, grades, captions, args.temperature)
        print(f"{name}: annotator agrees on {share:.3f} ± {half:.3f} (with the grade: {ceiling:.3f}), grade on {order:.3f}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with bookkeeping.replacing(args.output) as temporary:
        temporary.write_bytes(save(judge.state_dict(), {"made": str(args)}))
    print(f"{args.output}: {sum(p.numel() for p in judge.parameters())} parameters, {args.output.stat().st_size} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the same bytes with any number of cores
    main(tyro.cli(Args, description=__doc__))
