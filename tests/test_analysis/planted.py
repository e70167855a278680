"""A classifier whose weights are set so that one bright patch decides."""

import torch
from small_runs import digits_config

from mmstabvim.apis import get_model

PATCH, ROWS, COLUMNS = 4, 3, 5
# channels of the tokens: brightness, class token, any patch, what was found
BRIGHT, CLASS, ANY, FOUND = range(4)


def build_model(tmp_path, **backbone):
    """Images of 3 x 5 patches, one layer; class 1 says: there is one."""
    cfg = digits_config(tmp_path)
    cfg.model.backbone.arch.num_layers = 1
    cfg.model.backbone.update(
        img_size=(PATCH * ROWS, PATCH * COLUMNS),
        patch_size=PATCH,
        **backbone,
    )
    cfg.model.head.num_classes = 2
    model = get_model(cfg)
    with torch.no_grad():
        set_weights(model)
    return model


def set_weights(model):
    """The class token reads, by C, the brightness that B lets in."""
    mixer = model.backbone.layers[0].mixer
    for module in (model.backbone.patch_embed, mixer, model.head):
        for name, parameter in module.named_parameters():
            if 'A_log' not in name:
                parameter.zero_()
    model.backbone.pos_embed.zero_()
    model.backbone.cls_token.zero_()
    model.backbone.cls_token[..., CLASS] = 1
    projection = model.backbone.patch_embed.projection
    projection.weight[BRIGHT] = 1 / projection.weight[BRIGHT].numel()
    projection.bias[ANY] = 1
    half = len(mixer.in_proj.weight) // 2
    for channel in (BRIGHT, CLASS, ANY):
        mixer.in_proj.weight[channel, channel] = 1
    mixer.in_proj.weight[half + BRIGHT, CLASS] = 1  # gate
    mixer.out_proj.weight[FOUND, BRIGHT] = 1
    mixer.conv1d.weight[:, -1] = 1  # the token itself
    for weights in mixer.direction_weights():
        weights.B_rows[:, ANY] = 1
        weights.C_rows[:, CLASS] = 1
    mixer.ssm.dt_bias.fill_(-5.0)  # slow: all tokens count
    model.head.fc.weight[1, FOUND] = 1


def make_image(generator, place=None):
    """Noise (1, 3, 12, 20), and a bright patch at (row, column)."""
    shape = 1, 3, PATCH * ROWS, PATCH * COLUMNS
    image = 0.1 * torch.randn(shape, generator=generator)
    if place is not None:
        top, left = (PATCH * i for i in place)
        image[..., top : top + PATCH, left : left + PATCH] = 2.0
    return image
