"""The judge that can be fooled: its loss, its training on a simulated annotator's answers, the shipped files, what it refuses."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open

import rewards
from experiments import hacking
from miniature import FOLDER, preference, shapes

FILES = sorted(FOLDER.parent.glob("preference*.safetensors"))


def test_bradley_terry_and_its_gradient_by_hand():
    preferred = torch.tensor([1.0, 0.0, 1000.0, -1000.0], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([0.0, 2.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    loss = preference.bradley_terry(preferred, other)
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2)) + 0 + 1000) / 4, abs=1e-12)
    loss.backward()
    surprise = torch.tensor([1 / (1 + math.e), 1 / (1 + math.exp(-2)), 0, 1], dtype=torch.float64)  # 1 - P(the answer)
    torch.testing.assert_close(preferred.grad, -surprise / 4)
    torch.testing.assert_close(other.grad, surprise / 4)


def test_agreement_by_hand():
    grades = torch.tensor([[0.1, 0.3, 0.3, 0.3], [0.0, 0.0, 0.0, 1.0]])  # each has three pairs of different grades
    p, q = 1 / (1 + math.exp(-0.2 / 0.1)), 1 / (1 + math.exp(-1.0 / 0.1))
    share, half, ceiling, order = preference.agreement(grades, grades, ["a circle", "a square"], 0.1)
    assert share == ceiling == pytest.approx((p + q) / 2, abs=1e-6) and order == 1
    # Residuals 3 (p - m) and 3 (q - m) of the captions, m their mean; six pairs
    assert half == pytest.approx(1.96 * math.hypot(3 * (p - q) / 2, 3 * (q - p) / 2) / 6, abs=1e-6)
    assert preference.agreement(grades, grades, ["a circle"] * 2, 0.1)[1] == pytest.approx(0, abs=1e-6)  # one caption's cancel
    scores = torch.tensor([[5.0, 4.0, 6.0, 7.0], [1.0, 2.0, 3.0, 0.0]])  # right: two of three pairs, none of three
    share, _, ceiling, order = preference.agreement(scores, grades, ["a circle", "a square"], 0.1)
    assert share == pytest.approx((2 * p + (1 - p) + 3 * (1 - q)) / 6, abs=1e-6)
    assert ceiling == pytest.approx((p + q) / 2, abs=1e-6) and order == pytest.approx(2 / 6)


def bright(count, seed):
    """Captions, images (N, 4, 3, 64, 64) of one grey each, and the grey as their grade; the first two images are alike."""
    rng = np.random.default_rng(seed)
    greys = torch.from_numpy(rng.integers(0, 256, (count, 4)).astype(np.uint8))
    greys[:, 1] = greys[:, 0]
    return shapes.sample_captions(count, rng), greys[:, :, None, None, None].expand(-1, -1, 3, 64, 64), greys / 255


@pytest.mark.parametrize("temperature, least, most", [(0.05, 0.9, 1.0), (1e6, 0.0, 0.8)])
def test_the_judge_learns_what_the_annotator_answers(temperature, least, most):
    captions, images, grades = bright(16, 0)
    judge = preference.train(captions, images, grades, preference.Args(temperature=temperature, steps=40))
    captions, images, grades = bright(30, 1)
    with torch.no_grad():
        scores = judge(images.flatten(0, 1) / 255, np.repeat(captions, 4)).view(-1, 4)
    assert least <= preference.agreement(scores, grades, captions, 1.0)[3] <= most


def test_scores_differ_in_units_of_the_grade():
    captions, images, _ = bright(8, 0)
    images = images // 128 * 255  # black or white: both annotators give the same answers, and images that tie get none
    grades = images[:, :, 0, 0, 0] / 255
    scores = []
    for temperature in (1e-3, 2e-3):
        judge = preference.train(captions, images, grades, preference.Args(temperature=temperature, steps=2))
        with torch.no_grad():
            scores.append(judge(images.flatten(0, 1) / 255, np.repeat(captions, 4)))
    differences = [s[:, None] - s for s in scores]
    assert differences[0].std() > 1e-6
    torch.testing.assert_close(differences[1], 2 * differences[0], rtol=1e-3, atol=1e-7)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Files of tiny judges by the whole program: the same flags twice, and another seed."""
    folder, exam = tmp_path_factory.mktemp("judges"), preference.EXAM_CAPTIONS
    preference.EXAM_CAPTIONS = 4
    args = preference.Args(pairs=60, steps=3)
    try:
        for name, seed in (("first", 0), ("again", 0), ("other", 1)):
            preference.main(replace(args, output=folder / "new" / f"{name}.safetensors", seed=seed))
    finally:
        preference.EXAM_CAPTIONS = exam
    return {path.stem: path.read_bytes() for path in (folder / "new").iterdir()}


def test_the_same_seed_gives_the_same_bytes(made):
    assert set(made) == {"first", "again", "other"}  # and no temporary file
    assert made["first"] == made["again"] != made["other"]


def test_the_pairs_are_images_of_training_captions(monkeypatch):
    asked = []
    pipe = lambda part, **options: asked.extend(part) or type("", (), {"images": torch.zeros(len(part), 3, 64, 64)})
    captions, images, grades = preference.draw(pipe, shapes.TRAIN, 70, 0)
    assert images.shape == (70, 4, 3, 64, 64) and images.dtype == torch.uint8 and grades.shape == (70, 4)
    assert set(asked) == set(captions) <= set(sum(shapes.TRAIN.values(), [])) and len(asked) == 280
    assert not set(sum(shapes.TRAIN.values(), [])) & set(sum(preference.EXAM["images of held-out captions"].values(), []))


def test_the_shipped_judges_are_small_and_say_how_they_were_made():
    assert {"preference", "preference-poor"} <= {path.stem for path in FILES}
    for path in FILES:
        assert path.stat().st_size <= 1_200_000
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
            assert file.metadata()["made"].startswith("Args(pairs=")
        assert sum(w.numel() for w in weights.values()) <= 300_000 and all(w.isfinite().all() for w in weights.values())
    with safe_open(FOLDER.parent / "preference.safetensors", "pt") as file:
        assert file.metadata()["made"] == str(preference.Args())


def rendered(prompts, count=200):
    """Captions, scenes that make them true, and the same scenes with one object's colour, shape or place wrong; fresh images."""
    rng = np.random.default_rng(5)
    captions = shapes.sample_captions(count, rng, (prompts,))
    scenes = [shapes.scene(caption, rng) for caption in captions]
    wrong = []
    for caption, scene in zip(captions, scenes):
        while True:
            changed, which = [replace(o) for o in scene], rng.integers(3)
            changed[0].colour = str(rng.choice(list(shapes.COLOURS))) if which == 0 else changed[0].colour
            changed[0].shape = str(rng.choice(list(shapes.SHAPES))) if which == 1 else changed[0].shape
            changed = changed[1:] if which == 2 else changed
            if not shapes.judge(shapes.render([changed]), [caption])[0][0]:
                break
        wrong.append(changed)
    images = [torch.from_numpy(shapes.render(s)) for s in (scenes, wrong)]
    return captions, *images


@pytest.mark.parametrize("prompts", [shapes.TRAIN, shapes.HELD_OUT], ids=["training", "held-out"])
def test_the_shipped_judges_order_fresh_scenes(prompts):
    captions, right, wrong = rendered(prompts)
    share = {}
    for name in ("preference", "preference-poor"):
        judge = rewards.REWARDS[name].score
        share[name] = (judge(right, captions) > judge(wrong, captions)).float().mean().item()
    assert share["preference"] > 0.85  # chance: 0.5, with a standard error of 0.035
    assert 0.55 < share["preference-poor"] < share["preference"]


def test_the_caption_matters_and_other_rows_do_not():
    captions, right, _ = rendered(shapes.HELD_OUT, 40)
    judge = rewards.REWARDS["preference"].score
    scores = judge(right, captions)
    torch.testing.assert_close(torch.cat([judge(right[i : i + 1], captions[i : i + 1]) for i in range(40)]), scores)
    others = right.roll(1, 0)  # right for another caption: scores compare images of one caption only
    false = torch.from_numpy(shapes.judge(others.numpy(), captions)[0]) == 0
    assert false.sum() > 30 and (judge(others, captions) < scores)[false].float().mean() > 0.85


def test_the_reward_is_the_judge_and_its_verdict_is_exact():
    captions, right, wrong = rendered(shapes.TRAIN, 8)
    images, prompts = torch.cat([right, wrong]), captions * 2
    reward = rewards.build("preference")
    assert reward.verdict(images, prompts).tolist() == [1.0] * 8 + [0.0] * 8 and reward.prompts == "shapes"
    both = rewards.build("preference=0.5,shapes=0.5").score(images, prompts)
    torch.testing.assert_close(both, 0.5 * reward.score(images, prompts) + 0.5 * rewards.shapes_score(images, prompts))
    assert not reward.score(images, prompts).requires_grad


def test_what_it_cannot_judge_is_refused():
    judge = rewards.REWARDS["preference"]
    with pytest.raises(ValueError, match="'a purple circle' is not a caption"):
        judge.score(torch.zeros(2, 3, 64, 64), ["a circle", "a purple circle"])
    with pytest.raises(ValueError, match="3 x 64 x 64, not 3 x 32 x 64"):
        judge.score(torch.zeros(1, 3, 32, 64), ["a circle"])
    with pytest.raises(ValueError, match="a purple circle"):
        judge.check("a purple circle")


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(pairs=59), "--pairs must be at least 60"),
        (dict(steps=0), "--steps at least 1"),
        (dict(temperature=0.0), "--temperature above 0"),
        (dict(temperature=math.nan), "--temperature above 0"),
        (dict(seed=-1), "--seed from 0"),
        (dict(output=FOLDER.parent / "shapes.py" / "judge.safetensors"), "cannot be written"),
        (dict(output=FOLDER), "must name a file"),
    ],
)
def test_bad_flags_are_answered(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        preference.main(preference.Args(**flags))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_hacked_run_is_one_whose_gold_falls_while_the_proxy_rises():
    def found(gold, proxy):
        gold, proxy = np.array(gold), np.array(proxy)
        return hacking.verdict(dict(iteration=np.arange(len(gold)) * 10.0, gold=gold, proxy=proxy, variety=gold, kl=proxy))

    rising, late = np.linspace(0, 1, 6), [0.4, 0.62, 0.7, 0.68, 0.6, 0.55]
    verdict = found(late, rising)
    assert verdict["hacked"] and verdict["peak"] == pytest.approx(2 / 3) and verdict["peak_iteration"] == 20
    assert verdict["end"] == pytest.approx(0.61) and verdict["kl"] == verdict["proxy_at_end"] == pytest.approx(0.8)
    assert not found(late, -rising)["hacked"] and not found([0.4, 0.6, 0.7, 0.7, 0.66, 0.6], rising)["hacked"]


def test_gold_at_a_distance_is_read_between_evaluations():
    curve = dict(kl=np.array([0.0, 2.0, 6.0, 4.0, 8.0]), gold=np.array([0.4, 0.4, 0.2, 0.3, 0.0]))
    assert hacking.gold_at(curve, 5.0) == pytest.approx(0.25)  # where it is first passed, not where it is passed last
    assert np.isnan(hacking.gold_at(curve, 8.0))
