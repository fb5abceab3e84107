"""What images are rewarded for: a table of functions (images, prompts) -> (B,) float tensor, with their prompt sets.

Images are (B, 3, H, W) float tensors in [0, 1] on the CPU. A reward's `score` is what training maximizes; `verdict`,
where there is one, is the strict version of it that evaluation reports.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image

import shapes

# DDPO (https://arxiv.org/abs/2305.13301) takes animals for its JPEG rewards; every fourth is held out.
ANIMALS = (
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle "
    "ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey "
    "fly llama camel bat gorilla hedgehog kangaroo"
).split()
PROMPT_SETS = {  # name -> (category -> training prompts, category -> held-out prompts)
    "shapes": (shapes.TRAIN, shapes.HELD_OUT),
    "animals": ({"animals": [a for i, a in enumerate(ANIMALS) if i % 4]}, {"animals": ANIMALS[::4]}),
}


def shapes_score(images, prompts):
    """Graded reward in [0, 1] of the shapes world: 1 where the strict verdict holds, else 0.6 · partial credit."""
    return torch.from_numpy(shapes.judge(images.numpy(), prompts)[1])


def shapes_verdict(images, prompts):
    """1 where the image holds exactly what the prompt asks for, else 0."""
    return torch.from_numpy(shapes.judge(images.numpy(), prompts)[0])


def jpeg_incompressibility(images, prompts):
    """Kilobytes of the image as a JPEG of quality 95 (DDPO)."""
    sizes = []
    for image in (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


def jpeg_compressibility(images, prompts):
    """Minus the kilobytes of the image as a JPEG of quality 95 (DDPO)."""
    return -jpeg_incompressibility(images, prompts)


@dataclass(frozen=True)
class Reward:
    score: Callable
    prompts: str  # its prompt set
    verdict: Callable | None = None  # None: evaluation reports the score


REWARDS = {
    "shapes": Reward(shapes_score, "shapes", shapes_verdict),
    "jpeg-compressibility": Reward(jpeg_compressibility, "animals"),
    "jpeg-incompressibility": Reward(jpeg_incompressibility, "animals"),
}


def prompt_set(reward, model):
    """(training, held-out) prompts by category; the miniature model knows only the words of the shapes world."""
    return PROMPT_SETS["shapes" if model == "tiny" else REWARDS[reward].prompts]


def sample_prompts(train, n, rng):
    """n training prompts: the category uniform, then the prompt uniform within it."""
    pools = list(train.values())
    return [pools[i][rng.integers(len(pools[i]))] for i in rng.integers(len(pools), size=n)]


def held_out_prompts(held_out, n):
    """About n prompts, the same number from every category, and the category of each."""
    each = max(1, n // len(held_out))
    pairs = [(prompts[i % len(prompts)], category) for category, prompts in held_out.items() for i in range(each)]
    return [p for p, _ in pairs], [c for _, c in pairs]
