"""What images are rewarded for: a table of functions (images, prompts) -> (B,) float tensor, with their prompt sets.

Images are (B, 3, H, W) float tensors in [0, 1] on the CPU. A reward's `score` is what training maximizes; `verdict`,
where there is one, is the strict version of it that evaluation reports. `--reward` takes a name of REWARDS or a weighted
sum, ocr=0.8,pickscore=0.2. Networks are loaded once, when a run that needs them starts, and onto the GPU if there is one.
"""

import functools
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import shapes

CHECKPOINTS = {
    "clip": "openai/clip-vit-large-patch14",
    "pickscore": "yuvalkirstain/PickScore_v1",
    "pickscore processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "mask2former": "facebook/mask2former-swin-small-coco-instance",
}
PACKAGES = {"rapidocr": "rapidocr onnxruntime", "rapidfuzz": "rapidfuzz"}  # beyond requirements.txt: module -> pip's names


def to_uint8(images):
    """(B, H, W, 3) uint8 array of images (B, 3, H, W) in [0, 1]."""
    return (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()


# The shapes world, exact; see shapes.py


def shapes_score(images, prompts):
    """Graded reward in [0, 1] of the shapes world: 1 where the strict verdict holds, else 0.6 · partial credit."""
    return torch.from_numpy(shapes.judge(images.numpy(), prompts)[1])


def shapes_verdict(images, prompts):
    """1 where the image holds exactly what the prompt asks for, else 0."""
    return torch.from_numpy(shapes.judge(images.numpy(), prompts)[0])


def shapes_check(prompt):
    if prompt not in shapes.SPECS:
        raise ValueError(f'prompt "{prompt}" is not a caption of the shapes world; shapes.py lists them')


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


# Similarity of image and prompt


@functools.cache
def load_clip(checkpoint, processor=None):
    from transformers import AutoProcessor, CLIPModel

    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(CHECKPOINTS[processor or checkpoint])
    return CLIPModel.from_pretrained(CHECKPOINTS[checkpoint]).eval().to(device), processor


@torch.no_grad()
def clip_embeds(model, processor, images, texts):
    """Unit-length embeddings (B, D) of uint8 images and (N, D) of texts, in batches of 32 images."""
    parts = []
    for start in range(0, len(images), 32):
        inputs = processor(text=texts, images=list(images[start : start + 32]), return_tensors="pt", padding=True, truncation=True)
        outputs = model(**inputs.to(model.device))
        parts.append(outputs.image_embeds.float().cpu())
    return torch.cat(parts), outputs.text_embeds.float().cpu()


def clip(images, prompts):
    """Cosine similarity of image and prompt (CLIP, https://arxiv.org/abs/2103.00020)."""
    unique = list(dict.fromkeys(prompts))
    image_embeds, text_embeds = clip_embeds(*load_clip("clip"), to_uint8(images), unique)
    return (image_embeds * text_embeds[[unique.index(p) for p in prompts]]).sum(1)


def pickscore(images, prompts):
    """PickScore (https://arxiv.org/abs/2305.01569) over 26, about 1 at its upper end as Flow-GRPO scales it."""
    model, processor = load_clip("pickscore", "pickscore processor")
    unique = list(dict.fromkeys(prompts))
    image_embeds, text_embeds = clip_embeds(model, processor, to_uint8(images), unique)
    return model.logit_scale.exp().item() * (image_embeds * text_embeds[[unique.index(p) for p in prompts]]).sum(1) / 26


# Written text


def quoted(prompt):
    """The text that a prompt wants to see written: what stands in its first pair of double quotes."""
    match = re.search(r'"\s*([^"\s][^"]*)"', prompt)
    if not match:
        raise ValueError(f"prompt '{prompt}' has no text in double quotes, which is what --reward ocr looks for in the image")
    return match[1]


@functools.cache
def load_ocr():
    import rapidfuzz.distance
    from rapidocr import RapidOCR

    return RapidOCR(params={"Global.log_level": "error"}), rapidfuzz.distance.Levenshtein.distance


def text_score(found, wanted):
    """1 - edit distance / length of the wanted text, at least 0, without case and spaces; 1 if it is found in more (Flow-GRPO)."""
    found, wanted = ("".join(text.lower().split()) for text in (found, wanted))
    distance = 0 if wanted in found else load_ocr()[1](found, wanted)
    return 1 - min(distance / len(wanted), 1)


def ocr(images, prompts):
    """`text_score` of the text that RapidOCR reads in the image, against the text quoted in the prompt."""
    read = lambda image: "".join(load_ocr()[0](np.ascontiguousarray(image[..., ::-1])).txts or ())  # it takes BGR
    return torch.tensor([text_score(read(image), quoted(prompt)) for image, prompt in zip(to_uint8(images), prompts)])


# GenEval (https://arxiv.org/abs/2310.11513): detector, rules and prompts

COCO = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,bird,"
    "cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,"
    "sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,"
    "toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,"
    "clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")  # in the order of the detector's labels
COLOURS = "red orange yellow green blue purple pink brown black white".split()
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
PLURALS = {"person": "people", "knife": "knives", "sheep": "sheep", "skis": "skis", "scissors": "scissors"}
PLURALS |= {"computer mouse": "computer mice", "broccoli": "broccoli"}
PLURALS = {name: PLURALS.get(name) or name + ("es" if name.endswith(("s", "ch", "sh")) else "s") for name in COCO}
SINGULARS = {name + ("es" if name.endswith("s") else "s"): name for name in COCO}  # GenEval's own list has "benchs", "persons"
SINGULARS |= {plural: name for name, plural in PLURALS.items()}


class Request(NamedTuple):
    """One clause of a prompt: so many of an object, perhaps of a colour, perhaps in a relation to the clause before."""

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None


class Box(NamedTuple):
    """A detected object: centre, size, confidence, and its mask (H, W) where its colour matters."""

    x: float
    y: float
    width: float
    height: float
    confidence: float = 1.0
    mask: np.ndarray | None = None


def geneval_requests(prompt):
    """The clauses of a prompt that follows one of GenEval's six templates; ValueError for any other prompt."""

    def request(phrase, relation=None):
        number, _, rest = phrase.partition(" ")
        colour, _, name = rest.partition(" ") if rest.split(" ")[0] in COLOURS and rest not in COCO else (None, "", rest)
        name = name if NUMBERS[number] == 1 else SINGULARS[name]
        return Request(COCO[COCO.index(name)], NUMBERS[number], colour, relation)

    try:
        _, scene = prompt.split("a photo of ")
        relation = next((r for r in shapes.RELATIONS if f" {r} " in scene), None)
        if relation:
            subject, reference = scene.split(f" {relation} ")
            return [request(reference), request(subject, relation)]
        return [request(phrase) for phrase in scene.split(" and ")]
    except (KeyError, ValueError):
        raise ValueError(
            f'prompt "{prompt}" follows none of GenEval\'s templates, such as "a photo of a red dog and a blue cup"'
        ) from None


def geneval_judge(requests, objects, colour_of):
    """(strict verdict, graded reward) of `objects` {name: boxes by falling confidence} against the clauses of a prompt.

    `colour_of(boxes, name)` names the boxes' colours. Strict is GenEval's rule: enough objects, as many of them of the
    colour, every pair in the relation, and not one more where a number was asked for. Graded is Flow-GRPO's: the mean
    over clauses of 1 - |found - asked| / asked, for number and for colour, and of whether the relation holds; the last two
    count only where the number is exact. Choices: no part is below 0, and a relation that fails counts once.
    """
    strict, credits, before = True, [], []
    for name, count, colour, relation in requests:
        boxes = objects.get(name, [])
        strict &= len(boxes) >= count and not (count > 1 and len(boxes) > count)
        credits.append(max(1 - abs(len(boxes) - count) / count, 0))
        if colour:
            colours = colour_of(boxes[:count], name) if boxes else []
            strict &= colours.count(colour) >= count
            credits.append(colours.count(colour) / count if len(boxes) == count else 0.0)
        if relation:
            pairs = [(a, b) for a in boxes[:count] for b in before]
            holds = bool(pairs) and all(relation in shapes.relations(a, b) for a, b in pairs)
            strict &= holds
            credits.append(float(holds and len(boxes) == count))
        before = boxes[:count]
    return strict, sum(credits) / len(credits)


@functools.cache
def load_detector():
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    model = Mask2FormerForUniversalSegmentation.from_pretrained(CHECKPOINTS["mask2former"]).eval().to(device)
    return model, AutoImageProcessor.from_pretrained(CHECKPOINTS["mask2former"])


@torch.no_grad()
def geneval_detect(image, threshold):
    """{name: boxes by falling confidence} of the objects in a uint8 image (H, W, 3)."""
    model, processor = load_detector()
    outputs = model(**processor(images=image, return_tensors="pt").to(model.device))
    options = dict(threshold=threshold, target_sizes=[image.shape[:2]], return_binary_maps=True)
    found = processor.post_process_instance_segmentation(outputs, **options)[0]
    objects = {}
    for mask, info in zip(found["segmentation"], found["segments_info"]):
        rows, columns = np.nonzero(mask.cpu().numpy() > 0)
        if len(rows):
            (top, bottom), (left, right) = (rows.min(), rows.max() + 1), (columns.min(), columns.max() + 1)
            centre, size = ((left + right) / 2, (top + bottom) / 2), (right - left, bottom - top)
            box = Box(*centre, *size, info["score"], mask.cpu().numpy() > 0)
            objects.setdefault(COCO[info["label_id"]], []).append(box)
    return {name: sorted(boxes, key=lambda box: -box.confidence) for name, boxes in objects.items()}


def geneval_colours(image, boxes, name):
    """The colour of each box of a uint8 image, by CLIP: its crop, on grey, against three sentences a colour."""
    crops = []
    for x, y, width, height, _, mask in boxes:
        grey = np.where(mask[..., None], image, np.uint8(0x99))
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        crops.append(Image.fromarray(grey).crop(box))
    texts = [f"a photo of a {c}{rest}" for c in COLOURS for rest in (f" {name}", f"-colored {name}", " object")]
    image_embeds, text_embeds = clip_embeds(*load_clip("clip"), crops, texts)
    of_colours = torch.nn.functional.normalize(text_embeds.view(len(COLOURS), 3, -1).mean(1), dim=1)
    likeness = image_embeds @ of_colours.T
    return [COLOURS[i] for i in likeness.argmax(1)]


def geneval_both(images, prompts):
    results = []
    for image, prompt in zip(to_uint8(images), prompts):
        requests = geneval_requests(prompt)
        counting = len(requests) == 1 and requests[0].count > 1
        objects = geneval_detect(image, 0.9 if counting else 0.3)  # GenEval's two thresholds
        results.append(geneval_judge(requests, objects, functools.partial(geneval_colours, image)))
    return torch.tensor(results, dtype=torch.float32)


def geneval_score(images, prompts):
    """Graded GenEval reward in [0, 1], see `geneval_judge`."""
    return geneval_both(images, prompts)[:, 1]


def geneval_verdict(images, prompts):
    """1 where GenEval's rules hold, else 0."""
    return geneval_both(images, prompts)[:, 0]


# Prompt sets: name -> (category -> training prompts, category -> held-out prompts)


def hold_out(prompts):
    """Every fourth prompt is held out; fewer than four are both trained and held out."""
    return ([p for i, p in enumerate(prompts) if i % 4], prompts[::4]) if len(prompts) > 3 else (prompts, prompts)


def by_category(groups):
    both = {category: hold_out(prompts) for category, prompts in groups.items()}
    return {category: train for category, (train, _) in both.items()}, {category: held for category, (_, held) in both.items()}


def geneval_prompts():
    """The six templates, 80 objects and 10 colours of GenEval, at most 400 different prompts each, drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    some = lambda names: names[rng.integers(len(names))]
    a = lambda words: ("an " if words[0] in "aeiou" else "a ") + words
    two = lambda names: (names[i] for i in rng.choice(len(names), 2, replace=False))
    coloured = lambda pairs: [a(f"{colour} {name}") for colour, name in pairs]
    things = COCO[1:]  # people are not asked for in a colour
    templates = {
        "single object": lambda: a(some(COCO)),
        "two objects": lambda: " and ".join(map(a, two(COCO))),
        "counting": lambda: f"{some(['two', 'three', 'four'])} {PLURALS[some(COCO)]}",
        "colours": lambda: coloured([(some(COLOURS), some(things))])[0],
        "position": lambda: f" {some(list(shapes.RELATIONS))} ".join(map(a, two(COCO))),
        "colour attribution": lambda: " and ".join(coloured(zip(two(COLOURS), two(things)))),
    }
    return {c: list(dict.fromkeys("a photo of " + template() for _ in range(400))) for c, template in templates.items()}


ANIMALS = (  # DDPO's
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle "
    "ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey "
    "fly llama camel bat gorilla hedgehog kangaroo"
).split()
ACTIVITIES = ("riding a bike", "washing the dishes", "playing chess")  # DDPO's
SURFACES = (
    "a shop sign that reads", "a neon sign saying", "a birthday cake with the words", "a book titled", "a chalkboard with the text",
    "a t-shirt printed with", "a road sign that says", "a poster with the headline", "graffiti on a wall spelling", "a mug with",
)  # fmt: skip
WORDS = (
    "hello world,open late,fresh bread,keep left,good morning,night owl,sale today,no entry,read more,wild river,stay curious,"
    "coffee first,lost and found,blue moon,thank you,mind the gap,summer camp,quiet please,happy birthday,one way"
).split(",")
PROMPT_SETS = {
    "shapes": (shapes.TRAIN, shapes.HELD_OUT),
    "animals": by_category({"animals": ANIMALS}),
    "activities": by_category({activity: [f"a {animal} {activity}" for animal in ANIMALS] for activity in ACTIVITIES}),
    "text": by_category({surface: [f'{surface} "{words}"' for words in WORDS] for surface in SURFACES}),
    "geneval": by_category(geneval_prompts()),
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
    "jpeg-compressibility": Reward(jpeg_compressibility, "animals"),
    "jpeg-incompressibility": Reward(jpeg_incompressibility, "animals"),
    "clip": Reward(clip, "activities", load=lambda: load_clip("clip")),
    "pickscore": Reward(pickscore, "activities", load=lambda: load_clip("pickscore", "pickscore processor")),
    "ocr": Reward(ocr, "text", check=quoted, load=load_ocr),
    "geneval": Reward(
        geneval_score, "geneval", geneval_verdict, geneval_requests, load=lambda: (load_detector(), load_clip("clip"))
    ),
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


def is_miniature(model):
    """Whether a --model is the miniature: `tiny`, or a folder called tiny-sd3, as pretrain.py makes it."""
    return Path(model).name in ("tiny", "tiny-sd3")


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
        except OSError as error:
            raise ValueError(
                f"--reward {name}: its network is neither on disk nor to be had: {str(error).splitlines()[0]}"
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
