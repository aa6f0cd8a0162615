"MEGANet and CFA-Net on every road: a step, a run with and without distillation, a file, ONNX."
import json

import pytest
import torch
from torch import nn
from polyp_difom.data.images import list_images
from polyp_difom.deploy.export import export_onnx
from polyp_difom.model.model import PolypDiFoM, load_model, save_model
from polyp_difom.students.blocks import encoder_parameters
from polyp_difom.students.registry import create_student
from polyp_difom.training.boundary import cfanet_loss, meganet_loss
from polyp_difom.training.losses import output_loss
from polyp_difom.training.runs import train

SMALL = {'meganet,backbone=resnet18': meganet_loss, 'cfanet,width=8': cfanet_loss}


def make(spec):
    torch.manual_seed(0)
    return create_student(spec, pretrained=False)


def lively(student):
    "Statistics of a network that has seen images."
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d): module.running_mean.normal_(0, .2); module.running_var.uniform_(.5, 1.5)
    return student


@pytest.mark.parametrize('spec, loss', [*SMALL.items(), ('meganet', meganet_loss)])
def test_every_weight_learns(spec, loss):
    model, (images, masks) = PolypDiFoM(make(spec)), (torch.rand(2, 3, 64, 64), (torch.rand(2, 1, 64, 64) > .7).float())
    loss = output_loss(model(images), masks, loss)
    loss.backward()
    assert loss.isfinite()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


@pytest.mark.parametrize('spec, loss', SMALL.items())
def test_a_size_that_is_padded_learns_in_bfloat16(spec, loss):
    model, (images, masks) = PolypDiFoM(make(spec), precision='bf16'), (torch.rand(2, 3, 70, 90), (torch.rand(2, 1, 70, 90) > .7).float())
    assert output_loss(model(images), masks, loss).isfinite()
    assert output_loss(model.eval()(images), masks, loss).isfinite(), 'in evaluation there is the prediction alone'


@pytest.mark.parametrize('spec', SMALL)
def test_the_encoder_is_the_backbone(spec):
    "Phase III freezes this and nothing else."
    student = make(spec)
    assert {id(p) for p in encoder_parameters(student)} == {id(p) for p in student.encoder.parameters()}
    assert (student.channels[-1], student.strides[-1]) == (max(student.channels), 32)
    assert all(module.eps == 1e-5 for module in student.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.mark.parametrize('spec, loss', SMALL.items())
@pytest.mark.parametrize('latents', [None, 'free', 'paper'])
def test_a_run(spec, loss, latents, data, features, tmp_path):
    distilled = dict(features=features, latents=latents) if latents else {}
    run = train(data, tmp_path/'run', spec, pretrained=False, loss=loss, size=64, epochs=(0, 1, 0), batch_size=6, valid=.2, device='cpu', **distilled)
    log = (run/'log.csv').read_text().splitlines()
    assert len(log) == 2 and ('l2' in log[0].split(',')) == bool(latents)
    model, odd = load_model(run), torch.rand(1, 3, 50, 70)
    save_model(model, tmp_path/'again.safetensors')
    with torch.no_grad():
        assert model(odd).shape == (1, 1, 50, 70)
        assert torch.equal(load_model(tmp_path/'again.safetensors')(odd), model(odd))


@pytest.mark.parametrize('spec', SMALL)
def test_onnx(spec, data, tmp_path):
    save_model(PolypDiFoM(lively(make(spec)), 'paper'), tmp_path/'best.safetensors')
    (tmp_path/'config.json').write_text(json.dumps(dict(settings=dict(student=spec, options={}, distilled=True, size=64, epochs=[1, 0, 0], seed=0))))
    report = export_onnx(tmp_path, tmp_path/'model.onnx', images=list_images(data)[:2])
    assert report['max_difference'] < 1e-4 and report['dice'] >= .999
