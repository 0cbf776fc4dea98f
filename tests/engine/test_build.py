"""The parts of a training: the schedule."""

from __future__ import annotations

from typing import Any

import pytest

from cfg.plan import Plan, load_plan, parse_plan
from cfg.settings import cfg_settings
from engine.build import make_schedule
from options import TrainOptions
from utils.errors import UserError
from utils.flags import resolve
from utils.schedule import Schedule

LAYERS = "[convolutional]\nfilters=18\nactivation=linear\n[yolo]\nclasses=1\nanchors=4,4,8,8,9,9\n"


def plan_with(*lines: str) -> Plan:
    net = ("[net]", "width=32", "height=32", "learning_rate=.02", "max_batches=1000", *lines)
    return parse_plan("\n".join(net) + "\n" + LAYERS, path="some.cfg")


def schedule_of(plan: Plan, *, total_steps: int = 1000, **given: Any) -> Schedule:
    return make_schedule(resolve(TrainOptions, given, cfg_settings(plan)), plan, total_steps=total_steps)


POLICY_LINES = {
    "constant": (),
    "steps": ("steps=400,800", "scales=.1,.5"),
    "step": ("step=250", "scale=.5"),
    "exp": ("gamma=.995",),
    "poly": ("power=3",),
    "sig": ("step=500", "gamma=.01"),
    "sgdr": ("sgdr_cycle=200", "sgdr_mult=1", "learning_rate_min=.001"),
}


@pytest.mark.parametrize(("total_steps", "steps"), [(1000, 200), (2000, 200), (500, 100), (40, 8)])
def test_burn_in_keeps_its_proportion_to_a_shorter_run_and_is_not_longer_in_a_longer_one(total_steps, steps):
    plan = plan_with("policy=constant", "burn_in=200")
    assert schedule_of(plan, total_steps=total_steps).burn_in_steps == steps


def test_of_a_much_shorter_run_burn_in_may_take_a_tenth():
    plan = plan_with("policy=constant", "burn_in=10")
    assert schedule_of(plan, total_steps=50).burn_in_steps == 5


@pytest.mark.parametrize("policy", POLICY_LINES)
def test_each_policy_of_a_cfg_is_used_with_its_numbers(policy):
    """At half of the training: darknet network.c, get_current_rate."""
    schedule = schedule_of(plan_with(f"policy={policy}", *POLICY_LINES[policy]))
    assert schedule.policy == policy
    half = {
        "constant": 1,
        "steps": 0.1,
        "step": 0.5**2,
        "exp": 0.995**500,
        "poly": 0.5**3,
        "sig": 0.5,
        "sgdr": 0.05 + 0.95 * 0.5,  # in the middle of the third cycle
    }
    assert schedule.rate(499) == pytest.approx(0.02 * half[policy])


@pytest.mark.parametrize("total_steps", [100, 1000, 3000])
@pytest.mark.parametrize("policy", POLICY_LINES)
def test_a_run_of_another_length_keeps_the_cfgs_proportions(policy, total_steps):
    plan = plan_with(f"policy={policy}", *POLICY_LINES[policy])
    whole, other = schedule_of(plan), schedule_of(plan, total_steps=total_steps)
    for tenth in range(1, 11):
        assert other.rate(tenth * total_steps // 10 - 1) == pytest.approx(whole.rate(tenth * 100 - 1), rel=1e-9)


@pytest.mark.parametrize("typed", [(30, 40), (400, 800)])
def test_typed_steps_are_this_runs(typed):
    plan = plan_with("policy=steps", "steps=400,800", "scales=.1,.5", "max_batches=1000")
    assert schedule_of(plan, total_steps=100, lr_steps=typed).steps == typed
    assert schedule_of(plan, total_steps=100).steps == (40, 80)


@pytest.mark.parametrize("typed", [0, 49, 50, 51])
def test_typed_burn_in_is_this_runs(typed):
    plan = plan_with("policy=constant", "burn_in=50", "max_batches=1000")
    assert schedule_of(plan, total_steps=100, burn_in_steps=typed).burn_in_steps == typed


@pytest.mark.parametrize(("policy", "key"), [("step", "scale"), ("exp", "gamma"), ("sig", "gamma")])
def test_a_policy_typed_for_a_cfg_without_its_key_names_both(policy, key):
    with pytest.raises(UserError, match=f"^some.cfg: learning-rate policy {policy} needs a {key} "):
        schedule_of(plan_with("policy=constant"), lr_policy=policy)


def test_sgdr_typed_for_a_cfg_without_a_cycle_is_one_cosine():
    plan = plan_with("policy=constant")
    made, cosine = (schedule_of(plan, total_steps=70, lr_policy=policy) for policy in ("sgdr", "cosine"))
    assert [made.rate(step) for step in range(70)] == pytest.approx([cosine.rate(step) for step in range(70)])


def test_the_small_net_still_ends_in_one_cosine():
    """Its cfg says sgdr with darknet's default cycle."""
    plan = load_plan("yolov4-pico")
    for total_steps in (77, 640, 2000):
        made = schedule_of(plan, total_steps=total_steps)
        assert made.policy == "sgdr"
        rates = [made.rate(step) for step in range(made.burn_in_steps, total_steps)]
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] == pytest.approx(plan.net.learning_rate_min)
