"Targets: options, faults, and what must hold whichever is chosen."
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import Learner
from polyp_difom.core import DamagedError, InputError, file_hash
from polyp_difom.data.images import list_pairs, train_folder
from polyp_difom.data.loaders import PolypDataset, polyp_dataloaders, split_pairs
from polyp_difom.features.extract import extract
from polyp_difom.features.store import FeatureStore
from polyp_difom.published import square_window_low
from polyp_difom.targets.frequency import splits
from polyp_difom.training.losses import output_loss
from polyp_difom.model.model import PolypDiFoM
from polyp_difom.published import PublishedUNetPlusPlus
from polyp_difom.students.registry import create_student
from polyp_difom.published import RawMaps, TrainableFusion
from polyp_difom.targets.latent import TargetBuilder, TargetConfig, TargetStore, build_targets, fit_targets
from polyp_difom.targets.projection import phi_s, projections, resize, standardisations
from polyp_difom.published import PublishedDistillation
from polyp_difom.training.callbacks import Distillation, PhaseSchedule, adam, dice_score
from polyp_difom.training.runs import train
from safetensors.torch import save_file

GRID = dict(grid=(4, 4), channels=16)
SHORT = dict(size=64, width=4, epochs=(0, 1, 0), batch_size=4, valid=0.25, device='cpu')


def images_of(data): return [pair.image for pair in list_pairs(train_folder(data))]


def covariance_of(store, images):
    maps = torch.stack([torch.from_numpy(store.read('filterbank', image)).double().flatten(1) for image in images], 1).flatten(1)
    return maps.cov(correction=0)


@pytest.fixture(scope='session')
def two_teachers(data, tmp_path_factory):
    "Features of the filter bank and of an untrained network; not to be changed."
    folder = tmp_path_factory.mktemp('two')
    torch.manual_seed(0)
    save_file(timm.create_model('mobilenetv2_050', pretrained=False).state_dict(), folder/'weights.safetensors')
    extract(data, ['filterbank', f'timm/mobilenetv2_050={folder}/weights.safetensors,size=96'], folder/'store', device='cpu')
    return FeatureStore(folder/'store')


@pytest.mark.parametrize('changed', [dict(split='dct'), dict(cutoff=0.5), dict(standardise='phi-s'), dict(projection='random'), dict(projection='random', projection_seed=1),
                                     dict(channels=8), dict(grid=(5, 5))], ids=str)
def test_every_option_has_its_own_targets(changed, data, features):
    store, images = FeatureStore(features), images_of(data)
    options = {name: value for name, value in changed.items() if name not in GRID}
    asked = GRID | {name: changed.get(name, value) for name, value in GRID.items()} | dict(config=TargetConfig(**options))
    default, other = build_targets(store, images, **GRID), build_targets(store, images, **asked)
    assert other.path != default.path and build_targets(store, images, **asked).path == other.path
    assert other[3].shape != default[3].shape or (other[3] != default[3]).any()
    for name, value in options.items(): assert TargetStore(other.path, images).settings[name] == value


@pytest.mark.parametrize('option, told', [(dict(split='haar'), 'unknown split haar'), (dict(standardise='phi'), 'nearest: phi-s'), (dict(projection='pcb'), 'nearest: pca'),
                                          (dict(projection='none'), 'the teachers give 63 channels, the latents have 16')])
def test_an_option_that_does_not_fit_is_named_and_leaves_nothing(option, told, data, features):
    store = FeatureStore(features)
    build_targets(store, images_of(data), **GRID)
    before = sorted((store.path/'targets').iterdir())
    with pytest.raises(InputError, match=told): build_targets(store, images_of(data), **GRID, config=TargetConfig(**option))
    assert sorted((store.path/'targets').iterdir()) == before


def test_fit_sees_the_training_images_only(data, features, tmp_path):
    few = shutil.copytree(data, tmp_path/'few')
    for pair in list_pairs(train_folder(few))[8:]:
        pair.image.unlink(); pair.mask.unlink()
    extract(few, ['filterbank'], tmp_path/'store', device='cpu')
    ours, alone = fit_targets(FeatureStore(features), images_of(data)[:8], **GRID), fit_targets(FeatureStore(tmp_path/'store'), images_of(few), **GRID)
    assert torch.equal(ours.weights[0], alone.weights[0]) and torch.equal(ours.bias, alone.bias)
    everything = fit_targets(FeatureStore(features), images_of(data), **GRID)
    assert not torch.allclose(everything.bias, ours.bias)


@pytest.mark.parametrize('option, told', [(dict(cutoff=float('nan')), 'cutoff: nan'), (dict(cutoff=float('inf')), 'cutoff: inf'), (dict(cutoff=-0.1), 'cutoff: -0.1'),
                                          (dict(cutoff=5), 'cutoff: 5 is not between 0 and 1.42'), (dict(cutoff='low'), 'cutoff: low'), (dict(cutoff=True), 'cutoff: True'),
                                          (dict(projection_seed=-1), 'projection_seed: -1'), (dict(projection_seed=.5), 'projection_seed: 0.5'), (dict(projection_seed=10**30), 'projection_seed: 1000'),
                                          (dict(split=None), 'unknown split None'), (dict(split=['hard']), 'unknown split')], ids=str)
def test_an_option_that_makes_no_sense_is_refused(option, told):
    with pytest.raises(InputError, match=told): TargetConfig(**option)


def drawn_store(path, size, images):
    "A store of one teacher whose maps differ from column to column, as those of frames with dark borders do."
    store, columns = FeatureStore(path, create=True), 1 + 3*torch.arange(size)[None, None] % 7
    store.add_images([bytes([i])*16 for i in range(1, images + 1)])
    store.add_teacher(dict(teacher='drawn'), (4, size, size))
    torch.manual_seed(size)
    for i in range(images): store.array('drawn')[i] = (columns*torch.randn(4, size, size)).half().numpy()
    return store, list(store.rows)


@pytest.mark.parametrize('size', [64, 256])
@pytest.mark.parametrize('standardise', ['channel', 'phi-s'])
def test_targets_have_unit_variance_where_columns_differ(size, standardise, tmp_path):
    "A projection that is fitted to some columns only is off by what the others are louder or quieter."
    store, images = drawn_store(tmp_path/'store', size, 12)
    builder = fit_targets(store, images, (size, size), 4, TargetConfig(standardise=standardise))
    target = torch.stack([builder([torch.from_numpy(store.read('drawn', image))]).sum(0) for image in images])
    assert target.var().item() == pytest.approx(1, abs=.08)
    assert target.mean().item() == pytest.approx(0, abs=.05)


def test_images_are_hashed_once(data, features, monkeypatch):
    seen = []
    for module in ('features.store', 'targets.latent'): monkeypatch.setattr(f'polyp_difom.{module}.file_hash', lambda image: seen.append(image) or file_hash(image))
    build_targets(FeatureStore(features), images_of(data), **GRID, config=TargetConfig(cutoff=.2))
    assert sorted(seen) == sorted(images_of(data))


def test_the_fit_is_the_same_again_and_in_any_order(data, features):
    first, again, turned = (fit_targets(FeatureStore(features), images, **GRID) for images in (images_of(data), images_of(data), images_of(data)[::-1]))
    assert torch.equal(first.weights[0], again.weights[0])
    torch.testing.assert_close(first.weights[0], turned.weights[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('file', ['zarr.json', 'targets/zarr.json', 'targets/c/3/0/0/0/0', 'index/c/0/0', 'teacher_gram/c/0/0/0'])
@pytest.mark.parametrize('spoil', [lambda content: content[:len(content)//2], lambda content: bytes([content[0] ^ 8]) + content[1:], lambda content: None], ids=['half', 'bit', 'gone'])
def test_damaged_targets_are_named_and_made_again(file, spoil, data, features, tmp_path):
    store, images = FeatureStore(shutil.copytree(features, tmp_path/'store', ignore=shutil.ignore_patterns('targets'))), images_of(data)
    targets = build_targets(store, images, **GRID)
    before = [targets[i] for i in range(len(targets))]
    content = spoil((targets.path/file).read_bytes())
    if content is None: (targets.path/file).unlink()
    else: (targets.path/file).write_bytes(content)
    with pytest.raises(DamagedError, match=images[3].name if 'targets/c' in file else str(targets.path)):
        found = TargetStore(targets.path, images)
        for i in range(len(found)): assert (found[i] == before[i]).all()
    again = build_targets(store, images, **GRID)
    assert again.path == targets.path and all((again[i] == before[i]).all() for i in range(len(again)))
    assert len(list((store.path/'targets').iterdir())) == 1


def test_the_split_loads_no_network_library():
    "The mathematics of targets can be had without foundation models and figures."
    program = 'import sys, polyp_difom.targets.frequency; print(*(name for name in ("timm", "transformers", "fastai", "matplotlib") if name in sys.modules))'
    assert subprocess.run([sys.executable, '-c', program], text=True, capture_output=True, check=True).stdout.strip() == ''


@pytest.mark.parametrize('channels', [63, 32, 7])
def test_phi_s_gives_every_channel_the_same_variance(channels, data, features):
    covariance = covariance_of(FeatureStore(features), images_of(data))[:channels, :channels]
    even = phi_s(covariance) @ covariance @ phi_s(covariance).T
    torch.testing.assert_close(even.diagonal(), torch.ones(channels, dtype=torch.double), atol=1e-9, rtol=0)
    rotation = phi_s(covariance)*covariance.diagonal().mean().sqrt()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(channels, dtype=torch.double), atol=1e-9, rtol=0)


@pytest.mark.real
def test_phi_s_on_real_images(real_data, tmp_path):
    images = images_of(real_data)[::60]
    (tmp_path/'data/images').mkdir(parents=True)
    for image in images: (tmp_path/'data/images'/image.name).symlink_to(image.resolve())
    extract(tmp_path/'data', ['filterbank'], tmp_path/'store', device='cpu')
    covariance = covariance_of(FeatureStore(tmp_path/'store'), images)
    even = phi_s(covariance) @ covariance @ phi_s(covariance).T
    torch.testing.assert_close(even.diagonal(), torch.ones(63, dtype=torch.double), atol=1e-9, rtol=0)


@pytest.mark.parametrize('standardise', standardisations)
@pytest.mark.parametrize('projection', projections)
def test_projection_is_orthonormal_and_shares_sum_to_one(standardise, projection, data, two_teachers):
    sizes = [two_teachers.array(teacher).shape[1] for teacher in two_teachers.teachers]
    channels = sum(sizes) if projection == 'none' else 16
    builder = fit_targets(two_teachers, images_of(data), (4, 4), channels, TargetConfig(standardise=standardise, projection=projection))
    torch.testing.assert_close(builder.gram.sum(0), torch.eye(channels), atol=1e-4, rtol=0)
    for shares in builder.fitted['shares'].values(): assert sum(shares) == pytest.approx(1)
    if standardise != 'none': assert builder.fitted['shares']['standardised'] == pytest.approx([size/sum(sizes) for size in sizes], abs=0.02)


@pytest.mark.parametrize('split', splits)
def test_a_flip_of_the_maps_is_a_flip_of_the_target_but_for_the_square_window(split):
    torch.manual_seed(0)
    builder = TargetBuilder([torch.randn(4, 6)], torch.randn(4), (18, 18), (7, 7), split=split)
    maps = torch.randn(6, 18, 18)
    differences = [(builder([maps.flip(axis)]) - builder([maps]).flip(axis)).abs().max() for axis in (-1, -2)]
    assert min(differences) > 1e-2 if split == 'square' else max(differences) < 1e-4


def test_every_teacher_is_watched(data, two_teachers, tmp_path):
    run = train(data, tmp_path/'run', features=two_teachers.path, standardise='phi-s', split='dct', **SHORT)
    row, = csv.DictReader((run/'log.csv').open())
    assert list(row)[-4:] == [f'r2_{latent}_{teacher}' for latent in ('l1', 'l2') for teacher in two_teachers.teachers]
    assert json.loads((run/'config.json').read_text())['settings']['targets'] == vars(TargetConfig(standardise='phi-s', split='dct')) | dict(teacher=[])


@torch.no_grad()
def test_the_trainable_fusion_makes_the_published_targets():
    torch.manual_seed(0)
    fusion, raw = TrainableFusion(6, 4), torch.randn(2, 6, 18, 18)
    fused = F.relu(F.conv2d(resize(raw, (64, 64)), fusion.weight, fusion.bias)) # the authors' order
    low = square_window_low(fused).real
    torch.testing.assert_close(fusion(raw), torch.stack([low, fused - low], 1))

    net, maps, deepest = PublishedUNetPlusPlus((4, 2)).eval(), torch.randn(2, 6, 64, 64), torch.randn(2, 512, 8, 8)
    fusion = TrainableFusion(6)
    fusion.load_state_dict(net.teachers.state_dict())
    l1 = F.relu(net.low(deepest))
    expected = [F.mse_loss(latent, resize(target, (8, 8))) for latent, target in zip((l1, net.high(l1)), fusion(maps).unbind(1))]
    torch.testing.assert_close(net.distillation_losses(deepest, maps.split((4, 2), 1)), expected)


def test_raw_maps_are_all_teachers_on_the_finest_grid(data, two_teachers):
    images = images_of(data)
    raw, maps = RawMaps(two_teachers, images), [torch.from_numpy(two_teachers.read(teacher, images[3])).float() for teacher in two_teachers.teachers]
    assert len(raw) == len(images) and raw.grid == max(tuple(m.shape[-2:]) for m in maps)
    torch.testing.assert_close(raw[3], torch.cat([resize(m, raw.grid) for m in maps]))
    with pytest.raises(InputError): RawMaps(two_teachers, [Path(__file__)])


class Seen(Callback):
    "Keeps, for each phase, the weights of the fusion after the epoch and the target of its last batch."
    order = 90
    def before_fit(self): self.weights, self.target = {}, {}
    def after_train(self):
        self.weights[self.phase] = [p.detach().clone() for p in self.model.teacher_fusion.parameters()]
        self.target[self.phase] = self.learn.distillation.target[0]


@pytest.mark.parametrize('published', [True, False])
def test_only_the_published_distillation_trains_the_fusion_and_only_from_phase_two(published, data, features):
    train_pairs, valid_pairs = split_pairs(list_pairs(train_folder(data)), 0.25)
    images = [pair.image for pair in train_pairs]
    torch.manual_seed(0)
    store, model = FeatureStore(features), PolypDiFoM(create_student('unet', width=4))
    raw = RawMaps(store, images)
    model.teacher_fusion = TrainableFusion(len(raw[0]), model.latents.channels)
    before = [p.detach().clone() for p in model.teacher_fusion.parameters()]
    targets = raw if published else build_targets(store, images, model.latent_grid(64), model.latents.channels)
    dls = polyp_dataloaders(PolypDataset(train_pairs, 64, targets), PolypDataset(valid_pairs, 64), 4, (1.,), torch.device('cpu'))
    distillation = PublishedDistillation() if published else Distillation()
    learn = Learner(dls, model, output_loss, opt_func=adam, metrics=dice_score, cbs=[PhaseSchedule((1, 1, 0)), distillation, Seen()])
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    moved = {phase: [not torch.equal(a, b) for a, b in zip(before, now)] for phase, now in learn.seen.weights.items()}
    assert moved == {1: [False, False], 2: [published, published]}
    assert learn.seen.target[2].requires_grad == published
