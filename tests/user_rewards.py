"""Rewards as a user would write them."""

import time

from astro_hpc.problems.problem import Problem

NUMBER = 3


def by_length(problem: Problem, response: str, outcome: str) -> float:
    return float(len(response))


def not_a_number(problem: Problem, response: str, outcome: str) -> float:
    return float("nan")


def fails(problem: Problem, response: str, outcome: str) -> float:
    return 1 / 0


def hangs(problem: Problem, response: str, outcome: str) -> float:
    time.sleep(3600)
    return 0.0


def by_number_of_letters(problem: Problem, response: str, outcome: str) -> float:
    return sum(character.isalpha() for character in response) / 10
