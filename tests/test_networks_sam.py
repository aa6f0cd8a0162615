"SAM-Mamba: the scan at its edges, what learns and what does not, SAM's weights from anywhere, training, saving, ONNX."
import json

import pytest
import torch
import torch.nn.functional as F
from polyp_difom.core import InputError
from polyp_difom.data.images import train_pairs
from polyp_difom.data.loaders import PolypDataset, polyp_dataloaders
from polyp_difom.deploy.export import export_onnx
from polyp_difom.model.model import PolypDiFoM, load_model, save_model
from polyp_difom.students.registry import create_student
from polyp_difom.students.sam_mamba import Adapter, build_sam
from polyp_difom.students.selective_scan import Mamba, selective_scan
from polyp_difom.training.learner import difom_learner
from polyp_difom.training.losses import OutputLoss, output_loss, structure_loss, whole_outputs
from polyp_difom.training.runs import train

SMALL = dict(variant='tiny', image_size=64, prior_width=4, adapter_width=16)


def small(**options):
    torch.manual_seed(0)
    return create_student('sam_mamba', **(SMALL | dict(pretrained=False) | options))


def awake(student):
    "The same, with adapters that add something."
    for adapter in student.adapters: torch.nn.init.constant_(adapter.scale, .1)
    return student


# ---- the scan

def test_a_long_scan_in_single_precision_is_the_loop_in_double():
    torch.manual_seed(0)
    b, L, d, n = 2, 1000, 3, 4
    inputs = [torch.randn(b, L, d), F.softplus(torch.randn(b, L, d)), -torch.arange(1., n + 1).repeat(d, 1), torch.randn(b, L, n), torch.randn(b, L, n), torch.ones(d)]
    inputs = [t.requires_grad_() for t in inputs]
    x, delta, A, B, C, D = [t.detach().double().requires_grad_() for t in inputs]
    state, steps = torch.zeros(b, d, n).double(), []
    for t in range(L):
        state = (delta[:, t, :, None]*A).exp()*state + (delta[:, t]*x[:, t])[..., None]*B[:, t, None]
        steps.append((state*C[:, t, None]).sum(-1) + D*x[:, t])
    loop, found = torch.stack(steps, 1), selective_scan(*inputs)
    torch.testing.assert_close(found.double(), loop, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(torch.autograd.grad(found.square().mean(), inputs), torch.autograd.grad(loop.square().mean(), (x, delta, A, B, C, D))):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('delta', [0., 1e-30, 1e4, 1e30])
def test_steps_of_any_size_neither_overflow_nor_spoil_a_gradient(delta):
    inputs = [torch.randn(1, 300, 2), torch.full((1, 300, 2), delta), -torch.ones(2, 3), torch.randn(1, 300, 3)/max(delta, 1), torch.randn(1, 300, 3), torch.ones(2)]
    inputs = [t.requires_grad_() for t in inputs]
    found = selective_scan(*inputs)
    assert found.isfinite().all()
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(found.sum(), inputs))


def test_a_block_computes_its_scan_in_single_precision_under_autocast():
    torch.manual_seed(0)
    block, x = Mamba(16), torch.randn(2, 144, 16)
    with torch.autocast('cpu', torch.bfloat16): low = block(x)
    torch.testing.assert_close(low.float(), block(x), rtol=.1, atol=5e-3)


# ---- the network

def test_an_adapter_asks_the_message_first_and_then_the_stream():
    "The order of the framework figure, in plain formulas."
    torch.manual_seed(0)
    adapter, x, message = Adapter(8, 4, 2), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    def attend(part, query, source):
        query, source, found = part.norm_query(query), part.norm_source(source), []
        for head in (slice(0, 2), slice(2, 4)):
            q, k, v = (layer(t)[:, head] for layer, t in ((part.query, query), (part.key, source), (part.value, source)))
            found.append((q @ k.T/2**.5).softmax(1) @ v)
        return part.out(torch.cat(found, 1))
    stream, m = x.reshape(6, 8), message.reshape(6, 8)
    v = attend(adapter.ask_stream, attend(adapter.ask_message, stream, m), stream)
    torch.nn.init.normal_(adapter.scale)
    added, answer = adapter(x, message)
    torch.testing.assert_close(answer.reshape(6, 8), v)
    torch.testing.assert_close(added, x + adapter.scale*answer)


def test_every_weight_that_should_learn_has_a_gradient_and_no_other():
    student = awake(small()).train()
    images, masks = torch.randn(2, 3, 64, 96), (torch.rand(2, 1, 64, 96) > .7).float()
    output_loss(student(images), masks, student.loss).backward()
    for name, p in student.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        assert p.grad is None or p.grad.isfinite().all(), name
    still = {name for name, p in student.named_parameters() if p.requires_grad and not p.grad.any()}
    assert not {name for name in still if 'key.bias' not in name and 'k_proj.bias' not in name}, 'softmax does not feel a bias of all keys'


def test_a_mask_prompt_passes_a_gradient_unless_it_is_detached():
    image = torch.randn(1, 3, 64, 64)
    slope = lambda student: torch.autograd.grad(student(image)[-1].sum(), student.pseudo_mask[-1].weight, allow_unused=True)[0]
    assert slope(small().eval()).any()
    assert slope(small(detach_prompt=True).eval()) is None
    logits, probability = small().eval()(image), small(prompt='probability').eval()(image)
    assert torch.equal(logits[0], probability[0]) and not torch.equal(logits[1], probability[1])


def test_a_literal_reading_of_the_sequence_and_an_encoder_that_learns():
    student = small(sequence='vector', frozen=False, learn_prompt=True)
    output_loss(student(torch.randn(2, 3, 64, 64)), torch.ones(2, 1, 64, 64)).backward()
    assert student.image_encoder.pos_embed.grad is not None and student.prompt_encoder.mask_downscaling[0].weight.grad is not None
    assert student.prior.saliency.mamba.in_proj.weight.shape[1] == 3*4


def test_in_bfloat16_the_map_is_nearly_that_of_single_precision():
    student, image = awake(small()).eval(), torch.rand(1, 3, 64, 96)
    with torch.no_grad(): plain, low = (PolypDiFoM(student, precision=precision).eval()(image).sigmoid() for precision in ('fp32', 'bf16'))
    torch.testing.assert_close(low, plain, rtol=0, atol=.02)


# ---- SAM's weights

def sam_file(path, image_size=64):
    torch.manual_seed(1)
    sam = build_sam('tiny', image_size)
    for parameter in sam.parameters(): torch.nn.init.normal_(parameter, std=.2)
    torch.save(sam.state_dict(), path)
    return sam


def test_weights_for_another_image_size_are_fitted(tmp_path):
    sam = sam_file(tmp_path/'sam.pth', 128)
    student, image = small(pretrained=tmp_path/'sam.pth').eval(), torch.randn(1, 3, 64, 64)
    same = small(image_size=128, pretrained=tmp_path/'sam.pth').eval()
    assert student.image_encoder.pos_embed.shape == (1, 4, 4, 32)
    with torch.no_grad(): torch.testing.assert_close(student.encode(image)[0], same.encode(image)[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(same.mask_decoder.mask_tokens.weight, sam.mask_decoder.mask_tokens.weight)


def test_a_file_that_lacks_a_part_of_sam_is_refused(tmp_path):
    sam = sam_file(tmp_path/'sam.pth')
    torch.save(sam.image_encoder.state_dict(), tmp_path/'encoder.pth')
    with pytest.raises(InputError, match='encoder.pth: not weights of this network: it lacks image_encoder'): small(pretrained=tmp_path/'encoder.pth')
    torch.save({key: value for key, value in sam.state_dict().items() if 'mask_tokens' not in key}, tmp_path/'part.pth')
    with pytest.raises(InputError, match='it lacks mask_decoder.mask_tokens.weight'): small(pretrained=tmp_path/'part.pth')


def test_the_hub_out_of_reach_ends_in_one_line(monkeypatch, data, tmp_path):
    def download(repository, file): raise OSError(f'cannot find\n{repository} {file}')
    monkeypatch.setattr('huggingface_hub.hf_hub_download', download)
    with pytest.raises(InputError) as told: train(data, tmp_path/'run', 'sam_mamba')
    line = str(told.value)
    assert 'facebook/sam-vit-base' in line and '--backbone-weights FILE' in line and '\n' not in line
    assert not (tmp_path/'run').exists()
    with pytest.raises(InputError, match='nobody has trained variant tiny'): train(data, tmp_path/'run', 'sam_mamba,variant=tiny')


# ---- training

def options(**given): return dict(size=64, batch_size=4, valid=0.2, device='cpu', pretrained=False) | given


@pytest.mark.parametrize('latents', [None, 'paper', 'free'])
def test_it_trains_distilled_and_undistilled_and_saves_nothing_of_the_teachers(latents, data, features, tmp_path):
    spec = 'sam_mamba,variant=tiny,image_size=64,prior_width=4,adapter_width=16'
    given = options(epochs=(0, 1, 1) if latents else (1, 0, 0), preset='paper', augment='none') | (dict(features=features, latents=latents) if latents else {})
    run = train(data, tmp_path/'run', spec, **given)
    assert json.loads((run/'config.json').read_text())['settings']['loss'] == 'structure-weighted'
    model = load_model(run)
    assert model.kind == (latents if latents == 'paper' else None)
    save_model(model, tmp_path/'again.safetensors')
    image = torch.rand(1, 3, 50, 70)
    with torch.no_grad(): assert torch.equal(load_model(tmp_path/'again.safetensors')(image), model(image))


def test_two_stages_as_published_and_a_frozen_encoder(data):
    "First the pseudo-mask teaches prior and adapters, then the prediction teaches the decoder, too; SAM's encoder is the same in the end."
    whole = lambda i: whole_outputs()(lambda outputs, mask: structure_loss(outputs[i], mask, weighted=True))
    pairs, student = train_pairs(data), small()
    dls = polyp_dataloaders(PolypDataset(pairs[:4], 64), PolypDataset(pairs[4:6], 64), 2, (1.,), torch.device('cpu'))
    learn = difom_learner(dls, PolypDiFoM(student), whole(0))
    states = [{name: p.detach().clone() for name, p in student.named_parameters()}]
    for loss in (whole(0), whole(-1)):
        learn.loss_func = OutputLoss(loss)
        with learn.no_bar(), learn.no_logging(): learn.fit_phases((2, 0, 0), 1e-3)
        states.append({name: p.detach().clone() for name, p in student.named_parameters()})
    moved = lambda a, b: {name.split('.')[0] for name in a if not torch.equal(a[name], b[name])}
    assert moved(*states[:2]) == {'prior', 'adapters', 'pseudo_mask'}
    assert {'prior', 'adapters', 'mask_decoder'} <= moved(*states[1:]) and not {'image_encoder', 'prompt_encoder'} & moved(states[0], states[2])
    assert sum(len(group['params']) for group in learn.opt.opt.param_groups) == sum(p.requires_grad for p in student.parameters())


def test_onnx_gives_the_same_map(data, tmp_path):
    torch.manual_seed(0)
    model = PolypDiFoM(awake(small()), 'paper')
    (tmp_path/'run').mkdir()
    save_model(model, tmp_path/'run'/'best.safetensors')
    settings = dict(student='sam_mamba', options={}, distilled=True, size=64, epochs=[1, 0, 0], seed=0)
    (tmp_path/'run'/'config.json').write_text(json.dumps(dict(settings=settings)))
    report = export_onnx(tmp_path/'run', tmp_path/'model.onnx', images=data/'TestDataset/Synthetic')
    assert report['max_difference'] < 1e-4 and report['dice'] >= .999
