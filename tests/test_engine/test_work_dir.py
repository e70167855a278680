"""Checkpoints in the folder of a training, copied or not."""

import shutil

import pytest
import torch
from mmengine.runner import Runner
from small_runs import digits_config, train

from mmstabvim.engine.resume import check_resumable, explain_resume
from mmstabvim.engine.work_dir import find_checkpoint


@pytest.fixture
def folder(tmp_path):
    """Five checkpoints and the note of the last."""
    root = tmp_path / 'work'
    root.mkdir()
    for epoch in (1, 2, 10, 8, 9):
        (root / f'epoch_{epoch}.pth').write_text(str(epoch))
    (root / 'last_checkpoint').write_text(str(root / 'epoch_10.pth'))
    return root


def test_the_newest_checkpoint(folder):
    assert find_checkpoint(folder) == str(folder / 'epoch_10.pth')
    (folder / 'last_checkpoint').unlink()
    for epoch in range(11, 14):  # folders have an order of their own
        (folder / f'epoch_{epoch}.pth').touch()
        newest = str(folder / f'epoch_{epoch}.pth')
        assert find_checkpoint(str(folder)) == newest


def test_a_copied_folder_uses_its_own(folder, tmp_path):
    """Though the original, to which the note leads, is still there."""
    copy = tmp_path / 'copy'
    shutil.copytree(folder, copy)
    assert find_checkpoint(copy) == str(copy / 'epoch_10.pth')
    shutil.rmtree(folder)
    assert find_checkpoint(copy) == str(copy / 'epoch_10.pth')


def test_files_and_addresses_are_taken_as_they_are(folder):
    path = str(folder / 'epoch_2.pth')
    assert find_checkpoint(path) == path
    assert find_checkpoint('https://host/a.pth') == 'https://host/a.pth'


def test_nothing_there(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match='does not exist'):
        find_checkpoint(tmp_path / 'none')
    for path in folder.glob('*.pth'):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r'epoch_10\.pth, is gone'):
        find_checkpoint(folder)


def test_only_checkpoints_of_a_training_are_resumed(tmp_path):
    path = tmp_path / 'a.pth'
    for content in (
        {'a.weight': torch.ones(2)},
        {'model': {'a.weight': torch.ones(2)}, 'optimizer': {}},
        {'state_dict': {'a.weight': torch.ones(2)}, 'meta': {}},
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match='not a whole checkpoint'):
            check_resumable(str(path))
    path.write_bytes(b'nothing')
    with pytest.raises(ValueError, match=r'--resume: .*wanted a checkpoint'):
        check_resumable(str(path))
    with pytest.raises(ValueError, match='got the URL'):
        check_resumable('https://host/a.pth')


def test_resume_in_a_copied_folder(tmp_path):
    """The run goes on, and its best checkpoint is the copied one."""
    cfg = digits_config(tmp_path)
    cfg.train_cfg.max_epochs = 1
    cfg.param_scheduler = []
    cfg.default_hooks.checkpoint.save_best = 'auto'
    train(cfg)
    copy = tmp_path / 'copy'
    shutil.copytree(cfg.work_dir, copy)
    cfg.work_dir, cfg.resume = str(copy), True
    cfg.load_from = find_checkpoint(copy)
    check_resumable(cfg.load_from)
    cfg.train_cfg.max_epochs = 2
    cfg.experiment_name = 'copied'
    runner = Runner.from_cfg(cfg)
    explain_resume(runner)
    runner.load_or_resume()
    best = runner.message_hub.get_info('best_ckpt')
    assert best.startswith(str(copy))
    runner.train()
    assert runner.epoch == 2


def test_optimizer_of_another_training(tmp_path):
    cfg = digits_config(tmp_path)
    cfg.train_cfg.max_epochs = 1
    cfg.param_scheduler = []
    train(cfg)
    cfg.load_from = find_checkpoint(cfg.work_dir)
    cfg.resume = True
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.1)
    cfg.optim_wrapper.paramwise_cfg = None
    cfg.experiment_name = 'another'
    runner = Runner.from_cfg(cfg)
    explain_resume(runner)
    with pytest.raises(ValueError, match='of another training than'):
        runner.load_or_resume()
