"Targets: options, faults, and what must hold whichever is chosen."
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import Learner
from polyp_difom.core import DamagedError, InputError, file_hash
from polyp_difom.data.images import list_pairs, train_folder
from polyp_difom.data.loaders import PolypDataset, load_pair, polyp_dataloaders, split_pairs
from polyp_difom.features.extract import extract
from polyp_difom.features.store import FeatureStore
from polyp_difom.targets.trainable_fusion import RawMaps, TrainableFusion
from polyp_difom.targets.frequency import split_frequency, splits, square_window_low
from polyp_difom.training.losses import output_loss
from polyp_difom.model.model import PolypDiFoM
from polyp_difom.published import PublishedUNetPlusPlus
from polyp_difom.students.registry import create_student
from polyp_difom.targets.latent import TargetBuilder, TargetConfig, TargetStore, build_targets, fit_targets, paper_targets
from polyp_difom.targets.predictability import mean_map_r2
from polyp_difom.targets.soft_masks import SoftMasks, teacher_dice
from polyp_difom.targets.projection import phi_s, projections, resize, standardisations
from polyp_difom.training.callbacks import Distillation, PhaseSchedule, PublishedDistillation, adam, dice_score
from polyp_difom.training.runs import resume, train
from safetensors import safe_open
from safetensors.torch import save_file
import zarr

GRID = dict(grids=(4, 4), channels=16)
SIXTEEN = TargetConfig(components=16)
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


@pytest.mark.parametrize('changed', [dict(split='gaussian'), dict(cutoff=0.5), dict(pad='periodic'), dict(antialias=False), dict(unit_variance=False), dict(components=5), dict(components=4), dict(standardise='phi-s'), dict(projection='random'), dict(projection='random', projection_seed=1),
                                     dict(channels=8), dict(grids=(5, 5)), dict(grids=((4, 4), (8, 8)))], ids=str)
def test_every_option_has_its_own_targets(changed, data, features):
    store, images = FeatureStore(features), images_of(data)
    options = {name: value for name, value in changed.items() if name not in GRID}
    asked = GRID | {name: changed.get(name, value) for name, value in GRID.items()} | dict(config=TargetConfig(**options))
    default, other = build_targets(store, images, **GRID), build_targets(store, images, **asked)
    assert other.path != default.path and build_targets(store, images, **asked).path == other.path
    assert any(ours.shape != theirs.shape or (ours != theirs).any() for ours, theirs in zip(other[3], default[3]))
    for name, value in options.items(): assert TargetStore(other.path, images).settings[name] == value


@pytest.mark.parametrize('option, told', [(dict(split='haar'), 'unknown split haar'), (dict(standardise='phi'), 'nearest: phi-s'), (dict(pad='mirrored'), 'nearest: mirror'), (dict(projection='pcb'), 'nearest: pca'),
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
    ours, alone = fit_targets(FeatureStore(features), images_of(data)[:8], **GRID, config=SIXTEEN), fit_targets(FeatureStore(tmp_path/'store'), images_of(few), **GRID, config=SIXTEEN)
    assert torch.equal(ours.weights[0], alone.weights[0]) and torch.equal(ours.bias, alone.bias)
    everything = fit_targets(FeatureStore(features), images_of(data), **GRID, config=SIXTEEN)
    assert not torch.allclose(everything.bias, ours.bias)


@pytest.mark.parametrize('option, told', [(dict(cutoff=float('nan')), 'cutoff: nan'), (dict(cutoff=float('inf')), 'cutoff: inf'), (dict(cutoff=-0.1), 'cutoff: -0.1'),
                                          (dict(cutoff=5), 'cutoff: 5 is not between 0 and 1.42'), (dict(cutoff='low'), 'cutoff: low'), (dict(cutoff=True), 'cutoff: True'),
                                          (dict(projection_seed=-1), 'projection_seed: -1'), (dict(projection_seed=.5), 'projection_seed: 0.5'), (dict(projection_seed=10**30), 'projection_seed: 1000'),
                                          (dict(components=0), 'components: 0'), (dict(components='few'), 'components: few'), (dict(antialias='no'), 'antialias: no'),
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
    builder = fit_targets(store, images, (size, size), 4, TargetConfig(standardise=standardise, unit_variance=False, components=4))
    target = torch.stack([sum(builder([torch.from_numpy(store.read('drawn', image))])) for image in images])
    assert target.var().item() == pytest.approx(1, abs=.08)
    assert target.mean().item() == pytest.approx(0, abs=.05)


def parts_of(builder, store, images): # LFC (N, C, h, w), HFC
    return [torch.stack(part) for part in zip(*(builder([torch.from_numpy(store.read('filterbank', image))]) for image in images))]


@pytest.mark.parametrize('config', [SIXTEEN, TargetConfig(split='gaussian', components=16), TargetConfig(pad='periodic', antialias=False, components=16)], ids=['default', 'soft', 'periodic'])
def test_each_part_has_unit_variance_on_its_own_grid(config, data, features):
    store, images = FeatureStore(features), images_of(data)
    builder = fit_targets(store, images, ((3, 4), (9, 8)), 16, config)
    low, high = parts_of(builder, store, images)
    assert low.shape[1:] == (16, 3, 4) and high.shape[1:] == (16, 9, 8)
    for part in (low, high): assert part.transpose(0, 1).flatten(1).var(1, correction=0).mean().item() == pytest.approx(1, abs=1e-4)
    targets = build_targets(store, images, ((3, 4), (9, 8)), 16, config)
    for made, kept in zip((low[5], high[5]), targets[5]): torch.testing.assert_close(torch.from_numpy(kept).float(), made, atol=1e-2, rtol=1e-2)


def test_the_paper_s_form_to_the_letter(data, features):
    "Periodic FFT of the joined maps, bilinear resizing, one scale for both parts, as many components as there are."
    store, images = FeatureStore(features), images_of(data)
    builder = fit_targets(store, images, (4, 4), 63, TargetConfig(**paper_targets))
    maps = torch.from_numpy(store.read('filterbank', images[3])).float()
    radius = torch.hypot(torch.fft.fftfreq(32)[:, None], torch.fft.fftfreq(32)[None])
    low = torch.fft.ifft2(torch.fft.fft2(maps)*(radius <= 1/6 + 1e-6)).real
    expected = [torch.einsum('ck,khw->chw', builder.weights[0], F.interpolate(part[None], (4, 4), mode='bilinear')[0]) for part in (low, maps - low)]
    expected[0] += builder.bias[:, None, None]
    assert len(builder.bias) == 63 and builder.scales == (1, 1)
    for ours, theirs in zip(builder([maps]), expected): torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_what_lies_at_the_other_border_is_not_felt():
    "A map that is bright at its right border: the periodic split sees it at the left."
    x = torch.zeros(1, 16, 16)
    x[..., -1] = 1
    assert split_frequency(x)[0][..., 0].abs().max() < .1 < .2 < split_frequency(x, pad='periodic')[0][..., 0].abs().max()


def store_of(path, images, **teachers): # name -> (provenance, maps (N, C, h, w))
    "A store of maps that are given."
    store = FeatureStore(path, create=True)
    store.add_images([file_hash(image) for image in images])
    for name, (provenance, maps) in teachers.items():
        store.add_teacher(dict(teacher=name, **provenance), tuple(maps.shape[1:]))
        for image, one in zip(images, maps): store.array(name)[store.rows[file_hash(image)]] = one.half().numpy()
    return store


@pytest.mark.parametrize('told, shares', [([2, 6], [.5, .5]), (None, [.25, .75]), ([2, 5], [.25, .75])], ids=['told', 'an old store', 'does not add up'])
def test_layers_weigh_the_same_where_the_store_tells_them(told, shares, data, tmp_path):
    torch.manual_seed(0)
    maps = torch.randn(16, 8, 16, 16)*torch.arange(1, 9)[:, None, None]
    store = store_of(tmp_path/'store', images_of(data), drawn=({} if told is None else dict(layer_channels=told), maps))
    weight, = fit_targets(store, images_of(data), (4, 4), 8, TargetConfig(standardise='layer', projection='none')).weights
    variance = (weight.square()*maps.transpose(0, 1).flatten(1).var(1)).sum(0)
    assert [part.sum().item()/variance.sum().item() for part in variance.split([2, 6])] == pytest.approx(shares, abs=.02)


def test_a_store_without_layers_is_still_that_teacher_s(data, tmp_path):
    store = store_of(tmp_path/'store', images_of(data), drawn=({}, torch.zeros(16, 2, 4, 4)))
    store.check_teacher(dict(teacher='drawn', layer_channels=[1, 1]))
    with pytest.raises(InputError, match='size None instead of 5'): store.check_teacher(dict(teacher='drawn', size=5))


def test_components_are_those_that_can_be_told_from_held_out_images(data, tmp_path):
    "Two channels that follow the image's brightness, and four louder ones of noise that principal components put first."
    torch.manual_seed(0)
    bright = torch.stack([F.interpolate(torch.from_numpy(load_pair(pair, 64)[0])[None].float().mean(1, keepdim=True), (8, 8), mode='bilinear', antialias=True)[0]
                          for pair in list_pairs(train_folder(data))])/40
    noise = torch.randn(16, 1, 8, 8)
    loud = torch.cat([noise + .1*torch.randn(16, 4, 8, 8), bright - bright.mean() + .05*torch.randn(16, 2, 8, 8)], 1)
    store = store_of(tmp_path/'store', images_of(data), drawn=({}, loud))
    targets = build_targets(store, images_of(data), (8, 8), 6, TargetConfig(components='auto'))
    kept, r2 = targets.settings['kept'], targets.settings['held_out_r2']
    assert kept == [c for c, value in enumerate(r2['both']) if value > .05] and 0 < len(kept) < 6 and 0 not in kept
    assert targets[0][0].shape == (len(kept), 8, 8) and len(r2['low']) == len(r2['high']) == 6
    weight = torch.from_numpy(zarr.open_group(targets.path, mode='r')['weight'][:])
    assert weight[:, :4].sum(1).abs().max() < .2*weight[:, 4:].sum(1).abs().max(), 'noise is left out'


def test_further_images_have_targets_that_nothing_was_fitted_to(data, features):
    store, images = FeatureStore(features), images_of(data)
    learnt, held = images[:10], images[10:]
    alone, together, everything = build_targets(store, learnt, **GRID, config=SIXTEEN), build_targets(store, learnt, **GRID, config=SIXTEEN, more=held), build_targets(store, images, **GRID, config=SIXTEEN)
    assert len({alone.path, together.path, everything.path}) == 3 and (len(alone), len(together)) == (10, 16)
    for i in range(10): assert all(map(np.array_equal, alone[i], together[i]))
    assert not np.array_equal(together[12][0], everything[12][0])
    builder = fit_targets(store, learnt, **GRID, config=SIXTEEN)
    for made, kept in zip(builder([torch.from_numpy(store.read('filterbank', held[2]))]), together.of(held)[2]):
        torch.testing.assert_close(torch.from_numpy(kept).float(), made, atol=1e-2, rtol=1e-2)
    with pytest.raises(InputError, match='no target of'): alone.of(held)


def test_the_mean_map_explains_what_depends_on_the_place_alone():
    rng = np.random.default_rng(0)
    place = np.linspace(-1, 1, 8)*np.ones((3, 8, 1))
    place /= place.std()
    targets = [(3 + place + rng.standard_normal((3, 8, 8)), 2*place[:, :4, :4] + 1e-3*rng.standard_normal((3, 4, 4))) for _ in range(400)]
    low, high = mean_map_r2(targets[:300], targets[300:])
    assert low == pytest.approx(.5, abs=.02) and high == pytest.approx(1, abs=.001)


@pytest.fixture(scope='module')
def adapted(data, tmp_path_factory):
    "A store of an adapted teacher: the logits of the true masks, and two features."
    pairs = list_pairs(train_folder(data))
    masks = torch.stack([torch.from_numpy(load_pair(pair, 24)[1]) for pair in pairs])[:, None].float()
    torch.manual_seed(0)
    maps = torch.cat([20*masks - 10, torch.randn(16, 2, 24, 24)], 1)
    return store_of(tmp_path_factory.mktemp('adapted')/'store', images_of(data), adapted=(dict(mask_logits=True), maps), bare=({}, maps[:, 1:]))


def test_targets_leave_the_mask_of_an_adapted_teacher_out(adapted, data):
    with_mask, bare = (build_targets(adapted, images_of(data), (6, 6), 2, TargetConfig(teacher=name)) for name in ('adapted', 'bare'))
    assert with_mask.path != bare.path
    for i in range(16): assert all(map(np.array_equal, with_mask[i], bare[i]))


def test_soft_masks_are_the_teacher_s_in_any_order_and_size(adapted, data):
    images = images_of(data)[::-1]
    soft, true = SoftMasks(adapted, images), torch.stack([torch.from_numpy(load_pair(pair, 24)[1]) for pair in list_pairs(train_folder(data))]).flip(0)
    assert soft[2].dtype == np.float16 and ((soft[2] > .5) == true[2].numpy()).all()
    assert soft.at(24).shape == (16, 1, 24, 24) and torch.equal(soft.at(24)[:, 0] > 127, true > 0)
    coarse = F.interpolate(true[:, None].float(), (6, 6), mode='bilinear', antialias=True)
    torch.testing.assert_close(soft.at(6)/255, coarse, atol=.01, rtol=0)
    assert teacher_dice(soft, true) == 1 and teacher_dice(soft, true.roll(1, 0), 'none').shape == (16,)
    assert teacher_dice(soft.at(24), true.roll(1, 0)) < .9


@pytest.mark.parametrize('names, teacher, told', [((), None, 'no adapted teacher'), ((), 'bare', 'bare has no mask; run'), (('one', 'two'), None, 'soft masks of one, two; name one'),
                                                  (('one',), 'bare', 'bare has no mask; choose one'), (('one',), 'three', 'no features of three')])
def test_soft_masks_that_cannot_be_had_are_named(names, teacher, told, data, tmp_path):
    maps = torch.zeros(16, 2, 4, 4)
    store = store_of(tmp_path/'store', images_of(data), bare=({}, maps), **{name: (dict(mask_logits=True), maps) for name in names})
    with pytest.raises(InputError, match=told): SoftMasks(store, images_of(data), teacher)
    if len(names) == 2: assert SoftMasks(store, images_of(data), 'two').teacher == 'two'


def test_images_are_hashed_once(data, features, monkeypatch):
    seen = []
    for module in ('features.store', 'targets.latent'): monkeypatch.setattr(f'polyp_difom.{module}.file_hash', lambda image: seen.append(image) or file_hash(image))
    build_targets(FeatureStore(features), images_of(data), **GRID, config=TargetConfig(cutoff=.2))
    assert sorted(seen) == sorted(images_of(data))


def test_the_fit_is_the_same_again_and_in_any_order(data, features):
    first, again, turned = (fit_targets(FeatureStore(features), images, **GRID, config=SIXTEEN) for images in (images_of(data), images_of(data), images_of(data)[::-1]))
    assert torch.equal(first.weights[0], again.weights[0])
    torch.testing.assert_close(first.weights[0], turned.weights[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('file', ['zarr.json', 'targets/zarr.json', 'targets/c/3/0', 'index/c/0/0', 'teacher_gram/c/0/0/0'])
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
        for i in range(len(found)): assert all(map(np.array_equal, found[i], before[i]))
    again = build_targets(store, images, **GRID)
    assert again.path == targets.path and all(all(map(np.array_equal, again[i], before[i])) for i in range(len(again)))
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
    builder = fit_targets(two_teachers, images_of(data), (4, 4), channels, TargetConfig(standardise=standardise, projection=projection, components=channels))
    torch.testing.assert_close(builder.gram.sum(0), torch.eye(channels), atol=1e-4, rtol=0)
    for shares in builder.fitted['shares'].values(): assert sum(shares) == pytest.approx(1)
    if standardise != 'none': assert builder.fitted['shares']['standardised'] == pytest.approx([size/sum(sizes) for size in sizes], abs=0.02)


@pytest.mark.parametrize('split', splits)
def test_a_flip_of_the_maps_is_a_flip_of_the_target_but_for_the_square_window(split):
    torch.manual_seed(0)
    builder = TargetBuilder([torch.randn(4, 6)], torch.randn(4), (18, 18), ((7, 7), (12, 12)), TargetConfig(split=split))
    maps = torch.randn(6, 18, 18)
    differences = [max((flipped - part.flip(axis)).abs().max() for flipped, part in zip(builder([maps.flip(axis)]), builder([maps]))) for axis in (-1, -2)]
    assert min(differences) > 1e-2 if split == 'square' else max(differences) < 1e-4


def test_every_teacher_is_watched(data, two_teachers, tmp_path):
    run = train(data, tmp_path/'run', features=two_teachers.path, standardise='phi-s', split='dct', **SHORT)
    row, = csv.DictReader((run/'log.csv').open())
    assert [name for name in row if name.startswith(('r2_l1_', 'r2_l2_'))] == [f'r2_{latent}_{teacher}' for latent in ('l1', 'l2') for teacher in two_teachers.teachers]
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
    for part in raw[3]: torch.testing.assert_close(part, torch.cat([resize(m, raw.grid) for m in maps]))
    with pytest.raises(InputError): RawMaps(two_teachers, [Path(__file__)])


class Seen(Callback):
    "Keeps, for each phase, the weights of the fusion after the epoch and the target of its last batch."
    order = 90
    def before_fit(self): self.weights, self.target = {}, {}
    def after_loss(self):
        if self.training: self.kept = self.learn.distillation.extras['low']
    def after_train(self):
        self.weights[self.phase] = [p.detach().clone() for p in self.model.teacher_fusion.parameters()]
        self.target[self.phase] = self.kept


@pytest.mark.parametrize('published, warm', [(True, False), (True, True), (False, False)])
def test_only_the_published_distillation_trains_the_fusion_and_only_from_phase_two(published, warm, data, features):
    train_pairs, valid_pairs = split_pairs(list_pairs(train_folder(data)), 0.25)
    images = [pair.image for pair in train_pairs]
    torch.manual_seed(0)
    store, model = FeatureStore(features), PolypDiFoM(create_student('unet', width=4), 'paper')
    raw = RawMaps(store, images)
    model.teacher_fusion = TrainableFusion(len(raw[0][0]), model.latents.channels)
    before = [p.detach().clone() for p in model.teacher_fusion.parameters()]
    targets = raw if published else build_targets(store, images, model.target_grids(64), model.latents.channels)
    dls = polyp_dataloaders(PolypDataset(train_pairs, 64, targets), PolypDataset(valid_pairs, 64), 4, (1.,), torch.device('cpu'))
    distillation = PublishedDistillation(warm_heads=warm) if published else Distillation()
    learn = Learner(dls, model, output_loss, opt_func=adam, metrics=dice_score, cbs=[PhaseSchedule((1, 1, 0)), distillation, Seen()])
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    moved = {phase: [not torch.equal(a, b) for a, b in zip(before, now)] for phase, now in learn.seen.weights.items()}
    assert moved == {1: [False, False], 2: [published, published]}
    assert learn.seen.target[2].requires_grad == published


@pytest.mark.parametrize('latents', ['paper', 'free'])
def test_a_run_with_the_published_fusion_resumes_exactly_and_keeps_the_student_alone(latents, data, two_teachers, tmp_path):
    given = SHORT | dict(fusion='trainable', latents=latents, schedule='constant', lr=1e-3, features=two_teachers.path)
    whole, half = train(data, tmp_path/'whole', **given | dict(epochs=(0, 2, 0))), train(data, tmp_path/'half', **given)
    assert json.loads((whole/'config.json').read_text())['fingerprints']['targets'] == 'raw maps of ' + ', '.join(two_teachers.teachers)
    assert any('teacher_fusion' in name for name in safe_open(half/'last.safetensors', 'pt').keys())
    assert not any(name.startswith(('teacher_fusion', 'latents') if latents == 'free' else 'teacher_fusion') for name in safe_open(half/'best.safetensors', 'pt').keys())
    resume(half, epochs=(0, 2, 0))
    for a, b in zip(*(csv.DictReader((run/'log.csv').open()) for run in (half, whole))):
        assert {k: v for k, v in a.items() if k != 'seconds'} == {k: v for k, v in b.items() if k != 'seconds'}


def test_a_trainable_fusion_needs_features(data, tmp_path):
    with pytest.raises(InputError, match='nothing to fuse'): train(data, tmp_path/'run', fusion='trainable', **SHORT)
