"""The grammar of darknet cfg files."""

import pytest

from cfg.parse import MAX_SECTIONS, MAX_UNKNOWN_KEYS, CfgError, Section, did_you_mean, parse_sections


def section(body: str) -> Section:
    return parse_sections("[net]\n" + body, path="a.cfg")[0]


def test_blanks_vanish_everywhere():
    parsed = section("  anchors = 1 0,\t12 , 3\r\n\r\n na me=x\r\n")
    assert {key: entry.value for key, entry in parsed.entries.items()} == {"anchors": "10,12,3", "name": "x"}
    assert parse_sections(" [ net ] \r\n", path="a.cfg")[0].name == "net"


def test_lines_are_counted_from_one_over_comments_and_blank_lines():
    net, conv = parse_sections("# c\n\n[net]\n; c\nwidth=8\n  # c\n[convolutional]\nsize=3", path="a.cfg")
    assert (net.line, net.entries["width"].line, conv.line, conv.entries["size"].line) == (3, 5, 7, 8)
    assert str(conv.error("x", "absent")) == "a.cfg:7: x"


def test_only_newline_ends_a_line():
    assert section("a=1\x0b2\x0c3\u2028\nb=2").entries["b"].line == 3


def test_the_first_of_equal_keys_wins():
    parsed = section("batch=4\nbatch=8")
    assert parsed.integer("batch") == 4
    assert parsed.entries["batch"].line == 2
    assert parsed.warnings(set()) == ["a.cfg:3: batch=8 is ignored, the first of equal keys counts: batch=4 of line 2"]
    assert section("batch=4\nbatch=4").notes == []


def test_a_line_is_split_at_its_first_equals_sign():
    assert section("key=a=b").entries["key"].value == "a=b"


@pytest.mark.parametrize("value", ["1e300", "-1e10", "1e9999", "9" * 5000])
def test_a_number_beyond_any_use_is_refused(value: str) -> None:
    with pytest.raises(CfgError, match=r"a.cfg:2: x=.* is (above|below|not a number)"):
        section(f"x={value}").number("x", 0)
    with pytest.raises(CfgError, match=r"a.cfg:2: x=.* is (above|below|not a list of numbers)"):
        section(f"x=1,{value}").numbers("x")
    with pytest.raises(CfgError, match=r"a.cfg:2: x=.* is (above|not a whole number)"):
        section(f"x={value}").integer("x", 0)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("network", "net"),
        ("conv", "convolutional"),
        ("max", "maxpool"),
        ("avg", "avgpool"),
        ("soft", "softmax"),
        ("conn", "connected"),
        ("local_avg", "local_avgpool"),
        ("lrn", "normalization"),
        ("silence", "empty"),
        ("yolo", "yolo"),
    ],
)
def test_aliases(alias, name):
    assert parse_sections(f"[{alias}]", path="a.cfg")[0].name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.cfg:1: no [net] section, the file holds no network"),
        ("# nothing\n", "a.cfg:1: no [net] section, the file holds no network"),
        ("\nwidth=8\n[net]", "a.cfg:2: 'width=8' stands before the first [section]"),
        ("[net]\nwidth", "a.cfg:2: 'width' is neither a [section] nor key=value"),
        ("[net]\nwidth=", "a.cfg:2: 'width=' is neither a [section] nor key=value"),
        ("[net]\n=8", "a.cfg:2: '=8' is neither a [section] nor key=value"),
        ("[net", "a.cfg:1: '[net' is not a [section]"),
        ("[]", "a.cfg:1: '[]' is not a [section]"),
        ("[net]x", "a.cfg:1: '[net]x' is not a [section]"),
        ("[net]\n" + "x" * 99, f"a.cfg:2: '{'x' * 37}...' is neither a [section] nor key=value"),
    ],
)
def test_broken_grammar_names_file_and_line(text, message):
    with pytest.raises(CfgError) as caught:
        parse_sections(text, path="a.cfg")
    assert str(caught.value) == message


def test_the_number_of_sections_is_bounded():
    assert len(parse_sections("[net]\n" * MAX_SECTIONS, path="a.cfg")) == MAX_SECTIONS
    with pytest.raises(CfgError, match=rf"^a\.cfg:{MAX_SECTIONS + 1}: more than"):
        parse_sections("[net]\n" * (MAX_SECTIONS + 1), path="a.cfg")


@pytest.mark.parametrize(("value", "number"), [("64", 64), ("64.0", 64), ("+7", 7), ("64 # of them", 64), ("64;8", 64)])
def test_integers(value, number):
    assert section(f"k={value}").integer("k") == number


@pytest.mark.parametrize("value", ["abc", "64.5", "6_4", "0x10", "1e3", "9" * 5000, "٣", "#3", ".0", "64px", "\ud800"])
def test_what_is_not_an_integer(value):
    with pytest.raises(CfgError, match=r"^a\.cfg:2: k=.* is not a whole number$"):
        section(f"k={value}").integer("k")


@pytest.mark.parametrize(
    ("value", "number"), [("0.5", 0.5), (".5", 0.5), ("-1e-3", -0.001), ("2.", 2.0), (".7#x", 0.7)]
)
def test_numbers(value, number):
    assert section(f"k={value}").number("k", 0.0) == number


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "1_0", "one", "1,2", "--1"])
def test_what_is_not_a_number(value):
    with pytest.raises(CfgError, match=r"^a\.cfg:2: k=.* is not a number$"):
        section(f"k={value}").number("k", 0.0)


def test_lists_end_at_a_comment():
    parsed = section("steps=1, 2, 3 # 4, 5\nscales=.1,1e-2")
    assert parsed.integers("steps") == (1, 2, 3)
    assert parsed.numbers("scales") == (0.1, 0.01)
    assert parsed.integers("mask") == ()


def test_a_comment_ends_a_list_where_no_comma_follows():
    """Behind ; darknet would count it."""
    parsed = section("mask=1, 2 ; of three\nanchors=1;2\nsteps=1,2 # 3;4, 5")
    assert parsed.integers("mask") == (1, 2)
    assert parsed.numbers("anchors") == (1.0,)
    assert parsed.integers("steps") == (1, 2)


def test_a_last_comma_is_spared_only_where_it_is_said_to_be_harmless():
    parsed = section("anchors=1, 2, \nmask=0,\ntwo=1,,\nnone=,")
    assert parsed.numbers("anchors", spare_comma=True) == (1.0, 2.0)
    for key in ("mask", "two"):
        with pytest.raises(CfgError, match=r"is not a list of numbers$"):
            parsed.numbers(key, spare_comma=key == "two")
    with pytest.raises(CfgError, match=r"is not a list of numbers$"):
        parsed.numbers("none", spare_comma=True)


@pytest.mark.parametrize("value", ["1;2,3", "1,,2", "1,2,", ",1", ";1", "1,;2"])
def test_what_is_not_a_list(value):
    with pytest.raises(CfgError, match=r"^a\.cfg:2: k=.* is not a list of whole numbers$"):
        section(f"k={value}").integers("k")


def test_a_long_value_is_cut_in_messages():
    with pytest.raises(CfgError) as caught:
        section("k=" + "9" * 5000).integer("k")
    assert str(caught.value) == f"a.cfg:2: k={'9' * 77}... is not a whole number"


def test_limits_are_inclusive():
    parsed = section("k=5")
    assert parsed.integer("k", low=5, high=5) == 5
    with pytest.raises(CfgError, match=r"^a\.cfg:2: k=5 is below 6$"):
        parsed.integer("k", low=6)
    with pytest.raises(CfgError, match=r"^a\.cfg:2: k=5 is above 4$"):
        parsed.number("k", 0.0, high=4)


def test_a_missing_required_key_points_at_its_section():
    with pytest.raises(CfgError, match=r"^a\.cfg:1: \[net\] needs a key 'width'$"):
        section("").integer("width")


def test_words_are_checked():
    parsed = section("activation=leeky")
    with pytest.raises(
        CfgError, match=r"^a\.cfg:2: activation=leeky is not one of linear, leaky, did you mean 'leaky'\?$"
    ):
        parsed.word("activation", "linear", ("linear", "leaky"))
    assert parsed.word("absent", "linear", ()) == "linear"
    assert parsed.notes == []


def test_an_unknown_word_may_be_taken_for_another():
    parsed = section("kind=gredy")
    assert parsed.word("kind", "default", ("default", "greedy"), unknown="default") == "default"
    assert parsed.warnings(set()) == [
        "a.cfg:2: kind=gredy is not one of default, greedy: read as default, as darknet does, did you mean 'greedy'?"
    ]


def test_unknown_keys_warn_with_a_hint_and_known_ones_do_not():
    parsed = section("filtres=8\nsize=3\nshow_details=0\nzzz=1")
    parsed.integer("filters", 1)
    parsed.integer("size", 1)
    parsed.ignore("show_details")
    assert parsed.warnings(set()) == [
        "a.cfg:2: unknown key 'filtres' in [net], did you mean 'filters'?",
        "a.cfg:5: unknown key 'zzz' in [net]",
    ]


def test_many_unknown_keys_are_counted():
    warnings = section("\n".join(f"zzz{index}=1" for index in range(MAX_UNKNOWN_KEYS + 5))).warnings(set())
    assert len(warnings) == MAX_UNKNOWN_KEYS + 1
    assert warnings[-1] == f"a.cfg:{MAX_UNKNOWN_KEYS + 2}: 5 more unknown keys in [net]"


def test_a_pasted_net_block_is_one_warning():
    parsed = section("batch=1\nwidth=8\nclasses=2")
    assert parsed.integer("classes") == 2
    assert parsed.warnings({"batch", "width"}) == ["a.cfg:2: [net] keys in [net] are ignored: batch, width"]


def test_keys_warn_or_are_refused_unless_they_have_the_default():
    parsed = section("clip=0.0\nadam=1\nkind=iou\nreverse=1")
    parsed.warn_unless(clip=0, adam=0, kind="iou")
    assert parsed.notes == ["a.cfg:3: adam=1 is not supported and is ignored"]
    parsed.refuse_unless(clip=0, absent=1)
    with pytest.raises(CfgError, match=r"^a\.cfg:5: reverse=1 in \[net\] is not supported$"):
        parsed.refuse_unless(reverse=0)


def test_did_you_mean():
    assert did_you_mean("convolutionl", ("convolutional", "route")) == ", did you mean 'convolutional'?"
    assert did_you_mean("qqq", ("convolutional", "route")) == ""
