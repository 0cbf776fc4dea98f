"""Layers that read the previous one: defaults and geometry."""

import itertools

import pytest

from cfg.layers import LAYER_TYPES, ConvSpec, LayerSpec, PoolSpec, read_layer
from cfg.parse import CfgError, parse_sections
from cfg.spec import Shape, ShapeError


def read(text: str) -> LayerSpec:
    return read_layer(parse_sections(text, path="a.cfg")[0])


def conv(body: str) -> ConvSpec:
    spec = read("[convolutional]\n" + body)
    assert isinstance(spec, ConvSpec)
    return spec


def window_starts(side: int, before: int, after: int, window: int, stride: int) -> int:
    """Counts by walking: a window may start wherever it still ends inside the padded side."""
    count, start = 0, -before
    while start + window <= side + after:
        count, start = count + 1, start + stride
    return count


def test_conv_defaults_are_those_of_darknet():
    assert conv("") == ConvSpec(
        filters=1, size=1, stride_x=1, stride_y=1, padding=0, dilation=1, groups=1, batch_normalize=0
    )
    assert conv("").activation == "logistic"


def test_pad_means_half_the_size_and_wins_over_padding():
    assert conv("size=3\npad=1").padding == 1
    assert conv("size=4\npad=1\npadding=7").padding == 2
    assert conv("size=3\npadding=2").padding == 2
    assert conv("size=3\npad=1\ndilation=2").padding == 2


def test_cbn_means_batch_normalize_2():
    assert conv("cbn=1").batch_normalize == conv("cbn=1\nbatch_normalize=1").batch_normalize == 2
    assert conv("batch_normalize=1").batch_normalize == 1


def test_strides_by_axis():
    spec = conv("stride=2\nstride_y=3")
    assert (spec.stride_x, spec.stride_y) == (2, 3)
    assert spec.output_shape((Shape(1, 9, 9),)) == Shape(1, 3, 5)


def test_dilation_keeps_the_size_and_a_pixel_has_none():
    assert conv("size=3\npad=1\ndilation=4").output_shape((Shape(2, 9, 11),)) == Shape(1, 9, 11)
    assert conv("size=1\ndilation=4").dilation == 1


@pytest.mark.parametrize("side", [1, 2, 7, 8, 13])
def test_conv_output_counts_windows(side):
    for size, stride, padding in itertools.product((1, 2, 3, 5), (1, 2, 3), (0, 1, 2)):
        spec = conv(f"size={size}\nstride={stride}\npadding={padding}")
        expected = window_starts(side, padding, padding, size, stride)
        if expected:
            assert spec.output_shape((Shape(1, side, 20),)).height == expected
        else:
            with pytest.raises(ShapeError, match="does not fit"):
                spec.output_shape((Shape(1, side, 20),))


@pytest.mark.parametrize("side", [1, 2, 7, 8, 13])
def test_maxpool_output_counts_windows(side):
    for size, stride in itertools.product((1, 2, 3, 5, 13), (1, 2, 3)):
        padding = size - 1  # darknet's default, in total
        spec = read(f"[maxpool]\nsize={size}\nstride={stride}")
        expected = window_starts(side, padding // 2, padding - padding // 2, size, stride)
        assert spec.output_shape((Shape(3, 40, side),)).width == expected
        assert expected == (side + stride - 1) // stride


def test_maxpool_defaults():
    assert read("[maxpool]\nstride=2") == PoolSpec(size=2, stride_x=2, stride_y=2, padding=1)
    assert read("[maxpool]\nsize=3") == PoolSpec(size=3, stride_x=1, stride_y=1, padding=2)
    assert read("[maxpool]\nsize=3\npadding=0").output_shape((Shape(1, 5, 5),)) == Shape(1, 3, 3)


def test_grouped_conv_parameters_and_groups_that_do_not_divide():
    assert conv("filters=6\nsize=3\ngroups=2").parameter_count((Shape(4, 8, 8),)) == 6 * 2 * 9 + 6
    assert conv("filters=6\nbatch_normalize=1").parameter_count((Shape(4, 8, 8),)) == 6 * 4 + 6 + 6
    with pytest.raises(ShapeError, match="groups=2 does not divide both 3 channels and 6 filters"):
        conv("filters=6\ngroups=2").output_shape((Shape(3, 8, 8),))


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("[upsample]", Shape(4, 12, 16)),
        ("[upsample]\nstride=3", Shape(4, 18, 24)),
        ("[reorg3d]\nstride=2", Shape(16, 3, 4)),
        ("[avgpool]", Shape(4, 1, 1)),
        ("[dropout]\nprobability=.5", Shape(4, 6, 8)),
        ("[softmax]\ngroups=1", Shape(4, 6, 8)),
    ],
)
def test_other_shapes(text, shape):
    assert read(text).output_shape((Shape(4, 6, 8),)) == shape


def test_reorg3d_needs_a_stride_that_divides():
    with pytest.raises(ShapeError, match="stride=2 does not divide 4x5x8"):
        read("[reorg3d]\nstride=2").output_shape((Shape(4, 5, 8),))


def test_layers_read_the_previous_one_and_the_first_reads_the_input():
    assert conv("").sources(7) == (6,)
    assert conv("").sources(0) == (-1,)


def test_every_type_reads_itself_and_describes_what_is_not_default():
    bodies = {"route": "layers=-1", "shortcut": "from=-2", "sam": "from=-2", "scale_channels": "from=-2"}
    for name, spec_type in LAYER_TYPES.items():
        spec = read(f"[{name}]\n{bodies.get(name, '')}\nanchors=1,2")
        assert type(spec) is spec_type
        assert spec.kind == name
    assert conv("size=3\nstride=2").describe() == "size=3 stride_x=2 stride_y=2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[conv]\nfilters=abc", "a.cfg:2: filters=abc is not a whole number"),
        ("[conv]\nfilters=0", "a.cfg:2: filters=0 is below 1"),
        ("[conv]\nfilters=65537", "a.cfg:2: filters=65537 is above 65536"),
        ("[conv]\nsize=-1", "a.cfg:2: size=-1 is below 1"),
        ("[conv]\nstride=0", "a.cfg:2: stride=0 is below 1"),
        ("[conv]\npadding=-1", "a.cfg:2: padding=-1 is below 0"),
        ("[conv]\nbatch_normalize=3", "a.cfg:2: batch_normalize=3 is above 2"),
        ("[conv]\nsize=4\npad=1\ndilation=2", "a.cfg:4: dilation needs an odd size and pad=1"),
        ("[conv]\nantialiasing=1", "a.cfg:2: antialiasing=1 in [convolutional] is not supported"),
        ("[conv]\nshare_index=0", "a.cfg:2: share_index=0 in [convolutional] is not supported"),
        ("[conv]\n\ndontload=1", "a.cfg:3: dontload=1 in [convolutional] is not supported"),
        ("[maxpool]\nmaxpool_depth=1", "a.cfg:2: maxpool_depth=1 in [maxpool] is not supported"),
        ("[maxpool]\nsize=2\npadding=3", "a.cfg:3: padding=3 is above 2"),
        ("[upsample]\nstride=-2", "a.cfg:2: stride=-2 is below 1"),
    ],
)
def test_bad_values(text, message):
    with pytest.raises(CfgError) as caught:
        read(text)
    assert str(caught.value) == message


def test_an_unsupported_section_lists_the_supported_ones():
    with pytest.raises(CfgError, match=r"^a\.cfg:1: \[lstm\] is not supported, only avgpool, conv.*, yolo are$"):
        read("[lstm]")
