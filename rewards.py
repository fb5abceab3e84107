"""What images are rewarded for: a table of functions (images, prompts) -> (B,) float tensor, with their prompt sets.

Images are (B, 3, H, W) float tensors in [0, 1] on the CPU. A reward's `score` is what training maximizes; `verdict`,
where there is one, is the strict version of it that evaluation reports. `--reward` takes a name of REWARDS or a weighted
sum, ocr=0.8,pickscore=0.2. Networks are loaded once, when a run that needs them starts, and onto the GPU if there is one.
"""

import functools
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from judges import clip, geneval, geneval_benchmark, hpsv3, imagereward, ocr, to_uint8, unifiedreward
from miniature import FOLDER, is_miniature, preference, shapes

PACKAGES = {"rapidocr": "rapidocr onnxruntime", "rapidfuzz": "rapidfuzz"}  # beyond requirements.txt: module -> pip's names


# The shapes world, exact; see miniature/shapes.py


def shapes_score(images, prompts):
    """Graded reward in [0, 1] of the shapes world: 1 where the strict verdict holds, else 0.6 · partial credit."""
    return torch.from_numpy(shapes.judge(images.numpy(), prompts)[1])


def shapes_verdict(images, prompts):
    """1 where the image holds exactly what the prompt asks for, else 0."""
    return torch.from_numpy(shapes.judge(images.numpy(), prompts)[0])


def shapes_check(prompt):
    if prompt not in shapes.SPECS:
        raise ValueError(f'prompt "{prompt}" is not a caption of the shapes world; miniature/shapes.py lists them')


def preference_reward(path):
    """The Reward of a judge that miniature/preference.py made: its score, beside the exact verdict that it never saw."""
    load = functools.partial(preference.load, path)
    return Reward(lambda images, prompts: load()(images, prompts), "shapes", shapes_verdict, shapes_check, load)


# File size (DDPO, https://arxiv.org/abs/2305.13301)


def jpeg_incompressibility(images, prompts):
    """Kilobytes of the image as a JPEG of quality 95."""
    sizes = []
    for image in to_uint8(images):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


def jpeg_compressibility(images, prompts):
    """Minus the kilobytes of the image as a JPEG of quality 95."""
    return -jpeg_incompressibility(images, prompts)


# Prompt sets: name -> (category -> training prompts, category -> held-out prompts)


def hold_out(prompts):
    """Every fourth prompt is held out; fewer than four are both trained and held out."""
    return ([p for i, p in enumerate(prompts) if i % 4], prompts[::4]) if len(prompts) > 3 else (prompts, prompts)


def by_category(groups):
    both = {category: hold_out(prompts) for category, prompts in groups.items()}
    return {category: train for category, (train, _) in both.items()}, {category: held for category, (_, held) in both.items()}


ANIMALS = (  # DDPO's
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle "
    "ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey "
    "fly llama camel bat gorilla hedgehog kangaroo"
).split()
ACTIVITIES = ("riding a bike", "washing the dishes", "playing chess")  # DDPO's
PROMPT_SETS = {
    "shapes": (shapes.TRAIN, shapes.HELD_OUT),
    "animals": by_category({"animals": ANIMALS}),
    "activities": by_category({activity: [f"a {animal} {activity}" for animal in ANIMALS] for activity in ACTIVITIES}),
    "text": by_category(ocr.template_prompts()),
    "geneval": geneval_benchmark.left_out(*by_category(geneval.template_prompts())),  # no single object: all 80 are in it
}


@dataclass(frozen=True)
class Reward:
    score: Callable
    prompts: str  # its prompt set
    verdict: Callable | None = None  # None: evaluation reports the score
    check: Callable = lambda prompt: None  # ValueError for a prompt that it cannot judge
    load: Callable = lambda: None  # its networks; ModuleNotFoundError or OSError where something is missing


REWARDS = {
    "shapes": Reward(shapes_score, "shapes", shapes_verdict, shapes_check),
    # A file miniature/preference-mine.safetensors is the reward preference-mine.
    **{path.stem: preference_reward(path) for path in sorted(FOLDER.parent.glob("preference*.safetensors"))},
    "jpeg-compressibility": Reward(jpeg_compressibility, "animals"),
    "jpeg-incompressibility": Reward(jpeg_incompressibility, "animals"),
    "clip": Reward(clip.score, "activities", load=lambda: clip.load("clip")),
    "pickscore": Reward(clip.pickscore, "activities", load=lambda: clip.load("pickscore")),
    "imagereward": Reward(imagereward.score, "activities", load=imagereward.load),
    "hpsv3": Reward(hpsv3.score, "activities", load=hpsv3.load),
    "unifiedreward": Reward(unifiedreward.score, "activities", load=unifiedreward.load),
    "ocr": Reward(ocr.score, "text", check=ocr.quoted, load=ocr.load),
    "geneval": Reward(geneval.score, "geneval", geneval.verdict, geneval.parse, load=geneval.load),
}


def weights(spec):
    """{name: weight} of a --reward such as `shapes` or `ocr=0.8,pickscore=0.2`; ValueError for one that is none."""
    parts = {}
    for part in spec.split(","):
        name, equals, weight = part.partition("=")
        if name not in REWARDS:
            raise ValueError(f"--reward {spec} has an unknown name; choose of {', '.join(REWARDS)}, or a sum like clip=0.7,ocr=0.3")
        try:
            parts[name] = float(weight) if equals else 1.0
        except ValueError:
            parts[name] = math.nan
        if not math.isfinite(parts[name]):
            raise ValueError(f"--reward {spec}: the weight of {name} must be a number, as in clip=0.7,ocr=0.3")
    return parts


def build(spec):
    """The Reward of a --reward, a sum of one or more; its score ends the program naming the reward that is not finite."""
    parts = weights(spec)

    def total(kind):
        def function(images, prompts):
            result = torch.zeros(len(prompts))
            for name, weight in parts.items():
                score = (getattr(REWARDS[name], kind) or REWARDS[name].score)(images, prompts).float()
                if not score.isfinite().all():
                    raise SystemExit(f"reward {name} is not finite; the last saved state is kept")
                result += weight * score
            return result

        return function

    first = REWARDS[next(iter(parts))]
    verdict = total("verdict") if len(parts) == 1 else total("score")
    return replace(first, score=total("score"), verdict=verdict)


def prompt_set(args):
    """(training, held-out) prompts by category, from --prompt-file, else the reward's (of a sum, the first's).

    The miniature model knows only the words of the shapes world, so they are its prompts for any reward. Raises ValueError
    for a file without prompts or a prompt that a reward cannot judge.
    """
    parts = weights(args.reward)
    if args.prompt_file:
        try:
            lines = Path(args.prompt_file).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ValueError(f"--prompt-file {args.prompt_file} cannot be read: {why}") from None
        prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if not prompts:
            raise ValueError(f"--prompt-file {args.prompt_file} holds no prompt; it takes one a line")
        chosen = by_category({"prompts": prompts})
    else:
        chosen = PROMPT_SETS["shapes" if is_miniature(args.model) else REWARDS[next(iter(parts))].prompts]
    for prompt in dict.fromkeys(p for half in chosen for prompts in half.values() for p in prompts):
        for name in parts:
            REWARDS[name].check(prompt)
    return chosen


def load(spec):
    """Loads the networks of a --reward; ValueError saying how to get what is missing."""
    for name in weights(spec):
        try:
            REWARDS[name].load()
        except ImportError as error:
            missing = error.name or str(error)
            raise ValueError(f"--reward {name} needs the package {missing}: pip install {PACKAGES.get(missing, missing)}") from None
        except torch.OutOfMemoryError as error:
            raise ValueError(f"--reward {name}: {error}") from None
        except OSError as error:
            raise ValueError(
                f"--reward {name}: its network, as safetensors, is neither on disk nor to be had: {str(error).splitlines()[0]}"
            ) from None


def sample_prompts(train, n, rng):
    """n training prompts: the category uniform, then the prompt uniform within it."""
    pools = list(train.values())
    return [pools[i][rng.integers(len(pools[i]))] for i in rng.integers(len(pools), size=n)]


def held_out_prompts(held_out, n):
    """About n prompts, the same number from every category, and the category of each."""
    each = max(1, n // len(held_out))
    pairs = [(prompts[i % len(prompts)], category) for category, prompts in held_out.items() for i in range(each)]
    return [p for p, _ in pairs], [c for _, c in pairs]
