"Learner, callbacks, runs: what a user may hand in, what may go wrong, and what must not change by it."
import json
import math
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import fastai.callback.progress  # adds no_bar to Learner
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import Learner
from PIL import Image
from polyp_difom.core import InputError
from polyp_difom.data.images import train_pairs
from polyp_difom.data.loaders import PolypDataset, polyp_dataloaders, split_pairs
from polyp_difom.data.synthetic import make_synthetic
from polyp_difom.features.extract import extract
from polyp_difom.features.store import FeatureStore
from polyp_difom.model.model import PolypDiFoM, amp_dtype, load_model, predict, predict_logits, save_model
from polyp_difom.students.registry import create_student
from polyp_difom.targets.latent import TargetConfig, build_targets, paper_targets
from polyp_difom.training.callbacks import (Distillation, EncoderFreeze, EpochLog, EpochSeed, PhaseSchedule, StopOnDivergence, TargetCollapse, TargetWatch, adam,
                                            dice_score)
from polyp_difom.training.learner import TrainConfig, difom_learner
from polyp_difom.training.losses import OutputLoss, align_latent, latent_losses, losses, segmentation_loss
from polyp_difom.training.runs import read_log, resume, summary_lines, train
from polyp_difom.weights import read_tensors

SHORT = dict(preset='paper', student='unet,width=4', size=64, epochs=(1, 1, 1), batch_size=4, valid=0.25, device='cpu')


def parts_of(data, features=None, size=64, model=None):
    "Loaders over sixteen frames, with targets where there are features."
    train_part, valid_part = split_pairs(train_pairs(data), 0.25)
    targets = features and build_targets(FeatureStore(features), [pair.image for pair in train_part], model.target_grids(size), model.latents.channels, TargetConfig(**paper_targets))
    return polyp_dataloaders(PolypDataset(train_part, size, targets), PolypDataset(valid_part, size), 4, (1.,), torch.device('cpu'))


def small_model(distilled=True, student=None):
    torch.manual_seed(0)
    return PolypDiFoM(student or create_student('unet', width=4), 'paper' if distilled else None)


def plain_learner(data, features, *cbs, model=None):
    "A plain fastai Learner."
    model = model or small_model()
    return Learner(parts_of(data, features, model=model), model, OutputLoss(), opt_func=adam, lr=3e-3, metrics=dice_score, cbs=[EpochSeed(0), *cbs])


def quiet_fit(learn, *arguments, **options):
    with learn.no_bar(), learn.no_logging(): learn.fit(*arguments, **options)
    return learn


# --- each callback alone -------------------------------------------------------------------------------------------------------------------------

def test_distillation_alone_distils_from_the_first_epoch(data, features):
    alone = quiet_fit(plain_learner(data, features, Distillation(), EpochLog()), 4)
    waits = quiet_fit(plain_learner(data, features, Distillation(), EpochLog(), PhaseSchedule((4, 0, 0))), 4)
    first, last = (alone.epoch_log.rows[i]['l1'] for i in (0, -1))
    assert last < 0.9*first and waits.epoch_log.rows[-1]['l1'] > 0.98*waits.epoch_log.rows[0]['l1']


def test_the_freeze_alone_freezes_from_the_first_epoch(data):
    model = small_model(False)
    before = {k: v.clone() for k, v in model.student.state_dict().items()}
    quiet_fit(plain_learner(data, None, EncoderFreeze(), model=model), 1)
    moved = {k for k, v in model.student.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and not any(k.startswith('encoder.') for k in moved)
    assert all(p.requires_grad for p in model.parameters()), 'thawed when the fit is over'


@pytest.mark.parametrize('cbs', [[PhaseSchedule], [EncoderFreeze], [EpochSeed], [EpochLog], [StopOnDivergence], [Distillation], [Distillation, TargetWatch]], ids=str)
def test_callbacks_need_no_others(cbs, data, features):
    distilled = Distillation in cbs
    learn = quiet_fit(plain_learner(data, features if distilled else None, *(cb() for cb in cbs), model=small_model(distilled)), 1)
    assert learn.recorder.metric_names[:4] == ['epoch', 'train_loss', 'valid_loss', 'dice_score']
    assert [m.name for m in learn.metrics] == ['dice_score'], 'columns go when the fit is over'


class Scaled(torch.nn.Module):
    "A student whose `encode` uses a parameter of its own, and one that only `decode` uses."
    def __init__(self):
        super().__init__()
        self.down, self.head = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, stride=4), torch.nn.BatchNorm2d(8)), torch.nn.Conv2d(8, 1, 1)
        self.scale, self.shift = torch.nn.Parameter(torch.ones(8, 1, 1)), torch.nn.Parameter(torch.zeros(1))
    def encode(self, x): return [self.down(x)*self.scale]
    def decode(self, maps): return F.interpolate(self.head(maps[0]) + self.shift, scale_factor=4)


def test_a_bare_parameter_of_encode_is_frozen_and_one_of_decode_is_not(data, features):
    states = []
    class Watch(Callback):
        def after_train(self): states.append({k: v.clone() for k, v in self.model.student.state_dict().items()})
    learn = plain_learner(data, features, PhaseSchedule((1, 1, 1)), Distillation(), EncoderFreeze(), Watch(), model=small_model(True, Scaled()))
    quiet_fit(learn, 3)
    moved = [{k for k in now if not torch.equal(now[k], before[k])} for before, now in zip(states, states[1:])]
    assert {'scale', 'shift', 'down.0.weight', 'down.1.running_mean', 'head.weight'} <= moved[0]
    assert moved[1] == {'shift', 'head.weight', 'head.bias'}


# --- the learner ---------------------------------------------------------------------------------------------------------------------------------

def test_one_more_metric_shifts_nothing(data, features, tmp_path):
    def hundred(logits, mask): return torch.tensor(100.)
    def area(logits, mask): return (logits > 0).float().mean()
    bare = read_log(train(data, tmp_path/'bare', features=features, **SHORT))
    more = read_log(train(data, tmp_path/'more', features=features, metrics=[hundred, area], **SHORT))
    assert (more.valid_hundred == 100).all()
    for name in set(bare) - {'seconds'}: assert more[name].tolist() == bare[name].tolist(), name
    ours, theirs = (read_tensors(tmp_path/name/'best.safetensors')[0] for name in ('more', 'bare'))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize('scores, metrics, told', [((0.2, 0.9, 0.5), [lambda logits, mask: torch.tensor(-5.)], 'best epoch 2 of 3, validation Dice 0.900'), ((0.9, 0.5, 0.2), [], 'best epoch 2 of 3, validation Dice 0.500')],
                         ids=['and not of another metric, nor the last', 'among the phases that distil'])
def test_the_best_epoch_is_that_of_the_best_dice(scores, metrics, told, data, tmp_path):
    epochs = iter(scores)
    class Fixed(Callback):
        order = 51 # behind the recorder
        def before_epoch(self): self.dice = next(epochs)
        def after_epoch(self): self.learn.final_record[self.recorder.metric_names.index('dice_score') - 1] = self.dice
    kept = {}
    class Keep(Callback):
        order = 99
        def after_epoch(self): kept[self.epoch + 1] = {k: v.clone() for k, v in self.model.state_dict().items()}
    run = train(data, tmp_path/'run', cbs=[Fixed(), Keep()], metrics=metrics, **SHORT)
    best = load_model(run).state_dict()
    assert all(torch.equal(best[k], kept[2][k]) for k in best)
    assert told in summary_lines(run)[0]


def test_any_callable_is_a_loss_a_metric_a_distance(data, features):
    called = []
    def loss(logits, mask): called.append('loss'); return F.mse_loss(logits, mask)
    def metric(logits, mask): called.append('metric'); return logits.mean()
    def distance(latent, target): called.append(latent.shape[1:]); return (latent - target).abs().mean()
    model = small_model()
    learn = difom_learner(parts_of(data, features, model=model), model, loss, Distillation((1, 0.5, 0.5), distance), metrics=[metric])
    with learn.no_bar(), learn.no_logging(): learn.fit_phases((0, 1, 0), lr=1e-3)
    assert {'loss', 'metric', (16, 4, 4)} <= set(called)
    assert list(learn.recorder.metric_names[3:7]) == ['metric', 'seg', 'l1', 'l2']


def test_lambdas_weigh_the_losses(data, features, tmp_path):
    "Without weight on the latents their losses are measured, and the student learns as the undistilled one would."
    run = train(data, tmp_path/'run', features=features, lambdas=(2, 3, 4), **(SHORT | dict(epochs=(0, 1, 0))))
    row = read_log(run).iloc[0]
    assert row.loss == pytest.approx(2*row.seg + 3*row.l1 + 4*row.l2, rel=1e-5)
    assert json.loads((run/'config.json').read_text())['settings']['lambdas'] == [2, 3, 4]


def test_fit_phases_shows_latent_losses_and_dice_in_fastais_table(data, features, capsys):
    model = small_model()
    learn = difom_learner(parts_of(data, features, model=model), model, distill=Distillation())
    printed = []
    learn.logger = printed.append
    with learn.no_bar(): learn.fit_phases((1, 1, 1), lr=1e-3)
    rows = [dict(zip(learn.recorder.metric_names, row)) for row in printed if len(row) == len(learn.recorder.metric_names)]
    assert [row['epoch'] for row in rows] == [0, 1, 2]
    assert {'l1', 'l2', 'dice_score', 'r2_l1', 'std_l2'} <= set(rows[0]) and all(math.isfinite(row['l1']) for row in rows)
    assert not hasattr(learn, 'phase_schedule') and len(model.latents._forward_hooks) == 0


def test_what_a_fastai_learner_does(data, features, tmp_path):
    model = small_model()
    learn = difom_learner(parts_of(data, features, model=model), model, distill=Distillation(), path=tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with learn.no_bar(): assert 0 < learn.lr_find(num_it=12, end_lr=1).valley < 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert 'LatentHeads' in learn.summary() or 'FoundationalFusion' in learn.summary()
    learn.show_batch(max_n=2); learn.show_results(max_n=2)
    picture = train_pairs(data)[0].image
    maps = [learn.predict(one) for one in (picture, str(picture), Image.open(picture), np.asarray(Image.open(picture)))]
    assert maps[0].shape == (96, 120) and all(np.array_equal(m, maps[0]) for m in maps)
    predictions, masks = learn.get_preds(ds_idx=0)
    assert len(predictions) == 12
    predictions, masks = learn.get_preds()
    assert predictions.shape == masks.shape == (4, 1, 64, 64) and 0 <= predictions.min() <= predictions.max() <= 1
    assert len(learn.validate()) >= 2

    quiet_fit(learn, 1)
    state = {k: v.clone() for k, v in learn.opt.opt.state_dict()['state'][0].items()}
    learn.save('kept')
    quiet_fit(learn, 1)
    learn.load('kept')
    assert all(torch.equal(v, learn.opt.opt.state_dict()['state'][0][k]) for k, v in state.items())
    with pytest.raises(InputError, match='save_model'): learn.export()
    assert {path.suffix for path in tmp_path.rglob('*') if path.is_file()} == {'.safetensors'}
    with pytest.raises(InputError, match='does not fit this network'):
        difom_learner(parts_of(data), small_model(False, create_student('unet', width=5)), path=tmp_path).load('kept')


def test_parts_that_do_not_fit_are_named(data, features):
    model = small_model()
    with_targets, without = parts_of(data, features, model=model), parts_of(data)
    for arguments, told in (((with_targets, model), 'nothing learns from'), ((without, model, None, Distillation()), 'no targets'),
                            ((with_targets, small_model(False), None, Distillation()), 'no latents'),
                            ((without, small_model(False), None, Distillation()), 'neither targets nor soft masks'), ((without, model.student), 'PolypDiFoM')):
        with pytest.raises(InputError, match=told): difom_learner(*arguments)


class TwoOutputs(Scaled):
    def decode(self, maps): return [super(TwoOutputs, self).decode(maps), 2*super(TwoOutputs, self).decode(maps), -super(TwoOutputs, self).decode(maps)]


@pytest.mark.parametrize('mutation, calls', [(False, 3), (True, 7)])
def test_mutation_is_a_loss_for_every_subset_of_outputs(mutation, calls, data):
    "Seven subsets of three outputs in training; one output, the last, on the validation part."
    seen = []
    def loss(logits, mask): seen.append(logits.requires_grad); return losses['structure'](logits, mask)
    learn = difom_learner(parts_of(data), small_model(False, TwoOutputs()), OutputLoss(loss, mutation))
    quiet_fit(learn, 1)
    assert seen.count(True) == 3*calls and seen.count(False) == 1, 'three training batches, one for validation'


# --- geometry, modes, precision ------------------------------------------------------------------------------------------------------------------

def middle(maps):
    "Centre of mass as shares of height and width."
    weight = maps[0, 0]/maps[0, 0].sum()
    return [(((torch.arange(n) + .5)*weight.sum(1 - axis)).sum()/n).item() for axis, n in enumerate(weight.shape)]


@pytest.mark.parametrize('height, width', [(100, 100), (96, 100), (70, 130)])
@pytest.mark.parametrize('row, column', [(.3, .3), (.6, .7)])
def test_a_spot_is_at_the_same_place_in_latent_and_target(height, width, row, column):
    "Also where the image is padded: 12 % off at 100 px once."
    model = PolypDiFoM(create_student('unet', width=4), 'paper')
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing='ij')
    spot = torch.exp(-((y - row*height)**2 + (x - column*width)**2)/2/9**2)[None, None]
    padded = F.pad(spot, (0, -width % 16, 0, -height % 16), mode='replicate')
    latent = F.avg_pool2d(padded, 16)
    target = F.interpolate(spot, (32, 32), mode='area')
    aligned = align_latent(latent, target, model.coverage(height, width))[1]
    assert middle(aligned) == pytest.approx(middle(latent), abs=0.015)


def test_distillation_aligns_at_a_size_that_is_padded(data, features):
    model = small_model()
    seen = []
    class Keep(Callback):
        def after_loss(self):
            if self.training: seen.append((*self.learn.distillation.pairs['l1'], self.learn.distillation.extras['low']))
    learn = difom_learner(parts_of(data, features, size=100, model=model), model, distill=Distillation(), cbs=Keep())
    quiet_fit(learn, 1)
    latent, target, stored = seen[-1]
    assert latent.shape == target.shape == (4, 16, 7, 7)
    assert torch.allclose(target, align_latent(latent, stored, (100/112,)*2)[1]) and not torch.allclose(target, stored)


def test_a_prediction_is_made_in_eval_mode_and_leaves_all_modes():
    model, image = small_model().train(), Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8))
    model.student.encoder[1].eval()
    modes, state = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    logits, probability = predict_logits(model, image, 64), predict(model, image, 64)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.eval()
    assert torch.equal(logits, predict_logits(model, image, 64)) and np.array_equal(probability, predict(model, image, 64))


@pytest.mark.parametrize('capabilities, dtype', [(dict(amx_bf16=True), 'bf16'), (dict(avx512_bf16=True), 'bf16'), (dict(avx2=True), 'fp32'), ({}, 'fp32')])
def test_bf16_on_cpus_that_multiply_it(capabilities, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: capabilities, raising=False)
    amp_dtype.cache_clear()
    assert amp_dtype(torch.device('cpu')) == dtype
    amp_dtype.cache_clear()


def test_training_at_several_sizes(data, features, tmp_path):
    sizes = set()
    class Sizes(Callback):
        def before_batch(self): sizes.add((self.training, self.x.shape[-1]))
    run = train(data, tmp_path/'run', features=features, cbs=[Sizes()], **(SHORT | dict(size=96, epochs=(1, 3, 0), batch_size=2, scales=(0.75, 1, 1.25))))
    assert sizes == {(True, 64), (True, 96), (True, 128), (False, 96)}
    assert read_log(run)[['l1', 'r2_l1']].map(math.isfinite).all(axis=None)


# --- settings ------------------------------------------------------------------------------------------------------------------------------------

WRONG = [dict(lr=-1), dict(lr=0), dict(lr=float('nan')), dict(lr=float('inf')), dict(lr='fast'), dict(valid=-1), dict(valid=0), dict(valid=1), dict(size=31), dict(size=1_000_000),
         dict(size='64'), dict(seed=-1), dict(seed=0.5), dict(epochs=(0, 0, 0)), dict(epochs=(1, 2)), dict(epochs=(1, -1, 2)), dict(epochs=3), dict(batch_size=0), dict(batch_size=True),
         dict(schedule='cosine'), dict(precision='fp16'), dict(loss='focal'), dict(distance='msse'), dict(lambdas=(0, 1, 1)), dict(lambdas=(1, -1, 1)), dict(lambdas=(1, 1)),
         dict(lambdas=(1, float('nan'), 1)), dict(scales=()), dict(scales=(0, 1)), dict(scales=(1000,)), dict(cutoff=5), dict(cutoff=float('nan')), dict(split='haar'),
         dict(mask_above=300), dict(device='cuda:77'), dict(device='gpu'), dict(wdith=3), dict(learning_rate=1), dict(width=-1), dict(width=0), dict(width=10**9), dict(width='wide'), dict(student='unet,width=60000')]


@pytest.mark.parametrize('wrong', WRONG, ids=str)
def test_a_setting_that_cannot_be_is_refused_before_anything_is_written(wrong, data, features, tmp_path):
    options = dict(features=features, **SHORT) | wrong
    if 'width' in wrong: options['student'] = 'unet'
    with pytest.raises(InputError) as told: train(data, tmp_path/'run', **options)
    assert not (tmp_path/'run').exists()
    assert '\n' not in str(told.value) and next(iter(wrong)).replace('_', '-') in str(told.value).replace('_', '-')


def test_an_unknown_option_is_told_the_nearest(data, tmp_path):
    with pytest.raises(InputError, match='unknown option wdith; nearest: width'): train(data, tmp_path/'run', wdith=3)
    with pytest.raises(InputError, match='unknown option epoch; nearest: epochs'): train(data, tmp_path/'run', epoch=(1, 1, 1))


def test_unknown_names_make_no_run(data, features, tmp_path):
    with pytest.raises(InputError, match='unknown distance msse; nearest: mse'): train(data, tmp_path/'run', features=features, distance='msse', **SHORT)
    with pytest.raises(InputError, match='unknown split haar'): train(data, tmp_path/'run', features=features, split='haar', **SHORT)
    with pytest.raises(InputError, match='loss focal: choose bce-dice'): train(data, tmp_path/'run', features=features, loss='focal', **SHORT)
    assert not (tmp_path/'run').exists()


# --- faults --------------------------------------------------------------------------------------------------------------------------------------

class Spoilt:
    "Targets of which one becomes no number in the second epoch."
    def __init__(self, targets): self.targets, self.read, self.path, self.settings = targets, 0, targets.path, targets.settings
    def __getitem__(self, i):
        self.read += 1
        return [part*np.float16(np.nan if i == 7 and self.read > 12 else 1) for part in self.targets[i]]


class Spoil(Callback):
    def before_fit(self):
        if not isinstance(self.dls.train.dataset.targets, Spoilt): self.dls.train.dataset.targets = Spoilt(self.dls.train.dataset.targets)


def test_a_loss_that_is_no_number_stops_and_names_the_files_and_keeps_the_checkpoint(data, features, tmp_path):
    name = split_pairs(train_pairs(data), 0.25)[0][7].image.name
    with pytest.raises(InputError, match=f'epoch 2, step [123]: the loss is nan .*{name}') as told:
        train(data, tmp_path/'run', features=features, cbs=[Spoil()], **(SHORT | dict(epochs=(0, 3, 0))))
    assert str(told.value).count('.png') == 4, 'the files of this batch and no others'
    assert len(read_log(tmp_path/'run')) == 1 and (tmp_path/'run/curves.png').exists()
    assert all(p.isfinite().all() for p in load_model(tmp_path/'run').parameters())
    mended = resume(tmp_path/'run', device='cpu') # with the targets as they are on disk
    assert len(read_log(mended)) == 3


def test_a_diverging_loss_stops(data, tmp_path):
    with pytest.raises(InputError, match='epoch 1, step .: the loss is .*lower learning rate'): train(data, tmp_path/'run', lr=1e7, **SHORT)
    assert not (tmp_path/'run/last.safetensors').exists()


def test_weights_that_are_no_numbers_are_not_kept(data, tmp_path):
    class Poison(Callback):
        order = 40
        def after_validate(self):
            if self.epoch == 1: self.model.student.head.bias.data.fill_(float('inf'))
    with pytest.raises(InputError, match='epoch 2, no numbers in student.head.bias'): train(data, tmp_path/'run', cbs=[Poison()], **SHORT)
    assert len(read_tensors(tmp_path/'run/last.safetensors')[1]['rows']) == 1


def test_weights_that_are_no_numbers_are_not_loaded(tmp_path):
    model = small_model()
    model.student.head.bias.data.fill_(float('nan'))
    save_model(model, tmp_path/'best.safetensors')
    with pytest.raises(InputError, match='best.safetensors'): load_model(tmp_path)


def test_ctrl_c_says_how_to_go_on(data, tmp_path, capsys):
    class Press(Callback):
        order = 99
        def after_batch(self):
            if self.training and self.epoch == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train(data, tmp_path/'run', cbs=[Press()], **SHORT)
    assert f'interrupted after epoch 1; go on with: polyp-difom train --resume {tmp_path}/run' in capsys.readouterr().err
    assert len(read_log(resume(tmp_path/'run', device='cpu'))) == 3


# --- the folder of a run -------------------------------------------------------------------------------------------------------------------------

def state_of(run):
    return read_log(run).drop(columns='seconds').values.tolist(), read_tensors(Path(run)/'last.safetensors')[0]


def assert_same_run(one, other):
    (ours, tensors), (theirs, others) = state_of(one), state_of(other)
    assert ours == theirs and all(torch.equal(tensors[k], others[k]) for k in others)


def test_a_run_explains_itself(data, features, tmp_path):
    run = train(data, tmp_path/'a run', features=features, lr=2e-3, split='dct', **SHORT)
    held = json.loads((run/'config.json').read_text())
    assert held['command'] == (f"polyp-difom train {data} --student unet,width=4 --features {features} --split dct --size 64 --epochs 1 1 1 --batch-size 4 "
                               f"--lr 0.002 --valid 0.25 --preset paper --device cpu --out '{run}'")
    assert held['versions'].keys() >= {'python', 'polyp_difom', 'torch', 'fastai', 'timm', 'safetensors'} and held['device'].startswith('cpu')
    assert held['data'] == str(data) and held['features'] == str(features) and held['finished_epochs'] == 3 and held['seconds'] > 0
    assert held['settings']['targets']['split'] == 'dct' and held['settings']['student'] == 'unet' and held['settings']['options'] == dict(width=4)
    files = pd.read_csv(run/'files.csv')
    assert files.part.value_counts().to_dict() == dict(train=12, valid=4) and set(files.image) == {str(pair.image) for pair in train_pairs(data)}
    assert Image.open(run/'curves.png').width > 300
    best, *_, next_step = summary_lines(run)
    assert 'validation Dice' in best and f"polyp-difom evaluate '{run}' {data}" in next_step
    (run/'config.json').write_text(json.dumps(held | dict(best_dice=.4)))
    assert len(summary_lines(run)) == 2
    (run/'config.json').write_text(json.dumps(held | dict(best_dice=0.)))
    assert 'finds no polyp in the validation images' in summary_lines(run)[1]


def test_a_run_is_extended_as_if_it_had_been_longer(data, features, tmp_path):
    short, long = (train(data, tmp_path/str(n), features=features, **(SHORT | dict(epochs=(1, 1, n)))) for n in (1, 3))
    assert resume(short, device='cpu') == short, 'nothing to do'
    resume(short, epochs=(1, 1, 3), device='cpu')
    assert_same_run(short, long)
    assert json.loads((short/'config.json').read_text())['settings']['epochs'] == [1, 1, 3]
    for epochs, told in (((2, 1, 3), 'extend the phase it is in'), ((1, 1, 1), 'done already'), ((1, 1), 'three whole numbers')):
        with pytest.raises(InputError, match=told): resume(short, epochs=epochs, device='cpu')


def test_one_cycle_is_not_extended(data, tmp_path):
    run = train(data, tmp_path/'run', schedule='one-cycle', **SHORT)
    with pytest.raises(InputError, match='cannot be extended'): resume(run, epochs=(1, 1, 2), device='cpu')


def test_moved_data_are_found_and_other_data_refused(data, features, tmp_path):
    moved, store = shutil.copytree(data, tmp_path/'data'), shutil.copytree(features, tmp_path/'store')
    run = train(moved, tmp_path/'run', features=store, **SHORT)
    whole = train(moved, tmp_path/'whole', features=store, **(SHORT | dict(epochs=(1, 1, 2))))
    moved.rename(tmp_path/'elsewhere'); store.rename(tmp_path/'other-store')
    with pytest.raises(InputError, match='data: no such folder'): resume(run, epochs=(1, 1, 2), device='cpu')
    other = make_synthetic(tmp_path/'other', n_train=16, n_test=1, seed=3, size=(96, 120))
    extract(other, ['filterbank'], tmp_path/'other-features', device='cpu')
    with pytest.raises(InputError, match='training images; validation images; targets'):
        resume(run, epochs=(1, 1, 2), data=other, features=tmp_path/'other-features', device='cpu')
    assert len(read_log(run)) == 3
    resume(run, epochs=(1, 1, 2), data=tmp_path/'elsewhere', features=tmp_path/'other-store', device='cpu')
    assert_same_run(run, whole)
    assert json.loads((run/'config.json').read_text())['data'] == str(tmp_path/'elsewhere')


def test_one_changed_mask_is_found(data, tmp_path):
    own = shutil.copytree(data, tmp_path/'data')
    run = train(own, tmp_path/'run', **SHORT)
    mask = train_pairs(own)[0].mask
    Image.open(mask).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mask)
    with pytest.raises(InputError, match='cannot be resumed with other data'): resume(run, epochs=(1, 1, 2), device='cpu')


def test_what_is_of_ones_own_making_is_asked_for(data, features, tmp_path):
    def my_loss(logits, mask): return F.binary_cross_entropy_with_logits(logits, mask)
    options = {k: v for k, v in SHORT.items() if k != 'student'}
    run = train(data, tmp_path/'run', Scaled(), loss=my_loss, distance=F.l1_loss, features=features, **options)
    with pytest.raises(InputError, match='pass loss='): resume(run, epochs=(1, 1, 2), device='cpu')
    with pytest.raises(InputError, match='pass student='): resume(run, epochs=(1, 1, 2), loss=my_loss, distance=F.l1_loss, device='cpu')
    resume(run, epochs=(1, 1, 2), student=Scaled(), loss=my_loss, distance=F.l1_loss, device='cpu')
    assert len(read_log(run)) == 4
    assert json.loads((run/'config.json').read_text())['command'].startswith(f"train('{data}', '{run}', Scaled, ")


@pytest.mark.parametrize('content', ['', '{', '[]', '{"settings": {}}', '{"settings": {}, "fingerprints": {}, "data": "x", "features": null}'])
def test_a_damaged_config_is_named(content, tmp_path):
    (tmp_path/'config.json').write_text(content)
    with pytest.raises(InputError, match='config.json'): resume(tmp_path, device='cpu')


def test_tensorboard(data, tmp_path, monkeypatch):
    pytest.importorskip('tensorboard')
    run = train(data, tmp_path/'run', tensorboard=True, **SHORT)
    assert list((run/'tensorboard').glob('events.*'))
    monkeypatch.setitem(sys.modules, 'tensorboard', None); monkeypatch.delitem(sys.modules, 'fastai.callback.tensorboard')
    with pytest.raises(InputError, match='tensorboard is not installed'): train(data, tmp_path/'other', tensorboard=True, **SHORT)
    assert not (tmp_path/'other').exists()


# --- the watch over the targets ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('distance', latent_losses)
def test_every_distance_trains_and_is_kept_in_the_settings(distance, data, features, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error', TargetCollapse)
        run = train(data, tmp_path/'run', features=features, distance=distance, **(SHORT | dict(epochs=(0, 1, 0))))
    log = read_log(run)
    assert list(log)[-8:] == ['r2_l1', 'r2_l2', 'std_l1', 'std_l2', 'valid_r2_l1', 'valid_r2_l2', 'mean_r2_l1', 'mean_r2_l2'] and log.r2_l1[0] < 1 and log.std_l1[0] > 0
    assert json.loads((run/'config.json').read_text())['settings']['distance'] == distance
    other = 'cosine' if distance == 'mse' else 'mse'
    with pytest.raises(InputError, match=f'another distance: .* then, {other} now'): resume(run, epochs=(0, 2, 0), distance=other, device='cpu')


def watched(latent, target, grams=None):
    "What `TargetWatch` finds after one batch of these."
    watch = TargetWatch(grams)
    watch.rows, watch.learn = [], SimpleNamespace(training=True, epoch=0, distillation=SimpleNamespace(pairs=dict(l1=(latent, target), l2=(latent, target)), extras=dict(low=target, high=target)))
    watch.before_train(); watch.after_loss(); watch.after_train()
    return watch.values


def test_r2_is_one_for_a_copy_and_zero_for_the_mean():
    torch.manual_seed(0)
    target = 3*torch.randn(5, 4, 6, 6) + torch.arange(4.)[:, None, None]
    mean = target.mean((0, 2, 3), keepdim=True).expand_as(target)
    assert watched(target, target)['r2_l1'] == pytest.approx(1)
    assert watched(mean, target)['r2_l1'] == pytest.approx(0, abs=1e-5)
    assert watched(mean, target)['std_l1'] == pytest.approx((target - mean).square().mean().sqrt().item())
    first, second = torch.eye(4)[:1], torch.eye(4)[1:] # two teachers, of one and three channels
    row = watched(torch.cat([target[:, :1], mean[:, 1:]], 1), target, dict(a=first.T @ first, b=second.T @ second))
    assert (row['r2_l1_a'], row['r2_l1_b']) == pytest.approx((1, 0), abs=1e-5)


class Shrinking:
    "Targets that lose 40 % an epoch, as trainable ones may."
    def __init__(self, targets): self.targets, self.log = targets, None
    def __getitem__(self, i): return [part*np.float16(0.6**len(self.log.rows)) for part in self.targets[i]]


@pytest.mark.parametrize('shrink', [True, False])
def test_a_collapsing_target_is_told_once(shrink, data, features):
    model = small_model()
    learn = difom_learner(parts_of(data, features, model=model), model, distill=Distillation(), cbs=[EpochLog()])
    if shrink:
        learn.dls.train.dataset.targets = Shrinking(learn.dls.train.dataset.targets)
        learn.dls.train.dataset.targets.log = learn.epoch_log
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always', TargetCollapse)
        quiet_fit(learn, 4)
    told = [str(w.message).split(' is ')[0] for w in caught if w.category is TargetCollapse]
    assert told == (['epoch 3: std_l1', 'epoch 3: std_l2'] if shrink else [])


def test_config_is_frozen_and_its_own_judge():
    config = TrainConfig(epochs=[1, 2, 3])
    assert config.epochs == (1, 2, 3)
    with pytest.raises(AttributeError): config.lr = 3


@pytest.mark.real
def test_forty_real_frames_in_a_learner(real_data, tmp_path):
    "Real frames of many sizes: three phases, a prediction at the frame's own size, a run that is extended."
    for kind in ('images', 'masks'): (tmp_path/'data'/kind).mkdir(parents=True)
    for pair in train_pairs(real_data)[::37]:
        for kind, path in (('images', pair.image), ('masks', pair.mask)): (tmp_path/'data'/kind/path.name).symlink_to(path.resolve())
    extract(tmp_path/'data', ['filterbank'], tmp_path/'store', device='cpu')
    model = small_model(student=create_student('unet', width=8))
    learn = difom_learner(parts_of(tmp_path/'data', tmp_path/'store', 96, model), model, distill=Distillation(), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_phases((3, 2, 1), lr=2e-3)
    table = pd.DataFrame(list(learn.recorder.values), columns=learn.recorder.metric_names[1:-1])
    assert table.seg.iloc[-1] < table.seg.iloc[0] and table.l1.iloc[-1] < table.l1.iloc[2]
    picture = train_pairs(tmp_path/'data')[0].image
    assert learn.predict(picture).shape == Image.open(picture).size[::-1]
    run = train(tmp_path/'data', tmp_path/'run', features=tmp_path/'store', **(SHORT | dict(size=96)))
    assert len(read_log(resume(run, epochs=(1, 1, 2), device='cpu'))) == 4


def test_an_optimiser_of_fastais_own_trains_through_the_phases(data, features):
    from fastai.optimizer import Adam
    model = small_model()
    learn = difom_learner(parts_of(data, features, model=model), model, distill=Distillation(), opt_func=Adam)
    with learn.no_bar(), learn.no_logging(): learn.fit_phases((0, 1, 1), lr=1e-3)
    assert len(learn.recorder.values) == 2


def test_an_optimiser_that_overflows_stops(data, tmp_path):
    def huge(logits, mask): return 1e25*segmentation_loss(logits, mask)
    with pytest.raises(InputError, match='epoch 1, no numbers in optimizer'): train(data, tmp_path/'run', loss=huge, **SHORT)


def test_the_command_of_an_extended_run_of_ones_own_student_is_a_call(data, tmp_path):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.head = torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.Conv2d(8, 1, 1)
        def encode(self, x): return [self.down(x)]
        def decode(self, maps): return F.interpolate(self.head(maps[0]), scale_factor=2)
    run = train(data, tmp_path/'run', **(SHORT | dict(student=Own())))
    resume(run, epochs=(1, 1, 2), student=Own(), device='cpu')
    config = json.loads((run/'config.json').read_text())
    assert config['settings']['epochs'] == [1, 1, 2] and len(config['resumed']) == 1
    assert config['command'].startswith('train(') and 'epochs=(1, 1, 2)' in config['command'] and 'Own' in config['command']
