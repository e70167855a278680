# `python tools/ablation.py run configs/ablation/camvid_transfer.py --jobs 2`
# after `configs/ablation/cifar10_subset.py`, from whose first checkpoint the
# pre-trained ones start: CamVid from scratch and from CIFAR-10, without and
# with stabilizers, and a convolutional network of similar size.
title = 'From CIFAR-10 to CamVid'
notes = [
    'Validation: all 101 images, whole masks of 360 x 480 pixels, '
    'predictions made at 180 x 240.',
]
metric = 'mIoU'
more_metrics = ['aAcc', 'IoU/*']
baseline = dict(start='scratch')
seeds = [0, 1]

_init = 'model.backbone.init_cfg'
_starts = {
    'scratch': {},
    'CIFAR-10': {
        f'{_init}.type': 'Pretrained',
        f'{_init}.prefix': 'backbone.',
        f'{_init}.checkpoint': 'work_dirs/ablation/cifar10_subset/cells/'
        'full.none.fp32.seed0/epoch_10.pth',
    },
}
_stabilizers = {
    'none': '../_base_/stabilizers/none.py',
    'all': [
        '../_base_/stabilizers/all.py',
        # below the radius that each state matrix starts with: the literal
        # bound of 1 would change pre-trained matrices at once
        {'default_hooks.sn.rho_max': 'init'},
    ],
}
_short = {  # half the configs' iterations
    'train_cfg.max_iters': 500,
    'param_scheduler.1.end': 500,
    'default_hooks.checkpoint.max_keep_ckpts': 1,
}

groups = [
    dict(
        configs='../transfer/vim-nano-p4_upernet_1xb4-1k_camvid-180x240.py',
        labels=dict(model='Vim', stabilizers=_stabilizers, start=_starts),
        cfg_options=_short,
    ),
    dict(
        configs='../transfer/fcn_r18-w16_1xb4-1k_camvid-180x240.py',
        labels=dict(
            model='FCN, ResNet-18', stabilizers='none', start='scratch'
        ),
        cfg_options=_short,
    ),
]
