"Runs with frames without labels, soft masks, few labels, presets and controls: what they learn from, what they refuse, and that they go on as if they had never stopped."
import dataclasses
import inspect
import json
import shlex
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from PIL import Image
from polyp_difom import cli
from polyp_difom.core import InputError
from polyp_difom.data.loaders import take_labels
from polyp_difom.data.images import list_images, test_sets as sets_of, train_pairs
from polyp_difom.data.synthetic import make_synthetic
from polyp_difom.features.extract import extract
from polyp_difom.features.store import FeatureStore
from polyp_difom.model.model import load_model
from polyp_difom.targets.latent import TargetConfig, paper_targets
from polyp_difom.targets.soft_masks import SoftMasks
from polyp_difom.training.adapt import adapt
from polyp_difom.training.learner import TrainConfig, presets
from polyp_difom.training.losses import soft_losses
from polyp_difom.training.runs import _command, _Frames, _shuffle, _Signal, read_log, resume, train
from polyp_difom.weights import read_tensors

SHORT = dict(student='unet,width=4', size=64, epochs=(1, 1, 1), batch_size=4, valid=.25, device='cpu')


@pytest.fixture(scope='module')
def adapted(data, tmp_path_factory):
    "A backbone that has seen the task for a moment."
    return adapt(data, tmp_path_factory.mktemp('adapted')/'teacher', backbone='timm/test_efficientnet,pretrained=False,width=8', size=64, epochs=1, steps=2, batch_size=4, device='cpu')


@pytest.fixture(scope='module')
def frames(tmp_path_factory):
    "Eight frames without masks; not to be changed."
    made = make_synthetic(tmp_path_factory.mktemp('others'), n_train=8, n_test=1, seed=7, size=(96, 120))
    return made/'TrainDataset/images'


@pytest.fixture(scope='module')
def store(data, frames, adapted, tmp_path_factory):
    "What the adapted teacher says of labelled images and of frames."
    place = tmp_path_factory.mktemp('soft')/'store'
    for source in (data, frames): extract(source, [f'adapted={adapted}'], place, device='cpu')
    return place


class Look(Callback):
    "Keeps the learner, and of each training batch its length, its predicted rows, and its soft masks."
    order = 99
    def before_fit(self): self.batches, self.kept = [], self.learn
    def after_loss(self):
        if self.training: self.batches.append((len(self.x), len(self.pred), self.learn.distillation.extras))


def settings_of(run): return json.loads((run/'config.json').read_text())['settings']


def state_of(run): return read_log(run).drop(columns=['seconds', 'teacher_share'], errors='ignore').values.tolist(), read_tensors(run/'last.safetensors')[0]


def assert_same_run(one, other):
    (ours, tensors), (theirs, others) = state_of(one), state_of(other)
    assert ours == theirs and tensors.keys() == others.keys() and all(torch.equal(tensors[k], others[k]) for k in others)


# --- frames without labels -----------------------------------------------------------------------------------------------------------------------

def test_frames_bring_targets_and_soft_masks_and_no_segmentation_loss(data, store, frames, tmp_path):
    look = Look()
    run = train(data, tmp_path/'run', features=store, unlabelled=frames, cbs=[look], **SHORT)
    settings, log = settings_of(run), read_log(run)
    assert settings['images'] == [12, 4] and settings['frames'] == 8 and settings['unlabelled'] == str(frames) and settings['preset'] == 'best'
    assert {'soft', 'l1', 'l2', 'teacher_dice'} <= {*log} and log[['soft', 'l1', 'l2']].map(np.isfinite).all(axis=None)
    assert {(rows, labelled) for rows, labelled, _ in look.batches} == {(4, 2)}, 'half of a batch, and predictions of labelled rows alone reach the loss'
    assert all(extras['labelled'].tolist() == [1, 1, 0, 0] and len(extras['low']) == len(extras['soft']) == 4 for _, _, extras in look.batches)
    part = look.kept.dls.train.dataset
    expected = SoftMasks(FeatureStore(store), [pair.image for pair in part.pairs]).at(64)
    assert torch.equal(part.soft, expected) and len({mask.numpy().tobytes() for mask in part.soft}) > 15


def test_a_network_with_free_latents_is_saved_as_the_plain_student(data, store, frames, tmp_path):
    run, twin = (train(data, tmp_path/name, **options, **SHORT) for name, options in (('run', dict(features=store, unlabelled=frames)), ('twin', {})))
    ours, theirs = (read_tensors(one/'best.safetensors')[0] for one in (run, twin))
    assert ours.keys() == theirs.keys() and {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert not load_model(run).distilled


@pytest.mark.parametrize('ratio, labelled', [(.25, 3), (.75, 1)])
def test_ratio_is_the_share_without_labels(ratio, labelled, data, store, frames, tmp_path):
    look = Look()
    train(data, tmp_path/'run', features=store, unlabelled=frames, ratio=ratio, cbs=[look], **(SHORT | dict(epochs=(0, 1, 0))))
    assert {rows for _, rows, _ in look.batches} == {labelled}


def copy(image, folder): shutil.copy(image, folder/'other name.png')
def resized_jpeg(image, folder):
    with Image.open(image) as picture: picture.convert('RGB').resize((100, 80)).save(folder/'shrunk.jpg', quality=85)


@pytest.mark.parametrize('hide', [copy, resized_jpeg])
@pytest.mark.parametrize('which', ['test', 'valid', 'held out'])
def test_what_is_tested_on_is_refused_among_the_frames(hide, which, data, store, frames, tmp_path):
    mixed = shutil.copytree(frames, tmp_path/'mixed')
    other = make_synthetic(tmp_path/'other', n_train=2, n_test=3, seed=11, size=(96, 120))
    twin = train(data, tmp_path/'twin', **(SHORT | dict(epochs=(1, 0, 0))))
    import pandas as pd
    valid = pd.read_csv(twin/'files.csv').query("part == 'valid'").image.iloc[0]
    hidden = dict(test=sets_of(data)['Synthetic'][1].image, valid=valid, **{'held out': sets_of(other)['Synthetic'][0].image})[which]
    hide(hidden, mixed)
    with pytest.raises(InputError, match=r'mixed: 1 of 9 frames are test or validation images'):
        train(data, tmp_path/'run', features=store, unlabelled=mixed, held_out=[other], **SHORT)
    assert not (tmp_path/'run').exists()


def test_a_frame_that_the_teacher_has_not_seen_is_named(data, store, frames, tmp_path):
    more = shutil.copytree(frames, tmp_path/'more')
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 120, 3), np.uint8)).save(more/'new.png')
    for lambdas in ((.6, .1, .1), (1, 0, 0)): # with heads, and with soft masks alone
        with pytest.raises(InputError, match=r'no features of .* for 1 of .*new.png'): train(data, tmp_path/'run', features=store, unlabelled=more, lambdas=lambdas, **SHORT)


def test_frames_without_a_teacher_are_refused(data, frames, features, tmp_path):
    with pytest.raises(InputError, match='unlabelled: without features'): train(data, tmp_path/'run', unlabelled=frames, **SHORT)
    with pytest.raises(InputError, match='no adapted teacher'): train(data, tmp_path/'run', features=features, soft_masks=True, **SHORT)


def test_the_rest_are_the_images_whose_masks_are_left_out(data, store, tmp_path):
    look = Look()
    run = train(data, tmp_path/'run', features=store, unlabelled='rest', labels=.5, cbs=[look], **SHORT)
    part, valid = look.kept.dls.train.dataset, look.kept.dls.valid.dataset
    used, rest = {pair.image for pair in [*part.pairs[:part.n_labelled], *valid.pairs]}, {pair.image for pair in part.pairs[part.n_labelled:]}
    assert len(used) == len(rest) == 8 and used | rest == {pair.image for pair in train_pairs(data)} and settings_of(run)['unlabelled'] == 'rest'
    assert not part.masks[part.n_labelled:].any(), 'their masks are not read'
    with pytest.raises(InputError, match='no frames are left without labels'): train(data, tmp_path/'other', features=store, unlabelled='rest', **SHORT)


# --- few labels, arms ----------------------------------------------------------------------------------------------------------------------------

def test_a_seed_decides_weights_validation_order_and_shuffle(data, store, frames, tmp_path):
    "Each of them by itself: what one draws for another is no matter."
    class Keep(Callback):
        order = 99
        def before_fit(self): self.model_begins, self.seeded, self.soft = {k: v.clone() for k, v in self.model.state_dict().items()}, [], self.dls.train.dataset.soft.clone()
        def before_batch(self): self.training and self.seeded.append(torch.initial_seed())
    runs = []
    for i, seed in enumerate((0, 0, 1)):
        keep = Keep()
        run = train(data, tmp_path/f'run{i}', features=store, unlabelled=frames, shuffled=True, cbs=[keep], **SHORT | dict(epochs=(0, 1, 0), seed=seed))
        parts = {row.part: {*rows.image} for row, rows in ((rows.iloc[0], rows) for _, rows in pd.read_csv(run/'files.csv').groupby('part'))}
        runs.append((keep, parts))
    (first, ours), (again, same), (other, theirs) = runs
    alike = lambda a, b: all(torch.equal(a.model_begins[k], b.model_begins[k]) for k in a.model_begins)
    assert alike(first, again) and not alike(first, other)
    assert first.seeded == again.seeded and first.seeded[0] != other.seeded[0]
    assert ours == same and ours != theirs
    assert torch.equal(first.soft, again.soft) and not torch.equal(first.soft, other.soft)


def test_targets_of_other_images_are_drawn_from_the_seed():
    signal = _Signal(None, torch.arange(20)[:, None], range(20))
    orders = [_shuffle(signal, seed).soft.flatten().tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == [*range(20)] != orders[0]


def test_few_labels_are_the_same_in_both_arms_and_for_every_seed(data, store, tmp_path):
    import pandas as pd
    images = []
    for name, options in dict(twin={}, distilled=dict(features=store, soft_on='all'), seed=dict(seed=3)).items():
        run = train(data, tmp_path/name, labels=.5, **options, **(SHORT | dict(epochs=(0, 1, 0))))
        images.append(set(pd.read_csv(run/'files.csv').image))
    assert images[0] == images[1] == images[2] and len(images[0]) == 8


@pytest.mark.parametrize('distilled', [True, False])
@pytest.mark.parametrize('options, frozen', [(dict(freeze=True), True), (dict(freeze=False), False), (dict(preset='paper'), None), ({}, False)], ids=str)
def test_the_encoder_is_frozen_where_that_is_asked_for(options, frozen, distilled, data, features, tmp_path):
    "Also in the undistilled arm; the paper freezes a distilled student's only."
    states = []
    class Keep(Callback):
        def after_train(self): states.append({k: v.clone() for k, v in self.model.student.state_dict().items() if k.startswith('encoder.')})
    train(data, tmp_path/'run', features=features if distilled else None, cbs=[Keep()], **options, **SHORT)
    still = all(torch.equal(v, states[1][k]) for k, v in states[2].items())
    assert still == (distilled if frozen is None else frozen) and not torch.equal(*(next(iter(state.values())) for state in states[:2]))


def test_shuffled_is_the_same_teacher_about_other_images(data, store, frames, tmp_path):
    looks = [Look(), Look()]
    for look, shuffled in zip(looks, (False, True)):
        train(data, tmp_path/f'{shuffled}', features=store, unlabelled=frames, shuffled=shuffled, cbs=[look], **(SHORT | dict(epochs=(0, 1, 0))))
    own, other = (look.kept.dls.train.dataset for look in looks)
    assert torch.equal(own.images, other.images) and torch.equal(own.masks, other.masks)
    match = lambda part, i: next(j for j in range(len(own)) if torch.equal(part.soft[i], own.soft[j]))
    order = [match(other, i) for i in range(len(other))]
    assert sorted(order) == list(range(len(own))) and sum(i != j for i, j in enumerate(order)) > len(own)/2
    for i, j in enumerate(order): assert all(np.array_equal(a, b) for a, b in zip(other.targets[i], own.targets[j])), 'targets and soft masks come from one image'
    assert torch.equal(looks[0].kept.dls.valid.dataset.soft, looks[1].kept.dls.valid.dataset.soft)


# --- exact under resume --------------------------------------------------------------------------------------------------------------------------

class Stop(Callback):
    order = 99
    def __init__(self, after=2): self.after = after
    def after_epoch(self):
        if self.epoch + 1 == self.after: raise KeyboardInterrupt


WAYS = dict(plain={}, refresh=dict(refresh=2), balance=dict(balance='gradient', ramp=1), paper=dict(preset='paper', soft_on='all', supervised_last=True),
            soft_alone=dict(lambdas=(1, 0, 0), confident=True), shuffled=dict(shuffled=True), restart=dict(schedule='restart', select='last'), no_soft_masks=dict(soft_masks=False))


@pytest.mark.parametrize('way', WAYS)
def test_a_run_with_soft_masks_goes_on_as_if_it_had_not_stopped(way, data, store, frames, tmp_path):
    options = dict(features=store, unlabelled=frames) | SHORT | dict(epochs=(1, 2, 1)) | WAYS[way]
    whole = train(data, tmp_path/'whole', **options)
    with pytest.raises(KeyboardInterrupt): train(data, tmp_path/'stopped', cbs=[Stop(3)], **options)
    assert len(read_log(tmp_path/'stopped')) == 3
    assert_same_run(resume(tmp_path/'stopped', device='cpu'), whole)
    assert ('soft' in read_log(whole)) == (way != 'no_soft_masks')


def test_a_live_teacher_needs_no_store_says_its_cost_and_goes_on(data, adapted, frames, tmp_path):
    options = SHORT | dict(unlabelled=frames, live_teacher=f'adapted={adapted}', mixup=1., epochs=(1, 1, 1))
    whole = train(data, tmp_path/'whole', **options)
    log = read_log(whole)
    assert (log.soft > 0).all() and log.teacher_share.between(.001, .999).all() and 'l1' not in log and settings_of(whole)['distilled']
    with pytest.raises(KeyboardInterrupt): train(data, tmp_path/'stopped', cbs=[Stop()], **options)
    assert_same_run(resume(tmp_path/'stopped', device='cpu'), whole)
    with pytest.raises(InputError, match='mixup: only a teacher'): train(data, tmp_path/'other', mixup=1., **SHORT)


def test_another_live_teacher_is_refused(data, adapted, frames, tmp_path):
    own = shutil.copytree(adapted, tmp_path/'teacher')
    with pytest.raises(KeyboardInterrupt): train(data, tmp_path/'run', unlabelled=frames, live_teacher=f'adapted={own}', cbs=[Stop()], **SHORT)
    shutil.rmtree(own)
    adapt(data, own, backbone='timm/test_efficientnet,pretrained=False,width=8', size=64, epochs=1, steps=1, batch_size=4, seed=1, device='cpu')
    with pytest.raises(InputError, match='cannot be resumed with other data.*live teacher'): resume(tmp_path/'run', device='cpu')


def test_moved_frames_are_found_and_other_frames_refused(data, store, frames, tmp_path, monkeypatch):
    own = shutil.copytree(frames, tmp_path/'frames')
    options = dict(features=store) | SHORT | dict(epochs=(1, 1, 1))
    whole = train(data, tmp_path/'whole', unlabelled=own, **options)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt): train(data, 'run', unlabelled='frames', cbs=[Stop()], **options)
    monkeypatch.chdir(data)
    assert settings_of(tmp_path/'run')['unlabelled'] == str(own), 'a run is resumed from anywhere'
    fewer = shutil.copytree(own, tmp_path/'fewer')
    list_images(fewer)[0].unlink()
    with pytest.raises(InputError, match='training images'): resume(tmp_path/'run', unlabelled=fewer, device='cpu')
    own.rename(tmp_path/'elsewhere')
    assert_same_run(resume(tmp_path/'run', unlabelled=tmp_path/'elsewhere', device='cpu'), whole)


def test_restart_is_extended_by_phases_that_have_not_begun(data, tmp_path):
    options = SHORT | dict(schedule='restart', freeze=True)
    run, longer = (train(data, tmp_path/f'{n}', **(options | dict(epochs=(1, 1, n)))) for n in (0, 2))
    assert_same_run(resume(run, epochs=(1, 1, 2), device='cpu'), longer)
    with pytest.raises(InputError, match='a phase that has begun'): resume(run, epochs=(1, 1, 3), device='cpu')


def test_an_undistilled_run_that_freezes_has_phases_to_keep_to(data, tmp_path):
    run = train(data, tmp_path/'run', **(SHORT | dict(preset='paper', freeze=True)))
    with pytest.raises(InputError, match='extend the phase it is in'): resume(run, epochs=(1, 2, 1), device='cpu')


# --- presets, and the command that repeats a run -------------------------------------------------------------------------------------------------

def test_a_preset_is_what_is_not_given_otherwise(data, features, tmp_path):
    paper, best, own = (settings_of(train(data, tmp_path/str(i), features=features, **options, **SHORT)) for i, options in enumerate((dict(preset='paper'), {}, dict(lr=5e-4, latents='paper'))))
    assert [run['preset'] for run in (paper, best, own)] == ['paper', 'best', 'best']
    assert (paper['augment'], paper['schedule'], paper['lr'], paper['latents'], paper['freeze'], paper['lambdas']) == ('paper', 'constant', 1e-4, 'paper', None, [.6, .1, .1])
    assert {name: paper['targets'][name] for name in paper_targets} == paper_targets
    assert {name: best[name] for name in presets['best']} == presets['best'] | dict(lambdas=[1, .1, .1], epochs=[1, 1, 1]), 'all but what was given'
    assert (own['lr'], own['latents'], own['augment']) == (5e-4, 'paper', 'strong')
    with pytest.raises(InputError, match='unknown preset papr; nearest: paper'): train(data, tmp_path/'run', preset='papr', **SHORT)


def test_the_console_tells_of_frames_soft_masks_and_the_teacher(data, store, frames, tmp_path, capfd):
    run = train(data, tmp_path/'run', features=store, unlabelled=frames, **SHORT)
    begun, *told = [line.split('\r')[-1].strip() for line in capfd.readouterr().out.splitlines() if ' with masks' in line or 'valid loss' in line]
    settings, log = settings_of(run), read_log(run)
    assert begun.startswith(f"{settings['images'][0]} images with masks, {settings['frames']} frames without, {settings['images'][1]} for validation; {len(log)} epoch")
    for line, row in zip(told, log.to_dict('records'), strict=True): assert f"soft masks {row['soft']:.4f}" in line and f"Dice {row['valid_dice']:.4f} (teacher {row['teacher_dice']:.4f})" in line


@pytest.mark.parametrize('options, batch', [({}, 32), (dict(ratio=.2), 20), (dict(ratio=.3), 23), (dict(ratio=.01), 17), (dict(batch_size=6), 6), (dict(preset='paper'), 16), (dict(unlabelled=None), 16)])
def test_frames_without_labels_take_no_labels_from_a_step(options, batch, data, store, frames, tmp_path):
    short = {name: value for name, value in SHORT.items() if name != 'batch_size'}
    look = Look()
    run = train(data, tmp_path/'run', features=store, cbs=[look], steps=1, soft_on='all', **short | dict(unlabelled=frames) | options)
    assert settings_of(run)['batch_size'] == batch
    if batch >= 16 and settings_of(run)['unlabelled'] and 'preset' not in options: assert look.batches[0][:2] == (batch, 16), 'images of a step, and those with labels'
    assert ('batch_size' in json.loads((run/'config.json').read_text())['command'].replace('--batch-size', 'batch_size')) == ('batch_size' in options), 'what a preset says is not given'


def test_a_ratio_that_takes_a_huge_batch_is_refused(data, store, frames, tmp_path):
    short = {name: value for name, value in SHORT.items() if name != 'batch_size'}
    with pytest.raises(InputError, match='ratio 0.99: 16 images with labels make a batch of 1600; give a lower ratio, or a batch_size'): train(data, tmp_path/'run', features=store, unlabelled=frames, ratio=.99, **short)
    assert not (tmp_path/'run').exists()


def test_the_command_repeats_the_run(data, store, frames, tmp_path, polyp_difom):
    held_out = make_synthetic(tmp_path/'other', n_train=2, n_test=1, seed=11, size=(96, 120))
    run = train(data, tmp_path/'run', features=store, unlabelled=frames, held_out=held_out, preset='paper', freeze=False, warm_heads=True, latents='free', soft_on='all', refresh=1, labels=.75,
                schedule='restart', scales=(1, 1.25), ratio=.25, steps=2, select='last', augment='strong', **SHORT)
    command = json.loads((run/'config.json').read_text())['command']
    assert command.startswith('train('), 'the command line takes three scales'
    run = train(data, tmp_path/'again', features=store, unlabelled=frames, held_out=held_out, preset='paper', freeze=False, warm_heads=True, latents='free', soft_on='all', refresh=1, labels=.75,
                schedule='restart', ratio=.25, steps=2, select='last', augment='strong', **SHORT)
    words = shlex.split(json.loads((run/'config.json').read_text())['command'])
    assert '--no-freeze' in words and '--warm-heads' in words and words[-2:] == ['--out', str(run)]
    result = polyp_difom(*words[1:-1], tmp_path/'repeated')
    assert result.returncode == 0, result.err
    assert_same_settings = settings_of(tmp_path/'repeated') == settings_of(run)
    assert assert_same_settings and state_of(tmp_path/'repeated')[0] == state_of(run)[0]


def test_the_rest_are_looked_through_for_test_images(data, adapted, tmp_path):
    shutil.copytree(data, tmp_path/'data')
    rest = take_labels(train_pairs(tmp_path/'data'), .5)[1][0].image
    test = next(iter(sets_of(data).values()))[0].image
    with Image.open(test) as picture: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(rest)
    with Image.open(test.parents[1]/'masks'/test.name) as mask: mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(rest.parents[1]/'masks'/rest.name)
    extract(tmp_path/'data', [f'adapted={adapted}'], tmp_path/'store', device='cpu')
    with pytest.warns(UserWarning, match='1 of 8 frames without labels look like a test or a validation image'): run = train(tmp_path/'data', tmp_path/'run', features=tmp_path/'store', unlabelled='rest', labels=.5, **SHORT)
    assert settings_of(run)['frames'] == 7 and rest.name not in (run/'files.csv').read_text()


def test_what_a_fault_in_the_first_epoch_leaves_is_gone_on_with(data, tmp_path):
    from polyp_difom.training.runs import Checkpoint
    class Killed(Callback):
        order = 61 # before the checkpoint
        def after_epoch(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train(data, tmp_path/'run', cbs=[Killed()], **SHORT)
    for name in ('log.csv', 'best.safetensors', '.best.safetensors.part-1-2'): (tmp_path/'run'/name).write_text('x')
    train(data, tmp_path/'run', **SHORT)
    assert len(read_log(tmp_path/'run')) == 3
    (tmp_path/'other').mkdir(); (tmp_path/'other'/'log.csv').write_text('x')
    with pytest.raises(InputError, match='a folder of something else'): train(data, tmp_path/'other', **SHORT)


def test_words_of_a_command():
    words = lambda **options: shlex.split(_command('d', 'r', 'unet', 's', **options))[7:-2]
    assert words(soft_masks=False, warm_heads=True) == ['--no-soft-masks', '--warm-heads']
    assert words(held_out=('a', 'b'), teacher=('x', 'y')) == ['--held-out', 'a', '--held-out', 'b', '--teacher', 'x', '--teacher', 'y']
    for options in (dict(freeze=None), dict(fold=(1, 5)), dict(scales=(1, 2))): assert _command('d', 'r', 'unet', 's', **options).startswith("train('d', 'r', unet, features='s'"), options


def test_every_option_is_on_the_command_line():
    offered = set(inspect.signature(cli._train).parameters)
    for config in (TrainConfig, TargetConfig, _Frames): assert {field.name for field in dataclasses.fields(config)} - offered <= {'fold'}
    for config in (TrainConfig, TargetConfig):
        for field in dataclasses.fields(config): # what is not given is left to the preset; what the command line shows is what holds
            default = field.name in offered and inspect.signature(cli._train).parameters[field.name].default
            assert default in (False, None) or default == field.default or list(default) == list(field.default), field.name


WRONG = {'--preset papr': 'unknown preset papr', '--labels 0': 'labels 0', '--ratio 1': 'ratio 1', '--augment weak': 'augment weak', '--latents deep': 'latents deep', '--soft-on some': 'soft_on some',
         '--select first': 'select first', '--balance even': 'balance even', '--refresh -1': 'refresh -1', '--unlabelled rest': 'without features', '--soft-loss dice': 'soft',
         '--live-teacher unet --soft-on all': 'unet', '--schedule cosine': 'schedule cosine', '--live-teacher filterbank --soft-on all': 'makes no masks', '--live-teacher filterbank --shuffled': 'gives masks of that very view',
         '--live-teacher filterbank --no-soft-masks': 'gives masks of that very view', '--supervised-last': 'there is no phase III', '--shuffled': 'without features there is no teacher', '--temperature .5': 'without features there is no teacher',
         '--refresh 2': 'without features there is no teacher'}


@pytest.mark.parametrize('words, told', WRONG.items(), ids=str)
def test_an_option_that_cannot_be_is_told_in_one_line(words, told, fails, data, tmp_path):
    assert told in fails('train', data, '--student', 'unet,width=4', '--size', 64, '--epochs', 1, 0, 0, '--device', 'cpu', *words.split(), '--out', tmp_path/'run')
    assert not (tmp_path/'run').exists()


def test_soft_masks_without_frames_to_learn_them_on_are_refused_before_training(data, store, tmp_path):
    with pytest.raises(InputError, match='there are none; give some'): train(data, tmp_path/'run', features=store, temperature=.5, **SHORT)
    assert not (tmp_path/'run').exists()
    train(data, tmp_path/'off', features=store, soft_masks=False, **SHORT)


IDLE = [(dict(features=None, held_out=['x']), 'held_out: says whose test images'), (dict(soft_masks=False, temperature=.5), 'temperature: is of soft masks'), (dict(soft_masks=False, soft_weight=2.), 'soft_weight: is of soft masks'),
        (dict(refresh=3), 'refresh 3: comes after the last of 3 epochs'), (dict(latents='paper', high_at='encoder'), 'high_at: is of free latents'), (dict(features=None, soft_loss='logit-mse'), 'soft_loss: without features')]


@pytest.mark.parametrize('options, told', IDLE, ids=str)
def test_an_option_that_does_nothing_is_refused(options, told, data, store, tmp_path):
    with pytest.raises(InputError, match=told): train(data, tmp_path/'run', **dict(features=store) | SHORT | options)
    assert not (tmp_path/'run').exists()


def test_a_teacher_that_was_trained_on_test_images_is_refused(data, frames, tmp_path):
    "By whom it was stored is no matter."
    leak = shutil.copytree(data, tmp_path/'leak')
    for pair in next(iter(sets_of(data).values())):
        shutil.copy(pair.image, leak/'TrainDataset'/'images'/f'more-{pair.image.name}')
        shutil.copy(pair.mask, leak/'TrainDataset'/'masks'/f'more-{pair.mask.name}')
    teacher = adapt(leak, tmp_path/'teacher', backbone='timm/test_efficientnet,pretrained=False,width=8', size=64, epochs=1, steps=2, batch_size=4, device='cpu')
    extract(data, [f'adapted={teacher}'], tmp_path/'store', device='cpu')
    with pytest.raises(InputError, match=r'teacher adapted was trained on \d+ of the \d+ test images'): train(data, tmp_path/'run', features=tmp_path/'store', **SHORT)
    with pytest.raises(InputError, match=r'live_teacher adapted=.*: was trained on \d+ of the \d+ test images'): train(data, tmp_path/'run', live_teacher=f'adapted={teacher}', unlabelled=frames, **SHORT)
    other = shutil.copytree(leak, tmp_path/'other') # whose test images this teacher has seen, too
    untested = shutil.copytree(data, tmp_path/'untested')
    shutil.rmtree(untested/'TestDataset')
    with pytest.raises(InputError, match='was trained on'): train(untested, tmp_path/'run', features=tmp_path/'store', held_out=[other], **SHORT)


def test_a_decoder_that_is_scored_on_what_its_teacher_learnt_is_warned_of(data, store, tmp_path):
    options = dict(size=64, epochs=1, steps=2, batch_size=4, device='cpu')
    with pytest.warns(UserWarning, match='images that are scored are among those that a teacher of the store was trained on'): adapt(data, tmp_path/'other', features=store, valid=.4, seed=3, **options)


@pytest.mark.parametrize('student, asked, taken', [('unet,width=4', None, 'bce-dice'), ('emcadnet,backbone=pvt_v2_b0', None, 'structure'), ('emcadnet,backbone=pvt_v2_b0', 'logit-mse', 'logit-mse')])
def test_soft_masks_are_learnt_with_the_labels_loss(student, asked, taken, data, store, frames, tmp_path):
    look = Look()
    train(data, tmp_path/'run', features=store, unlabelled=frames, pretrained=False, cbs=[look], **SHORT | dict(student=student, epochs=(0, 1, 0), steps=1, soft_loss=asked))
    assert look.kept.distillation.soft_loss is soft_losses[taken]


def test_a_freeze_without_a_phase_for_it_is_warned_of(data, tmp_path):
    with pytest.warns(UserWarning, match='freeze: phase III has no epochs'): train(data, tmp_path/'run', freeze=True, **SHORT | dict(epochs=(1, 1, 0)))
