"""Confusion matrices of small models, against scikit-learn and metrics."""

import csv
import json
import sys
from pathlib import Path

import confusion_matrix as tool
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner
from sklearn import metrics

from mmstabvim.apis import trained

MIM = '.mim/tools/analysis_tools/confusion_matrix.py'


def run(arguments, folder, *more):
    """Facts and lines of pairs that the tool writes."""
    tool.main([*arguments, f'--out={folder}', *more])
    facts = json.loads((folder / 'confusion_matrix.json').read_text())
    return facts, facts.pop('rows')


def vary(model):
    """Logits that tell classes apart; a new model says one class only."""
    for name, parameter in model.named_parameters():
        if name.startswith(('head.fc', 'decode_head.conv_seg')):
            torch.nn.init.normal_(parameter, std=20.0)


@pytest.fixture
def classifier(digits):
    return digits(vary)


@pytest.fixture
def segmentor(scenes):
    config, checkpoint = scenes
    saved = torch.load(checkpoint)
    weight = saved['state_dict']['decode_head.conv_seg.weight']
    torch.manual_seed(0)
    weight.normal_(std=20.0)
    torch.save(saved, checkpoint)
    return [config, checkpoint]


def answers(arguments):
    """True labels and predictions, image by image."""
    parser = tool.argparse.ArgumentParser()
    trained.add_options(parser, 10**6)
    cfg, model = trained.load_model(parser.parse_args(arguments))
    dataset = trained.DATASETS.build(cfg.test_dataloader.dataset)
    true, said = [], []
    for i in range(len(dataset)):
        (sample,) = model.test_step(pseudo_collate([dataset[i]]))
        if 'gt_sem_seg' in sample:
            true.append(sample.gt_sem_seg.data.flatten())
            said.append(sample.pred_sem_seg.data.flatten())
        else:
            true.append(sample.gt_label)
            said.append(sample.pred_score.argmax()[None])
    return torch.cat(true).numpy(), torch.cat(said).numpy()


def score(arguments, name):
    """What the config's own test says."""
    cfg = Config.fromfile(arguments[0])
    cfg.load_from = arguments[1]
    return Runner.from_cfg(cfg).test()[name]


def test_classifier(classifier, tmp_path, capsys):
    facts, pairs = run(classifier, tmp_path / 'out')
    true, said = answers(classifier)
    assert len(set(said)) > 3
    wanted = metrics.confusion_matrix(true, said, labels=range(10))
    assert facts['matrix'] == wanted.tolist()
    assert (wanted != wanted.T).any()
    assert facts['images'] == facts['counted'] == len(true) == 48
    top1 = score(classifier, 'accuracy/top1')
    assert facts['accuracy'] == pytest.approx(top1)
    recall, precision = (
        f(true, said, labels=range(10), average=None, zero_division=np.nan)
        for f in (metrics.recall_score, metrics.precision_score)
    )
    for i, row in enumerate(facts['classes']):
        assert row['count'] == wanted[i].sum()
        for name, values in (('recall', recall), ('precision', precision)):
            if np.isnan(values[i]):
                assert row[name] is None
            else:
                assert row[name] == pytest.approx(100 * values[i])
    assert {(p['true'], p['predicted']): p['count'] for p in pairs} == {
        (i, j): wanted[i, j] for i, j in np.argwhere(wanted)
    }
    assert f'{top1:.2f} % of 48 labels right' in capsys.readouterr().out


def test_segmentor(segmentor, tmp_path):
    facts, _ = run(segmentor, tmp_path / 'out')
    true, said = answers(segmentor)
    assert len(set(said)) > 2
    wanted = metrics.confusion_matrix(true, said, labels=range(11))
    assert facts['matrix'] == wanted.tolist()
    assert (facts['images'], facts['unit']) == (8, 'pixels')
    overlaps = [
        row['IoU'] for row in facts['classes'] if row['IoU'] is not None
    ]
    mean = score(segmentor, 'mIoU')
    assert np.mean(overlaps) == pytest.approx(mean, abs=0.01)
    assert facts['accuracy'] == pytest.approx(
        100 * (true == said).mean(), abs=1e-9
    )


def test_pixels_that_do_not_count(segmentor, tmp_path):
    """As the config's metric leaves them out; here those of class 0."""
    whole, _ = run(segmentor, tmp_path / 'out')
    more = ['--cfg-options', 'test_evaluator.ignore_index=0']
    some, _ = run(segmentor, tmp_path / 'some', *more)
    assert sum(some['matrix'][0]) == 0
    assert some['matrix'][1:] == whole['matrix'][1:]


def test_some_images(classifier, tmp_path):
    """Drawn by the seed; their counts are a part of all."""
    whole, _ = run(classifier, tmp_path / 'all')
    found = {
        seed: run(
            classifier, tmp_path / seed, '--samples=12', f'--seed={seed}'
        )[0]['matrix']
        for seed in ('0', '1')
    }
    for matrix in found.values():
        assert np.sum(matrix) == 12
        assert (np.array(matrix) <= np.array(whole['matrix'])).all()
    assert found['0'] != found['1']
    again = run(classifier, tmp_path / 'again', '--samples=12')[0]['matrix']
    assert again == found['0']
    with pytest.raises(ValueError, match='--samples must be 1 to 48'):
        run(classifier, tmp_path / 'many', '--samples=99')


def test_files(classifier, tmp_path, capsys):
    out = tmp_path / 'out'
    _, pairs = run(classifier, out, '--top=2', '--device=cpu')
    with (out / 'confusion_matrix.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row['count']) for row in rows] == [p['count'] for p in pairs]
    for ending in ('png', 'pdf', 'svg'):
        path = out / f'confusion_matrix.{ending}'
        assert path.stat().st_size > 5000
    page = (out / 'confusion_matrix.md').read_text()
    mistakes = page.split('## Most frequent mistakes')[1]
    # head, rule and the two most frequent
    lines = [line for line in mistakes.splitlines() if line.startswith('|')]
    assert len(lines) == 4
    wrong = [p['count'] for p in pairs if p['true'] != p['predicted']]
    assert f'| {max(wrong)} |' in lines[2]
    assert 'test set' in capsys.readouterr().err


def test_shares():
    matrix = np.array([[3, 1], [0, 0]])
    assert tool.normalize(matrix, 'true').tolist() == [[75, 25], [0, 0]]
    assert tool.normalize(matrix, 'predicted').tolist() == [[100, 100], [0, 0]]
    assert tool.normalize(matrix, 'all').tolist() == [[75, 25], [0, 0]]
    assert tool.normalize(matrix, 'none').tolist() == [[3, 1], [0, 0]]
    _, never = tool.class_rows(matrix, ['a', 'b'], pixels=True)
    assert never['recall'] is None
    assert (never['precision'], never['IoU']) == (0, 0)
    perfect = tool.make_tables(
        tool.class_rows(np.eye(2, dtype=int), ['a', 'b'], False), [], 3
    )
    assert perfect[1] == 'None.'


def test_figures_of_few_and_many_classes():
    few, many = (
        tool.draw(np.eye(n), [f'class {i}' for i in range(n)], 'true').axes[0]
        for n in (3, 60)
    )
    assert few.get_xticklabels()[0].get_text() == 'class 0'
    assert [t.get_text() for t in few.texts if t.get_text()] == ['100'] * 3
    assert not many.texts
    assert 'class 0' not in [t.get_text() for t in many.get_xticklabels()]


def test_errors(classifier, tmp_path, capsys):
    config, _ = classifier
    with pytest.raises(FileNotFoundError, match='checkpoint'):
        run([config, str(tmp_path / 'absent.pth')], tmp_path)
    for option, message in (
        ('--samples=0', '--samples must be at least 1'),
        ('--device=cuda', 'there is no GPU'),
    ):
        if option == '--device=cuda' and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit):
            run(classifier, tmp_path, option)
        assert message in capsys.readouterr().err
    metric = tool.ConfusionCounts()
    with pytest.raises(ValueError, match='one gt_label and a pred_score'):
        metric.process({}, [dict(gt_score=torch.ones(3))])


def test_mmpretrain_s_own_on_a_classifier(classifier, tmp_path, monkeypatch):
    """It runs as it is, and counts the same."""
    import mmpretrain

    path = Path(mmpretrain.__file__).parent / MIM
    if not path.exists():
        pytest.skip('this installation of MMPretrain has no tools')
    facts, _ = run(classifier, tmp_path / 'out')
    out = tmp_path / 'theirs.pkl'
    monkeypatch.setattr(
        sys, 'argv', ['confusion_matrix.py', *classifier, '--out', str(out)]
    )
    code = compile(path.read_text(), str(path), 'exec')
    exec(code, {'__name__': '__main__'})
    theirs = tool.mmengine.load(out)
    assert theirs.tolist() == facts['matrix']
