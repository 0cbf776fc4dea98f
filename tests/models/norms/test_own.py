"""A norm of the user's own: what class it may be, what is an option of it, and whose word makes us import it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from cfg.plan import parse_plan
from models.blocks import ConvNormAct
from models.network import Network
from models.norms import own
from models.norms.batch_stat import BatchStatNorm
from models.norms.effective_batch import describe_norm, effective_images
from models.norms.factory import norm_factory
from models.norms.fold import can_fold
from models.norms.options import NormOptions, norm_of_weights, resolve_norm, stored_norm
from models.norms.running_stats import has_running_statistics, is_batch_norm
from models.norms.table import checked_norm, norms_help, parse_norm
from models.weights.writer import darknet_state
from utils.errors import UserError

FILE = '''
import os
from dataclasses import dataclass
from torch import nn
from models.norms.batch_stat import BatchStatNorm
from models.norms.spec import NormSpec
from utils.knob import knob

with open(os.environ["OWN_NORMS_LOG"], "a") as log:
    log.write("imported ")


class Plain(nn.Module):
    """Nothing but a factor."""

    def __init__(self, channels, eps=1e-5, factor: float = 2, centre=False, kind="a", device=None):
        super().__init__()
        self.eps, self.factor, self.centre, self.kind = eps, factor, centre, kind
        self.weight = nn.Parameter(self.new(channels))

    def new(self, channels):
        import torch
        return torch.ones(channels)

    def forward(self, y):
        return y * self.factor * self.weight[:, None, None]


class Stock(nn.BatchNorm2d):
    """Stock."""


class Halved(nn.BatchNorm2d):
    """Half of stock."""

    def forward(self, y):
        return super().forward(y) / 2


class Pooled(BatchStatNorm):
    def __init__(self, channels, eps, momentum):
        super().__init__(channels, eps=eps, momentum=momentum)

    def normalize(self, y, own, pool):
        return self.by_moments(y, pool)


class Demanding(nn.Module):
    def __init__(self, channels, needed):
        super().__init__()


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec(NormSpec):
    summary = "a spec"
    has_batch_statistics = False
    groups: int = knob(2, "groups", low=1)
    plain: int = 1

    def make(self, conv, *, eps, momentum):
        return nn.GroupNorm(self.groups, conv.out_channels, eps=eps)


def function(channels):
    return nn.Identity()


class Other:
    pass
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's in the current folder, which nobody has trusted yet."""
    (tmp_path / "own_norms.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("OWN_NORMS_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(own, "_trusted", set())
    yield "own_norms"
    sys.modules.pop("own_norms", None)
    own._spec_of.cache_clear()


def made(norm: str) -> nn.Module | None:
    return norm_factory(NormOptions(norm=checked_norm(norm), norm_eps=1e-4))(nn.Conv2d(3, 8, 1))


def test_options_are_the_arguments_with_defaults(module):
    norm = made(f"{module}.Plain:factor=2.5,centre,kind=b")
    assert (norm.eps, norm.factor, norm.centre, norm.kind) == (1e-4, 2.5, True, "b")
    assert len(norm.weight) == 8
    assert str(parse_norm(f"{module}.Plain:factor=2.0,centre=off")) == f"{module}.Plain"
    with pytest.raises(UserError, match=r"--norm own_norms.Plain has no option 'device'\n\nown_norms\.Plain Nothing"):
        parse_norm(f"{module}.Plain:device=cpu")
    with pytest.raises(UserError, match="factor=x needs a number"):
        parse_norm(f"{module}.Plain:factor=x")


def test_it_is_described_stored_and_continued_like_any_other(module):
    options = resolve_norm(NormOptions(norm=checked_norm(f"{module}.Plain:factor=3")))
    assert stored_norm(asdict(options)) == options
    text = describe_norm(options, mini_batch=2, subdivisions=1)
    assert text == "own_norms.Plain:factor=3: mini-batches of 2 images, Nothing but a factor"
    assert effective_images(options, mini_batch=2, subdivisions=1) is None
    assert norm_of_weights(asdict(options), None)["norm"] == "own_norms.Plain:factor=3"
    assert norm_of_weights(asdict(options), "own_norms.Plain:kind=b")["norm"] == "own_norms.Plain:factor=3,kind=b"
    assert "own_norms" not in norms_help()
    with pytest.raises(UserError, match="--norm-momentum is for norms with statistics of mini-batches"):
        resolve_norm(NormOptions(norm=f"{module}.Plain", norm_momentum=0.2))


def test_a_norm_with_momentum_counts_as_one_of_mini_batches(module):
    for norm in ("Stock", "Halved", "Pooled"):
        options = resolve_norm(NormOptions(norm=checked_norm(f"{module}.{norm}"), norm_momentum=0.3))
        assert effective_images(options, mini_batch=2, subdivisions=4) == 2
        assert norm_factory(options)(nn.Conv2d(3, 8, 1)).momentum == 0.3
    assert isinstance(made(f"{module}.Pooled"), BatchStatNorm)


def test_a_spec_says_everything_itself(module):
    norm = made(f"{module}.Spec:groups=4")
    assert isinstance(norm, nn.GroupNorm) and norm.num_groups == 4 and norm.eps == 1e-4
    assert str(parse_norm(f"{module}.Spec:groups=4,plain=3")) == "own_norms.Spec:groups=4,plain=3"
    assert parse_norm(f"{module}.Spec") == parse_norm(f"{module}.Spec:groups=2")
    with pytest.raises(UserError, match="groups=0 must be at least 1"):
        parse_norm(f"{module}.Spec:groups=0")


def test_what_another_library_has_will_do():
    assert isinstance(made("torch.nn.BatchNorm2d"), nn.BatchNorm2d)
    norm = made("torch.nn.InstanceNorm2d:affine")
    assert norm.affine and not has_running_statistics(norm)


TEXT = "[net]\nwidth=8\nheight=8\n[convolutional]\nbatch_normalize=1\nfilters=8\nsize=3\nactivation=leaky\n"


@pytest.mark.parametrize(
    ("norm", "is_stock"), [("Stock", True), ("Pooled", True), ("Halved", False), ("Plain", False), ("Spec", False)]
)
def test_only_batch_norms_own_forward_is_merged_and_written_for_darknet(module, norm, is_stock):
    options = NormOptions(norm=checked_norm(f"{module}.{norm}"))
    network = Network(parse_plan(TEXT, path="a.cfg"), norm_factory(options)).eval()
    assert can_fold(network) == is_stock
    assert isinstance(network.layers[0], ConvNormAct) and is_batch_norm(network.layers[0].norm) == is_stock
    if not is_stock:
        with pytest.raises(UserError, match=rf"layer 0 .* {type(network.layers[0].norm).__name__} (is not|has no run)"):
            darknet_state(network)
    assert network.last_output(torch.rand(2, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        ("no_such_module.Plain", "there is no module 'no_such_module' in .*, nor installed"),
        ("own_norms.deeper.Plain", "there is no module 'own_norms.deeper' in .*, nor installed"),
        ("own_norms.Plane", "the module own_norms has no 'Plane', did you mean Plain?"),
        ("own_norms.Zzz", "the module own_norms has no 'Zzz'$"),
        ("own_norms.Other", "own_norms.Other is no norm: neither a subclass of torch.nn.Module nor of"),
        ("own_norms.function", "own_norms.function is no norm"),
        ("own_norms.nn", "own_norms.nn is no norm"),
        ("own_norms.NormSpec", "own_norms.NormSpec is no norm"),
        ("own_norms.Pla-in", "unknown norm 'own_norms.Pla-in'"),
        (".Plain", "unknown norm '.Plain'"),
        ("own_norms.", "unknown norm 'own_norms.'"),
    ],
)
def test_what_is_no_norm_is_refused_in_one_sentence(module, norm, message):
    with pytest.raises(UserError, match=message) as caught:
        checked_norm(norm)
    assert "\n" not in str(caught.value)


def test_a_module_that_fails_is_named_with_what_it_says(module, tmp_path):
    (tmp_path / "bad_norms.py").write_text("import no_such_thing\n")
    with pytest.raises(UserError, match="bad_norms cannot be imported: ModuleNotFoundError: No module named 'no_such"):
        checked_norm("bad_norms.Norm")


def test_a_class_that_needs_more_than_channels_is_named(module):
    with pytest.raises(UserError, match=r"own_norms.Demanding cannot be made for 8 channels: .*needed"):
        made(f"{module}.Demanding")


def test_whatever_the_users_class_or_module_raises_is_one_sentence(tmp_path, module):
    text = "from torch import nn\nclass Picky(nn.Module):\n    def __init__(self, channels): raise ValueError('odd')\n"
    (tmp_path / "picky_norms.py").write_text(text)
    with pytest.raises(UserError, match=r"picky_norms\.Picky cannot be made for 8 channels: odd"):
        made(checked_norm("picky_norms.Picky"))
    (tmp_path / "wordy_norms.py").write_text("raise ValueError('one\\ntwo')\n")
    with pytest.raises(UserError, match=r"wordy_norms cannot be imported: ValueError: one$"):
        checked_norm("wordy_norms.Norm")
    (tmp_path / "leaving_norms.py").write_text("raise SystemExit(0)\n")
    with pytest.raises(UserError, match=r"leaving_norms cannot be imported: SystemExit"):
        checked_norm("leaving_norms.Norm")
    with pytest.raises(UserError, match="the package utils of this project hides others of its name"):
        checked_norm("utils.no_such_module.Norm")


def test_nobody_but_the_user_makes_us_import(module, tmp_path):
    """Neither a checkpoint nor a cfg nor an option string that was not typed."""
    plan = parse_plan(TEXT.replace("size=3", f"size=3\nnorm={module}.Plain"), path="a.cfg")
    for ask in (
        lambda: parse_norm(f"{module}.Plain"),
        lambda: stored_norm({"norm": f"{module}.Plain"}),
        lambda: stored_norm({"norm": "bn", "norm_heads": f"{module}.Plain"}),
        lambda: norm_of_weights({"norm": f"{module}.Plain"}, None),
        lambda: resolve_norm(NormOptions(), plan),
    ):
        with pytest.raises(UserError, match=f"own_norms.Plain is not one of this project's.* type --trust {module}"):
            ask()
    assert not (tmp_path / "log").exists() and module not in sys.modules
    own.trust(module)
    assert (tmp_path / "log").read_text() == "imported "
    assert resolve_norm(NormOptions(), plan).specs(plan)[1].name == f"{module}.Plain"


def test_to_trust_one_module_is_not_to_trust_another(module):
    own.trust("json")
    with pytest.raises(UserError, match="type --trust own_norms"):
        parse_norm(f"{module}.Plain")


def test_a_file_of_the_users_does_not_take_the_place_of_one_of_ours(module, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('imported')")
    with pytest.raises(UserError, match=r"there is no module 'models\.my_norms'"):
        checked_norm("models.my_norms.Norm")
