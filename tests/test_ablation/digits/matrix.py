title = 'Digits in two iterations'
metric = 'accuracy/top1'
baseline = dict(state='small')
seeds = [0, 1]
groups = [
    dict(
        configs='tiny.py',
        labels=dict(
            state=dict(small=None, large={'model.backbone.arch.d_state': 4})
        ),
    ),
    dict(configs='broken.py', labels=dict(state='broken'), seeds=[0]),
    dict(configs='tiny.py', labels=dict(state='wild'), seeds=[0], lrs=[1e9]),
]
