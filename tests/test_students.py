"Every student takes the same road: a distilled and an undistilled step, three phases, save, load, predict."
import copy

import pytest
import timm
import torch
from fastai.callback.core import Callback
import json

from polyp_difom import core
from polyp_difom.core import InputError
from polyp_difom.data.images import train_pairs
from polyp_difom.data.loaders import PolypDataset, polyp_dataloaders
from polyp_difom.features.store import FeatureStore
from polyp_difom.targets.latent import build_targets
from polyp_difom.training.losses import latent_loss, output_loss, segmentation_loss
from polyp_difom.model.model import PolypDiFoM, load_model, save_model
from polyp_difom.students.registry import create_student
from polyp_difom.students.blocks import as_outputs, encoder_modules, student_registry, timm_encoder
from polyp_difom.training.callbacks import Distillation, EpochSeed
from polyp_difom.training.learner import difom_learner
from polyp_difom.training.runs import train

SMALL = {'unet': dict(width=4), 'unetpp': dict(width=4), 'pranet': dict(width=8), 'emcadnet': dict(backbone='pvt_v2_b0'), 'timm-unet': dict(backbone='test_efficientnet', width=8),
         'sanet': {}, 'msnet': {}, 'm2snet': {}, 'polyp_pvt': dict(backbone='pvt_v2_b0', width=8), 'pvt_cascade': dict(backbone='pvt_v2_b0'), 'ctnet': dict(backbone='mit_b0', width=8), 'meganet': dict(backbone='resnet18'), 'cfanet': dict(width=8),
         'sam_mamba': dict(variant='tiny', image_size=64, prior_width=4, adapter_width=16),
         'smp/DPT-tu-vit_tiny_patch16_224': dict(decoder_intermediate_channels=(16, 32, 64, 64), decoder_fusion_channels=16)}
SMP = ['smp/Unet-resnet18', 'smp/UnetPlusPlus-tu-mobilenetv3_small_050', 'smp/FPN-mit_b0', 'smp/DeepLabV3Plus-resnet18', 'smp/MAnet-resnet18',
       'smp/DPT-tu-vit_tiny_patch16_224']


def test_no_student_is_left_out(): assert set(student_registry) <= set(SMALL)


def small(name):
    torch.manual_seed(0)
    return create_student(name, pretrained=False, **SMALL.get(name, {}))


@pytest.mark.parametrize('name, distilled', [(name, True) for name in [*student_registry, *SMP]] + [(name, False) for name in student_registry])
def test_a_step_moves_every_weight_and_what_is_saved_is_loaded(name, distilled, tmp_path):
    student = small(name)
    model = PolypDiFoM(student, 'paper' if distilled else None)
    before, kept = copy.deepcopy(model.state_dict()), {}
    images, masks = torch.rand(2, 3, 64, 96), (torch.rand(2, 1, 64, 96) > .7).float()
    if distilled: model.latents.register_forward_hook(lambda module, inputs, output: kept.update(latents=output))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(2): # what starts at zero, the fusion or a backbone's last batch norms, lets gradients through from the second step on
        loss = output_loss(model(images), masks, student.loss)
        if distilled: loss = loss + sum(latent_loss(latent, torch.ones_like(latent)) for latent in kept['latents'])
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    learning = {key for key, p in model.named_parameters() if p.requires_grad} # SAM's encoder does not
    idle = {key for key, p in model.named_parameters() if key in learning and p.grad is None} # last norms of a backbone that the decoder does not use
    moved = {key for key, p in model.named_parameters() if not torch.equal(before[key], p)}
    assert moved <= learning - idle and len(idle) < 0.05*len(before), idle
    assert len(moved) >= 0.9*(len(learning) - len(idle)), 'a dead ReLU may hold some back'

    model.eval()
    save_model(model, tmp_path/'model.safetensors')
    again = load_model(tmp_path/'model.safetensors')
    odd = torch.rand(1, 3, 50, 70)
    with torch.no_grad():
        assert model(odd).shape == (1, 1, 50, 70)
        assert torch.equal(again(odd), model(odd))


@pytest.mark.parametrize('name', [*student_registry, SMP[0], SMP[-1]])
def test_three_phases_freeze_the_encoder_and_nothing_else(name, data, features):
    student, states = small(name), []
    learning = [p.requires_grad for p in student.parameters()]
    class Watch(Callback):
        order = 98
        def after_train(self): states.append({k: v.clone() for k, v in self.model.student.state_dict().items()})
    pairs, model = train_pairs(data), PolypDiFoM(student, 'paper')
    targets = build_targets(FeatureStore(features), [pair.image for pair in pairs[:6]], model.target_grids(64), model.latents.channels)
    dls = polyp_dataloaders(PolypDataset(pairs[:6], 64, targets), PolypDataset(pairs[6:8], 64), 3, (1.,), torch.device('cpu'))
    learn = difom_learner(dls, model, distill=Distillation(), cbs=[Watch()])
    with learn.no_bar(), learn.no_logging(): learn.fit_phases((1, 1, 1), 1e-3)
    inside = {id(t) for module in encoder_modules(student) for t in [*module.parameters(), *module.buffers()]}
    encoder = {name for name, t in student.state_dict(keep_vars=True).items() if id(t) in inside}
    moved = lambda a, b: {name for name in a if not torch.equal(a[name], b[name])}
    assert moved(states[0], states[1]) & encoder and not moved(states[1], states[2]) & encoder
    assert moved(states[1], states[2]) - encoder
    assert [p.requires_grad for p in student.parameters()] == learning, 'thawed when the run is over'


@pytest.mark.parametrize('name', student_registry)
def test_soft_masks_of_frames_teach_every_student(name, data, features):
    pairs, states = train_pairs(data), []
    for weight in (0., 1.):
        model = PolypDiFoM(small(name), 'free')
        images, soft = [pair.image for pair in pairs[:8]], torch.full((8, 1, 64, 64), 255, dtype=torch.uint8) # the teacher sees polyp everywhere
        part = PolypDataset(pairs[:4], 64, build_targets(FeatureStore(features), images, model.target_grids(64), model.latents.channels), unlabelled=images[4:], soft=soft)
        dls = polyp_dataloaders(part, PolypDataset(pairs[8:10], 64), 4, (1.,), torch.device('cpu'), ratio=.5)
        learn = difom_learner(dls, model, distill=Distillation(lambdas=(1, .1, .1), soft=weight), cbs=[EpochSeed(0)])
        with learn.no_bar(), learn.no_logging(): learn.fit_phases((0, 3, 0), 1e-3, freeze=False)
        states.append(model.student.state_dict())
        frames = torch.stack([part[i][0] for i in range(4, 8)]).float()/255
        with torch.no_grad(): states.append(model.student.merge(as_outputs(model.train()(frames))).mean()) # by the batch's own statistics, which few steps have not yet settled
    assert all(torch.isfinite(x).all() for state in states[::2] for x in state.values())
    assert states[3] > states[1], 'what it says of the frames moves towards the teacher'


def test_pretrained_weights_out_of_reach_end_in_one_line(monkeypatch, data, tmp_path):
    make = timm.create_model
    def offline(*args, pretrained=False, **options):
        if pretrained: raise OSError('cannot find\nthe files in the local cache')
        return make(*args, **options)
    monkeypatch.setattr(timm, 'create_model', offline)
    with pytest.raises(InputError) as told: train(data, tmp_path/'run', 'pranet')
    line = str(told.value)
    assert 'res2net50d' in line and '--backbone-weights FILE' in line and '--no-pretrained' in line
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('resolves, proxies, offline', [(False, {}, True), (True, {}, False), (False, dict(https='http://proxy'), False)])
def test_a_machine_without_a_network_does_not_wait_for_one(monkeypatch, resolves, proxies, offline):
    def getaddrinfo(*args):
        if not resolves: raise OSError('Name or service not known')
    monkeypatch.setattr(core.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(core.socket, 'getaddrinfo', getaddrinfo)
    monkeypatch.setattr(core, 'getproxies', lambda: proxies)
    core.heed_offline()
    assert core.constants.HF_HUB_OFFLINE == offline


def test_backbone_weights_of_a_file(tmp_path, data):
    weights = timm_encoder('pvt_v2_b2', False).state_dict()
    torch.save({k.replace('stages_', 'stages.'): v for k, v in weights.items()}, tmp_path/'pvt.pth')
    loaded = create_student('emcadnet', pretrained=tmp_path/'pvt.pth')
    assert all(torch.equal(a, b) for a, b in zip(loaded.encoder.state_dict().values(), weights.values()))
    assert loaded.config['options'] == dict(pretrained=str(tmp_path/'pvt.pth'))
    with pytest.raises(InputError, match='not backbone weights of res2net50d'): train(data, tmp_path/'run', 'pranet', pretrained=tmp_path/'pvt.pth')


@pytest.mark.parametrize('mutation, calls', [(False, 4), (True, 15)])
def test_mutation_and_losses_reach_training(mutation, calls, data, tmp_path):
    "A student of four outputs: a loss for each of them, or for each of their 15 subsets."
    trained = []
    def loss(logits, mask): trained.append(logits.requires_grad); return segmentation_loss(logits, mask)
    options = dict(size=32, epochs=(1, 0, 0), batch_size=16, valid=0.2, device='cpu')
    run = train(data, tmp_path/'own', 'unetpp,deep_supervision=True', width=2, loss=loss, mutation=mutation, **options)
    assert sum(trained) == calls
    run = train(data, tmp_path/'run', 'unetpp,deep_supervision=True', width=2, loss='structure-weighted', mutation=mutation, **options)
    settings = json.loads((run/'config.json').read_text())['settings']
    assert (settings['loss'], settings['mutation']) == ('structure-weighted', mutation)
    with pytest.raises(InputError, match='choose bce-dice'): train(data, tmp_path/'other', 'unetpp', loss='focal', **options)


def test_a_network_without_encode_is_refused():
    with pytest.raises(InputError, match='has no method encode'): PolypDiFoM(torch.nn.Conv2d(3, 1, 1))
