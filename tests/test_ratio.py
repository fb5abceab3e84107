"""The ratio's formulas on the miniature, moved far enough by a large random LoRA for every term to show."""

import torch

import families
import sampler
from experiments import ratio
from miniature import shapes


def test_the_ratio_has_the_mean_and_spread_that_its_kl_predicts():
    torch.manual_seed(0)
    args = ratio.Args(device="cpu", dtype="float32", images=4, draws=4000)
    args.gradient_checkpointing = False
    pipe = families.load_pipeline(args)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    text = sampler.encode(pipe, [captions[0] for captions in shapes.HELD_OUT.values()][:4], args)
    steps, D = ratio.trajectory(pipe, args, text, (16, 2, 2)), 64
    assert len(steps) == 5
    for step in steps:
        log_ratio, mean_ratio = step.log_ratio, step.log_ratio.exp().mean(0)
        error = log_ratio.exp().std(0) / args.draws**0.5
        assert ((mean_ratio - ratio.predicted_mean(step.kl, D)).abs() < 5 * error).all()
        assert ((log_ratio.mean(0) + step.kl / D).abs() < 5 * log_ratio.std(0) / args.draws**0.5).all()
        torch.testing.assert_close(log_ratio.std(0), (2 * step.kl).sqrt() / D, rtol=0.06, atol=0)
    assert (mean_ratio - torch.exp(-step.kl / D) > 5 * error).all()  # at the last step the variance's term is beyond the error
