"""The world: what is drawn is recognised, what is wrong is rejected, and the autoencoder keeps both."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

import families
import rewards
from judges import geneval
from miniature import shapes
from miniature.shapes import Object


def draw(*objects):
    return shapes.render([[Object(colour, x, y, 10.0, shape) for shape, colour, x, y in objects]])


def verdict(image, caption):
    strict, graded = shapes.judge(image, [caption])
    assert 0 <= graded[0] <= 1 and (strict[0] == 1 or graded[0] < 1)
    return bool(strict[0])


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(1)
    captions = shapes.sample_captions(3000, rng)
    return captions, shapes.render([shapes.scene(c, rng) for c in captions])


def test_every_rendered_scene_is_recognised(scenes):
    captions, images = scenes
    assert {shapes.SPECS[c].category for c in captions} == set(shapes.CATEGORIES)
    assert shapes.judge(images, captions)[0].all()


def test_scenes_are_recognised_after_the_autoencoder(scenes):
    captions, images = scenes
    vae = AutoencoderKL.from_pretrained(families.MODELS["tiny"], subfolder="vae")
    with torch.no_grad():
        latents = torch.cat([vae.encode(x * 2 - 1).latent_dist.mode() for x in torch.from_numpy(images).split(250)])
        decoded = torch.cat([vae.decode(z).sample / 2 + 0.5 for z in latents.split(250)])
    assert shapes.judge(decoded.clamp(0, 1).numpy(), captions)[0].mean() >= 0.99
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(scaled.mean()) < 0.05 and abs(scaled.std() - 1) < 0.05


@pytest.mark.parametrize(
    "image",
    [
        np.full((1, 3, 64, 64), shapes.BACKGROUND[0], np.float32),
        np.zeros((1, 3, 64, 64), np.float32),
        np.ones((1, 3, 64, 64), np.float32),
        np.broadcast_to(np.array(shapes.COLOURS["red"], np.float32)[:, None, None], (1, 3, 64, 64)),
        np.random.default_rng(0).random((1, 3, 64, 64), np.float32),
    ],
    ids=["blank", "black", "white", "one flat colour", "noise"],
)
def test_images_of_nothing_are_rejected(image):
    for category in shapes.CATEGORIES:
        for caption in shapes.TRAIN[category][:5]:
            assert not verdict(image, caption)


CIRCLE, SQUARE = ("circle", "red", 17, 17), ("square", "blue", 47, 17)


@pytest.mark.parametrize(
    "objects, caption, holds",
    [
        ([CIRCLE], "a red circle", True),
        ([CIRCLE], "a circle", True),
        ([CIRCLE, SQUARE], "a circle left of a square", True),
        ([CIRCLE, SQUARE], "a red circle and a blue square", True),
        ([CIRCLE, SQUARE], "a red circle", False),  # a shape too many
        ([CIRCLE], "a green circle", False),  # a wrong colour
        ([CIRCLE], "a red square", False),  # a wrong shape
        ([CIRCLE], "two red circles", False),  # a shape too few
        ([CIRCLE, CIRCLE[:2] + (47, 47), CIRCLE[:2] + (17, 47)], "two red circles", False),
        ([CIRCLE, SQUARE], "a circle right of a square", False),  # a wrong side
        ([CIRCLE, SQUARE], "a circle above a square", False),
        ([CIRCLE, SQUARE], "a blue circle and a red square", False),  # colours swapped
        ([("circle", "red", 20, 32), ("square", "red", 38, 32)], "a circle and a square", False),  # touching
        ([("circle", "red", 20, 32), ("square", "blue", 38, 32)], "a circle and a square", False),
    ],
)
def test_verdicts(objects, caption, holds):
    assert verdict(draw(*objects), caption) is holds


def test_a_wrong_shade_is_rejected():
    image = draw(CIRCLE)
    image[0, 1] += 0.35 * (image[0, 0] > 0.5)  # between red and yellow
    assert not verdict(image, "a red circle") and not verdict(image, "a yellow circle")


def test_relations_are_genevals():
    centre = Object("red", 32, 32, 10)
    assert geneval.relations(Object("red", 2, 32, 10), centre) == {"left of"}
    assert geneval.relations(Object("red", 32, 62, 10), centre) == {"below"}
    assert geneval.relations(Object("red", 62, 2, 10), centre) == {"right of", "above"}  # a diagonal counts for both
    assert geneval.relations(Object("red", 35, 32, 10), centre) == set()  # within a tenth of both widths: 4 pixels
    # Offset (30, 18), shortened to (26, 14), distance 35: 26/35 > 0.5, but 14/35 is not.
    assert geneval.relations(Object("red", 62, 50, 10), centre) == {"right of"}


def test_graded_reward_prefers_what_is_nearer_to_the_prompt():
    caption = "a red circle and a blue square"
    images = [draw(), draw(CIRCLE), draw(CIRCLE, ("square", "red", 47, 17)), draw(CIRCLE, SQUARE)]
    graded = [float(shapes.judge(image, [caption])[1][0]) for image in images]
    assert graded == sorted(graded) and len(set(graded)) == 4
    spoiled = float(shapes.judge(draw(CIRCLE, SQUARE, ("cross", "green", 17, 47)), [caption])[1][0])
    assert spoiled < graded[3]


def test_training_and_held_out_prompts_share_no_combination():
    def combination(caption):
        spec = shapes.SPECS[caption]
        if spec.category != "position":
            return spec.category, tuple(sorted(spec.objects, key=str))
        a, b = (shape for shape, _ in spec.objects)
        mirrored = {"right of": "left of", "below": "above"}
        return (b, a, mirrored[spec.relation]) if spec.relation in mirrored else (a, b, spec.relation)

    train = {combination(c) for captions in shapes.TRAIN.values() for c in captions}
    held_out = {combination(c) for captions in shapes.HELD_OUT.values() for c in captions}
    assert train and held_out and not train & held_out
    assert all(shapes.TRAIN[c] and shapes.HELD_OUT[c] for c in shapes.CATEGORIES)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="a purple circle"):
        shapes.judge(draw(CIRCLE), ["a purple circle"])
    with pytest.raises(ValueError, match="3 x 64 x 64"):
        shapes.judge(np.zeros((1, 3, 32, 32)), ["a circle"])


def test_jpeg_rewards():
    images = torch.stack([torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))])
    kilobytes = rewards.jpeg_incompressibility(images, ["", ""])
    assert kilobytes[1] > 5 * kilobytes[0] > 0
    assert torch.equal(rewards.jpeg_compressibility(images, ["", ""]), -kilobytes)


def test_size_and_outline_have_limits():
    images = {radius: shapes.render([[Object("red", 32, 32, radius, "circle")]]) for radius in (4.5, 7.0, 11.0, 14.0, 17.0)}
    assert [verdict(image, "a red circle") for image in images.values()] == [False, True, True, True, False]
    half = images[11.0]
    half[..., 33:] = shapes.render([[]])[..., 33:]
    assert not any(verdict(half, f"a red {shape}") for shape in shapes.SHAPES)


def test_what_is_wrong_earns_at_most_six_tenths():
    strict, graded = shapes.judge(draw(CIRCLE, ("square", "red", 47, 17)), ["a red circle and a blue square"])
    assert strict == 0 and graded <= 0.6
    strict, graded = shapes.judge(draw(CIRCLE, ("square", "blue", 47, 17)), ["a blue circle and a red square"])
    assert strict == 0 and graded <= 0.6
