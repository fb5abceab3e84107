"""Variants of the scripts that an experiment needs and no user does: substitutions in a script's text, kept beside the run.

A variant is written to a file of its own name, which then is the name of the algorithm, and takes the script's flags and its
own. It is made from the script as it is now; where a text to replace is not there exactly once, the program ends.
"""

from pathlib import Path

from bookkeeping import replacing
from machine import fail

ROOT = Path(__file__).parent.parent

ARGS = "class Args(arguments.Training):  # which has the flags that all three scripts share\n"
ADVANTAGES = "        advantages = gain_advantages(step_gains, G, args.normalize)\n"

# {variant: (script, {text: what replaces it})}
VARIANTS = {
    # GRPO with a weight of its own for each step's loss. The ratio stays as it is, and so does what the clip does to it, as in
    # GCPO, whose chunks weigh a step in the mean over chunks and not in the ratio.
    "grpo_weights": ("grpo", {
        ARGS: ARGS + '    weights: tuple[float, ...] = ()\n    """weight of each trained step in the loss"""\n',
        "surrogate = clipped_loss(ratio, advantages[b], args.clip)":
        "surrogate = torch.tensor(args.weights)[k] * clipped_loss(ratio, advantages[b], args.clip)",
    }),
    # The plans of an iteration, dealt out anew among its trajectories: as many chunks of each size at each step, but no plan
    # fits its trajectory's own curve. A generator of its own, so that all else is drawn as in gcpo.py.
    "gcpo_other_plan": ("gcpo", {
        "plans = [adaptive_chunks(curve, args.max_chunk) for curve in curves]":
        "order = np.random.default_rng((args.seed, iteration, 1)).permutation(len(curves))\n"
        "            plans = [adaptive_chunks(curves[b], args.max_chunk) for b in order]",
    }),
    # The lambda-return of the gains, A_k = sum over j >= k of lambda^(j - k) g_j: 0 is the gain, 1 what the image gets more than
    # the estimate at the state. Less the mean over a group's images and steps, or its images at each step; over the std of the
    # group, over images and steps, or of the iteration. The defaults are stepwise_grpo.py.
    "stepwise_lambda": ("stepwise_grpo", {
        ARGS: ARGS + '''    lam: float = 0.0
    """lambda, from 0 (the step's gain) to 1 (the reward less the estimate at the state)"""
    mean: Literal["joint", "step"] = "joint"
    """the mean that is subtracted: over the group's images and steps, or over its images at each step"""
    std: Literal["group", "iteration"] = "group"
    """the std that divides, over images and steps: the group's or the iteration's"""
''',
        ADVANTAGES: """\
        order = torch.arange(S)
        returns = step_gains @ (args.lam ** (order[:, None] - order).clamp(min=0)).tril().to(step_gains)
        groups = returns.view(-1, G, S)
        centred = groups - groups.mean(1 if args.mean == "step" else (1, 2), keepdim=True)
        std = centred.std((1, 2), keepdim=True) if args.std == "group" else centred.std()
        has_spread = groups.amax((1, 2), keepdim=True) > groups.amin((1, 2), keepdim=True)
        advantages = (centred / (std + 1e-4) * has_spread).clamp(-5, 5).view_as(returns)
""",
    }),
    # The noise of GRPO's credit put back into the gains. To each step's advantage is added c_k xi, where xi is the reward of
    # another image of the group, drawn at random, less the mean of all others: it does not depend on the image's own noise, so
    # the expected gradient is the same. c_k makes a step's credit vary as much as the image's reward, which GRPO gives to every
    # step: Var(g_k) + c_k² Var(xi) = Var(R), variances within groups. After the clamp, and over the std that divides the gains.
    "stepwise_noise": ("stepwise_grpo", {
        ADVANTAGES: ADVANTAGES + """\
        R, g = scores.view(-1, G), step_gains.view(-1, G, S)
        away = np.random.default_rng((args.seed, iteration, 1)).integers(1, G, R.shape)
        another = (torch.arange(G) + torch.tensor(away)) % G
        xi = R.gather(1, another.to(R.device)) - (R.sum(1, keepdim=True) - R) / (G - 1)
        c = ((R.var(1).mean() - g.var(1).mean(0)).clamp(min=0) / xi.square().mean().clamp(min=1e-12)).sqrt()  # (S,)
        std = g.std((1, 2), keepdim=True)
        advantages = advantages + (c * xi[..., None] / (std + 1e-4) * (std > 0)).view_as(advantages)
""",
    }),
}  # fmt: skip


def source(variant):
    """Text of a variant; a text to replace that its script does not have exactly once ends the program."""
    script, substitutions = VARIANTS[variant]
    text = (ROOT / f"{script}.py").read_text()
    for old, new in substitutions.items():
        if text.count(old) != 1:
            fail(f"the variant {variant} replaces {old.strip()!r}, which {script}.py has {text.count(old)} times and not once")
        text = text.replace(old, new)
    return text


def write(variant, folder):
    """Path of <folder>/<variant>.py, which is written unless it is there, as where a run is resumed."""
    path = folder / f"{variant}.py"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(source(variant))
    return path
