"Bad input gives one clear line, leaves nothing half-written, and loses nothing that was finished."
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from polyp_difom.data.images import list_pairs, train_folder
from polyp_difom.features.extract import extract
from polyp_difom.features.store import FeatureStore
from polyp_difom.data.synthetic import make_synthetic

SHORT = ['--size', '64', '--width', '4', '--epochs', '1', '1', '1', '--device', 'cpu']


@contextmanager
def full_disk(limit):
    "No file may grow beyond `limit` bytes: a disk that is full for this process."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def own_data(data, tmp_path): return shutil.copytree(data, tmp_path/'data')


def test_wrong_names(fails, data, tmp_path):
    assert 'no such folder' in fails('train', tmp_path/'nowhere', '--out', tmp_path/'run')
    assert 'nearest: unet' in fails('train', data, '--student', 'unett', '--out', tmp_path/'run')
    assert 'nearest: filterbank' in fails('extract', data, '--teacher', 'filterbnk', '--out', tmp_path/'store')
    assert 'mobilenetv2_100' in fails('extract', data, '--teacher', 'timm/mobilenetv2_10', '--out', tmp_path/'store')
    assert 'no such file' in fails('extract', data, '--teacher', f'timm/resnet18={tmp_path}/w.safetensors', '--out', tmp_path/'store')
    assert 'no run in it' in fails('evaluate', tmp_path, data)
    assert os.listdir(tmp_path) == []


def test_unreachable_weights(fails, data, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'hub'))
    line = fails('extract', data, '--teacher', 'timm/resnet18', '--out', tmp_path/'store')
    assert 'neither local nor reachable' in line and 'timm/resnet18=PATH' in line


def test_empty_data_set(fails, tmp_path):
    for kind in ('images', 'masks'): (tmp_path/'TrainDataset'/kind).mkdir(parents=True)
    assert 'no images' in fails('train', tmp_path, '--out', tmp_path/'run')
    assert 'no images in it' in fails('extract', tmp_path, '--teacher', 'filterbank', '--out', tmp_path/'store')
    assert not (tmp_path/'run').exists() and not (tmp_path/'store').exists()


def truncate(pair): pair.image.write_bytes(pair.image.read_bytes()[:-3000])
def remove_mask(pair): pair.mask.unlink()
def remove_image(pair): pair.image.unlink()
def shrink_mask(pair): Image.open(pair.mask).resize((10, 10)).save(pair.mask)
def blacken(pair): Image.fromarray(np.zeros((96, 120), np.uint8)).save(pair.mask)
def code_0_1(pair): Image.fromarray((np.array(Image.open(pair.mask)) > 0).astype(np.uint8)).save(pair.mask)


@pytest.mark.parametrize('spoil', [truncate, remove_mask, remove_image, shrink_mask, blacken, code_0_1])
def test_training_refuses_a_broken_pair_by_name(spoil, fails, own_data, tmp_path):
    pair = list_pairs(train_folder(own_data))[5]
    spoil(pair)
    assert pair.image.stem in fails('train', own_data, *SHORT, '--out', tmp_path/'run')
    assert not (tmp_path/'run').exists()
    assert '1 problem to mend' in fails('check', own_data)


def test_frames_without_polyp_can_be_allowed(polyp_difom, own_data, tmp_path):
    blacken(list_pairs(train_folder(own_data))[5])
    assert polyp_difom('train', own_data, *SHORT, '--allow-empty', '--out', tmp_path/'run').returncode == 0


def test_broken_image_is_named_after_the_rest_is_done(fails, own_data, tmp_path):
    images = [pair.image for pair in list_pairs(train_folder(own_data))]
    content = images[9].read_bytes()
    images[9].write_bytes(content[:-3000])
    assert images[9].name in fails('extract', own_data, '--teacher', 'filterbank', '--batch-size', '4', '--out', tmp_path/'store')
    images[9].write_bytes(content)
    assert extract(own_data, ['filterbank'], tmp_path/'store')[0]['images'] == 1


def test_features_of_other_images(fails, features, tmp_path):
    other = make_synthetic(tmp_path/'other', n_train=4, n_test=1, seed=5, size=(96, 120))
    line = fails('train', other, '--features', features, *SHORT, '--out', tmp_path/'run')
    assert 'another data set' in line and 'for 4 of 4 images' in line
    assert not (tmp_path/'run').exists()


def test_features_of_another_size(fails, data, features, tmp_path):
    store = shutil.copytree(features, tmp_path/'store')
    assert 'size 256 instead of 128' in fails('extract', data, '--teacher', 'filterbank,size=128', '--out', store)


def test_corrupt_checkpoint(fails, polyp_difom, data, tmp_path):
    run = tmp_path/'run'
    assert polyp_difom('train', data, *SHORT, '--out', run).returncode == 0
    assert 'holds a run already' in fails('train', data, *SHORT, '--out', run)
    refused = polyp_difom('train', '--resume', run, '--lr', '1')
    assert refused.returncode == 2 and 'keeps its settings' in ' '.join(refused.err.split())
    for name, command in (('best', ['evaluate', run, data]), ('last', ['train', '--resume', run, '--device', 'cpu'])):
        file = run/f'{name}.safetensors'
        file.write_bytes(file.read_bytes()[:4000])
        assert f'{name}.safetensors: corrupt' in fails(*command)
    assert not (run/'evaluation').exists()


def test_disk_full_during_extraction(fails, data, tmp_path):
    store = tmp_path/'store'
    with full_disk(60_000): assert 'no space left' in fails('extract', data, '--teacher', 'filterbank', '--out', store)
    assert extract(data, ['filterbank'], store)[0]['images'] == 16


def test_disk_full_during_training(fails, polyp_difom, data, tmp_path):
    run = tmp_path/'run'
    with full_disk(100_000): assert 'no space left' in fails('train', data, *SHORT, '--out', run)
    assert not list(run.glob('*.safetensors')) and not list(run.glob('.*'))
    assert polyp_difom('train', '--resume', run, '--device', 'cpu').returncode == 0


def test_disk_full_while_targets_are_built(fails, data, features, tmp_path):
    store = shutil.copytree(features, tmp_path/'store', ignore=shutil.ignore_patterns('targets'))
    with full_disk(300): assert 'no space left' in fails('train', data, '--features', store, *SHORT, '--out', tmp_path/'run')
    assert list((store/'targets').iterdir()) == []


def test_killed_extraction_goes_on(tmp_path):
    "Kill -9 in the middle: a rerun does what is missing, and the store is equal to one made at one go."
    data = make_synthetic(tmp_path/'data', n_train=60, n_test=1, size=(96, 120))
    command = [sys.executable, '-W', 'ignore', '-c', 'from polyp_difom.cli import main; main()', 'extract', str(data), '--teacher', 'filterbank', '--batch-size', '2', '--device', 'cpu', '--out']
    process = subprocess.Popen([*command, str(tmp_path/'killed')], stderr=subprocess.DEVNULL)
    chunks = tmp_path/'killed'/'features'/'filterbank'
    while len([f for f in chunks.rglob('*') if f.is_file()]) < 12:
        assert process.poll() is None, 'extraction ended before it could be killed'
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL); process.wait()
    again = extract(data, ['filterbank'], tmp_path/'killed', device='cpu')[0]['images']
    extract(data, ['filterbank'], tmp_path/'whole', device='cpu')
    assert 0 < again < 60
    killed, whole = (FeatureStore(tmp_path/name) for name in ('killed', 'whole'))
    for pair in list_pairs(train_folder(data)): assert np.array_equal(killed.read('filterbank', pair.image), whole.read('filterbank', pair.image))


def test_saved_maps(fails, data, tmp_path):
    masks = data/'TestDataset/Synthetic/masks'
    maps = shutil.copytree(masks, tmp_path/'maps')
    next(maps.iterdir()).unlink()
    assert '1 of 3 masks have no prediction' in fails('evaluate', '--predictions', maps, '--masks', masks)
    assert 'not a folder' in fails('evaluate', '--predictions', tmp_path/'none', '--masks', masks)
