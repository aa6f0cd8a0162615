"SANet, MSNet and M²SNet take the road of every student: gradients, a run with and without latents, a file, a graph; and what their notebooks cannot show alone."
import copy
import json

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from polyp_difom.data.colour_exchange import colour_exchange, to_lab
from polyp_difom.data.images import list_images, read_image
from polyp_difom.data.synthetic import synthetic_frame
from polyp_difom.deploy.export import export_onnx
from polyp_difom.deploy.predictor import load_predictor
from polyp_difom.model.model import PolypDiFoM, load_model, save_model
from polyp_difom.students.blocks import timm_encoder
from polyp_difom.students.registry import create_student
from polyp_difom.students.sanet import correct_probability
from polyp_difom.training.losses import output_loss
from polyp_difom.training.lossnet import lossnet_loss
from polyp_difom.training.runs import train
from polyp_difom.weights import read_tensors
from torch import nn

NETWORKS = ['sanet', 'msnet', 'm2snet']
RUNS = [('sanet', 'paper'), ('sanet', 'free'), ('msnet', 'free'), ('m2snet', 'free'), ('m2snet', None)] # latents; what is not here is in test_students


@pytest.fixture(scope='module', params=NETWORKS)
def student(request):
    "A network with drawn weights; not to be changed."
    torch.manual_seed(0)
    return create_student(request.param, pretrained=False)


def test_every_parameter_learns(student):
    net = copy.deepcopy(student).train()
    with torch.no_grad(): # timm starts the last norm of a block at zero, which holds back the gradient of what comes before it
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d): module.weight.uniform_(.5, 1)
    images, masks = torch.randn(2, 3, 64, 96), (torch.rand(2, 1, 64, 96) > .7).float()
    output_loss(net(images), masks, net.loss).backward()
    slopes = {name: p.grad for name, p in net.named_parameters()}
    assert not [name for name, slope in slopes.items() if slope is None or not slope.isfinite().all()]
    still = [name for name, slope in slopes.items() if not slope.any() and not name.endswith('bias')] # a bias in front of a batch norm has no effect
    assert not still


def test_a_batch_is_its_images(student):
    net = copy.deepcopy(student).eval()
    images = torch.randn(2, 3, 70, 90)
    with torch.no_grad(): both, each = net(images), [net(image[None]) for image in images]
    assert both.shape == (2, 1, 70, 90) and torch.allclose(both, torch.cat(each), rtol=1e-3, atol=1e-3*both.std().item())


def test_what_is_saved_is_loaded_and_exported(student, data, tmp_path):
    "With lively statistics, so that the maps are none of a constant."
    torch.manual_seed(0)
    model = PolypDiFoM(copy.deepcopy(student), 'paper')
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d): module.running_mean.normal_(0, .2); module.running_var.uniform_(.5, 1.5); module.weight.data.uniform_(.6, 1)
    for box in [module for module in model.modules() if hasattr(module, 'side')]: box.norm.running_mean.add_(10*box.side**2); box.norm.running_var.mul_(100*box.side**4) # what sums are like
    save_model(model, tmp_path/'best.safetensors')
    settings = dict(student='x', options={}, distilled=True, size=64, epochs=[1, 0, 0], seed=0)
    (tmp_path/'config.json').write_text(json.dumps(dict(settings=settings)))
    again, image = load_model(tmp_path), torch.rand(1, 3, 50, 70)
    with torch.no_grad(): assert torch.equal(again(image), model.eval()(image))

    if type(student).__name__ == 'MSNet': return # what it consists of is in M2SNet, too
    report = export_onnx(tmp_path, tmp_path/'model.onnx', images=data/'TestDataset/Synthetic')
    assert report['max_difference'] < 1e-4
    frame = np.asarray(read_image(list_images(data)[0]).resize((50, 90)))
    probability, = onnxruntime.InferenceSession(tmp_path/'model.onnx').run(None, {'image': frame})
    np.testing.assert_allclose(probability, load_predictor(tmp_path, device='cpu')(frame), atol=1e-4)
    assert probability.std() > 1e-3


@pytest.mark.parametrize('name, latents', RUNS)
def test_a_run(name, latents, data, features, tmp_path):
    "Distilled by the paper's latents and by free ones, and not at all; nothing of the loss or the teachers is in the file."
    loss = None if latents else lossnet_loss(weights=False)
    phases = dict(epochs=(0, 1, 0), features=features, latents=latents) if latents else dict(epochs=(1, 0, 0))
    run = train(data, tmp_path/'run', name, pretrained=False, size=64, batch_size=4, steps=1, loss=loss, device='cpu', precision='fp32', scales=(1,), **phases)
    tensors, _ = read_tensors(run/'best.safetensors')
    settings = json.loads((run/'config.json').read_text())['settings']
    assert settings['distilled'] == (latents is not None)
    assert settings['loss'] == ('polyp_difom.training.lossnet:LossNet' if loss else create_student(name, pretrained=False).loss)
    assert all(key.startswith(('student.', 'latents.', 'fusion.')) for key in tensors) and not any('vgg' in key for key in tensors)
    assert any(key.startswith('latents.') for key in tensors) == (latents == 'paper')
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())


def test_sums_of_m2snet_are_convolutions_with_ones():
    "Function, running statistics after a training step, and gradients are those of convolutions, as published."
    class Dense(nn.Module):
        def __init__(self, box):
            super().__init__()
            self.norm, self.ones = copy.deepcopy(box.norm), torch.ones(64, 64, box.side, box.side, dtype=torch.float64)
        def forward(self, x): return F.relu(self.norm(F.conv2d(x, self.ones, padding=self.ones.shape[-1]//2)))

    torch.manual_seed(0)
    ours = create_student('m2snet', pretrained=False).double().train()
    theirs = copy.deepcopy(ours)
    theirs.box3, theirs.box5 = Dense(ours.box3), Dense(ours.box5)
    maps = [torch.rand(2, c, 64//s, 64//s, dtype=torch.float64, requires_grad=True) for c, s in zip(ours.channels, ours.strides)]
    outputs = [net.decode(maps) for net in (ours, theirs)]
    slopes = [torch.autograd.grad(output.square().mean(), maps) for output in outputs]
    close = lambda a, b: (a - b).norm() < 1e-9*b.norm()
    assert close(*outputs) and all(map(close, *slopes))
    for side in ('box3', 'box5'):
        for statistic in ('running_mean', 'running_var'): assert close(*(getattr(getattr(net, side).norm, statistic) for net in (ours, theirs)))


def test_colour_exchange_is_that_of_opencv():
    "The published road in bytes, with its cast that wraps around, by OpenCV itself."
    cv2 = pytest.importorskip('cv2')
    image, partner = (synthetic_frame(seed)[0][::2, ::2].copy() for seed in (10, 16))
    tensor = lambda frame: torch.from_numpy(frame).permute(2, 0, 1)/255
    lab, other = (cv2.cvtColor(frame, cv2.COLOR_RGB2LAB) for frame in (image, partner))
    assert np.abs(to_lab(tensor(image)).permute(1, 2, 0).numpy() - lab).max() < 2
    statistics = [(x.reshape(-1, 3).mean(0), x.reshape(-1, 3).std(0)) for x in (lab.astype(float), other.astype(float))]
    (m1, s1), (m2, s2) = statistics
    exchanged = (lab - m1)/s1*s2 + m2
    in_bytes = {True: np.trunc(exchanged) % 256, False: exchanged.round().clip(0, 255)}
    theirs = {wrap: cv2.cvtColor(x.astype(np.uint8), cv2.COLOR_LAB2RGB)/255 for wrap, x in in_bytes.items()}
    ours = {wrap: colour_exchange(tensor(image), tensor(partner), wrap=wrap).permute(1, 2, 0).numpy() for wrap in theirs}
    share = lambda a, b: np.mean(np.abs(a - b).max(-1) > .05)
    assert share(theirs[True], theirs[False]) > .1, 'else there is nothing to see'
    for wrap in theirs: assert share(ours[wrap], theirs[wrap]) < .03, wrap # one level more or less may wrap, or not


def test_lossnet_needs_ten_convolutions_of_a_file(tmp_path):
    vgg = timm_encoder('vgg16', False, out_indices=(0, 1, 2, 3))
    torch.save({key.replace('features_', 'features.'): w for key, w in vgg.state_dict().items()}, tmp_path/'vgg16.pth')
    loss = lossnet_loss(tmp_path/'vgg16.pth')
    logits, mask = torch.randn(1, 1, 40, 56, requires_grad=True), (torch.rand(1, 1, 40, 56) > .5).float()
    with torch.no_grad(): alone = sum(F.mse_loss(a, b) for a, b in zip(*(vgg(normalised(x)) for x in (logits.sigmoid(), mask))))
    value = loss(logits, mask)
    assert torch.allclose(value - output_loss(logits, mask, 'structure'), .1*alone, atol=1e-5)
    value.backward()
    assert logits.grad.isfinite().all() and logits.grad.any()


def normalised(x):
    "A map as three colours of ImageNet, 224x224."
    mean, std = (torch.tensor(values)[:, None, None] for values in ((.485, .456, .406), (.229, .224, .225)))
    return F.interpolate((x.repeat(1, 3, 1, 1) - mean)/std, (224, 224), mode='bilinear')


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_probability_correction_moves_no_pixel_over_the_threshold(dtype):
    torch.manual_seed(0)
    logits = (torch.randn(3, 1, 40, 50) - 1.5).to(dtype)
    corrected = correct_probability(logits)
    assert torch.equal(corrected.sign(), logits.sign()) and (corrected.abs() >= logits.abs()).all()
    assert torch.equal(corrected[:1], correct_probability(logits[:1])), 'each image alone'
