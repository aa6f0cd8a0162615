"What SANet's, MSNet's and other authors do beside their networks, as options of every student: colours exchanged, probabilities corrected, LossNet, saved maps."
import csv
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from polyp_difom.core import InputError
from polyp_difom.data.augment import Augment
from polyp_difom.deploy.predictor import load_predictor
from polyp_difom.evaluation.report import published
from polyp_difom.published import load_published, published_key, published_networks
from polyp_difom.students.blocks import SideOutputs, student_registry
from polyp_difom.students.registry import create_student, list_students
from polyp_difom.training.losses import losses, output_loss, structure_loss
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


def test_lossnet_by_name_goes_on_with_the_same_weights_alone(data, tmp_path, monkeypatch, polyp_difom):
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
    with pytest.raises(InputError, match='other weights of its loss'): resume(run, epochs=(0, 3, 0), loss=f'lossnet={other}', device='cpu')
    with pytest.raises(InputError, match='cannot be resumed with another loss'): resume(run, epochs=(0, 3, 0), loss='structure', device='cpu')
    assert polyp_difom('train', '--resume', run, '--epochs', 0, 3, 0, '--loss', f'lossnet={tmp_path/"moved.pth"}', '--device', 'cpu').returncode == 0
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
    assert all(word in result.stdout for word in ('plain, Kvasir: 3 images', 'SANet', 'SAM-Mamba', 'U-Net++ + Ours', 'with correction', 'table/methods.md'))
    rows = list(csv.reader((methods/'table'/'methods.csv').open()))
    assert len(rows) == 1 + 17 + 2 and [row[0] for row in rows[-2:]] == ['plain', 'with correction']
    kept = json.loads((methods/'table'/'methods.json').read_text())
    assert kept['plain']['Kvasir']['Dice_05'] == kept['with correction']['Kvasir']['Dice_05']
    again = subprocess.run(command, cwd=methods, capture_output=True, text=True)
    assert again.returncode == 1 and 'holds a table already' in again.stderr
    assert subprocess.run([*command, '--overwrite'], cwd=methods, capture_output=True).returncode == 0


def test_methods_that_cannot_be_told_apart_or_lack_maps_are_refused(methods, fails, polyp_difom):
    maps, data = methods/'maps', methods/'data'
    assert 'two methods of one name' in fails('evaluate', '--predictions', maps/'plain', '--predictions', f'plain={maps/"corrected"}', '--masks', data)
    assert 'published row' in fails('evaluate', '--predictions', f'SANet={maps/"plain"}', '--masks', data)
    assert 'no masks for the maps of Kvasir' in fails('evaluate', '--predictions', maps/'plain', '--masks', maps)
    next((maps/'plain'/'Kvasir').iterdir()).unlink()
    result = polyp_difom('evaluate', '--predictions', maps/'plain', '--masks', data, '--probability-correction')
    assert result.returncode == 2 and '--probability-correction does nothing to saved maps' in ' '.join(result.err.replace('│', ' ').split())
    assert 'where maps or masks are' in fails('evaluate', '--predictions', maps/'plain', '--masks', data, '--table', data/'TestDataset'/'Kvasir'/'masks')
    assert '1 of 3 masks have no prediction' in fails('evaluate', '--predictions', maps/'plain', '--masks', data)


LOSS_OF_AUTHORS = dict(unet='bce-dice', unetpp='bce-dice', pranet='structure', emcadnet='structure', sanet='bce-dice', msnet='structure', m2snet='structure', polyp_pvt='structure',
                       pvt_cascade='structure', ctnet='ctnet', meganet='meganet', cfanet='cfanet', sam_mamba='structure-weighted', **{'timm-unet': 'bce-dice'})


def test_every_network_is_trained_by_default_with_the_loss_that_this_table_names():
    assert {name: kind.loss for name, kind in student_registry.items() if name in LOSS_OF_AUTHORS} == LOSS_OF_AUTHORS
    assert {*LOSS_OF_AUTHORS} == {*list_students()} - {'smp/'} and {*LOSS_OF_AUTHORS.values()} <= {*losses}


def test_a_loss_that_needs_what_a_network_does_not_give_is_refused(data, tmp_path, fails):
    for loss, lacks in (('cfanet', 'outline'), ('ctnet', 'embedding'), ('cfanet-weighted', 'outline'), ('meganet', 'side2')):
        line = fails('train', data, '--student', 'unet,width=2', '--size', 32, '--loss', loss, '--out', tmp_path/'run', '--device', 'cpu')
        assert f'needs {lacks} beside the logits, which UNet does not give' in line and not (tmp_path/'run').exists()


def test_a_run_of_a_partial_goes_on_with_the_same_settings_alone(data, tmp_path):
    loss = partial(structure_loss, weighted=True)
    run = train(data, tmp_path/'run', loss=loss, **SHORT)
    assert json.loads((run/'config.json').read_text())['settings']['loss'] == 'polyp_difom.training.losses:structure_loss(weighted=True)'
    with pytest.raises(InputError, match='cannot be resumed with another loss'): resume(run, epochs=(0, 2, 0), loss=partial(structure_loss, weighted=False), device='cpu')
    resume(run, epochs=(0, 2, 0), loss=partial(structure_loss, weighted=True), device='cpu')


@pytest.mark.parametrize('student', ('cfanet,width=8', 'polyp_pvt,backbone=pvt_v2_b0,width=4', 'sanet'))
def test_a_network_that_cannot_learn_from_one_image_says_so_before_anything_is_written(student, data, tmp_path, fails):
    line = fails('train', data, '--student', student, '--no-pretrained', '--size', 32, '--batch-size', 1, '--out', tmp_path/'run', '--device', 'cpu')
    assert 'cannot learn from one image of 32x32 at a time' in line and 'give a larger batch_size' in line and not (tmp_path/'run').exists()


def test_the_classes_of_the_contrastive_loss_are_cut_or_as_the_mask_has_them():
    torch.manual_seed(0)
    outputs = SideOutputs([torch.randn(2, 1, 64, 64)], embedding=F.normalize(torch.randn(2, 8, 16, 16), dim=1))
    mask = torch.zeros(2, 1, 64, 64); mask[..., 8:40, 8:40] = 1
    soft = torch.where(F.avg_pool2d(mask, 9, 1, 4) % 1 > 0, torch.where(mask > 0, .75, .25), mask) # a border of two greys
    def value(name, mask, seed=1):
        torch.manual_seed(seed)
        return output_loss(outputs, mask, name)
    cut = (soft > .5).float()
    contrast = {name: value(name, soft) - sum(structure_loss(one, soft) for one in outputs) for name in ('ctnet', 'ctnet-published')}
    torch.testing.assert_close(contrast['ctnet'], value('ctnet', cut) - sum(structure_loss(one, cut) for one in outputs))
    assert not torch.isclose(contrast['ctnet'], contrast['ctnet-published'], atol=1e-3)
    torch.testing.assert_close(value('ctnet-weighted', mask) - value('ctnet', mask), structure_loss(outputs[0], mask, weighted=True) - structure_loss(outputs[0], mask))


def test_sanet_enlarges_its_logits_with_corners_aligned():
    torch.manual_seed(0)
    net, x = create_student('sanet', pretrained=False).eval(), torch.randn(1, 3, 64, 96)
    with torch.no_grad(): torch.testing.assert_close(net(x), F.interpolate(net.published_outputs(x)[0], (64, 96), mode='bilinear', align_corners=True))


def test_published_figures_stand_beside_the_published_network_alone():
    assert published('meganet', False)['Kvasir']['mDice'] == .913 and published('meganet', False, dict(backbone='res2net50d', pretrained='x.pth'))
    for name, options in (('meganet', dict(backbone='resnet34')), ('sam_mamba', dict(variant='tiny')), ('unet', dict(width=16)), ('emcadnet', dict(backbone='pvt_v2_b0'))):
        assert published(name, False, options) == {}, name
    assert not any(published(name, True) for name in ('sanet', 'ctnet', 'cfanet', 'sam_mamba'))


@pytest.mark.parametrize('name', ('[/x]', '[bold]b', 'p|q & 5 %'))
def test_a_name_is_no_markup(name, methods, polyp_difom):
    result = polyp_difom('evaluate', '--predictions', f'{name}={methods/"maps"/"plain"}', '--masks', methods/'data', '--table', methods/'table')
    assert result.returncode == 0 and name in result.out
    row = (methods/'table'/'methods.md').read_text().splitlines()[-1]
    assert row.startswith(f'| {name.replace("|", chr(92) + "|")} |')


def test_what_would_do_nothing_is_refused(data, tmp_path, fails):
    for student, option, told in (('sanet', ['--mutation'], 'SANet has one output'), ('ctnet,backbone=mit_b0,width=4', ['--mutation'], 'looks at all outputs'),
                                  ('unet,width=2', ['--colour-exchange', 1, '--batch-size', 1], 'give a larger batch_size')):
        assert told in fails('train', data, '--student', student, '--no-pretrained', '--size', 64, *option, '--out', tmp_path/'run', '--device', 'cpu')
        assert not (tmp_path/'run').exists()


def test_settings_that_name_another_network_are_not_believed(run, tmp_path, data, fails):
    other = tmp_path/'run'
    shutil.copytree(run, other)
    config = json.loads((other/'config.json').read_text())
    config['settings'] |= dict(student='sanet', options={})
    (other/'config.json').write_text(json.dumps(config))
    assert 'names sanet' in (line := fails('evaluate', other, data)) and 'the weights are of unet' in line


def test_weights_of_another_kind_are_no_published_ones():
    weights = {published_key(key, published_networks['sanet'].renames): value for key, value in create_student('sanet', pretrained=False).state_dict().items()}
    load_published('sanet', weights)
    key, norm = next(key for key in weights if key.endswith('weight')), next(key for key in weights if key.endswith('running_var'))
    for wrong, told in (({key: weights[key].to(torch.int32)}, 'another kind'), ({key: weights[key].to(torch.complex64)}, 'another kind'), ({norm: -weights[norm]}, 'negative variance'), ({f'module.{key}': weights[key]}, 'twice')):
        with pytest.raises(InputError, match=told): load_published('sanet', weights | wrong)


def test_a_terminal_that_knows_ascii_alone_gets_the_table():
    result = subprocess.run([str(Path(sys.executable).parent/'polyp-difom'), 'students'], capture_output=True, text=True, env=os.environ | dict(PYTHONIOENCODING='ascii', COLUMNS='80'))
    assert result.returncode == 0 and 'sanet' in result.stdout and not result.stderr
