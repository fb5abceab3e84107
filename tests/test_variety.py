"""Variety: its number of looks, its expectation and its error are what the definition says, and collapses are found."""

import itertools
import json
import math
import runpy
import sys
from collections import Counter, defaultdict
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_runs import ROOT
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

import bookkeeping
import families
import grpo
from evaluate import standard_errors
from experiments import collapse, frontier
from judges import clip, to_uint8
from miniature import pretrain, shapes
from miniature.shapes import CELLS, COLOURS, SHAPES, Object

KINDS = {  # a caption of every kind -> the number of looks it allows, by hand
    "a circle": 4 * 4,  # cells · colours
    "a circle and a square": 4 * 3 * 4**2,
    "two red circles": 6,  # pairs of cells: the circles are alike
    "three red circles": 4,
    "four red circles": 1,
    "a red circle": 4,
    "a circle left of a square": 4 * 4**2,  # two cells on the left, two on the right
    "a red circle and a blue square": 4 * 3,
}


def look(*objects):
    """The look of objects (cell, colour, shape), drawn and found again."""
    return shapes.looks(shapes.render([[Object(colour, *CELLS[cell], 10.0, shape) for cell, colour, shape in objects]]))[0]


def test_a_look_is_cells_colours_and_shapes_whatever_their_order():
    objects = list(itertools.product(range(len(CELLS)), COLOURS, SHAPES))
    assert len({look(o) for o in objects}) == len(objects) == 64
    assert look((0, "red", "circle"), (3, "blue", "square")) == look((3, "blue", "square"), (0, "red", "circle")) == "0rci 3bsq"
    moved = shapes.looks(shapes.render([[Object("red", 25.0, 23.0, 9.0, "circle")], []]))
    assert moved == [look((0, "red", "circle")), ""]
    touching = shapes.render([[Object("red", 20, 17, 10.0, "circle"), Object("red", 38, 17, 10.0, "square")]])
    assert shapes.looks(touching)[0] in ("0r??", "1r??")


def test_one_detection_gives_verdict_reward_and_look(monkeypatch):
    rng, detect, seen = np.random.default_rng(0), shapes.detect, []
    captions = shapes.sample_captions(100, rng)
    images = shapes.render([shapes.scene(c, rng) for c in captions[::-1]])
    wanted = (*shapes.judge(images, captions), shapes.looks(images))
    monkeypatch.setattr(shapes, "detect", lambda images: seen.append(len(images)) or detect(images))
    found = shapes.examine(images, captions)
    assert seen == [64, 36] and found[2] == wanted[2] and all((a == b).all() for a, b in zip(found[:2], wanted[:2]))
    with pytest.raises(ValueError, match="3 x 64 x 64"):
        shapes.looks(np.zeros((1, 3, 32, 32)))


@pytest.mark.parametrize("caption, allowed", KINDS.items())
def test_u_is_how_often_two_random_scenes_look_different(caption, allowed):
    rng = np.random.default_rng(0)
    assert shapes.looks_allowed(caption) == allowed
    assert all(shapes.looks_allowed(c) == allowed for c in shapes.SPECS if kind(c) == kind(caption))
    images = shapes.render([shapes.scene(caption, rng) for _ in range(300)])
    strict, _, looks = shapes.examine(images, [caption] * 300)
    different, both = shapes.pair_statistics(looks, strict)
    deviation = math.sqrt(2 / allowed * (1 - 1 / allowed)) / 300  # of J where all looks are equally frequent
    assert both == 1 and abs(different - (1 - 1 / allowed)) <= 4 * deviation
    counts = Counter(shapes._look(shapes.scene(caption, rng)) for _ in range(16 * allowed))
    assert len(counts) == allowed and set(looks) <= set(counts)  # all are drawn, and found in images


def kind(caption):
    spec = shapes.SPECS[caption]
    return spec.category, len(spec.objects)


def fractions(looks, verdicts):
    return [Fraction(x).limit_denominator(1000) for x in shapes.pair_statistics(looks, verdicts)]


def test_four_images_of_a_caption_are_enough():
    """The mean over all 4-subsets of nine images is exactly the value of the nine, for J and for S2."""
    looks, verdicts = "aaabbcdde", (1, 1, 0, 1, 1, 1, 0, 1, 0)
    subsets = list(itertools.combinations(range(9), 4))
    parts = [fractions([looks[i] for i in s], [verdicts[i] for i in s]) for s in subsets]
    whole = fractions(looks, verdicts)
    assert [sum(column) / len(subsets) for column in zip(*parts)] == whole == [Fraction(26, 72), Fraction(30, 72)]


def test_a_policy_that_draws_every_scene_equally_often_has_variety_1():
    """Exactly, in the expectation over all draws of three images, each right with probability 1/2; and on average in a sample."""
    looks = [look((cell, "red", "circle")) for cell in range(4)]
    draws = list(itertools.product(itertools.product(looks, (0, 1)), repeat=3))
    different, both = (sum(column) / len(draws) for column in zip(*(fractions(*zip(*draw)) for draw in draws)))
    assert both == Fraction(1, 4) and different == Fraction(3, 4) * both
    rng, captions = np.random.default_rng(0), [c for captions in shapes.HELD_OUT.values() for c in captions] * 6
    draw = lambda: [shapes._look(shapes.scene(c, rng)) for c in captions]
    values = [shapes.variety(draw(), captions, np.ones(len(captions))) for _ in range(20)]
    assert abs(np.mean(values) - 1) < 4 * np.std(values, ddof=1) / 20**0.5 < 0.02


@pytest.mark.parametrize(
    "caption, colours, cells, value",
    [
        ("a circle", ["red"], range(4), (3 / 4) / (15 / 16)),
        ("a circle", COLOURS, [2], (3 / 4) / (15 / 16)),
        ("a circle and a square", ["red"], range(4), (11 / 12) / (191 / 192)),
        ("a circle and a square", COLOURS, [0, 3], (31 / 32) / (191 / 192)),  # two cells, but either may be the circle's
        ("a circle left of a square", COLOURS, [0, 3], (15 / 16) / (63 / 64)),
        ("a circle left of a square", ["red"], range(4), (3 / 4) / (63 / 64)),
    ],
)
def test_what_a_collapse_of_colour_or_place_leaves(caption, colours, cells, value):
    """The expectation, over all pairs of what is left: V = (1 - 1/left) / (1 - 1/|Omega|)."""
    spec, left = shapes.SPECS[caption], []
    for where in itertools.permutations(cells, len(spec.objects)):
        for chosen in itertools.product(colours, repeat=len(spec.objects)):
            objects = [Object(colour, *CELLS[cell], 10.0, shape) for colour, cell, (shape, _) in zip(chosen, where, spec.objects)]
            left += shapes.looks(shapes.render([objects])) if shapes.judge(shapes.render([objects]), [caption])[0] else []
    pairs = [shapes.variety(pair, [caption] * 2, [1, 1]) for pair in itertools.product(left, repeat=2)]
    assert np.mean(pairs) == pytest.approx(value, abs=1e-12)


def naive(looks, captions, verdicts):
    """The definition, pair by pair."""
    by_category = defaultdict(list)
    for caption in dict.fromkeys(captions):
        own = [i for i, c in enumerate(captions) if c == caption]
        allowed = {kind(c): n for c, n in KINDS.items()}[kind(caption)]
        if len(own) < 2 or allowed == 1:
            continue
        J = S2 = 0.0
        for i in own:
            for j in own:
                if i != j:
                    S2 += verdicts[i] * verdicts[j] / (len(own) * (len(own) - 1))
                    J += verdicts[i] * verdicts[j] * (looks[i] != looks[j]) / (len(own) * (len(own) - 1))
        by_category[kind(caption)[0]].append((J / (1 - 1 / allowed), S2))
    sums = np.sum([np.mean(parts, axis=0) for parts in by_category.values()], axis=0)
    return sums[0] / sums[1]


@pytest.fixture
def random_data():
    """150 images, shuffled: 3 to 20 each of captions of every kind, of five looks each, and one image alone."""
    rng = np.random.default_rng(0)
    captions = [c for n, c in zip((20, 12, 3, 5, 9, 4, 30, 8), KINDS) for _ in range(n)]
    captions += [c for c in shapes.HELD_OUT["colours"] for _ in range(14)] + ["a cross"] + ["two blue crosses"] * 2
    captions = [captions[i] for i in rng.permutation(len(captions))]
    return [f"{rng.integers(5)}" for _ in captions], captions, (rng.random(len(captions)) < 0.6).astype(float)


def test_variety_is_the_definition(random_data):
    assert len(random_data[0]) == 150
    assert abs(shapes.variety(*random_data) - naive(*random_data)) < 1e-12


def test_one_picture_per_caption_has_no_variety(random_data):
    _, captions, verdicts = random_data
    assert shapes.variety(captions, captions, verdicts) == 0  # a caption's only look, its name
    wrong_ones_differ = [c if right else str(i) for i, (c, right) in enumerate(zip(captions, verdicts))]
    assert shapes.variety(wrong_ones_differ, captions, verdicts) == 0
    assert shapes.variety_error("aaaabbbbb", ["a red circle"] * 4 + ["a circle"] * 5, [1] * 9) == 0


@pytest.mark.parametrize(
    "captions, verdicts",
    [
        ([], []),
        (["a circle", "a cross"], [1, 1]),  # one image each
        (["a circle"] * 3, [0, 1, 0]),  # one right image
        (["four red circles"] * 3, [1, 1, 1]),  # one look
    ],
)
def test_without_pairs_variety_is_nan(captions, verdicts):
    looks = [str(i) for i in range(len(captions))]
    assert math.isnan(shapes.variety(looks, captions, verdicts)) and math.isnan(shapes.variety_error(looks, captions, verdicts))


def test_the_error_leaves_one_image_out_at_a_time(random_data):
    kept = [i for i, c in enumerate(random_data[1]) if c not in ("two blue crosses", "a cross")]  # of two images no error is known
    looks, captions, verdicts = ([column[i] for i in kept] for column in random_data)
    assert math.isnan(shapes.variety_error(*random_data))
    without = defaultdict(list)
    for i, caption in enumerate(captions):
        without[caption].append(naive(*(column[:i] + column[i + 1 :] for column in (looks, captions, verdicts))))
    variance = sum((len(v) - 1) / len(v) * sum((x - np.mean(v)) ** 2 for x in v) for v in without.values())
    assert shapes.variety_error(looks, captions, verdicts) == pytest.approx(variance**0.5, abs=1e-12)


@pytest.mark.parametrize("favourite, low, high", [(0.7, 0.8, 1.4), (0.0, 1.0, 4.0)])
def test_the_error_is_the_spread_over_noises_or_more(favourite, low, high):
    """Of 300 evaluations of one policy, which is right three times in four and draws one look that often, else any."""
    rng = np.random.default_rng(0)
    captions = ["a circle"] * 24 + ["a red circle"] * 12 + ["a blue square"] * 12 + ["two red circles"] * 8
    values, errors = [], []
    for _ in range(300):
        looks = [str(0 if rng.random() < favourite else rng.integers(shapes.looks_allowed(c))) for c in captions]
        right = rng.random(len(captions)) < 0.75
        values.append(shapes.variety(looks, captions, right))
        errors.append(shapes.variety_error(looks, captions, right))
    assert low < np.mean(np.square(errors)) / np.var(values, ddof=1) < high


# evaluate.py


def evaluate(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", "--dtype", "float32", *map(str, flags)])
    runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")


def test_evaluate_tells_the_miniatures_variety_for_any_reward(tmp_path, monkeypatch, capsys):
    right, seen = bookkeeping.evaluate, []
    monkeypatch.setattr(bookkeeping, "evaluate", lambda *args: seen.append(right(*args)) or seen[-1])
    evaluate(monkeypatch, "--eval-images", "216", "--steps", "3", "--reward", "jpeg-compressibility", "--output-dir", tmp_path)
    result, out = json.loads((tmp_path / "evaluation.json").read_text()), capsys.readouterr().out
    images, prompts = seen[0].images.numpy(), seen[0].prompts
    known = shapes.looks(images), prompts, shapes.judge(images, prompts)[0]
    assert result["variety"] == pytest.approx(shapes.variety(*known), abs=1e-9) and result["variety"] > 0.5
    assert result["variety_error"] == pytest.approx(shapes.variety_error(*known), abs=1e-9)
    assert f"{result['variety']:.3f}" in out and f"{result['variety_error']:.3f} over noises" in out


def test_single_images_tell_nothing_of_the_error_over_images(tmp_path, monkeypatch, capsys):
    """Twelve captions of one image each have an error over captions alone; "0.000" would be a claim."""
    scores, captions = np.repeat([1.0, 0.0], 6), [str(i) for i in range(12)]
    over_images, over_captions = standard_errors(scores, captions, ["all"] * 12)
    assert math.isnan(over_images) and over_captions == pytest.approx(0.5 / 12**0.5, rel=0.05)
    over_images, _ = standard_errors([*scores, 1.0], [*captions[:11], "0", "0"], ["all"] * 13)
    assert math.isnan(over_images)  # of captions 1 to 10
    evaluate(monkeypatch, "--eval-images", "12", "--steps", "1", "--output-dir", tmp_path)
    result, out = json.loads((tmp_path / "evaluation.json").read_text()), capsys.readouterr().out
    assert result["error_over_images"] is None and result["error_over_captions"] >= 0
    assert "variety" not in result and "nan" not in out  # of single images there is none
    assert "over images it is not known" in out and f"standard error {result['error_over_captions']:.3f} over 11 captions" in out


@pytest.fixture
def tiny_clip(tmp_path, monkeypatch):
    torch.manual_seed(0)
    tokenizer = pretrain.build_tokenizer()
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vocabulary = dict(vocab_size=len(tokenizer), max_position_embeddings=10, eos_token_id=tokenizer.eos_token_id)
    config = CLIPConfig(text_config=small | vocabulary, vision_config=small | dict(image_size=32, patch_size=16), projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    size = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(tmp_path / "clip")
    monkeypatch.setattr(clip, "CHECKPOINTS", {"clip": (str(tmp_path / "clip"),) * 2})
    clip.load.cache_clear()
    yield tmp_path
    clip.load.cache_clear()


def test_variety_by_clip_is_the_distance_of_a_captions_images(tiny_clip, monkeypatch, capsys):
    """Two categories of unequal size, the captions' images of unequal number; the LoRA draws one picture per caption."""
    prompts = ["a circle", "a cross"] * 3 + ["a circle"] + ["two red crosses"] * 2
    categories = ["one" if p.startswith("a") else "two" for p in prompts]
    base = torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = {None: base, range(4): base[[prompts.index(p) for p in prompts]], range(0): base}  # by the steps with the LoRA
    (tiny_clip / "args.json").write_text("{}")
    calls = []

    def planted(pipe, args, steps, tuned_steps=None):
        calls.append((steps, tuned_steps))
        scores = np.ones(len(prompts))
        return SimpleNamespace(scores=scores, prompts=prompts, categories=categories, images=images[tuned_steps], variety=None)

    monkeypatch.setattr(bookkeeping, "load", lambda args: None)
    monkeypatch.setattr(bookkeeping, "evaluate", planted)
    evaluate(monkeypatch, "--lora", tiny_clip, "--variety", "clip", "--steps", "5", "--hybrid", "0.8")
    result, out = json.loads((tiny_clip / "evaluation.json").read_text())["clip_distances"], capsys.readouterr().out
    assert calls == [(5, range(4)), (5, range(0))]
    model, processor = clip.load("clip")
    pixels = processor(images=list(to_uint8(base)), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embeds = model.visual_projection(model.vision_model(pixels).pooler_output)
    wanted = {}
    for caption in dict.fromkeys(prompts):
        own = [i for i, p in enumerate(prompts) if p == caption]
        pairs = itertools.combinations(own, 2)
        wanted[caption] = np.mean([1 - float(torch.cosine_similarity(embeds[i], embeds[j], dim=0)) for i, j in pairs])
    circle, cross, crosses = wanted.values()
    assert result["base"]["distance"] == pytest.approx((np.mean([circle, cross]) + crosses) / 2, rel=1e-4) and crosses > 1e-3
    assert result["base"]["error"] == pytest.approx(abs(circle - cross) / 2**0.5 / 2 / 2, rel=0.05)
    assert result["lora"]["distance"] < 1e-6
    assert result["difference"]["distance"] == pytest.approx(-result["base"]["distance"], abs=1e-6)
    assert f"{result['base']['distance']:.3f} ± {result['base']['error']:.3f}" in out and "over 3 captions" in out


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--eval-images 64", "at least 432, two per caption"),  # six categories, 36 captions in the largest
        ("--eval-images 431", "at least 432"),
        ("--model sd3 --benchmark geneval", "leave it or --benchmark away"),
        ("--eval-images 432", "neither on disk nor to be had"),
    ],
)
def test_variety_by_clip_needs_pairs_and_clip(flags, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(clip, "CHECKPOINTS", {"clip": ("nobody/nothing",) * 2})
    monkeypatch.setattr(bookkeeping, "load", lambda args: pytest.fail("something slow starts"))
    clip.load.cache_clear()
    with pytest.raises(SystemExit) as stop:
        evaluate(monkeypatch, "--variety", "clip", "--output-dir", tmp_path / "out", *flags.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and "--reward" not in error


def test_which_attribute_collapsed_is_told():
    """Place always the same and colour free, the other way round, and both free: by arithmetic over all 16 looks of a circle."""
    caption = "a circle"
    looks = [f"{cell}{colour[0]}ci" for cell in range(4) for colour in shapes.COLOURS]
    unbiased = (16**2 - 4 * 4**2) / (16 * 15)  # four values, each of four of the 16 images
    free = collapse.attributes(looks, [caption] * 16, [1] * 16)
    assert free["place"] == free["colour"] == pytest.approx(unbiased / 0.75) and free["both"] == pytest.approx(1 / (1 - 1 / 16))
    fixed = collapse.attributes([f"0{look[1:]}" for look in looks], [caption] * 16, [1] * 16)
    assert fixed["place"] == 0 and fixed["colour"] == free["colour"]
    fixed = collapse.attributes([f"{look[0]}rci" for look in looks], [caption] * 16, [1] * 16)
    assert fixed["colour"] == 0 and fixed["place"] == free["place"]
    wrong = collapse.attributes([*looks, "0rci"], [caption] * 17, [*[1] * 16, 0])
    assert wrong == free


def test_the_lora_is_switched_off_step_by_step(tmp_path, monkeypatch):
    """Of two images of a circle the second is another one while the LoRA is off at the first step, which so carries the loss."""
    seen = []

    def evaluated(pipe, args, steps, tuned_steps):
        seen.append(list(tuned_steps))
        looks = ["0rci", "0rci" if 0 in tuned_steps else "1bci"]
        return SimpleNamespace(figures=dict(score=1.0, variety=0.5), looks=looks, prompts=["a circle"] * 2, scores=np.ones(2))

    monkeypatch.setattr(collapse.bookkeeping, "load", lambda args: None)
    monkeypatch.setattr(collapse.bookkeeping, "evaluate", evaluated)
    rows = list(collapse.rows_of(tmp_path))
    assert seen[:3] == [[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [0, 2, 3, 4, 5]] and seen[6:] == [[*range(k)] for k in (5, 1, 2, 3, 4)]
    assert len(rows) == len(seen) == 11 and rows[1]["lora_at"] == "2 3 4 5 6"
    assert [row["place"] > 0 for row in rows] == [row["colour"] > 0 for row in rows] == [False, True, *[False] * 9]
    frontier.write(tmp_path / "collapse.csv", rows)
    back = frontier.read(tmp_path / "collapse.csv")
    assert [(row["lora_at"], row["score"]) for row in back] == [(row["lora_at"], 1.0) for row in rows]


def test_variety_is_read_where_a_run_first_has_the_score():
    curve = [(0.4, 1.0), (0.6, 0.9), (0.5, 0.7), (0.8, 0.4)]
    assert frontier.variety_at(curve, 0.5) == pytest.approx(0.95) and frontier.variety_at(curve, 0.7) == pytest.approx(0.5)
    assert math.isnan(frontier.variety_at(curve, 0.9))


def test_a_lora_is_scaled_from_its_own_weights_each_time(tmp_path, monkeypatch):
    pipe = families.load_pipeline(grpo.Args(device="cpu", dtype="float32"))
    ups = [p for name, p in pipe.transformer.named_parameters() if "lora_B" in name]
    for p in ups:
        p.data.fill_(1.0)
    seen = []

    def evaluated(pipe, args, steps, tuned_steps):
        seen.append((ups[0].data.mean().item(), tuned_steps, args.guidance))
        return SimpleNamespace(figures=dict(score=0.5, variety=0.9))

    monkeypatch.setattr(frontier.bookkeeping, "load", lambda args: pipe)
    monkeypatch.setattr(frontier.bookkeeping, "evaluate", evaluated)
    rows = list(frontier.controls(tmp_path))
    scaled = [(scale, None, 1.0) for scale in (0.25, 0.5, 0.75, 1.0)]
    assert seen == [(1.0, range(2), 1.0), (1.0, range(4), 1.0), *scaled, (1.0, None, 1.5), (1.0, None, 2.0)]
    assert rows[-3] == dict(run=tmp_path.name, control="LoRA times 1", score=0.5, variety=0.9)
    assert rows[-1]["control"] == "LoRA, guidance 2"
