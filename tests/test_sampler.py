"""The sampler against stock diffusers, its noise, and its hybrid of tuned and base model."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import families
import grpo
import rewards
import sampler
from miniature import shapes


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_sampler_draws_what_stock_diffusers_draws(guidance):
    prompts = ["two red circles", "a cross", "a circle left of a square"]
    args = grpo.Args(device="cpu", dtype="float32", guidance=guidance, micro_batch=2)
    pipe = families.load_pipeline(args)
    noise = torch.randn(3, *sampler.latent_shape(pipe), generator=torch.Generator().manual_seed(0))
    stock = StableDiffusion3Pipeline.from_pretrained(families.MODELS["tiny"])
    options = dict(num_inference_steps=4, output_type="pt", max_sequence_length=1, guidance_scale=guidance)
    expected = stock(prompts, latents=noise.clone(), **options).images
    torch.testing.assert_close(sampler.sample_ode(pipe, prompts, noise, 4, args), expected, rtol=0, atol=1e-4)


def test_every_group_has_noise_of_its_own():
    def draw(seed, iteration, groups):
        args = grpo.Args(seed=seed, group_size=3, steps=4, ode_steps=1)
        return sampler.rollout_noise(args, iteration, groups, (2, 2))

    start, steps = draw(0, 0, [0])
    assert start.shape == (1, 2, 2) and steps.shape == (3, 3, 2, 2)  # one start for the group, three steps of each of its images
    assert len(steps.flatten(0, 1).flatten(1).unique(dim=0)) == 9
    assert all((start != s).all() and (steps != n).all() for s, n in (draw(1, 0, [0]), draw(0, 1, [0]), draw(0, 0, [1])))
    starts, both = draw(0, 0, [1, 0])  # whatever else a process draws
    assert torch.equal(starts[1:], start) and torch.equal(both[3:], steps)


def test_the_lora_makes_the_steps_of_a_hybrid_alone(monkeypatch):
    args, velocity, with_lora = grpo.Args(device="cpu", dtype="float32"), sampler.velocity, []
    pipe = families.load_pipeline(args)
    layer = next(m for m in pipe.transformer.modules() if hasattr(m, "lora_A"))
    monkeypatch.setattr(sampler, "velocity", lambda *a: with_lora.append(not layer.disable_adapters) or velocity(*a))
    sampler.sample_ode(pipe, ["a circle"], torch.zeros(1, *sampler.latent_shape(pipe)), 5, args, tuned_steps=range(2))
    assert with_lora == [True, True, False, False, False]
    with_lora.clear()
    sampler.sample_ode(pipe, ["a circle"], torch.zeros(1, *sampler.latent_shape(pipe)), 3, args, tuned_steps={0, 2})
    assert with_lora == [True, False, True]


def test_training_prompts_are_drawn_from_every_category():
    drawn = rewards.sample_prompts(shapes.TRAIN, 600, np.random.default_rng(0))
    counts = np.unique([shapes.SPECS[p].category for p in drawn], return_counts=True)[1]
    assert len(counts) == 6 and counts.min() > 70 and len(set(drawn)) > 100


@pytest.mark.parametrize("sde", ["flow", "cps"])
def test_the_kl_of_a_path_in_closed_form_and_as_the_mean_log_ratio(sde, monkeypatch):
    """Of a policy whose velocity is the model's plus a number, so that its steps' means differ by a number of stds in each of
    D dimensions; and of one whose difference depends on x, by the log ratios of paths that it draws."""
    args = grpo.Args(device="cpu", dtype="float32", steps=5, ode_steps=2, sde=sde, eta=0.6, micro_batch=4000)
    pipe = families.load_pipeline(args)
    sigmas, S = sampler.schedule(pipe, args.steps), 3
    tuned, paths = [True], []

    @contextmanager
    def adapter_off(_):
        tuned[0] = False
        yield
        tuned[0] = True

    def velocity(pipe, x, sigma, text, args):
        paths.append(x)
        return -x + (moved(x) if tuned[0] else 0)

    monkeypatch.setattr(families, "adapter_off", adapter_off)
    monkeypatch.setattr(sampler, "velocity", velocity)
    kernel = dict(sigma_max=sigmas[1].item(), eta=args.eta, sde=sde)

    def step(k, x, v):
        return sampler.sde_step(v, x, sigmas[k], sigmas[k + 1], **kernel)

    moved = lambda x: torch.full_like(x, 0.3)
    one = torch.ones(1, 1)
    by_hand = [((step(k, one, 0.3 * one)[0] - step(k, one, 0 * one)[0]) / step(k, one, one)[1]) ** 2 / 2 * 6 for k in range(S)]
    noise = torch.randn(4000, S + 1, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    found = sampler.path_kl(pipe, ["a circle"] * 2, noise[:2], args)
    assert found.tolist() == pytest.approx([sum(by_hand).item()] * 2, rel=1e-4)

    moved = lambda x: x.tanh()
    paths.clear()
    found = sampler.path_kl(pipe, ["a circle"] * 4000, noise, args)
    states, ratios = paths[::2], []
    for k in range(S - 1):  # the last state is not asked for its velocity
        x = states[k]
        log_p = [grpo.log_prob(states[k + 1], *step(k, x, -x + d)) * 6 for d in (moved(x), 0)]
        ratios.append(log_p[0] - log_p[1])
    last = states[-1]
    (mean, std), (mean_ref, _) = (step(2, last, -last + d) for d in (moved(last), 0))
    rest = ((mean - mean_ref) ** 2 / (2 * std**2)).flatten(1).sum(1)
    estimate = sum(ratios) + rest
    error = (estimate - found).std() / len(found) ** 0.5
    assert abs(estimate.mean() - found.mean()) < 3 * error and error < 0.05 * found.mean()
