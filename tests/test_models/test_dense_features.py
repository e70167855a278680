"""Maps for dense prediction: conventions, sizes, weights of a classifier."""

import copy
import json
from collections import OrderedDict

import pytest
import torch
from mmengine.runner import (
    get_state_dict,
    load_checkpoint,
    save_checkpoint,
    weights_to_cpu,
)

from mmstabvim import VisionMamba
from mmstabvim.layers.position_embedding import (
    resize_position_embedding,
    split_tokens,
)
from mmstabvim.models.vim_checkpoint import from_official

ARCH = dict(embed_dims=8, num_layers=3, d_state=4)
CONVENTIONS = [
    ('normed', 'none'),
    *[
        (feature, last_layer)
        for feature in ('mixer_output', 'residual')
        for last_layer in ('none', 'add', 'add_norm')
    ],
]


def build(**kwargs):
    torch.manual_seed(0)
    settings = dict(arch=ARCH, img_size=32, patch_size=8) | kwargs
    return VisionMamba(**settings).eval()


def dense(**kwargs):
    return build(**dict(cls_token=None, out_type='featmap') | kwargs)


# what the outputs are


def golden_model(data, **kwargs):
    config = json.loads(str(data['config_json']))
    model = VisionMamba(
        dict(embed_dims=config['embed_dim'], num_layers=config['depth']),
        img_size=config['img_size'],
        out_type='raw',
        out_indices=[0, 1, 2, 3],
        **kwargs,
    ).double()
    official = {
        key.removeprefix('state/'): torch.from_numpy(data[key]).double()
        for key in data.files
        if key.startswith('state/')
    }
    state = {
        k.removeprefix('backbone.'): v
        for k, v in from_official(official)[0].items()
        if k.startswith('backbone.')
    }
    model.load_state_dict(state)
    return model.eval()


def rms_norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


@pytest.mark.parametrize(('feature', 'last_layer'), CONVENTIONS)
def test_conventions_have_the_stored_numbers(golden, feature, last_layer):
    """The published code's convention of each, from its own numbers.

    Its ``residual`` of block i is what block i + 1 hands on: the stream after
    block i. The last block has no successor.
    """
    data = golden('vim_cls_midcls.npz')
    stored = {
        name: [torch.from_numpy(data[f'f64/{name}/{i}']) for i in range(4)]
        for name in ('hidden_states', 'residual')
    }
    hidden, residual = stored['hidden_states'], stored['residual']
    weight = torch.from_numpy(data['state/norm_f.weight']).double()
    streams = [r + h for r, h in zip(residual, hidden, strict=True)]
    wanted = {
        'normed': [rms_norm(x, weight) for x in streams],
        'mixer_output': list(hidden),
        'residual': [*residual[1:], hidden[3]],
    }[feature]
    if last_layer != 'none':
        wanted[-1] = streams[-1]
    if last_layer == 'add_norm':
        wanted[-1] = rms_norm(streams[-1], weight)
    model = golden_model(data, feature=feature, last_layer=last_layer)
    with torch.no_grad():
        got = model(torch.from_numpy(data['input']).double())
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()
    if feature == 'normed' or last_layer == 'add_norm':
        features = torch.from_numpy(data['f64/features'])
        torch.testing.assert_close(got[-1][:, 8], features)


@pytest.mark.parametrize(('feature', 'last_layer'), CONVENTIONS)
def test_every_learning_weight_has_a_gradient(feature, last_layer):
    """As DDP wants it; the final norm learns only where it is used."""
    model = dense(
        feature=feature, last_layer=last_layer, out_indices=[0, 1, 2]
    )
    outputs = model.train()(torch.randn(2, 3, 24, 40))
    sum(x.square().sum() for x in outputs).backward()
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in learning.values())
    uses_norm = feature == 'normed' or last_layer == 'add_norm'
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == (set() if uses_norm else {'norm.weight'})


def test_residual_is_what_the_next_block_reads_under_stochastic_depth():
    """In training the same samples are dropped as in the stream itself."""
    model = build(
        out_type='raw',
        feature='residual',
        out_indices=[0, 1],
        drop_path_rate=0.9,
    ).train()
    seen = []
    for block in model.layers:
        block.register_forward_hook(lambda m, args, out: seen.append(out[1]))
    first, second = model(torch.randn(8, 3, 32, 32))
    assert torch.equal(first, seen[1])
    assert torch.equal(second, seen[2])


CONTRADICTIONS = [
    (dict(feature='hidden'), "feature must be one of .*'hidden'"),
    (dict(last_layer='norm'), "last_layer must be one of .*'norm'"),
    (dict(last_layer='add'), "last_layer must be 'none'.*'add'.*normed"),
    (
        dict(feature='residual', last_layer='add', out_indices=[0]),
        "last_layer must be 'none'.*out_indices does not have the last",
    ),
    (
        dict(feature='residual', last_layer='add_norm', final_norm=False),
        "last_layer must be 'none'.*final_norm is False",
    ),
    (dict(checkpoint_cls_token='tail'), 'checkpoint_cls_token must be one of'),
]


@pytest.mark.parametrize(('kwargs', 'message'), CONTRADICTIONS)
def test_contradictory_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


@pytest.mark.parametrize('cls_token', ['middle', None])
@pytest.mark.parametrize(
    ('size', 'grid'),
    [((713, 1000), (45, 63)), ((360, 480), (23, 30)), ((16, 17), (1, 2))],
    ids=str,
)
def test_maps_at_sizes_never_seen(size, grid, cls_token):
    """Rows and columns are the size over the patch, rounded up."""
    model = VisionMamba(
        dict(embed_dims=4, num_layers=1, d_state=2),
        img_size=64,
        cls_token=cls_token,
        out_type='featmap',
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        (out,) = model(torch.randn(1, 3, *size))
    assert out.shape == (1, 4, *grid)
    assert out.isfinite().all()


# the same numbers as the classifier


@pytest.mark.parametrize('cls_token', ['middle', 'head', 'double'])
def test_with_the_class_token_patches_are_those_of_the_classifier(cls_token):
    classifier = build(cls_token=cls_token, out_type='raw')
    model = dense(cls_token=cls_token)
    model.load_state_dict(classifier.state_dict())
    image = torch.randn(2, 3, 32, 32)
    patches = split_tokens(classifier(image)[0], cls_token)[1]
    assert torch.equal(model(image)[0].flatten(2).transpose(1, 2), patches)


def test_without_it_the_classifier_runs_on_its_patches_alone():
    """Each patch starts from the same numbers; the sequence is another.

    The token takes part in every scan, so leaving it out changes the patches'
    features: what is left equals (to rounding) its own blocks on its own
    embedded sequence with the token taken out.
    """
    classifier, model = build(out_type='raw'), dense()
    model.load_state_dict(classifier.state_dict())
    image = torch.randn(2, 3, 32, 32)
    embedded = classifier._embed(image)[0]
    hidden, residual = split_tokens(embedded, 'middle')[1], None
    assert torch.equal(model._embed(image)[0], hidden)
    for block in classifier.layers:
        hidden, residual = block(hidden, residual)
    wanted = classifier.norm(hidden + residual)
    got = model(image)[0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    with_token = split_tokens(classifier(image)[0], 'middle')[1]
    assert not torch.allclose(got, with_token, atol=1e-3)


# loading


@pytest.mark.parametrize('img_size', [32, 48, (16, 72)], ids=str)
@pytest.mark.parametrize('cls_token', ['middle', None])
def test_a_classifier_is_loaded_by_prefix(tmp_path, cls_token, img_size):
    """``init_cfg`` of a dense model: other sizes, with and without token."""
    path, classifier = tmp_path / 'vim.pth', build()
    state = {f'backbone.{k}': v for k, v in classifier.state_dict().items()}
    state['head.fc.weight'] = torch.zeros(5, 8)
    torch.save({'state_dict': state}, path)
    model = dense(
        cls_token=cls_token,
        img_size=img_size,
        init_cfg=dict(
            type='Pretrained', checkpoint=str(path), prefix='backbone.'
        ),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    model.init_weights()
    wanted = dict(classifier.named_parameters())
    resized = resize_position_embedding(
        wanted['pos_embed'], (4, 4), model.grid, 'middle'
    )
    if cls_token is None:
        del wanted['cls_token']
        resized = split_tokens(resized, 'middle')[1]
    wanted['pos_embed'] = resized
    loaded = dict(model.named_parameters())
    assert loaded.keys() == wanted.keys()
    for name, value in loaded.items():
        assert torch.equal(value, wanted[name]), name


def test_a_wide_grid_is_not_taken_for_a_square_one():
    """2 x 8 patches are as many as 4 x 4: one's own file stays as it is."""
    wide = dense(img_size=(16, 64))
    state = copy.deepcopy(wide.state_dict())
    for source in (state, dict(state)):  # with and without metadata
        again = dense(img_size=(16, 64))
        torch.nn.init.zeros_(again.pos_embed)
        again.load_state_dict(source)
        assert torch.equal(again.pos_embed, wide.pos_embed)


def test_the_metadata_tell_a_square_grid_from_a_wide_one(tmp_path):
    """Also through a file of MMEngine's, which is read without code."""
    square, wide = dense(), dense(img_size=(16, 64))
    path = tmp_path / 'vim.pth'
    state = weights_to_cpu(get_state_dict(square))  # as the Runner does
    save_checkpoint({'state_dict': state}, str(path))
    load_checkpoint(wide, str(path), strict=True)
    exact = resize_position_embedding(square.pos_embed, (4, 4), (2, 8), None)
    assert torch.equal(wide.pos_embed, exact)


def test_the_token_in_front_is_taken_out_where_it_is():
    """The metadata tell; without them the argument does."""
    first = build(cls_token='head')
    patches = split_tokens(first.pos_embed, 'head')[1]
    told = dense()
    told.load_state_dict(first.state_dict())
    assert torch.equal(told.pos_embed, patches)
    plain = OrderedDict(first.state_dict().items())
    assert not hasattr(plain, '_metadata')
    assumed = dense(checkpoint_cls_token='head')
    assumed.load_state_dict(plain)
    assert torch.equal(assumed.pos_embed, patches)
    misled = dense()
    misled.load_state_dict(plain)
    assert not torch.equal(misled.pos_embed, patches)


def test_part_of_a_checkpoint_may_be_loaded():
    """A position embedding alone, or weights of other modules alone."""
    model = dense(img_size=48)
    part = {'pos_embed': build(cls_token=None, out_type='raw').pos_embed.data}
    assert not model.load_state_dict(part, strict=False).unexpected_keys
    exact = resize_position_embedding(part['pos_embed'], (4, 4), (6, 6), None)
    assert torch.equal(model.pos_embed, exact)
    left = build().load_state_dict({'other.weight': torch.zeros(2)}, False)
    assert left.unexpected_keys == ['other.weight']


MISFITS = [
    (dict(arch=ARCH | dict(embed_dims=16)), 'embed_dims 16, the model 8'),
    (dict(patch_size=16, img_size=64), 'patch_size 16, the model 8'),
    (dict(in_channels=1), 'in_channels 1, the model 3'),
    (dict(arch=ARCH | dict(num_layers=2)), '2 layers, the model 3'),
    (dict(arch=ARCH | dict(num_layers=4)), '4 layers, the model 3'),
    (dict(arch=ARCH | dict(d_state=5)), r'A_log is \(32, 5\)'),
    (
        dict(cls_token=None, out_type='raw'),
        "cls_token None, the model 'middle'",
    ),
    (dict(cls_token='double'), "cls_token 'double', the model 'middle'"),
    (dict(cls_token='head'), "cls_token 'head', the model 'middle'"),
]


@pytest.mark.parametrize(('kwargs', 'message'), MISFITS)
def test_checkpoints_that_do_not_fit(kwargs, message, tmp_path):
    """Refused also where MMEngine would only log what does not match."""
    path = tmp_path / 'vim.pth'
    other = build(**kwargs)
    save_checkpoint({'state_dict': other.state_dict()}, str(path))
    model = build(init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    with pytest.raises(ValueError, match=message):
        model.init_weights()
