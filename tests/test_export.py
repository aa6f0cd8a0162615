"A run as one ONNX file: equal to the predictor, or not there."
import json
import os

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from polyp_difom.core import InputError
from polyp_difom.data.images import list_images, read_image
from polyp_difom.deploy import export
from polyp_difom.deploy.export import compare_onnx, export_onnx, resize_exactly
from polyp_difom.deploy.predictor import Predictor, load_predictor
from polyp_difom.model.model import PolypDiFoM, save_model, to_input
from polyp_difom.students.registry import create_student
from polyp_difom.students.unet import UNet
from torch import nn

SETTINGS = dict(student='x', options={}, distilled=True, size=64, epochs=[1, 0, 0], seed=0)


def make_run(folder, student, distilled=True, size=64):
    "A run of a network with random weights, whose maps are lively: statistics and the latents' join are drawn, too."
    torch.manual_seed(0)
    model = PolypDiFoM(student, 'paper' if distilled else None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d): module.running_mean.normal_(0, .2); module.running_var.uniform_(.5, 1.5)
    if distilled and model.fusion.join: nn.init.normal_(model.fusion.join.weight, std=.05)
    folder.mkdir(exist_ok=True)
    save_model(model, folder/'best.safetensors')
    (folder/'config.json').write_text(json.dumps(dict(settings=SETTINGS | dict(distilled=distilled, size=size))))
    return folder


@pytest.fixture(scope='session')
def run(tmp_path_factory): return make_run(tmp_path_factory.mktemp('export')/'run', create_student('unet', width=4))


@pytest.fixture(scope='session')
def exported(run): # not to be changed
    export_onnx(run, run.parent/'model.onnx')
    return run.parent/'model.onnx'


QUICK = ['unet,width=8', 'emcadnet,backbone=pvt_v2_b0', 'smp/FPN-resnet18']
SLOW = ['unetpp,width=4', 'unetpp,width=4,deep_supervision=True', 'pranet', 'emcadnet', 'smp/Unet-resnet18', 'smp/Segformer-mit_b0', 'smp/UnetPlusPlus-tu-mobilenetv3_small_050',
        'smp/DeepLabV3Plus-mobilenet_v2', 'smp/MAnet-resnet18', 'smp/PSPNet-resnet18']
slow = pytest.mark.skipif('POLYP_DIFOM_SLOW' not in os.environ, reason='slow: POLYP_DIFOM_SLOW=1 runs it')


@pytest.mark.parametrize('distilled', [True, False], ids=['distilled', 'undistilled'])
@pytest.mark.parametrize('spec', QUICK + [pytest.param(spec, marks=slow) for spec in SLOW])
def test_every_student_gives_the_same_map_in_onnxruntime(spec, distilled, data, tmp_path):
    run = make_run(tmp_path/'run', create_student(spec, pretrained=False), distilled)
    report = export_onnx(run, tmp_path/'model.onnx', images=data/'TestDataset/Synthetic')
    assert report['images'] == 3 and report['max_difference'] < 1e-4 and report['dice'] >= .999
    session, predictor = onnxruntime.InferenceSession(tmp_path/'model.onnx'), load_predictor(run, device='cpu')
    for size in ((90, 50), (50, 90), (200, 300), (301, 199), (64, 64), (1, 1), (1, 70)):
        frame = np.asarray(read_image(list_images(data)[0]).resize(size))
        probability, = session.run(None, {'image': frame})
        assert probability.shape == size[::-1] and probability.dtype == np.float32
        np.testing.assert_allclose(probability, predictor(frame), atol=1e-4)
    assert probability.max() <= 1 and probability.min() >= 0


@pytest.mark.parametrize('size', [32, 64, 97, 352])
def test_resizing_is_pillows_to_the_bit(size):
    random = np.random.default_rng(size)
    for width, height in [(1, 1), (2, 3), (1, 900), (900, 1), (size, size), (size, 2*size), (2*size, size), *random.integers(1, 700, (12, 2))]:
        frame = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = (to_input(Image.fromarray(frame), size)*255).round().byte().permute(1, 2, 0)
        assert torch.equal(resize_exactly(torch.from_numpy(frame), size), expected), (width, height)


def test_the_file_says_what_it_is_and_takes_any_size(exported):
    graph = onnx.load(exported)
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    assert facts['size'] == '64' and facts['student'] == '"x"' and facts['distilled'] == 'true' and 'research only' in facts['licence'] and facts['torch'] == torch.__version__
    shape = lambda value: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
    image, = graph.graph.input; probability, = graph.graph.output
    assert (image.name, shape(image), image.type.tensor_type.elem_type) == ('image', ['height', 'width', 3], onnx.TensorProto.UINT8)
    assert (probability.name, shape(probability), probability.type.tensor_type.elem_type) == ('probability', ['height', 'width'], onnx.TensorProto.FLOAT)
    assert not any(tensor.external_data for tensor in graph.graph.initializer)


@pytest.mark.parametrize('spoil', ['resize', 'order', 'normalise', 'sigmoid'])
def test_a_graph_that_differs_leaves_no_file(spoil, run, data, tmp_path, monkeypatch):
    if spoil == 'resize': monkeypatch.setattr(export, 'resize_exactly', lambda image, size: nn.functional.interpolate(image.permute(2, 0, 1)[None].float(), (size, size), mode='bilinear')[0].permute(1, 2, 0))
    if spoil == 'order': monkeypatch.setattr(export, 'resize_exactly', lambda image, size: resize_exactly(image, size).flip(2))
    if spoil == 'sigmoid': monkeypatch.setattr(export, 'to_map', lambda logits, size: nn.functional.interpolate(logits[None, None], size=size)[0, 0])
    if spoil == 'normalise':
        to_graph = export._to_onnx
        def wrong(model, size):
            model.mean += 1e-2
            graph = to_graph(model, size)
            model.mean -= 1e-2
            return graph
        monkeypatch.setattr(export, '_to_onnx', wrong)
    with pytest.raises(InputError, match='model.onnx: not written, the exported network differs from PyTorch'): export_onnx(run, tmp_path/'model.onnx', images=data/'TestDataset/Synthetic', tolerance=1e-4)
    assert not list(tmp_path.iterdir())


def test_equal_probabilities_are_not_enough(): # maps may be near while masks are not
    report = dict(images=1, max_difference=1e-6, dice=.998)
    with pytest.raises(InputError, match='Dice of both masks 0.9980'): export._check_equal(report, 1e-3, 'model.onnx')
    export._check_equal(report | dict(dice=1.), 1e-3, 'model.onnx')
    with pytest.raises(InputError): export._check_equal(report | dict(dice=1., max_difference=float('nan')), 1e-3, 'model.onnx')


def test_what_is_there_is_replaced_only_on_request(run, exported, tmp_path):
    (tmp_path/'model.onnx').write_text('mine')
    with pytest.raises(InputError, match='model.onnx: is there already'): export_onnx(run, tmp_path/'model.onnx')
    with pytest.raises(InputError, match='not written'): export_onnx(run, tmp_path/'model.onnx', tolerance=1e-30, overwrite=True)
    assert (tmp_path/'model.onnx').read_text() == 'mine'
    export_onnx(run, tmp_path/'model.onnx', overwrite=True)
    assert compare_onnx(tmp_path/'model.onnx', load_predictor(run, device='cpu'), [np.zeros((9, 9, 3), np.uint8)])['max_difference'] < 1e-5


def test_requests_that_cannot_be_are_refused_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, '_to_onnx', lambda *given: pytest.fail('exported before it was checked'))
    (tmp_path/'folder.onnx').mkdir(); (tmp_path/'link.onnx').symlink_to('nowhere')
    for name in ('folder.onnx', 'link.onnx'):
        with pytest.raises(InputError, match=name): export_onnx(run, tmp_path/name)
    with pytest.raises(InputError, match='folder.onnx'): export_onnx(run, tmp_path/'folder.onnx', overwrite=True)
    for name in ('model.pt', 'model', 'best.safetensors'):
        with pytest.raises(InputError, match='should end in .onnx'): export_onnx(run, tmp_path/name, overwrite=True)
    for tolerance in (0, -1, 1, float('nan')):
        with pytest.raises(InputError, match='tolerance'): export_onnx(run, tmp_path/'model.onnx', tolerance=tolerance)
    with pytest.raises(InputError, match='no run in it'): export_onnx(tmp_path, tmp_path/'model.onnx')


def test_a_student_that_cannot_be_exported_is_named(run, tmp_path):
    class Odd(UNet):
        def decode(self, features): return super().decode(features) if float(features[0].sum()) > 1e9 else -super().decode(features)
    with pytest.raises(InputError, match='student Odd: cannot be exported to ONNX') as error: export_onnx(run, tmp_path/'model.onnx', student=Odd(4))
    assert '\n' not in str(error.value) and not list(tmp_path.iterdir())


def test_frames_that_are_none_are_named(run, tmp_path):
    (tmp_path/'x.png').write_text('no picture')
    for images in (tmp_path/'x.png', [tmp_path/'x.png'], tmp_path/'nowhere'):
        with pytest.raises(InputError, match='x.png|nowhere'): export_onnx(run, tmp_path/'model.onnx', images=images)
    assert not (tmp_path/'model.onnx').exists()


def test_nothing_is_said(run, tmp_path, capfd):
    export_onnx(run, tmp_path/'model.onnx')
    assert capfd.readouterr() == ('', '')


def test_ones_own_student(tmp_path):
    run = make_run(tmp_path/'run', UNet(width=2))
    assert export_onnx(run, tmp_path/'model.onnx', student=UNet(width=2))['max_difference'] < 1e-4


@pytest.mark.real
def test_on_real_frames(run, exported, real_data):
    report = compare_onnx(exported, Predictor(load_predictor(run, device='cpu').model, 64), list_images(real_data)[::100])
    assert report['max_difference'] < 1e-4 and report['dice'] >= .999
