# A dataset that no registry knows.
_base_ = ['./tiny.py']

train_dataloader = dict(dataset=dict(type='NoSuchDataset'))
