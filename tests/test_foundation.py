"Foundation models as teachers: tiny ones of the real classes, saved and loaded as a user would."
import json
import subprocess
import sys
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from polyp_difom.core import InputError
from polyp_difom.features.extract import extract
from polyp_difom.features.store import FeatureStore
from polyp_difom.teachers.pretrained import IMAGENET, OPENAI, teacher_table
from polyp_difom.teachers.sam import sam_encoder
from polyp_difom.teachers.tokens import to_patches, tokens_to_map
from polyp_difom.teachers.registry import create_teacher, list_teachers
from polyp_difom.weights import weights_hash

VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
TEXT = dict(**VIT, vocab_size=50, max_position_embeddings=8)
HALF = (0.5,)*3, (0.5,)*3
NONE = (0.,)*3, (1.,)*3


def made(model:str, config:str=None, **options):
    "A tiny model of transformers, or a skip where this version has none."
    kind, settings = (getattr(transformers, name, None) for name in (model, config or model.replace('Model', 'Config')))
    if kind is None: pytest.skip(f'transformers {transformers.__version__} has no {model}')
    return kind(settings(**options)).eval()

def two_towers(family:str, model:str, **vision):
    "A model with a vision and a text tower."
    return made(model, f'{family}Config', vision_config=dict(**VIT, **vision), text_config=TEXT, **({} if family.startswith('Siglip') else dict(projection_dim=32)))

def rows(tokens, leading, side): # (B, leading + side², C) -> (B, C, side, side)
    return tokens[:, leading:].reshape(len(tokens), side, side, -1).permute(0, 3, 1, 2)


# name: spec, model to save, leading tokens, how the whole model is asked for its last hidden state, size, patch, normalisation
CASES = {
    'dinov2': lambda: ('dinov2', made('Dinov2Model', **VIT, image_size=70, patch_size=14), 1, lambda m, x: m(x), 70, 14, IMAGENET),
    'registers': lambda: ('dinov2', made('Dinov2WithRegistersModel', **VIT, image_size=70, patch_size=14, num_register_tokens=4), 5, lambda m, x: m(x), 70, 14, IMAGENET),
    'clip': lambda: ('clip', two_towers('CLIP', 'CLIPModel', image_size=64, patch_size=16), 1, lambda m, x: m.vision_model(x, interpolate_pos_encoding=True), 64, 16, OPENAI),
    'owlvit': lambda: ('owlvit', two_towers('OwlViT', 'OwlViTForObjectDetection', image_size=64, patch_size=16), 1, lambda m, x: m.owlvit.vision_model(x, interpolate_pos_encoding=True), 64, 16, OPENAI),
    'ijepa': lambda: ('ijepa', made('IJepaModel', **VIT, image_size=70, patch_size=14), 0, lambda m, x: m(x, interpolate_pos_encoding=True), 70, 14, IMAGENET),
    'dinov3': lambda: ('hf/dinov3', made('DINOv3ViTModel', **VIT, image_size=64, patch_size=16, num_register_tokens=4), 5, lambda m, x: m(x), 64, 16, IMAGENET),
    'dinov3-convnext': lambda: ('hf/dinov3c', made('DINOv3ConvNextModel', hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=128), 1, lambda m, x: m(x), 128, 32, IMAGENET),
    'siglip': lambda: ('hf/siglip', two_towers('Siglip', 'SiglipModel', image_size=64, patch_size=16), 0, lambda m, x: m.vision_model(x, interpolate_pos_encoding=True), 64, 16, HALF),
    'siglip2': lambda: ('hf/siglip2', two_towers('Siglip2', 'Siglip2Model', num_patches=16, patch_size=16), 0, naflex, 64, 16, HALF),
    'vit': lambda: ('hf/vit', made('ViTForImageClassification', 'ViTConfig', **VIT, image_size=64, patch_size=16), 1, lambda m, x: m.vit(x, interpolate_pos_encoding=True), 64, 16, IMAGENET),
    'swin': lambda: ('hf/swin', made('SwinModel', image_size=128, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4), 0, lambda m, x: m(x), 128, 32, IMAGENET),
    'radio': lambda: ('hf/radio', made('RadioModel', **VIT, image_size=64, patch_size=16, max_img_size=128), 10, lambda m, x: m(x), 64, 16, NONE),
}

def naflex(model, x):
    "The whole SigLIP 2, asked as its processor would."
    side = x.shape[-1]//16
    patches = torch.stack([x[:, :, i*16:(i + 1)*16, j*16:(j + 1)*16].permute(0, 2, 3, 1).flatten(1) for i in range(side) for j in range(side)], 1)
    return model.vision_model(patches, torch.ones(patches.shape[:2], dtype=torch.int), torch.tensor([[side, side]]*len(x)))


@pytest.fixture
def frames():
    "Two frames that no patch divides, 0..1."
    return torch.rand(2, 3, 130, 97, generator=torch.Generator().manual_seed(1))

@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr('transformers.utils.hub.TRANSFORMERS_CACHE', str(tmp_path/'hub'), raising=False)

def seen(frames, size, normalisation):
    "What a model of `size` pixels gets of the frames."
    mean, std = (torch.tensor(values)[:, None, None] for values in normalisation)
    return (F.interpolate(frames, size=(size, size), mode='bilinear', align_corners=False, antialias=True) - mean)/std

def assert_frozen(teacher):
    assert not teacher.train().training and not teacher.model.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher(torch.rand(1, 3, 50, 60, requires_grad=True)).requires_grad

def assert_upright(teacher, size, patch, spread=0):
    "Light in one cell changes the map in that cell most, or `spread` cells beside it; the map is neither transposed nor mirrored."
    dark = torch.full((1, 3, size, size), 0.3)
    side = size//patch
    for i, j in {(0, 0), (0, side - 1), (min(1, side - 1), side//2)}:
        lit = dark.clone()
        lit[:, :, i*patch:(i + 1)*patch, j*patch:(j + 1)*patch] = 0.9
        change = (teacher(lit) - teacher(dark)).square().sum(1)[0]
        row, column = divmod(change.argmax().item(), change.shape[-1])
        assert max(abs(row - i), abs(column - j)) <= spread, ((row, column), (i, j))

def assert_half_precision_keeps_it(teacher, size):
    "bfloat16 changes a map by rounding and no more: on the CPU, and on a GPU where there is one."
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(2)) - 0.5
    with torch.no_grad(): exact = teacher.features(image)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): rounded = teacher.features(image).float()
    agreement = lambda a, b: torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
    assert agreement(exact, rounded) > 0.99
    if torch.cuda.is_available():
        there = teacher.to('cuda')((image + 0.5).cuda()).cpu()
        assert there.dtype == torch.float32 and agreement(teacher.to('cpu')(image + 0.5), there) > 0.99


@pytest.mark.parametrize('case', CASES)
@torch.no_grad()
def test_patch_tokens(case, frames, tmp_path):
    torch.manual_seed(0)
    spec, model, leading, ask, size, patch, normalisation = CASES[case]()
    model.save_pretrained(tmp_path/'weights')
    for side, options in ((size, ''), (2*size, f',size={2*size}')): # its own size, then one with other positions
        teacher = create_teacher(f'{spec}={tmp_path}/weights{options}')
        maps = teacher(frames)
        expected = ask(model, seen(frames, side, normalisation)).last_hidden_state
        assert expected.shape[1] == (side//patch)**2 + leading, 'the leading tokens are as many as stated'
        assert maps.shape == (2, expected.shape[-1], side//patch, side//patch)
        torch.testing.assert_close(maps, rows(expected, leading, side//patch), atol=1e-5, rtol=1e-4)
        assert maps.std((0, 2, 3)).min() > 0
    assert_upright(teacher, 2*size, patch)
    assert_half_precision_keeps_it(teacher, 2*size)
    with torch.enable_grad(): assert_frozen(teacher)


@torch.no_grad()
def test_a_backbone_with_maps(frames, tmp_path):
    model = made('ConvNextModel', hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=128)
    model.save_pretrained(tmp_path/'weights')
    maps = create_teacher(f'hf/convnext={tmp_path}/weights')(frames)
    torch.testing.assert_close(maps, model(seen(frames, 128, IMAGENET)).last_hidden_state)
    assert maps.shape == (2, 32, 4, 4)


def test_tokens_that_are_no_map():
    grid = torch.arange(3*5.)
    torch.testing.assert_close(tokens_to_map(torch.cat([torch.zeros(2), grid])[None, :, None], (3, 5))[0, 0], grid.reshape(3, 5))
    for length in (14, 15 + 100): # too few, as of a masked autoencoder; too many, as of a detector
        with pytest.raises(InputError, match=f'{length} tokens are no map of 3x5 patches'): tokens_to_map(torch.zeros(1, length, 1), (3, 5))

def test_patches_are_rows_of_the_image():
    image = torch.arange(3*4*6.).reshape(1, 3, 4, 6)
    patches = to_patches(image, 2)
    assert patches.shape == (1, 6, 12)
    torch.testing.assert_close(patches[0, 4], image[0, :, 2:4, 2:4].permute(1, 2, 0).flatten())


SWIN = dict(image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4, out_features=['stage1', 'stage2', 'stage3', 'stage4'])
DECODER = dict(hidden_dim=64, num_attention_heads=4, encoder_layers=2, decoder_layers=2, encoder_feedforward_dim=64, dim_feedforward=64, num_queries=5)

def tiny_decoder(name, folder):
    "A whole OneFormer or Mask2Former, with heads; OneFormer's configuration still says that it trains."
    swin = transformers.SwinConfig(**SWIN)
    if name == 'mask2former': settings = dict(feature_size=64, mask_feature_size=64)
    else: settings = dict(conv_dim=64, mask_dim=64, text_encoder_width=64, text_encoder_num_layers=1, text_encoder_vocab_size=99, task_seq_len=7, is_training=True)
    family = dict(mask2former='Mask2Former', oneformer='OneFormer')[name]
    kind = getattr(transformers, f'{family}ForUniversalSegmentation')
    kind(getattr(transformers, f'{family}Config')(backbone_config=swin, **settings, **DECODER)).save_pretrained(folder)
    return kind.from_pretrained(folder, **({} if name == 'mask2former' else dict(is_training=False))).eval()

@pytest.mark.parametrize('name', ['oneformer', 'mask2former'])
@torch.no_grad()
def test_pixel_decoder(name, frames, tmp_path):
    torch.manual_seed(0)
    model = tiny_decoder(name, tmp_path/'weights')
    teacher = create_teacher(f'{name}={tmp_path}/weights,size=128')
    x = seen(frames, 128, IMAGENET)
    if name == 'oneformer': states = model.model(x, torch.zeros(2, 7), output_hidden_states=True).pixel_decoder_hidden_states
    else: states = model.model(x, output_hidden_states=True).pixel_decoder_hidden_states
    assert [128//s.shape[-1] for s in states] == ([4] if name == 'oneformer' else []) + [32, 16, 8]
    torch.testing.assert_close(teacher(frames), states[-1], atol=1e-5, rtol=1e-4)
    assert teacher(frames).shape == (2, 64, 16, 16)
    assert not any('transformer_module' in key or 'text' in key for key in teacher.state_dict())
    assert create_teacher(f'{name}={tmp_path}/weights').size == 512
    assert_upright(teacher, 128, 8)
    assert_half_precision_keeps_it(teacher, 128)
    with torch.enable_grad(): assert_frozen(teacher)


def tiny_sam():
    "A whole SAM of segment-anything, its relative positions not zero."
    encoder = ImageEncoderViT(img_size=128, embed_dim=32, depth=3, num_heads=4, mlp_ratio=2, out_chans=16, use_rel_pos=True, window_size=3, global_attn_indexes=(1,),
                              norm_layer=partial(nn.LayerNorm, eps=1e-6))
    prompts = PromptEncoder(embed_dim=16, image_embedding_size=(8, 8), input_image_size=(128, 128), mask_in_chans=4)
    decoder = MaskDecoder(transformer_dim=16, transformer=TwoWayTransformer(depth=1, embedding_dim=16, mlp_dim=32, num_heads=2))
    for key, value in encoder.named_parameters():
        if 'pos' in key: nn.init.normal_(value, std=0.3)
    return Sam(encoder, prompts, decoder).eval()

def as_transformers(weights):
    "Keys of segment-anything's image encoder as transformers names them."
    names = {'patch_embed.proj.': 'patch_embed.projection.', 'blocks.': 'layers.', '.norm': '.layer_norm', 'neck.0.': 'neck.conv1.', 'neck.1.': 'neck.layer_norm1.',
             'neck.2.': 'neck.conv2.', 'neck.3.': 'neck.layer_norm2.'}
    for old, new in names.items(): weights = {key.replace(old, new): value for key, value in weights.items()}
    return weights

def tiny_sam_config(**vision):
    "The configuration of a whole SAM of transformers."
    vision = dict(hidden_size=32, output_channels=32, num_hidden_layers=2, num_attention_heads=4, image_size=128, num_pos_feats=16, window_size=3, global_attn_indexes=[1], mlp_dim=64) | vision
    return transformers.SamConfig(vision_config=vision, prompt_encoder_config=dict(hidden_size=32, image_size=128, patch_size=16, mask_input_channels=8),
                                  mask_decoder_config=dict(hidden_size=32, mlp_dim=64, num_attention_heads=4, iou_head_hidden_dim=32))

@torch.no_grad()
def test_sam_from_either_side(frames, tmp_path):
    torch.manual_seed(0)
    sam = tiny_sam()
    torch.save(sam.state_dict(), tmp_path/'sam.pth')
    twin = transformers.SamModel(tiny_sam_config(output_channels=16, num_hidden_layers=3))
    twin.vision_encoder.load_state_dict(as_transformers(sam.image_encoder.state_dict()))
    twin.save_pretrained(tmp_path/'sam')

    teacher = create_teacher(f'sam={tmp_path}/sam.pth')
    torch.testing.assert_close(teacher(frames), sam.image_encoder(seen(frames, 128, IMAGENET)), atol=1e-5, rtol=1e-4)
    assert teacher(frames).shape == (2, 16, 8, 8)
    torch.testing.assert_close(create_teacher(f'sam={tmp_path}/sam')(frames), teacher(frames), atol=1e-4, rtol=1e-3)
    larger = [create_teacher(f'sam={tmp_path}/{file},size=192') for file in ('sam.pth', 'sam')]
    torch.testing.assert_close(larger[0](frames), larger[1](frames), atol=1e-4, rtol=1e-3)
    assert larger[0](frames).shape == (2, 16, 12, 12)
    for one, size in ((teacher, 128), (larger[1], 192)):
        assert_upright(one, size, 16, spread=1) # its neck is a 3x3 convolution
        assert_half_precision_keeps_it(one, size)
        with torch.enable_grad(): assert_frozen(one)

@pytest.mark.parametrize('kind', ['vit_b', 'vit_l', 'vit_h'])
def test_every_published_sam_is_recognised(kind):
    with torch.device('meta'):
        real = sam_model_registry[kind]()
        found = sam_encoder(real.state_dict())
    for a, b in zip(found.blocks, real.image_encoder.blocks, strict=True):
        assert (a.window_size, a.attn.num_heads, a.attn.scale) == (b.window_size, b.attn.num_heads, b.attn.scale)
    assert {k: v.shape for k, v in found.state_dict().items()} == {k: v.shape for k, v in real.image_encoder.state_dict().items()}
    assert (found.img_size, found.blocks[0].norm1.eps) == (1024, 1e-6)

@torch.no_grad()
def test_sam_masks(frames, tmp_path):
    torch.manual_seed(0)
    model = transformers.SamModel(tiny_sam_config()).eval()
    model.save_pretrained(tmp_path/'sam')
    teacher = create_teacher(f'sam-masks={tmp_path}/sam')
    logits = model(pixel_values=seen(frames, 128, IMAGENET)).pred_masks
    assert logits.shape == (2, 1, 3, 32, 32)
    torch.testing.assert_close(teacher(frames), logits[:, 0].sigmoid())
    torch.testing.assert_close(create_teacher(f'sam={tmp_path}/sam')(frames), model.get_image_embeddings(seen(frames, 128, IMAGENET)))
    with pytest.raises(InputError, match='sees 128 pixels and nothing else'): create_teacher(f'sam-masks={tmp_path}/sam,size=256')
    with torch.enable_grad(): assert_frozen(teacher)


@pytest.fixture
def dinov2(tmp_path):
    "Folder of a tiny DINOv2."
    torch.manual_seed(0)
    made('Dinov2Model', **VIT, image_size=70, patch_size=14).save_pretrained(tmp_path/'dinov2')
    return tmp_path/'dinov2'

@pytest.mark.parametrize('file, told, expected', [
    ('preprocessor_config.json', dict(image_mean=[.1, .2, .3], image_std=[.4, .5, .6]), ([.1, .2, .3], [.4, .5, .6])),
    ('processor_config.json', dict(image_processor=dict(image_mean=[.1, .2, .3], image_std=[.4, .5, .6])), ([.1, .2, .3], [.4, .5, .6])),
    ('preprocessor_config.json', dict(do_normalize=False, image_mean=[.1, .2, .3], image_std=[.4, .5, .6]), ([0.]*3, [1.]*3)),
    ('preprocessor_config.json', dict(), IMAGENET)])
def test_normalisation_is_the_checkpoints(file, told, expected, dinov2):
    (dinov2/file).write_text(json.dumps(told))
    teacher = create_teacher(f'dinov2={dinov2}')
    assert [*teacher.mean.flatten().tolist(), *teacher.std.flatten().tolist()] == pytest.approx([*expected[0], *expected[1]])
    assert create_teacher(f'dinov2={dinov2},mean=0.25').mean.flatten().tolist() == [.25]*3

def test_what_is_remembered(dinov2):
    teacher = create_teacher(f'dinov2={dinov2},size=84,bfloat16=False')
    assert teacher.provenance == dict(teacher='dinov2', revision=weights_hash(teacher), size=84, mean=teacher.mean.flatten().tolist(), std=teacher.std.flatten().tolist(),
                                      origin='dinov2', bfloat16=False)
    assert not teacher.bfloat16 and create_teacher(f'dinov2={dinov2}').bfloat16
    assert teacher.provenance['revision'] == create_teacher('dinov2', checkpoint=dinov2).provenance['revision']

def test_half_precision_weights_are_brought_to_float32(dinov2):
    transformers.Dinov2Model.from_pretrained(dinov2).half().save_pretrained(dinov2)
    assert {p.dtype for p in create_teacher(f'dinov2={dinov2}').parameters()} == {torch.float32}


def test_unreachable(no_hub):
    for name, price in (('dinov2', 'facebook/dinov2-base (346 MB)'), ('sam', 'facebook/sam-vit-base (375 MB)'), ('ijepa', 'facebook/ijepa_vith14_1k (2523 MB)'),
                        ('mask2former', 'facebook/mask2former-swin-large-coco-panoptic (866 MB)')):
        with pytest.raises(InputError) as told: create_teacher(name)
        line = str(told.value)
        assert line.startswith(f'weights of {name}: {price} is neither a folder here nor reachable (') and f'{name}=FOLDER' in line and '\n' not in line
    with pytest.raises(InputError, match='of which model'): create_teacher('hf/')
    with pytest.raises(InputError, match='nobody/nothing is neither a folder.*hf/NAME=FOLDER'): create_teacher('hf/nobody/nothing')
    with pytest.raises(InputError, match='owner/other is neither a folder'): create_teacher('dinov2=owner/other')

@torch.no_grad()
def test_a_repository(no_hub, tmp_path, frames):
    "What the hub left in its cache is found without it; where it came from is remembered with the commit."
    torch.manual_seed(0)
    model, cached = made('Dinov2Model', **VIT, image_size=70, patch_size=14), tmp_path/'hub/models--facebook--dinov2-base'
    model.save_pretrained(cached/'snapshots'/('0123abcd'*5))
    (cached/'snapshots'/('0123abcd'*5)/'preprocessor_config.json').write_text(json.dumps(dict(image_mean=HALF[0], image_std=HALF[1])))
    (cached/'refs').mkdir()
    (cached/'refs/main').write_text('0123abcd'*5)
    teacher = create_teacher('dinov2')
    assert teacher.settings['origin'] == 'facebook/dinov2-base@' + '0123abcd'*5
    torch.testing.assert_close(teacher(frames), rows(model(seen(frames, 70, HALF)).last_hidden_state, 1, 5), atol=1e-5, rtol=1e-4)

def test_wrong_folders(dinov2, tmp_path):
    (tmp_path/'empty').mkdir()
    (tmp_path/'file.pth').touch()
    torch.save(dict(weight=torch.zeros(2)), tmp_path/'other.pth')
    for spec, text in ((f'dinov2={tmp_path}/nowhere', 'nowhere: no such folder'), (f'dinov2={tmp_path}/empty', 'empty: no config.json in it'),
                       (f'clip={dinov2}', 'is dinov2, not clip; give it as dinov2='), (f'dinov2={tmp_path}/file.pth', 'is a file; dinov2 takes the folder'),
                       (f'sam={tmp_path}/other.pth', 'not a checkpoint of segment-anything: it lacks'), (f'sam={tmp_path}/nowhere.pth', 'no such file')):
        with pytest.raises(InputError, match=text): create_teacher(spec)

def test_weights_that_are_not_all_there(dinov2):
    weights = load_file(dinov2/'model.safetensors')
    del weights['embeddings.cls_token'], weights['layernorm.weight']
    save_file(weights, dinov2/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(InputError, match='not all weights of dinov2: it lacks embeddings.cls_token, layernorm.weight$'): create_teacher(f'dinov2={dinov2}')
    two_towers('CLIP', 'CLIPModel', image_size=64, patch_size=16).save_pretrained(dinov2.with_name('clip'))
    weights = load_file(dinov2.with_name('clip')/'model.safetensors')
    without = lambda tower: {key: value for key, value in weights.items() if not key.startswith(f'{tower}_model.encoder')}
    save_file(without('text'), dinov2.with_name('clip')/'model.safetensors', metadata=dict(format='pt'))
    create_teacher(f'clip={dinov2.with_name("clip")}') # the text tower has no part in the map
    save_file(without('vision'), dinov2.with_name('clip')/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(InputError, match='not all weights of clip: it lacks vision_model.encoder'): create_teacher(f'clip={dinov2.with_name("clip")}')
    (dinov2/'model.safetensors').write_bytes((dinov2/'model.safetensors').read_bytes()[:999])
    with pytest.raises(InputError, match='dinov2: not a checkpoint of transformers'): create_teacher(f'dinov2={dinov2}')
    (dinov2/'model.safetensors').unlink()
    with pytest.raises(InputError, match='dinov2: not a checkpoint of transformers'): create_teacher(f'dinov2={dinov2}')

@pytest.mark.parametrize('option, text', [('size=72', 'size 72 is no multiple of 14; the nearest are 70 and 84'), ('size=3', 'the nearest are 14 and 28'), ('size=large', 'give a number of pixels'),
                                          ('colour=3', 'teacher dinov2: unknown option colour; known: bfloat16, mean, size'), ('colour', 'write option=value'),
                                          ('siz=70', 'unknown option siz; nearest: size'), ('size=-70', 'give a number of pixels up to 8192'), ('size=65000', 'give a number of pixels up to 8192'),
                                          ('size=1000000000', 'option size takes a number up to 65536'), ('bfloat16=no', 'bfloat16 is no; choose True or False'), ('families=clip', 'unknown option families'),
                                          ('std=0', 'std is 0; give a number above 0'), ('mean=red', "mean is 'red'; give a number"), ('name=../up', 'use letters, digits')])
def test_options(option, text, dinov2):
    with pytest.raises(InputError, match=text): create_teacher(f'dinov2={dinov2},{option}')


RADIO = '''
from collections import namedtuple
import torch
from transformers import PretrainedConfig, PreTrainedModel
Output = namedtuple('Output', 'summary features')
class OwnConfig(PretrainedConfig):
    model_type = 'own_radio'
    def __init__(self, patch_size=16, preferred_resolution=(64, 64), **kwargs):
        self.patch_size, self.preferred_resolution = patch_size, preferred_resolution
        super().__init__(**kwargs)
class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.input_conditioner, self.patches = torch.nn.Identity(), torch.nn.Conv2d(3, 8, config.patch_size, config.patch_size)
        self.post_init()
    def forward(self, x):
        features = self.patches(self.input_conditioner(x)).flatten(2).transpose(1, 2)
        return Output(features.mean(1), features)
'''

@torch.no_grad()
def test_a_loader_of_its_own(frames, tmp_path, monkeypatch):
    "As of RADIO: code that comes with the weights runs only if it is trusted; its output is called `features`."
    monkeypatch.setattr('transformers.dynamic_module_utils.HF_MODULES_CACHE', str(tmp_path/'modules'))
    monkeypatch.syspath_prepend(str(tmp_path/'modules'))
    folder = tmp_path/'own'
    folder.mkdir()
    (folder/'own.py').write_text(RADIO)
    (folder/'config.json').write_text(json.dumps(dict(auto_map=dict(AutoConfig='own.OwnConfig', AutoModel='own.OwnModel'), patch_size=16)))
    convolution = nn.Conv2d(3, 8, 16, 16)
    save_file({f'patches.{key}': value for key, value in convolution.state_dict().items()}, folder/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(InputError, match='brings its own code; if you trust it, add the option trust_remote_code=True'): create_teacher(f'hf/own={folder}')
    maps = create_teacher(f'hf/own={folder},trust_remote_code=True')(frames)
    torch.testing.assert_close(maps, convolution(seen(frames, 64, NONE)))


@pytest.mark.parametrize('module', ['teachers.registry', 'students.registry'])
def test_nothing_is_imported_before_it_is_needed(module):
    code = f'''import sys, polyp_difom.{module}, polyp_difom.teachers.pretrained as f; f.teacher_table()
print([m for m in ("transformers", "segment_anything", "timm", "torchvision", "segmentation_models_pytorch", "fastai", "matplotlib") if m in sys.modules])'''
    done = subprocess.run([sys.executable, '-W', 'always', '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]' and 'polyp_difom' not in done.stderr

@pytest.mark.parametrize('name', ['dinov2', 'sam'])
def test_weights_that_are_no_numbers(name, dinov2, tmp_path):
    "From either library; a store would keep the maps of NaNs like any other."
    if name == 'sam': weights, file = {f'image_encoder.{key}': value for key, value in tiny_sam().image_encoder.state_dict().items()}, tmp_path/'sam.pth'
    else: weights, file = load_file(dinov2/'model.safetensors'), dinov2
    key = next(key for key in weights if key.endswith('norm.weight') or key.endswith('norm1.weight'))
    weights[key][0] = float('inf')
    if name == 'sam': torch.save(weights, file)
    else: save_file(weights, dinov2/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(InputError, match=f'{file}: .*not finite.*{key.removeprefix("image_encoder.")}'): create_teacher(f'{name}={file}')


@pytest.mark.parametrize('spec, text', [
    ('filterbank,level=3', 'teacher filterbank: unknown option level; nearest: levels'), ('filterbank,levels=0', 'levels is 0; give a whole number from 1 to 8'),
    ('filterbank,directions=9999', 'directions is 9999; give a whole number from 1 to 64'), ('filterbank,size=39', 'size 39 is too small for 4 levels; the least is 40'),
    ('filterbank=weights.pth', 'teacher filterbank has no weights: leave =weights.pth away'),
    ('timm/resnet18,layers=0', 'layers is 0; give a whole number'), ('timm/resnet18,size=-1', 'size is -1'), ('timm/resnet18,act_laye=relu', 'unknown option act_laye; nearest: act_layer'),
    *((f'timm/resnet18,{option}=x', f'unknown option {option}') for option in ('checkpoint_path', 'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir', 'features_only'))])
def test_options_of_the_other_teachers(spec, text, monkeypatch):
    monkeypatch.setattr('polyp_difom.teachers.timm._create', lambda *_: SimpleNamespace(pretrained_cfg=dict(mean=0., std=1., input_size=(3, 224, 224)), state_dict=dict, prune_intermediate_layers=list))
    with pytest.raises(InputError, match=text): create_teacher(spec)

def test_a_timm_transformer_sees_another_size(tmp_path, frames):
    save_file(timm.create_model('vit_tiny_patch16_224').state_dict(), tmp_path/'vit.safetensors')
    teacher = create_teacher(f'timm/vit_tiny_patch16_224={tmp_path}/vit.safetensors,size=64')
    assert teacher(frames).shape == (2, 2*192, 4, 4)
    assert teacher.provenance['revision'] == create_teacher(f'timm/vit_tiny_patch16_224={tmp_path}/vit.safetensors').provenance['revision']

def test_the_table_lists_what_there_is(polyp_difom):
    names = {row['name'].replace('…', '') for row in teacher_table()}
    assert names == set(list_teachers())
    printed = polyp_difom('teachers')
    assert printed.returncode == 0
    for row in teacher_table(): assert all(str(row[key]) in printed.out for key in ('name', 'map', 'checkpoint', 'licence') if row[key])


def test_extraction(data, dinov2, tmp_path, monkeypatch):
    "Two models one after the other; the same weights from elsewhere go on with a store, others are refused."
    alive, at_start = weakref.WeakSet(), []
    def watched(spec):
        at_start.append(len(alive))
        teacher = create_teacher(spec)
        alive.add(teacher)
        return teacher
    monkeypatch.setattr('polyp_difom.features.extract.create_teacher', watched)
    torch.save(tiny_sam().state_dict(), tmp_path/'sam.pth')
    specs = [f'dinov2={dinov2}', f'sam={tmp_path}/sam.pth']
    reports = extract(data, specs, tmp_path/'store', device='cpu')
    assert [report['images'] for report in reports] == [16, 16] and at_start == [0, 0], 'one model in memory at a time'
    store = FeatureStore(tmp_path/'store')
    assert {name: store.array(name).shape for name in store.teachers} == {'dinov2': (16, 32, 5, 5), 'sam': (16, 16, 8, 8)}
    moved = dinov2.rename(tmp_path/'moved')
    assert extract(data, [f'dinov2={moved}'], tmp_path/'store', device='cpu')[0]['images'] == 0
    torch.manual_seed(1)
    made('Dinov2Model', **VIT, image_size=70, patch_size=14).save_pretrained(moved)
    with pytest.raises(InputError, match='holds other features of dinov2: revision'): extract(data, [f'dinov2={moved}'], tmp_path/'store', device='cpu')

def test_out_of_memory(data, dinov2, tmp_path, monkeypatch):
    def full(*_): raise torch.cuda.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr('polyp_difom.teachers.tokens.TokenTeacher.features', full)
    with pytest.raises(InputError, match='out of memory with 8 images at once; give a smaller batch size'):
        extract(data, [f'dinov2={dinov2}'], tmp_path/'store', batch_size=8, device='cpu')

def test_unreachable_from_the_command_line(fails, data, tmp_path, no_hub):
    assert 'facebook/dinov2-base (346 MB)' in fails('extract', data, '--teacher', 'dinov2', '--out', tmp_path/'store')
    assert not (tmp_path/'store').exists()


REAL = dict( # what the configurations of the default checkpoints say, as far as shapes and sizes go
    sam=lambda t: t.SamConfig(), dinov2=lambda t: t.Dinov2Config(image_size=518, patch_size=14),
    oneformer=lambda t: t.OneFormerConfig(backbone_config=swin_large(), num_queries=150), mask2former=lambda t: t.Mask2FormerConfig(backbone_config=swin_large(), num_queries=200),
    clip=lambda t: t.CLIPConfig(vision_config=dict(patch_size=16)), owlvit=lambda t: t.OwlViTConfig(vision_config=dict(patch_size=16)),
    ijepa=lambda t: t.IJepaConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120, patch_size=14))

def swin_large():
    return transformers.SwinConfig(image_size=384, embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=12, out_features=['stage1', 'stage2', 'stage3', 'stage4'])

@pytest.mark.skipif(tuple(map(int, transformers.__version__.split('.')[:2])) < (4, 57), reason='older models look into their tensors')
@pytest.mark.parametrize('row', [row for row in teacher_table() if row['MB']], ids=lambda row: row['name'])
def test_the_table_is_true(row, monkeypatch):
    "Map, size and download of each default checkpoint, on a device without memory."
    config = REAL[row['name'].removesuffix('-masks')](transformers)
    def load(name, checkpoint, families=(), part='', *_):
        assert checkpoint == row['checkpoint'] and config.model_type in families
        model = transformers.AutoModel.from_config(config)
        megabytes.append(sum(p.numel() for p in model.parameters())*4/1e6)
        return getattr(model, part, model) if part else model, config
    megabytes = []
    for module in ('tokens', 'pixel_decoders', 'sam'): monkeypatch.setattr(f'polyp_difom.teachers.{module}.load_pretrained', load)
    monkeypatch.setattr('polyp_difom.teachers.pretrained.normalisation', lambda name, checkpoint, standard: standard)
    monkeypatch.setattr('polyp_difom.teachers.pretrained._origin', str)
    monkeypatch.setattr('polyp_difom.teachers.registry._check_finite', lambda *_: None) # some tensors are made of memory as it was found
    with torch.device('meta'):
        teacher = create_teacher(row['name'])
        if row['name'].endswith('former'): shape = 1, teacher.model.decoder.mask_projection.in_channels, *[row['size']//8]*2 # deformable attention does not run on this device
        else: shape = teacher(torch.zeros(1, 3, teacher.size, teacher.size)).shape
    assert teacher.size == row['size']
    assert shape == (1, row['channels'], row['size']//row['stride'], row['size']//row['stride'])
    assert megabytes[0] == pytest.approx(row['MB'], rel=0.015) # heads that are not loaded make up the rest
