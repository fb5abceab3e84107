"""What the loops train: which prompts, trajectories and steps, with which weight, and that no flag is without effect."""

import gc
import json
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from test_runs import SCRIPTS, run, scalars

import bookkeeping
import miniature
import rewards
import sampler
from miniature import shapes

QUICK = "--iterations 1 --eval-images 6 --eval-steps 1".split()


@pytest.fixture
def trained_rows(monkeypatch):
    """Fills with (sigma (n,), norm of the gradient of the velocity (n,)) of every batch of transitions that is trained."""
    rows, sde_step = [], sampler.sde_step

    def spy(v, x, sigma, *rest, **kernel):
        if v.requires_grad:
            v.register_hook(lambda gradient: rows.append((sigma, gradient.flatten(1).norm(dim=1))))
        return sde_step(v, x, sigma, *rest, **kernel)

    monkeypatch.setattr(sampler, "sde_step", spy)
    return rows


@pytest.fixture
def planted(monkeypatch):
    """Makes a function (images, prompts) -> rewards the reward `planted` of the shapes world's prompts."""

    def plant(score, verdict=None):
        monkeypatch.setitem(rewards.REWARDS, "planted", rewards.Reward(score, "shapes", verdict))
        return ["--reward", "planted"]

    return plant


def spread(images, prompts):
    return torch.rand(len(prompts), generator=torch.Generator().manual_seed(0))


def by_level(rows):
    """{step k: sorted norms of the gradients of its trained rows}, of 5 steps, from what trained_rows holds."""
    sigmas = sampler.schedule(StableDiffusion3Pipeline.from_pretrained(miniature.FOLDER), 5)
    sigma, norm = (torch.cat(column) for column in zip(*rows))
    return {k: norm[sigma == level].sort().values for k, level in enumerate(sigmas[:4])}


@pytest.mark.parametrize("script", SCRIPTS)
def test_rows_that_share_a_state_share_a_call_and_every_row_gets_its_own_velocity(script, tmp_path, monkeypatch, planted):
    """With S = 5 of T = 6 steps 256 x 6 states are sampled, of which 256 are 16; 256 x 5 are trained in two updates."""
    rows, at_noise, texts, starts = {True: 0, False: 0}, {}, [], []
    encode, rollout_noise, sde_step = sampler.encode, sampler.rollout_noise, sampler.sde_step
    own = lambda x, sigma: x.sin() * sigma.view(-1, 1, 1, 1)

    def velocity(pipe, x, sigma, text, args):
        rows[torch.is_grad_enabled()] += len(x)
        at_noise.update({tuple(z[0, 0].tolist()): p for z, p, s in zip(x, text.pooled, sigma) if s == 1})
        return own(x, sigma) + 0 * next(p for p in pipe.transformer.parameters() if p.requires_grad).sum()

    def step(v, x, sigma, *rest, **kernel):
        assert v.ndim == 1 or torch.equal(v, own(x, sigma))  # a schedule's std is asked for with numbers in the place of latents
        return sde_step(v, x, sigma, *rest, **kernel)

    monkeypatch.setattr(sampler, "velocity", velocity)
    monkeypatch.setattr(sampler, "sde_step", step)
    monkeypatch.setattr(sampler, "path_kl", lambda pipe, prompts, noise, args: torch.zeros(len(prompts)))
    monkeypatch.setattr(sampler, "encode", lambda *a: texts.append(encode(*a)) or texts[-1])
    monkeypatch.setattr(sampler, "rollout_noise", lambda *a: starts.append(rollout_noise(*a)) or starts[-1])
    flags = "--iterations 1 --ode-steps 1 --beta 0 --eval-images 6 --eval-steps 2 --no-compile --dtype float32 --device cpu".split()
    run(script, tmp_path / "run", *flags, *planted(spread), small=False)
    evaluations = 2 * 6 * 2
    assert rows[False] == 256 * 5 + 16 + evaluations
    if script == "gcpo":  # whose batches hold whole chunks, so that some cut a group in two
        assert 256 * 4 + 2 * 16 <= rows[True] <= 256 * 4 + 2 * 16 + 2 * 6
    else:
        assert rows[True] == 256 * 4 + 2 * 16
    (pooled,), ((start, _),) = [text.pooled for text in texts if len(text.pooled) == 16], starts
    assert all(torch.equal(at_noise[tuple(z[0, 0].tolist())], p) for z, p in zip(start, pooled))


@pytest.mark.parametrize("script", SCRIPTS)
def test_trains_on_training_prompts_and_is_tested_on_held_out_ones_by_the_exact_verdict(script, tmp_path, monkeypatch, planted):
    """Whatever the reward; of another one its mean on the same images is told too."""
    scored, verdicts = [], [[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]

    def score(images, prompts):
        scored.append(prompts)
        return torch.linspace(0, 0.5, len(prompts))

    def examine(images, prompts):
        tested.append(prompts)
        return np.array(verdicts[len(tested) - 1]), None, ["0rci"] * 6

    def verdict(images, prompts):
        raise AssertionError("the miniature's verdict is its verifier's")

    tested = []
    monkeypatch.setattr(bookkeeping.shapes, "examine", examine)
    folder = run(script, tmp_path / "run", *QUICK, *planted(score, verdict))
    train, held_out = (set().union(*half.values()) for half in rewards.PROMPT_SETS["shapes"])
    before, *trained, after = scored
    assert before == after == tested[0] == tested[1] and {shapes.SPECS[p].category for p in before} == set(shapes.CATEGORIES)
    assert set(before) <= held_out and trained and set().union(*trained) <= train
    result, logged = json.loads((folder / "result.json").read_text()), scalars(folder)
    assert (result["base_score"], result["final_score"]) == (1 / 6, 0.5) and result["final_reward"] == pytest.approx(0.25)
    assert logged["charts/held_out_score"] == pytest.approx([1 / 6, 0.5])
    assert logged["charts/held_out_reward"] == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_reward_without_differences_trains_nothing(script, tmp_path, planted, trained_rows):
    constant = planted(lambda images, prompts: torch.full((len(prompts),), 0.1))
    logged = scalars(run(script, tmp_path / "run", *QUICK, *constant))
    assert logged["charts/images_with_signal"] == [0] and "losses/grad_norm_0" not in logged and not trained_rows


@pytest.mark.parametrize("script", SCRIPTS)
def test_images_without_advantage_are_left_out(script, tmp_path, planted, trained_rows):
    """Of the first group's rewards two are its mean; the second's are all alike. Stepwise: nobody gains before the last state."""
    calls = []

    def score(images, prompts):
        calls.append(len(prompts))
        final = script != "stepwise_grpo" or calls.count(8) == 4  # its states 1 to 4
        return torch.tensor([0, 0.5, 0.5, 1, 0.3, 0.3, 0.3, 0.3]) * final if len(prompts) == 8 else torch.zeros(len(prompts))

    step = ["--normalize", "step"] if script == "stepwise_grpo" else []
    logged = scalars(run(script, tmp_path / "run", *QUICK, *step, *planted(score)))
    trained = by_level(trained_rows)
    assert logged["charts/images_with_signal"] == [0.25] and all(len(norm) == 2 for norm in trained.values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_micro_batches_do_not_change_the_gradient(script, tmp_path):
    flags = [*QUICK, "--updates", "1", "--beta", "0.1", *(["--chunks", "1", "3"] if script == "gcpo" else [])]
    whole, parts = (scalars(run(script, tmp_path / n, *flags, "--micro-batch", n))["losses/grad_norm_0"] for n in ("128", "5"))
    assert whole == pytest.approx(parts, rel=1e-3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_kl_term_holds_the_policy_back(script, tmp_path):
    flags = [*QUICK, "--iterations", "3", "--updates", "1", "--no-anneal-lr"]
    free, held = (scalars(run(script, tmp_path / beta, *flags, "--beta", beta))["losses/kl_0"] for beta in ("1e-9", "1e4"))
    assert free[1] == pytest.approx(held[1], rel=1e-3)  # the first update starts at the reference, where the KL has no slope
    assert held[2] < free[2] / 2


def test_a_step_of_a_chunk_of_c_weighs_s_over_k_c_times_what_it_weighs_in_grpo(tmp_path, trained_rows):
    def gradients(script, *flags):
        trained_rows.clear()
        run(script, tmp_path / str(len(flags)), *QUICK, "--updates", "1", *flags)
        return by_level(trained_rows)

    plain, chunked = gradients("grpo"), gradients("gcpo", "--chunks", "3", "1")
    for k, factor in enumerate([4 / 6, 4 / 6, 4 / 6, 2]):
        assert len(plain[k]) == len(chunked[k]) > 1
        torch.testing.assert_close(chunked[k], factor * plain[k], rtol=1e-3, atol=0)
    drawn = gradients("gcpo", "--chunks", "3", "1", "--chunk-fraction", "0.5")  # one chunk of two, which weighs twice as much
    counts = [len(drawn[k]) for k in range(4)]
    assert counts[0] == counts[1] == counts[2] > 0 < counts[3] and counts[0] + counts[3] == len(plain[0])
    assert all((norm / (2 * chunked[3]) - 1).abs().min() < 1e-3 for norm in drawn[3])


def test_stepwise_credits_the_step_that_gained(tmp_path, planted, trained_rows):
    judged = []

    def score(images, prompts):  # x_0 is judged once a group, then the eight images' states one after another
        judged.append(len(prompts))
        return torch.arange(8.0) % 4 * (judged.count(8) >= 3) if len(prompts) == 8 else torch.zeros(len(prompts))

    run("stepwise_grpo", tmp_path / "run", *QUICK, "--updates", "1", "--normalize", "step", *planted(score))
    assert judged == [6, 2, 8, 8, 8, 8, 6]  # the first and the last are evaluations
    norms = by_level(trained_rows)
    assert all(len(norm) == 8 and (norm > 0).all() if k == 2 else (norm == 0).all() for k, norm in norms.items())


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_last_steps_follow_the_ode(script, tmp_path, monkeypatch, planted):
    """With noise that moves nothing and a velocity of 1 the final image is x_0 - sigmas[S], and no state after x_S is trained."""
    decoded, trained, velocity, decode = [], set(), sampler.velocity, sampler.decode

    def ones(pipe, x, sigma, *rest):
        if torch.is_grad_enabled():
            trained.update(sigma.tolist())
        return torch.ones_like(x) + 0 * velocity(pipe, x, sigma, *rest)

    def stay(v, x, *rest, **kernel):
        return x + 1e-9 * v, torch.full((len(x), *[1] * (x.ndim - 1)), 1e-9)

    monkeypatch.setattr(sampler, "velocity", ones)
    monkeypatch.setattr(sampler, "sde_step", stay)
    monkeypatch.setattr(sampler, "decode", lambda pipe, x: decoded.append(x) or decode(pipe, x))
    run(script, tmp_path / "run", *QUICK, "--ode-steps", "3", *planted(spread), "--prompts", "1", "--updates", "1")
    sigmas = sampler.schedule(StableDiffusion3Pipeline.from_pretrained(miniature.FOLDER), 5)
    noise = SimpleNamespace(seed=0, group_size=4, steps=5, ode_steps=3)
    start, _ = sampler.rollout_noise(noise, 0, [0], decoded[0].shape[1:])
    fell = (start - torch.cat(decoded[1:-1])).mean((1, 2, 3))  # the first and the last are of evaluations
    # Stepwise decodes the estimates of x_0, one for the group, of x_1 and the images; they are where the velocity leads.
    expected = sigmas[[0, 1, 1, 1, 1, 2, 2, 2, 2]] if script == "stepwise_grpo" else sigmas[[2, 2, 2, 2]]
    assert torch.allclose(fell, expected, atol=1e-4) and trained == set(sigmas[:2].tolist())


@pytest.mark.parametrize("ode_steps", ["1", "3"])
def test_stepwise_draws_and_judges_what_grpo_does(ode_steps, tmp_path):
    flags = [*QUICK, "--sde", "cps", "--ode-steps", ode_steps, "--substeps", "3"]
    flags = {"grpo": flags[:-2], "stepwise_grpo": flags}
    a, b = (scalars(run(s, tmp_path / s, *flags[s]))["charts/reward"] for s in flags)
    assert a == pytest.approx(b, abs=1e-5)


FLAGS = {
    "grpo": "--no-global-std|--guidance 3|--shift 6|--eta 0.5|--max-grad-norm 1e-6|--step-weights std|--step-weights guard",
    "gcpo": "--no-global-std|--chunk-size 3|--distance cosine --max-chunk 1|--step-weights std2|--prompts 6 --chunk-fraction 0.5|"
    "--prompts 6 --chunk-fraction 0.5 --weighted",
    "stepwise_grpo": "--normalize step|--substeps 3|--substeps 3 --sde flow|--step-weights std2",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_changes_what_is_trained(script, tmp_path):
    variants = ["", "--clip 1", *FLAGS[script].split("|")]
    runs = [run(script, tmp_path / str(i), *QUICK, *flags.split()) for i, flags in enumerate(variants)]
    assert len({(folder / "pytorch_lora_weights.safetensors").read_bytes() for folder in runs}) == len(runs)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_weights_of_steps_scale_their_gradients(script, tmp_path, trained_rows):
    """On-policy: a step's gradient is w_k times what it is without; its log-probability is weighted in the rollout as well."""
    norms = {}
    for kind in ("none", "std2"):
        trained_rows.clear()
        flags = ["--updates", "1", "--step-weights", kind, *(["--chunk-size", "2"] if script == "gcpo" else [])]
        logged = scalars(run(script, tmp_path / kind, *QUICK, *flags))
        assert logged["losses/ratio_0"][0] == pytest.approx(1, abs=1e-6)
        norms[kind] = by_level(trained_rows)
    sigmas = sampler.schedule(StableDiffusion3Pipeline.from_pretrained(miniature.FOLDER), 5)
    weights = sampler.step_weights("std2", sigmas[1:5], sigmas.diff()[:4])  # cps' std is a factor times the next sigma
    for k in range(4):
        torch.testing.assert_close(norms["std2"][k], weights[k] * norms["none"][k], rtol=2e-3, atol=0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_rollout_needs_is_freed(script, tmp_path, monkeypatch):
    """No noise is held while training, and an iteration writes into the trajectories of the one before."""
    rollout_noise, sde_step, noises, held = sampler.rollout_noise, sampler.sde_step, [], []
    large = lambda: [o for o in gc.get_objects() if torch.is_tensor(o) and o.ndim == 5 and o.shape[:2] == (8, 6)]
    others, training = large(), []  # the others are of runs before this one

    def spy_noise(*a):
        # kept, so that nothing of a later iteration can take its place in memory
        held.append([o for o in large() if not any(o is other for other in others)])
        start, noise = rollout_noise(*a)
        noises.append(weakref.ref(noise))
        return start, noise

    def spy_step(v, *rest, **kernel):
        if v.requires_grad:
            training.append(any(noise() is not None for noise in noises))
        return sde_step(v, *rest, **kernel)

    monkeypatch.setattr(sampler, "rollout_noise", spy_noise)
    monkeypatch.setattr(sampler, "sde_step", spy_step)
    run(script, tmp_path / "run", *QUICK, "--iterations", "3")
    assert len(noises) == 3 and training and not any(training)
    assert [len(tensors) for tensors in held] == [1, 1, 1] and held[0][0] is held[1][0] is held[2][0]
