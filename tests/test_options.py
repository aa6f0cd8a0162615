"Options of students: the wrong ones are told in one line, before memory is touched, and none of them names a file."
import pytest
import torch
from polyp_difom.core import InputError
from polyp_difom.students.registry import create_student, list_students, safe_student_options, student_options


@pytest.mark.parametrize('spec, options, words', [
    ('unett', {}, 'unknown student unett; nearest: unet'),
    ('unet,wdith=16', {}, 'student unet: unknown option wdith; nearest: width'),
    *(('unet', dict(width=width), f'student unet: width is {width!r}; give a whole number from 1 to 4096') for width in (-1, 0, 'x', 16.5, None, True)),
    *((name, dict(width=-1), f'student {name}: width is -1') for name in ('unetpp', 'pranet')),
    ('unet', dict(width=10**9), 'student unet: option width takes a number up to 65536'), ('unet', dict(width=float('nan')), 'option width takes'),
    ('unet', dict(width=4096), 'student unet: 70.7 thousand million parameters'), ('unet', dict(channels=3), 'student unet: unknown option channels'),
    ('unetpp', dict(deep_supervision='no'), 'deep_supervision is no; choose True or False'),
    ('emcadnet', dict(backbone='resnet18'), 'backbone resnet18 does not give 4 maps'), ('emcadnet', dict(backbone='hf-hub:x/y'), 'unknown timm network hf-hub:x/y'),
    ('emcadnet', dict(backbone=['a']), 'unknown timm network'), ('emcadnet', dict(activation='gelu'), 'choose relu or relu6'), ('emcadnet', dict(pretrained=[1]), 'give True for the weights of the hub'),
    ('smp/Unet-resnet18', dict(decoder_channels=[0]*5), 'smp/Unet-resnet18: cannot be made with these options'),
    ('smp/FPN-resnet18', dict(upsampling=1000), r'gives logits \(1, 1, 32000, 32000\)'),
    ('smp/FPN-resnet18', dict(decoder_pyramid_channels=32000, decoder_segmentation_channels=32000), 'thousand million parameters'),
])
def test_options_that_make_no_sense(spec, options, words):
    with pytest.raises(InputError, match=words) as told: create_student(spec, **(dict(pretrained=False) | options))
    assert '\n' not in str(told.value)


def test_odd_options_touch_no_memory():
    resource = pytest.importorskip('resource')
    most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss # KiB on Linux
    before = most()
    for name, options in (('unet', dict(width=4096)), ('unetpp', dict(width=4096)), ('smp/FPN-resnet18', dict(upsampling=4096)), ('smp/Unet-resnet18', dict(decoder_channels=[60000]*5))):
        with pytest.raises(InputError): create_student(name, **options, pretrained=False)
    assert most() - before < 500*1024


DANGEROUS = ('checkpoint_path', 'pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir', 'encoder_weights', 'encoder_name', 'features_only', 'file', 'in_channels', 'classes', 'activation')

@pytest.mark.parametrize('name', ['unet', 'smp/Unet-resnet18', 'smp/FPN-tu-mobilenetv3_small_050', 'smp/DPT-tu-vit_tiny_patch16_224'])
def test_a_file_cannot_ask_for_other_files(name, monkeypatch):
    "Nor can anything else: such an option reaches timm from nowhere."
    def reached(*_, **options): raise AssertionError(options)
    for option in DANGEROUS:
        assert option not in student_options(name)
        with pytest.raises(InputError, match=f'student {name}: unknown option {option}'): safe_student_options(name, {option: '/etc/passwd'})
        with pytest.raises(InputError, match=f'student {name}: unknown option {option}'): create_student(name, pretrained=False, **{option: '/etc/passwd'})
    monkeypatch.setattr('polyp_difom.students.blocks.Path', reached)
    assert safe_student_options(name, dict(pretrained='/etc/passwd')) == dict(pretrained=False)


def test_what_a_student_can_be_asked_for_is_taken():
    for name in [n for n in list_students() if not n.endswith('/')]:
        assert 'pretrained' in student_options(name)
        assert create_student(name, pretrained=False).config == dict(name=name, options=dict(pretrained=False))


def test_a_pickle_is_not_opened(tmp_path):
    "Backbone weights are tensors; anything else in a file is not run."
    class Trap:
        def __reduce__(self): return open, (str(tmp_path/'opened'), 'w')
    torch.save(dict(weight=Trap()), tmp_path/'trap.pth')
    for name in ('emcadnet', 'smp/Unet-resnet18', 'smp/FPN-tu-mobilenetv3_small_050'):
        with pytest.raises(InputError, match='trap.pth: not a readable checkpoint'): create_student(name, pretrained=tmp_path/'trap.pth')
    assert not (tmp_path/'opened').exists()
