"Extraction on a Ray cluster of two workers: the store is the one that the local engine makes, on disk and in an object store."
import os

import numpy as np
import pytest
from polyp_difom.features.cluster import extract_on_cluster
from polyp_difom.core import InputError
from polyp_difom.data.images import list_images
from polyp_difom.features.extract import extract
from polyp_difom.features.store import FeatureStore
from polyp_difom.data.synthetic import make_synthetic
from polyp_difom.training.adapt import adapt

TEACHER = 'filterbank,size=64,levels=2'


@pytest.fixture(scope='module')
def s3():
    "An S3 server on this machine, with a bucket; workers that Ray starts later know of it by their environment."
    import fsspec
    from moto.server import ThreadedMotoServer
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    own = dict(AWS_ENDPOINT_URL=f'http://{host}:{port}', AWS_ACCESS_KEY_ID='none', AWS_SECRET_ACCESS_KEY='none', AWS_DEFAULT_REGION='us-east-1')
    before = dict(os.environ)
    os.environ.update(own)
    fsspec.get_filesystem_class('s3').clear_instance_cache() # a connection that another test opened does not know of them
    fsspec.filesystem('s3').mkdir('frames'); fsspec.filesystem('s3').mkdir('features')
    yield fsspec.filesystem('s3')
    fsspec.get_filesystem_class('s3').clear_instance_cache()
    os.environ.clear(); os.environ.update(before)
    server.stop()


@pytest.fixture(scope='module')
def cluster(s3):
    import ray
    ray.init(num_cpus=2, log_to_driver=False, logging_level='error', include_dashboard=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope='module')
def frames(tmp_path_factory): return list_images(make_synthetic(tmp_path_factory.mktemp('frames')/'data', n_train=21, n_test=1, size=(48, 64)))


@pytest.fixture(scope='module')
def alone(frames, tmp_path_factory):
    extract(frames[0].parents[2], [TEACHER], tmp_path_factory.mktemp('alone')/'store', batch_size=2, device='cpu', flips=True)
    return FeatureStore(tmp_path_factory.getbasetemp()/'alone0/store')


def assert_same(store, alone, frames):
    assert sorted(store.rows) == sorted(alone.rows)
    for view in ('', 'flip-x', 'flip-y'):
        for image in frames: assert np.array_equal(store.read('filterbank', image, view), alone.read('filterbank', image, view))


def test_two_workers_make_the_same_store(cluster, frames, alone, tmp_path):
    report, = extract_on_cluster(frames[0].parents[2], [TEACHER], tmp_path/'store', batch_size=2, workers=2, flips=True)
    assert report['images'] == 63 and 0 < report['outside_teacher'] < 1
    assert_same(FeatureStore(tmp_path/'store'), alone, frames)
    assert extract_on_cluster(frames[0].parents[2], [TEACHER], tmp_path/'store', workers=2, flips=True)[0]['images'] == 0


def test_from_and_to_an_object_store(cluster, s3, frames, alone):
    for image in frames: s3.pipe_file(f'frames/run/{image.name}', image.read_bytes())
    extract_on_cluster('s3://frames/run', [TEACHER], 's3://features/store', batch_size=2, workers=2, flips=True)
    assert_same(FeatureStore('s3://features/store'), alone, frames)


def test_local_engine_goes_on_in_the_object_store(s3, frames, alone):
    for image in frames: s3.pipe_file(f'frames/local/{image.name}', image.read_bytes())
    extract('s3://frames/local', [TEACHER], 's3://features/mixed', batch_size=2, device='cpu')
    assert extract('s3://frames/local', [TEACHER], 's3://features/mixed', batch_size=2, device='cpu', flips=True)[0]['images'] == 42
    assert_same(FeatureStore('s3://features/mixed'), alone, frames)


def test_targets_of_a_store_at_an_address(s3, frames, alone, tmp_path, monkeypatch):
    from polyp_difom.targets.latent import build_targets
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    for image in frames: s3.pipe_file(f'frames/targets/{image.name}', image.read_bytes())
    extract('s3://frames/targets', [TEACHER], 's3://features/targets', batch_size=2, device='cpu')
    far, near = (build_targets(store, frames, (4, 4), 16) for store in (FeatureStore('s3://features/targets'), alone))
    assert far.path.is_relative_to(tmp_path/'cache') and np.array_equal(far[3], near[3])


def test_a_broken_picture_costs_itself_alone(cluster, frames, tmp_path):
    data = tmp_path/'frames'
    data.mkdir()
    for image in frames: (data/image.name).write_bytes(image.read_bytes())
    broken = data/frames[9].name
    broken.write_bytes(broken.read_bytes()[:-500])
    with pytest.raises(InputError, match=f'1 of 21 pictures have no features: .*{broken.name}'): extract_on_cluster(data, [TEACHER], tmp_path/'store', batch_size=2, workers=2)
    broken.write_bytes(frames[9].read_bytes())
    assert extract(data, [TEACHER], tmp_path/'store', device='cpu')[0]['images'] == 1


def test_another_teacher_of_that_name_is_refused(cluster, frames, alone):
    with pytest.raises(InputError, match='size 64 instead of 32'): extract_on_cluster(frames[0].parents[2], [TEACHER.replace('64', '32')], alone.path, workers=2)


@pytest.mark.parametrize('wrong', ['--engine spark', '--views turns', '--workers 2', '--engine ray --device cpu'])
def test_options_that_do_not_go_together(wrong, polyp_difom, data, tmp_path):
    assert polyp_difom('extract', data, '--teacher', 'filterbank', '--out', tmp_path/'store', *wrong.split()).returncode == 2
    assert not (tmp_path/'store').exists()


def test_no_pictures_no_store(fails, cluster, tmp_path):
    assert 'no such folder' in fails('extract', tmp_path/'nowhere', '--teacher', 'filterbank', '--engine', 'ray', '--out', tmp_path/'store')
    assert not (tmp_path/'store').exists()


def test_an_adapted_teacher_on_the_cluster_is_the_same(cluster, polyp_difom, data, tmp_path):
    teacher = adapt(data, tmp_path/'teacher', backbone='timm/test_efficientnet,pretrained=False,width=8', size=64, epochs=1, steps=2, batch_size=4, device='cpu')
    assert polyp_difom('extract', data, '--teacher', f'adapted={teacher}', '--out', tmp_path/'ray', '--engine', 'ray').returncode == 0
    extract(data, [f'adapted={teacher}'], tmp_path/'alone', device='cpu')
    for image in list_images(data)[:4]: assert np.array_equal(FeatureStore(tmp_path/'ray').read('adapted', image), FeatureStore(tmp_path/'alone').read('adapted', image))
