"""What the tests are written with: points, comparisons that say how wrong an answer is and what mistake it looks like, formulas."""

import ast
import math
import operator
import random

import numpy as np
import torch
from torch.overrides import TorchFunctionMode


def worth(points):
    """Marks a test (a function of the submission, whose docstring's first line is the test's title) with its points."""

    def mark(test):
        test.points = points
        return test

    return mark


class Wrong(AssertionError):
    """What a test says; an AssertionError that is none of these comes from the submission's own code."""


def holds(condition, message):
    """Unlike assert, says in words what is expected."""
    if not condition:
        raise Wrong(message)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(what, got, expected, mistakes=None, tolerance=1e-8):
    """Fails unless got is expected; says which of the mistakes {description: what it would give} it looks like, or how far off."""
    if not isinstance(got, torch.Tensor):
        holds(isinstance(got, int | float | np.ndarray | np.generic), f"{what} is a {type(got).__name__}, not a tensor")
    got, expected = torch.as_tensor(got).detach().double(), torch.as_tensor(expected).detach().double()

    def is_close(value):
        return got.shape == value.shape and torch.allclose(got, value, rtol=tolerance, atol=tolerance)

    if is_close(expected):
        return
    rounded = got.shape == expected.shape and tolerance < 1e-5 and torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    holds(not rounded, f"{what} differs by float32 rounding only: do not cast float64 down")
    for mistake, value in (mistakes or {}).items():
        holds(not is_close(torch.as_tensor(value).detach().double()), f"{what} looks like {mistake}")
    holds(got.shape == expected.shape, f"{what} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    holds(got.isfinite().all(), f"{what} is not finite: look for a root of a negative number or a division by 0")
    difference = (got - expected).abs()
    worst = np.unravel_index(int(difference.argmax()), difference.shape)
    place = f" at {tuple(int(i) for i in worst)}" if difference.ndim else ""
    largest = f"largest difference {difference.max():.3g}{place}: got {got[worst]:.6g}, expected {expected[worst]:.6g}"
    raise Wrong(f"{what} is wrong in {int((difference > tolerance).sum())} of {difference.numel()} places; {largest}")


def gradient(function, x):
    """Gradient of the sum of function(x) with respect to x."""
    x = x.detach().clone().requires_grad_()
    total = function(x).sum()
    holds(total.requires_grad, "no gradient flows through the result: it was detached, or made with .item() or numpy")
    return torch.autograd.grad(total, x)[0]


def finite_differences(function, x, step=1e-6):
    """The same gradient without autograd."""
    result = torch.zeros_like(x)
    for i in range(x.numel()):
        shift = torch.zeros_like(x)
        shift.view(-1)[i] = step
        result.view(-1)[i] = (function(x + shift).sum() - function(x - shift).sum()) / (2 * step)
    return result


class Elsewhere(TorchFunctionMode):
    """Puts tensors made without device= on another device than the inputs, as happens when those are on a GPU."""

    makers = {torch.tensor, torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.linspace, torch.eye}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        makes = function in self.makers and (kwargs or {}).get("device") is None
        return result.to("meta") if makes and result.ndim else result  # numbers may be anywhere


def is_well_behaved(function, *inputs):
    """Fails if the function changes its float64 inputs or loses their dtype or device."""
    name, tensors = function.__name__, [i for i in inputs if isinstance(i, torch.Tensor)]
    before = [t.clone() for t in tensors]
    result = function(*inputs)
    for tensor, old in zip(tensors, before):
        holds(torch.equal(tensor, old), f"{name} changes an input in place: work on a new tensor")
    for dtype in (torch.float64, torch.float32):
        outputs = function(*(i.to(dtype) if isinstance(i, torch.Tensor) else i for i in inputs))
        for output in outputs if isinstance(outputs, tuple | list) else (outputs,):
            holds(isinstance(output, torch.Tensor), f"{name} returns a {type(output).__name__}, not a tensor")
            holds(output.dtype == dtype, f"{name} turns {dtype} into {output.dtype}: keep the dtype of the inputs")
    try:
        with Elsewhere():
            moved = function(*inputs)
    except RuntimeError as error:
        holds("device" not in str(error), f"{name} makes a tensor without device=, so it fails with inputs on a GPU")
    else:
        outputs, results = (o if isinstance(o, tuple | list) else (o,) for o in (moved, result))
        same_device = all(o.device == r.device for o, r in zip(outputs, results))
        holds(same_device, f"{name} returns a tensor made without device=: it must be where the inputs are")


# Formulas

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
FUNCTIONS = {name: getattr(math, name) for name in "sqrt exp log sin cos tan asin acos atan".split()}


def evaluate(formula, variables):
    """Value of a formula made of numbers, variables, + - * / **, and FUNCTIONS; ValueError says what else it holds."""

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(node.value)  # in floats, a tower of powers overflows at once instead of filling the memory
        if isinstance(node, ast.Name) and node.id in variables:
            return variables[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.operand))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and len(node.args) == 1:
            return FUNCTIONS[node.func.id](value(node.args[0]))
        raise ValueError(
            f"{ast.unparse(node)!r} is not a number, one of {', '.join(variables)}, + - * / **, {', '.join(FUNCTIONS)}"
        )

    if len(formula) > 200:
        raise ValueError("it is longer than 200 characters")
    return value(ast.parse(formula.strip().replace("^", "**"), mode="eval").body)


def answer(submission, name):
    """A non-empty entry of ANSWERS."""
    text = submission.ANSWERS.get(name, "")
    if not isinstance(text, str) or not text.strip():
        raise Wrong(f'answer ANSWERS["{name}"]')
    return text


def formula(submission, name, expected, mistakes=None, **ranges):
    """Fails unless the answer agrees with expected(**variables) at random points of the variables' ranges (low, high)."""
    text, rng = answer(submission, name), random.Random(0)
    points = [{v: rng.uniform(*r) for v, r in ranges.items()} for _ in range(5)]
    try:
        values = [evaluate(text, {**point, "pi": math.pi}) for point in points]
        agrees = {
            f: all(math.isclose(f(**p), v, rel_tol=1e-6) for p, v in zip(points, values)) for f in (expected, *(mistakes or {}))
        }
    except (SyntaxError, ValueError, ArithmeticError, TypeError, RecursionError, MemoryError) as error:
        raise Wrong(f'ANSWERS["{name}"] = {text!r:.60} cannot be evaluated: {error}') from None
    for wrong, mistake in (mistakes or {}).items():
        holds(agrees[expected] or not agrees[wrong], f'ANSWERS["{name}"] = {text!r} looks like {mistake}')
    where = ", ".join(f"{v} = {x:.3f}" for v, x in points[0].items())
    holds(agrees[expected], f'ANSWERS["{name}"] = {text!r} is not the answer: at {where} it gives {values[0]:.6g}')
