"Networks on a pyramid transformer: they learn, distilled and not, with the published loss; what is saved predicts the same, in ONNX, too."
import json

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from polyp_difom.core import InputError
from polyp_difom.deploy.export import export_onnx
from polyp_difom.deploy.predictor import load_predictor
from polyp_difom.model.latents import find_stages
from polyp_difom.model.model import PolypDiFoM, load_model, predict, save_model
from polyp_difom.published import published_key, published_networks
from polyp_difom.students import ctnet
from polyp_difom.students.blocks import SideOutputs
from polyp_difom.students.registry import create_student
from polyp_difom.training.contrastive import ctnet_loss, draw_pixels
from polyp_difom.training.losses import output_loss, structure_loss
from polyp_difom.training.runs import train

SMALL = {
    'polyp_pvt': dict(backbone='pvt_v2_b0', width=8),
    'pvt_cascade': dict(backbone='pvt_v2_b0'),
    'ctnet': dict(backbone='mit_b0', width=8),
}
LOSS = {
    'polyp_pvt': 'structure',
    'pvt_cascade': 'structure',
    'ctnet': ctnet_loss,
}
FINEST = { # stage of the decoder at stride 8 and 4 that L2 learns at
    'polyp_pvt': {8: 'aggregate', 4: 'details.reduce'},
    'pvt_cascade': {8: 'convs.1', 4: 'convs.0'},
    'ctnet': {8: 'collect', 4: 'head.0'}, # and not the contrast head, which predicts nothing
}


def small(name):
    torch.manual_seed(0)
    return create_student(name, pretrained=False, **SMALL[name])


def blob(size, *corner):
    "Masks of two images, a square of a quarter of the side in each."
    mask = torch.zeros(2, 1, size, size)
    for i, at in enumerate(corner): mask[i, :, at:at + size//4, at:at + size//4] = 1
    return mask


@pytest.mark.parametrize('name', SMALL)
def test_every_weight_gets_a_finite_gradient(name):
    model = PolypDiFoM(small(name)).train()
    outputs = model(torch.rand(2, 3, 96, 96))
    output_loss(outputs, blob(96, 10, 40), LOSS[name]).backward()
    idle = {key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    still = {key for key, p in model.named_parameters() if key not in idle and not p.grad.any() and not key.endswith('bias')} # a bias before a batch norm
    assert not idle and not still


@pytest.mark.parametrize('name', SMALL)
def test_in_evaluation_there_is_one_map_of_any_size(name):
    model = PolypDiFoM(small(name)).eval()
    with torch.no_grad():
        for size in ((50, 70), (32, 32), (33, 31)): assert model(torch.rand(1, 3, *size)).shape == (1, 1, *size)
        x = torch.rand(1, 3, 64, 64)
        outputs = model.student((x - model.mean)/model.std)
        torch.testing.assert_close(model(x), sum(outputs))


@pytest.mark.parametrize('latents', ['free', 'paper', None])
@pytest.mark.parametrize('name', SMALL)
def test_a_tiny_run_learns_and_predicts_what_it_saved(name, latents, data, features, tmp_path):
    options = dict(features=features, latents=latents) if latents else {}
    run = train(data, tmp_path/'run', f'{name},' + ','.join(f'{k}={v}' for k, v in SMALL[name].items()), pretrained=False, size=64, epochs=(0, 1, 0) if latents else (1, 0, 0),
                batch_size=8, valid=0.25, scales=(1.,), loss=LOSS[name], device='cpu', **options)
    lines = (run/'log.csv').read_text().splitlines()
    log = [dict(zip(lines[0].split(','), line.split(','))) for line in lines[1:]]
    assert len(log) == 1 and all(np.isfinite(float(log[0][column])) for column in ('seg', 'valid_loss', *(('l1', 'l2') if latents else ())))
    assert json.loads((run/'config.json').read_text())['settings']['student'] == name
    model, picture = load_model(run), Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    save_model(model, tmp_path/'again.safetensors')
    np.testing.assert_array_equal(predict(load_model(tmp_path/'again.safetensors'), picture, 64), predict(model, picture, 64))


@pytest.mark.parametrize('name', SMALL)
def test_the_high_frequencies_are_learnt_late_in_the_decoder(name):
    student = small(name)
    places = {stride: stage.place for stride, stage in find_stages(student, student.channels, student.strides).items()}
    for stride, place in FINEST[name].items(): assert (places[stride] + '.').startswith(place + '.')


@pytest.mark.parametrize('name', SMALL)
def test_onnx_gives_the_same_map(name, tmp_path):
    model = PolypDiFoM(small(name))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d): module.running_mean.normal_(0, .2); module.running_var.uniform_(.5, 1.5)
    (tmp_path/'run').mkdir()
    save_model(model, tmp_path/'run'/'best.safetensors')
    (tmp_path/'run'/'config.json').write_text(json.dumps(dict(settings=dict(student='x', options={}, distilled=False, size=64, epochs=[1, 0, 0], seed=0))))
    report = export_onnx(tmp_path/'run', tmp_path/'model.onnx')
    assert report['max_difference'] < 1e-4 and report['dice'] >= .999
    frame = np.random.default_rng(0).integers(0, 256, (90, 50, 3), dtype=np.uint8)
    probability, = onnxruntime.InferenceSession(tmp_path/'model.onnx').run(None, {'image': frame})
    np.testing.assert_allclose(probability, load_predictor(tmp_path/'run', device='cpu')(frame), atol=1e-4)
    assert probability.std() > 1e-4


@pytest.mark.parametrize('name', SMALL)
def test_norms_and_drop_path_of_the_backbone_are_the_published_ones(name):
    "What outputs cannot show."
    student = create_student(name, pretrained=False)
    layers = {key: module.eps for key, module in student.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    coarse = ('attn.norm', 'patch_embed.norm', 'downsample.norm')
    assert layers and all(eps == (1e-5 if key.endswith(coarse) else 1e-6) for key, eps in layers.items())
    batch = [module for module in student.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(module.eps, module.momentum) for module in batch} == {(1e-5, .1)}
    blocks = [block for stage in range(4) for block in student.encoder[f'stages_{stage}'].blocks]
    assert len(blocks) == (28 if name == 'ctnet' else 16)
    np.testing.assert_allclose([getattr(block.drop_path1, 'drop_prob', 0.) for block in blocks], np.linspace(0, .1, len(blocks)), atol=1e-6)


def test_backbone_weights_of_segformer(tmp_path, monkeypatch):
    "From a file in their authors' names, and from the hub, which has no weights in timm."
    student, renames = small('ctnet'), published_networks['ctnet'].renames
    theirs = {published_key(f'encoder.{k}', renames).removeprefix('backbone.'): v for k, v in student.encoder.state_dict().items()}
    assert {'patch_embed2.proj.weight', 'block1.0.attn.kv.weight', 'norm4.bias'} <= set(theirs)
    torch.save(theirs | {'head.weight': torch.zeros(1000, 256), 'head.bias': torch.zeros(1000)}, tmp_path/'mit.pth')
    asked = []
    monkeypatch.setattr(ctnet, 'hf_hub_download', lambda *given: asked.append(given) or tmp_path/'mit.pth')
    monkeypatch.setattr(ctnet, 'heed_offline', lambda: None)
    for pretrained in (tmp_path/'mit.pth', True):
        loaded = create_student('ctnet', **SMALL['ctnet'], pretrained=pretrained)
        assert all(torch.equal(a, b) for a, b in zip(loaded.encoder.state_dict().values(), student.encoder.state_dict().values()))
    assert asked == [('smp-hub/mit_b0.imagenet', 'model.safetensors')]
    def away(*given): raise OSError('no\nroute')
    monkeypatch.setattr(ctnet, 'hf_hub_download', away)
    with pytest.raises(InputError, match='pretrained weights of mit_b0: the hub cannot be reached .no route.; give a local file'): create_student('ctnet', **SMALL['ctnet'])


def test_a_shared_interaction_meets_three_maps_in_a_step():
    student = small('ctnet').train()
    student(torch.rand(2, 3, 96, 96))
    assert {part.norm.num_batches_tracked.item() for part in student.interact.children()} == {3} == {student.collect.up[1].bn.num_batches_tracked.item()}
    assert student.up[1].bn.num_batches_tracked == 1


def test_the_published_structure_loss():
    logits = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 1, 64, 64)).astype(np.float32))
    mask = torch.zeros(2, 1, 64, 64); mask[0, 0, 16:48, 20:50] = 1; mask[1, 0, 5:15, 30:60] = 1; mask[1, 0, 15:17, 30:60] = .5
    np.testing.assert_allclose([structure_loss(logits, mask), structure_loss(logits, mask, weighted=True)], [1.568173, 1.572422], atol=2e-6)


def test_the_contrastive_loss_is_that_of_the_enlarged_embedding():
    "Against the long way: enlarge, pick, sum pair by pair."
    embedding = torch.nn.functional.normalize(torch.randn(2, 8, 24, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    mask, logits = blob(96, 10, 40), torch.zeros(2, 1, 96, 96)
    outputs = torch.nn.functional.interpolate(embedding, size=(96, 96), mode='bilinear', align_corners=True).flatten(2)
    torch.manual_seed(3)
    drawn = draw_pixels(mask)
    rows = [(outputs[i][:, pixel], int(value)) for i, value, pixels in drawn for pixel in pixels]
    f, classes = torch.stack([row for row, _ in rows]).double(), torch.tensor([value for _, value in rows])
    s = (f @ f.T/.1).exp()
    total = 0
    for i in range(len(f)):
        partner = (classes == classes[i]) & (torch.arange(len(f)) != i)
        total += -(s[i, partner]/(s[i, partner] + s[i, classes != classes[i]].sum())).log().mean()
    torch.manual_seed(3)
    loss = ctnet_loss(SideOutputs([logits], embedding=embedding), mask) - structure_loss(logits, mask)
    np.testing.assert_allclose(loss, .1*(.1/.07)*total/len(f), rtol=1e-4)
