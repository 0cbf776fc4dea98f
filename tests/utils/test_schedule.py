"""The learning rate, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from utils.errors import UserError
from utils.schedule import Schedule

COSINE = Schedule(policy="cosine", base_rate=0.02, total_steps=200, burn_in_steps=40, final_rate=0.001)


def rates(schedule: Schedule) -> list[float]:
    return [schedule.rate(step) for step in range(schedule.total_steps)]


@pytest.mark.parametrize("policy", ["constant", "steps", "cosine"])
def test_burn_in_rises_as_the_fourth_power_and_counts_from_one(policy):
    made = rates(replace(COSINE, policy=policy))
    assert made[0] == pytest.approx(0.02 * (1 / 40) ** 4)
    assert made[19] == pytest.approx(0.02 * (20 / 40) ** 4)
    assert made[:40] == sorted(made[:40])
    assert made[38] < 0.02


def test_the_power_can_be_chosen():
    assert replace(COSINE, burn_in_power=1.0).rate(9) == pytest.approx(0.02 * 10 / 40)


def test_constant_is_constant():
    assert set(rates(replace(COSINE, policy="constant", burn_in_steps=0))) == {0.02}


def test_steps_scale_the_rate_when_they_are_reached():
    schedule = replace(COSINE, policy="steps", steps=(100, 150), scales=(0.1, 0.5))
    made = rates(schedule)
    assert made[98] == 0.02  # the update after 98 finished ones is number 99
    assert made[99:149] == [pytest.approx(0.002)] * 50
    assert made[149:] == [pytest.approx(0.001)] * 51


def test_a_cosine_falls_from_the_base_rate_to_the_final_one():
    made = rates(replace(COSINE, burn_in_steps=0))
    assert made == sorted(made, reverse=True) and len(set(made)) == 200
    assert made[0] == pytest.approx(0.02, rel=1e-3)
    assert made[99] == pytest.approx((0.02 + 0.001) / 2)
    assert made[-1] == pytest.approx(0.001)
    assert [COSINE.rate(step) for step in (250, 399, 10**6)] == [pytest.approx(0.001)] * 3  # never up again


@pytest.mark.parametrize("policy", ["poly", "sgdr", ""])
def test_an_unknown_policy_names_the_known_ones(policy):
    with pytest.raises(UserError, match=f"'{policy}': choose one of constant, steps, cosine"):
        Schedule(policy=policy, base_rate=0.1, total_steps=10)


def test_steps_without_scales_are_refused():
    with pytest.raises(UserError, match="2 learning-rate steps but 1 scales"):
        Schedule(policy="steps", base_rate=0.1, total_steps=10, steps=(1, 2), scales=(0.1,))


@pytest.mark.parametrize(("steps", "decay"), [(1, 0.9), (1000, 0.98), (10**9, 0.9999)])
def test_the_average_remembers_about_a_twentieth(steps, decay):
    assert replace(COSINE, total_steps=steps).average_decay() == pytest.approx(decay)
