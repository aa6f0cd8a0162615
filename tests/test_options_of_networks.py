"What SANet's, MSNet's and other authors do beside their networks, as options of every student: colours exchanged, probabilities corrected, LossNet, saved maps."
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from polyp_difom.core import InputError
from polyp_difom.data.augment import Augment
from polyp_difom.deploy.predictor import load_predictor
from polyp_difom.training.lossnet import lossnet_loss
from polyp_difom.training.runs import read_log, resume, train
from polyp_difom.weights import read_tensors

SHORT = dict(student='unet,width=2', size=32, epochs=(0, 1, 0), steps=2, batch_size=2, valid=.25, scales=(1,), schedule='constant', device='cpu', precision='fp32')


@pytest.fixture(scope='module')
def run(data, tmp_path_factory):
    "A run on `data`; not to be changed."
    return train(data, tmp_path_factory.mktemp('runs')/'run', **SHORT | dict(student='unet,width=4', steps=100, batch_size=8, lr=8e-3))


def vgg_file(path, seed=0):
    torch.manual_seed(seed)
    torch.save({name.replace('features_', 'features.'): w for name, w in lossnet_loss(weights=False).vgg.state_dict().items()}, path)
    return path


def test_colours_are_exchanged_on_the_device_by_seed_and_masks_stay():
    images, masks = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8), torch.randint(2, (6, 1, 32, 32), dtype=torch.uint8)
    images[3:] //= 3
    seen = []
    for share in (0., 1., 1.):
        torch.manual_seed(5)
        seen.append(Augment(32, 'none', colour_exchange=share)((images, masks)))
    assert torch.equal(seen[0][0], images.float()/255)
    assert not torch.equal(seen[1][0], seen[0][0]) and torch.equal(seen[1][0], seen[2][0])
    assert all(torch.equal(mask, masks.float()) for _, mask in seen)
    means = seen[1][0].mean((1, 2, 3))
    assert (means[:3] < .3).any() or (means[3:] > .3).any() # a bright frame became dark, or a dark one bright


def test_a_run_exchanges_colours_and_says_so(data, tmp_path):
    run, other = train(data, tmp_path/'plain', **SHORT), train(data, tmp_path/'run', colour_exchange=1., **SHORT)
    config = json.loads((other/'config.json').read_text())
    assert config['settings']['colour_exchange'] == 1 and '--colour-exchange 1.0' in config['command']
    first, second = (read_tensors(one/'last.safetensors')[0] for one in (run, other))
    assert any(not torch.equal(first[name], second[name]) for name in first if name.startswith('model.'))
    with pytest.raises(InputError, match='colour_exchange 2: give a share from 0 to 1'): train(data, tmp_path/'none', colour_exchange=2, **SHORT)


def test_lossnet_by_name_goes_on_with_the_same_weights_alone(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, other = vgg_file(tmp_path/'vgg.pth'), vgg_file(tmp_path/'other.pth', 1)
    run = train(data, 'run', loss='lossnet=vgg.pth', **SHORT) # a relative path
    assert json.loads((run/'config.json').read_text())['settings']['loss'] == f'lossnet={file}'
    (tmp_path/'elsewhere').mkdir(); monkeypatch.chdir(tmp_path/'elsewhere')
    run = tmp_path/'run'
    plain = train(data, 'plain', loss='structure', **SHORT)
    assert read_log(run)['seg'][0] > read_log(plain)['seg'][0] # the same batches, and a term more
    resume(run, epochs=(0, 2, 0), device='cpu')
    file.rename(tmp_path/'moved.pth')
    with pytest.raises(InputError, match=r'loss lossnet: .*vgg.pth: no such file'): resume(run, epochs=(0, 3, 0), device='cpu')
    with pytest.raises(InputError, match='weights of the loss'): resume(run, epochs=(0, 3, 0), loss=f'lossnet={other}', device='cpu')
    with pytest.raises(InputError, match='cannot be resumed with another loss'): resume(run, epochs=(0, 3, 0), loss='structure', device='cpu')
    resume(run, epochs=(0, 3, 0), loss=f'lossnet={tmp_path/"moved.pth"}', device='cpu')
    assert len(read_log(run)) == 3


def test_a_lossnet_without_weights_is_refused_before_anything_is_written(data, tmp_path, fails):
    line = fails('train', data, '--student', 'unet,width=2', '--size', 32, '--loss', f'lossnet={tmp_path/"none.pth"}', '--out', tmp_path/'run', '--device', 'cpu')
    assert 'none.pth: no such file' in line and not (tmp_path/'run').exists()
    assert 'lossnet[=FILE]' in fails('train', data, '--size', 32, '--loss', 'losnet', '--out', tmp_path/'run', '--device', 'cpu')


def test_corrected_probabilities_change_mdice_and_no_mask(polyp_difom, data, run, tmp_path):
    reports = []
    for i, flags in enumerate(([], ['--probability-correction'])):
        result = polyp_difom('evaluate', run, data, '--device', 'cpu', '--json', tmp_path/f'{i}.json', *flags)
        assert result.returncode == 0 and ('probability correction' in result.out) == bool(flags)
        reports.append(json.loads((tmp_path/f'{i}.json').read_text()))
        assert ('--probability-correction' in reports[-1]['command']) == bool(flags)
    plain, corrected = (next(iter(report['sets'].values())) for report in reports)
    assert plain['Dice_05'] == corrected['Dice_05'] and plain['mDice'] != corrected['mDice']


def test_corrected_maps_are_the_logits_by_their_shares(polyp_difom, data, run, tmp_path):
    images = next((data/'TestDataset').iterdir())/'images'
    for folder, flags in (('plain', []), ('corrected', ['--probability-correction'])): assert polyp_difom('predict', run, images, '--out', tmp_path/folder, '--device', 'cpu', *flags).returncode == 0
    image = next(images.iterdir())
    plain, corrected = (load_predictor(run, device='cpu', probability_correction=flag)(image) for flag in (False, True))
    logits = np.log(plain.astype(np.float64)/(1 - plain))
    for sign in (logits > 0, logits < 0): logits[sign] = logits[sign]/sign.mean()
    assert np.abs(corrected - 1/(1 + np.exp(-logits))).max() < 1e-4
    saved = np.asarray(Image.open(tmp_path/'corrected'/f'{image.stem}.png'))
    assert np.array_equal(saved, np.round(corrected*255)) and ((plain >= .5) == (corrected >= .5)).all()


@pytest.fixture
def methods(data, run, polyp_difom, tmp_path):
    "Maps of two methods for the test set of `data`, renamed as one of the paper's."
    source, kvasir = next((data/'TestDataset').iterdir()), tmp_path/'data'/'TestDataset'/'Kvasir'
    kvasir.mkdir(parents=True)
    for part in ('images', 'masks'): (kvasir/part).symlink_to(source/part)
    for name, flags in (('plain', []), ('corrected', ['--probability-correction'])):
        assert polyp_difom('predict', run, kvasir/'images', '--out', tmp_path/'maps'/name/'Kvasir', '--device', 'cpu', *flags).returncode == 0
    return tmp_path


def test_one_table_holds_all_seventeen_rows_and_every_method(methods):
    words = ['evaluate', '--predictions', 'maps/plain', '--predictions', 'with correction=maps/corrected', '--masks', 'data', '--table', 'table']
    command = [str(Path(sys.executable).parent/'polyp-difom'), *words]
    result = subprocess.run(command, cwd=methods, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(word in result.stdout for word in ('SANet', 'SAM-Mamba', 'U-Net++ + Ours', 'with correction', 'table/methods.md'))
    rows = list(csv.reader((methods/'table'/'methods.csv').open()))
    assert len(rows) == 1 + 17 + 2 and [row[0] for row in rows[-2:]] == ['plain', 'with correction']
    kept = json.loads((methods/'table'/'methods.json').read_text())
    assert kept['plain']['Kvasir']['Dice_05'] == kept['with correction']['Kvasir']['Dice_05']
    again = subprocess.run(command, cwd=methods, capture_output=True, text=True)
    assert again.returncode == 1 and 'holds a table already' in again.stderr
    assert subprocess.run([*command, '--overwrite'], cwd=methods, capture_output=True).returncode == 0


def test_methods_that_cannot_be_told_apart_or_lack_maps_are_refused(methods, fails):
    maps, data = methods/'maps', methods/'data'
    assert 'two methods of one name' in fails('evaluate', '--predictions', maps/'plain', '--predictions', f'plain={maps/"corrected"}', '--masks', data)
    assert 'published row' in fails('evaluate', '--predictions', f'SANet={maps/"plain"}', '--masks', data)
    assert 'no masks for the maps of Kvasir' in fails('evaluate', '--predictions', maps/'plain', '--masks', maps)
    next((maps/'plain'/'Kvasir').iterdir()).unlink()
    assert '1 of 3 masks have no prediction' in fails('evaluate', '--predictions', maps/'plain', '--masks', data)
