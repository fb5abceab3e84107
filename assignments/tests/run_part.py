"""python run_part.py <part> <pipe> <limit> <name>: runs a part's tests on student.py, the copy of <name> in the current folder.

The pipe gets one line of JSON at a time: the tests with their points, then what each of them says ("" where it holds), then
"end". A process that ends without that line was ended by the submission. A test that takes longer than <limit> seconds is
interrupted; what Python cannot interrupt the grader ends from outside.
"""

import importlib
import json
import os
import signal
import sys
import traceback

from checks import Wrong


def tests_of(part):
    """The tests of a part, in order."""
    module = importlib.import_module(f"part{part}")
    return [test for name, test in vars(module).items() if name.startswith("test_")]


def explain(error):
    """Type, place and message of an exception; the place is the line of the submission that it passed through last."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith("student.py")]
    where, message = " in the test, from what your function returned", str(error).strip() or "no message"
    if frames:
        where = f" in line {frames[-1].lineno}, `{frames[-1].line}`"
    if isinstance(error, SyntaxError):
        where, message = f" in line {error.lineno}, `{(error.text or '').strip()}`", error.msg
    return f"{type(error).__name__}{where}: {message}"[:500]


def run_test(test, submission):
    """What is wrong, or "" if nothing is. SystemExit and the like count as wrong too."""
    try:
        test(submission)
        return ""
    except (Wrong, NotImplementedError) as error:
        return str(error) or explain(error)
    except BaseException as error:
        return explain(error)


def main(part, pipe, limit, name):
    def interrupt(*_):
        raise TimeoutError(f"it took longer than {limit:g} seconds: is there an endless loop, or a broadcast to a huge tensor?")

    report = lambda line: os.write(pipe, (json.dumps(line) + "\n").encode())
    tests = tests_of(part)
    report([[test.__doc__, test.points] for test in tests])
    try:
        submission, broken = importlib.import_module("student"), ""
    except BaseException as error:
        submission, broken = None, f"{name} cannot be imported: {explain(error)}"
    signal.signal(signal.SIGALRM, interrupt)
    for test in tests:
        signal.setitimer(signal.ITIMER_REAL, limit)
        message = broken or run_test(test, submission)
        signal.setitimer(signal.ITIMER_REAL, 0)
        report(message)
    report("end")
    os._exit(0)  # not sys.exit: nothing that the submission left behind runs any more


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
