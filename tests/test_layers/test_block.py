"""The block around the mixer: drop, add, normalize."""

import pytest
import torch

from mmstabvim.layers import RMSNorm, VisionMambaBlock
from mmstabvim.layers.rms_norm import AddRMSNorm
from mmstabvim.layers.vision_mamba_block import add_residual


def make_block(**options):
    torch.manual_seed(0)
    block = VisionMambaBlock(8, d_state=3, **options)
    torch.nn.init.uniform_(block.norm.weight, 0.5, 1.5)
    return block


@pytest.mark.parametrize(
    'residual', [None, torch.randn(2, 5, 8)], ids=['first', 'later']
)
@pytest.mark.parametrize('autocast', [False, True])
@torch.no_grad()
def test_block_by_its_parts(residual, autocast):
    """The same bits as add, norm and mixer, one after the other."""
    block = make_block()
    hidden = torch.randn(2, 5, 8).bfloat16()
    norm = RMSNorm(8)
    norm.load_state_dict(block.norm.state_dict())
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        out, stream = block(hidden, residual)
        wanted = add_residual(hidden, residual)
        mixed = block.mixer(norm(wanted))
    assert stream.dtype == torch.float32
    assert torch.equal(stream, wanted)
    assert torch.equal(out, mixed)


def test_add_residual_is_float32_or_wider():
    half, single = torch.ones(2, dtype=torch.bfloat16), torch.ones(2)
    assert add_residual(half, None).dtype == torch.float32
    assert add_residual(half, single).tolist() == [2, 2]
    assert add_residual(half, single.double()).dtype == torch.float64
    assert add_residual(single.double(), None).dtype == torch.float64


def test_drop_path_comes_before_the_sum():
    """A dropped sample's stream is what it was."""
    block = make_block(drop_path=0.5).train()
    hidden, residual = torch.ones(64, 1, 8), torch.randn(64, 1, 8)
    _, stream = block(hidden, residual)
    added = (stream - residual).round().flatten(1)
    assert set(added.flatten().tolist()) == {0.0, 2.0}
    assert (added == added[:, :1]).all()
    _, stream = block.eval()(hidden, residual)
    assert torch.equal(stream, residual + 1)


def test_names_of_the_parameters():
    """Checkpoints depend on them."""
    block = make_block()
    names = [n for n, _ in block.named_parameters() if 'mixer' not in n]
    assert names == ['norm.weight']
    assert isinstance(block.norm, RMSNorm)
    assert repr(block.norm) == 'AddRMSNorm(8, eps=1e-05)'


def test_hooks_see_the_norm():
    """It is called as a module, so that tools can watch it."""
    block, seen = make_block(), []
    block.norm.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.autocast('cpu', torch.bfloat16):
        _, stream = block(torch.randn(1, 3, 8))
    assert torch.equal(seen[0][1], stream)
    assert seen[0][0].dtype == torch.float32  # on a CPU, as ever


def test_norm_of_a_sum_with_gradients():
    norm = AddRMSNorm(4).double()
    leaves = torch.randn(2, 3, 4).double().requires_grad_().unbind()
    assert torch.autograd.gradcheck(norm, leaves)


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_compiles_in_one_graph(mode):
    block = make_block()
    getattr(block, mode)()
    inputs = torch.randn(2, 1, 5, 8).unbind()
    torch._dynamo.reset()
    compiled = torch.compile(block, backend='aot_eager', fullgraph=True)
    for actual, wanted in zip(compiled(*inputs), block(*inputs), strict=True):
        torch.testing.assert_close(actual, wanted)
