# Handwritten digits on a CPU in a few minutes, nothing to download.
_base_ = [
    '../_base_/models/vim_nano_p4.py',
    '../_base_/datasets/digits_bs64.py',
    '../_base_/schedules/digits_bs64_adamw_20e.py',
    '../_base_/default_runtime.py',
]

default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=5),
)
