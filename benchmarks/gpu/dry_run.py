"""`gpu_check.sh` without a GPU: `bash benchmarks/gpu_check.sh STAGE --dry-run [--compile] [--run]`.

Of every step of the plan: its files exist, its modules and plugins can be imported, its tests are
collected, and each part of a choice of tests chooses some. Nothing may be imported that the bare
machine lacks. The limits of a stage fit into its five minutes. `--compile` compiles every kernel
for sm_90a, `--run` runs the tests and the benchmarks on the CPU as far as it can stand in.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import defaultdict

from benchmarks.common.sources import ROOT

SCRIPT = "benchmarks/gpu_check.sh"
SECONDS = 300
OPTIONS = ("-p", "-k", "-m")  # that a word follows
# of the chosen tests, what the stand-in of a GPU cannot do: replays of graphs, counts of launches,
# memory formats and pickles of its tensors, the messages of the operators for a GPU; large cases
BEYOND = (
    "captured or launches or channels_last or pickle or state_dict or autograd_notices or negative "
    "or two_devices or complex_matrix or build_has_cuda or 4096 or 8192 or 5000 or 10000"
)
COMPILE = "tests/cuda_on_cpu/check_compile.py"


def plan(stage: str) -> list[dict]:
    """The steps of a stage."""
    command = ["bash", SCRIPT, stage, "--plan"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


def seconds(steps: list[dict]) -> int:
    """The most that steps take, those of the lanes beside one another being run together."""
    lanes: dict[int, int] = defaultdict(int)
    for step in steps:
        lanes[step["lane"]] += step["limit"]
    return lanes.pop(0) + max(lanes.values(), default=0)


def after_pytest(command: list[str]) -> list[str] | None:
    """The arguments of pytest in a command, or None where it has none."""
    return command[command.index("pytest") + 1 :] if "pytest" in command else None


def alternatives(expression: str) -> list[str]:
    """The parts of `a or b and (c or d)` outside of parentheses: `a`, `b and (c or d)`."""
    parts, depth = [""], 0
    for word in re.findall(r"\(|\)|[^()\s]+", expression):
        depth += {"(": 1, ")": -1}.get(word, 0)
        if word == "or" and depth == 0:
            parts.append("")
        else:
            parts[-1] += f" {word}"
    return [part.strip() for part in parts]


def value(command: list[str], option: str) -> list[str]:
    """What follows an option, as often as it is given."""
    return [command[i + 1] for i, word in enumerate(command[:-1]) if word == option]


def wrong(step: dict) -> list[str]:
    """What is wrong with the words of a step."""
    command, found = step["command"], []
    for word in command:
        is_path = re.fullmatch(r"(tests|benchmarks|csrc|rlscuda|setup)[\w./]*", word)
        if is_path and "/" in word and not (ROOT / word).exists():
            found.append(f"there is no {word}")
    arguments = after_pytest(command)
    modules = value(command, "-m") if arguments is None else value(arguments, "-p")
    for name in modules:
        if not name.startswith("no:") and importlib.util.find_spec(name) is None:
            found.append(f"there is no module {name}")
    return found


def collected(calls: list[list[str]]) -> list[tuple[int, list[str]]]:
    """The exit status of pytest and the names of the tests that each call of it collects."""
    unwanted = ("RLSCUDA_TEST_DEVICE", "CHECK_JOURNAL", "CHECK_STEP")
    variables = {k: v for k, v in os.environ.items() if k not in unwanted}
    variables |= {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.collect"], cwd=ROOT, input=json.dumps(calls),
        capture_output=True, text=True, env=variables,
    )  # fmt: skip
    if run.returncode:
        raise SystemExit(run.stdout + run.stderr)
    *output, last = run.stdout.strip().splitlines()
    found = json.loads(last)
    if any(status for status, _ in found):
        print(*output, sep="\n")
    return found


def chosen(expression: str, names: list[str]) -> list[str]:
    """The tests that a -k of words, `and`, `or` and `not` chooses."""

    def chooses(name: str) -> bool:
        def holds(word: re.Match) -> str:
            operator = word[0] in ("and", "or", "not")
            return word[0] if operator else str(word[0].lower() in name.lower())

        return eval(re.sub(r"[^()\s]+", holds, expression))  # of the script's own words

    return [name for name in names if chooses(name)]


def unchosen(steps: list[dict]) -> list[str]:
    """What is wrong with the tests of all steps, which are collected in one process."""
    calls = {}
    for step in steps:
        arguments = after_pytest(step["command"])
        if arguments is not None:
            bare = list(arguments)
            for expression in value(arguments, "-k"):
                place = bare.index(expression)
                del bare[place - 1 : place + 1]
            calls[json.dumps(arguments)] = arguments
            calls[json.dumps(bare)] = bare
            step["all"], step["some"] = json.dumps(bare), json.dumps(arguments)
    by_call = dict(zip(calls, collected(list(calls.values())), strict=True))
    found = []
    for step in (step for step in steps if "all" in step):
        status, names = by_call[step["some"]]
        print(f"{step['step']}: {len(names)} tests", flush=True)
        found += [f"{step['step']}: collecting exits with {status}"] if status else []
        for expression in value(calls[step["some"]], "-k"):
            words = re.findall(r"[^()\s]+", expression)
            parts = {*alternatives(expression), *words} - {"and", "or", "not"}
            every = by_call[step["all"]][1]
            if chosen(expression, every) != names:
                found.append(f"{step['step']}: {expression!r} is read otherwise by pytest")
            found += [
                f"{step['step']}: {part!r} chooses no test"
                for part in sorted(parts) if not chosen(part, every)
            ]  # fmt: skip
    return found


def rehearse(step: dict) -> str:
    """Runs the tests of a step where the CPU stands in; an empty text where all is well."""
    arguments = after_pytest(step["command"])
    if arguments is None:
        return ""
    expressions = [f"not ({BEYOND})", *value(arguments, "-k")]
    arguments = [*arguments, "-k", " and ".join(f"({text})" for text in expressions)]
    variables = {"CHECK_JOURNAL": os.devnull, "CHECK_STEP": step["step"], "PYTHONPATH": str(ROOT)}
    named = [word.split("=") for word in step["command"] if word.startswith("RLSCUDA_")]
    timing = [] if "no:benchmark" in arguments else ["--benchmark-disable"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, *timing, "-p", "benchmarks.gpu.stand_in"],
        cwd=ROOT, env=os.environ | variables | dict(named),
    )  # fmt: skip
    return "" if run.returncode == 0 else f"{step['step']}: pytest exits with {run.returncode}"


def main() -> int:
    """Prints what would go wrong; the number of such findings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["prove", "measure"])
    parser.add_argument("--compile", action="store_true", help="every kernel, for sm_90a")
    parser.add_argument("--run", action="store_true", help="the tests and benchmarks, on the CPU")
    args = parser.parse_args()
    findings = []
    syntax = subprocess.run(["bash", "-n", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    findings += [syntax.stderr] if syntax.returncode else []
    steps = plan(args.stage)
    if (most := seconds(steps)) > SECONDS:
        findings.append(f"the limits of {args.stage} must fit into {SECONDS} s, got {most} s")
    for step in steps:
        findings += [f"{step['step']}: {text}" for text in wrong(step)]
        findings += [text] if args.run and (text := rehearse(step)) else []
    findings += unchosen(steps)
    if args.compile:
        arch = {"TORCH_CUDA_ARCH_LIST": "9.0a"}
        run = subprocess.run([sys.executable, COMPILE], cwd=ROOT, env=os.environ | arch)
        findings += [f"{COMPILE} exits with {run.returncode}"] if run.returncode else []
    print(*findings, f"{len(findings)} findings; {args.stage} takes {most} s at most", sep="\n")
    return len(findings)


if __name__ == "__main__":
    sys.exit(main())
