"""What the loops train: which prompts, trajectories and steps, with which weight, and that no flag is without effect."""

import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from test_runs import SCRIPTS, run, scalars

import miniature
import rewards
import sampler
from miniature import shapes

QUICK = "--iterations 1 --eval-images 6 --eval-steps 1".split()


@pytest.fixture
def trained_rows(monkeypatch):
    """Fills with (sigma (n,), norm of the gradient of the velocity (n,)) of every batch of transitions that is trained."""
    rows, sde_step = [], sampler.sde_step

    def spy(v, x, sigma, *rest):
        if v.requires_grad:
            v.register_hook(lambda gradient: rows.append((sigma, gradient.flatten(1).norm(dim=1))))
        return sde_step(v, x, sigma, *rest)

    monkeypatch.setattr(sampler, "sde_step", spy)
    return rows


@pytest.mark.parametrize("script", SCRIPTS)
def test_rows_that_share_a_state_share_a_call(script, tmp_path, monkeypatch):
    """With S = 5 of T = 6 steps 256 x 6 states are sampled, of which 256 are 16; 256 x 5 are trained in two updates."""
    rows, honest = {True: 0, False: 0}, rewards.REWARDS["shapes"]

    def count(pipe, x, sigma, text, args):
        rows[torch.is_grad_enabled()] += len(x) if args.eval_steps == 2 else 0
        return x + 0 * next(p for p in pipe.transformer.parameters() if p.requires_grad).sum()

    spread = lambda images, prompts: torch.rand(len(prompts), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(sampler, "velocity", count)
    monkeypatch.setitem(rewards.REWARDS, "shapes", rewards.Reward(spread, "shapes", honest.verdict))
    flags = "--iterations 1 --ode-steps 1 --eval-images 6 --eval-steps 2 --no-compile --dtype float32 --device cpu".split()
    run(script, tmp_path / "run", *flags, small=False)
    evaluations = 2 * 6 * 2
    assert rows[False] == 256 * 5 + 16 + evaluations
    if script == "gcpo":  # whose batches hold whole chunks, so that some cut a group in two
        assert 256 * 4 + 2 * 16 <= rows[True] <= 256 * 4 + 2 * 16 + 2 * 6
    else:
        assert rows[True] == 256 * 4 + 2 * 16


@pytest.mark.parametrize("script", SCRIPTS)
def test_trains_on_training_prompts_and_is_tested_on_held_out_ones_by_the_verdict(script, tmp_path, monkeypatch):
    trained, tested = [], []

    def score(images, prompts):
        trained.extend(prompts)
        return torch.linspace(0, 1, len(prompts))

    def verdict(images, prompts):
        tested.extend(prompts)
        return torch.full((len(prompts),), 0.25)

    monkeypatch.setitem(rewards.REWARDS, "spy", rewards.Reward(score, "shapes", verdict))
    folder = run(script, tmp_path / "run", *QUICK, "--reward", "spy")
    train, held_out = (set().union(*half.values()) for half in rewards.PROMPT_SETS["shapes"])
    assert trained and set(trained) <= train and set(tested) <= held_out
    assert len(tested) == 2 * 6 and {shapes.SPECS[p].category for p in tested} == set(shapes.CATEGORIES)
    assert json.loads((folder / "result.json").read_text())["final_score"] == 0.25


@pytest.mark.parametrize("script", SCRIPTS)
def test_groups_without_spread_are_skipped(script, tmp_path, monkeypatch, trained_rows):
    constant = rewards.Reward(lambda images, prompts: torch.full((len(prompts),), 0.1), "shapes")
    monkeypatch.setitem(rewards.REWARDS, "constant", constant)
    logged = scalars(run(script, tmp_path / "run", *QUICK, "--reward", "constant"))
    assert logged["charts/groups_with_spread"] == [0] and "losses/grad_norm_0" not in logged and not trained_rows


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


@pytest.mark.parametrize("script", ["grpo", "stepwise_grpo"])
def test_step_fraction_is_the_share_of_the_steps_that_is_trained(script, tmp_path, trained_rows):
    logged = scalars(run(script, tmp_path / "run", *QUICK, "--step-fraction", "0.5"))
    assert sum(len(sigma) for sigma, _ in trained_rows) == 8 * 2 * logged["charts/groups_with_spread"][0]


def test_chunks_cover_their_own_steps_and_a_fraction_of_them_is_trained(tmp_path):
    def trained(*flags):
        logged = scalars(run("gcpo", tmp_path / str(len(flags)), *QUICK, "--chunks", "3", "1", *flags))
        return [logged[f"chunks/weight_{k}"][0] for k in range(4)]

    assert trained() == pytest.approx([4 / 6, 4 / 6, 4 / 6, 2])  # S / (K c) of GRPO's
    weights = trained("--chunk-fraction", "0.5")  # one chunk of two
    assert weights[0] == weights[1] == weights[2] and sum(weights) == pytest.approx(4)


def test_stepwise_credits_the_step_that_gained(tmp_path, monkeypatch, trained_rows):
    states = [(b, k) for b in range(8) for k in range(5) if k or b % 4 == 0]  # x_0 is judged once a group
    score = lambda images, prompts: torch.tensor([float(b % 4) * (k >= 3) for b, k in states])  # all gain is step 2's
    monkeypatch.setitem(rewards.REWARDS, "gain", rewards.Reward(score, "shapes", lambda images, prompts: torch.zeros(len(prompts))))
    run("stepwise_grpo", tmp_path / "run", *QUICK, "--updates", "1", "--normalize", "step", "--reward", "gain")
    level = sampler.schedule(StableDiffusion3Pipeline.from_pretrained(miniature.FOLDER), 5)[2]
    sigma, norm = (torch.cat(column) for column in zip(*trained_rows))
    assert len(sigma) == 32 and (norm[sigma != level] == 0).all() and (norm[sigma == level] > 0).all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_last_steps_follow_the_ode(script, tmp_path, monkeypatch):
    """With noise that moves nothing and a velocity of 1 the final image is x_0 - sigmas[S], and no state after x_S is trained."""
    decoded, trained, velocity, decode = [], set(), sampler.velocity, sampler.decode

    def ones(pipe, x, sigma, *rest):
        if torch.is_grad_enabled():
            trained.update(sigma.tolist())
        return torch.ones_like(x) + 0 * velocity(pipe, x, sigma, *rest)

    def stay(v, x, *rest):
        return x + 1e-9 * v, torch.full((len(x), 1, 1, 1), 1e-9)

    monkeypatch.setattr(sampler, "velocity", ones)
    monkeypatch.setattr(sampler, "sde_step", stay)
    monkeypatch.setattr(sampler, "decode", lambda pipe, x: decoded.append(x) or decode(pipe, x))
    spread = lambda images, prompts: torch.rand(len(prompts), generator=torch.Generator().manual_seed(0))
    monkeypatch.setitem(
        rewards.REWARDS, "rand", rewards.Reward(spread, "shapes", lambda images, prompts: torch.zeros(len(prompts)))
    )
    run(script, tmp_path / "run", *QUICK, "--ode-steps", "3", "--reward", "rand", "--prompts", "1", "--updates", "1")
    sigmas = sampler.schedule(StableDiffusion3Pipeline.from_pretrained(miniature.FOLDER), 5)
    start, _ = sampler.group_noise(SimpleNamespace(seed=0, group_size=4, steps=5, ode_steps=3), 0, 0, decoded[1].shape[1:])
    fell = (start - decoded[1]).mean((1, 2, 3))  # [0] and [2] are of the evaluations
    expected = sigmas[[0, 1, 2, 1, 2, 1, 2, 1, 2]] if script == "stepwise_grpo" else sigmas[[2, 2, 2, 2]]
    assert torch.allclose(fell, expected, atol=1e-4) and trained == set(sigmas[:2].tolist())


@pytest.mark.parametrize("ode_steps", ["1", "3"])
def test_stepwise_draws_and_judges_what_grpo_does(ode_steps, tmp_path):
    flags = [*QUICK, "--sde", "cps", "--ode-steps", ode_steps, "--substeps", "3"]
    flags = {"grpo": flags[:-2], "stepwise_grpo": flags}
    a, b = (scalars(run(s, tmp_path / s, *flags[s]))["charts/reward"] for s in flags)
    assert a == pytest.approx(b, abs=1e-5)


FLAGS = {
    "grpo": ["--no-global-std", "--guidance 3", "--shift 6", "--eta 0.5"],
    "gcpo": ["--no-global-std", "--chunk-size 3", "--distance cosine --min-chunk 1", "--chunk-size 1 --chunk-fraction 0.5"],
    "stepwise_grpo": ["--normalize step", "--substeps 3", "--substeps 3 --sde flow"],
}
FLAGS["gcpo"].append(f"{FLAGS['gcpo'][-1]} --weighted")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_changes_what_is_trained(script, tmp_path):
    variants = ["", "--clip 1", "--max-grad-norm 1e-6", *FLAGS[script]]
    runs = [run(script, tmp_path / str(i), *QUICK, *flags.split()) for i, flags in enumerate(variants)]
    assert len({(folder / "pytorch_lora_weights.safetensors").read_bytes() for folder in runs}) == len(runs)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_rollout_needs_is_freed(script, tmp_path, monkeypatch):
    """No noise is held while training, and an iteration writes into the trajectories of the one before."""
    group_noise, sde_step, noises, trajectories = sampler.group_noise, sampler.sde_step, [], []

    def spy_noise(*a):
        held = [o for o in gc.get_objects() if torch.is_tensor(o) and o.ndim == 5 and o.shape[:2] == (8, 6)]
        trajectories.append(set(map(id, held)))
        made = group_noise(*a)
        noises.extend(map(weakref.ref, made))
        return made

    def spy_step(v, *rest):
        assert not (v.requires_grad and any(noise() is not None for noise in noises))
        return sde_step(v, *rest)

    monkeypatch.setattr(sampler, "group_noise", spy_noise)
    monkeypatch.setattr(sampler, "sde_step", spy_step)
    run(script, tmp_path / "run", *QUICK, "--iterations", "2")
    assert len(noises) == 8 and trajectories[0] and trajectories[0] == trajectories[-1]
