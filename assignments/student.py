"""The functions and answers to write, part by part. The sheets 1_likelihood.md to 7_fooled.md say what each of them is.

    python assignments/grade.py --only 1        # the tests of a part
    python assignments/train.py 2               # your functions in a real training run (parts 2 to 5 and 7)

Notation: step k moves x_k at noise level sigma to x_{k+1} at sigma_next < sigma. B images in groups of G images of one prompt,
group-major: the first G rows are the first group. S trained steps. Tensors are batch-first; the answer has the dtype and the
device of the inputs (float64 stays float64), and no input is changed.
"""

# Part 1: the likelihood of a step


def posterior_mean(v, x, sigma):
    """Estimate (B, ...) of the image at sigma = 0, from the velocity v (B, ...) at x (B, ...) and sigma (B,)."""
    raise NotImplementedError("part 1: write posterior_mean, the image that x and v point to")


def sde_step(v, x, sigma, sigma_next, sigma_max, eta, sde):
    """Mean (B, ...) and std (B, 1, ...) of x_{k+1} ~ N(mean, std² I) given x_k, in float32 or better (float64 stays float64).

    v and x are (B, ...), sigma and sigma_next (B,), sigma_max and eta floats; sde is "flow", "dance", "cps" or "ddim". Where
    sigma is 1, the s of the table on the sheet is sigma_max.
    """
    raise NotImplementedError("part 1: write sde_step, mean and std of a step for the four kernels")


def log_prob(x_next, mean, std):
    """Log density (B,) of x_next (B, ...) under N(mean, std² I), averaged over all dimensions but the first; std is (B, 1, ...)."""
    raise NotImplementedError("part 1: write log_prob, the Gaussian log density of a step")


# Part 2: group advantages and the policy gradient


def group_advantages(rewards, group_size, global_std=False):
    """Advantages (B,) of group-major rewards (B,): (r - mean of its group) / (std + 1e-4), clamped to ±5.

    The std (with n - 1) is the group's, or with `global_std` that of all B rewards. A group of equal rewards gets 0.
    """
    raise NotImplementedError("part 2: write group_advantages, what an image is worth beside the others of its prompt")


def policy_gradient_loss(log_prob, advantages):
    """Loss (N,) of each sample, from its log-probability (N,) and advantage (N,); minus its gradient is the policy gradient's."""
    raise NotImplementedError("part 2: write policy_gradient_loss, whose mean a GRPO update on its first step minimizes")


# Part 3: ratio and clip


def ratio(log_prob_new, log_prob_old):
    """Ratio (B, S) of the new policy's probability of each step to the old one's, from their logs (B, S)."""
    raise NotImplementedError("part 3: write ratio, from two log-probabilities")


def clipped_loss(ratio, advantages, clip):
    """max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)), elementwise for ratio and advantages of one shape."""
    raise NotImplementedError("part 3: write clipped_loss, which stops where the ratio has gone far enough")


def stopped_fraction(ratio, advantages, clip):
    """Share, a scalar, of the samples whose clipped_loss has gradient 0 because of the clip; ratio and advantages are (N,).

    It is a share of all N. With an advantage of 0 there is no gradient to begin with, so such a sample is not stopped.
    """
    raise NotImplementedError("part 3: write stopped_fraction, the share of samples that the clip holds back")


# Part 4: chunks


def fixed_chunks(num_steps, chunk_size):
    """List of the sizes of consecutive chunks of `chunk_size` steps, the remainder last: 7 steps by 3 are [3, 3, 1]."""
    raise NotImplementedError("part 4: write fixed_chunks, a list of sizes")


def chunk_log_ratio(log_prob_new, log_prob_old, chunk_sizes):
    """Log (..., K) of the chunks' ratios, from the steps' log-probabilities (..., N) and a list of K sizes whose sum is N."""
    raise NotImplementedError("part 4: write chunk_log_ratio, the log of a geometric mean")


def relative_distance(trajectory, distance="l1"):
    """Curve (B, S) of d_k = ||x_k - x_{k+1}|| / ||x_k||, from a trajectory (B, S + 1, ...).

    distance is "l1" or "l2", the norm over all latent dimensions, or "cosine": 1 - cosine of the angle between x_k and x_{k+1}.
    """
    raise NotImplementedError("part 4: write relative_distance, how far each step moves the latents")


def adaptive_chunks(curve, max_chunk=4):
    """List of chunk sizes, none above max_chunk, that follow a distance curve, a numpy array (S,). The rule is on the sheet."""
    raise NotImplementedError("part 4: write adaptive_chunks, which cuts a curve where it turns")


# Part 5: gains


def gains(rewards):
    """Gain (B, S) of every step, from the reward (B, S + 1) of every state."""
    raise NotImplementedError("part 5: write gains, what each step added to the reward")


def gain_advantages(gains, group_size, normalize="joint"):
    """Advantages (B, S) of group-major gains (B, S): (g - mean) / (std + 1e-4), clamped to ±5.

    Mean and std (with n - 1) are the group's, over its images and steps ("joint") or over its images at each step ("step").
    Where they are taken over equal values the advantages are 0.
    """
    raise NotImplementedError("part 5: write gain_advantages, gains on the scale of their group")


# Part 6: measuring credit


def value_of_state(x, k, num_steps, transition, reward, continuations):
    """Value (B,) of states x (B, ...) at step k: the mean reward of `continuations` independent continuations of each.

    transition(x, k) draws x_{k+1} (N, ...) from x_k (N, ...), with noise of its own for every row; reward(x) is the reward
    (N,) of x_S, where S = num_steps. At k = S nothing is left to draw.
    """
    raise NotImplementedError("part 6: write value_of_state, the expected reward from here on")


def true_advantages(values):
    """True advantage (B, S) of every step, from the value (B, S + 1) of every state."""
    raise NotImplementedError("part 6: write true_advantages, what each step changed in the value")


def variance_shares(first, second):
    """Share (S,) of every step in the variance of the reward, from two independent estimates (B, S) of the true advantages.

    The estimates' errors are independent of each other, so the shares must not grow with them. They sum to 1.
    """
    raise NotImplementedError("part 6: write variance_shares, from two noisy estimates of the true advantages")


def sign_agreement(advantages, true_advantages):
    """Share, a scalar, of the pairs that have the same sign, among those in which neither is 0; both are (B, S)."""
    raise NotImplementedError("part 6: write sign_agreement, how often a method's advantage points the right way")


# Part 7: a judge that can be fooled


def bradley_terry(preferred, other):
    """Loss, a scalar: -log of the probability of the annotator's answer, mean over N pairs of scores (N,) and (N,)."""
    raise NotImplementedError("part 7: write bradley_terry, the loss that a judge is fitted by")


def path_kl(mean, mean_base, std):
    """KL (B,) in nats of paths of S Gaussian steps from the base model's: means (B, S, ...) each, std (S,) of both."""
    raise NotImplementedError("part 7: write path_kl, how far the policy is from the base model")


def best_of_n(scores, gold):
    """Mean gold, a scalar, of the image with the highest score among each caption's n; both are (P, n)."""
    raise NotImplementedError("part 7: write best_of_n, what a judge's favourites are worth")


# Pen and paper, and what a question asks for: a formula in the variables that the sheet names, in Python's notation, such as
# "sqrt(a**2 + 1) / 2". Of the bugs: the faulty line (for a missing line: the one that should be there), and the symptom's letter.
ANSWERS = {
    "expected_log_prob": "",  # part 1
    "own_mean_factor": "",  # part 2
    "variety_with_favourite": "",
    "log_ratio_mean": "",  # part 3
    "log_ratio_std": "",
    "mean_ratio": "",
    "clip_at_other_size": "",
    "bug_1_line": "",
    "bug_1_symptom": "",
    "bug_2_line": "",
    "bug_2_symptom": "",
    "bug_3_line": "",
    "bug_3_symptom": "",
    "step_weight": "",  # part 4
    "product_weight_over_grpo": "",
    "hidden_weight": "",
    "mean_gain": "",  # part 5
    "ddim_std_over_cps": "",
    "uniform_gradient_mean": "",  # part 6
    "uniform_gradient_variance": "",
    "true_gradient_variance": "",
    "share_of_step_0": "",
    "sign_agreement_of_grpo": "",
    "bradley_terry_gradient": "",  # part 7
    "best_of_n_kl": "",
    "remedy": "",  # flags, such as "--lr 1e-3"
}
