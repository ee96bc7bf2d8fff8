"""Accuracy, cost and toughness of the verifier: the figures that README gives.

    python tools/bench_verifier.py --cases CASES.jsonl --math500 MATH500.jsonl [--hostile 1000] [--json]

CASES has {"gold", "pred", "expected"} a line, optionally "contested" (left out) and "silver" (counted apart).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from astro_hpc.config.schema import JsonlSource, VerifierConfig
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.sources import load_source
from astro_hpc.run.files import read_jsonl
from astro_hpc.verifier.extract import read_answer
from astro_hpc.verifier.pool import Verdict, VerifierPool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path)
    parser.add_argument("--math500", type=Path)
    parser.add_argument("--hostile", type=int, default=1000, help="how many hostile answers; 0: none")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="show the cases that went wrong")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    with VerifierPool(VerifierConfig(num_workers=args.workers)) as pool:
        figures["start_seconds"] = _start_seconds(pool)
        if args.cases:
            figures |= _cases(pool, args.cases, args.verbose)
        if args.math500:
            figures |= _math500(pool, args.math500, args.verbose)
        figures |= _integers(pool)
        if args.hostile:
            figures |= _hostile(pool, args.hostile)
    figures["peak_worker_mb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    print(json.dumps(figures) if args.json else "\n".join(f"{name:32} {value}" for name, value in figures.items()))


def _start_seconds(pool: VerifierPool) -> float:
    began = time.perf_counter()
    pool.verify(Problem("start", "", "x+1"), "\\boxed{1+x}")
    return round(time.perf_counter() - began, 2)


def _cases(pool: VerifierPool, path: Path, verbose: bool) -> dict[str, Any]:
    rows = [row for row in read_jsonl(path) if not row.get("contested")]
    figures: dict[str, Any] = {}
    for name, chosen in (
        ("clear", [row for row in rows if not row.get("silver")]),
        ("silver", [row for row in rows if row.get("silver")]),
    ):
        futures = [
            pool.submit_answer(Problem("case", "", read_answer(row["gold"]) or ""), read_answer(row["pred"]))
            for row in chosen
        ]
        outcomes = [future.result().outcome for future in futures]
        good = [(outcome == "right") == row["expected"] for row, outcome in zip(chosen, outcomes, strict=True)]
        wrong_accepts = [
            row for row, outcome in zip(chosen, outcomes, strict=True) if outcome == "right" and not row["expected"]
        ]
        figures |= {
            f"{name}_cases": len(chosen),
            f"{name}_accuracy": round(sum(good) / max(1, len(good)), 4),
            f"{name}_wrong_accepts": len(wrong_accepts),
            f"{name}_unknown": outcomes.count("unknown"),
        }
        if verbose:
            for row, outcome, fine in zip(chosen, outcomes, good, strict=True):
                if not fine:
                    print(f"  {outcome:8} gold {row['gold'][-120:]!r} pred {row['pred'][-120:]!r}")
    return figures


def _math500(pool: VerifierPool, path: Path, verbose: bool) -> dict[str, Any]:
    problems = {problem.text: problem for problem in load_source(JsonlSource(type="jsonl", path=path))}
    pairs = [(problems[row["problem"].strip()], row["solution"]) for row in read_jsonl(path)]
    began = time.perf_counter()
    verdicts = pool.verify_many(pairs)
    seconds = time.perf_counter() - began
    if verbose:
        for (problem, _), verdict in zip(pairs, verdicts, strict=True):
            if verdict.outcome != "right":
                print(f"  {verdict.outcome:8} gold {problem.answer!r} reference {verdict.answer!r}")
    rng = random.Random(0)
    others = [(problem, rng.choice(pairs)[1]) for problem, _ in pairs for _ in range(2)]
    crossed = pool.verify_many(others)
    accepted = [
        (problem.answer, verdict.answer)
        for (problem, _), verdict in zip(others, crossed, strict=True)
        if verdict.outcome == "right" and verdict.answer != problem.answer
    ]
    if verbose:
        print(f"  crossed pairs accepted, spelled differently: {accepted}")
    return {
        "math500_right": f"{sum(verdict.outcome == 'right' for verdict in verdicts)}/{len(verdicts)}",
        "math500_seconds": round(seconds, 2),
        "crossed_pairs": len(others),
        "crossed_unknown": sum(verdict.outcome == "unknown" for verdict in crossed),
        "crossed_accepted_other_spelling": len(accepted),
    }


def _integers(pool: VerifierPool, count: int = 20_000) -> dict[str, Any]:
    """Integer answers through the two ways in: many at once, and awaited one by one from asyncio."""
    pairs = [(Problem("i", "", str(i)), f"so the answer is $\\boxed{{{i + i % 2}}}$.") for i in range(count)]

    async def gather() -> list[Verdict]:
        return await asyncio.gather(*(pool.averify(problem, response) for problem, response in pairs))

    figures = {}
    for name, run in (("many", lambda: pool.verify_many(pairs)), ("async", lambda: asyncio.run(gather()))):
        began = time.perf_counter()
        verdicts = run()
        figures[f"integer_answers_per_second_{name}"] = round(count / (time.perf_counter() - began))
        assert sum(verdict.outcome == "right" for verdict in verdicts) == count // 2
    return figures


def _hostile(pool: VerifierPool, count: int) -> dict[str, Any]:
    gold = Problem("hostile", "", "\\frac{x+1}{2}")
    slowest, outcomes = 0.0, {"right": 0, "wrong": 0, "unknown": 0}
    began = time.perf_counter()
    for text in hostile_answers(count):
        start = time.perf_counter()
        outcomes[pool.verify(gold, f"\\boxed{{{text}}}").outcome] += 1
        slowest = max(slowest, time.perf_counter() - start)
    total = time.perf_counter() - began
    alive = pool.verify(gold, "\\boxed{\\frac12(1+x)}").outcome == "right"
    return {
        "hostile_answers": count,
        "hostile_slowest_seconds": round(slowest, 2),
        "hostile_mean_seconds": round(total / count, 3),
        "hostile_outcomes": outcomes,
        "alive_after_hostile": alive,
    }


def hostile_answers(count: int) -> Iterator[str]:
    """Different answers that ask for endless time or memory, or aren't answers at all. None equals (x+1)/2."""
    rng = random.Random(1)
    for index in range(count):
        n = rng.randrange(2, 10)
        big = "".join(rng.choices("123456789", k=rng.choice([3, 10, 100, 4000])))
        kinds = [
            f"{n}^{{{n}^{{{n}^{{{n}^{{{index}}}}}}}}}",
            f"{n}**{n}**{n}**{n}**{index}",
            f"({index}!)!" + "!" * rng.randrange(4),
            f"{n}!!!!!!+{index}",
            f"\\binom{{{big[:12]}}}{{{big[:9]}}}",
            "9" * 1_000_000 + str(index),
            "(" * rng.choice([30, 90, 5000]) + f"x+{index}" + ")" * rng.choice([30, 90, 5000]),
            "\\frac{1}{1+" * rng.choice([20, 80, 400]) + f"x+{index}" + "}" * rng.choice([20, 80, 400]),
            "\\sqrt{" * rng.choice([10, 60]) + str(index) + "}" * rng.choice([10, 60]),
            "\\{" + ", ".join(f"x^{{{i}}}+{index}" for i in range(rng.choice([20, 60, 300]))) + "\\}",
            "\\{" + ",".join(str(i + index) for i in range(rng.choice([100, 400]))) + "\\}",
            "".join(chr(rng.randrange(1, 32)) for _ in range(200)) + str(index),
            f"__import__('os').system('touch /tmp/astro-hpc-pwned-{index}')",
            f"exec('while 1: pass') # {index}",
            f"(x+1)^{{{big[:5]}}}-(x-1)^{{{big[:4]}}}+{index}",
            f"(x+y+z+w+{index})^{{{rng.choice([40, 200, 2000])}}}",
            f"\\sum_{{k=1}}^{{{big[:9]}}} \\frac{{1}}{{k^{{{n}}}}}+x",
            f"\\int_0^{{{index}}} e^{{x^{{{n}}}}}\\sin(x^{{x}}) dx",
            f"\\prod_{{k=1}}^{{{big[:7]}}} (x+k+{index})",
            f"\\sin(\\sin(\\sin({big[:100]}!)))x",
            f"\\log(\\log(10^{{10^{{{big[:6]}}}}}))+{index}x",
            "x" + "^x" * rng.choice([5, 50]) + f"+{index}",
            "\\begin{pmatrix}" + "\\\\".join("&".join(["x"] * 30) for _ in range(30)) + f"\\end{{pmatrix}}^{{{index}}}",
            "\\left(" * 60 + f"{index}",
            f"\\boxed{{\\boxed{{{index}",
            f"{big}^{{{big}}}+{index}",
            f"1e{big[:10]}+{index}",
            f"\\frac{{x}}{{0}}+{index}",
            "\ud800" + f"{index}",
            "+".join(f"\\sqrt{{{i}+{index}}}" for i in range(2, rng.choice([8, 40]))),
        ]
        yield kinds[index % len(kinds)]


if __name__ == "__main__":
    main()
