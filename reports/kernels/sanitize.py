"""GPU tests under compute-sanitizer, some in each process, some processes at a time; only our kernels are looked at.

    python reports/kernels/sanitize.py racecheck OUT.md [--each 8] [--together 4] [--seconds 600] [--only WORDS]
        [--tests FILE]

With racecheck, kernels are compiled so that it can follow them (COMPRESS_RACECHECK=1), products that tests compare with
are made without cuBLAS (products.py), and what is a test of cuSPARSELt is left out: both fail under it. A process stops
at its first failure, since after an error of CUDA's every later test of it fails; the rest counts as not run.
OUT-left.txt names what did not pass; as FILE it is what is run, and nothing else. A test may take 10 GB of the card and
more: where there is no memory, the sanitizer ends as it does in cuBLAS.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark", "-m", "gpu", "--override-ini"]


def kernels() -> list[str]:
    """Names of our kernels: what follows each __global__ of the sources."""
    text = "".join(path.read_text() for path in sorted(KERNELS.glob("*.cu")))
    found = re.findall(r"__global__(.*?)\(\s*const", re.sub(r"__\w+__\([^()]*(\([^()]*\))?[^()]*\)", "", text), re.S)
    return sorted({words.split()[-1] for words in found})


def collected(only: str) -> list[str]:
    """The GPU tests; files without any are left out, as they may ask for packages that are not there."""
    files = [str(file) for file in sorted(Path("tests").rglob("test_*.py")) if "mark.gpu" in file.read_text()]
    listed = subprocess.run(
        [*PYTEST, "addopts=--import-mode=importlib", "--collect-only", "-q", *(["-k", only] if only else []), *files],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [line for line in listed.stdout.splitlines() if "::" in line]


def run(tool: str, tests: list[str], log: Path, until: float) -> tuple[list[str], str]:
    """Tests that did not pass, and what the sanitizer said."""
    names = [word for name in kernels() for word in ("--kernel-name", f"kne={name}")]
    env, more = dict(os.environ), []
    if tool == "racecheck":
        path = os.pathsep.join(filter(None, [str(Path(__file__).parent), env.get("PYTHONPATH", "")]))
        env |= {"COMPRESS_RACECHECK": "1", "PYTHONPATH": path}
        more = ["-p", "products"]
    tests_first = [*PYTEST, "addopts=--import-mode=importlib", *more, "-x", "-v", *tests]
    command = ["compute-sanitizer", "--tool", tool, *names, "--print-limit", "5", *tests_first]
    with log.open("w") as out:
        try:
            seconds = max(1.0, until - time.monotonic())
            subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            out.write("\nno time was left\n")
    text = log.read_text(errors="replace")
    passed = len(re.findall(r"^.*PASSED", text, re.M))  # in the order in which they were given
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    said = re.findall(r"=+ (.*?(?:hardware exception|Race reported|Invalid __|Error: ).*)|(no time was left)", text)
    first = re.findall(r"^(\S+::\S+) .*FAILED", text, re.M)
    words = [*(s.strip() for pair in said[:3] for s in pair if s), *(f"first failed: {name}" for name in first[:1])]
    return tests[passed:], "; ".join([*summary[-1:], *words])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=["racecheck", "memcheck", "synccheck", "initcheck"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--each", type=int, default=8, help="tests a process")
    parser.add_argument("--together", type=int, default=4, help="processes at a time: each takes gigabytes of the card")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--only", default="", help="as pytest's -k")
    parser.add_argument("--tests", type=Path, help="file of tests, one a line")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    only = args.only
    if args.tool == "racecheck":  # which fails in cuSPARSELt's own kernels
        only = " and ".join(filter(None, [f"({only})" if only else "", "not plain_values"]))
    tests = collected(only)
    if args.tests is not None:
        tests = [line for line in args.tests.read_text().splitlines() if line in tests]
    groups = [tests[i : i + args.each] for i in range(0, len(tests), args.each)]
    logs = args.out.with_suffix("")
    logs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.together) as pool:
        found = list(pool.map(lambda i: run(args.tool, groups[i], logs / f"{i}.log", until), range(len(groups))))
    left = [test for missing, _ in found for test in missing]
    args.out.with_name(args.out.stem + "-left.txt").write_text("".join(f"{test}\n" for test in left))
    lines = [f"{args.tool}: {len(tests) - len(left)} of {len(tests)} tests passed", ""]
    lines += ["| from | passed | not | said |", "|---|---|---|---|"]
    for group, (missing, said) in zip(groups, found, strict=True):
        lines.append(f"| {group[0]} | {len(group) - len(missing)} | {len(missing)} | {said} |")
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
