"""The backbone: options, sizes, initialization, loading, bad input."""

import copy

import pytest
import torch
from mmengine.analysis import get_model_complexity_info

from mmstabvim import VisionMamba
from mmstabvim.layers.position_embedding import CLS_TOKENS, split_tokens
from mmstabvim.models.backbones.vision_mamba import OUT_TYPES
from mmstabvim.ops import backend

ARCH = dict(embed_dims=24, num_layers=3, d_state=4)


def build(**kwargs):
    torch.manual_seed(0)
    settings = dict(arch=ARCH, img_size=32, patch_size=8) | kwargs
    return VisionMamba(**settings)


@pytest.mark.parametrize('cls_token', CLS_TOKENS)
@pytest.mark.parametrize('out_type', OUT_TYPES)
def test_output_forms(out_type, cls_token):
    """Every form at every size, also sizes never declared."""
    if out_type == 'cls_token' and cls_token is None:
        with pytest.raises(ValueError, match='needs a class token'):
            build(out_type=out_type, cls_token=cls_token)
        return
    model = build(
        out_type=out_type, cls_token=cls_token, out_indices=[0, -1]
    ).eval()
    extra = model.num_extra_tokens
    for size, grid in (((32, 32), (4, 4)), ((24, 45), (3, 6))):
        outputs = model(torch.randn(2, 3, *size))
        shape = {
            'cls_token': (2, 24),
            'avg_featmap': (2, 24),
            'featmap': (2, 24, *grid),
            'raw': (2, grid[0] * grid[1] + extra, 24),
        }[out_type]
        assert [tuple(x.shape) for x in outputs] == [shape, shape]
        assert all(x.isfinite().all() for x in outputs)


def test_forms_show_the_same_tokens():
    """All forms are views of one normalized sequence."""
    image = torch.randn(1, 3, 24, 40)
    raw, cls_token, average, grid = (
        build(out_type=t).eval()(image)[0]
        for t in ('raw', 'cls_token', 'avg_featmap', 'featmap')
    )
    token, patches = split_tokens(raw, 'middle')
    assert torch.equal(cls_token, token[:, 0])
    assert torch.equal(grid.flatten(2).transpose(1, 2), patches)
    torch.testing.assert_close(average, patches.mean(1))
    rms = raw.square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-2, atol=0)


def test_double_token_is_the_mean_of_both_ends():
    image = torch.randn(1, 3, 32, 32)
    raw, token = (
        build(cls_token='double', out_type=t).eval()(image)[0]
        for t in ('raw', 'cls_token')
    )
    torch.testing.assert_close(token, (raw[:, 0] + raw[:, -1]) / 2)


def test_published_sizes():
    """Parameters of the published models (with a 1000-class head)."""
    sizes = {'tiny': 7.15, 'small': 25.80, 'base': 97.60}
    for arch, millions in sizes.items():
        with torch.device('meta'):
            model = VisionMamba(arch)
        count = sum(p.numel() for p in model.parameters())
        head = 1000 * (model.embed_dims + 1)
        assert (count + head) / 1e6 == pytest.approx(millions, abs=0.01)


def test_overlapping_patches():
    model = build(patch_size=8, patch_stride=4)
    assert model.grid == (7, 7)
    assert model.pos_embed.shape[1] == 50
    assert build(patch_size=16, img_size=224, patch_stride=8).grid == (27, 27)


def test_no_pixel_is_dropped():
    """Pixels beyond the last whole patch still influence the output."""
    model = build(out_type='raw').eval()
    image = torch.randn(1, 3, 33, 40)
    changed = image.clone()
    changed[:, :, -1] += 1
    assert not torch.equal(model(image)[0], model(changed)[0])


@pytest.mark.parametrize(
    'option', [dict(with_cp=True), dict(backend='reference')], ids=str
)
def test_same_numbers_by_another_way(option):
    """Checkpointing and the reference scan change nothing."""
    image = torch.randn(2, 3, 32, 32)
    plain, other = build(), build(**option)
    gradients = []
    for model in (plain, other):
        (out,) = model(image)
        out.square().sum().backward()
        gradients.append((out, *(p.grad for p in model.parameters())))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_dropout_and_drop_path_act_in_training_only():
    model = build(drop_rate=0.5, drop_path_rate=0.5)
    rates = [block.drop_path.rate for block in model.layers]
    # one block late, and once more after the last block, as published
    assert rates == [0.0, 0.0, 0.25]
    assert model.drop_path.rate == 0.5
    image = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(image)[0], model(image)[0])
    model.eval()
    assert torch.equal(model(image)[0], model(image)[0])


@pytest.mark.parametrize('frozen_stages', [-1, 0, 2, 3])
def test_frozen_stages(frozen_stages):
    model = build(frozen_stages=frozen_stages, drop_rate=0.1).train()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    wanted = set()
    if frozen_stages >= 0:
        prefixes = ['cls_token', 'pos_embed', 'patch_embed.']
        prefixes += [f'layers.{i}.' for i in range(frozen_stages)]
        prefixes += ['norm.'] if frozen_stages == 3 else []
        wanted = {
            n
            for n, _ in model.named_parameters()
            if n.startswith(tuple(prefixes))
        }
    assert frozen == wanted
    assert [b.training for b in model.layers] == [
        i >= frozen_stages for i in range(3)
    ]
    assert model.dropout.training == (frozen_stages < 0)
    assert model.eval() is model


def test_layer_depth_of_every_parameter():
    model = build()
    depths = {
        n: model.get_layer_depth(f'backbone.{n}', 'backbone.')
        for n, _ in model.named_parameters()
    }
    assert {total for _, total in depths.values()} == {5}
    assert {depths[n][0] for n in ('cls_token', 'pos_embed')} == {0}
    assert depths['patch_embed.projection.weight'][0] == 0
    assert depths['layers.0.norm.weight'][0] == 1
    assert depths['layers.2.mixer.ssm.D'][0] == 3
    assert depths['norm.weight'][0] == 4
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (4, 5)


def test_init_recipes_differ_in_the_backward_step_size_only():
    default, official = build(), build(init_recipe='official')
    for block in official.layers:
        ssm = block.mixer.ssm
        forward, backward = ssm.by_direction(ssm.dt_bias)
        assert not backward.any()
        assert forward.max() < 0
    for block in default.layers:
        assert block.mixer.ssm.dt_bias.max() < 0
    bound = 1 / (48**0.5 * 3**0.5)  # 1 / sqrt(fan_in), / sqrt(depth)
    weight = default.layers[0].mixer.out_proj.weight
    assert 0.9 * bound < weight.abs().max() <= bound
    assert default.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    patch = default.patch_embed.projection.weight
    assert patch.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)


@pytest.mark.parametrize('img_size', [48, (16, 48)], ids=str)
def test_checkpoint_of_another_image_size_is_resized(img_size):
    """Loading interpolates once what running would interpolate each time."""
    small = build(out_type='raw').eval()
    large = build(out_type='raw', img_size=img_size).eval()
    large.load_state_dict(small.state_dict())
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    image = torch.randn(1, 3, *size)
    torch.testing.assert_close(small(image), large(image))


def test_dense_model_loads_a_classifier():
    """Without class token in the model, the checkpoint's is taken out."""
    classifier = build()
    dense = build(cls_token=None, out_type='featmap')
    state = copy.deepcopy(classifier.state_dict())
    dense.load_state_dict(state)
    patches = split_tokens(classifier.pos_embed, 'middle')[1]
    assert torch.equal(dense.pos_embed, patches)


def test_class_token_must_be_in_the_checkpoint():
    without = build(cls_token=None, out_type='featmap').state_dict()
    with pytest.raises(ValueError, match='cls_token None, the model'):
        build().load_state_dict(without)


def test_checkpoint_of_another_width_is_refused(tmp_path):
    path = tmp_path / 'wide.pth'
    wide = build(arch=ARCH | dict(embed_dims=32))
    torch.save({'state_dict': wide.state_dict()}, path)
    model = build(init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    with pytest.raises(ValueError, match='embed_dims 32, the model 24'):
        model.init_weights()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_stays_close(dtype):
    """Projections in low precision, the sensitive parts in float32."""
    model, image = build().eval(), torch.randn(2, 3, 32, 32)
    exact = model(image)[0]
    with torch.autocast('cpu', dtype):
        (low,) = model(image)
    assert low.dtype == torch.float32
    assert (low - exact).abs().max() < 20 * torch.finfo(dtype).eps


def test_model_in_bfloat16():
    model = build().bfloat16()
    (out,) = model(torch.randn(2, 3, 32, 32).bfloat16())
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_compiles_without_graph_breaks():
    model, image = build().eval(), torch.randn(2, 3, 32, 32)
    report = torch._dynamo.explain(model)(image)
    assert report.graph_break_count == 0
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(image), model(image))


def test_complexity_info_counts_the_scan():
    """MMEngine's tool sees the operator: FLOPs grow with the state."""
    image = torch.randn(1, 3, 32, 32)
    flops = [
        get_model_complexity_info(
            build(arch=ARCH | dict(d_state=n)).eval(), None, inputs=(image,)
        )['flops']
        for n in (4, 8)
    ]
    tokens, d_inner, layers = 17, 48, 3
    scan = 2 * layers * tokens * d_inner * 4 * 7 / 2
    projection = 2 * layers * tokens * d_inner * 8
    assert flops[1] - flops[0] == pytest.approx(scan + projection, rel=1e-6)


def test_backend_is_announced_once(monkeypatch):
    said = []
    monkeypatch.setattr(backend, '_said', set())
    monkeypatch.setattr(
        backend, 'print_log', lambda message, **_: said.append(message)
    )
    model, image = build().eval(), torch.randn(1, 3, 32, 32)
    model(image)
    model(image)
    operators = [line.split()[0] for line in said]
    assert 'selective_scan' in operators
    assert len(operators) == len(set(operators))


BAD_ARGUMENTS = [
    (dict(arch='huge'), ValueError, "arch must be one of .*'huge'"),
    (dict(arch=3), TypeError, 'arch must be a str or a dict, got 3'),
    (dict(arch=dict(embed_dims=8)), ValueError, 'num_layers'),
    (dict(arch=ARCH | dict(depth=2)), ValueError, 'arch must have'),
    (dict(arch=ARCH | dict(d_state=0)), ValueError, 'positive integers'),
    (dict(cls_token='midle'), ValueError, "cls_token must be .*'midle'"),
    (dict(out_type='map'), ValueError, "out_type must be one of .*'map'"),
    (dict(out_indices=3), ValueError, r'out_indices must .*0 \.\.\. 2'),
    (dict(out_indices=[-4]), ValueError, 'out_indices must'),
    (dict(out_indices=[2, 1]), ValueError, 'out_indices must increase'),
    (dict(out_indices=[]), ValueError, 'out_indices must'),
    (dict(frozen_stages=4), ValueError, 'frozen_stages must be from -1 to 3'),
    (dict(init_recipe='none'), ValueError, 'init_recipe must be one of'),
    (dict(img_size=4), ValueError, 'at least one patch, 8x8 pixels, got 4x4'),
    (dict(img_size=(1, 2, 3)), ValueError, 'img_size must be'),
    (dict(rotary=dict(size=3)), TypeError, 'size'),
    (dict(patch=8), TypeError, 'patch'),
    (dict(drop_path_rate=1.0), ValueError, 'drop path rate must be in'),
    (dict(state_matrix=dict(type='x')), ValueError, 'state_matrix type'),
]


@pytest.mark.parametrize(('kwargs', 'error', 'message'), BAD_ARGUMENTS)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        build(**kwargs)


def test_bad_images():
    model = build()
    with pytest.raises(ValueError, match='got 4x32'):
        model(torch.zeros(1, 3, 4, 32))
    with pytest.raises(ValueError, match=r'\(batch, 3, height, width\)'):
        model(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match='got'):
        model(torch.zeros(3, 32, 32))
    with pytest.raises(TypeError, match=r'floating dtype, got torch\.uint8'):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_debug_names_the_image_with_nan():
    image = torch.zeros(4, 3, 32, 32)
    image[2, 1, 0, 0] = float('nan')
    assert build()(image)[0].isnan().any()
    with pytest.raises(ValueError, match=r'image must be finite.*\[2\]'):
        build(debug=True)(image)
