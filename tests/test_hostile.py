"""Everything but good input. Each kind goes through the commands that could meet it, in this process: no traceback, no hang, no input changed, and a
failure names the file or the option. What is sound under an odd name, or odd but readable, must pass."""
import hashlib
import json
import os
import shutil
import signal
import socket
import stat
import struct
import zlib
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from polyp_difom.core import InputError, printable
from polyp_difom.data.images import list_pairs, read_image
from polyp_difom.data.synthetic import make_synthetic
from polyp_difom.deploy.predictor import read_run
from safetensors.torch import load_file, save_file

TINY = ['--preset', 'paper', '--size', '32', '--width', '2', '--epochs', '1', '0', '0', '--batch-size', '4', '--valid', '0.25', '--device', 'cpu']
SECONDS = 30 # after which a command hangs


@contextmanager
def time_limit():
    "A command that hangs fails its test."
    def ring(number, frame): raise TimeoutError(f'still running after {SECONDS} s')
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try: yield
    finally: signal.alarm(0); signal.signal(signal.SIGALRM, before)


def snapshot(folder):
    "What is in a folder: names, kinds, contents."
    def what(path):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode): return os.readlink(path)
        return hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) else stat.S_IFMT(mode)
    return {os.fsencode(p): what(p) for p in sorted(folder.rglob('*'))}


@pytest.fixture
def attempt(polyp_difom):
    "Run a command over a folder of inputs; gives exit code and the error, and sees that the inputs are as they were."
    def run(inputs, *command):
        before = snapshot(inputs)
        with time_limit(): result = polyp_difom(*command)
        assert snapshot(inputs) == before, f'{command[0]} changed its input'
        assert result.returncode in (0, 1, 2) and 'Traceback' not in result.err + result.out
        errors = [line for line in result.err.splitlines() if line.startswith('error: ')]
        if result.returncode == 1: assert len(errors) == 1 and result.err.rstrip().splitlines()[-1] == errors[0], result.err
        if result.returncode == 2: errors = [' '.join(result.err.split())]
        return result.returncode, ''.join(errors), result.out
    return run


@pytest.fixture(scope='session')
def good(tmp_path_factory):
    "Small sound data: six training pairs, a test set of two. Not to be changed."
    return make_synthetic(tmp_path_factory.mktemp('good')/'data', n_train=6, n_test=2, size=(48, 64))


@pytest.fixture(scope='session')
def good_run(good, tmp_path_factory):
    "A run of `good`. Not to be changed."
    from polyp_difom.training.runs import train
    return train(good, tmp_path_factory.mktemp('good_run')/'run', size=32, width=2, epochs=(1, 0, 0), batch_size=4, valid=.25, device='cpu')


# ---- pictures

def encoded(image, format='PNG', **options):
    content = BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
def png_of_size(width, height): return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')
def floats(values): return encoded(Image.fromarray(values.astype(np.float32)), 'TIFF')
def sixteen(values): return encoded(Image.fromarray(values.astype(np.uint16)))


def flipped_byte(content, at):
    content = bytearray(content)
    content[at] ^= 0x55
    return bytes(content)


GREY = np.linspace(0, 1, 48*64).reshape(48, 64)
BAD_PICTURES = { # name -> content of a picture that cannot be read as one
    'empty': lambda image: b'', 'one byte': lambda image: b'x', 'text': lambda image: b'not a picture\n'*50, 'html': lambda image: b'<!doctype html><h1>404</h1>',
    'zeros': lambda image: bytes(5000), 'random': lambda image: np.random.default_rng(0).bytes(5000), 'signature only': lambda image: encoded(image)[:8],
    'header only': lambda image: encoded(image)[:40], 'half a png': lambda image: encoded(image)[:len(encoded(image))//2], 'png without its end': lambda image: encoded(image)[:-400],
    'half a jpeg': lambda image: encoded(image, 'JPEG')[:700], 'broken png data': lambda image: flipped_byte(encoded(image), 200), 'broken png header': lambda image: flipped_byte(encoded(image), 18),
    'half a gif': lambda image: encoded(image, 'GIF')[:500], 'half a bmp': lambda image: encoded(image, 'BMP')[:500], 'half a tiff': lambda image: encoded(image, 'TIFF')[:300],
    'half a webp': lambda image: encoded(image, 'WEBP')[:300], 'postscript': lambda image: b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n',
    'pdf': lambda image: encoded(image, 'PDF'), 'svg': lambda image: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', 'zip': lambda image: b'PK\x03\x04' + bytes(100),
    'gzip': lambda image: b'\x1f\x8b\x08' + bytes(100), 'pickle': lambda image: b'\x80\x04\x95' + bytes(60), 'numpy': lambda image: b'\x93NUMPY\x01\x00' + bytes(60),
    'huge header': lambda image: png_of_size(60000, 60000), 'very long header': lambda image: png_of_size(2**31 - 1, 1), 'no pixels': lambda image: png_of_size(0, 0),
    'not a number': lambda image: floats(np.where(GREY > .5, np.nan, GREY)), 'infinite': lambda image: floats(np.where(GREY > .5, np.inf, GREY)), 'all not a number': lambda image: floats(GREY*np.nan),
}
GOOD_PICTURES = { # name -> content of a picture that is odd and readable
    'grey': lambda image: encoded(image.convert('L')), 'one bit': lambda image: encoded(image.convert('1')), 'palette': lambda image: encoded(image.convert('P')),
    'alpha': lambda image: encoded(image.convert('RGBA')), 'grey and alpha': lambda image: encoded(image.convert('LA')), 'cmyk': lambda image: encoded(image.convert('CMYK'), 'JPEG'),
    'gif': lambda image: encoded(image, 'GIF'), 'animated gif': lambda image: encoded(image, 'GIF', save_all=True, append_images=[image.rotate(90)]), 'bmp': lambda image: encoded(image, 'BMP'),
    'webp': lambda image: encoded(image, 'WEBP'), 'tiff of two pages': lambda image: encoded(image, 'TIFF', save_all=True, append_images=[image]), 'sixteen bits': lambda image: sixteen(GREY*65535),
    'twelve in sixteen bits': lambda image: sixteen(GREY*4095), 'floats to one': lambda image: floats(GREY), 'jpeg with trailing bytes': lambda image: encoded(image, 'JPEG') + b'after the end',
}


def put(data, name, content, other='image'):
    "A picture, and a mask that fits it, into the test set and the training part of a data set."
    for part in ('TrainDataset', 'TestDataset/Synthetic'):
        (data/part/'images'/name).write_bytes(content)
        Image.open(next((data/part/'masks').iterdir())).save(data/part/'masks'/f'{Path(name).stem}.png')


def picture_commands(data, run, out):
    yield 'check', data
    yield 'extract', data, '--teacher', 'filterbank,size=32,levels=1', '--out', out/'store'
    yield 'train', data, *TINY, '--out', out/'run'
    yield 'evaluate', run, data, '--json', out/'scores.json'
    yield 'predict', run, data/'TestDataset/Synthetic/images', '--out', out/'maps'


@pytest.fixture
def own(good, tmp_path): return shutil.copytree(good, tmp_path/'data')


@pytest.fixture
def own_run(good_run, tmp_path): return shutil.copytree(good_run, tmp_path/'a run')


@pytest.mark.parametrize('kind', BAD_PICTURES)
def test_a_picture_that_is_none_is_named_by_every_command(kind, own, own_run, attempt, tmp_path):
    image = read_image(list_pairs(own/'TrainDataset')[0].image)
    put(own, 'strange.png', BAD_PICTURES[kind](image))
    for command in picture_commands(own, own_run, tmp_path):
        code, error, said = attempt(own, *command)
        assert code == 1 and 'strange.png' in error + said, (command[0], error)
    assert len(list((tmp_path/'maps').rglob('*.png'))) == 2, 'the others are predicted'
    assert not (tmp_path/'run').exists() and not (own_run/'evaluation').exists()


@pytest.mark.parametrize('kind', GOOD_PICTURES)
def test_a_picture_of_an_odd_kind_goes_through(kind, own, own_run, attempt, tmp_path):
    image = read_image(list_pairs(own/'TrainDataset')[0].image)
    put(own, 'strange.png', GOOD_PICTURES[kind](image))
    for command in list(picture_commands(own, own_run, tmp_path))[1:]: assert attempt(own, *command)[:2] == (0, ''), command[0]


NAMES = ['reference::e.png', 'a::b.png', 'file:x.png', 'http:x.png', 's3:x.png', '-x.png', '--out.png', ' x .png', 'x\ny.png', '\x1b[2Jx.png', b'\xff\xfe.png', 'ä-é-漢.png',
         'e\u0301.png', '[red]x[bold].png', 'x.y.z.png', 'x.PNG', "it's \"x\".png", '%s%d.png', '{x}.png', '$HOME.png', '*.png', 'x;y.png', 'n'*246 + '.png', '~x.png', '\\x.png', '0.png']


@pytest.mark.parametrize('name', NAMES, ids=lambda name: repr(name)[:20])
def test_an_odd_name_is_a_name(name, own, own_run, attempt, tmp_path):
    name = os.fsdecode(name) if isinstance(name, bytes) else name
    put(own, name, encoded(read_image(list_pairs(own/'TrainDataset')[0].image).rotate(7)))
    for command in list(picture_commands(own, own_run, tmp_path))[1:]: assert attempt(own, *command)[:2] == (0, ''), command[0]


def make_fifo(path): os.mkfifo(path)
def make_socket(path):
    before = os.getcwd()
    os.chdir(path.parent) # a socket's name must be short
    with socket.socket(socket.AF_UNIX) as server: server.bind(path.name)
    os.chdir(before)


ODD_FILES = {'pipe': make_fifo, 'socket': make_socket, 'dangling link': lambda path: path.symlink_to('nowhere'), 'link to itself': lambda path: path.symlink_to(path.name),
             'link to a device': lambda path: path.symlink_to('/dev/zero'), 'link to a folder': lambda path: path.symlink_to(path.parent.parent), 'folder': lambda path: path.mkdir()}


@pytest.mark.parametrize('kind', ODD_FILES)
def test_what_is_no_file_is_named_or_passed_over(kind, own, own_run, attempt, tmp_path):
    put(own, 'strange.png', b'')
    for part in ('TrainDataset', 'TestDataset/Synthetic'):
        (own/part/'images/strange.png').unlink()
        ODD_FILES[kind](own/part/'images/strange.png')
    for command in picture_commands(own, own_run, tmp_path):
        code, error, said = attempt(own, *command)
        assert code == 0 or 'strange' in error + said, (command[0], error)
        if command[0] in ('check', 'train', 'evaluate'): assert code == 1, 'a mask without a picture'
    assert len(list((tmp_path/'maps').glob('*.png'))) >= 2, 'the others are predicted' # a linked folder is a folder


# ---- masks

def replaced(change):
    def spoil(path):
        mask = np.array(Image.open(path).convert('L')) > 128
        change(mask, path)
    return spoil


def palette_mask(mask, path):
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette([0, 0, 0, 0, 0, 128])
    image.save(path)


BAD_MASKS = {
    'coded 0 and 1': lambda mask, path: Image.fromarray(mask.astype(np.uint8)).save(path), 'classes 0 1 2': lambda mask, path: Image.fromarray(mask*np.uint8(2) + np.uint8(0)).save(path),
    'dark palette': palette_mask, 'alpha only': lambda mask, path: Image.fromarray(np.dstack([np.zeros((*mask.shape, 3), np.uint8), mask*np.uint8(255)])).save(path),
    'dark grey': lambda mask, path: Image.fromarray(mask*np.uint8(100)).save(path), 'other size': lambda mask, path: Image.fromarray(mask).resize((10, 10)).save(path),
    'turned': lambda mask, path: Image.fromarray(mask).transpose(Image.Transpose.ROTATE_90).save(path), 'not a number': lambda mask, path: path.write_bytes(floats(np.where(mask, np.nan, 0.))),
    'broken': lambda mask, path: path.write_bytes(b'no mask'), 'missing': lambda mask, path: path.unlink(),
}


@pytest.mark.parametrize('kind', BAD_MASKS)
def test_a_mask_that_would_be_read_wrongly_is_named(kind, own, own_run, attempt, tmp_path):
    for part in ('TrainDataset', 'TestDataset/Synthetic'): replaced(BAD_MASKS[kind])(sorted((own/part/'masks').iterdir())[0])
    for command in ('check', own), ('train', own, *TINY, '--out', tmp_path/'run'), ('evaluate', own_run, own):
        code, error, said = attempt(own, *command)
        assert code == 1 and '00000' in error + said, (command[0], error)
    assert not (tmp_path/'run').exists() and not (own_run/'evaluation').exists()


def test_masks_of_0_and_1_are_read_where_one_says_so(own, own_run, attempt, tmp_path):
    before = attempt(own, 'evaluate', own_run, own, '--json', tmp_path/'before.json')
    for path in own.rglob('masks/*.png'): replaced(BAD_MASKS['coded 0 and 1'])(path)
    assert 'mask-above 0' in attempt(own, 'evaluate', own_run, own)[1]
    assert before[0] == attempt(own, 'evaluate', own_run, own, '--mask-above', '0', '--json', tmp_path/'after.json')[0] == 0
    scores = [json.loads((tmp_path/f'{name}.json').read_text())['sets']['Synthetic']['mDice'] for name in ('before', 'after')]
    assert scores[0] == scores[1]


# ---- data sets

def only_images(data): shutil.rmtree(data/'TrainDataset/masks'); shutil.rmtree(data/'TestDataset/Synthetic/masks')
def empty_folders(data):
    for path in data.rglob('*.png'): path.unlink()


def masks_among_the_images(data):
    for part in ('TrainDataset', 'TestDataset/Synthetic'):
        for path in (data/part/'masks').iterdir(): path.rename(data/part/'images'/f'{path.stem}_mask.png')


BAD_SETS = {'no folder': shutil.rmtree, 'empty': lambda data: (shutil.rmtree(data), data.mkdir()), 'a file': lambda data: (shutil.rmtree(data), data.write_text('x')),
            'no masks': only_images, 'empty folders': empty_folders, 'masks among the images': masks_among_the_images,
            'two of one stem': lambda data: [shutil.copy(path, path.with_suffix('.bmp')) for path in sorted(data.rglob('images/00000.png'))],
            'a link to itself': lambda data: (shutil.rmtree(data), data.symlink_to(data.name))}


@pytest.mark.parametrize('kind', BAD_SETS)
def test_a_data_set_that_is_none_says_what_is_missing(kind, own, own_run, attempt, tmp_path):
    BAD_SETS[kind](own)
    for command in ('check', own), ('train', own, *TINY, '--out', tmp_path/'run'), ('evaluate', own_run, own):
        code, error, _ = attempt(own.parent, *command)
        assert code == 1 and own.name in error and len(error) < 600, (command[0], error)
    assert not (tmp_path/'run').exists()


# ---- runs

def edit_config(run, change):
    config = json.loads((run/'config.json').read_text())
    change(config)
    (run/'config.json').write_text(json.dumps(config))


def edit_weights(run, change):
    from safetensors import safe_open
    tensors = load_file(run/'best.safetensors')
    with safe_open(run/'best.safetensors', 'pt') as file: metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, run/'best.safetensors', metadata)


def set_in(key, value): return lambda run: edit_config(run, lambda config: config['settings'].__setitem__(key, value))
def told_student(**student): return lambda run: edit_weights(run, lambda tensors, metadata: metadata.update(polyp_difom=json.dumps(dict(student=student, distilled=False, channels=None))))
def first(tensors): return next(key for key, value in tensors.items() if value.is_floating_point())


BAD_RUNS = {
    'no config': lambda run: (run/'config.json').unlink(), 'empty config': lambda run: (run/'config.json').write_text(''), 'config is no JSON': lambda run: (run/'config.json').write_text('{'),
    'config is a list': lambda run: (run/'config.json').write_text('[]'), 'config of something else': lambda run: (run/'config.json').write_text('{"model": 1}'),
    'config is binary': lambda run: (run/'config.json').write_bytes(b'\xff\x00\x80'), 'config is a folder': lambda run: ((run/'config.json').unlink(), (run/'config.json').mkdir()),
    'deep config': lambda run: (run/'config.json').write_text('['*100000), 'settings are a list': lambda run: edit_config(run, lambda config: config.update(settings=[])),
    'size is text': set_in('size', 'large'), 'size is huge': set_in('size', 10**9), 'size is negative': set_in('size', -32), 'size is missing': lambda run: edit_config(run, lambda config: config['settings'].pop('size')),
    'no weights': lambda run: (run/'best.safetensors').unlink(), 'empty weights': lambda run: (run/'best.safetensors').write_bytes(b''), 'half the weights': lambda run: os.truncate(run/'best.safetensors', 3000),
    'weights are text': lambda run: (run/'best.safetensors').write_text('weights'), 'weights are a pickle': lambda run: torch.save({'a': torch.ones(1)}, run/'best.safetensors'),
    'weights are a folder': lambda run: ((run/'best.safetensors').unlink(), (run/'best.safetensors').mkdir()), 'weights are a pipe': lambda run: ((run/'best.safetensors').unlink(), os.mkfifo(run/'best.safetensors')),
    'huge header of weights': lambda run: (run/'best.safetensors').write_bytes(struct.pack('<Q', 2**62) + b'{}'), 'weights not a number': lambda run: edit_weights(run, lambda tensors, metadata: tensors[first(tensors)].fill_(float('nan'))),
    'infinite weights': lambda run: edit_weights(run, lambda tensors, metadata: tensors[first(tensors)].fill_(float('inf'))), 'a weight is missing': lambda run: edit_weights(run, lambda tensors, metadata: tensors.pop(first(tensors))),
    'a weight too many': lambda run: edit_weights(run, lambda tensors, metadata: tensors.update(extra=torch.ones(1))), 'a weight of another shape': lambda run: edit_weights(run, lambda tensors, metadata: tensors.update({first(tensors): torch.ones(1)})),
    'no metadata': lambda run: edit_weights(run, lambda tensors, metadata: metadata.clear()), 'metadata is no JSON': lambda run: edit_weights(run, lambda tensors, metadata: metadata.update(polyp_difom='{')),
    'metadata is a list': lambda run: edit_weights(run, lambda tensors, metadata: metadata.update(polyp_difom='[]')), 'unknown student': told_student(name='unett', options={}),
    'student that reads a file': told_student(name='smp/Unet-tu-resnet18', options=dict(checkpoint_path='/etc/passwd')), 'student that asks the hub': told_student(name='smp/Unet-resnet18', options=dict(encoder_weights='imagenet')),
    'student that is huge': told_student(name='unet', options=dict(width=10**9)), 'student of negative width': told_student(name='unet', options=dict(width=-4)), 'student options are text': told_student(name='unet', options='width'),
}


@pytest.mark.parametrize('kind', BAD_RUNS)
def test_a_run_that_is_none_is_named(kind, good, own_run, attempt, tmp_path):
    BAD_RUNS[kind](own_run)
    for command in ('predict', own_run, good/'TestDataset/Synthetic/images', '--out', tmp_path/'maps'), ('evaluate', own_run, good):
        code, error, _ = attempt(own_run, *command)
        assert code == 1 and printable(own_run.name) in error, (command[0], error)
    assert not (tmp_path/'maps').exists() and not (own_run/'evaluation').exists()


# ---- feature stores

def chunks(store): return sorted(path for path in (store/'features').rglob('*') if path.is_file() and 'c' in path.relative_to(store).parts)
def metadata_of(store, *inside): return next(path for path in (store.joinpath(*inside)/name for name in ('zarr.json', '.zarray', '.zgroup')) if path.exists())
def change_byte(path): path.write_bytes(flipped_byte(path.read_bytes(), path.stat().st_size//2))


BAD_STORES = {
    'flipped bit': lambda store: change_byte(chunks(store)[1]), 'half a chunk': lambda store: os.truncate(chunks(store)[1], chunks(store)[1].stat().st_size//2), 'empty chunk': lambda store: os.truncate(chunks(store)[1], 0),
    'chunk of another': lambda store: chunks(store)[1].write_bytes(b'something else'), 'missing chunk': lambda store: chunks(store)[1].unlink(),
    'broken metadata of an array': lambda store: metadata_of(store, 'features', 'filterbank').write_text('{'), 'broken metadata of the index': lambda store: metadata_of(store, 'index').write_text('{}'),
    'broken metadata of the store': lambda store: metadata_of(store).write_text('[]'), 'missing metadata of an array': lambda store: metadata_of(store, 'features', 'filterbank').unlink(),
}


@pytest.mark.parametrize('kind', BAD_STORES)
def test_a_damaged_store_is_named_or_mended_never_used(kind, good, attempt, tmp_path):
    store, extract = tmp_path/'store', ('extract', good, '--teacher', 'filterbank,size=32,levels=1', '--out', tmp_path/'store')
    attempt(good, *extract)
    BAD_STORES[kind](store)
    code, error, _ = attempt(good, 'train', good, '--features', store, *TINY, '--out', tmp_path/'run')
    assert code == 1 and 'store' in error and 'extract' in error, error
    assert not (tmp_path/'run').exists()
    if attempt(good, *extract)[0] == 0:
        assert attempt(good, 'train', good, '--features', store, *TINY, '--out', tmp_path/'run')[:2] == (0, ''), 'mended'
    else: assert 'metadata' in kind, 'chunks are mended'


# ---- options

BAD_OPTIONS = ['--lr -1', '--lr 0', '--lr nan', '--lr inf', '--valid -1', '--valid 0', '--valid 1', '--valid nan', '--size 0', '--size -32', '--size 1000000', '--seed -1', '--device cuda:99', '--device gpu',
               '--epochs 0 0 0', '--epochs -1 1 1', '--batch-size 0', '--batch-size -3', '--scales 0 1 1', '--scales nan 1 1', '--scales -1 1 1', '--lambdas nan 1 1', '--lambdas -1 1 1', '--schedule sometimes',
               '--precision fp8', '--loss focal', '--distance far', '--width -1', '--width 0', '--width 1000000000', '--student unett', '--student unet,wdith=3', '--student unet,width=x', '--student unet,width=-1',
               '--student smp/', '--student smp/Unet-nothing', '--student unet,width', '--student=', '--mask-above 300', '--images nowhere', '--mask-suffix _none', '--backbone-weights nowhere', '--wdith 3']
BAD_TARGETS = ['--cutoff nan', '--cutoff 5', '--cutoff -1', '--split haar', '--standardise z', '--projection pcb', '--projection none', '--teacher sam', '--projection-seed -1']
BAD_TEACHERS = ['filterbnk', 'filterbank,size=-1', 'filterbank,size=x', 'filterbank,levels=0', 'filterbank,levls=2', 'filterbank=here', 'timm/nothing', 'timm/resnet18=nowhere.safetensors', 'hf/', '', ',', 'filterbank,size=1000000', 'filterbank,name=zarr.json', 'filterbank,name=../up']


@pytest.mark.parametrize('option', BAD_OPTIONS)
def test_an_option_that_cannot_be_is_refused_before_anything_is_written(option, good, attempt, tmp_path):
    code, error, _ = attempt(good, 'train', good, *TINY, *option.split(), '--out', tmp_path/'run')
    assert code in (1, 2) and not (tmp_path/'run').exists()
    name, value = option.replace('=', ' ').lstrip('-').split(' ')[0], option.split()[-1]
    assert name in error or name.replace('-', '_') in error or value in error or 'image without mask' in error, error


@pytest.mark.parametrize('option', BAD_TARGETS)
def test_an_option_of_targets_that_cannot_be_is_refused(option, data, features, attempt, tmp_path):
    code, error, _ = attempt(features, 'train', data, '--features', features, *TINY, *option.split(), '--out', tmp_path/'run')
    assert code in (1, 2) and option.split()[-1].lstrip('-') in error and not (tmp_path/'run').exists(), error


@pytest.mark.parametrize('spec', BAD_TEACHERS)
def test_a_teacher_that_cannot_be_is_refused(spec, good, attempt, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    code, error, _ = attempt(good, 'extract', good, '--teacher', spec, '--out', tmp_path/'store')
    assert code == 1 and 'teacher' in error or 'timm' in error or 'nowhere' in error or spec in error, error
    assert not (tmp_path/'store').exists()


@pytest.mark.parametrize('threshold', ['7', '-1', 'nan', 'inf', 'x'])
def test_a_threshold_that_cannot_be_is_refused(threshold, good, good_run, attempt, tmp_path):
    assert attempt(good, 'predict', good_run, good/'TestDataset/Synthetic/images', '--out', tmp_path/'maps', '--threshold', threshold)[0] in (1, 2)
    assert not (tmp_path/'maps').exists()


# ---- outputs

def test_a_prediction_never_replaces_a_picture(own, own_run, attempt, tmp_path):
    images = own/'TestDataset/Synthetic/images'
    (tmp_path/'link').symlink_to(images)
    for out in (images, tmp_path/'link', images/'..'/'images', own/'TestDataset/Synthetic'/'masks'/'..'/'images'):
        for more in ([], ['--overwrite'], ['--overlay', '--overwrite']):
            assert attempt(own, 'predict', own_run, images, '--out', out, *more)[0] == 1
    assert attempt(own, 'predict', own_run, sorted(images.iterdir())[0], '--out', images, '--overwrite')[0] == 1


def test_an_output_is_replaced_only_on_request(own, own_run, attempt, tmp_path):
    command = 'predict', own_run, own/'TestDataset/Synthetic/images', '--out', tmp_path/'maps'
    assert attempt(own, *command)[0] == 0
    assert 'overwrite' in attempt(tmp_path/'maps', *command)[1]
    assert attempt(own, *command, '--overwrite')[0] == 0


def test_an_output_through_a_link_leaves_what_it_points_to(own, own_run, attempt, tmp_path):
    (tmp_path/'maps').mkdir(); (tmp_path/'precious').write_text('precious')
    stem = sorted((own/'TestDataset/Synthetic/images').iterdir())[0].stem
    (tmp_path/'maps'/f'{stem}.png').symlink_to(tmp_path/'precious')
    attempt(own, 'predict', own_run, own/'TestDataset/Synthetic/images', '--out', tmp_path/'maps', '--overwrite')
    assert (tmp_path/'precious').read_text() == 'precious'


@pytest.mark.parametrize('command', ['extract', 'train', 'predict'])
def test_an_output_where_a_file_is(command, good, good_run, attempt, tmp_path):
    (tmp_path/'out').write_text('mine')
    arguments = dict(extract=[good, '--teacher', 'filterbank,size=32,levels=1'], train=[good, *TINY], predict=[good_run, good/'TestDataset/Synthetic/images'])[command]
    assert attempt(good, command, *arguments, '--out', tmp_path/'out')[0] == 1
    assert (tmp_path/'out').read_text() == 'mine'


@pytest.mark.parametrize('size', [(1, 5000), (5000, 1), (1, 1), (2, 3)])
def test_a_picture_of_extreme_shape_is_scored_and_predicted(size, own, own_run, attempt, tmp_path):
    folder = own/'TestDataset/Synthetic'
    Image.new('RGB', size, 'brown').save(folder/'images/thin.png'); Image.new('L', size, 255).save(folder/'masks/thin.png')
    assert attempt(own, 'evaluate', own_run, own)[:2] == (0, '')
    assert (own_run/'evaluation/report.json').exists()
    assert attempt(own, 'predict', own_run, folder/'images', '--out', tmp_path/'maps', '--overlay')[:2] == (0, '')


# ---- fuzzed

FUZZED = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def mutated(content, changes):
    content = bytearray(content)
    for at, value in changes: content[at % len(content)] = value
    return bytes(content)


CHANGES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=12)


@FUZZED
@given(format=st.sampled_from(['PNG', 'JPEG', 'GIF', 'TIFF', 'WEBP', 'BMP']), changes=CHANGES, length=st.floats(0, 1))
def test_any_bytes_are_a_picture_or_named(format, changes, length, tmp_path_factory):
    path = tmp_path_factory.mktemp('fuzz')/'fuzzed.png'
    content = encoded(Image.fromarray((np.dstack([GREY]*3)*255).astype(np.uint8)), format)
    path.write_bytes(mutated(content, changes)[:max(1, round(length*2*len(content)))])
    with time_limit():
        try: assert read_image(path).mode == 'RGB'
        except InputError as error: assert 'fuzzed.png' in str(error) and '\n' not in str(error)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)


@FUZZED
@given(key=st.sampled_from(['student', 'options', 'distilled', 'size', 'epochs', 'seed']), value=JSON)
def test_any_settings_are_read_or_named(key, value, good_run, tmp_path_factory):
    run = shutil.copytree(good_run, tmp_path_factory.mktemp('fuzz')/'run')
    set_in(key, value)(run)
    with time_limit():
        try: read_run(run)
        except InputError as error: assert 'config.json' in str(error) or 'run' in str(error)


@FUZZED
@given(changes=CHANGES)
def test_any_checkpoint_is_loaded_or_named(changes, good_run, tmp_path_factory):
    run = shutil.copytree(good_run, tmp_path_factory.mktemp('fuzz')/'run')
    (run/'best.safetensors').write_bytes(mutated((run/'best.safetensors').read_bytes()[:6000], changes) + (run/'best.safetensors').read_bytes()[6000:])
    with time_limit():
        try: assert all(value.isfinite().all() for value in read_run(run)[0].state_dict().values())
        except InputError as error: assert 'best.safetensors' in str(error)


# ---- what must not stand in for something else

def test_numbers_replace_nothing_but_earlier_numbers(own, own_run, attempt, tmp_path):
    mask = sorted((own/'TestDataset/Synthetic/masks').iterdir())[0]
    for file in (own_run/'config.json', mask, tmp_path): assert attempt(own, 'evaluate', own_run, own, '--json', file)[0] == 1
    assert not (own_run/'evaluation').exists()
    command = 'evaluate', own_run, own, '--json', tmp_path/'scores.json'
    assert attempt(own, *command)[0] == 0
    assert 'overwrite' in attempt(own, *command)[1] and attempt(own, *command, '--overwrite')[0] == 0


def test_predictions_replace_no_masks(own, own_run, attempt):
    folder = own/'TestDataset/Synthetic'
    code, error, _ = attempt(own, 'predict', own_run, folder/'images', '--out', folder/'masks', '--overwrite')
    assert code == 1 and 'masks' in error


def test_scores_on_frames_of_the_training_are_called_so(good, own_run, attempt, tmp_path):
    flat = shutil.copytree(good/'TrainDataset', tmp_path/'flat')
    code, _, said = attempt(flat, 'evaluate', own_run, flat, '--json', tmp_path/'scores.json')
    assert code == 0 and 'trained or selected on 6 of' in ' '.join(said.split())
    assert json.loads((tmp_path/'scores.json').read_text())['sets']['flat']['trained_on'] == 6
    assert 'trained or selected' not in attempt(good, 'evaluate', own_run, good)[2]


def test_a_metric_does_not_stand_in_for_dice(good, tmp_path):
    from polyp_difom.training.runs import train
    def dice(logits, mask): return torch.tensor(.9)
    with pytest.raises(InputError, match='valid_dice'): train(good, tmp_path/'run', metrics=[dice], size=32, width=2, epochs=(1, 0, 0), batch_size=4, valid=.25, device='cpu')
    assert not (tmp_path/'run').exists()


def test_one_training_at_a_time_in_a_folder(good, own_run, attempt):
    from filelock import FileLock
    with FileLock(own_run/'.lock'):
        code, error, _ = attempt(good, 'train', '--resume', own_run, '--epochs', '2', '0', '0', '--device', 'cpu')
    assert code == 1 and 'another training' in error


def test_a_run_whose_settings_were_edited_is_not_resumed(good, own_run, attempt):
    set_in('lr', 0.5)(own_run)
    code, error, _ = attempt(good, 'train', '--resume', own_run, '--epochs', '2', '0', '0', '--device', 'cpu')
    assert code == 1 and 'config.json was changed' in error
