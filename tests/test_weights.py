"Weights and what comes with them, from files that may be damaged or a stranger's."
import json
import struct

import pytest
import torch
from polyp_difom.core import InputError
from polyp_difom.model import model as model_module
from polyp_difom.model.config import check_config, make_fitting
from polyp_difom.model.model import PolypDiFoM, load_model, save_model
from polyp_difom.published import load_published
from polyp_difom.students.registry import create_student
from polyp_difom.teachers.registry import create_teacher
from polyp_difom.weights import read_tensors, read_weights, save_tensors
from safetensors.torch import save_file


@pytest.fixture
def small(tmp_path):
    "A checkpoint of a small U-Net."
    save_model(PolypDiFoM(create_student('unet', width=2), 'paper'), tmp_path/'model.safetensors')
    return tmp_path/'model.safetensors'


def told(path, **changes):
    "The checkpoint with other metadata."
    tensors, metadata = read_tensors(path)
    save_tensors(tensors, path, metadata | changes)
    return path


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('name', ['student.head.weight', 'student.encoder.0.1.running_var', 'latents.low.bias'])
def test_a_model_that_is_not_finite_is_not_loaded(small, name, value):
    tensors, metadata = read_tensors(small)
    tensors[name].reshape(-1)[-1] = value
    save_tensors(tensors, small, metadata)
    for read in (read_tensors, load_model):
        with pytest.raises(InputError, match=rf'model.safetensors: weights that are not finite \({name}\)'): read(small)


def test_weights_of_others_that_are_not_finite_are_not_loaded(tmp_path):
    weights = {'head': torch.tensor([1., float('nan')])}
    torch.save(dict(state_dict=weights), tmp_path/'a.pth'); save_file(weights, tmp_path/'a.safetensors')
    for name in ('a.pth', 'a.safetensors'):
        with pytest.raises(InputError, match=f'{name}: weights that are not finite'): read_weights(tmp_path/name)
    with pytest.raises(InputError, match='a.pth: weights that are not finite'): load_published('pranet', tmp_path/'a.pth')
    with pytest.raises(InputError, match='a.safetensors: weights that are not finite'): create_teacher(f'timm/mobilenetv2_050={tmp_path}/a.safetensors')


def test_a_value_that_only_float64_holds_is_not_finite(tmp_path):
    save_tensors({'wide': torch.tensor(1e300, dtype=torch.float64)}, tmp_path/'a.safetensors', {})
    with pytest.raises(InputError, match='not finite'): read_tensors(tmp_path/'a.safetensors')


@pytest.mark.parametrize('spoil', [lambda b: b[:len(b)//2], lambda b: b[:7], lambda b: b'', lambda b: struct.pack('<Q', 2**62) + b[8:], lambda b: struct.pack('<Q', 2**31) + b[8:],
                                   lambda b: b[:8] + b'\xff' + b[9:], lambda b: b'PK\x03\x04' + b])
def test_a_damaged_file_is_named_in_one_line(small, spoil):
    small.write_bytes(spoil(small.read_bytes()))
    for read in (read_tensors, load_model, read_weights):
        with pytest.raises(InputError, match='model.safetensors: (corrupt|not a readable)') as error: read(small)
        assert '\n' not in str(error.value) and len(str(error.value)) < len(str(small)) + 160


STRANGE = [('smp/Unet-tu-resnet18', dict(checkpoint_path='/etc/passwd')), ('smp/Unet-tu-resnet18', dict(pretrained_cfg='x')), ('smp/Unet-tu-resnet18', dict(pretrained_cfg_overlay={'file': 'x'})),
           ('smp/Unet-tu-resnet18', dict(cache_dir='x')), ('smp/Unet-resnet18', dict(encoder_weights='imagenet')), ('smp/Unet-resnet18', dict(encoder_name='resnet34')),
           ('emcadnet', dict(backbone='hf-hub:somebody/something')), ('emcadnet', dict(backbone='local-dir:/etc')), ('emcadnet', dict(checkpoint_path='x')), ('unet', dict(width=10**9)),
           ('unet', dict(width=float('nan'))), ('unet', dict(width=[[[1]]])), ('unet', 'width'), ('unet', None), ('unett', {}), ('smp/', {}), ('smp/Unet-tu-hf-hub:a/b', {}), (3, {}), ('unet,width=3', {})]


@pytest.mark.parametrize('name, options', STRANGE, ids=lambda value: str(value)[:40])
def test_nothing_is_made_of_a_strangers_options(small, name, options, monkeypatch):
    monkeypatch.setattr(model_module, 'create_student', lambda *a, **k: pytest.fail('made before it was checked'))
    with pytest.raises(InputError, match='model.safetensors: '): load_model(told(small, student=dict(name=name, options=options)))


@pytest.mark.parametrize('changes', [dict(student='unet'), dict(student=[]), dict(latents=1), dict(latents='free'), dict(channels=0), dict(channels=2**40), dict(channels='64'),
                                     dict(student=dict(name='unet', options=dict(width=-2))), dict(student=dict(name='unet', options=dict(width=0))),
                                     dict(student=dict(name='unet', options=dict(width='two'))), dict(student=dict(name='unet', options=dict(width=3)))])
def test_metadata_that_make_no_network_are_named(small, changes):
    with pytest.raises(InputError, match='model.safetensors: '): load_model(told(small, **changes))


@pytest.mark.parametrize('text', [None, '{', '[]', '3', 'null', '['*50_000, '{}', '{"student": null, "distilled": false, "channels": null}'])
def test_metadata_that_are_none_are_named(small, text):
    tensors, _ = read_tensors(small)
    save_file(tensors, small, {'polyp_difom': text} if text else None)
    with pytest.raises(InputError, match='model.safetensors: '): load_model(small)


def test_a_network_is_compared_before_it_takes_memory(small):
    tensors, _ = read_tensors(small)
    devices = []
    def make():
        devices.append(torch.empty(0).device.type)
        return PolypDiFoM(create_student('unet', width=4 if len(devices) < 2 else 2), 'paper')
    with pytest.raises(InputError, match='does not fit the network it names'): make_fitting(make, tensors, small)
    assert devices == ['meta']
    assert len(make_fitting(make, tensors, small).state_dict()) == len(tensors) and devices == ['meta', 'meta', 'cpu']


@pytest.mark.parametrize('spec', ['unet,width=2', 'unetpp,width=2,deep_supervision=True', 'emcadnet,backbone=pvt_v2_b0,activation=relu6', 'smp/Unet-resnet18,decoder_channels=[32, 16, 16, 8, 8]'.replace(', ', ';'),
                                  'smp/Segformer-mit_b0', 'smp/FPN-tu-mobilenetv3_small_050,drop_path_rate=0.1'])
def test_what_was_trained_is_loaded_again(spec, tmp_path):
    name, *options = spec.split(',')
    options = {key: json.loads(value.replace(';', ',')) if value[0] in '[0123456789' else True if value == 'True' else value for key, value in (o.split('=') for o in options)}
    model = PolypDiFoM(create_student(name, pretrained=False, **options), 'paper')
    save_model(model, tmp_path/'model.safetensors')
    again = load_model(tmp_path/'model.safetensors')
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert again.config == model.config


@pytest.mark.parametrize('student', ['unet', 'unetpp', 'pranet', 'emcadnet', 'smp/Unet-resnet18', 'smp/Unet-tu-resnet18', 'smp/DPT', 'smp/Segformer'])
def test_no_option_that_reads_or_asks_is_known(student):
    for option in ('checkpoint_path', 'pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir', 'encoder_weights', 'encoder_name', 'self', 'kwargs', 'file', 'url', 'hf_hub_id'):
        with pytest.raises(InputError, match=option): check_config(dict(student=dict(name=student, options={option: 'x'}), distilled=True, channels=None), 'model.safetensors')
