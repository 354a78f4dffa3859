"""Whatever session the scheduler lets in, the engine runs it or says what is wrong with it."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from support.fuzzing import arbitrary, mutated, run_in_engine

from .conftest import Target
from .settings import bounded


@bounded(250)
@given(random=st.randoms(use_true_random=False))
def test_a_session_with_something_changed_runs_or_fails_with_an_error_of_the_table(
    target: Target, random: Random
) -> None:
    run_in_engine(mutated(random.choice(target.seeds), random), target.model, target.known)


@bounded(100)
@given(random=st.randoms(use_true_random=False))
def test_a_session_of_arbitrary_parts_is_refused_or_runs(target: Target, random: Random) -> None:
    session = type(target.seeds[0])()
    run_in_engine(arbitrary(session, random), target.model, target.known)


def test_the_sessions_that_are_changed_are_valid(target: Target) -> None:
    for seed in target.seeds:
        assert run_in_engine(seed, target.model, target.known)
