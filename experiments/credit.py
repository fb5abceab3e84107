"""Which step of a trajectory earned the reward, how well each method knows it, and what that is worth to the gradient.

    python -m experiments.credit                             # the miniature, under five minutes on two CPU cores
    python -m experiments.credit --lora runs/grpo__... --sde ddim --output-dir runs/credit-ddim

The value of a state is V(x_k) = E[R | x_k], what the policy goes on to earn from it; V(x_S) = R, since the steps from there
on are deterministic. The true advantage of step k is delta_k = V(x_{k+1}) - V(x_k). Its mean given x_k is 0, so that

    sum_k delta_k = R - V(x_0)       Var(R | x_0) = sum_k E[delta_k²]       corr(R, delta_k) = sqrt(share_k of that variance)

and sum_k C_k grad log p_k is an unbiased policy gradient for C_k = delta_k and for C_k = R - (any function of x_k) alike: they
differ in noise. V is estimated by fresh ends drawn from every state; experiments/estimates.py says how the variance of that
sampling, and of gradients, is kept out of the figures.

Writes credit.csv, credit.json, credit.png and gradient.png to --output-dir.
"""

import csv
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import arguments
import bookkeeping
import gcpo
import grpo
import rewards
import sampler
import stepwise_grpo
from experiments import credit_pictures, estimates
from experiments.estimates import CREDIT, GRADIENT, by_chunk, centred, credit_statistics


@dataclass
class Args(arguments.Examined):
    images: int = 1152
    """trajectories, a whole number of groups"""
    group_size: int = 16
    """G: images a prompt, from the same initial noise"""
    continuations: int = 8
    """M: ends drawn from every state to estimate its value, an even number"""
    steps: int = 6
    """T: denoising steps"""
    ode_steps: int = 1
    """the last of these T follow the ODE; the S before them are stochastic. 1 asks of all that could be trained"""
    eta: float = 0.8
    """strength of the noise that sampling adds"""
    sde: Literal["flow", "dance", "cps", "ddim"] = "cps"
    """transition kernel, see sampler.sde_step"""
    substeps: tuple[int, ...] = (1, 3)
    """T' of the estimates of a state's reward, see stepwise_grpo.py"""
    min_chunk: int = 2
    """adaptive chunks are at most this long, see gcpo.py"""
    lams: tuple[float, ...] = (0.0, 0.5, 1.0)
    """lambdas of the lambda-gains made of those estimates"""
    seed: int = 0
    """seed of everything"""
    output_dir: str = "runs/credit"
    """folder of the results"""


# Credit


def lambda_gains(gains, lam):
    """A_k = sum over j >= k of lam^(j - k) g_j, (B, S) from gains (B, S); lam 0 is the gain, 1 is R - R_k. arXiv 1506.02438."""
    total, columns = torch.zeros_like(gains[:, 0]), []
    for gain in gains.T.flip(0):
        total = gain + lam * total
        columns.append(total)
    return torch.stack(columns[::-1], 1)


def iteration_advantages(gains, group_size):
    """Advantages (B, S): gains less the mean of group and step, over the std of all that is left + 1e-4, clamped to ±5."""
    groups = gains.view(-1, group_size, gains.shape[1])
    rest = groups - groups.mean(1, keepdim=True)
    return (rest / (rest.std() + 1e-4)).clamp(-5, 5).view_as(gains)


def loss_weights(log_ratio, advantages, plans, clip):
    """What the loss weights each step's grad log p with, (B, S), at log ratios and advantages (B, S) and a chunk plan a trajectory.

    The scripts' clipped loss of the chunks' ratios, a mean over a trajectory's chunks; chunks of one step are GRPO's loss.
    """
    new, sizes = log_ratio.clone().requires_grad_(), [size for plan in plans for size in plan]
    ratio = torch.exp(gcpo.chunk_log_ratio(new.flatten(), torch.zeros_like(new).flatten(), sizes))
    loss = grpo.clipped_loss(ratio, gcpo.chunk_means(advantages.flatten(), sizes), clip)
    (loss / torch.tensor([len(plan) for plan in plans for _ in plan]).to(loss)).sum().backward()
    return -new.grad


# The run


def parse_args():
    """The command line over the settings of --lora over the model's preset, checked."""
    args = arguments.parse_examined(Args, __doc__)
    if (
        min(args.rank, args.text_length, args.micro_batch, args.ode_steps, args.min_chunk, *args.substeps) < 1
        or args.group_size < 2
    ):
        arguments.fail(
            "--group-size must be at least 2, and --ode-steps, --substeps, --min-chunk, --rank, --text-length and --micro-batch 1"
        )
    if args.steps - args.ode_steps < 2:
        arguments.fail(f"--steps {args.steps} must be at least 2 more than --ode-steps {args.ode_steps}: credit is shared by steps")
    if args.images % args.group_size or args.images < 4 * args.group_size:
        arguments.fail(f"--images {args.images} must be a multiple of --group-size {args.group_size}, at least 4 times that")
    if args.continuations < 2 or args.continuations % 2:
        arguments.fail(f"--continuations {args.continuations} must be an even number, at least 2: values are estimated by halves")
    if not all(0 <= lam <= 1 for lam in args.lams):
        arguments.fail(f"--lams {' '.join(map(str, args.lams))} must be from 0 to 1")
    if not 0 < args.eta <= (1.0 if args.sde in ("cps", "ddim") else math.inf):
        arguments.fail(f"--eta {args.eta} must be above 0, and at most 1 for --sde cps and ddim")
    arguments.check_model_and_reward(args)
    bookkeeping.require_writable(Path(args.output_dir))
    return args


if __name__ == "__main__":
    args = parse_args()
    began, args.gradient_checkpointing = time.monotonic(), False
    arguments.resolve_device(args)
    torch.manual_seed(args.seed)
    folder = Path(args.output_dir)
    pipe = bookkeeping.load(args)
    B, G, S = args.images, args.group_size, args.steps - args.ode_steps
    P, generator = B // G, torch.Generator().manual_seed(args.seed)
    score = rewards.build(args.reward).score
    prompts = rewards.sample_prompts(rewards.prompt_set(args)[0], P, np.random.default_rng(args.seed))
    text, sigmas = sampler.encode(pipe, prompts, args), sampler.schedule(pipe, args.steps, args.device)

    def velocity(x, sigma, prompt):
        return sampler.velocity(pipe, x, sigma, text.rows(prompt), args)

    def reward(x, prompt):
        return score(sampler.decode(pipe, x), [prompts[p] for p in prompt.tolist()])

    # Trajectories, the values of their states, and what the estimates of the images there are rewarded with
    world = estimates.World(velocity, reward, sigmas, args.eta, args.sde, args.ode_steps)
    prompt = torch.arange(P, device=args.device).repeat_interleave(G)  # (B,)
    x = torch.randn(P, *sampler.latent_shape(pipe, args.resolution), generator=generator).to(args.device)[prompt]
    drawn = [estimates.roll_out(world, x[rows], 0, prompt[rows], generator) for rows in torch.arange(B).split(args.micro_batch)]
    trajectory, velocities, end = (torch.cat(parts) for parts in zip(*drawn))
    scores = reward(end, prompt)
    V, covariance = estimates.values(world, trajectory, scores, prompt, G, args.continuations, generator, args.micro_batch)

    def estimate(b, k, substeps):
        x, v = trajectory[b, k], velocities[b, k]
        return stepwise_grpo.estimate_x0(pipe, x, v, k, sigmas, text.rows(prompt[b]), substeps, args)

    grid = torch.stack(torch.meshgrid(torch.arange(B), torch.arange(S), indexing="ij"), -1).to(args.device)  # (B, S, 2) of (b, k)
    states, gains = torch.cat([grid[:, 1:].flatten(0, 1), grid[::G, 0]]), {}  # a group's x_0 is judged once
    for n in args.substeps:
        judged = [reward(estimate(*rows.T, n), prompt[rows[:, 0]]) for rows in states.split(args.micro_batch)]
        later, first = torch.cat(judged).split([B * (S - 1), P])
        gains[n] = stepwise_grpo.gains(torch.cat([first.repeat_interleave(G)[:, None], later.view(B, S - 1), scores[:, None]], 1))

    # What each method credits the steps with, and the chunks it credits together. With each what is known of its expected
    # gradient: it is the true one times scale, plus that of crediting `difference`, which has the less noise the better
    plans = {"steps": [[1] * S] * B}
    plans |= {f"chunks of {size}": [gcpo.fixed_chunks(S, size)] * B for size in (2, 3, 4) if size < S}
    plans |= {"one chunk": [[S]] * B}
    curves = gcpo.relative_distance(trajectory).double().cpu().numpy()
    plans["adaptive chunks"] = [gcpo.adaptive_chunks(curve, args.min_chunk) for curve in curves]
    parts, R = centred(V.diff(dim=-1), G), centred(scores[:, None].expand(B, S), G)
    V = V.unflatten(0, (2, -1)).mean(1)  # for gradients two halves are enough
    delta, A = centred(V.diff(dim=-1), G), grpo.group_advantages(scores, G, global_std=True)[:, None].expand(B, S)
    methods, scales, differences = {}, [], []

    def add(name, credit, raw, unbiased, plan="steps", difference=None):
        """A method whose credit is `raw` times a factor; `unbiased` is credit whose mean gradient is the true one."""
        credit, raw, unbiased = (c.expand(2, B, S) for c in (credit, raw, unbiased))
        factor = (credit * raw).sum() / (raw * raw).sum()
        methods[name] = credit, plan
        scales.append(factor * math.sqrt(1 - 1 / G))  # the mean of `centred` has a factor 1 - 1 / G and its square root's inverse
        differences.append(factor * (raw - unbiased if difference is None else difference.expand(2, B, S)))

    add("GRPO", A, R, R)
    for plan in ("chunks of 2", "one chunk", "adaptive chunks") if S > 2 else ():
        share = S * loss_weights(torch.zeros(B, S), torch.ones(B, S), plans[plan], 1.0)  # of the loss, over what GRPO gives a step
        known = plan != "adaptive chunks"  # the same for all images; then A and delta credit it with the same mean
        add(f"GCPO, {plan}", A, R, R, plan, (share - 1) * (delta if known else R))
    for n, g in gains.items():
        later = centred(lambda_gains(g, 1.0), G)
        joint = stepwise_grpo.gain_advantages(g, G)
        factor = (joint * later).sum() / (later * later).sum()
        add(f"Stepwise, T' = {n}", joint, later, later, difference=joint / factor - later)
        by_step = stepwise_grpo.gain_advantages(g, G, "step")
        add(f"Stepwise by step, T' = {n}", by_step, centred(g, G), later)
        for lam in args.lams:
            credit = lambda_gains(g, lam)
            add(f"lambda {lam:g}, T' = {n}", iteration_advantages(credit, G), centred(credit, G), later)
    for k in range(S):
        others = (torch.arange(S) != k).float()
        add(f"GRPO, not step {k}", A * others, R * others, R, difference=(others - 1) * delta)
    for name, credit in {
        "R - V(x_k)": scores[:, None] - V[..., :-1],
        "V(x_k+1) - V(x_0)": V[..., 1:] - V[..., :1],
        "true advantage": V.diff(dim=-1),
    }.items():
        add(name, *[centred(credit, G)] * 3)

    def all_weights(log_ratio, clip):
        """Weights (2, M, B, S) of grad log p by the methods' losses, by halves."""
        halves = [[loss_weights(log_ratio, c[h], plans[plan], clip) for c, plan in methods.values()] for h in (0, 1)]
        return torch.stack([torch.stack(half) for half in halves])

    # Credit: at steps as the loss weights them, at chunks as they stand
    weights = all_weights(torch.zeros(B, S), 1.0)
    credit = {("reward", "steps"): credit_statistics(R.expand_as(parts), parts, G)}
    for i, name in enumerate(methods):
        own, same = centred(S * weights[:, i], G), torch.equal(weights[0, i], weights[1, i])
        credit[name, "steps"] = credit_statistics(own[0].expand_as(parts), parts, G) if same else credit_statistics(own, delta, G)
    for plan in list(plans)[1:]:
        chunks = by_chunk(parts, plans[plan])
        credit["reward", plan] = credit_statistics(by_chunk(R, plans[plan], mean=True).expand_as(chunks), chunks, G)
        for n, g in gains.items():
            gain = by_chunk(centred(g, G), plans[plan]).expand_as(chunks)
            credit[f"gain, T' = {n}", plan] = credit_statistics(gain, chunks, G)

    # One trajectory, the one that most exceeded the value of its start, with fresh ends of its own for curve and bars
    b = int((scores - V[:, :, 0].mean(0)).argmax())
    copies = [t[b : b + 1].expand(16, *t.shape[1:]) for t in (trajectory, scores, prompt)]
    fresh = estimates.values(world, *copies, 1, 4, generator, args.micro_batch)[0].flatten(0, 1)  # (64, S + 1)
    k = torch.arange(S, device=args.device)
    images = sampler.decode(pipe, torch.cat([estimate(torch.full_like(k, b), k, 1), end[b : b + 1]]))
    shown = {"truth": fresh.mean(0).diff() / delta.mean(0).std()}  # in units of each credit's standard deviation
    for name in ("GRPO", *(f"lambda {lam:g}, T' = {n}" for n in args.substeps for lam in args.lams if lam in (0, 1))):
        shown[name] = methods[name][0][0, b] / methods[name][0].std()

    # Gradients: of the first update, then, after GRPO's update on groups of its own, of the second on the others
    settings = grpo.Args(**{k: v for k, v in arguments.preset_of(args.model).items() if k in grpo.Args.__dataclass_fields__})
    parameters = [p for p in pipe.transformer.parameters() if p.requires_grad]
    layers = [layer for layer in pipe.transformer.modules() if any(p is getattr(layer, "weight", None) for p in parameters)]
    updating = min(max(1, 128 // G), P // 2)  # groups: half an iteration's images, as in the scripts

    def transition(b, k):
        x, sigma, sigma_next = trajectory[b, k], sigmas[k], sigmas[k + 1]
        return sampler.sde_step(velocity(x, sigma, prompt[b]), x, sigma, sigma_next, sigmas[1].item(), args.eta, args.sde)

    def log_prob(b, k):
        return grpo.log_prob(trajectory[b, k + 1], *transition(b, k))

    def true_log_prob(b, k):
        """Its gradient is E[delta_k grad log p_k | x_k], since log p depends on x_{k+1} by (x_{k+1}, mean) / std²."""
        mean, std = transition(b, k)
        return (mean * covariance[b, k] / std**2).flatten(1).mean(1)

    def group_gradients(weights, groups, title):
        """Gradients (2, rows + 1, D) of the groups, one after another, of weights (2, rows, B, S) and of the true credit."""
        for p in tqdm(groups, title, disable=None):
            rows, total = grid[p * G : (p + 1) * G].flatten(0, 1), 0
            for b, k in (part.T for part in rows.split(args.micro_batch)):
                w = weights[:, :, b.cpu(), k.cpu()].flatten(0, 1).to(args.device)
                parts = estimates.weighted_gradients(layers, lambda b=b, k=k: log_prob(b, k), w)
                true = estimates.weighted_gradients(layers, lambda b=b, k=k: true_log_prob(b, k), torch.full_like(w[:1], 1 / S))
                parts = torch.cat([parts.unflatten(0, (2, -1)), true.expand(2, 1, -1)], 1)
                total = total + parts.cpu()
            yield total

    rows = torch.cat([weights, torch.stack(differences, 1) / S], 1)
    first = estimates.inner_products(group_gradients(rows, range(P), "first update"), P)
    gradient = [estimates.gradient_statistics(first, torch.stack(scales), G)]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
    update = sum(group_gradients(weights[:, :1], range(updating), "GRPO's update"))[0, 0] / (updating * G)
    for layer, part in zip(layers, update.to(args.device).split([layer.weight.numel() for layer in layers])):
        layer.weight.grad = -part.view_as(layer.weight)
    torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
    with torch.no_grad():
        log_prob_old = torch.cat([log_prob(*rows.T) for rows in grid.flatten(0, 1).split(args.micro_batch)])
        optimizer.step()
        log_prob_new = torch.cat([log_prob(*rows.T) for rows in grid.flatten(0, 1).split(args.micro_batch)])
    log_ratio = (log_prob_new - log_prob_old).view(B, S).cpu()
    weights = all_weights(log_ratio, settings.clip)
    second = estimates.inner_products(
        group_gradients(weights.repeat(1, 2, 1, 1), range(updating, P), "second update"), P - updating
    )
    gradient.append(estimates.gradient_statistics(second, torch.zeros(len(methods)), G))

    # Pictures, and every figure with its error and what is behind it
    folder.mkdir(parents=True, exist_ok=True)
    credit_pictures.draw_trajectory(folder / "credit.png", images, fresh.mean(0), fresh.std(0) / math.sqrt(len(fresh)), shown)
    credit_pictures.draw_gradient(folder / "gradient.png", list(methods), gradient)

    rows = []
    for (name, level), (value, error) in credit.items():
        for i, quantity in enumerate(CREDIT):
            for k in range(value.shape[1]):
                where = dict(part="credit", method=name, level=level, at="all" if k == value.shape[1] - 1 else k, quantity=quantity)
                rows.append(where | dict(value=value[i, k].item(), error=error[i, k].item(), groups=P))
    for update, n, (value, error) in zip(("first update", "second update"), (P, P - updating), gradient):
        for i, quantity in enumerate(GRADIENT):
            for j, name in enumerate(methods):
                where = dict(part="gradient", method=name, level="", at=update, quantity=quantity)
                rows.append(where | dict(value=value[i, j].item(), error=error[i, j].item(), groups=n))
    with bookkeeping.replacing(folder / "credit.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "images", "continuations"])
        writer.writeheader()
        for row in rows:
            counts = dict(images=row["groups"] * G, continuations=args.continuations)
            writer.writerow({name: f"{v:.5g}" if isinstance(v, float) else v for name, v in (row | counts).items()})
    figures = {(r["method"], r["level"], r["at"], r["quantity"]): (r["value"], r["error"]) for r in rows}

    # What theory says of the reward holds in any model, so it checks the measurement
    checks = {"the shares add up to 1": (*figures["reward", "steps", "all", "share"], 1.0)}
    shares = [figures["reward", "steps", k, "share"] for k in range(S)]
    found = [k for k, (value, error) in enumerate(shares) if value > 2 * error]  # with nothing else nothing correlates
    for level in list(plans)[:-1]:  # not of adaptive chunks, which know the trajectory's end
        for k in (*found, "all") if level == "steps" else ("all",):
            value, error = figures["reward", level, k, "correlation - sqrt(share)"]
            where = f"step {k}" if level == "steps" and k != "all" else f"all {level} together"
            checks[f"the reward's correlation with the truth less its closed form, {where}"] = value, error, 0.0
    widest = max(error for _, error in shares)
    for what, (value, error, expected) in checks.items():
        holds = abs(value - expected) <= 2 * error or math.isclose(value, expected, abs_tol=1e-6)
        print(f"{'holds' if holds else 'FAILS'} within 2 errors: {what}: {value:.3f} ± {error:.3f}, expected {expected:g}")

    sentences = []
    for k in range(S):
        share, error = shares[k]
        rest, _ = figures[f"GRPO, not step {k}", "", "first update", "relative noise"]
        sentences.append(f"step {k} carries {100 * share:.0f} ± {100 * error:.0f} % of the reward's variance")
        sentences[-1] += f" and makes {100 * (1 - rest):.1f} % of the noise in GRPO's gradient"
    print(f"\n{'at steps':22}{'correlation':>13}{'wrong signs':>12}  {'slope on the truth over all steps':34}", end="")
    print(f"{'noise':>6} | {'first update: cosine, of 256 images, equivalent to':52} | second update: of 256 images, equivalent to")
    for name in methods:
        (c, dc), (p, dp) = (figures[name, "steps", "all", quantity] for quantity in ("correlation", "wrong signs"))
        slopes = [figures[name, "steps", k, "slope"][0] / figures[name, "steps", "all", "slope"][0] for k in range(S)]
        columns = [f"{name:22}{f'{c:.2f} ± {dc:.2f}':>13}{f'{100 * p:.0f} ± {100 * dp:.0f} %':>12}"]
        noise = figures[name, "", "first update", "relative noise"][0]
        columns += [f"  {' '.join(f'{slope:.2f}' for slope in slopes):34}{noise:>6.2f} |"]
        for update in ("first update", "second update"):
            cosine, expected, images = (figures[name, "", update, quantity] for quantity in GRADIENT[-3:])
            columns += [f"{cosine[0]:>6.2f} ± {cosine[1]:.2f}"] * (update == "first update")
            told = credit_pictures.images_told(*images)[1]
            columns += [f"{f'{expected[0]:.3f} ± {expected[1]:.3f}':>16}{told:>24}", "|"]
            if name != "GRPO":
                apart = told[0].isdigit()
                worth = f"256 images of {name} are worth {told} of GRPO" if apart else f"how {name} compares to GRPO cannot be told"
                sentences.append(f"at the {update} {worth}")
        print(*columns[:-1])
    print(f"\n{'at chunks':42}{'correlation':>14}{'wrong signs':>14}{'above 0':>14}{'below 0':>14}")
    for name, level in credit:
        if name not in methods:
            told = [figures[name, level, "all", quantity] for quantity in ("correlation", *CREDIT[-3:])]
            print(f"{name + ', ' + level:42}" + "".join(f"{f'{v:.2f} ± {e:.2f}':>14}" for v, e in told))
    seconds = time.monotonic() - began
    print("\n" + "\n".join(sentences))
    print(f"from {B} images in {P} groups, {args.continuations} continuations from every state; {seconds / 60:.1f} min")
    result = dict(args=asdict(args), groups=P, images=B, continuations=args.continuations, groups_of_the_second_update=P - updating)
    result |= dict(largest_error_of_a_share=widest, seconds=seconds, checks={n: list(c) for n, c in checks.items()}, says=sentences)
    clipped = ((log_ratio.exp() - 1).abs() > settings.clip).float().mean(0)  # by step, at the second update
    result |= dict(mean_absolute_log_ratio=log_ratio.abs().mean(0).tolist(), clipped=clipped.tolist())
    bookkeeping.write_json(folder / "credit.json", result)
    print(f"Look at {folder}/credit.png and gradient.png; every figure is in {folder}/credit.csv")
