"The method: free latents, soft masks, phases and balances, teachers that run beside the student, and that a resumed run is exact with all of them."
import re
import warnings

import fastai.callback.progress  # adds no_bar to Learner
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import Learner
from polyp_difom.core import InputError
from polyp_difom.data.images import train_pairs
from polyp_difom.data.loaders import PolypDataset, polyp_dataloaders
from polyp_difom.model.latents import output_of
from polyp_difom.model.model import PolypDiFoM, load_model, save_model
from polyp_difom.students.registry import create_student
from polyp_difom.teachers.base import Teacher
from polyp_difom.training.callbacks import (Distillation, EncoderFreeze, EpochLog, EpochSeed, PhaseSchedule, TargetWatch, adam, dice_score, learner_tensors,
                                            StepDecay, load_callback_tensors, phase_restarts)
from polyp_difom.training.learner import load_learner_tensors
from polyp_difom.targets.soft_masks import confidence, sharpen
from polyp_difom.training.learner import TrainConfig
from polyp_difom.training.losses import OutputLoss, latent_loss, relational_kl_loss, segmentation_loss, soft_mask_loss
from polyp_difom.training.teaching import EMATeacher, HeadroomWatch, LiveTeacher, NothingToTeach

STUDENTS = {'unet': dict(width=4), 'unetpp': dict(width=4), 'pranet': {}, 'emcadnet': dict(backbone='pvt_v2_b0'), 'smp/Unet-resnet18': {}}


class Targets:
    "Made-up targets that an image decides: LFC on 4x4 cells, HFC on 16x16."
    def __init__(self, images): self.images = images
    def __getitem__(self, i):
        grey = F.avg_pool2d(self.images[i].float().mean(0, keepdim=True)[None]/64 - 2, 4)
        smooth = F.interpolate(F.avg_pool2d(grey, 4), size=(16, 16), mode='bilinear')
        return [part[0].expand(3, -1, -1).half().numpy() for part in (F.avg_pool2d(grey, 4), grey - smooth)]


def parts(data, targets=True, unlabelled=4, soft=True, valid=True):
    "Six labelled frames, some without labels, and four for validation."
    pairs = train_pairs(data)
    train = PolypDataset(pairs[:6], 64, unlabelled=[pair.image for pair in pairs[6:6 + unlabelled]])
    rest = PolypDataset(pairs[12:], 64)
    torch.manual_seed(5)
    for part in (train, rest):
        if soft: part.soft = torch.randint(0, 256, (len(part), 1, 64, 64), dtype=torch.uint8)
        if targets and (part is train or valid): part.targets = Targets(part.images)
    return train, rest


def learner(data, *cbs, latents='free', **options):
    torch.manual_seed(0)
    model = PolypDiFoM(create_student('unet', width=4), latents)
    dls = polyp_dataloaders(*parts(data, **options), 4, (1.,), torch.device('cpu'), ratio=.5)
    return Learner(dls, model, OutputLoss(), opt_func=adam, lr=3e-3, metrics=dice_score, cbs=[EpochSeed(0), *cbs])


def fit(learn, *arguments, **options):
    with learn.no_bar(), learn.no_logging(): learn.fit(*arguments, **options)
    return learn


def weights(learn): return {name: t.clone() for name, t in learn.model.state_dict().items()}
def same(one, other): return [name for name in one if not torch.equal(one[name], other[name])] == []


# --- free latents --------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', STUDENTS)
def test_free_latents_reach_the_decoder_and_leave_the_plain_student(name, tmp_path):
    torch.manual_seed(0)
    student = create_student(name, pretrained=False, **STUDENTS[name])
    model, x = PolypDiFoM(student, 'free'), torch.rand(2, 3, 64, 64)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    with output_of(model.latents) as heard: outputs = model(x)
    l1, l2 = heard[0]
    low, high = model.target_grids(64)
    assert (l1.shape, l2.shape) == ((2, 64, *low), (2, 64, *high)) and model.high.part == 'decoder' and high[0] > low[0]
    encoder = {id(p) for p in student.parameters()} - {id(p) for p in decoder_parameters(model, x)}
    F.mse_loss(l2, torch.randn_like(l2)).backward(retain_graph=True)
    reached = [p for p in student.parameters() if p.grad is not None and p.grad.any()]
    assert any(id(p) not in encoder for p in reached) and any(id(p) in encoder for p in reached)
    outputs = [outputs] if torch.is_tensor(outputs) else outputs
    (sum(segmentation_loss(output, torch.ones_like(output)) for output in outputs) + latent_loss(l1, torch.ones_like(l1))).backward()
    before = {k: v.clone() for k, v in model.named_parameters()}
    optimiser.step()
    assert [k for k, v in model.named_parameters() if v.grad is not None and v.grad.any() and torch.equal(v, before[k])] == []

    save_model(model, tmp_path/'best.safetensors')
    plain, twin = load_model(tmp_path), PolypDiFoM(create_student(name, pretrained=False, **STUDENTS[name]))
    assert not plain.distilled and plain.latents is None
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in twin.parameters())
    with torch.no_grad(): assert torch.equal(plain(x), model.eval()(x))


def decoder_parameters(model, x):
    "What the maps of `encode` have no gradient for."
    learning = list(model.student.parameters())
    with torch.enable_grad(): total = sum(m.sum() for m in model.student.eval().encode(x - .5))
    slopes = torch.autograd.grad(total, learning, allow_unused=True)
    model.student.train()
    return [p for p, slope in zip(learning, slopes) if slope is None]


def test_heads_go_to_the_stage_that_holds_the_field():
    model = PolypDiFoM(create_student('unet', width=4), 'free', 8)
    assert [model.target_grids(size, field)[1] for size, field in ((128, (14, 14)), (128, (22, 22)), (352, (22, 22)), (128, (99, 99)))] == [(16, 16), (32, 32), (44, 44), (32, 32)]
    with output_of(model.latents) as heard: model(torch.rand(1, 3, 128, 128))
    assert heard[0][1].shape == (1, 8, 32, 32)


def test_a_checkpoint_of_before_is_loaded_as_what_it_was(tmp_path):
    from polyp_difom.weights import save_tensors
    for distilled, latents in ((True, 'paper'), (False, None)):
        torch.manual_seed(1)
        model, x = PolypDiFoM(create_student('unet', width=4), latents), torch.rand(1, 3, 64, 64)
        old = dict(student=model.config['student'], distilled=distilled, channels=model.config['channels'])
        save_tensors(model.state_dict(), tmp_path/'best.safetensors', old)
        again = load_model(tmp_path)
        assert again.kind == latents
        with torch.no_grad(): assert torch.equal(again(x), model.eval()(x))


# --- what a batch teaches ------------------------------------------------------------------------------------------------------------------------

def test_masks_of_unlabelled_rows_are_never_looked_at(data):
    states = []
    for value in (0, 1):
        learn = learner(data, Distillation())
        part = learn.dls.train.dataset
        part.masks[part.n_labelled:] = value
        states.append(weights(fit(learn, 1)))
    assert same(*states)


class Terms(Callback):
    "The losses of every step, and what they were made of."
    order, run_valid = 0, False
    def before_fit(self): self.steps = []
    def after_loss(self):
        told = self.learn.distillation
        self.steps.append(dict(total=self.loss.item(), seg=told.sums['seg'][-1].item(), soft=told.extras.get('soft'), whole=told.whole[0].detach(),
                               **{name: told.sums[name][-1].item() for name in told.sums if name != 'seg' and name != 'soft'}))


@pytest.mark.parametrize('soft_on, first, temperature', [('unlabelled', 2, 1.), ('all', 0, 1.), ('unlabelled', 2, .25)])
def test_the_loss_is_made_of_its_parts(soft_on, first, temperature, data):
    learn = fit(learner(data, Distillation((.6, .2, .3), soft=.5, soft_on=soft_on, confident=True, temperature=temperature), Terms()), 1)
    for step in learn.terms.steps:
        soft = step['soft'][first:]
        masks = soft_mask_loss(step['whole'][first:], sharpen(soft, temperature), confidence(soft)).item()
        assert step['total'] == pytest.approx(.6*step['seg'] + .2*step['l1'] + .3*step['l2'] + .5*masks, rel=1e-4)


def test_a_temperature_keeps_the_verdict_and_takes_the_doubt():
    p = torch.linspace(0, 1, 101, dtype=torch.double)
    sharp = sharpen(p, .5)
    torch.testing.assert_close(sharp[1:-1], p[1:-1]**2/(p[1:-1]**2 + (1 - p[1:-1])**2), atol=1e-6, rtol=0)
    assert ((sharp > .5) == (p > .5)).all() and (confidence(sharp) >= confidence(p) - 1e-3).all()
    for wrong in (0, -1, 'x'):
        with pytest.raises(InputError, match=f'temperature {wrong}'): Distillation(soft=1., temperature=wrong)


def test_every_option_of_a_run_reaches_its_distillation():
    given = dict(balance='gradient', warm_heads=True, ramp=3, supervised_last=True, temperature=.25, soft_on='all', confident=True)
    made = TrainConfig(**given, soft_weight=.7, lambdas=(1, .2, .3)).distillation(True)
    assert {name: getattr(made, name) for name in given} == given and made.soft == .7 and made.lambdas == (1, .2, .3)


def test_soft_masks_alone_need_no_latents_and_rows_to_teach(data):
    learn = fit(learner(data, Distillation(soft=1.), Terms(), latents=None, targets=False), 1)
    assert learn.recorder.metric_names[4:6] == ['seg', 'soft'] and learn.terms.steps[0]['total'] > .6*learn.terms.steps[0]['seg']
    with pytest.raises(InputError, match="soft_on='all'"): fit(learner(data, Distillation(soft=1.), latents=None, targets=False, unlabelled=0), 1)
    fit(learner(data, Distillation(soft=1., soft_on='all'), latents=None, targets=False, unlabelled=0), 1)


def test_side_outputs_are_cut_to_labelled_rows(data):
    learn = learner(data, Distillation(soft=1.), latents=None, targets=False)
    learn.model = PolypDiFoM(create_student('unetpp', width=2, deep_supervision=True))
    seen = []
    learn.loss_func = OutputLoss(lambda logits, mask: seen.append((len(logits), len(mask))) or segmentation_loss(logits, mask))
    fit(learn, 1)
    assert seen[:4] == [(2, 2)]*4


# --- phases --------------------------------------------------------------------------------------------------------------------------------------

def test_warm_heads_learn_in_phase_one_and_nothing_else_does(data):
    states = [weights(fit(learner(data, PhaseSchedule((2, 0, 0)), Distillation(warm_heads=warm)), 2)) for warm in (False, True)]
    moved = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert moved and all(name.startswith('latents.') for name in moved)


def test_weights_rise_over_the_ramp_and_phase_three_is_segmentation(data):
    learn = learner(data, PhaseSchedule((1, 3, 1)), Distillation((.6, .2, .2), ramp=2, supervised_last=True), Terms())
    steps = fit(learn, 5).terms.steps
    n = len(steps)//5
    shares = [(step['total'] - .6*step['seg'])/(.2*(step['l1'] + step['l2'])) for step in steps[n:4*n]]
    assert shares == pytest.approx([min(1, (i + 1)/(2*n)) for i in range(3*n)], abs=1e-3)
    assert all(step['total'] == step['seg'] for step in [*steps[:n], *steps[4*n:]])


@pytest.mark.parametrize('latents, distilled', [(None, []), ('free', [Distillation]), ('paper', [])])
def test_both_arms_freeze_in_phase_three(latents, distilled, data):
    states = []
    class Keep(Callback):
        def after_train(self): states.append(weights(self.learn))
    fit(learner(data, PhaseSchedule((0, 1, 1)), EncoderFreeze(), *(cb() for cb in distilled), Keep(), latents=latents, targets=bool(distilled), soft=False, unlabelled=4 if distilled else 0), 2)
    moved = {name.split('.')[1] for name in states[0] if not torch.equal(states[0][name], states[1][name]) and name.startswith('student.')}
    assert 'decoder' in moved and 'encoder' not in moved


def test_the_rate_restarts_with_each_phase_also_in_a_resumed_fit(data):
    rates = []
    class Keep(Callback):
        run_valid, order = False, 61
        def before_batch(self): rates.append(self.opt.hypers[-1]['lr'])
    learn = learner(data, latents=None, targets=False, soft=False, unlabelled=0)
    fit(learn, 4, cbs=[phase_restarts((1, 2, 1), 1e-3), Keep()])
    whole, n = rates[:], len(rates)//4
    assert whole[0] == whole[n] == whole[3*n] == pytest.approx(4e-5) and max(whole) <= 1e-3
    rates.clear()
    fit(learn, 4, start_epoch=2, cbs=[phase_restarts((1, 2, 1), 1e-3), Keep()])
    assert rates == whole[2*n:]


def test_the_rate_falls_to_a_tenth_also_in_a_resumed_fit(data):
    rates = []
    class Keep(Callback):
        run_valid, order = False, 61
        def before_batch(self): rates.append(self.opt.hypers[-1]['lr'])
    for start in (0, 2):
        rates.clear()
        fit(learner(data, latents=None, targets=False, soft=False, unlabelled=0), 4, start_epoch=start, cbs=[StepDecay(1e-3, every=3), Keep()])
        n = len(rates)//(4 - start)
        assert rates == pytest.approx([1e-3]*n*(3 - start) + [1e-4]*n)


# --- balance -------------------------------------------------------------------------------------------------------------------------------------

def test_a_balanced_weight_is_a_share_of_the_gradient(data):
    class Norms(Callback):
        order, run_valid = -8, False # before the distillation adds its terms
        def after_loss(self):
            if self.iter or self.epoch: return
            told = self.learn.distillation
            self.seg, self.l1, self.deepest = self.loss_grad, latent_loss(told.outputs[0], told.extras['low']), told.deepest
            norm = lambda loss: torch.autograd.grad(loss, self.deepest, retain_graph=True)[0].norm().item()
            self.found = norm(self.seg), norm(self.l1)
            self.deepest = told.read[-1] # HFC is learnt elsewhere
            self.fine = norm(self.seg), norm(latent_loss(told.outputs[1], told.extras['high']))
    class First(Callback):
        run_valid = False
        def after_loss(self):
            if not (self.iter or self.epoch): self.used = self.learn.distillation.weights()
    learn = fit(learner(data, Distillation((1, .3, .2), soft=.4, balance='gradient'), Norms(), First()), 1)
    seg, l1 = learn.norms.found
    assert learn.first.used['l1']*l1 == pytest.approx(.3*seg, rel=1e-3)
    seg, l2 = learn.norms.fine
    assert learn.first.used['l2']*l2 == pytest.approx(.2*seg, rel=1e-3)
    assert set(learn.distillation.ratios) == {'l1', 'l2', 'soft'} and {'weight_l1', 'weight_soft'} <= set(learn.recorder.metric_names)


def test_the_balance_stays_when_the_encoder_is_frozen(data):
    fit(learner(data, PhaseSchedule((0, 1, 2)), EncoderFreeze(), Distillation(soft=1., balance='gradient')), 3)


# --- distances -----------------------------------------------------------------------------------------------------------------------------------

def test_relational_kl_is_relaxed_for_l2():
    from polyp_difom.training.losses import find_distances
    torch.manual_seed(0)
    latent, target = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    low, high = find_distances('relational-kl')
    assert low(latent, target) > 2*high(latent, target)
    assert relational_kl_loss(3*target, target).item() == pytest.approx(0, abs=1e-6)


# --- watches -------------------------------------------------------------------------------------------------------------------------------------

def test_held_out_r2_and_the_mean_map(data):
    learn = fit(learner(data, Distillation((1, 1, 1)), TargetWatch(), EpochLog()), 2)
    row, names = learn.epoch_log.rows[-1], ('valid_r2_l1', 'valid_r2_l2', 'mean_r2_l1', 'mean_r2_l2')
    assert all(row[name] < 1 for name in names)
    train, valid = (torch.stack([torch.as_tensor(part.targets[i][0]).float() for i in range(len(part))]) for part in (dl.dataset for dl in (learn.dls.train, learn.dls.valid)))
    spread = (valid - valid.mean((0, 2, 3), keepdim=True)).square().sum()
    given = train.mean(0)
    expected = 1 - ((valid - given).square().sum()/spread).item()
    again = fit(learner(data, Distillation((1, 1, 1)), TargetWatch(mean_maps=(given, torch.zeros(3, 16, 16))), EpochLog()), 1)
    assert again.epoch_log.rows[0]['mean_r2_l1'] == pytest.approx(expected, abs=1e-4)
    with torch.no_grad():
        learn.model.eval()
        with output_of(learn.model.latents) as heard: learn.model(learn.dls.valid.dataset.images.float()/255)
    error = (heard[0][0][:, :3] - valid).square().sum()
    assert row['valid_r2_l1'] == pytest.approx(1 - (error/spread).item(), abs=1e-3)
    bare = fit(learner(data, Distillation(), TargetWatch(), EpochLog(), valid=False), 1)
    assert not {'valid_r2_l1', 'mean_r2_l1'} & set(bare.epoch_log.rows[0])


@pytest.mark.parametrize('good', [True, False])
def test_nothing_to_teach_is_told_once(good, data):
    learn = learner(data, Distillation(soft=1.), HeadroomWatch(), EpochLog())
    part = learn.dls.valid.dataset
    part.soft = 255*part.masks[:, None] if good else 255*(1 - part.masks[:, None])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        fit(learn, 2)
    told = [str(w.message) for w in caught if w.category is NothingToTeach]
    assert len(told) == (0 if good else 1) and all(re.match(r'headroom -?\d', line) and '\n' not in line for line in told)
    assert learn.epoch_log.rows[0]['teacher_dice'] == pytest.approx(1 if good else 0, abs=1e-4)
    assert learn.headroom_watch.best == pytest.approx(max(row['valid_dice'] for row in learn.epoch_log.rows), abs=1e-4)


def test_a_student_that_has_caught_up_is_told_apart_from_a_poor_teacher(data):
    "The student's Dice is made up: .4 in phase I, then .7; the teacher has .69."
    learn = learner(data, PhaseSchedule((1, 2, 0)), Distillation(soft=1.), HeadroomWatch(), EpochLog())
    class Made(Callback):
        order = -4.9 # behind the watch's own sums
        def after_loss(self):
            if not self.training: self.learn.headroom_watch.sums = torch.tensor([.69, .4 if self.epoch == 0 else .7 - self.epoch/100, 1.], dtype=torch.double)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        fit(learn, 3, cbs=Made())
    told, = [str(w.message) for w in caught if w.category is NothingToTeach]
    assert told.startswith("headroom 0.0 points") and "the student's 0.690; after phase I it was 0.400; what is still to be learnt takes a better teacher" in told


# --- teachers beside the student -----------------------------------------------------------------------------------------------------------------

class Bright(Teacher):
    "Calls bright what is a polyp."
    def features(self, x): return torch.cat([F.avg_pool2d(20*(x.mean(1, keepdim=True) - .5), 4)]*3, 1)


def test_a_live_teacher_sees_what_the_student_sees(data):
    seen = []
    class Keep(Callback):
        order, run_valid = -7.2, False
        def before_batch(self): seen.append((self.x, self.yb[1]['soft']))
    learn = fit(learner(data, Distillation(soft=1.), LiveTeacher(Bright('bright', 64)), Keep(), targets=False, soft=False), 1)
    for image, soft in seen:
        expected = F.interpolate(F.avg_pool2d(20*(image.mean(1, keepdim=True) - .5), 4), scale_factor=4, mode='bilinear').sigmoid()
        assert torch.allclose(soft, expected, atol=1e-5)
    assert 0 < learn.live_teacher.values['teacher_share'] < 1
    assert not any('teacher' in name for name in learner_tensors(learn))


def test_mixup_leaves_labelled_frames_alone_and_needs_others(data):
    plain, mixed = [], []
    for seen, mixup in ((plain, 0.), (mixed, 1.)):
        class Keep(Callback):
            order, run_valid = -7.2, False
            def before_batch(self): seen.append(self.x)
        fit(learner(data, Distillation(soft=1.), LiveTeacher(Bright('bright', 64), mixup), Keep(), targets=False, soft=False), 1)
    assert torch.equal(plain[0][:2], mixed[0][:2]) and not torch.equal(plain[0][2:], mixed[0][2:])
    with pytest.raises(InputError, match='batch has none'): fit(learner(data, Distillation(), LiveTeacher(Bright('bright', 64), 1.), targets=False, soft=False, unlabelled=0), 1)
    with pytest.raises(InputError, match='frequency targets of a blend'): fit(learner(data, Distillation(), LiveTeacher(Bright('bright', 64), 1.)), 1)


# --- a resumed run is exact ----------------------------------------------------------------------------------------------------------------------

def cases(): # name -> callbacks
    return {'ema': [Distillation(soft=1.), EMATeacher(refresh=2, decay=.9)], 'balance': [Distillation(soft=1., balance='gradient')],
            'ramp and warm heads': [PhaseSchedule((1, 2, 1)), Distillation(warm_heads=True, ramp=2)]}


@pytest.mark.parametrize('name', cases())
@pytest.mark.parametrize('done', [2, 3])
def test_a_resumed_run_is_exact(name, done, data):
    whole = fit(learner(data, *cases()[name], EpochLog()), 4)
    begun, kept = learner(data, *cases()[name]), {}
    class Interrupt(Callback):
        order = 90
        def after_epoch(self):
            if self.epoch + 1 == done:
                kept.update({k: v.clone() for k, v in learner_tensors(self.learn).items()})
                raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(begun, 4, cbs=Interrupt())
    resumed = learner(data, *cases()[name])
    load_learner_tensors(resumed, kept, 'last.safetensors')
    fit(resumed, 4, start_epoch=done)
    ours, theirs = learner_tensors(resumed), learner_tensors(whole)
    assert ours.keys() == theirs.keys() and [k for k in ours if not torch.equal(ours[k], theirs[k])] == []
    if name == 'ema':
        assert any(k.startswith('callback.ema_teacher.kept.') for k in kept) == (done > 2)
        assert torch.equal(resumed.dls.train.dataset.soft, whole.dls.train.dataset.soft), 'the teacher\'s own again'


def test_what_a_distance_draws_changes_no_picture(data):
    class Keep(Callback):
        order, run_valid = -7.2, False
        def before_fit(self): self.seen = []
        def before_batch(self): self.seen.append(self.x.clone())
    seen = [fit(learner(data, Distillation(distance=distance), Keep()), 2).keep.seen for distance in ('mse', 'relational')]
    assert all(torch.equal(one, other) for one, other in zip(*seen))


def test_early_averages_forget_the_random_beginning(data):
    class Keep(Callback):
        order, run_valid = 99, False
        def before_fit(self): self.states = [weights(self.learn)]
        def after_step(self): self.states.append(weights(self.learn))
    learn = fit(learner(data, Distillation(soft=1.), EMATeacher(refresh=9), Keep()), 2)
    name = next(name for name, p in learn.model.named_parameters() if p.ndim == 4)
    average, *states = [state[name] for state in learn.keep.states]
    for steps, state in enumerate(states, 1): average = average + (state - average)*9/(10 + steps) # 1 - (1 + steps)/(10 + steps)
    torch.testing.assert_close(learn.ema_teacher.average[name], average, rtol=1e-4, atol=1e-6)


def test_an_ema_teacher_changes_what_is_learnt(data):
    with_ema, without = (weights(fit(learner(data, Distillation(soft=1.), *cbs), 4)) for cbs in ([EMATeacher(refresh=2, decay=.9)], []))
    assert not same(with_ema, without)
