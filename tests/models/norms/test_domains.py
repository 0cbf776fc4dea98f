"""Norms of several domains: what each computes, is told and keeps is what it would alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from models.blocks import ConvNormAct
from models.norms.domains import Affine, DomainNorm, choose, for_all_domains, plain_state
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.recompute import checkpointed
from tests.models.norms.kinds import KINDS, assert_same_bits, block, noise_like, parts, state_of
from utils.clock import BatchClock
from utils.errors import UserError

OWN = {
    "both": {"domain_statistics": "own", "domain_affine": "own"},
    "statistics": {"domain_statistics": "own"},
    "affine": {"domain_affine": "own"},
}
# Mini-batches of a batch by their images' domains: mixed ones, of one domain, one that comes late, one that stays away.
BATCHES = [((0, 1, 0), (1,), (1, 1, 0)), ((0, 0), (0, 1, 1)), ((1, 1, 1),)]
SAMPLE = ["bn", "bn-pooled", "cmbn-weights", "carried", "cbn-std-weights", "cbn-lite", "mabn", "brn", "cmbn-darknet"]


def domain_block(kind: str, own: str, *, count: int = 2, activation: nn.Module | None = None) -> ConvNormAct:
    """As `block`, of so many domains, whose affine parts differ where they are their own."""
    torch.manual_seed(0)
    options = NormOptions(**{**{f: getattr(KINDS[kind], f) for f in NormOptions.__slots__}, **OWN[own]})
    factory = norm_factory(options, domains=count)
    made = ConvNormAct.make(4, 8, 3, padding=1, norm=factory, activation=activation or nn.Identity()).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for part in made.norm.modules():
            if isinstance(getattr(part, "weight", None), nn.Parameter) and part.weight.requires_grad:
                part.weight.uniform_(0.5, 1.5)
                part.bias.uniform_(-0.5, 0.5)
    return made


def alone(kind: str, module: ConvNormAct, domain: int) -> ConvNormAct:
    """A plain block with the weights of one domain."""
    made = block(kind)
    made.load_state_dict(plain_state(module.state_dict(), domain))
    return made


def images_of(domains: tuple[int, ...], seed: int) -> Tensor:
    """Domain 1 is larger and brighter."""
    (x,) = parts((len(domains),), seed=seed)
    return x * (1 + 2 * torch.tensor(domains).view(-1, 1, 1, 1)) + torch.tensor(domains).view(-1, 1, 1, 1)


@pytest.mark.parametrize("kind", [*SAMPLE, "gn", "frozen"])
def test_with_all_of_their_own_each_domain_trains_as_it_would_alone(kind):
    own = "both" if kind not in ("gn", "frozen") else "affine"
    module = domain_block(kind, own)
    lonely = [alone(kind, module, domain) for domain in (0, 1)]
    clocks = [BatchClock(each) for each in lonely]
    clock = BatchClock(module)
    for step, batch in enumerate(BATCHES):
        xs = [images_of(domains, seed=10 * step + index) for index, domains in enumerate(batch)]
        module.zero_grad()
        outs, dxs = [], []
        for x in clock.minibatches([x.requires_grad_() for x in xs], batch):
            out = module(x)
            out.backward(noise_like(out, 5))
            outs.append(out.detach())
            dxs.append(x.grad)
        for domain, (each, its_clock) in enumerate(zip(lonely, clocks, strict=True)):
            each.zero_grad()
            mine = [(index, torch.tensor(d) == domain) for index, d in enumerate(batch) if domain in d]
            inputs = [xs[index].detach()[here].requires_grad_() for index, here in mine]
            for (index, here), x in zip(mine, its_clock.minibatches(inputs), strict=True):
                out = each(x)
                out.backward(noise_like(outs[index], 5)[here])
                torch.testing.assert_close(outs[index][here], out.detach(), rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(dxs[index][here], x.grad, rtol=1e-9, atol=1e-9)
        both = [each.conv.weight.grad for each in lonely if each.conv.weight.grad is not None]
        torch.testing.assert_close(module.conv.weight.grad, sum(both), rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            for each in (module, *lonely):
                for name, p in each.named_parameters():
                    if name == "conv.weight":
                        p.sub_(0.01 * module.conv.weight.grad)
                    elif p.grad is not None:
                        p.sub_(0.01 * p.grad)
        for each in (clock, *clocks):
            each.stepped()
    for domain, each in enumerate(lonely):
        expected, found = each.state_dict(), plain_state(module.state_dict(), domain)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", SAMPLE)
def test_own_statistics_with_a_shared_affine_part(kind):
    """The values are each domain's; gamma and beta are stored once, and have the gradient of all images."""
    module = domain_block(kind, "statistics")
    lonely = [alone(kind, module, domain) for domain in (0, 1)]
    affine = [name for name, _ in module.named_parameters() if "norm" in name]
    assert affine == ["norm.of_domain.0.weight", "norm.of_domain.0.bias"]
    domains = ((0, 1, 1, 0),)
    x = images_of(domains[0], seed=3)
    for part in BatchClock(module).minibatches([x], domains):
        out = module(part)
        out.square().sum().backward()
    gradient = torch.zeros(8).double()
    for domain, each in enumerate(lonely):
        here = torch.tensor(domains[0]) == domain
        for part in BatchClock(each).minibatches([x[here]]):
            theirs = each(part)
            theirs.square().sum().backward()
        torch.testing.assert_close(out[here], theirs, rtol=1e-10, atol=1e-10)
        gradient += each.norm.weight.grad
        torch.testing.assert_close(
            module.norm.of_domain[domain].running_mean, each.norm.running_mean, rtol=1e-10, atol=1e-10
        )
    torch.testing.assert_close(module.norm.of_domain[1].weight.grad, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", SAMPLE)
def test_own_affine_parts_after_shared_statistics(kind):
    module = domain_block(kind, "affine")
    plain = block(kind)
    state = {name: t for name, t in module.state_dict().items() if name == "conv.weight"}
    plain.load_state_dict({**plain.state_dict(), **state})
    nn.init.ones_(plain.norm.weight)
    nn.init.zeros_(plain.norm.bias)
    domains = ((0, 1, 1), (1, 0))
    xs = [images_of(each, seed=index) for index, each in enumerate(domains)]
    theirs = [plain(x) for x in BatchClock(plain).minibatches(xs)]
    for index, x in enumerate(BatchClock(module).minibatches(xs, domains)):
        affine = [module.norm.of_domain[domain] for domain in domains[index]]
        gamma, beta = (
            torch.stack([getattr(each, name) for each in affine])[..., None, None] for name in ("weight", "bias")
        )
        torch.testing.assert_close(module(x), theirs[index] * gamma + beta, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module.norm.shared.running_var, plain.norm.running_var, rtol=1e-10, atol=1e-10)
    assert not module.norm.shared.weight.requires_grad


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_batch_without_images_of_a_domain_changes_nothing_of_it(kind):
    module = domain_block(kind, "both")
    clock = BatchClock(module)
    for batch in (BATCHES[0], BATCHES[2]):
        before = state_of(module.norm.of_domain[0])
        moved = state_of(module.norm.of_domain[1])
        for x in clock.minibatches([images_of(domains, seed=4) for domains in batch], batch):
            module(x).square().sum().backward()
        clock.stepped()
    assert_same_bits(state_of(module.norm.of_domain[0]), before)
    assert not torch.equal(module.norm.of_domain[1].running_var, moved["running_var"])


@pytest.mark.parametrize("own", OWN)
def test_a_plain_network_of_one_domain_computes_the_same(own):
    module = domain_block("cmbn-weights", own)
    for x in BatchClock(module).minibatches([images_of(domains, seed=2) for domains in BATCHES[0]], BATCHES[0]):
        module(x)
    module.eval()
    x = images_of((0, 0, 0), seed=9)
    outs = []
    for domain in (0, 1):
        choose(module, domain)
        outs.append(module(x))
        torch.testing.assert_close(outs[-1], alone("cmbn-weights", module, domain).eval()(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(outs[0], outs[1])


@pytest.mark.parametrize("own", OWN)
def test_all_domains_start_from_the_norms_of_a_plain_network(own):
    plain, module = block("bn-pooled"), domain_block("bn-pooled", own, count=3)
    for x in BatchClock(plain).minibatches(parts()):
        plain(x)
    state = for_all_domains([plain.state_dict()], module)
    module.load_state_dict({name: tensor for name, tensor in state.items() if name in module.state_dict()})
    module.eval(), plain.eval()
    for domain in range(3):
        choose(module, domain)
        torch.testing.assert_close(module(parts()[0]), plain(parts()[0]), rtol=1e-12, atol=1e-12)


def test_copies_keep_what_is_shared():
    module = domain_block("cmbn-weights", "statistics")
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module).float()):
        first, second = twin.norm.of_domain
        assert second.weight is first.weight is not module.norm.of_domain[0].weight
        assert second.weight.dtype == twin.conv.weight.dtype
    storages = [tensor.data_ptr() for tensor in module.state_dict().values()]
    assert len(set(storages)) == len(storages)  # safetensors takes each once only


@pytest.mark.parametrize("kind", ["bn", "cmbn-weights", "cbn-std"])
def test_recomputed_activations_change_no_number(kind):
    plain, recomputing = (domain_block(kind, "both", activation=nn.Mish()) for _ in range(2))
    for step, batch in enumerate(BATCHES):
        for module in (plain, recomputing):
            clock = BatchClock(module, step=step)
            for x in clock.minibatches([images_of(domains, seed=step) for domains in batch], batch):
                out = module(x) if module is plain else checkpointed(module, x.requires_grad_(), layers=[module])
                out.square().sum().backward()
    assert_same_bits(state_of(recomputing), state_of(plain))
    gradients = [{n: p.grad for n, p in module.named_parameters()} for module in (plain, recomputing)]
    assert_same_bits(*gradients)


def test_a_frozen_domain_norm_still_learns_of_domains():
    module = domain_block("bn-pooled", "both").eval()
    with torch.no_grad():
        module.norm.of_domain[1].running_mean.fill_(3)
    for x in BatchClock(module).minibatches([images_of((0, 1), seed=1)], [(0, 1)]):
        out = module(x)
    for domain in (0, 1):
        choose(module, domain)
        torch.testing.assert_close(module(x)[domain], out[domain])
    assert module.norm.of_domain[1].num_batches_tracked == 0


def test_one_domain_has_no_domain_norm():
    options = NormOptions(domain_statistics="own", domain_affine="own")
    made = norm_factory(options, domains=1)(nn.Conv2d(4, 8, 3))
    assert type(made) is nn.BatchNorm2d
    shared = norm_factory(NormOptions(), domains=2)(nn.Conv2d(4, 8, 3))
    assert type(shared) is nn.BatchNorm2d


def test_bf16_stays_bf16():
    y = torch.randn(2, 8, 3, 3).bfloat16()
    assert Affine(8)(y).dtype == torch.bfloat16
    module = DomainNorm([Affine(8), Affine(8)])
    module.domains = (0, 1)
    assert torch.equal(module(y, None), y)


@pytest.mark.parametrize("own", ["both", "statistics"])
def test_mini_batches_of_one_domain_take_a_graph_a_domain(own):
    """However many mini-batches. The flags of an announcement make others, see test_compile.py."""
    module, eager = (domain_block("bn-pooled", own) for _ in range(2))
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=False)
    for step in range(4):
        batch = ((0, 0), (1, 1), (1, 1))
        xs = [images_of(domains, seed=step) for domains in batch]
        for net, plain in ((compiled, module), (eager, eager)):
            for x in BatchClock(plain, step=step).minibatches(xs, batch):
                net(x).square().sum().backward()
    torch._dynamo.reset()
    for name, value in state_of(eager).items():
        torch.testing.assert_close(state_of(module)[name], value, rtol=1e-9, atol=1e-9)
    for a, b in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)
    assert len(graphs) <= 4


@pytest.mark.parametrize(
    ("norm", "own", "text"),
    [
        ("gn", "domain_statistics", "--domain-statistics is for norms with statistics of mini-batches"),
        ("frozen", "domain_statistics", "--domain-statistics is for norms with statistics of mini-batches"),
        ("none", "domain_affine", "--domain-affine is about a norm"),
    ],
)
def test_what_a_norm_does_not_have_cannot_be_a_domains_own(norm, own, text):
    with pytest.raises(UserError, match=text):
        norm_factory(NormOptions(norm=norm, **{own: "own"}), domains=2)
