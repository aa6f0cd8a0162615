"The feature store under kills, full disks and company; stores that do not fit are refused with the difference named."
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys

import numpy as np
import pytest
from polyp_difom.core import InputError
from polyp_difom.data.images import list_images
from polyp_difom.core import file_hash
from polyp_difom.features.extract import extract
from polyp_difom.features.store import FeatureStore, view_key
from polyp_difom.data.synthetic import make_synthetic
from polyp_difom.training.runs import train

COARSE, FINE = 'filterbank,size=32,levels=1,name=coarse', 'filterbank,size=64,levels=1,name=fine'
TOUCHES = ('open', 'os.rename', 'os.mkdir', 'os.remove', 'os.rmdir', 'os.truncate')


@pytest.fixture(scope='module')
def servers():
    "Processes that have imported the library and done nothing else yet."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['polyp_difom.features.extract'])
    return context


@pytest.fixture(scope='module')
def frames(tmp_path_factory):
    "Six pictures, and a folder with two of them."
    folder = tmp_path_factory.mktemp('frames')
    images = list_images(make_synthetic(folder/'data', n_train=6, n_test=1, size=(48, 64)))
    for name, some in (('two', images[:2]), ('six', images)):
        (folder/name).mkdir()
        for image in some: shutil.copy(image, folder/name)
    return folder


def extract_quietly(data, teachers, out, batch_size=2, die_at=None):
    "In a process of its own: extract, but die by kill -9 at the n-th touch of the store."
    touches = 0
    def watch(event, given):
        nonlocal touches
        if event not in TOUCHES or not str(given[0]).startswith(str(out)): return
        touches += 1
        if touches == die_at: os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    extract(data, teachers, out, batch_size, device='cpu')


def limited(size, *given):
    "Extract where no file can grow beyond `size` bytes."
    sys.stderr = open(os.devnull, 'w') # where it is kept in a file, the limit is on that, too
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try: extract_quietly(*given)
    except InputError as error: sys.exit(3 if 'no space left' in str(error) else 4)


def assert_same(store, other, images):
    "Both have the same maps of all images, and each image has one row."
    store, other = FeatureStore(store), FeatureStore(other)
    assert store.teachers == other.teachers
    assert sorted(store.rows) == sorted(file_hash(image) for image in images)
    for teacher in store.teachers:
        assert store.array(teacher).shape[0] >= len(images)
        for image in images: assert np.array_equal(store.read(teacher, image), other.read(teacher, image))


def run(servers, *given, target=extract_quietly, **more):
    process = servers.Process(target=target, args=given, kwargs=more)
    process.start(); process.join(120)
    return process.exitcode


def test_kill_at_any_moment(servers, frames, tmp_path):
    "A store that grows by images and by a teacher is killed at every seventh of its touches of the disk: the next run mends it and does what is missing."
    extract(frames/'two', [COARSE], tmp_path/'before', device='cpu')
    extract(frames/'six', [COARSE, FINE], tmp_path/'whole', batch_size=2, device='cpu')
    moment = 1
    while True:
        store = shutil.copytree(tmp_path/'before', tmp_path/'store')
        ended = run(servers, frames/'six', [COARSE, FINE], store, die_at=moment)
        if ended == 0: break # before that touch
        assert ended == -signal.SIGKILL
        kept = len(list((store/'features').glob('*/c/*/0/0/0'))) + len(list((store/'features').glob('*/*.0.0.0')))
        again = extract(frames/'six', [COARSE, FINE], store, batch_size=2, device='cpu')
        assert sum(report['images'] for report in again) == 12 - kept, moment
        assert_same(store, tmp_path/'whole', list_images(frames/'six'))
        shutil.rmtree(store)
        moment += 7
    assert moment > 60


def test_kill_while_the_store_is_made(servers, frames, tmp_path):
    extract(frames/'two', [COARSE], tmp_path/'whole', device='cpu')
    for moment in range(1, 40, 3):
        assert run(servers, frames/'two', [COARSE], tmp_path/'store', die_at=moment) == -signal.SIGKILL
        extract(frames/'two', [COARSE], tmp_path/'store', device='cpu')
        assert_same(tmp_path/'store', tmp_path/'whole', list_images(frames/'two'))
        shutil.rmtree(tmp_path/'store')


@pytest.mark.parametrize('size', [0, 100, 400, 800])
def test_full_disk(size, servers, frames, tmp_path):
    "Whatever cannot be written (metadata, index, maps): one line, and the next run completes the store."
    extract(frames/'two', [COARSE], tmp_path/'store', device='cpu')
    assert run(servers, size, frames/'six', [COARSE, FINE], tmp_path/'store', target=limited) == 3
    extract(frames/'six', [COARSE, FINE], tmp_path/'store', device='cpu')
    extract(frames/'six', [COARSE, FINE], tmp_path/'whole', device='cpu')
    assert_same(tmp_path/'store', tmp_path/'whole', list_images(frames/'six'))


def test_two_at_once(servers, frames, tmp_path):
    "Two extractions that make a store together, of images and teachers that overlap."
    extract(frames/'six', [COARSE, FINE], tmp_path/'whole', batch_size=1, device='cpu')
    for _ in range(3):
        pair = [servers.Process(target=extract_quietly, args=(frames/data, teachers, tmp_path/'store', 1))
                for data, teachers in (('six', [COARSE, FINE]), ('two', [FINE, COARSE]))]
        for process in pair: process.start()
        for process in pair: process.join(120)
        assert [process.exitcode for process in pair] == [0, 0]
        assert_same(tmp_path/'store', tmp_path/'whole', list_images(frames/'six'))
        shutil.rmtree(tmp_path/'store')


def test_a_store_at_an_address_is_locked_and_complete(frames):
    import fsspec
    extract(frames/'two', [COARSE], 'memory://locked', device='cpu')
    fsspec.filesystem('memory').pipe_file('/locked/.lock', b'')
    with pytest.raises(InputError, match='remove memory://locked/.lock'): extract(frames/'six', [COARSE], 'memory://locked', device='cpu')
    fsspec.filesystem('memory').rm('/locked/.lock')
    assert extract(frames/'six', [COARSE], 'memory://locked', device='cpu')[0]['images'] == 4
    assert len(FeatureStore('memory://locked')) == 6


def test_views_are_of_the_flipped_picture(frames, tmp_path):
    from PIL import Image, ImageOps
    (tmp_path/'flipped').mkdir()
    for image in list_images(frames/'two'): ImageOps.mirror(Image.open(image)).save(tmp_path/'flipped'/f'{image.stem}.png')
    extract(frames/'two', [COARSE], tmp_path/'views', device='cpu', flips=True)
    extract(tmp_path/'flipped', [COARSE], tmp_path/'store', device='cpu')
    views, store = FeatureStore(tmp_path/'views'), FeatureStore(tmp_path/'store')
    for image, mirror in zip(list_images(frames/'two'), list_images(tmp_path/'flipped')):
        np.testing.assert_allclose(views.read('coarse', image, 'flip-x'), store.read('coarse', mirror), atol=2e-3)
        assert view_key(file_hash(image), 'flip-x') in views.rows and view_key(file_hash(image), 'flip-y') in views.rows
    with pytest.raises(InputError, match='no features of coarse'): store.read('coarse', list_images(tmp_path/'flipped')[0], 'flip-y')


def test_training_asks_for_teachers(fails, data, tmp_path):
    "Of two teachers in a store one is asked for; what is not there, or was made otherwise, is named."
    store, short = tmp_path/'store', dict(size=64, width=4, epochs=(0, 1, 0), batch_size=8, device='cpu', features=tmp_path/'store')
    extract(data, [COARSE, FINE], store, device='cpu')
    train(data, tmp_path/'run', **short, target_options=dict(teachers=['coarse']))
    assert list(json.loads((tmp_path/'run/config.json').read_text())['settings']['teachers']) == ['coarse']
    line = ['train', data, '--size', '64', '--width', '4', '--epochs', '0', '1', '0', '--batch-size', '8', '--device', 'cpu', '--features', store]
    assert 'no features of sam; it holds coarse, fine' in fails(*line, '--teacher', 'sam', '--out', tmp_path/'other')
    assert 'size 32 instead of 48' in fails(*line, '--teacher', 'filterbank,size=48,levels=1,name=coarse', '--out', tmp_path/'other')
    assert 'teachers coarse' in fails(*line, '--teacher', 'fine', '--resume', '--out', tmp_path/'run')
    shutil.rmtree(store)
    extract(data, [COARSE.replace('levels=1', 'levels=2')], store, device='cpu')
    assert 'teachers coarse levels 1 then, 2 now' in fails(*line, '--teacher', 'coarse', '--resume', '--out', tmp_path/'run')
    assert not (tmp_path/'other').exists()
