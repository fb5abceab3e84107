"""The world of the miniature model: coloured shapes, the captions that describe them, and an exact verifier.

`scene` places the objects a caption asks for, `render` draws them, `detect` finds the objects of an image again
and `judge` holds them against the caption by the rules of GenEval (https://arxiv.org/abs/2310.11513): the right
objects in the right number, colour and position, and nothing else. Six categories, as GenEval has:

    single object       a circle
    two objects         a circle and a square
    counting            three red circles
    colours             a red circle
    position            a circle left of a square
    colour attribution  a red circle and a blue square

Images are (B, 3, 64, 64) float arrays or tensors in [0, 1]; lengths are pixels, x to the right and y down.
"""

import functools
import itertools
import math
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from judges.geneval import RELATIONS, relations

SIZE = 64
BACKGROUND = (0.08, 0.08, 0.11)
COLOURS = {"red": (0.90, 0.20, 0.20), "green": (0.16, 0.75, 0.31), "blue": (0.24, 0.37, 0.98), "yellow": (0.98, 0.86, 0.16)}
COUNTS = {"two": 2, "three": 3, "four": 4}
CATEGORIES = ("single object", "two objects", "counting", "colours", "position", "colour attribution")

CELLS = ((17, 17), (47, 17), (17, 47), (47, 47))  # centres of the four places an object can have
JITTER = 2.0
RADIUS = (9.0, 11.0)

# Signed distance to each outline, negative inside, for an object whose bounding box is centred on (0, 0);
# its area in units of radius²; and how far the centre of mass lies below the centre of the box, in radii.
SHAPES = {
    "circle": (lambda x, y, r: np.hypot(x, y) - r, np.pi, 0.0),
    "square": (lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.9 * r, 1.8**2, 0.0),
    "triangle": (
        lambda x, y, r: np.maximum(y - 0.9 * r, 0.75**0.5 * abs(x) - 0.5 * (y + 0.9 * r)),
        0.75 * 3**0.5 * 1.2**2,
        0.3,
    ),
    "cross": (
        lambda x, y, r: np.maximum(np.maximum(abs(x), abs(y)) - 1.05 * r, np.minimum(abs(x), abs(y)) - 0.38 * r),
        8 * 1.05 * 0.38 - 4 * 0.38**2,
        0.0,
    ),
}


@dataclass(frozen=True)
class Spec:
    """What a caption asks for: (shape, colour or None) of every object, and where the first one is to the second."""

    category: str
    objects: tuple
    relation: str | None = None


@dataclass
class Object:
    """An object placed in a scene, or found in an image."""

    colour: str
    x: float  # centre of the bounding box
    y: float
    radius: float
    shape: str | None = None  # None: the outline is none of ours
    width: float = 0.0  # of the bounding box; 0: twice the radius
    height: float = 0.0
    overlap: dict | None = None  # intersection over union with each shape's ideal outline
    closeness: float = 1.0  # 1 - distance of its mean colour to the palette's / 0.5, times the share of its pixels of that colour

    def __post_init__(self):
        self.width, self.height = self.width or 2 * self.radius, self.height or 2 * self.radius


def _all_prompts():
    """Every caption with its Spec, grouped by category and combination (captions that mean the same share one)."""
    pairs = list(itertools.combinations(SHAPES, 2))
    looks = list(itertools.product(COLOURS, SHAPES))
    a = "a {} {}".format
    groups = {category: [] for category in CATEGORIES}

    def add(category, *captions):
        groups[category].append({caption: Spec(category, *rest) for caption, *rest in captions})

    for shape in SHAPES:
        add("single object", (f"a {shape}", ((shape, None),)))
    for s, t in pairs:
        add("two objects", *((f"a {p} and a {q}", ((p, None), (q, None))) for p, q in ((s, t), (t, s))))
    for (word, n), (colour, shape) in itertools.product(COUNTS.items(), looks):
        plural = shape + ("es" if shape.endswith("s") else "s")
        add("counting", (f"{word} {colour} {plural}", ((shape, colour),) * n))
    for colour, shape in looks:
        add("colours", (a(colour, shape), ((shape, colour),)))
    for s, t in itertools.permutations(SHAPES, 2):
        for word, opposite in (("left of", "right of"), ("above", "below")):
            first = (f"a {s} {word} a {t}", ((s, None), (t, None)), word)
            add("position", first, (f"a {t} {opposite} a {s}", ((t, None), (s, None)), opposite))
    for (c, s), (d, t) in itertools.combinations(looks, 2):
        if c != d and s != t:
            orders = (((c, s), (d, t)), ((d, t), (c, s)))
            add("colour attribution", *((f"{a(*p)} and {a(*q)}", (p[::-1], q[::-1])) for p, q in orders))
    return groups


def _split(groups):
    """A quarter of each category's combinations, drawn once and for all, is held out of RL training."""
    rng = np.random.default_rng(0)
    train, held_out = {}, {}
    for category, combinations in groups.items():
        order = rng.permutation(len(combinations))
        cut = -(-len(combinations) // 4)
        train[category] = [c for i in sorted(order[cut:]) for c in combinations[i]]
        held_out[category] = [c for i in sorted(order[:cut]) for c in combinations[i]]
    return train, held_out


_GROUPS = _all_prompts()
SPECS = {caption: spec for combinations in _GROUPS.values() for group in combinations for caption, spec in group.items()}
TRAIN, HELD_OUT = _split(_GROUPS)  # category -> captions


def scene(caption, rng):
    """Objects that make `caption` true, in distinct cells; what the caption leaves open is drawn from `rng`."""
    spec = SPECS[caption]
    while True:
        cells = rng.permutation(len(CELLS))[: len(spec.objects)]
        objects = []
        for (shape, colour), cell in zip(spec.objects, cells):
            x, y = CELLS[cell] + rng.uniform(-JITTER, JITTER, 2)
            objects.append(Object(colour or rng.choice(list(COLOURS)), x, y, rng.uniform(*RADIUS), shape))
        if spec.relation is None or spec.relation in relations(objects[0], objects[1]):
            return objects


def render(scenes):
    """Anti-aliased float32 images (B, 3, 64, 64) in [0, 1] of B lists of objects."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    images = np.empty((len(scenes), 3, SIZE, SIZE), np.float32)
    images[:] = np.array(BACKGROUND, np.float32)[:, None, None]
    for image, objects in zip(images, scenes):
        for o in objects:
            coverage = np.clip(0.5 - SHAPES[o.shape][0](x - o.x, y - o.y, o.radius), 0, 1)
            image += coverage * (np.array(COLOURS[o.colour], np.float32)[:, None, None] - image)
    return images


SPECK = 6  # components of fewer pixels are noise, not objects
CROP = 20  # half the window in which an outline is compared
_CONNECTED_IN_IMAGE = np.stack([np.zeros((3, 3)), ndimage.generate_binary_structure(2, 1), np.zeros((3, 3))]).astype(bool)


def detect(images):
    """The objects of each image (B, 3, 64, 64): connected components of what is not background.

    Touching objects are one component, whose outline then matches nothing. An object's shape is the one whose ideal
    outline of the same area and centre overlaps it most, if by at least 0.75 (intersection over union).
    """
    images = np.ascontiguousarray(images, np.float32)
    palette = np.array([BACKGROUND, *COLOURS.values()], np.float32)
    similarity = palette @ images.reshape(len(images), 3, -1) - 0.5 * (palette**2).sum(1, keepdims=True)
    nearest = similarity.argmax(1).reshape(-1, SIZE, SIZE)  # = argmin of the distance; 0 is background
    labels, n = ndimage.label(nearest > 0, structure=_CONNECTED_IN_IMAGE)
    found = [[] for _ in images]
    if n == 0:
        return found
    where = np.nonzero(labels)
    index = labels[where] - 1  # (N,) component of every foreground pixel
    area = np.bincount(index, minlength=n)
    votes = np.bincount(index * len(palette) + nearest[where], minlength=n * len(palette)).reshape(n, -1)
    colour = votes.argmax(1)
    in_colour = nearest[where] == colour[index]
    pixels = np.moveaxis(images, 1, -1)[where]  # (N, 3)
    mean = np.stack([np.bincount(index, pixels[:, c] * in_colour, n) for c in range(3)], 1) / votes.max(1)[:, None]
    closeness = np.clip(1 - np.linalg.norm(mean - palette[colour], axis=1) / 0.5, 0, 1) * votes.max(1) / area
    centre_y, centre_x = (np.bincount(index, where[i], n) / area for i in (1, 2))

    # Windows (N, 2·CROP, 2·CROP) around the centre of mass of each component that is large enough.
    kept = np.nonzero(area >= SPECK)[0]
    image_of = np.zeros(n, int)
    image_of[index] = where[0]
    boxes = ndimage.find_objects(labels)
    padded = np.pad(labels, ((0, 0), (CROP, CROP), (CROP, CROP)))
    top, left = centre_y[kept].astype(int), centre_x[kept].astype(int)
    span = np.arange(2 * CROP)
    rows, columns = top[:, None] + span, left[:, None] + span
    window = padded[image_of[kept][:, None, None], rows[:, :, None], columns[:, None, :]] == (kept + 1)[:, None, None]
    y = (rows - CROP - centre_y[kept][:, None])[:, :, None].astype(np.float32)
    x = (columns - CROP - centre_x[kept][:, None])[:, None, :].astype(np.float32)
    overlaps = {}
    for name, (distance, unit_area, drop) in SHAPES.items():
        radius = np.sqrt(area[kept] / unit_area).astype(np.float32)[:, None, None]
        ideal = distance(x, y + drop * radius, radius) <= 0
        both = (ideal & window).sum((1, 2))
        overlaps[name] = both / (ideal.sum((1, 2)) + area[kept] - both)

    names = list(COLOURS)
    for i, k in enumerate(kept):
        _, rows, columns = boxes[k]
        overlap = {name: float(o[i]) for name, o in overlaps.items()}
        best = max(overlap, key=overlap.get)
        found[image_of[k]].append(
            Object(
                colour=names[colour[k] - 1],
                x=(columns.start + columns.stop - 1) / 2,
                y=(rows.start + rows.stop - 1) / 2,
                radius=float(np.sqrt(area[k] / SHAPES[best][1])),
                shape=best if overlap[best] >= 0.75 else None,
                width=columns.stop - columns.start,
                height=rows.stop - rows.start,
                overlap=overlap,
                closeness=float(closeness[k]),
            )
        )
    return found


def _holds(spec, objects):
    """The strict verdict: exactly the objects asked for, nothing else, each well drawn, in the relation asked for."""
    if len(objects) != len(spec.objects):
        return False
    if any(o.shape is None or o.closeness < 0.6 or not 0.6 * RADIUS[0] < o.radius < 1.4 * RADIUS[1] for o in objects):
        return False
    for order in itertools.permutations(objects):
        if all(o.shape == s and c in (None, o.colour) for o, (s, c) in zip(order, spec.objects)):
            if spec.relation is None or spec.relation in relations(order[0], order[1]):
                return True
    return False


def _credit(spec, objects):
    """Partial credit in [0, 1]: every object asked for is matched with one found and scored on outline and colour.

    The sum is divided by the number asked for or found, whichever is larger, so extra objects cost. A relation
    is a fifth of the credit and grows with the offset in its direction.
    """
    if not objects:
        return 0.0
    objects = sorted(objects, key=lambda o: -max(o.overlap.values()))[:5]  # a noise image has hundreds of components

    def match(o, shape, colour):
        outline = min(max((o.overlap[shape] - 0.4) / 0.5, 0.0), 1.0)
        return outline if colour is None else 0.5 * outline + 0.5 * o.closeness * (o.colour == colour)

    wanted = spec.objects
    table = np.array([[match(o, *w) for o in objects] for w in wanted])
    best, chosen = -1.0, None
    for order in itertools.permutations(range(len(objects)), min(len(wanted), len(objects))):
        for rows in itertools.combinations(range(len(wanted)), len(order)):
            total = table[list(rows), list(order)].sum()
            if total > best:
                best, chosen = total, dict(zip(rows, order))
    credit = best / max(len(wanted), len(objects))
    if spec.relation is not None:
        placed = 0.0
        if len(chosen) == 2:
            a, b = objects[chosen[0]], objects[chosen[1]]
            along = np.array([a.x - b.x, a.y - b.y]) @ RELATIONS[spec.relation]
            placed = min(max(along / (SIZE / 4), 0.0), 1.0) * best / 2
        credit = 0.8 * credit + 0.2 * placed
    return credit


def judge(images, captions):
    """Holds B images (B, 3, 64, 64) against B captions.

    Returns two float32 arrays (B,): the strict verdict (0 or 1), used for evaluation, and the graded reward in
    [0, 1], used for training: 1 where the strict verdict holds, elsewhere 0.6 · partial credit. (Were correct images
    graded further, a group of correct ones would still have spread, which its std would blow up to advantages of ±1.)
    Raises ValueError for a caption that is not of this world or an image of another size.
    """
    return examine(images, captions)[:2]


def examine(images, captions):
    """What `judge` returns, and the `looks` of the images, from one detection: (strict (B,), graded (B,), B looks)."""
    unknown = [c for c in captions if c not in SPECS]
    if unknown:
        raise ValueError(f"'{unknown[0]}' is not a caption of the shapes world; write it like 'a red circle left of ...'")
    found = _objects(images)
    strict = np.array([_holds(SPECS[c], o) for c, o in zip(captions, found)], np.float32)
    credit = np.array([_credit(SPECS[c], o) for c, o in zip(captions, found)], np.float32)
    return strict, np.maximum(strict, 0.6 * credit), list(map(_look, found))


def _objects(images):
    if tuple(images.shape[1:]) != (3, SIZE, SIZE):
        raise ValueError(f"shapes are judged on images of 3 x {SIZE} x {SIZE}, not {' x '.join(map(str, images.shape[1:]))}")
    return [objects for part in range(0, len(images), 64) for objects in detect(images[part : part + 64])]  # fits a cache


# Variety: whether a model draws one picture per caption, or all that the caption allows


def looks(images):
    """The look of each image (B, 3, 64, 64): nearest cell, colour and shape of its objects, sorted, as a string.

    "0rci 3bsq" is a red circle at the top left and a blue square at the bottom right; "??" is an outline that is none of ours.
    Raises ValueError for images of another size.
    """
    return list(map(_look, _objects(images)))


def _look(objects):
    cells = [min(range(len(CELLS)), key=lambda i: math.dist(CELLS[i], (o.x, o.y))) for o in objects]
    return " ".join(sorted(f"{cell}{o.colour[0]}{(o.shape or '??')[:2]}" for cell, o in zip(cells, objects)))


@functools.cache
def looks_allowed(caption):
    """The number of looks that make a caption true, |Omega|: its objects in distinct cells, in any colour that it leaves open."""
    spec = SPECS[caption]
    allowed = set()
    for cells in itertools.permutations(CELLS, len(spec.objects)):
        for colours in itertools.product(*([colour] if colour else COLOURS for _, colour in spec.objects)):
            objects = [Object(c, x, y, sum(RADIUS) / 2, shape) for c, (x, y), (shape, _) in zip(colours, cells, spec.objects)]
            if spec.relation is None or spec.relation in relations(objects[0], objects[1]):
                allowed.add(_look(objects))
    return len(allowed)


def pair_statistics(looks, verdicts):
    """(J, S2) of the n >= 2 images of one caption: the shares of ordered pairs i != j in which both images are right and their
    looks differ, and in which both are right. U-statistics: unbiased at every n, as an estimated entropy would not be.
    """
    counts = Counter(look for look, right in zip(looks, verdicts, strict=True) if right)
    right, pairs = counts.total(), len(looks) * (len(looks) - 1)
    return (right**2 - sum(count**2 for count in counts.values())) / pairs, right * (right - 1) / pairs


def _weighted_captions(looks, captions, verdicts):
    """[(looks, verdicts, weights (2,) of J and S2)] of every caption with two images or more that allows more than one look.

    Each category has the same weight, and in it each caption; J's weight includes 1/u, u = 1 - 1/|Omega| being what J would
    be if all images were right and drew every look equally often.
    """
    images = defaultdict(list)
    for look, caption, right in zip(looks, captions, verdicts, strict=True):
        images[caption].append((look, right))
    images = {c: rows for c, rows in images.items() if len(rows) > 1 and looks_allowed(c) > 1}
    captions_of = Counter(SPECS[c].category for c in images)
    weights = {c: 1 / captions_of[SPECS[c].category] for c in images}
    return [(*zip(*rows), weights[c] * np.array([1 / (1 - 1 / looks_allowed(c)), 1])) for c, rows in images.items()]


def variety(looks, captions, verdicts):
    """How differently a model draws what it draws rightly: 1 where every look that a caption allows is equally frequent, 0 where
    each caption has a single picture; an estimate of 1 may come out a little larger.

    From N looks (`looks`), their N captions and strict verdicts (N,), 0 or 1: the sum of J/u over the sum of S2
    (`pair_statistics`), each category of captions with the same weight. nan where no caption has two right images.
    """
    parts = [weights * pair_statistics(z, y) for z, y, weights in _weighted_captions(looks, captions, verdicts)]
    different, both = np.sum(parts, axis=0) if parts else (0, 0)
    return float(different / both) if both else math.nan


def variety_error(looks, captions, verdicts):
    """Standard error of `variety` over noises, the captions being what they are.

    Jackknife, one image at a time: every image of an evaluation has a noise of its own, so that images are independent, and
    captions have unequally many of them (4 to 144), so that the i-th image of all captions is no unit. Stratified by caption:
    the variance is the sum over captions of (n - 1)/n · sum_i (variety without image i - their mean over i)². It errs on the
    large side, most near a variety of 1: without favourites only J's pair term varies, which a jackknife counts twice or more.
    nan where a caption that counts has two images only (without one there is no pair), or where `variety` is nan.
    """
    captions = _weighted_captions(looks, captions, verdicts)
    parts = [weights * pair_statistics(z, y) for z, y, weights in captions]
    if not parts or min(len(z) for z, _, _ in captions) < 3:
        return math.nan
    variance, whole = 0.0, np.sum(parts, axis=0)
    for part, (z, y, weights) in zip(parts, captions):
        without = [whole - part + weights * pair_statistics(z[:i] + z[i + 1 :], y[:i] + y[i + 1 :]) for i in range(len(z))]
        values = [different / both if both > 1e-12 else math.nan for different, both in without]
        variance += (len(z) - 1) * np.var(values)
    return float(variance**0.5)


def sample_captions(n, rng, prompts=(TRAIN, HELD_OUT)):
    """n captions: the category uniform, then the caption uniform within it."""
    pools = [sum((p[category] for p in prompts), []) for category in CATEGORIES]
    return [pools[i][rng.integers(len(pools[i]))] for i in rng.integers(len(pools), size=n)]
