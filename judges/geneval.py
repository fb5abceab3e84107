"""GenEval (https://arxiv.org/abs/2310.11513): a detector finds the objects of an image, rules hold them against the prompt."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from judges import clip, device, to_uint8

CHECKPOINT = "facebook/mask2former-swin-small-coco-instance"
SIZE = {"shortest_edge": 800, "longest_edge": 1333}  # of what the detector sees in GenEval; this checkpoint's default is 384 x 384
COCO = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,bird,"
    "cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,"
    "sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,"
    "toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,"
    "clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")  # in the order of the detector's labels
COLOURS = "red orange yellow green blue purple pink brown black white".split()
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # x to the right and y down
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
PLURALS = {"person": "people", "knife": "knives", "sheep": "sheep", "skis": "skis", "scissors": "scissors"}
PLURALS |= {"computer mouse": "computer mice", "broccoli": "broccoli"}
PLURALS = {name: PLURALS.get(name) or name + ("es" if name.endswith(("s", "ch", "sh")) else "s") for name in COCO}


def published_plural(name):
    """GenEval's own rule: "buses", but "benchs" and "knifes"."""
    return name + ("es" if name.endswith("s") else "s")


def with_article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


SINGULARS = {published_plural(name): name for name in COCO}
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


def parse(prompt):
    """The clauses of a prompt that follows one of GenEval's six templates; ValueError for any other prompt."""

    def request(phrase, relation=None):
        number, _, rest = phrase.partition(" ")
        colour, _, name = rest.partition(" ") if rest.split(" ")[0] in COLOURS and rest not in COCO else (None, "", rest)
        name = name if NUMBERS[number] == 1 else SINGULARS[name]
        return Request(COCO[COCO.index(name)], NUMBERS[number], colour, relation)

    try:
        _, scene = prompt.split("a photo of ")
        relation = next((r for r in RELATIONS if f" {r} " in scene), None)
        if relation:
            subject, reference = scene.split(f" {relation} ")
            return [request(reference), request(subject, relation)]
        return [request(phrase) for phrase in scene.split(" and ")]
    except (KeyError, ValueError):
        raise ValueError(
            f'prompt "{prompt}" follows none of GenEval\'s templates, such as "a photo of a red dog and a blue cup"'
        ) from None


def relations(a, b):
    """Where `a` is to `b`, as a set of RELATIONS; a diagonal offset counts for both directions. Both have x, y, width, height.

    The offset of the box centres is shortened by a tenth of the boxes' sizes; what is left must be more than half
    of the distance along an axis. Objects on top of each other have no relation.
    """
    offset = np.array([a.x - b.x, a.y - b.y])
    sizes = np.array([a.width + b.width, a.height + b.height])
    shortened = np.maximum(abs(offset) - 0.1 * sizes, 0) * np.sign(offset)
    distance = np.hypot(*offset)
    return {name for name, axis in RELATIONS.items() if distance > 0 and shortened @ axis > 0.5 * distance}


def judge(requests, objects, colour_of):
    """(strict verdict, graded reward) of `objects` {name: boxes by falling confidence} against the clauses of a prompt.

    `colour_of(boxes, name)` names the boxes' colours. Strict is GenEval's rule: enough objects, as many of them of the
    colour, every pair in the relation, and not one more where a number was asked for. Graded is Flow-GRPO's: the mean
    over clauses of 1 - |found - asked| / asked, for number and for colour, and of whether the relation holds; the last two
    count only where the number is exact, for a relation in both its clauses. Choices: no part is below 0, and a relation
    that fails counts once.
    """
    strict, credits, before, exact_before = True, [], [], False
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
            holds = bool(pairs) and all(relation in relations(a, b) for a, b in pairs)
            strict &= holds
            credits.append(float(holds and exact_before and len(boxes) == count))
        before, exact_before = boxes[:count], len(boxes) == count
    return strict, sum(credits) / len(credits)


@functools.cache
def load_detector():
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    model = Mask2FormerForUniversalSegmentation.from_pretrained(CHECKPOINT, use_safetensors=True).eval().to(device())
    return model, AutoImageProcessor.from_pretrained(CHECKPOINT)


def load():
    load_detector(), clip.load("clip")


@torch.no_grad()
def detect(image, threshold):
    """{name: boxes by falling confidence} of the objects in a uint8 image (H, W, 3)."""
    model, processor = load_detector()
    inputs = processor(images=image, size=SIZE, return_tensors="pt").to(model.device)
    outputs = model(**inputs)
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


def name_colours(image, boxes, name):
    """The colour of each box of a uint8 image, by CLIP: its crop, on grey, against three sentences a colour."""
    crops = []
    for x, y, width, height, _, mask in boxes:
        grey = np.where(mask[..., None], image, np.uint8(0x99))
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        crops.append(Image.fromarray(grey).crop(box))
    texts = [f"a photo of a {c}{rest}" for c in COLOURS for rest in (f" {name}", f"-colored {name}", " object")]
    image_embeds, text_embeds = clip.embed(*clip.load("clip"), crops, texts)
    of_colours = torch.nn.functional.normalize(text_embeds.view(len(COLOURS), 3, -1).mean(1), dim=1)
    likeness = image_embeds @ of_colours.T
    return [COLOURS[i] for i in likeness.argmax(1)]


def both(images, prompts):
    results = []
    for image, prompt in zip(to_uint8(images), prompts):
        requests = parse(prompt)
        counting = len(requests) == 1 and requests[0].count > 1
        objects = detect(image, 0.9 if counting else 0.3)  # GenEval's two thresholds
        results.append(judge(requests, objects, functools.partial(name_colours, image)))
    return torch.tensor(results, dtype=torch.float32)


def score(images, prompts):
    """Graded GenEval reward in [0, 1], see `judge`."""
    return both(images, prompts)[:, 1]


def verdict(images, prompts):
    """1 where GenEval's rules hold, else 0."""
    return both(images, prompts)[:, 0]


def template_prompts():
    """The six templates, 80 objects and 10 colours of GenEval, at most 400 different prompts each, drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    some = lambda names: names[rng.integers(len(names))]
    two = lambda names: (names[i] for i in rng.choice(len(names), 2, replace=False))
    coloured = lambda pairs: [with_article(f"{colour} {name}") for colour, name in pairs]
    things = COCO[1:]  # people are not asked for in a colour
    templates = {
        "single object": lambda: with_article(some(COCO)),
        "two objects": lambda: " and ".join(map(with_article, two(COCO))),
        "counting": lambda: f"{some(['two', 'three', 'four'])} {PLURALS[some(COCO)]}",
        "colours": lambda: coloured([(some(COLOURS), some(things))])[0],
        "position": lambda: f" {some(list(RELATIONS))} ".join(map(with_article, two(COCO))),
        "colour attribution": lambda: " and ".join(coloured(zip(two(COLOURS), two(things)))),
    }
    return {c: list(dict.fromkeys("a photo of " + template() for _ in range(400))) for c, template in templates.items()}
