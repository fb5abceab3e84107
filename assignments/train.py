"""Trains the miniature with your functions in place of the script's own, and draws your curve beside the reference's.

    python assignments/train.py 4                        # part 4: gcpo.py with your functions of parts 1 to 4
    python assignments/train.py 4 --clip 0.2             # further flags are the script's own
    python assignments/train.py 4 --functions my.py      # another file than assignments/student.py
    python assignments/train.py 4 --solution             # the reference solution

Scripts and flags of the parts are in bars.json. Functions of earlier parts that you have not written stay the script's own. So
does `ratio`, which is a line of the script's loop. Part 7 has no functions to train with: your flags, ANSWERS["remedy"], are added.
"""

import argparse
import ast
import importlib.util
import json
import shlex
import sys
import time
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))
from grade import fail, refuse_module_names  # noqa: E402, its folder has to be on the path before

sys.path.insert(0, str(ROOT))

# What each part puts into its script: functions of earlier parts, and its own
FUNCTIONS = {
    2: (["sde_step", "log_prob"], ["group_advantages", "policy_gradient_loss"]),
    3: (["sde_step", "log_prob", "group_advantages"], ["clipped_loss"]),
    4: (
        ["sde_step", "log_prob", "group_advantages", "clipped_loss"],
        ["fixed_chunks", "chunk_log_ratio", "relative_distance", "adaptive_chunks"],
    ),
    5: (["posterior_mean", "sde_step", "log_prob", "clipped_loss"], ["gains", "gain_advantages"]),
    7: ([], []),
}
# Flags that a remedy of part 7 may have: how the policy is trained, not by which judge nor with how many images
REMEDY_FLAGS = ["beta", "chunk-size", "clip", "eta", "iterations", "lr", "ode-steps", "sde", "step-weights", "updates"]
MAX_ITERATIONS = 30


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("part", type=int, choices=FUNCTIONS)
    parser.add_argument("--functions", type=Path, default=HERE / "student.py", help="file with your functions")
    parser.add_argument("--solution", action="store_true", help="train with the reference solution")
    parser.add_argument("--output-dir", type=Path, help="folder of the run")
    args, args.flags = parser.parse_known_args()
    if args.solution:
        args.functions = HERE / "reference.py"
    args.output_dir = args.output_dir or Path(f"runs/part_{args.part}__{time.strftime('%Y%m%d-%H%M%S')}")
    if not args.functions.is_file():
        fail(f"there is no {args.functions}")
    refuse_module_names([args.functions])
    return args


def load(path):
    """The module of a submission."""
    spec = importlib.util.spec_from_file_location("student", path)
    student = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(student)
    except Exception as error:
        fail(f"{path} cannot be imported: {type(error).__name__}: {error}")
    return student


def remedy(student):
    """The flags, a list of words, that a submission adds to the run of part 7."""
    try:
        words = shlex.split(student.ANSWERS["remedy"].replace("=", " "))
    except (AttributeError, KeyError, TypeError, ValueError):
        fail('part 7 trains with your flags: ANSWERS["remedy"] has to be a string such as "--lr 1e-3"')
    names = [word.removeprefix("--") for word in words if word.startswith("--")]
    if wrong := [name for name in names if name not in REMEDY_FLAGS]:
        fail(f"--{wrong[0]} is no remedy of part 7; the flags that are: --{', --'.join(REMEDY_FLAGS)}")
    for name, value in zip(words, words[1:]):
        if name == "--iterations" and not (value.isdecimal() and int(value) <= MAX_ITERATIONS):
            fail(f"--iterations {value} is not within the budget of part 7, at most {MAX_ITERATIONS}")
    return words


def written(student, path, part):
    """The functions {name: function} of a submission that the part puts into its script, as far as they are written."""
    earlier, own = FUNCTIONS[part]
    functions = {name: getattr(student, name, None) for name in earlier + own}
    is_written = lambda f: callable(f) and "NotImplementedError" not in f.__code__.co_names
    if missing := [name for name in own if not is_written(functions[name])]:
        fail(f"part {part} trains with your {', '.join(missing)}, not yet written in {path}")
    return {name: function for name, function in functions.items() if is_written(function)}


def put(functions, script, sampler):
    """Puts the functions where the module `script` finds them; AttributeError if it has no such place."""
    places = dict(functions)
    if "policy_gradient_loss" in places:  # of log p; the script hands over exp(log p - log p_old), which has the same gradient
        loss = places.pop("policy_gradient_loss")
        places["clipped_loss"] = lambda ratio, advantages, clip: loss(ratio.log(), advantages)
    if "posterior_mean" in places:
        posterior_mean, own = places.pop("posterior_mean"), script.estimate_x0

        def estimate_x0(pipe, x, v, k, sigmas, text, substeps, args):
            if substeps > 1:
                return own(pipe, x, v, k, sigmas, text, substeps, args)
            return posterior_mean(v, x, sigmas[k].expand(len(x)))

        places["estimate_x0"] = estimate_x0
    if "sde_step" in places:
        step = places["sde_step"]

        def sde_step(v, x, sigma, sigma_next, sigma_max, eta, sde):  # a script gives one sigma for all rows, or one for each
            return step(v, x, sigma.expand(len(x)), sigma_next.expand(len(x)), sigma_max, eta, sde)

        places["sde_step"] = sde_step
    for name, function in places.items():
        holder = sampler if name == "sde_step" else script
        getattr(holder, name)
        setattr(holder, name, function)


def run_script(name, functions, flags):
    """Runs a script as `python <name>.py <flags>` would, its functions replaced between their definition and its main part."""
    path = ROOT / f"{name}.py"
    *definitions, main = ast.parse(path.read_text()).body
    module = types.ModuleType("__main__")
    module.__file__, sys.modules["__main__"], sys.argv = str(path), module, [str(path), *flags]
    exec(compile(ast.Module(definitions, []), path, "exec"), vars(module))
    put(functions, module, module.sampler)
    exec(compile(ast.Module([main], []), path, "exec"), vars(module))


def reward_curve(folder):
    """The mean training reward of every iteration of a run."""
    import bookkeeping  # a slow import, after all checks

    return [reward for _, reward in bookkeeping.read_scalars(folder)["charts/reward"]]


def draw(curve, reference, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(curve) + 1), curve, label="yours")
    if reference:
        axes.plot(range(1, len(reference) + 1), reference, "--", label="reference, mean of its seeds")
    axes.set(xlabel="iteration", ylabel="mean reward of the training images")
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    args = parse_args()
    bar = json.loads((HERE / "bars.json").read_text())[str(args.part)]
    student = load(args.functions)
    functions = written(student, args.functions, args.part)
    added = remedy(student) if args.part == 7 else []
    own = [name for names in FUNCTIONS[args.part] for name in names if name not in functions]
    given = f"{', '.join(functions)}; the script's own: {', '.join(own) or 'none'}" if functions else " ".join(added) or "no flags"
    print(f"from {args.functions}: {given}")
    run_script(bar["script"], functions, [*bar["flags"], *added, *args.flags, "--output-dir", str(args.output_dir)])
    score = json.loads((args.output_dir / "result.json").read_text())["final_score"]
    draw(reward_curve(args.output_dir), bar["curve"], args.output_dir / "curve.png")
    beside = "beside the reference's" if bar["curve"] else "alone"
    print(f"Your curve, {beside}: {args.output_dir / 'curve.png'}")
    if bar["bar"] is None:
        print(f"There is no bar and no reference's curve: python assignments/bars.py {args.part} measures them.")
    else:
        reached = "reached" if score >= bar["bar"] else "not reached"
        print(f"Held-out score{' with further flags' * bool(args.flags)} {score:.3f}, the bar is {bar['bar']:.3f}: {reached}")


if __name__ == "__main__":
    main()
