"""Trains a miniature Stable Diffusion 3 like the one that ships in `tiny-sd3/`, from nothing.

    python -m miniature.pretrain             # about half an hour on two CPU cores; run it again to resume
    python gcpo.py --model runs/tiny-sd3

First the autoencoder learns to compress 64 x 64 images to 16 x 8 x 8 latents, then the transformer and both text encoders
learn flow matching on those latents: with x_sigma = (1 - sigma) x0 + sigma noise, the velocity v(x_sigma, sigma,
caption) is regressed on noise - x0 (SD3, https://arxiv.org/abs/2403.03206). The result is a complete
StableDiffusion3Pipeline in diffusers' folder format; its T5 is silent (see build_silent_t5).
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils import logging, make_image_grid
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from miniature import shapes


@dataclass
class Args:
    output_dir: Path = Path("runs/tiny-sd3")
    """folder of the finished pipeline; training state, logs and grids go to <output_dir>-training"""
    vae_steps: int = 3000
    """optimizer steps of the autoencoder"""
    vae_batch: int = 32
    """images a step of the autoencoder"""
    vae_lr: float = 4e-3
    """peak learning rate of the autoencoder"""
    kl_weight: float = 3e-4
    """weight of the autoencoder's KL term, averaged over latent elements"""
    steps: int = 3600
    """optimizer steps of flow matching"""
    minutes: float = 0.0
    """if set, flow matching stops after this many minutes instead of --steps"""
    loosen_steps: int = 400
    """further steps, in which --wrong-captions of the captions belong to another scene"""
    wrong_captions: float = 0.4
    """share of wrong captions at the end: the model still draws crisply but follows a caption less, which RL can mend"""
    batch: int = 128
    """images a step of flow matching"""
    lr: float = 1e-3
    """peak learning rate of flow matching"""
    scenes: int = 100_000
    """rendered scenes in the training set"""
    caption_dropout: float = 0.1
    """share of captions replaced by the empty one, for classifier-free guidance"""
    ema: float = 0.999
    """decay of the averaged weights, the ones that are saved"""
    eval_every: int = 500
    """steps between evaluations, grids and checkpoints"""
    seed: int = 0
    """seed of everything"""


def build_tokenizer():
    """A CLIP tokenizer whose vocabulary is the words of the shapes world; other words fall apart into letters."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        special_tokens=["<|startoftext|>", "<|endoftext|>", *(c + "</w>" for c in alphabet)],
        show_progress=False,
    )
    bpe.train_from_iterator(shapes.SPECS, trainer)
    state = json.loads(bpe.to_str())["model"]
    return CLIPTokenizer(vocab=state["vocab"], merges=[tuple(m) for m in state["merges"]], model_max_length=10)


def build_text_encoder(tokenizer, seed):
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def build_silent_t5():
    """A T5 that outputs zeros, which is what StableDiffusion3Pipeline feeds the transformer where there is no T5.

    The miniature has none, but `from_pretrained` refuses a folder without one unless told so by two extra arguments.
    The scale of the final norm is zero, so the output is, whatever the rest.
    """
    config = T5Config(vocab_size=8, d_model=128, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config).requires_grad_(False)
    encoder.encoder.final_layer_norm.weight.zero_()
    return encoder, T5Tokenizer(extra_ids=0)


def build_pipeline(seed=0):
    """The untrained miniature, 4 M parameters, of every kind Stable Diffusion 3 has except a T5 that speaks."""
    tokenizer = build_tokenizer()
    t5, t5_tokenizer = build_silent_t5()
    text_encoders = [build_text_encoder(tokenizer, seed + i) for i in (1, 2)]
    torch.manual_seed(seed)
    channels = (8, 8, 8, 8)  # every image of a rollout is decoded: a wider autoencoder would cost more than the reward
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=0,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=shapes.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=4,
        num_attention_heads=5,
        attention_head_dim=32,
        caption_projection_dim=160,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        # By default the scheduler ends a short schedule on a wasted step from sigma = 0.009; this one ends it at 0.2.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.2),
        vae=vae,
        text_encoder=text_encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=text_encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


def render_scenes(n, seed):
    """n captions and their images (n, 3, 64, 64) in [-1, 1], the VAE's range, as uint8-rounded float16."""
    rng = np.random.default_rng(seed)
    captions = shapes.sample_captions(n, rng)
    images = torch.empty(n, 3, shapes.SIZE, shapes.SIZE, dtype=torch.float16)
    for i in range(0, n, 1000):
        rendered = shapes.render([shapes.scene(c, rng) for c in captions[i : i + 1000]])
        images[i : i + 1000] = torch.from_numpy(rendered) * 2 - 1
    return captions, images


def save_atomically(state, path):
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train_vae(args, vae, writer, state_path, device):
    """L1 + L2 reconstruction and a small KL; then scaling_factor and shift_factor make the latents zero-mean, unit-variance."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.vae_lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.vae_lr, total_steps=args.vae_steps + 1, pct_start=0.05)
    first = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
    rng = np.random.default_rng((args.seed, first))
    bar = tqdm(range(first, args.vae_steps), initial=first, total=args.vae_steps, desc="autoencoder")
    for step in bar:
        scenes = [shapes.scene(c, rng) for c in shapes.sample_captions(args.vae_batch, rng)]
        images = torch.from_numpy(shapes.render(scenes)).to(device) * 2 - 1
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        reconstruction = F.l1_loss(decoded, images) + F.mse_loss(decoded, images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = reconstruction + args.kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(reconstruction=f"{reconstruction.item():.4f}", kl=f"{kl.item():.2f}")
            writer.add_scalar("vae/reconstruction", reconstruction.item(), step)
            writer.add_scalar("vae/kl", kl.item(), step)
        if (step + 1) % 400 == 0 or step + 1 == args.vae_steps:
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            save_atomically({**state, "step": step + 1}, state_path)


@torch.no_grad()
def encode_all(vae, images, device):
    """Posterior means of all images, in batches."""
    return torch.cat([vae.encode(x.to(device, torch.float32)).latent_dist.mode().half().cpu() for x in images.split(250)])


@torch.no_grad()
def evaluate(pipe, steps, n_each=24):
    """Strict score of each category on held-out captions, without guidance, and the images."""
    captions = [(c * n_each)[i] for c in shapes.HELD_OUT.values() for i in range(n_each)]
    generator = torch.Generator().manual_seed(0)
    options = dict(num_inference_steps=steps, guidance_scale=1.0, max_sequence_length=1, output_type="pt")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(captions, generator=generator, **options).images.float().cpu()
    strict, graded = shapes.judge(images.numpy(), captions)
    return strict.reshape(-1, n_each).mean(1), graded.mean(), images


def train_flow(args, pipe, captions, latents, writer, state_path, log_dir, device):
    modules = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    named = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
    optimizer = torch.optim.AdamW(named.values(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    ema = {n: p.detach().clone() for n, p in named.items()}
    step, seconds, loosened = 0, 0.0, 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        for n, p in named.items():
            p.data.copy_(state["parameters"][n])
        ema, step, seconds, loosened = state["ema"], state["step"], state["seconds"], state["loosened"]
        optimizer.load_state_dict(state["optimizer"])
    torch.manual_seed(args.seed + step)
    captions = np.array(captions, dtype=object)
    bar = tqdm(initial=step, total=None if args.minutes else args.steps + args.loosen_steps, desc="flow matching")
    started = time.monotonic() - seconds
    finished = False
    while not finished:
        seconds = time.monotonic() - started
        progress = seconds / (60 * args.minutes) if args.minutes else step / args.steps
        # Warm up, hold, and decay to zero over the last third; then again from a half, with wrong captions.
        rate = args.lr * min(1.0, (step + 1) / 300, max(1e-3, 3 * (1 - progress)))
        loosening = progress >= 1
        if loosening:
            loosened += 1
            rate = 0.5 * args.lr * (1 - loosened / max(1, args.loosen_steps))
        finished = loosening and loosened >= args.loosen_steps
        for group in optimizer.param_groups:
            group["lr"] = rate
        # The silent T5 appends rows of zeros to a caption: one in our scripts, 256 in diffusers by default. Every eighth
        # batch has a random number of them, so that the model draws the same with any.
        batch, rows = args.batch, 1
        if step % 8 == 7:
            batch, rows = args.batch // 2, round(math.exp(torch.rand(()).item() * math.log(256)))
        index = torch.randint(len(latents), (batch,))
        x0 = latents[index].to(device, torch.float32)
        texts = captions[index.numpy()]
        if loosening:
            wrong = torch.rand(batch).numpy() < args.wrong_captions
            texts[wrong] = captions[torch.randint(len(latents), (int(wrong.sum()),)).numpy()]
        texts[torch.rand(batch).numpy() < args.caption_dropout] = ""
        unique, inverse = np.unique(texts.astype(str), return_inverse=True)
        noise = torch.randn_like(x0)
        u = torch.sigmoid(torch.randn(batch, device=device))
        sigma = 3 * u / (1 + 2 * u)  # logit-normal, then the scheduler's shift
        x = (1 - sigma.view(-1, 1, 1, 1)) * x0 + sigma.view(-1, 1, 1, 1) * noise
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            options = dict(do_classifier_free_guidance=False, max_sequence_length=rows)
            embeds, _, pooled, _ = pipe.encode_prompt(list(unique), None, None, **options)
            v = pipe.transformer(x, embeds[inverse], pooled[inverse], sigma * 1000, return_dict=False)[0]
        loss = F.mse_loss(v.float(), noise - x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        step += 1
        decay = min(args.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in named.values()], 1 - decay)
        bar.update()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
            writer.add_scalar("flow/loss", loss.item(), step)
        if step % args.eval_every == 0 or finished:
            trained = {n: p.detach().clone() for n, p in named.items()}
            for n, p in named.items():
                p.data.copy_(ema[n])
            for name, steps in (("strict", 8), ("strict 28 steps", 28)):
                scores, graded, images = evaluate(pipe, steps)
                writer.add_scalar(f"flow/{name}", scores.mean(), step)
                writer.add_scalar(f"flow/graded {steps} steps", graded, step)
                table = " ".join(f"{c}: {s:.2f}" for c, s in zip(shapes.CATEGORIES, scores))
                bar.write(f"step {step}, {seconds / 60:.1f} min, {name} {scores.mean():.3f}, graded {graded:.3f} ({table})")
            grid = make_image_grid(pipe.image_processor.numpy_to_pil(images[::4].permute(0, 2, 3, 1).numpy()), 6, 6)
            grid.save(log_dir / f"grid-{step:06d}.png")
            save_pipeline(pipe, args.output_dir)
            for n, p in named.items():
                p.data.copy_(trained[n])
            state = {"parameters": trained, "ema": ema, "optimizer": optimizer.state_dict(), "step": step}
            save_atomically(state | {"seconds": seconds, "loosened": loosened}, state_path)
    bar.close()


def save_pipeline(pipe, folder):
    """The transformer as float16, half the size; the small rest as float32."""
    pipe.save_pretrained(folder)
    half = SD3Transformer2DModel.from_config(pipe.transformer.config).half()
    half.load_state_dict(pipe.transformer.state_dict())
    half.save_pretrained(folder / "transformer")


def main(args):
    counts = (args.vae_steps, args.vae_batch, args.steps, args.eval_every)
    if min(counts) < 1 or args.batch < 2 or args.loosen_steps < 0 or args.scenes < 3000:
        print("error: steps, batches and --eval-every must be at least 1, --batch 2, --scenes 3000 (to test on)", file=sys.stderr)
        sys.exit(2)
    logging.set_verbosity_error()  # the text encoders truncate captions on purpose
    device = "cuda" if torch.cuda.is_available() else "cpu"
    log_dir = args.output_dir.with_name(args.output_dir.name + "-training")
    log_dir.mkdir(parents=True, exist_ok=True)
    writer = SummaryWriter(log_dir)
    pipe = build_pipeline(args.seed).to(device)
    train_vae(args, pipe.vae, writer, log_dir / "vae.pt", device)
    pipe.vae.requires_grad_(False)
    print(f"rendering and encoding {args.scenes} scenes")
    captions, images = render_scenes(args.scenes, args.seed + 1)
    latents = encode_all(pipe.vae, images, device)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents[:3000].float().to(device)).sample.cpu() / 2 + 0.5
    strict, _ = shapes.judge(decoded.clamp(0, 1).numpy(), captions[:3000])
    print(f"strict after encoding and decoding: {strict.mean():.4f}")
    shift, scale = latents.float().mean().item(), 1 / latents.float().std().item()
    pipe.vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    train_flow(args, pipe, captions, (latents - shift) * scale, writer, log_dir / "flow.pt", log_dir, device)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
