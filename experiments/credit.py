"""Which step of a trajectory earned the reward, how well each method knows it, and what that is worth to the gradient.

    python -m experiments.credit                             # the miniature, minutes on two CPU cores
    python -m experiments.credit --lora runs/grpo__... --sde ddim --output-dir runs/credit-ddim
    python -m experiments.credit --pool runs/credit-0 runs/credit-1 --output-dir runs/credit-pooled

The value of a state is V(x_k) = E[R | x_k], what the policy goes on to earn from it; V(x_S) = R, since the steps from there
on are deterministic. The true advantage of step k is delta_k = V(x_{k+1}) - V(x_k). Its mean given x_k is 0, so that

    sum_k delta_k = R - V(x_0)       Var(R | x_0) = sum_k E[delta_k²]       E[delta_j delta_k] = 0 for j != k

and sum_k C_k grad log p_k is an unbiased policy gradient for C_k = delta_k and for C_k = R - (any function of x_k) alike: they
differ in noise. V is estimated by fresh ends drawn from every state; experiments/estimates.py says how the variance of that
sampling, and of gradients, is kept out of the figures.

Two figures say what a method's gradient is worth, both of an average over the images of one update. The predicted gain is its
expected cosine with the true gradient, over GRPO's. Equivalent images are those of which GRPO's average has the same expected
cosine: where noise rules, they go with the cosine's square.

Writes credit.csv, credit.json, covariances.csv, credit.png, shares.png and gradient.png to --output-dir.
"""

import csv
import json
import math
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import arguments
import bookkeeping
import families
import gcpo
import grpo
import machine
import rewards
import sampler
import stepwise_grpo
from experiments import credit_pictures, estimates
from experiments.estimates import CREDIT, GRADIENT, by_chunk, centred, credit_statistics
from machine import fail


@dataclass
class Args(arguments.Examined):
    images: int = 1152
    """trajectories, a whole number of groups"""
    group_size: int = 16
    """G: images per prompt, from the same initial noise"""
    continuations: int = 8
    """M: ends drawn from every state to estimate its value, an even number"""
    steps: int = 6
    """T: denoising steps"""
    ode_steps: int = 1
    """the last of these T follow the ODE; the S before them are stochastic. 1 asks of all that could be trained"""
    eta: float = 0.8
    """strength of the noise that sampling adds"""
    sde: sampler.SDE = "cps"
    """transition kernel, see sampler.sde_step"""
    substeps: tuple[int, ...] = (1, 3)
    """T' of the estimates of a state's reward, see stepwise_grpo.py; of the first more methods are measured"""
    max_chunk: int = gcpo.Args.max_chunk
    """adaptive chunks are at most this long, see gcpo.py"""
    prompts: int = grpo.Args.prompts
    """P: prompts per iteration of training; an update averages over P G / updates images"""
    updates: int = grpo.Args.updates
    """optimizer steps per rollout of training"""
    lr: float = grpo.Args.lr
    """learning rate of the step before the second update, a run's before annealing"""
    clip: float = grpo.Args.clip
    """how far a ratio may leave 1 at the second update"""
    seed: int = 0
    """seed of everything"""
    pool: tuple[str, ...] = ()
    """measure nothing: average the figures in these folders, of different seeds or runs, and test their covariances together"""
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


def iteration_advantages(gains, group_size, mean="step", std="iteration"):
    """Advantages (B, S) of gains (B, S): less a mean, over the std of what is left + 1e-4, clamped to ±5.

    The mean is that of the group's images, at each "step" or over all of them ("joint"); the std, over images and steps, is the
    "group"'s or that of the whole "iteration". Joint and group are stepwise_grpo.py's.
    """
    groups = gains.view(-1, group_size, gains.shape[1])
    rest = groups - groups.mean((1, 2) if mean == "joint" else 1, keepdim=True)
    return (rest / ((rest.std((1, 2), keepdim=True) if std == "group" else rest.std()) + 1e-4)).clamp(-5, 5).view_as(gains)


def loss_weights(log_ratio, advantages, plans, clip, step_weights=1.0):
    """What the loss weights each step's grad log p with, (B, S), at log ratios and advantages (B, S) and a chunk plan a trajectory.

    The scripts' clipped loss of the chunks' ratios, a mean over a trajectory's chunks; chunks of one step are GRPO's loss.
    step_weights (S,) are those of --step-weights, factors of the log-probability.
    """
    weights, trajectories = torch.zeros_like(log_ratio), defaultdict(list)  # by plan
    for b, plan in enumerate(plans):
        trajectories[tuple(plan)].append(b)
    for plan, rows in trajectories.items():
        new = log_ratio[rows].requires_grad_()
        ratio = torch.exp(gcpo.chunk_log_ratio(new * step_weights, torch.zeros_like(new), plan))  # (rows, chunks)
        loss = grpo.clipped_loss(ratio, gcpo.chunk_means(advantages[rows], plan), clip)
        loss.mean(1).sum().backward()
        weights[rows] = -new.grad
    return weights


# Measuring


class Policy:
    """The model with its prompts and noise schedule, a World as estimates.py asks for, and the optimizer of the second update."""

    def __init__(self, args):
        self.args, self.pipe = args, bookkeeping.load(args)
        train_prompts, P = rewards.prompt_set(args)[0], args.images // args.group_size
        self.prompts = rewards.sample_prompts(train_prompts, P, np.random.default_rng(args.seed))
        self.text = sampler.encode(self.pipe, self.prompts, args)
        self.sigmas = sampler.schedule(self.pipe, args.steps, args.device)
        self.eta, self.sde, self.ode_steps = args.eta, args.sde, args.ode_steps
        self.score = rewards.build(args.reward).score
        self.sides = 2 if args.guidance > 1 and families.of(self.pipe).contrasts(self.pipe) else 1
        self.parameters = [p for p in self.pipe.transformer.parameters() if p.requires_grad]
        trained = {id(p) for p in self.parameters}
        self.layers = [m for m in self.pipe.transformer.modules() if id(getattr(m, "weight", None)) in trained]  # all Linear
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
        state = Path(args.lora) / "state.pt"
        self.warm = bool(args.lora) and state.exists()
        if self.warm:
            try:
                self.optimizer.load_state_dict(torch.load(state, weights_only=True, map_location="cpu")["optimizer"])
            except Exception as error:
                fail(f"{state} does not fit ({type(error).__name__}): it is damaged or was made with other settings")
            self.optimizer.param_groups[0]["lr"] = args.lr  # which in a finished run has fallen to nothing

    def velocity(self, x, sigma, prompt):
        return sampler.velocity(self.pipe, x, sigma, self.text.rows(prompt), self.args)

    def reward(self, x, prompt):
        return self.score(sampler.decode(self.pipe, x), [self.prompts[p] for p in prompt.tolist()])

    def estimate(self, x, v, k, prompt, substeps):
        """Estimates (n, ...) of the final latents from states x (n, ...) at step k with velocities v."""
        return stepwise_grpo.estimate_x0(self.pipe, x, v, k, self.sigmas, self.text.rows(prompt), substeps, self.args)

    def log_probs(self, measured, b, k):
        """(2, n) at steps k (n,) of trajectories b: log p_k, and what has the gradient E[delta_k grad log p_k | x_k].

        The latter since log p_k depends on x_{k+1} by (x_{k+1}, mean) / std².
        """
        x, sigma, sigma_next = measured.trajectory[b, k], self.sigmas[k], self.sigmas[k + 1]
        v = self.velocity(x, sigma, measured.prompt[b])
        mean, std = sampler.sde_step(v, x, sigma, sigma_next, self.sigmas[1].item(), self.eta, self.sde)
        true = (mean * measured.covariance[b, k] / std**2).flatten(1).mean(1)
        return torch.stack([grpo.log_prob(measured.trajectory[b, k + 1], mean, std), true])

    def step(self, gradient):
        """One step of the optimizer up a gradient (D,)."""
        sizes = [layer.weight.numel() for layer in self.layers]
        for layer, part in zip(self.layers, gradient.to(self.args.device).split(sizes)):
            layer.weight.grad = -part.view_as(layer.weight)
        torch.nn.utils.clip_grad_norm_(self.parameters, grpo.Args.max_grad_norm)
        self.optimizer.step()


class Measured(NamedTuple):
    prompt: torch.Tensor  # (B,), group-major as all
    trajectory: torch.Tensor  # (B, S + 1, ...)
    velocities: torch.Tensor  # (B, S + 1, ...)
    end: torch.Tensor  # x_T (B, ...)
    scores: torch.Tensor  # (B,)
    V: torch.Tensor  # (M, B, S + 1), see estimates.values
    covariance: torch.Tensor  # (B, S, ...), of R and x_{k+1} given x_k
    gains: dict  # T' -> (B, S), of the rewards of estimated images


def measure(policy, generator):
    """Trajectories, the values of their states, and what the estimates of the images there are rewarded with."""
    args = policy.args
    B, G, S = args.images, args.group_size, args.steps - args.ode_steps
    prompt = torch.arange(B // G, device=args.device).repeat_interleave(G)
    x = torch.randn(B // G, *sampler.latent_shape(policy.pipe, args.resolution), generator=generator).to(args.device)[prompt]
    drawn = [estimates.roll_out(policy, x[b], 0, prompt[b], generator) for b in torch.arange(B).split(args.micro_batch)]
    trajectory, velocities, end = (torch.cat(parts) for parts in zip(*drawn))
    scores, gains = policy.reward(end, prompt), {}
    V, covariance = estimates.values(policy, trajectory, scores, prompt, G, args.continuations, generator, args.micro_batch)
    for substeps in args.substeps:
        state_rewards = []
        for k in range(S):
            judged = []
            for b in torch.arange(0, B, 1 if k else G).split(args.micro_batch):  # a group's x_0 is judged once
                x0 = policy.estimate(trajectory[b, k], velocities[b, k], k, prompt[b], substeps)
                judged.append(policy.reward(x0, prompt[b]))
            state_rewards.append(torch.cat(judged).repeat_interleave(1 if k else G))
        gains[substeps] = stepwise_grpo.gains(torch.stack([*state_rewards, scores], 1))
    return Measured(prompt, trajectory, velocities, end, scores, V, covariance, gains)


# Methods


class Method(NamedTuple):
    """What a method credits the steps with, and what is known of its expected gradient.

    That is the one of crediting `rest`, plus `known` times the true one of each step. Without rest and with the same `known` at
    every step the method is unbiased by construction.
    """

    credit: torch.Tensor  # (2, B, S), by halves of the continuations
    plans: list  # B lists of chunk sizes
    step_weights: torch.Tensor  # (S,)
    rest: torch.Tensor  # (2, B, S)
    known: torch.Tensor  # (S,)

    def loss_weights(self, log_ratio, clip):
        """(2, B, S) of its loss."""
        return torch.stack([loss_weights(log_ratio, half, self.plans, clip, self.step_weights) for half in self.credit])

    def unbiased(self):
        return not self.rest.any() and torch.allclose(self.known, self.known.mean())


def method(credit, unbiased, group_size, plans=None, step_weights=None, independent=False):
    """A Method of credit (2, B, S) or (B, S) near a multiple of `unbiased`, which is `centred` and has the true mean gradient.

    independent: a trajectory's plan knows nothing of it.
    """
    B, S = credit.shape[-2:]
    plans, step_weights = plans or [[1] * S] * B, torch.ones(S) if step_weights is None else step_weights
    share = S * loss_weights(torch.zeros(B, S), torch.ones(B, S), plans, 1.0, step_weights)  # of the loss, over GRPO's of a step
    rate, mean = (credit * unbiased).sum() / (unbiased * unbiased).sum(), share.mean(0)
    rest = (mean if independent else share) * credit - rate * mean * unbiased
    rest = rest * (rest.abs().max() > 1e-5 * credit.abs().max())  # else it is rounding
    # The mean of `centred` leaves 1 - 1 / G of a gradient, of which it gives the root back
    known = rate * mean * math.sqrt(1 - 1 / group_size)
    return Method(credit.expand(2, B, S), plans, step_weights, rest.expand(2, B, S), known)


def chunk_plans(measured, max_chunk):
    """{name: plans}, a list of chunk sizes for every trajectory."""
    B, S = measured.covariance.shape[:2]
    plans = {f"chunks of {size}": [gcpo.fixed_chunks(S, size)] * B for size in (2, 3, 4) if size < S} | {"one chunk": [[S]] * B}
    curves = gcpo.relative_distance(measured.trajectory).double().cpu().numpy()
    return plans | {"adaptive chunks": [gcpo.adaptive_chunks(curve, max_chunk) for curve in curves]}


def reward_methods(measured, plans, weights, G):
    """{name: Method}, GRPO first, of those that credit steps with the image's reward."""
    B, S = measured.covariance.shape[:2]
    R = centred(measured.scores[:, None].expand(B, S), G)
    A = grpo.group_advantages(measured.scores, G, global_std=True)[:, None].expand(B, S)
    adaptive = plans["adaptive chunks"]
    found = {"GRPO": method(A, R, G)} | {f"GRPO, {kind}": method(A, R, G, step_weights=w) for kind, w in weights.items()}
    found |= {f"GCPO, {name}": method(A, R, G, plans[name]) for name in ("chunks of 2", "one chunk") if name in plans}
    found["GCPO, adaptive"] = method(A, R, G, adaptive)
    found["GCPO, adaptive, std2"] = method(A, R, G, adaptive, weights["std2"])
    found["GCPO, another's chunks"] = method(A, R, G, adaptive[-G:] + adaptive[:-G], independent=True)  # of the group before
    found["GRPO, GCPO's mean weights"] = method(A, R, G, step_weights=found["GCPO, adaptive"].known / found["GRPO"].known)
    found["GRPO, without the last step"] = method(A, R, G, step_weights=(torch.arange(S) < S - 1).float())
    return found


def gain_methods(measured, weights, G):
    """{name: Method} of those that credit steps with gains of estimates, or with the reward less the state's estimate, R - R_k.

    R - R_k (lambda 1) is unbiased up to its normalization, whatever R_k is, since that depends on x_k alone. Where a name has no
    normalization, Stepwise has its script's (joint mean, group's std), the others have mean per step and the iteration's std.
    """
    found = {}
    for i, (substeps, g) in enumerate(measured.gains.items()):
        stepwise, later = stepwise_grpo.gain_advantages(g, G), lambda_gains(g, 1.0)
        credits = {"Stepwise": (stepwise,), "Stepwise, step mean, iteration std": (iteration_advantages(g, G),)}
        credits |= {"Lambda 0.5": (iteration_advantages(lambda_gains(g, 0.5), G),), "R - R_k": (iteration_advantages(later, G),)}
        if i == 0:
            credits |= {f"{name}, std2": (*credits[name], weights["std2"]) for name in ("Stepwise", "R - R_k")}
            credits["Stepwise by step"] = (stepwise_grpo.gain_advantages(g, G, "step"),)
            for mean, std in (("joint", "iteration"), ("step", "group"), ("joint", "group")):
                for name, gains in {"Stepwise": g, "R - R_k": later}.items():
                    credits[f"{name}, {mean} mean, {std} std"] = (iteration_advantages(gains, G, mean, std),)
            del credits["Stepwise, joint mean, group std"]  # which Stepwise is
        for name, (credit, *w) in credits.items():
            found[f"{name}, T' = {substeps}"] = method(credit, centred(later, G), G, None, *w)
        if i == 0:
            noisy = stepwise + put_back(measured.scores, g, stepwise, G)
            found[f"Stepwise, noise put back, T' = {substeps}"] = found[f"Stepwise, T' = {substeps}"]._replace(
                credit=noisy.expand(2, -1, -1)
            )
    return found


def put_back(scores, gains, advantages, group_size):
    """Noise (B, S) that gives gains the variance that the reward has at every step, times what made advantages of gains.

    It is c_k xi with xi the centred reward of the image in the same place of another group, so it moves no expected gradient.
    """
    R, g = centred(scores[:, None], group_size), centred(gains, group_size)
    missing = (1 - g.var(0) / R.var(0)).clamp(min=0).sqrt()
    return (advantages * g).sum() / (g * g).sum() * missing * R.roll(group_size, 0)


def exact_methods(measured, G):
    """{name: Method} of those that know the values of states."""
    R, V = measured.scores[:, None], measured.V.unflatten(0, (2, -1)).mean(1)  # for gradients two halves are enough
    credits = {"R - V(x_k)": R - V[..., :-1], "V(x_k+1) - V(x_0)": V[..., 1:] - V[..., :1], "true advantage": V.diff(dim=-1)}
    return {name: method(centred(credit, G), centred(credit, G), G) for name, credit in credits.items()}


def weights_of(policy):
    """{kind: (S,)} of --step-weights, but for none."""
    S = policy.args.steps - policy.ode_steps
    sigma, sigma_next = policy.sigmas[:S], policy.sigmas[1 : S + 1]
    _, std = sampler.sde_step(sigma, sigma, sigma, sigma_next, policy.sigmas[1].item(), policy.eta, policy.sde)  # for any v and x
    return {kind: sampler.step_weights(kind, std, sigma_next - sigma).cpu() for kind in ("std", "std2", "guard")}


# Statistics


def credit_of(measured, methods, plans, G):
    """{(name, level): (value, error)} of CREDIT: of methods at steps as their loss weights them, of reward and gains at chunks."""
    parts, (B, S) = centred(measured.V.diff(dim=-1), G), measured.covariance.shape[:2]
    R, halves = centred(measured.scores[:, None].expand(B, S), G), parts.unflatten(0, (2, -1)).mean(1)
    found = {("reward", "steps"): credit_statistics(R.expand_as(parts), parts, G)}
    for name, m in methods.items():
        own = centred(S * m.loss_weights(torch.zeros(B, S), 1.0), G)
        same = torch.equal(own[0], own[1])
        found[name, "steps"] = credit_statistics(own[0].expand_as(parts), parts, G) if same else credit_statistics(own, halves, G)
    for level, plan in plans.items():
        chunks = by_chunk(parts, plan)
        credits = {"reward": by_chunk(R, plan, mean=True)}
        credits |= {f"gain, T' = {substeps}": by_chunk(centred(g, G), plan) for substeps, g in measured.gains.items()}
        found |= {(name, level): credit_statistics(credit.expand_as(chunks), chunks, G) for name, credit in credits.items()}
    return found


def group_gradients(policy, measured, weights, of_true, groups, title):
    """Gradients (2, R, D) of the groups, one after another.

    They are weights (2, R, B, S) times grad log p, plus of_true (R, S) times the true gradient of each step, summed over a group.
    """
    args, (_, R, _, S) = policy.args, weights.shape
    for p in tqdm(groups, title, disable=None):
        total, group = 0, torch.arange(p * args.group_size, (p + 1) * args.group_size)
        for b, k in (rows.T for rows in torch.cartesian_prod(group, torch.arange(S)).split(args.micro_batch)):
            w = torch.stack([weights[:, :, b, k], of_true[:, k].expand(2, -1, -1)], 2).flatten(0, 1).to(args.device)
            log_probs = partial(policy.log_probs, measured, b, k)
            total = total + estimates.weighted_gradients(policy.layers, log_probs, w, policy.sides).cpu()
        yield total.unflatten(0, (2, R))


def gradients(policy, measured, methods, batch):
    """Of the first update, and of the second, after GRPO's first on groups of its own.

    {update: (value, error, groups)} of GRADIENT for averages over `batch` images; (value, error) (S,) of every step's share of
    the noise in GRPO's gradient; and the log ratios (B, S) at the second update.
    """
    args, M, G, (B, S) = policy.args, len(methods), policy.args.group_size, measured.covariance.shape[:2]
    P, updating = B // G, min(max(1, batch // G), B // G // 2)
    weights = lambda log_ratio, clip: torch.stack([m.loss_weights(log_ratio, clip) for m in methods.values()], 1)  # (2, M, B, S)

    first, rest = weights(torch.zeros(B, S), 1.0), torch.stack([m.rest for m in methods.values()], 1)
    by_step = first[:, :1] * torch.eye(S)[:, None]  # GRPO's of each step alone
    rows = torch.cat([first, rest / S, torch.zeros(2, 1, B, S), by_step], 1)
    known = torch.stack([m.known for m in methods.values()])
    of_true = torch.cat([torch.zeros(M, S), known / S, torch.ones(1, S) / S, torch.zeros(S, S)])
    products = estimates.inner_products(group_gradients(policy, measured, rows, of_true, range(P), "first update"), P)
    found = {"first update": (*estimates.gradient_statistics(products, M, G, batch), P)}
    shares = estimates.noise_shares(products, 0, range(2 * M + 1, len(of_true)))

    update = sum(group_gradients(policy, measured, first[:, :1], of_true[:1], range(updating), "GRPO's update"))[0, 0]
    pairs = torch.cartesian_prod(torch.arange(B), torch.arange(S)).split(args.micro_batch)
    with torch.no_grad():
        old = torch.cat([policy.log_probs(measured, *rows.T)[0] for rows in pairs])
        policy.step(update / (updating * G))
        log_ratio = (torch.cat([policy.log_probs(measured, *rows.T)[0] for rows in pairs]) - old).view(B, S).cpu()
    rows, of_true = torch.cat([weights(log_ratio, args.clip), torch.zeros(2, 1, B, S)], 1), of_true[[*range(M), 2 * M]]
    second = group_gradients(policy, measured, rows, of_true, range(updating, P), "second update")
    products = estimates.inner_products(second, P - updating).of_rows([*range(M), *range(M), M])  # nothing is known in advance
    found["second update"] = (*estimates.gradient_statistics(products, M, G, batch), P - updating)
    return found, shares, log_ratio


# What is found


def example(policy, measured, methods, generator):
    """What draw_trajectory shows: the trajectory that most exceeded the value of its start, with fresh ends of its own."""
    args, b = policy.args, int((measured.scores - measured.V[:, :, 0].mean(0)).argmax())
    x, v, prompt = measured.trajectory[b], measured.velocities[b], measured.prompt[b : b + 1]
    fresh, _ = estimates.values(
        policy, x.expand(16, *x.shape), measured.scores[b].expand(16), prompt.expand(16), 1, 4, generator, args.micro_batch
    )
    fresh = fresh.flatten(0, 1)  # (64, S + 1)
    x0 = [policy.estimate(x[k : k + 1], v[k : k + 1], k, prompt, 1) for k in range(len(x) - 1)]
    images = sampler.decode(policy.pipe, torch.cat([*x0, measured.end[b : b + 1]]))
    truth = methods["true advantage"].credit.mean(0)
    credits = {"true advantage": fresh.mean(0).diff() / truth.std()}  # in units of each credit's standard deviation
    for name in ("GRPO", *(f"{name}, T' = {n}" for n in args.substeps for name in ("Stepwise", "R - R_k"))):
        credits[name] = methods[name].credit[0, b] / methods[name].credit[0].std()
    return images, fresh.mean(0), fresh.std(0) / math.sqrt(len(fresh)), credits


def table(groups, credit, updates, shares, methods):
    """Every figure with its error, rows of credit.csv; those that are set by construction, which nothing could move, say so."""
    found = []  # (part, method, level, at, quantity, value, error, groups)
    for (name, level), figures in credit.items():
        for quantity, values, errors in zip(CREDIT, *figures):
            at = [*range(len(values) - 1), "all"]
            found += [("credit", name, level, str(k), quantity, v, e, groups) for k, v, e in zip(at, values, errors)]
    found += [("gradient", "GRPO", "steps", str(k), "share of noise", v, e, groups) for k, (v, e) in enumerate(zip(*shares))]
    for update, (*figures, n) in updates.items():
        for quantity, values, errors in zip(GRADIENT, *figures):
            found += [("gradient", name, "", update, quantity, v, e, n) for name, v, e in zip(methods, values, errors)]
    rows = []
    for part, name, level, at, quantity, value, error, n in found:
        cosine = quantity == "cosine of expectation" and at == "first update" and methods[name].unbiased()
        known = cosine or name == "GRPO" and quantity in ("relative noise", "predicted gain", "log equivalent images")
        row = dict(part=part, method=name, level=level, at=at, quantity=quantity, value=value.item(), error=error.item())
        rows.append(row | dict(by_construction="yes" * known, groups=n))
    return rows


def tell(folder, rows, covariances, batch, result):
    """Prints the tables and what they say, and writes tables and pictures."""
    figures = {(r["method"], r["level"], r["at"], r["quantity"]): (r["value"], r["error"]) for r in rows}
    known = {r["method"] for r in rows if r["quantity"] == "cosine of expectation" and r["by_construction"]}
    methods = list(dict.fromkeys(r["method"] for r in rows if r["part"] == "gradient"))
    S = sum(r["quantity"] == "share of noise" for r in rows)

    def show(figure, digits=2, unit=1):
        return "?" if math.isnan(sum(figure)) else f"{unit * figure[0]:.{digits}f} ± {unit * figure[1]:.{digits}f}"

    columns = {  # of the first update but for the last
        "correlation": 14, "wrong signs %": 15, "noise / signal": 16, "cosine": 15, f"cosine of {batch}": 17, "predicted gain": 17,
        f"{batch} equal GRPO's": 30, "gain at the second": 0,
    }  # fmt: skip
    print(f"\n{'at all steps, and of gradients':44}" + "".join(f"{title:{width}}" for title, width in columns.items()))
    for name in methods:
        noise, cosine, expected, gain, images = (figures[name, "", "first update", quantity] for quantity in GRADIENT[2:])
        told = [show(figures[name, "steps", "all", "correlation"]), show(figures[name, "steps", "all", "wrong signs"], 0, 100)]
        told += [show(noise), "1 (set)" if name in known else show(cosine), show(expected, 3), show(gain)]
        told += [credit_pictures.images_told(*images, batch), show(figures[name, "", "second update", "predicted gain"])]
        print(f"{name:44}" + "".join(f"{text:{width}}" for text, width in zip(told, columns.values())))
    print(f"\n{'at chunks':44}{'correlation':14}{'wrong signs':14}{'above 0':14}{'below 0':14}")
    for name, level in dict.fromkeys((r["method"], r["level"]) for r in rows if r["part"] == "credit"):
        if name not in methods:
            told = [figures[name, level, "all", quantity] for quantity in ("correlation", *CREDIT[-3:])]
            print(f"{name + ', ' + level:44}" + "".join(f"{show(figure):14}" for figure in told))
    says = ["(set) is so by construction; equivalent images go with the squared cosine, the predicted gain with the cosine"]
    for k in map(str, range(S)):
        share, noise = figures["reward", "steps", k, "share"], figures["GRPO", "steps", k, "share of noise"]
        says.append(f"step {k} accounts for {show(share, 0, 100)} % of the variation in reward")
        says[-1] += f" and for {show(noise, 1, 100)} % of the noise in GRPO's gradient"
    p, total, (n, pairs) = estimates.wald_test(covariances), figures["reward", "steps", "all", "share"], covariances.shape
    says.append(f"the shares add up to {show(total)}")
    few = f"is not tested, as {pairs} pairs need more than {n} groups (--pool joins runs)"
    says.append(f"that all pairs of steps have covariance 0 {few if math.isnan(p) else f'has p = {p:.3f} (Wald)'}")
    print("\n" + "\n".join(says))

    folder.mkdir(parents=True, exist_ok=True)
    credit_pictures.draw_shares(folder / "shares.png", figures, S)
    credit_pictures.draw_gradient(folder / "gradient.png", figures, methods, batch)
    with bookkeeping.replacing(folder / "credit.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({name: f"{v:.5g}" if isinstance(v, float) else v for name, v in row.items()} for row in rows)
    with bookkeeping.replacing(folder / "covariances.csv") as temporary:
        np.savetxt(temporary, covariances, "%.5g", ",")
    checks = dict(shares_add_up_to=total, pairs=pairs, groups=n, wald_p=None if math.isnan(p) else p)
    bookkeeping.write_json(folder / "credit.json", result | dict(images_of_an_update=batch, checks=checks, says=says))
    print(f"Look at the pictures in {folder}; every figure is in {folder}/credit.csv")


def pool(folders):
    """What `tell` takes, of the mean figures of the folders' credit.csv and all their covariances."""
    tables, covariances, batches = [], [], set()
    for folder in map(Path, folders):
        try:
            with open(folder / "credit.csv", newline="") as file:
                tables.append({(r["method"], r["level"], r["at"], r["quantity"]): r for r in csv.DictReader(file)})
            covariances.append(torch.from_numpy(np.loadtxt(folder / "covariances.csv", delimiter=",", ndmin=2)))
            batches.add(json.loads((folder / "credit.json").read_text())["images_of_an_update"])
        except (OSError, ValueError, KeyError) as error:
            fail(f"--pool {folder} is not the folder of a measurement ({type(error).__name__})")
    # Adaptive chunks may be one more in one measurement than in another: what all have is pooled
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    if len(batches) > 1 or any(key not in shared for table in tables for key in table if key[1] != "adaptive chunks"):
        fail("--pool needs measurements of the same methods, steps and images of an update")
    rows = []
    for key, row in ((key, tables[0][key]) for key in shared):
        value, error = np.array([[float(table[key][name]) for table in tables] for name in ("value", "error")])
        pooled = dict(value=value.mean().item(), error=math.hypot(*error) / len(tables))
        rows.append(row | pooled | dict(groups=sum(int(table[key]["groups"]) for table in tables)))
    return rows, torch.cat(covariances), batches.pop(), dict(pooled=folders)


def parse_args():
    """The command line over the settings of --lora over the model's preset, checked."""
    args = arguments.parse_examined(Args, __doc__)
    for name in "rank text_length micro_batch ode_steps max_chunk prompts updates".split():
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.group_size < 2 or min(args.substeps, default=0) < 1 or min(args.lr, args.clip) <= 0:
        fail("--group-size must be at least 2, --substeps at least 1, and --lr and --clip above 0")
    if args.steps - args.ode_steps < 2:
        fail(f"--steps {args.steps} must be at least 2 more than --ode-steps {args.ode_steps}: credit is shared by steps")
    if args.images % args.group_size or args.images < 4 * args.group_size:
        fail(f"--images {args.images} must be a multiple of --group-size {args.group_size}, at least 4 times that")
    if args.continuations < 2 or args.continuations % 2:
        fail(f"--continuations {args.continuations} must be an even number, at least 2: values are estimated by halves")
    if not 0 < args.eta <= (1.0 if args.sde in ("cps", "ddim") else math.inf):
        fail(f"--eta {args.eta} must be above 0, and at most 1 for --sde cps and ddim")
    arguments.check_model_and_reward(args)
    bookkeeping.require_writable(Path(args.output_dir))
    return args


def run(args):
    """Measures, draws the example, and gives what `tell` takes."""
    began, args.gradient_checkpointing = time.monotonic(), False
    machine.resolve_device(args)
    torch.manual_seed(args.seed)
    generator, G, folder = torch.Generator().manual_seed(args.seed), args.group_size, Path(args.output_dir)
    batch = max(1, args.prompts * G // args.updates)

    policy = Policy(args)
    measured = measure(policy, generator)
    plans, weights = chunk_plans(measured, args.max_chunk), weights_of(policy)
    methods = reward_methods(measured, plans, weights, G) | gain_methods(measured, weights, G) | exact_methods(measured, G)
    folder.mkdir(parents=True, exist_ok=True)
    credit_pictures.draw_trajectory(folder / "credit.png", *example(policy, measured, methods, generator))
    credit = credit_of(measured, methods, plans, G)
    updates, shares, log_ratio = gradients(policy, measured, methods, batch)  # which moves the policy

    optimizer = "the run's AdamW" if policy.warm else "a cold AdamW (--lora names no run with a state.pt)"
    clipped = ((log_ratio.exp() - 1).abs() > args.clip).float().mean(0)
    says = f"the second update follows a step of {optimizer}; of GRPO's ratios {100 * clipped.mean():.0f} % are clipped then"
    second = dict(optimizer=optimizer, lr=args.lr, clip=args.clip, clipped_by_step=clipped.tolist(), says=says)
    covariances = estimates.pairwise_covariances(centred(measured.V.diff(dim=-1), G), G)
    result = dict(args=asdict(args), seconds=time.monotonic() - began, second_update=second)
    print(f"{says}\nfrom {args.images} images, {args.continuations} continuations of every state; {result['seconds'] / 60:.1f} min")
    return table(args.images // G, credit, updates, shares, methods), covariances, batch, result


if __name__ == "__main__":
    args = parse_args()
    tell(Path(args.output_dir), *(pool(args.pool) if args.pool else run(args)))
