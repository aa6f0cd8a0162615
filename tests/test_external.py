"Networks of segmentation_models_pytorch as students."
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from polyp_difom.core import InputError
from polyp_difom.students.blocks import crop, encoder_modules, pad_to_multiple
from polyp_difom.students.external import smp_student

NAMES = ['smp/Unet-resnet18', 'smp/FPN-resnet18', 'smp/DeepLabV3Plus-resnet18', 'smp/PSPNet-resnet18', 'smp/Segformer-mit_b0',
         'smp/DPT-tu-vit_tiny_patch16_224', 'smp/UnetPlusPlus-tu-mobilenetv3_small_050']
LIGHT = {'smp/DPT-tu-vit_tiny_patch16_224': dict(decoder_intermediate_channels=(16, 16, 16, 16), decoder_fusion_channels=16)}


@pytest.fixture(params=NAMES)
def student(request):
    torch.manual_seed(0)
    return smp_student(request.param, pretrained=False, **LIGHT.get(request.param, {})).eval()


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'hub'))


@torch.no_grad()
def test_maps_and_logits(student):
    image = torch.randn(1, 3, 70, 90)
    padded = pad_to_multiple(image, max(student.strides))
    height, width = padded.shape[-2:]
    maps = student.encode(padded)
    assert [tuple(m.shape) for m in maps] == [(1, c, height//s, width//s) for c, s in zip(student.channels, student.strides)]
    logits = student.decode(maps)
    assert logits.shape == (1, 1, height, width)
    assert torch.equal(student(image), crop(logits, 70, 90))


@torch.no_grad()
def test_equal_to_smp(student):
    image = torch.randn(2, 3, 64, 96)
    assert torch.equal(student(image), student.model(image))


def test_the_deepest_map_matters(student):
    with torch.no_grad(): maps = student.encode(torch.randn(1, 3, 96, 96))
    fused = torch.randn_like(maps[-1]).to(memory_format=torch.channels_last).requires_grad_() # what a convolution hands over
    logits = student.decode([*maps[:-1], fused])
    logits.square().mean().backward()
    assert fused.grad.abs().sum() > 0
    assert not torch.allclose(logits, student.decode(maps), rtol=1e-3, atol=1e-3*logits.std().item())


def test_what_is_frozen(student):
    "Everything in smp's encoder that has a part in the maps."
    modules = encoder_modules(student)
    assert student.model.encoder in modules and student.model.segmentation_head not in modules


@pytest.mark.parametrize('encoder', ['resnet18', 'tu-mobilenetv3_small_050'])
def test_unreachable_hub(encoder, no_hub):
    with pytest.raises(InputError, match=f'pretrained weights of {encoder}: the hub cannot be reached.*--backbone-weights FILE.*--no-pretrained'):
        smp_student(f'smp/Unet-{encoder}')
    with pytest.raises(InputError, match='dept'): smp_student(f'smp/Unet-{encoder}', dept=3)


def test_own_encoder_from_a_file(tmp_path):
    file = tmp_path/'encoder.pth'
    weights = smp.encoders.get_encoder('resnet18').state_dict()
    torch.save(weights | {'fc.weight': torch.zeros(1000, 512), 'fc.bias': torch.zeros(1000)}, file)
    encoder = smp_student('smp/DeepLabV3-resnet18', file).model.encoder
    assert all(torch.equal(v, weights[k]) for k, v in encoder.state_dict().items())
    del weights['layer1.0.conv1.weight']
    torch.save(weights, file)
    with pytest.raises(InputError, match=r'not backbone weights of resnet18: it lacks.* layer1\.0\.conv1\.weight$'): smp_student('smp/Unet-resnet18', file)


@pytest.mark.parametrize('name', ['smp/FPN-tu-mobilenetv3_small_050', 'smp/DPT-tu-vit_tiny_patch16_224'])
def test_timm_encoder_from_a_file(name, tmp_path):
    file, network = tmp_path/'encoder.pth', name.split('-tu-')[1]
    torch.save(timm.create_model(network).state_dict(), file)
    encoder = smp_student(name, str(file), **LIGHT.get(name, {})).model.encoder.model.state_dict()
    weights = torch.load(file)
    shared = [k for k in encoder if k in weights]
    assert len(shared) == len(encoder) and all(torch.equal(encoder[k], weights[k]) for k in shared)
    torch.save({'a': torch.zeros(1)}, file)
    with pytest.raises(InputError, match=f'not backbone weights of tu-{network}'): smp_student(name, file)


@pytest.mark.parametrize('name, options, words', [
    ('smp/Unett-resnet18', {}, 'unknown architecture Unett; nearest: unet'),
    ('smp/Unet-resnet1', {}, 'unknown encoder resnet1; nearest: .*resnet18'),
    ('smp/Unet-tu-resnet1', {}, 'unknown encoder tu-resnet1; nearest: .*tu-resnet18'),
    ('smp/Unet-resnet18', dict(encoder_dept=4), 'unknown option encoder_dept; nearest: encoder_depth'),
    ('smp/Unet-tu-resnet18', dict(encoder_dept=4), 'encoder_dept'),
    ('smp/UnetPlusPlus-mit_b0', {}, 'mit_b0'),
    ('smp/PSPNet-resnet18', dict(encoder_depth=4), r'gives logits \(1, 1, 64, 64\)'),
    ('smp/DPT-resnet18', {}, 'Only Timm encoders'),
    ('smp/DPT-tu-beit_base_patch16_224', {}, "doesn't match model"),
    ('smp/Unet-resnet18', dict(pretrained='missing.pth'), 'missing.pth: no such file'),
])
def test_what_does_not_fit(name, options, words):
    with pytest.raises(InputError, match=words): smp_student(name, **(dict(pretrained=False) | options))
