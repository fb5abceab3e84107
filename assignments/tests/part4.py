"""Part 4: chunks."""

import numpy as np
import torch

from checks import formula, gradient, holds, is_well_behaved, randn, same, worth

SIZES = [1, 2, 5]
S = sum(SIZES)


def sizes_of(what, got):
    """The sizes as a list of ints."""
    holds(isinstance(got, list | tuple), f"{what} is a {type(got).__name__}, not a list of sizes")
    holds(all(size == int(size) for size in got), f"{what} holds something that is no whole number: {got!r:.60}")
    return [int(size) for size in got]


@worth(1)
def test_fixed_chunks(s):
    """fixed_chunks: equal chunks in order, the remainder last"""
    for steps in range(1, 13):
        for size in range(1, steps + 1):
            got = sizes_of("fixed_chunks", s.fixed_chunks(steps, size))
            what = f"fixed_chunks({steps}, {size}) = {got}"
            holds(sum(got) == steps or len(got) != steps // size, f"{what}: the remainder is dropped")
            holds(sum(got) == steps, f"{what} do not sum to {steps}")
            holds(got == sorted(got, reverse=True), f"{what}: the remainder comes last")
            holds(max(got) == size and all(chunk == size for chunk in got[:-1]), f"{what}: all but the last have {size} steps")


def over_chunks(values, reduce):
    return torch.stack([reduce(part) for part in values.split(SIZES, -1)], -1)


@worth(2)
def test_geometric_mean(s):
    """A chunk's ratio is the geometric mean of its steps' ratios"""
    new, old = randn(4, S), randn(4, S, seed=1)
    log_ratio = new - old
    equal = torch.stack([part.mean(-1) for part in log_ratio.tensor_split(len(SIZES), -1)], -1)
    mistakes = {
        "the log of the mean of the ratios: eq. 15 has the mean of the log ratios": over_chunks(
            log_ratio.exp(), lambda r: r.mean(-1)
        ).log(),
        "the product of the ratios: the exponent 1 / chunk size is missing": over_chunks(log_ratio, lambda r: r.sum(-1)),
        "every chunk is divided by the number of all steps, not by its own size": over_chunks(log_ratio, lambda r: r.sum(-1)) / S,
        "the ratio, not its log": over_chunks(log_ratio, lambda r: r.mean(-1)).exp(),
        "old over new": -over_chunks(log_ratio, lambda r: r.mean(-1)),
        "equal chunks: the sizes are given": equal,
    }
    expected = over_chunks(new.exp() / old.exp(), lambda r: r.prod(-1) ** (1 / r.shape[-1])).log()
    same("chunk_log_ratio", s.chunk_log_ratio(new, old, SIZES), expected, mistakes)
    same("chunk_log_ratio without a batch", s.chunk_log_ratio(new[0], old[0], SIZES), expected[0])


@worth(2)
def test_limits(s):
    """Chunks of one step are GRPO; one chunk is the whole sequence's ratio"""
    new, old = randn(4, S), randn(4, S, seed=1)
    same("chunk_log_ratio with chunks of one step", s.chunk_log_ratio(new, old, [1] * S), new - old)
    same("chunk_log_ratio with one chunk", s.chunk_log_ratio(new, old, [S]), (new - old).mean(1, keepdim=True))


@worth(2)
def test_on_policy_gradient(s):
    """On-policy equal chunks have GRPO's gradient; in unequal ones the steps of small chunks weigh more"""
    old, advantages = randn(4, S), randn(4, 1, seed=1)
    slope = lambda sizes: gradient(lambda new: (-advantages * s.chunk_log_ratio(new, old, sizes).exp()).mean(1), old)
    grpo = (-advantages / S).expand(4, S)
    for size in (1, 2, 4, 8):
        same(f"gradient with chunks of {size}", slope([size] * (S // size)), grpo)
    weight = torch.tensor([S / (len(SIZES) * size) for size in SIZES for _ in range(size)])
    wrong = {"GRPO's: every chunk counts the same, so a step of a small chunk counts more": grpo}
    same(f"gradient with chunks {SIZES}", slope(SIZES), grpo * weight, wrong)


@worth(2)
def test_relative_distance(s):
    """relative_distance: how far a step moves, over where it started"""
    trajectory = randn(3, 5, 2, 4)
    x, x_next = trajectory[:, :-1].flatten(2), trajectory[:, 1:].flatten(2)
    size = lambda t, order: torch.linalg.vector_norm(t, order, dim=-1)
    for name, order in (("l1", 1), ("l2", 2)):
        moved = size(x_next - x, order)
        mistakes = {
            "divided by the norm of x_{k+1}: it is x_k's": moved / size(x_next, order),
            "not divided by the norm of x_k": moved,
            "the difference of the norms, not the norm of the difference": (size(x, order) - size(x_next, order)).abs()
            / size(x, order),
            "the root of a sum of squares is missing": moved**2 / size(x, order) ** 2,
        }
        other = size(x_next - x, 3 - order) / size(x, 3 - order)
        mistakes[f"the other norm: {name} is asked for"] = other
        same(f"relative_distance {name}", s.relative_distance(trajectory, name), moved / size(x, order), mistakes)
    same("relative_distance l1 after scaling", s.relative_distance(7 * trajectory, "l1"), s.relative_distance(trajectory, "l1"))
    cosine = (x * x_next).sum(-1) / (size(x, 2) * size(x_next, 2))
    wrong = {"the cosine itself: latents that point the same way are at distance 0": cosine}
    same("relative_distance cosine", s.relative_distance(trajectory, "cosine"), 1 - cosine, wrong)


@worth(1)
def test_adaptive_partition(s):
    """adaptive_chunks partitions any curve into chunks of at most max_chunk steps, whatever its scale"""
    rng = np.random.default_rng(0)
    for _ in range(200):
        steps, max_chunk = int(rng.integers(1, 30)), int(rng.integers(1, 6))
        curve = rng.random(steps)  # as the script passes it: a numpy array of float64
        got = sizes_of("adaptive_chunks", s.adaptive_chunks(curve, max_chunk))
        what = f"adaptive_chunks of a curve of {steps} steps with max_chunk {max_chunk} gives {got}"
        holds(sum(got) == steps, f"{what}, which do not sum to {steps}")
        holds(min(got) >= 1, f"{what}: an empty chunk")
        holds(max(got) <= max_chunk, f"{what}: longer than max_chunk; divide each part again by its next difference")
        holds(
            sizes_of("adaptive_chunks", s.adaptive_chunks(1000 * curve, max_chunk)) == got,
            "adaptive_chunks depends on the curve's scale",
        )


@worth(1)
def test_adaptive_turns(s):
    """adaptive_chunks cuts where the curve turns, halves what never turns, and leaves short curves whole"""
    for peak in range(1, 5):
        for fall in range(2, 5):
            curve = np.concatenate([np.arange(peak), peak + 10.0 - np.arange(fall)])
            got = sizes_of("adaptive_chunks", s.adaptive_chunks(curve, 4))
            if len(curve) <= 4:
                holds(
                    got == [len(curve)],
                    f"adaptive_chunks of {len(curve)} steps gives {got}: no longer than max_chunk is left whole",
                )
                continue
            what = f"adaptive_chunks of a curve that rises over {peak} steps and falls from then on, over {fall}, gives {got}"
            late = "one step late: step k goes with the sign of d_{k+1} - d_k, so the highest step falls"
            holds(got != [peak + 1, fall - 1], f"{what}: cut {late}")
            holds(got == [peak, fall], f"{what}, expected {[peak, fall]}")
    for steps in (6, 7, 8):
        for curve, kind in ((np.arange(float(steps)), "always rises"), (np.ones(steps), "is constant")):
            got = sizes_of("adaptive_chunks", s.adaptive_chunks(curve, 4))
            what = f"adaptive_chunks of {steps} steps whose curve {kind} gives {got}, not two halves"
            holds(got == [steps // 2, steps - steps // 2], f"{what}, of which the first has {steps} // 2 steps")


@worth(1)
def test_adaptive_recursion(s):
    """Within a part, adaptive_chunks goes on with the next order of difference"""
    # Falls over all six steps; its fall slows down over the first two and speeds up from then on
    curve = np.array([9, 7, 6, 5.5, 4.5, 2.5])
    got = sizes_of("adaptive_chunks", s.adaptive_chunks(np.concatenate([[1, 3, 6], curve]), 4))
    halves = "the fall is halved: divide it by the sign of its second difference"
    holds(got != [3, 3, 3], f"adaptive_chunks gives {got}: {halves}")
    holds(got == [3, 2, 4], f"adaptive_chunks of 1 3 6 9 7 6 5.5 4.5 2.5 gives {got}, expected [3, 2, 4]")
    # Halved at order 1; the second differences of 5 6 7 9 are 0 and 1
    got = sizes_of("adaptive_chunks", s.adaptive_chunks(np.array([1.0, 2, 3, 4, 5, 6, 7, 9]), 3))
    what = f"adaptive_chunks of 1 2 3 4 5 6 7 9 with max_chunk 3 gives {got}, expected [2, 2, 1, 3]"
    holds(got == [2, 2, 1, 3], f"{what}: the parts go on with the next order also where the segment was cut in half")


@worth(1)
def test_adaptive_plateau(s):
    """A sign of 0 is a sign of its own"""
    got = sizes_of("adaptive_chunks", s.adaptive_chunks(np.array([1.0, 2, 2, 1, 3]), 4))
    what = f"adaptive_chunks of 1 2 2 1 3, whose differences have the signs 1, 0, -1 and 1, gives {got}"
    holds(got == [1, 1, 1, 2], f"{what}, expected [1, 1, 1, 2]: cut wherever two signs differ, 1 and 0 too")


@worth(1)
def test_well_behaved(s):
    """Inputs unchanged, dtype and device kept"""
    is_well_behaved(s.chunk_log_ratio, randn(4, S), randn(4, S, seed=1), SIZES)
    is_well_behaved(s.relative_distance, randn(3, 5, 2, 4), "l1")
    curve = np.random.default_rng(0).random(9)
    before = curve.copy()
    s.adaptive_chunks(curve, 4)
    holds((curve == before).all(), "adaptive_chunks changes an input in place: work on a copy")


@worth(1)
def test_step_weight(s):
    """Pen and paper: the weight in the loss of one step of a chunk of size c"""
    mistakes = {
        lambda S, K, c: 1 / S: "GRPO's weight: here chunks count the same, not steps",
        lambda S, K, c: 1 / K: "the weight of the whole chunk: its steps share it",
        lambda S, K, c: c / K: "multiplied by c: the exponent 1 / c divides",
        lambda S, K, c: 1 / c: "the weight within the chunk: there are K chunks",
    }
    formula(s, "step_weight", lambda S, K, c: 1 / (K * c), mistakes, S=(8, 20), K=(2, 7), c=(1, 6))


@worth(1)
def test_product_weight_over_grpo(s):
    """Pen and paper: the weight of a step over GRPO's, if a chunk's ratio were the product of its steps'"""
    mistakes = {
        lambda S, K, c: K / S: "GRPO's weight over this one",
        lambda S, K, c: 1 / K: "the weight itself: divide it by GRPO's",
        lambda S, K, c: S / (K * c): "the geometric mean's: the log of a product is the sum of the steps' log ratios",
    }
    formula(s, "product_weight_over_grpo", lambda S, K, c: S / K, mistakes, S=(8, 20), K=(2, 7), c=(1, 6))


@worth(1)
def test_hidden_weight(s):
    """Question 4: the weight that is hidden in a log-probability without its constants"""
    mistakes = {
        lambda std: std**2: "the density's factor 1/2 is forgotten: its gradient is (x_next - mean) / (n std²)",
        lambda std: 1 / (2 * std**2): "the Gaussian's gradient over this one",
        lambda std: 2 * std: "std in place of the variance",
        lambda std: 2: "the factor without the variance: the Gaussian divides by std²",
    }
    formula(s, "hidden_weight", lambda std: 2 * std**2, mistakes, std=(0.1, 2))
