"""Where the right path is known, the exact method names it every time, and each published choice fails as it must."""

from __future__ import annotations

import pytest

from circuits import FrozenModel, Logit, PathOptions, trace_paths
from tests.circuits.compiled_models import echo, echo_cases, echo_coder
from tests.circuits.methods import CASES, SEEDS, TASKS, compiled_rates, tables
from tests.kinds import MAMBA

pytestmark = pytest.mark.usefixtures("fast")
SOURCE, CHANNEL, EMBEDDING = range(3)
FAILURES = {
    # The marker's position stands for the value that the convolution brought there, and u_t for u_s.
    "latch, value through the convolution": {"conv": EMBEDDING, "ssm_input": SOURCE, "preset": EMBEDDING},
    "latch, marker through the convolution": {"ssm_input": SOURCE, "preset": SOURCE},
    # What takes away comes last, and is not what the channel that adds most does.
    "the same, what holds the other value back": {
        "rank": SOURCE, "head": CHANNEL, "ssm_input": SOURCE, "preset": SOURCE,
    },
    "induction": {"ssm_input": CHANNEL, "preset": CHANNEL},
    "echo through the scan": {"include_self": CHANNEL, "preset": SOURCE},
    "echo through D": {"include_D": CHANNEL, "preset": SOURCE},
    "echo, by a coder": {"acts": CHANNEL, "preset": CHANNEL},
}  # fmt: skip
"""Task -> method -> what it gets wrong."""


def check(task: str, family: str, seeds: range, cases: int) -> None:
    found = compiled_rates(TASKS[task], family, seeds, cases, ["exact", *FAILURES[task]])
    assert [rate.value for rate in found["exact"]] == [1.0, 1.0, 1.0]
    for method, what in FAILURES[task].items():
        assert found[method][what].value <= 0.5


@pytest.mark.parametrize("family", MAMBA)
@pytest.mark.parametrize("task", TASKS)
def test_failures_are_those_that_the_faults_predict(task, family):
    check(task, family, seeds=range(3), cases=2)


@pytest.mark.parametrize("family", MAMBA)
def test_features_beside_heads_count_a_block_twice(family):
    compiled, case = echo(family, "skip", 0, distractors=False), echo_cases(1, 0)[0]
    frozen = FrozenModel(compiled.model, case.tokens, [echo_coder(compiled.model)])
    target = Logit(case.answer, minus=case.other)
    once, twice = (
        trace_paths(frozen, target, k=1000, length=1, preset=PathOptions(nodes=nodes)) for nodes in ("once", "beside")
    )
    assert abs(once.paths[0].remainder) < 1e-10
    assert abs(twice.paths[0].remainder + twice.value) < 1e-6 * twice.value  # what the coder misses


@pytest.mark.slow
@pytest.mark.parametrize("family", MAMBA)
@pytest.mark.parametrize("task", TASKS)
def test_on_all_cases_of_the_table(task, family):
    check(task, family, SEEDS, CASES)


@pytest.mark.slow
def test_the_tables():
    lines = list(tables(seeds=range(1), cases=1, prompts=2))
    assert len([line for line in lines if line.startswith("| exact |")]) == 3
    assert all(line.count("|") == lines[0].count("|") for line in lines[:14])
