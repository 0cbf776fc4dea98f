"""[net]: defaults, keys and contradictions."""

import pytest

from cfg.net import NetSpec
from cfg.parse import CfgError, parse_sections


def read(body: str) -> NetSpec:
    return NetSpec.read(parse_sections("[net]\nwidth=64\nheight=32\n" + body, path="a.cfg")[0])


def test_defaults_are_those_of_darknet():
    net = read("")
    assert net.input_hw == (32, 64)
    assert (net.channels, net.batch, net.subdivisions, net.max_batches, net.burn_in_steps) == (3, 1, 1, 0, 0)
    assert (net.learning_rate, net.learning_rate_min, net.momentum, net.decay) == (0.001, 1e-5, 0.9, 0.0001)
    assert (net.policy, net.power, net.steps, net.scales, net.sgdr_mult) == ("constant", 4.0, (), (), 2.0)
    assert (net.saturation, net.exposure, net.hue, net.flip) == (1.0, 1.0, 0.0, True)
    assert (net.mosaic, net.mosaic_bound, net.letter_box, net.ema_alpha) == (False, False, False, 0.0)


def test_keys_are_read():
    net = read(
        "burn_in=10\npolicy=steps\nsteps=5, 9\nscales=.1, .2\nmax_batches=12\nmosaic=1\nflip=0\nhue=.1\nletter_box=1"
    )
    assert (net.burn_in_steps, net.policy, net.steps, net.scales) == (10, "steps", (5, 9), (0.1, 0.2))
    assert (net.mosaic, net.flip, net.hue, net.letter_box) == (True, False, 0.1, True)


def test_one_cosine_is_the_default_cycle():
    assert read("policy=sgdr\nmax_batches=70").sgdr_cycle == 70
    assert read("policy=sgdr\nmax_batches=70\nsgdr_cycle=7").sgdr_cycle == 7


def test_both_spellings_of_the_sigmoid_policy():
    assert read("policy=sig").policy == read("policy=sigmoid").policy == "sig"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("batch=0", "a.cfg:4: batch=0 is below 1"),
        ("batch=2\nsubdivisions=4", "a.cfg:5: subdivisions=4 is more than batch=2"),
        ("policy=steps\nsteps=1,2\nscales=.1", "a.cfg:5: 2 steps but 1 scales"),
        ("policy=steps\nsteps=2,1\nscales=.1,.1", "a.cfg:5: steps must ascend"),
        ("steps=1,x", "a.cfg:4: steps=1,x is not a list of whole numbers"),
        ("policy=poly", "a.cfg:4: policy=poly needs max_batches"),
        ("policy=sgdr", "a.cfg:4: policy=sgdr needs sgdr_cycle or max_batches"),
        ("learning_rate=-1", "a.cfg:4: learning_rate=-1 is below 0"),
        ("momentum=1.5", "a.cfg:4: momentum=1.5 is above 1"),
        ("channels=9999999", "a.cfg:4: channels=9999999 is above 1024"),
    ],
)
def test_bad_values(body, message):
    with pytest.raises(CfgError) as caught:
        read(body)
    assert str(caught.value) == message


def test_input_size_is_required_and_bounded():
    with pytest.raises(CfgError, match=r"^a\.cfg:1: \[net\] needs a key 'width'$"):
        NetSpec.read(parse_sections("[net]\nheight=8", path="a.cfg")[0])
    with pytest.raises(CfgError, match=r"^a\.cfg:2: width=32769 is above 32768$"):
        NetSpec.read(parse_sections("[net]\nwidth=32769\nheight=8", path="a.cfg")[0])


def test_contrastive_and_recurrent_training_is_said():
    section = parse_sections("[net]\nwidth=8\nheight=8\ncontrastive=1\ncontrastive_jit_flip=0\ntime_steps=3", path="a")[
        0
    ]
    NetSpec.read(section)
    assert section.warnings(set()) == [
        "a:6: time_steps=3 is not supported and is ignored",
        "a:4: contrastive=1 is not supported and is ignored",
    ]


def test_what_darknet_would_do_and_we_do_not_is_said():
    section = parse_sections("[net]\nwidth=8\nheight=8\ncutmix=1\nmixup=0\nangle=0\nmax_crop=9", path="a.cfg")[0]
    NetSpec.read(section)
    assert section.warnings(set()) == ["a.cfg:4: cutmix=1 is for darknet's classifiers and is ignored"]
