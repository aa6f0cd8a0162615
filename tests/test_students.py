"Every student takes the same road: a distilled and an undistilled step, three phases, save, load, predict."
import copy

import pytest
import torch
from fastai.callback.core import Callback
from polyp_difom.features.store import teachers
from polyp_difom.core import InputError
from polyp_difom.data.images import list_pairs, train_folder
from polyp_difom.training.losses import latent_loss, output_loss
from polyp_difom.model.model import PolypDiFoM, load_model, save_model
from polyp_difom.students.registry import create_student
from polyp_difom.students import blocks
from polyp_difom.students.blocks import encoder_modules, student_registry, timm_encoder
from polyp_difom.training.learner import make_learner

SMALL = {'unet': dict(width=4), 'unetpp': dict(width=4), 'pranet': dict(width=8), 'emcadnet': dict(backbone='pvt_v2_b0'),
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
    model = PolypDiFoM(student, distilled)
    before, kept = copy.deepcopy(model.state_dict()), {}
    images, masks = torch.rand(2, 3, 64, 96), (torch.rand(2, 1, 64, 96) > .7).float()
    if distilled: model.latents.register_forward_hook(lambda module, inputs, output: kept.update(latents=output))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(2): # what starts at zero, the fusion or a backbone's last batch norms, lets gradients through from the second step on
        loss = output_loss(model(images), masks, student.loss)
        if distilled: loss = loss + sum(latent_loss(latent, torch.ones_like(latent)) for latent in kept['latents'])
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    idle = {key for key, p in model.named_parameters() if p.grad is None} # last norms of a backbone that the decoder does not use
    moved = {key for key, p in model.named_parameters() if not torch.equal(before[key], p)}
    assert not moved & idle and len(idle) < 0.05*len(before), idle
    assert len(moved) >= 0.9*(len(list(model.parameters())) - len(idle)), 'a dead ReLU may hold some back'

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
    class Watch(Callback):
        order = 98
        def after_train(self): states.append({k: v.clone() for k, v in self.model.student.state_dict().items()})
    pairs = list_pairs(train_folder(data))
    learn = make_learner(PolypDiFoM(student), pairs[:6], pairs[6:8], features, size=64, epochs=(1, 1, 1), batch_size=3, device='cpu', scales=(1.,), cbs=[Watch()])
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-3)
    inside = {id(t) for module in encoder_modules(student) for t in [*module.parameters(), *module.buffers()]}
    encoder = {name for name, t in student.state_dict(keep_vars=True).items() if id(t) in inside}
    moved = lambda a, b: {name for name in a if not torch.equal(a[name], b[name])}
    assert moved(states[0], states[1]) & encoder and not moved(states[1], states[2]) & encoder
    assert moved(states[1], states[2]) - encoder
    assert all(p.requires_grad for p in student.parameters()), 'thawed when the run is over'


def test_pretrained_weights_out_of_reach_end_in_one_line(monkeypatch, data, fails, tmp_path):
    def offline(*args, pretrained=False, **options): raise OSError('cannot find\nthe files in the local cache')
    monkeypatch.setattr(blocks.timm, 'create_model', offline)
    line = fails('train', data, '--student', 'pranet', '--out', tmp_path/'run')
    assert 'res2net50d' in line and '--backbone-weights FILE' in line and '--no-pretrained' in line
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('resolves, proxies, offline', [(False, {}, True), (True, {}, False), (False, dict(https='http://proxy'), False)])
def test_a_machine_without_a_network_does_not_wait_for_one(monkeypatch, resolves, proxies, offline):
    def getaddrinfo(*args):
        if not resolves: raise OSError('Name or service not known')
    monkeypatch.setattr(teachers.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(teachers.socket, 'getaddrinfo', getaddrinfo)
    monkeypatch.setattr(teachers, 'getproxies', lambda: proxies)
    teachers.heed_offline()
    assert teachers.constants.HF_HUB_OFFLINE == offline


def test_backbone_weights_of_a_file(tmp_path, data, polyp_difom, fails):
    weights = timm_encoder('pvt_v2_b2', False).state_dict()
    torch.save({k.replace('stages_', 'stages.'): v for k, v in weights.items()}, tmp_path/'pvt.pth')
    loaded = create_student('emcadnet', pretrained=tmp_path/'pvt.pth')
    assert all(torch.equal(a, b) for a, b in zip(loaded.encoder.state_dict().values(), weights.values()))
    assert loaded.config['options'] == dict(pretrained=str(tmp_path/'pvt.pth'))
    assert 'not backbone weights of res2net50d' in fails('train', data, '--student', 'pranet', '--backbone-weights', tmp_path/'pvt.pth', '--out', tmp_path/'run')


def test_mutation_and_losses_reach_training(data, tmp_path, fails, polyp_difom):
    common = ['--student', 'unetpp', '--width', '2', '--size', '32', '--epochs', '1', '0', '0', '--device', 'cpu']
    result = polyp_difom('train', data, *common, '--loss', 'structure-weighted', '--mutation', '--out', tmp_path/'run')
    assert result.returncode == 0, result.err
    assert '"name": "structure-weighted"' in (tmp_path/'run'/'config.json').read_text()
    assert 'choose bce-dice' in fails('train', data, *common, '--loss', 'focal', '--out', tmp_path/'other')


def test_a_network_without_encode_is_refused():
    with pytest.raises(InputError, match='has no method encode'): PolypDiFoM(torch.nn.Conv2d(3, 1, 1))
