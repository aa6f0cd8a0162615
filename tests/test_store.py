"The feature store under kills, full disks and company; stores that do not fit are refused with the difference named."
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from polyp_difom.core import DamagedError, InputError, file_hash
from polyp_difom.data.images import list_images
from polyp_difom.data.synthetic import make_synthetic
from polyp_difom.features import extract as extract_module
from polyp_difom.features.extract import extract, extract_teacher
from polyp_difom.features.store import FeatureStore, view_key
from polyp_difom.targets.latent import TargetConfig, build_targets
from polyp_difom.teachers.base import Teacher, teacher_registry
from polyp_difom.training.runs import train

COARSE, FINE = 'filterbank,size=32,levels=1,name=coarse', 'filterbank,size=64,levels=1,name=fine'
TOUCHES = ('open', 'os.rename', 'os.mkdir', 'os.remove', 'os.rmdir', 'os.truncate')


@pytest.fixture(scope='module')
def servers():
    "Processes that have imported the library and done nothing else yet."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['polyp_difom.features.extract', 'polyp_difom.training.runs'])
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


def flip(content, bit): return content[:bit//8] + bytes([content[bit//8] ^ 1 << bit % 8]) + content[bit//8 + 1:]


def chunk(store, row):
    "The file of one map of COARSE."
    return next(path for name in (f'c/{row}/0/0/0', f'{row}.0.0.0') if (path := Path(store)/'features/coarse'/name).exists())


@pytest.fixture
def store(frames, tmp_path):
    "A store of six images, and what it holds."
    extract(frames/'six', [COARSE], tmp_path/'store', device='cpu')
    return tmp_path/'store'


def maps_of(store, images): return [FeatureStore(store).read('coarse', image) for image in images]


def test_no_flipped_bit_passes(store, frames):
    image = list_images(frames/'six')[2]
    before, file = maps_of(store, [image])[0], chunk(store, FeatureStore(store).rows[file_hash(image)])
    content, refused, number = file.read_bytes(), 0, random.Random(0)
    for bit in [*range(160), *(number.randrange(8*len(content)) for _ in range(200))]:
        file.write_bytes(flip(content, bit))
        try: assert np.array_equal(maps_of(store, [image])[0], before), bit # a few bits of the header say nothing
        except DamagedError as error: refused += image.name in str(error)
    assert refused > 340


SPOILT = {'a bit': lambda content: flip(content, 4*len(content)), 'truncated': lambda content: content[:-40], 'nothing left': lambda content: b'', 'zeros': lambda content: bytes(len(content)),
          'something else': lambda content: b'something else'}


@pytest.mark.parametrize('spoil', SPOILT.values(), ids=SPOILT)
def test_a_damaged_map_is_named_and_made_again(spoil, store, frames):
    images = list_images(frames/'six')
    before, file = maps_of(store, images), chunk(store, FeatureStore(store).rows[file_hash(images[4])])
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(DamagedError, match=f'{images[4].name}.*run `polyp-difom extract` again'): maps_of(store, images)
    if file.stat().st_size:
        with pytest.raises(DamagedError, match=images[4].name): build_targets(FeatureStore(store), images, (4, 4), 8)
        assert extract(frames/'six', [COARSE], store, device='cpu', verify=False)[0]['images'] == 0
    assert extract(frames/'six', [COARSE], store, device='cpu')[0]['images'] == 1
    assert all(map(np.array_equal, maps_of(store, images), before))
    build_targets(FeatureStore(store), images, (4, 4), 8)


@pytest.mark.parametrize('content', [b'{"zarr_form', b'', b'[]', b'\xff\xfe\x00', None], ids=str)
@pytest.mark.parametrize('file, made', [('zarr.json', 0), ('features/zarr.json', 0), ('features/coarse/zarr.json', 6), ('index/zarr.json', None)])
def test_damaged_metadata_is_named_and_loses_no_map(file, made, content, store, frames):
    "What the message says to do is done; a copy of the file is what remains to be done for the index."
    images = list_images(frames/'six')
    good, before, chunks = (store/file).read_bytes(), maps_of(store, images), {path: path.read_bytes() for path in (store/'features').glob('*/c/*/0/0/0')}
    if content is None: (store/file).unlink()
    else: (store/file).write_bytes(content)
    told = {('features/zarr.json', True): 'no features of coarse', ('index/zarr.json', True): 'no feature store'}.get((file, content is None), file)
    with pytest.raises(InputError, match=told): maps_of(store, images)
    if made != 0 or content is not None:
        with pytest.raises(DamagedError, match=file.removesuffix('/zarr.json')): extract(frames/'six', [COARSE], store, device='cpu')
    assert {path: path.read_bytes() for path in chunks} == chunks
    if made is None: (store/file).write_bytes(good)
    elif made: shutil.rmtree((store/file).parent)
    elif content is not None: (store/file).unlink()
    assert extract(frames/'six', [COARSE], store, device='cpu')[0]['images'] == (made or 0)
    assert all(map(np.array_equal, maps_of(store, images), before))


@pytest.mark.parametrize('lost', ['index', 'index/c', 'index/c/0/0'])
def test_without_its_index_a_store_is_not_written_to(lost, store, frames):
    "Rows are given out by the index: without it, maps of other images would be taken for those asked for."
    chunks = {path: path.read_bytes() for path in (store/'features').glob('*/c/*/0/0/0')}
    if lost == 'index/c/0/0': (store/lost).write_bytes(flip((store/lost).read_bytes(), 100))
    else: shutil.rmtree(store/lost)
    with pytest.raises(DamagedError, match='index.*remove the store and run `polyp-difom extract` again'): extract(frames/'six', [COARSE], store, device='cpu')
    assert {path: path.read_bytes() for path in (store/'features').glob('*/c/*/0/0/0')} == chunks and len(chunks) == 6


def test_an_image_replaced_after_it_was_hashed_gets_no_map(frames, tmp_path, monkeypatch):
    data = shutil.copytree(frames/'six', tmp_path/'data')
    images, other = list_images(data), (frames/'two'/list_images(frames/'two')[0].name).read_bytes()
    hashes = [file_hash(image) for image in images]
    def hash_and_replace(given):
        found = hash_images(given)
        images[5].write_bytes(other)
        return found
    hash_images = extract_module.hash_images
    monkeypatch.setattr(extract_module, 'hash_images', hash_and_replace)
    with pytest.raises(InputError, match=f'1 of 6 pictures.*{images[5].name}: was replaced'): extract(data, [COARSE], tmp_path/'store', device='cpu')
    assert FeatureStore(tmp_path/'store').missing('coarse', hashes) == [5]
    monkeypatch.undo()
    assert extract(data, [COARSE], tmp_path/'store', device='cpu')[0]['images'] == 0 # the picture it was replaced by has one


def test_what_cannot_be_read_is_named_when_all_else_is_done(frames, tmp_path):
    "Whatever the fault, and of every teacher; the store's name, too, may hold what would be a chain of addresses."
    data = shutil.copytree(frames/'two', tmp_path/'data')
    first, second = list_images(frames/'six')[2:4]
    for name, image in (('reference::e.png', first), (f'{"x"*246}.png', second), ('\x1b[31m\n.png', first), ('a::b.png', first)): shutil.copy(image, data/name)
    (data/'dangling.png').symlink_to('nowhere')
    (data/'loop.png').symlink_to('loop.png')
    os.mkfifo(data/'fifo.png')
    (data/'text.png').write_text('no picture')
    with pytest.raises(InputError) as told: extract(data, [COARSE, FINE], tmp_path/'file::store', device='cpu')
    assert str(told.value).startswith('4 of 10 pictures have no features: ') and str(told.value).isprintable()
    assert all(f'{name}.png' in str(told.value) for name in ('dangling', 'loop', 'fifo'))
    store = FeatureStore(tmp_path/'file::store')
    for teacher in ('coarse', 'fine'):
        for image in (*list_images(frames/'two'), first, second): store.read(teacher, image)


class Overflowing(Teacher):
    "A teacher whose map of one image is beyond half precision."
    bad = None
    def features(self, x): return x[:, :, :4, :4]*(1e9 if x.mean().item() == self.bad else 1)


def test_a_map_beyond_half_precision_is_that_images_fault(frames, tmp_path):
    images = list_images(frames/'six')
    teacher = Overflowing('overflowing', 32)
    seen = []
    teacher.register_forward_pre_hook(lambda module, given: seen.append(given[0].mean().item()))
    extract_teacher(FeatureStore(tmp_path/'good', create=True), teacher, images)
    teacher.bad = seen[3] # the first is the probe
    with pytest.raises(InputError, match=f'1 of 6 pictures.*{images[2].name}: teacher overflowing gives values beyond half precision'):
        extract_teacher(FeatureStore(tmp_path/'store', create=True), teacher, images)
    assert FeatureStore(tmp_path/'store').missing('overflowing', [file_hash(image) for image in images]) == [2]


def without_rights(place):
    "As nobody, since root may write everywhere."
    if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)
    os.environ['XDG_CACHE_HOME'] = str(place/'cache')
    for out in ('store', 'new'):
        with pytest.raises(InputError, match=f'{place}/{out}: cannot be written to'): extract(place/'six', [COARSE, FINE], place/out, device='cpu')
    assert build_targets(FeatureStore(place/'store'), list_images(place/'six'), (4, 4), 8).path.is_relative_to(place/'cache')


def test_a_folder_that_cannot_be_written_to(servers, frames):
    "Features are read all the same, and targets go to the user's cache."
    place = Path(tempfile.mkdtemp())
    shutil.copytree(frames/'six', place/'six')
    extract(place/'six', [COARSE], place/'store', device='cpu')
    (place/'cache').mkdir()
    for path in (place, *place.rglob('*')): path.chmod(0o777 if path.name == 'cache' else 0o555 if path.is_dir() else 0o444)
    try: assert run(servers, place, target=without_rights) == 0
    finally:
        for path in (place, *place.rglob('*')): path.chmod(0o777)
        shutil.rmtree(place)


def test_a_store_of_before_the_checksums_is_read_with_a_warning(store, frames):
    images = list_images(frames/'six')
    FeatureStore(store).array('coarse').attrs['checksum'] = False
    with pytest.warns(UserWarning, match='without checksums'): maps_of(store, images)
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); assert extract(frames/'six', [COARSE], store, device='cpu')[0]['images'] == 0


def test_metadata_is_read_once_and_again_when_the_store_grows(store, frames, tmp_path, monkeypatch):
    opened, images = [], list_images(frames/'six')
    original = FeatureStore._open
    monkeypatch.setattr(FeatureStore, '_open', lambda self, path: opened.append(path) or original(self, path))
    features = FeatureStore(store)
    for image in images: features.read('coarse', image)
    assert opened == ['index', 'features/coarse']
    features.add_images([bytes(range(16))])
    assert features.array('coarse').shape[0] == 7 and np.array_equal(features.read('coarse', images[0]), FeatureStore(store).read('coarse', images[0]))


def test_training_asks_for_teachers(fails, polyp_difom, data, tmp_path):
    "Of two teachers in a store one is asked for; what is not there, or was made otherwise, is named."
    store, short = tmp_path/'store', dict(size=64, width=4, epochs=(0, 1, 0), batch_size=8, device='cpu', features=tmp_path/'store')
    extract(data, [COARSE, FINE], store, device='cpu')
    train(data, tmp_path/'run', **short, teacher=['coarse'])
    assert list(json.loads((tmp_path/'run/config.json').read_text())['settings']['teachers']) == ['coarse']
    line = ['train', data, '--size', '64', '--width', '4', '--epochs', '0', '1', '0', '--batch-size', '8', '--device', 'cpu', '--features', store]
    assert 'no features of sam; it holds coarse, fine' in fails(*line, '--teacher', 'sam', '--out', tmp_path/'other')
    assert 'size 32 instead of 48' in fails(*line, '--teacher', 'filterbank,size=48,levels=1,name=coarse', '--out', tmp_path/'other')
    refused = polyp_difom('train', '--resume', tmp_path/'run', '--teacher', 'fine')
    assert refused.returncode == 2 and '--teacher does not go with --resume' in refused.err
    shutil.rmtree(store)
    extract(data, [COARSE.replace('levels=1', 'levels=2')], store, device='cpu')
    assert 'teachers coarse levels 1 then, 2 now' in fails('train', '--resume', tmp_path/'run')
    assert not (tmp_path/'other').exists()


def edited(file, **changes):
    "Change fields of a JSON file; `a__b` is field b of a, None takes it away."
    content = json.loads(file.read_text())
    for path, value in changes.items():
        *way, last = path.split('__')
        at = content
        for step in way: at = at[step]
        if value is None: del at[last]
        else: at[last] = value
    file.write_text(json.dumps(content))


def grid(*shape): return dict(name='regular', configuration=dict(chunk_shape=shape))


EDITED = {'another type': dict(data_type='int16', fill_value=0), 'another teacher': dict(attributes__provenance__teacher='dinov2'), 'no provenance': dict(attributes__provenance=None),
          'provenance is text': dict(attributes__provenance='dinov2'), 'two axes': dict(shape=(6, 18), chunk_grid=grid(1, 18)), 'no axis': dict(shape=(), chunk_grid=grid()),
          'chunks of two rows': dict(chunk_grid=grid(2, 18, 4, 4)), 'no channels': dict(shape=(6, 0, 4, 4), chunk_grid=grid(1, 1, 4, 4)),
          'vast maps': dict(shape=(6, 18, 10**10, 10**10), chunk_grid=grid(1, 18, 10**10, 10**10)), 'vast rows': dict(shape=(3*10**9, 18, 4, 4))}


@pytest.mark.parametrize('changes', EDITED.values(), ids=EDITED)
def test_metadata_that_say_something_else_are_refused(changes, store, frames):
    "Bits of another type or a teacher of another name would pass for what was asked; the rest would end in a traceback."
    images, file = list_images(frames/'six'), store/'features/coarse/zarr.json'
    good, before = file.read_bytes(), maps_of(store, images)
    edited(file, **changes)
    for use in (lambda: FeatureStore(store).array('coarse'), lambda: build_targets(FeatureStore(store), images, (4, 4), 8), lambda: extract(frames/'six', [COARSE], store, device='cpu')):
        with pytest.raises(DamagedError, match='features/coarse/zarr.json: damaged; put it back from a copy, or remove its folder'): use()
    file.write_bytes(good)
    assert all(map(np.array_equal, maps_of(store, images), before))


@pytest.mark.parametrize('changes', [dict(shape=(3*10**9, 16)), dict(shape=(6, 17)), dict(shape=(6,), chunk_grid=grid(4096)), dict(data_type='float32', fill_value=0.)], ids=str)
def test_an_index_that_no_store_writes_is_refused(changes, store, frames):
    edited(store/'index/zarr.json', **changes)
    for use in (lambda: FeatureStore(store).rows, lambda: extract(frames/'six', [COARSE], store, device='cpu')):
        with pytest.raises(DamagedError, match='index/zarr.json: damaged; it knows which map'): use()


@pytest.mark.parametrize('teachers', ['coarse', [1], ['..'], {'coarse': 1}], ids=str)
def test_a_list_of_teachers_that_is_none_is_refused(teachers, store, frames):
    edited(store/'features/zarr.json', attributes__teachers=teachers)
    with pytest.raises(DamagedError, match='features/zarr.json: damaged; remove it'): maps_of(store, list_images(frames/'six'))


@pytest.mark.parametrize('where', [np.s_[3, 1, 2], np.s_[0, 0, 0], np.s_[:]], ids=str)
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_map_that_is_not_finite_is_named_and_made_again(value, where, store, frames):
    images = list_images(frames/'six')
    before, features = maps_of(store, images), FeatureStore(store)
    spoilt = before[4].copy()
    spoilt[where] = value
    features.array('coarse')[features.rows[file_hash(images[4])]] = spoilt
    with pytest.raises(InputError, match=f'coarse for .*{images[4].name}'): build_targets(FeatureStore(store), images, (4, 4), 8)
    assert extract(frames/'six', [COARSE], store, device='cpu')[0]['images'] == 1
    assert all(map(np.array_equal, maps_of(store, images), before))


def test_a_target_that_is_not_finite_is_made_again(store, frames):
    images = list_images(frames/'six')
    targets = build_targets(FeatureStore(store), images, (4, 4), 8, TargetConfig(components=8))
    before, edit = targets[2], zarr.open_group(targets.path, mode='r+')['targets']
    spoilt = edit[2]
    spoilt[200] = np.nan
    edit[2] = spoilt
    with pytest.raises(DamagedError, match=f'target of .*{images[2].name}: damaged'): targets[2]
    assert np.array_equal(build_targets(FeatureStore(store), images, (4, 4), 8, TargetConfig(components=8))[2], before)


@pytest.mark.parametrize('name', ['', 'zarr.json', 'ZARR.json', '.zarray', '.zgroup', '..', '../coarse', 'a/../b', None], ids=repr)
def test_a_name_that_is_the_stores_own_is_refused_and_nothing_written(name, store, frames):
    before = {path: path.read_bytes() for path in store.rglob('*') if path.is_file() and path.name != '.lock'}
    with pytest.raises(InputError, match='no teacher can be called'): FeatureStore(store).add_teacher(dict(teacher=name), (18, 4, 4))
    if name == 'zarr.json':
        with pytest.raises(InputError, match='zarr.json'): extract(frames/'six', ['filterbank,size=32,levels=1,name=zarr.json'], store, device='cpu')
    assert {path: path.read_bytes() for path in store.rglob('*') if path.is_file() and path.name != '.lock'} == before


def test_an_alias_with_a_folder_in_it_is_kept(store, frames):
    "The name of an array is made of the teacher's, and is held against it."
    extract(frames/'six', ['filterbank,size=32,levels=1,name=mine/coarse.v1'], store, device='cpu')
    features, images = FeatureStore(store), list_images(frames/'six')
    assert features.teachers == ['coarse', 'mine/coarse.v1'] and features.array('mine/coarse.v1').attrs['provenance']['teacher'] == 'mine/coarse.v1'
    build_targets(features, images, (4, 4), 8)


@pytest.mark.parametrize('seed', [True, False])
def test_a_seed_is_no_truth_value(seed):
    with pytest.raises(InputError, match='projection_seed: (True|False) is no whole number'): TargetConfig(projection_seed=seed)


class Odd(Teacher):
    "Its maps depend on the image: the black probe gets another shape than a frame."
    def __init__(self, name, shape): super().__init__(name, 32); self.shape = shape

    def features(self, x): return torch.ones(len(x), 4, 8, 8) if not x.any() else torch.ones(len(x), *self.shape)


@pytest.mark.parametrize('shape', [(1, 8, 8), (4, 1, 1), (4, 8, 4)])
def test_a_map_of_another_shape_is_named_and_not_stretched(data, tmp_path, shape, monkeypatch):
    monkeypatch.setitem(teacher_registry, 'odd', lambda name, checkpoint=None, **options: Odd('odd', shape))
    with pytest.raises(InputError, match=r'16 of 16 pictures have no features: .*00000.png: teacher odd gives a map of'): extract(data, ['odd'], tmp_path/'store', device='cpu')


def test_a_teacher_whose_maps_are_no_maps_is_refused_at_once(data, tmp_path, monkeypatch):
    class Flat(Odd):
        def features(self, x): return torch.ones(len(x), 4)
    monkeypatch.setitem(teacher_registry, 'flat', lambda name, checkpoint=None, **options: Flat('flat', ()))
    with pytest.raises(InputError, match='maps should be'): extract(data, ['flat'], tmp_path/'store', device='cpu')
