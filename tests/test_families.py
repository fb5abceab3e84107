"""FLUX.1 and FLUX.2 klein on small random pipelines of their classes: against stock diffusers, through every script, bad input."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from test_real import LORA, evaluate
from test_runs import SCRIPTS, run

import arguments
import bookkeeping
import families
import grpo
import miniature
import sampler
from experiments import bench, random_weights
from families import text

SIZES = dict(num_layers=2, num_single_layers=2, num_attention_heads=2, attention_head_dim=16)
FLUX = SIZES | dict(axes_dims_rope=(4, 6, 6), joint_attention_dim=32, pooled_projection_dim=16)
KLEIN = SIZES | dict(axes_dims_rope=(4, 4, 4, 4), joint_attention_dim=48)
PROMPTS = ["a red circle", "a horse, a sign and a cross"]
PROMPT_FILE = "a horse\na sign\na cross\na cat\na blue circle\ntwo dogs\na red tree\na yellow sun\n"
FLAGS = "--resolution 64 --prompts 2 --group-size 4 --steps 4 --eval-images 4 --eval-steps 3 --text-length 8".split()
FLAGS += "--micro-batch 8 --reward jpeg-compressibility --dtype float32 --device cpu --no-compile".split()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """{name: folder} of flux, schnell (which knows no guidance and has a constant shift), klein and the distilled klein."""
    root = tmp_path_factory.mktemp("families")
    torch.manual_seed(0)
    small_vae = dict(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False)
    pipes = {}
    for name in ("flux", "schnell"):
        transformer = random_weights.transformer("flux", **FLUX | dict(guidance_embeds=name == "flux"))
        vae = AutoencoderKL.from_pretrained(miniature.FOLDER / "vae")  # a random decoder's images hardly depend on the latents
        pipes[name] = random_weights.pipeline("flux", transformer, vae)
    pipes["schnell"].scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    for name in ("klein", "distilled"):
        vae = random_weights.vae("klein", **small_vae)
        vae.bn.running_mean.normal_(), vae.bn.running_var.uniform_(0.5, 2)
        pipes[name] = random_weights.pipeline("klein", random_weights.transformer("klein", **KLEIN), vae)
    pipes["distilled"].register_to_config(is_distilled=True)
    for name, pipe in pipes.items():
        torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.3)  # a velocity of about the noise's size
        pipe.save_pretrained(root / name)
    return {name: str(root / name) for name in pipes}


def loaded(model, **options):
    args = grpo.Args(model=str(model), device="cpu", dtype="float32", resolution=64, text_length=8, **options)
    return args, families.load_pipeline(args)


def train(script, model, folder, *flags):
    (prompts := folder.parent / "prompts.txt").write_text(PROMPT_FILE)
    return run(script, folder, "--model", model, *FLAGS, "--prompt-file", str(prompts), *flags, small=False)


def stock(folder, noise, guidance, output_type, lora=None):
    """What the stock pipeline makes of the noise (B, C, H, W) in four steps, and its noise levels."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    if lora:
        pipe.load_lora_weights(lora)
    packed = torch.nn.functional.pixel_unshuffle(noise, 2)
    if type(pipe).__name__ == "FluxPipeline":
        packed = pipe._pack_latents(noise, *noise.shape)
    options = dict(num_inference_steps=4, guidance_scale=guidance, max_sequence_length=8, output_type=output_type)
    height, width = (8 * n for n in noise.shape[2:])
    images = pipe(prompt=PROMPTS, latents=packed, height=height, width=width, **options).images
    if type(pipe).__name__ == "FluxPipeline" and output_type == "latent":
        images = pipe._unpack_latents(images, height, width, 8)
    return images, pipe.scheduler.sigmas


CASES = [("flux", 3.5), ("flux", 1.0), ("schnell", 3.5), ("klein", 4.0), ("klein", 1.0), ("distilled", 4.0)]


@pytest.mark.parametrize("sides", [(8, 8), (8, 12)])
@pytest.mark.parametrize("name, guidance", CASES)
def test_four_steps_are_those_of_stock_diffusers(name, guidance, sides, models):
    args, pipe = loaded(models[name], guidance=guidance)
    noise = torch.randn(2, pipe.vae.config.latent_channels, *sides, generator=torch.Generator().manual_seed(0))
    pipe.image_tokens = math.prod(sides) // 4
    expected, levels = stock(models[name], noise, guidance, "latent")
    sigmas, text, x = sampler.schedule(pipe, 4), sampler.encode(pipe, PROMPTS, args), noise
    assert torch.equal(sigmas, levels) and sigmas[0] == 1
    with torch.no_grad():
        for k in range(4):
            x = x + sampler.velocity(pipe, x, sigmas[k].expand(2), text, args) * (sigmas[k + 1] - sigmas[k])
    x = families.klein.to_vae(pipe, x) if name in ("klein", "distilled") else x  # as far as its pipeline goes for latents
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    assert (x - noise).abs().mean() > 0.1 and (x[0] - x[1] - noise[0] + noise[1]).abs().mean() > 1e-3


@pytest.mark.parametrize("name, guidance", [("flux", 3.5), ("klein", 4.0)])
def test_images_are_those_of_stock_diffusers(name, guidance, models):
    args, pipe = loaded(models[name], guidance=guidance)
    noise = torch.randn(2, *sampler.latent_shape(pipe, 64), generator=torch.Generator().manual_seed(0))
    expected, _ = stock(models[name], noise, guidance, "pt")
    torch.testing.assert_close(sampler.sample_ode(pipe, PROMPTS, noise, 4, args), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, guided", [("flux", True), ("schnell", False), ("klein", True), ("distilled", False)])
def test_guidance_reaches_what_takes_it(name, guided, models):
    velocities = []
    for guidance in (1.5, 4.0):
        args, pipe = loaded(models[name], guidance=guidance)
        x = torch.randn(2, *sampler.latent_shape(pipe, 64), generator=torch.Generator().manual_seed(0))
        velocities.append(sampler.velocity(pipe, x, torch.full((2,), 0.7), sampler.encode(pipe, PROMPTS, args), args))
    assert torch.equal(*velocities) != guided


@pytest.mark.parametrize("name", ["flux", "klein", "schnell"])
def test_a_constant_shift_takes_the_place_of_the_pipelines_own(name, models):
    own, shifted = (sampler.schedule(loaded(models[name], shift=shift)[1], 5) for shift in (0.0, 3.0))
    plain = torch.linspace(1, 0, 6)
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    assert (own[1:-1] != shifted[1:-1]).all()


def test_tokens_are_counted_as_the_transformer_counts_them(models, full_sd3):
    for folder in (full_sd3, models["flux"], models["klein"]):
        (args, pipe), seen = loaded(folder), []
        pipe.transformer.norm_out.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0].shape[1]))
        x = torch.zeros(2, *sampler.latent_shape(pipe, 64))
        sampler.velocity(pipe, x, torch.full((2,), 0.7), sampler.encode(pipe, PROMPTS, args), args)
        assert seen == [pipe.image_tokens]


def test_the_lora_is_on_these_matrices(models):
    def learning(name):
        modules = dict(loaded(models[name])[1].transformer.named_modules())
        return {n.removesuffix(".lora_A.default") for n in modules if n.endswith(".lora_A.default")}

    double = {f"attn.{m}" for m in "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()}
    names = [double | {f"{ff}.net.{layer}" for ff in ("ff", "ff_context") for layer in ("0.proj", "2")}, double]
    singles = [{"attn.to_q", "attn.to_k", "attn.to_v"}, {"attn.to_qkv_mlp_proj"}]
    for family, in_double, in_single in zip(("flux", "klein"), names, singles):
        expected = {f"transformer_blocks.{i}.{m}" for i in range(2) for m in in_double}
        assert learning(family) == expected | {f"single_transformer_blocks.{i}.{m}" for i in range(2) for m in in_single}


def test_encoded_prompts_are_forgotten_by_their_bytes(models, monkeypatch):
    args, pipe = loaded(models["klein"])
    first = sampler.encode(pipe, PROMPTS, args)
    known = pipe.encoded_prompts
    size = 3 * 8 * 48 * 4  # two prompts and the empty one
    assert sum(t.nbytes for tensors in known.values() for t in tensors) == size
    monkeypatch.setattr(text, "TEXT_CACHE", size)
    sampler.encode(pipe, ["a cross"], args)
    assert set(known) == {*PROMPTS, "", "a cross"}
    sampler.encode(pipe, ["a sign"], args)
    assert set(known) == {"", "a sign"}
    assert torch.equal(first.embeds, sampler.encode(pipe, PROMPTS, args).embeds)


# The scripts


@pytest.mark.parametrize("name", ["flux", "klein"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_resumes_to_the_same_bytes_and_stock_diffusers_loads_its_lora(script, name, models, tmp_path):
    flags = ["--lr", "1e-3", "--beta", "0.01", *(["--chunk-size", "2"] if script == "gcpo" else [])]
    folder = train(script, models[name], tmp_path / "run", *flags, "--iterations", "2")
    saved = json.loads((folder / "args.json").read_text())
    assert (saved["guidance"], saved["rank"], saved["shift"]) == {"flux": (3.5, 64, 3.0), "klein": (4.0, 32, 0.0)}[name]
    half = train(script, models[name], tmp_path / "half", *flags, "--iterations", "1")
    assert (half / LORA).read_bytes() != (folder / LORA).read_bytes()
    run(script, half, "--resume", str(half), "--iterations", "2", small=False)
    assert (half / LORA).read_bytes() == (folder / LORA).read_bytes()
    args, pipe = loaded(models[name], guidance=saved["guidance"], rank=saved["rank"])
    noise = torch.randn(2, *sampler.latent_shape(pipe, 64), generator=torch.Generator().manual_seed(0))
    before = sampler.sample_ode(pipe, PROMPTS, noise, 4, args)
    families.set_lora(pipe, {n.removeprefix("transformer."): w for n, w in load_file(folder / LORA).items()})
    after = sampler.sample_ode(pipe, PROMPTS, noise, 4, args)
    torch.testing.assert_close(stock(models[name], noise, saved["guidance"], "pt", lora=folder)[0], after, rtol=0, atol=1e-5)
    assert (before - after).abs().max() > 1e-4


def test_flux_learns_jpeg_compressibility(models, tmp_path):
    flags = "--iterations 12 --prompts 4 --group-size 8 --lr 3e-3 --clip 1e-2 --micro-batch 64 --eval-images 24".split()
    folder = train("grpo", models["flux"], tmp_path / "run", *flags, "--no-gradient-checkpointing")
    result = json.loads((folder / "result.json").read_text())
    assert result["final_score"] > result["base_score"] + 0.1


@pytest.mark.parametrize("name", ["flux", "klein"])
def test_evaluate_scores_a_run_as_the_run_did(name, models, tmp_path):
    folder = train("grpo", models[name], tmp_path / "run", "--iterations", "1", "--lr", "1e-2")
    result = json.loads((folder / "result.json").read_text())
    common = ["--lora", str(folder), "--dtype", "float32", "--device", "cpu"]
    for hybrid, score in (("1", result["final_score"]), ("0", result["base_score"])):
        evaluate(*common, "--hybrid", hybrid, "--output-dir", str(tmp_path / hybrid))
        assert json.loads((tmp_path / hybrid / "evaluation.json").read_text())["score"] == score
    assert result["final_score"] != result["base_score"]


# Presets and bad input


def test_a_folder_starts_from_the_settings_of_its_family(models, full_sd3):
    for model, name in ((models["schnell"], "flux"), (models["klein"], "klein"), (full_sd3, "sd3")):
        assert arguments.preset_of(str(model)) == families.of_model(name).PRESET == arguments.preset_of(name)
    assert arguments.preset_of(str(miniature.FOLDER)) == arguments.preset_of("tiny") == {}


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("flux", "--resolution 72", "must be a multiple of 16 up to 1408"),
        ("flux", "--resolution 1424", "must be a multiple of 16 up to 1408"),
        ("klein", "--resolution 72", "must be a multiple of 16 up to 2048"),
        ("flux", "--shift -1", "--shift -1.0 must be a number from 0 up"),
        ("another", "", "the families known here are StableDiffusion3Pipeline, FluxPipeline, Flux2KleinPipeline"),
        ("broken", "", "could not be loaded"),
    ],
)
def test_bad_input_gets_one_sentence(name, flags, message, models, tmp_path, capsys):
    folder = models.get(name, str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}' if name == "another" else "{")
    with pytest.raises(SystemExit) as stop:
        run("grpo", tmp_path / "run", "--model", folder, *FLAGS, *flags.split(), small=False)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_the_family_is_known_before_a_reward_is_loaded(models, monkeypatch, tmp_path):
    loaded = []
    monkeypatch.setattr(bookkeeping.rewards, "load", loaded.append)
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    with pytest.raises(SystemExit):
        bookkeeping.load(SimpleNamespace(model=str(tmp_path), reward="hpsv3"))
    assert not loaded


# Full size


@pytest.mark.parametrize("family, billions", [("sd3", 2.2), ("flux", 11.9), ("klein", 3.9)])
def test_random_weights_have_the_real_size(family, billions):
    with torch.device("meta"):
        transformer, vae = random_weights.transformer(family), random_weights.vae(family)
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(billions, abs=0.05)
    assert vae.config.latent_channels == (32 if family == "klein" else 16)


def test_the_bench_saves_what_the_scripts_load(monkeypatch, tmp_path):
    depth = dict(num_layers=1, num_attention_heads=2, attention_head_dim=16, caption_projection_dim=32, dual_attention_layers=(0,))
    small = {"sd3": depth | dict(joint_attention_dim=128, pooled_projection_dim=64), "flux": FLUX, "klein": KLEIN}
    vae = dict(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4)
    monkeypatch.setattr(random_weights, "FULL", {f: (config | small[f], v | vae) for f, (config, v) in random_weights.FULL.items()})
    for family in small:
        bench.random_model(family, tmp_path / family)
        args, pipe = loaded(tmp_path / family)
        x = torch.randn(2, *sampler.latent_shape(pipe, 64), generator=torch.Generator().manual_seed(0))
        assert sampler.velocity(pipe, x, torch.full((2,), 0.7), sampler.encode(pipe, PROMPTS, args), args).std() > 0.01


def test_prompts_are_encoded_in_the_order_of_their_use_and_the_encoders_dropped(models, monkeypatch):
    args, pipe = loaded(models["flux"])
    seen, encode = [], families.flux.encode
    monkeypatch.setattr(families.flux, "encode", lambda pipe, prompt, *rest: seen.append(prompt) or encode(pipe, prompt, *rest))
    text.encode_ahead(pipe, ["a cross", "a sign", "a cross", "a horse"], args)
    assert seen == ["", "a cross", "a sign", "a horse"] and pipe.text_encoder is None and pipe.text_encoder_2 is None
    sampler.encode(pipe, ["a horse"], args)  # known
    args, pipe = loaded(models["flux"])
    monkeypatch.setattr(text, "TEXT_CACHE", 1)  # room for one prompt alone: the encoders are needed again
    text.encode_ahead(pipe, ["a cross", "a sign"], args)
    assert pipe.text_encoder is not None and sampler.encode(pipe, ["a sign"], args).embeds.shape[0] == 1


def test_the_adapter_is_back_after_an_error(models):
    _, pipe = loaded(models["flux"])
    layer = next(m for m in pipe.transformer.modules() if hasattr(m, "lora_A"))
    with pytest.raises(KeyError), families.adapter_off(pipe):
        assert layer.disable_adapters
        raise KeyError
    assert not layer.disable_adapters
