"""The learning rate, step by step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from utils.errors import UserError
from utils.schedule import POLICIES, Schedule

COSINE = Schedule(policy="cosine", base_rate=0.02, total_steps=200, burn_in_steps=40, final_rate=0.001)

# One of each, as a cfg might have it.
KEYS = {
    "steps": {"steps": (100, 150), "scales": (0.1, 0.5)},
    "step": {"step": 30, "scale": 0.5},
    "exp": {"gamma": 0.99},
    "poly": {"power": 3.0},
    "sig": {"step": 80, "gamma": 0.05},
    "sgdr": {"cycle_steps": 25, "cycle_mult": 2.0},
}


def schedule_of(policy: str, **fields) -> Schedule:
    return replace(COSINE, policy=policy, **{**KEYS.get(policy, {}), **fields})


def rates(schedule: Schedule) -> list[float]:
    return [schedule.rate(step) for step in range(schedule.total_steps)]


def darknets_rate(schedule: Schedule, n: int, max_batches: int) -> float:
    """Update n, counted from 1: a transcription of darknet's network.c, get_current_rate."""
    lr0, s = schedule.base_rate, schedule
    if n < s.burn_in_steps:
        return lr0 * (n / s.burn_in_steps) ** s.power
    if s.policy == "constant":
        return lr0
    if s.policy == "steps":
        for at, scale in zip(s.steps, s.scales, strict=True):
            if at > n:
                break
            lr0 *= scale
        return lr0
    if s.policy == "step":
        return lr0 * s.scale ** (n // s.step)
    if s.policy == "exp":
        return lr0 * s.gamma**n
    if s.policy == "poly":
        return lr0 * (1 - n / max_batches) ** s.power
    if s.policy == "sig":
        return lr0 / (1 + math.exp(s.gamma * (n - s.step)))
    assert s.policy == "sgdr"
    start, cycle = 0, s.cycle_steps
    while start + cycle < n:
        start += cycle
        cycle *= int(s.cycle_mult)
    return s.final_rate + 0.5 * (lr0 - s.final_rate) * (1 + math.cos(math.pi * (n - start) / cycle))


@pytest.mark.parametrize("burn_in_steps", [0, 40])
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "cosine"])
def test_each_policy_is_darknets(policy, burn_in_steps):
    schedule = schedule_of(policy, burn_in_steps=burn_in_steps)
    made = rates(schedule)
    assert made == pytest.approx([darknets_rate(schedule, n, 200) for n in range(1, 201)], rel=1e-12, abs=1e-18)
    assert len(set(made)) > 1 or (policy, burn_in_steps) == ("constant", 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_burn_in_rises_as_the_fourth_power_and_counts_from_one(policy):
    made = rates(schedule_of(policy, power=4.0))
    assert made[0] == pytest.approx(0.02 * (1 / 40) ** 4)
    assert made[19] == pytest.approx(0.02 * (20 / 40) ** 4)
    assert made[:39] == sorted(made[:39])
    assert made[38] < 0.02


def test_the_power_can_be_chosen():
    assert replace(COSINE, power=1.0).rate(9) == pytest.approx(0.02 * 10 / 40)


def test_constant_is_constant():
    assert set(rates(replace(COSINE, policy="constant", burn_in_steps=0))) == {0.02}


def test_steps_scale_the_rate_when_they_are_reached():
    made = rates(schedule_of("steps"))
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


@pytest.mark.parametrize("total_steps", [1, 11, 39, 200, 1234])
@pytest.mark.parametrize("cfg_steps", [0, 200, 500_500])
def test_sgdr_without_a_cycle_is_one_cosine_to_the_last_step(total_steps, cfg_steps):
    cosine = replace(COSINE, total_steps=total_steps, burn_in_steps=0)
    for cycle_steps in {0, cfg_steps}:
        sgdr = replace(cosine, policy="sgdr", cfg_steps=cfg_steps, cycle_steps=cycle_steps)
        assert rates(sgdr) == pytest.approx(rates(cosine), rel=1e-9)


@pytest.mark.parametrize(("mult", "restarts"), [(2.0, [25, 75, 175]), (1.0, [25, 50, 75, 100, 125, 150, 175])])
def test_restarts_go_back_to_the_base_rate(mult, restarts):
    """After cycles of 25, 50, 100 updates; or of 25 each."""
    made = rates(schedule_of("sgdr", burn_in_steps=0, cycle_mult=mult))
    assert [step for step in range(1, 200) if made[step] > made[step - 1]] == restarts
    assert [made[at - 1] for at in restarts] == [pytest.approx(0.001)] * len(restarts)
    assert all(made[at] > 0.0198 for at in restarts)


@pytest.mark.parametrize("factor", [0.5, 2, 3])
@pytest.mark.parametrize("policy", ["step", "exp", "sig", "sgdr", "poly", "cosine"])
def test_a_run_of_another_length_keeps_the_proportions(policy, factor):
    whole = schedule_of(policy, burn_in_steps=0, cfg_steps=200)
    other = replace(whole, total_steps=int(200 * factor))
    for quarter in range(1, 5):
        at, there = 50 * quarter, int(50 * quarter * factor)
        assert other.rate(there - 1) == pytest.approx(whole.rate(at - 1), rel=1e-9)


def test_no_number_is_too_large():
    for policy in POLICIES:
        schedule = schedule_of(policy, base_rate=1.0, total_steps=10, cfg_steps=10**9, burn_in_steps=0)
        assert all(0 <= rate <= 1 for rate in rates(schedule))
    rising = schedule_of("sig", gamma=-1e9, burn_in_steps=0)
    assert all(0 <= rate <= 0.02 for rate in rates(rising))


@pytest.mark.parametrize("policy", ["linear", "sigmoid", ""])
def test_an_unknown_policy_names_the_known_ones(policy):
    with pytest.raises(
        UserError, match=f"'{policy}': choose one of constant, steps, step, exp, poly, sig, sgdr, cosine"
    ):
        Schedule(policy=policy, base_rate=0.1, total_steps=10)


def test_steps_without_scales_are_refused():
    with pytest.raises(UserError, match="2 learning-rate steps but 1 scales"):
        Schedule(policy="steps", base_rate=0.1, total_steps=10, steps=(1, 2), scales=(0.1,))


@pytest.mark.parametrize(
    ("policy", "fields", "message"),
    [
        ("step", {}, "step needs a scale between 0 and 1 in .net., not 1"),
        ("step", {"scale": 2.5}, "not 2.5"),
        ("exp", {}, "exp needs a gamma between 0 and 1 in .net., not 1"),
        ("exp", {"gamma": -0.5}, "not -0.5"),
        ("sig", {}, "sig needs a gamma other than 1"),
        ("sgdr", {"cycle_mult": 0.5}, "sgdr needs an sgdr_mult of 1 or more, not 0.5"),
    ],
)
def test_a_policy_without_its_key_names_the_key(policy, fields, message):
    with pytest.raises(UserError, match=message):
        Schedule(policy=policy, base_rate=0.1, total_steps=10, **fields)
    assert Schedule(policy="constant", base_rate=0.1, total_steps=10, **fields).rate(0) == 0.1


def test_it_says_what_it_is():
    stepped = Schedule(
        policy="steps", base_rate=0.01, total_steps=2000, burn_in_steps=200, steps=(1600,), scales=(0.1,)
    )
    assert stepped.words() == "2,000 steps: 200 of burn-in, then steps at 1600 from 0.01"
    assert Schedule(policy="cosine", base_rate=1e-3, total_steps=8).words() == "8 steps: cosine from 0.001"
