"""[convolutional]: defaults and geometry."""

import itertools

import pytest

from cfg.convolution import ConvSpec
from cfg.parse import CfgError
from cfg.spec import Shape, ShapeError
from tests.cfg.sections import notes, read, window_starts


def conv(body: str) -> ConvSpec:
    spec = read("[convolutional]\n" + body)
    assert isinstance(spec, ConvSpec)
    return spec


def test_defaults_are_those_of_darknet():
    spec = conv("")
    assert (spec.filters, spec.size, spec.stride_x, spec.stride_y, spec.padding) == (1, 1, 1, 1, 0)
    assert (spec.dilation, spec.groups, spec.batch_normalize, spec.activation) == (1, 1, 0, "logistic")
    assert (spec.antialiasing, spec.dontload, spec.dontloadscales) == (0, False, False)


def test_pad_means_half_the_size_and_wins_over_padding():
    assert conv("size=3\npad=1").padding == 1
    assert conv("size=4\npad=1\npadding=7").padding == 2
    assert conv("size=3\npadding=2").padding == 2
    assert conv("size=3\npad=0\npadding=2").padding == 2
    assert conv("size=1\npad=1").padding == 0
    assert conv("size=3\npad=1\ndilation=2").padding == 2


def test_cbn_means_batch_normalize_2():
    assert conv("cbn=1").batch_normalize == conv("cbn=1\nbatch_normalize=1").batch_normalize == 2
    assert conv("batch_normalize=1").batch_normalize == conv("batch_normalize=1\ncbn=0").batch_normalize == 1


def test_strides_by_axis():
    spec = conv("stride=2\nstride_y=3")
    assert (spec.stride_x, spec.stride_y) == (2, 3)
    assert spec.output_shape((Shape(1, 9, 9),)) == Shape(1, 3, 5)


def test_dilation_keeps_the_size_and_a_pixel_has_none():
    assert conv("size=3\npad=1\ndilation=4").output_shape((Shape(2, 9, 11),)) == Shape(1, 9, 11)
    assert conv("size=1\ndilation=4").dilation == 1


@pytest.mark.parametrize("side", [7, 8, 13])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_dilation_does_not_change_the_size_under_a_stride_either(side, stride):
    for size, dilation in itertools.product((3, 5), (2, 3)):
        dilated = conv(f"size={size}\npad=1\nstride={stride}\ndilation={dilation}")
        plain = conv(f"size={size}\npad=1\nstride={stride}")
        assert dilated.output_shape((Shape(2, side, 20),)) == plain.output_shape((Shape(2, side, 20),))


@pytest.mark.parametrize("side", [1, 2, 7, 8, 13])
def test_the_output_counts_windows(side):
    for size, stride, padding in itertools.product((1, 2, 3, 5), (1, 2, 3), (0, 1, 2)):
        spec = conv(f"size={size}\nstride={stride}\npadding={padding}")
        expected = window_starts(side, padding, padding, size, stride)
        if expected:
            assert spec.output_shape((Shape(1, side, 20),)).height == expected
        else:
            with pytest.raises(ShapeError, match="does not fit"):
                spec.output_shape((Shape(1, side, 20),))


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize(("antialiasing", "before", "window"), [(1, 1, 3), (2, 0, 2)])
def test_antialiasing_gives_the_strides_to_the_blur(side, antialiasing, before, window):
    spec = conv(f"filters=4\nsize=3\npad=1\nstride=2\nstride_x=3\nantialiasing={antialiasing}")
    assert spec.window_strides == (1, 1)
    rows, columns = (window_starts(side, before, before, window, stride) for stride in (2, 3))
    assert spec.output_shape((Shape(2, side, side),)) == Shape(4, rows, columns)
    assert spec.parameter_count((Shape(2, side, side),)) == 4 * 2 * 9 + 4


def test_parameters_and_groups_that_do_not_divide():
    assert conv("filters=6\nsize=3\ngroups=2").parameter_count((Shape(4, 8, 8),)) == 6 * 2 * 9 + 6
    assert conv("filters=6\nbatch_normalize=1").parameter_count((Shape(4, 8, 8),)) == 6 * 4 + 6 + 6
    with pytest.raises(ShapeError, match="groups=2 does not divide both 3 channels and 6 filters"):
        conv("filters=6\ngroups=2").output_shape((Shape(3, 8, 8),))


def test_what_is_padded_is_bounded_too():
    with pytest.raises(ShapeError, match="1x1047552x1047552 is too large"):
        conv("size=1023\npad=1\ndilation=1024").output_shape((Shape(1, 1024, 1024),))


def test_loading_is_told_apart_and_says_nothing():
    spec = conv("dontload=1\ndontloadscales=1")
    assert (spec.dontload, spec.dontloadscales) == (True, True)
    assert notes("[conv]\ndontload=1\ndontloadscales=0") == []


def test_what_only_training_would_do_is_said():
    assert notes("[conv]\nlearning_rate=1\ngrad_centr=1\nstream=3") == [
        "a.cfg:3: grad_centr=1 is not supported and is ignored"
    ]


def test_a_learning_rate_of_its_own():
    assert (conv("").learning_rate, conv("learning_rate=.5").learning_rate) == (1.0, 0.5)
    assert notes("[conv]\nlearning_rate=.5") == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("filters=abc", "a.cfg:2: filters=abc is not a whole number"),
        ("filters=0", "a.cfg:2: filters=0 is below 1"),
        ("filters=65537", "a.cfg:2: filters=65537 is above 65536"),
        ("size=-1", "a.cfg:2: size=-1 is below 1"),
        ("stride=0", "a.cfg:2: stride=0 is below 1"),
        ("padding=-1", "a.cfg:2: padding=-1 is below 0"),
        ("batch_normalize=3", "a.cfg:2: batch_normalize=3 is above 2"),
        ("antialiasing=3", "a.cfg:2: antialiasing=3 is above 2"),
        ("size=4\npad=1\ndilation=2", "a.cfg:4: dilation needs an odd size and pad=1"),
        ("share_index=0", "a.cfg:2: share_index=0 in [convolutional] is not supported"),
        ("\nxnor=1", "a.cfg:3: xnor=1 in [convolutional] is not supported"),
    ],
)
def test_bad_values(body, message):
    with pytest.raises(CfgError) as caught:
        conv(body)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["normalize_channels", "normalize_channels_softmax", "leeky"])
def test_activations_that_are_not_there(name):
    with pytest.raises(CfgError, match=rf"^a\.cfg:2: activation={name} is not one of linear, leaky, .*, hardtan"):
        conv(f"activation={name}")


def test_a_norm_of_its_own_is_read_without_blanks_and_comment():
    assert conv("batch_normalize=1").norm == ""
    assert conv("batch_normalize=1\nnorm = gn:groups=8  # for few images").norm == "gn:groups=8"
    assert notes("[convolutional]\nbatch_normalize=1\nnorm=gn") == []


def test_a_norm_of_its_own_needs_a_norm():
    with pytest.raises(CfgError, match=r"^a\.cfg:2: norm= needs batch_normalize=1$"):
        conv("norm=gn")
