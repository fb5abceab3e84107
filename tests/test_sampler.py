"""The sampler against stock diffusers, its noise, and its hybrid of tuned and base model."""

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


def test_the_lora_makes_the_first_steps_of_a_hybrid(monkeypatch):
    args, velocity, with_lora = grpo.Args(device="cpu", dtype="float32"), sampler.velocity, []
    pipe = families.load_pipeline(args)
    layer = next(m for m in pipe.transformer.modules() if hasattr(m, "lora_A"))
    monkeypatch.setattr(sampler, "velocity", lambda *a: with_lora.append(not layer.disable_adapters) or velocity(*a))
    sampler.sample_ode(pipe, ["a circle"], torch.zeros(1, *sampler.latent_shape(pipe)), 5, args, tuned_steps=2)
    assert with_lora == [True, True, False, False, False]


def test_training_prompts_are_drawn_from_every_category():
    drawn = rewards.sample_prompts(shapes.TRAIN, 600, np.random.default_rng(0))
    counts = np.unique([shapes.SPECS[p].category for p in drawn], return_counts=True)[1]
    assert len(counts) == 6 and counts.min() > 70 and len(set(drawn)) > 100
