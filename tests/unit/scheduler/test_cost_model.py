"""What sessions are expected to cost follows what they did cost."""

from __future__ import annotations

import pytest

from insitu_scheduler.cost_model import CostModel, Work


def test_measurements_replace_what_was_expected_before() -> None:
    costs, small, large = CostModel(), Work(1, 10), Work(40, 400)
    for _ in range(300):
        costs.learn("a", small, 0.3)
    assert costs.expect("a", small) == pytest.approx(0.3, rel=0.05)
    assert 30 * costs.expect("a", small) < costs.expect("a", large) < 45 * costs.expect("a", small)


def test_models_do_not_share_what_was_learned() -> None:
    costs, work = CostModel(), Work(1, 10)
    before = costs.expect("b", work)
    costs.learn("a", work, 100.0)
    assert costs.expect("b", work) == before


def test_a_session_without_traces_costs_something() -> None:
    assert CostModel().expect(None, Work(0, 0)) > 0
