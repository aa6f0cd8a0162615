"One's own images: layouts, strict masks, what check finds, conversion, hostile files."
import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from polyp_difom.core import InputError
from polyp_difom.data import images as data_images
from polyp_difom.data import loaders
from polyp_difom.data.augment import Augment
from polyp_difom.data.check import check
from polyp_difom.data.convert import convert
from polyp_difom.data.images import Layout, MaskError, Pair, decode_image, list_images, list_pairs, read_image, read_mask, test_sets, train_folder, train_pairs
from polyp_difom.data.loaders import PolypDataset, fingerprint, load_pair
from polyp_difom.data.synthetic import make_synthetic


@pytest.fixture
def own(data, tmp_path): return shutil.copytree(data, tmp_path/'own')


@pytest.fixture
def pairs(own): return train_pairs(own)


def relaid(pairs, folder, image='images/{}', mask='masks/{}'):
    "The same pairs under other names; the picture's extension is kept where a name has none."
    for pair in pairs:
        for name, path in ((image, pair.image), (mask, pair.mask)):
            place = folder/(name.format(path.stem) + ('' if '.' in name else path.suffix))
            place.parent.mkdir(parents=True, exist_ok=True); shutil.copy(path, place)
    return folder


def grey(values, file):
    Image.fromarray(np.asarray(values)).save(file)
    return file


LAYOUTS = [('images/{}', 'masks/{}', Layout()), ('image/{}', 'mask/{}', Layout()), ('TrainDataset/images/{}', 'TrainDataset/masks/{}', Layout()),
           ('frames/{}', 'labels/{}', Layout('frames', 'labels')), ('{}', '{}_mask', Layout(mask_suffix='_mask')),
           ('images/{}', 'masks/{}_gt', Layout(mask_suffix='_gt')), ('images/{}', 'images/{}-m', Layout(mask_suffix='-m')),
           ('{}.bmp', '{}.png', Layout(mask_suffix='.png'))]


@pytest.mark.parametrize('image, mask, layout', LAYOUTS)
def test_every_layout_gives_the_same_data_set(image, mask, layout, pairs, tmp_path):
    folder = relaid(pairs, tmp_path/'relaid', image, mask)
    found = train_pairs(folder, layout)
    assert [(p.image.stem, p.image.read_bytes(), p.mask.read_bytes()) for p in found] == [(p.image.stem, p.image.read_bytes(), p.mask.read_bytes()) for p in pairs]
    assert list_images(folder, layout) == [pair.image for pair in found], 'no mask is taken for an image'
    assert fingerprint(found) == fingerprint(pairs)
    if not (folder/'TrainDataset').exists(): assert test_sets(folder, layout) == {'relaid': found}


def test_absolute_folders(pairs, tmp_path):
    folder = relaid(pairs, tmp_path/'there', 'f/{}', 'l/{}')
    layout = Layout(folder/'f', folder/'l')
    (tmp_path/'empty').mkdir()
    assert len(train_pairs(tmp_path/'empty', layout)) == len(list_images(tmp_path/'empty', layout)) == len(pairs)
    assert list(test_sets(tmp_path/'empty', layout)) == ['empty']
    assert layout == Layout(str(folder/'f'), str(folder/'l')), 'a layout is stored as text'


@pytest.mark.parametrize('image, mask, said', [
    ('{}', '{}_mask', 'image + mask in one folder: give --mask-suffix _mask'), ('{}.bmp', '{}.png', 'give --mask-suffix .png'),
    ('Original/{}', 'Ground Truth/{}', "give --images Original --masks 'Ground Truth'"), ('images/{}', 'masks/{}_gt', 'give --mask-suffix _gt'),
    ('deep/images/{}', 'deep/masks/{}', 'a data set is in deep'), ('clips/{}.x', 'notes/{}.txt', 'found folders clips, notes; expected')])
def test_a_wrong_guess_names_the_option(image, mask, said, pairs, tmp_path):
    folder = relaid(pairs, tmp_path/'relaid', image, mask)
    with pytest.raises(InputError) as error: train_pairs(folder)
    assert said in str(error.value) and len(str(error.value)) < 400, 'one line, not one for each file'
    if 'masks/' in mask and 'deep' not in mask: assert said in str(check(folder)[0])


def test_coco_is_named(pairs, tmp_path):
    relaid(pairs, tmp_path, 'frames/{}', 'other/{}')
    (tmp_path/'annotations').mkdir(); (tmp_path/'annotations/all.json').write_text('{"images": [], "annotations": []}')
    with pytest.raises(InputError, match='annotations/all.json looks like COCO annotations: polyp-difom convert'): train_pairs(tmp_path)


def test_no_mask_is_read_as_an_image(pairs, tmp_path):
    for place, image, mask in (('a', '{}', 'Ground Truth/{}'), ('b', 'x/{}', 'x/{}_mask'), ('c', 'f/{}', 'f/masks/{}'), ('d', 'f/{}', 'f/GT/{}')): relaid(pairs, tmp_path/'all'/place, image, mask)
    assert len(list_images(tmp_path/'all')) == 4*len(pairs)
    assert len(list_images(tmp_path/'all/b', Layout(mask_suffix='_mask'))) == len(pairs)


# Masks

def coded(mask, coding, file):
    "A mask (H, W) of bools, stored in some coding."
    white = mask.astype(np.uint8)*255
    if coding == 'palette white': image = Image.fromarray(mask.astype(np.uint8)).convert('P'); image.putpalette([0, 0, 0, 255, 255, 255])
    elif coding == 'palette red': image = Image.fromarray(mask.astype(np.uint8)).convert('P'); image.putpalette([0, 0, 0, 128, 0, 0])
    elif coding == 'palette blind': image = Image.fromarray(mask.astype(np.uint8)).convert('P'); image.putpalette([7, 7, 7, 7, 7, 7])
    elif coding == 'alpha': image = Image.fromarray(np.dstack([white*0]*3 + [white]))
    elif coding == 'alpha of white': image = Image.fromarray(np.dstack([white*0 + 255]*3 + [white]))
    elif coding == 'classes': image = Image.fromarray((mask*np.where(np.arange(mask.shape[1]) < mask.nonzero()[1].mean(), 1, 2)).astype(np.uint8))
    elif coding == 'void border': values = mask.astype(np.uint8); values[:4] = 255; image = Image.fromarray(values)
    elif coding == 'three levels': image = Image.fromarray(np.where(np.arange(mask.shape[1]) < mask.nonzero()[1].mean(), white//2, white).astype(np.uint8))
    else: image = {'0/1': lambda: Image.fromarray(mask.astype(np.uint8)), '0/127': lambda: Image.fromarray(white//2), 'bits': lambda: Image.fromarray(mask), '16 bits': lambda: Image.fromarray(white.astype(np.uint16)*257),
                   '16 bits 0/1': lambda: Image.fromarray(mask.astype(np.uint16)), 'float': lambda: Image.fromarray(mask.astype(np.float32)), 'rgba': lambda: Image.fromarray(white).convert('RGBA')}[coding]()
    image.save(file)
    return file


@pytest.fixture
def mask(pairs): return read_mask(pairs[0].mask)


@pytest.mark.parametrize('coding', ['bits', '16 bits', 'float', 'rgba', 'palette white'])
def test_masks_that_read_right(coding, mask, tmp_path):
    assert np.array_equal(read_mask(coded(mask, coding, tmp_path/'m.tif')), mask)


@pytest.mark.parametrize('coding, said', [('0/1', 'largest value 1, nothing above 128; if that is polyp in all masks, give --mask-above 0'), ('0/127', '--mask-above 0'), ('16 bits 0/1', '--mask-above 0'),
    ('classes', '--mask-above 0'), ('palette red', '--mask-above 0'), ('palette blind', 'palette entries of one colour'), ('alpha', 'alpha channel'), ('alpha of white', 'alpha channel'),
    ('void border', r'several grey levels \(0, 1, 255\); say above which'), ('three levels', r'several grey levels \(0, 127, 255\)')])
def test_masks_that_would_read_wrong(coding, said, mask, own, pairs, tmp_path):
    file = coded(mask, coding, pairs[0].mask)
    for read in (lambda: read_mask(file), lambda: load_pair(pairs[0], 64), lambda: load_pair(pairs[0], 64, allow_empty=True), lambda: PolypDataset(pairs, 64)):
        with pytest.raises(InputError, match=f'{file.name}: .*{said}'): read()
    assert [(p.kind, p.file) for p in check(own).errors] == [('mask coding', file)]
    if '--mask-above 0' in said:
        assert np.array_equal(read_mask(file, above=0), mask) and load_pair(pairs[0], 64, above=0)[1].any()
        assert check(own, Layout(mask_above=0)).errors == []


@pytest.mark.parametrize('quality', [20, 50, 75, 95])
def test_jpeg_masks(quality, mask, tmp_path):
    big = np.kron(mask, np.ones((4, 4), bool))
    grey(big.astype(np.uint8)*255, tmp_path/'m.png')
    Image.open(tmp_path/'m.png').save(tmp_path/'m.jpg', quality=quality)
    assert (read_mask(tmp_path/'m.jpg') != big).mean() < 5e-3
    with pytest.raises(MaskError, match='noise of JPEG above 0; give --mask-above 128'): read_mask(tmp_path/'m.jpg', above=0)
    shrunk = Image.open(tmp_path/'m.jpg').resize((120, 96), Image.Resampling.BILINEAR); shrunk.save(tmp_path/'s.png')
    assert (read_mask(tmp_path/'s.png') != mask).mean() < 1e-2


def test_flat_noise_on_both_sides_is_no_class(mask, tmp_path):
    values = np.kron(mask, np.ones((4, 4), np.uint8))*255
    noisy = values.copy(); noisy[:80, :80][values[:80, :80] == 0] = 3; noisy[(values == 255) & (np.arange(480) % 40 < 30)] = 251
    assert np.array_equal(read_mask(grey(noisy, tmp_path/'m.png')), values > 0)
    values[:80, :80] = 3
    with pytest.raises(MaskError, match=r'several grey levels \(0, 3, 255\)'): read_mask(grey(values, tmp_path/'m.png'))


def test_a_photograph_is_no_mask(pairs):
    with pytest.raises(MaskError, match='photograph'): read_mask(pairs[0].image)


@pytest.mark.parametrize('above', [-1, 255, 0.5, float('nan'), 'x'])
def test_mask_above_is_a_grey_value(above):
    with pytest.raises(InputError, match='0 to 254'): Layout(mask_above=above)


# Pictures

def test_deep_pictures(tmp_path):
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    for scale, kind in ((255, np.uint8), (4095, np.uint16), (65535, np.uint16), (1, np.float32), (255, np.float32), (65535, np.int32)):
        read = np.asarray(read_image(grey((ramp*scale).astype(kind), tmp_path/'r.tif')))[..., 0]
        assert abs(read - ramp*255).max() <= 1.5, (scale, kind)
    for wrong, said in (([[0, np.nan]], 'NaN'), ([[0, np.inf]], 'NaN or infinite'), ([[-1, 1]], 'from -1 to 1'), ([[0, 1.01]], 'from 0 to 1.01'), ([[0, 7e4]], 'to 70000')):
        with pytest.raises(InputError, match=f'r.tif: .*{said}'): read_image(grey(np.array(wrong, np.float32), tmp_path/'r.tif'))


def test_colours_of_12_bits_in_16(tmp_path):
    import cv2
    colours = np.random.default_rng(0).integers(0, 4096, (8, 8, 3)).astype(np.uint16)
    cv2.imwrite(str(tmp_path/'c.png'), colours)
    with pytest.raises(InputError, match='c.png: colours of 16 bits with no value above 4095'): read_image(tmp_path/'c.png')
    cv2.imwrite(str(tmp_path/'c.png'), colours*16)
    assert abs(np.asarray(read_image(tmp_path/'c.png'))[..., ::-1] - colours/16).max() <= 1


def png(width, height, depth=8, colour=2):
    "A PNG of a few bytes that announces any size."
    import zlib
    chunk = lambda kind, body: struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'\0'*9)) + chunk(b'IEND', b'')


@pytest.mark.parametrize('width, height', [(20_000, 6_000), (100_000, 100_000), (2**31 - 1, 1)])
def test_huge_headers_are_refused_before_decoding(width, height, tmp_path):
    (tmp_path/'huge.png').write_bytes(png(width, height))
    start = time.perf_counter()
    with pytest.warns() if width == 20_000 else pytest.MonkeyPatch.context(), pytest.raises(InputError, match='huge.png: cannot be decoded .*POLYP_DIFOM_PIXEL_LIMIT'): read_image(tmp_path/'huge.png')
    assert time.perf_counter() - start < 1


def test_the_pixel_limit_can_be_raised(tmp_path, monkeypatch):
    Image.new('L', (300, 200)).save(tmp_path/'p.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 20_000)
    monkeypatch.setattr(data_images, 'PIXEL_LIMIT', 10_000)
    with pytest.raises(InputError, match='300x200 pixels|60000 pixels'): read_image(tmp_path/'p.png')
    monkeypatch.setenv('POLYP_DIFOM_PIXEL_LIMIT', '60000')
    assert read_image(tmp_path/'p.png').size == (300, 200)


@pytest.mark.parametrize('content', [b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n', b'%PDF-1.4\n', b'', b'GIF89a', b'P5 9 9 255\n', b'\x89PNG\r\n\x1a\n', b'<svg/>', b'BM'])
def test_other_formats_are_not_opened(content, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, 'Popen', lambda *a, **k: pytest.fail('a program was run'))
    (tmp_path/'x.png').write_bytes(content)
    with pytest.raises(InputError, match='x.png: cannot be decoded'): read_image(tmp_path/'x.png')


def test_damaged_pictures_are_named(pairs, tmp_path):
    "Bytes cut off or changed at random: a picture comes out, or an `InputError` with the file's name, and nothing else."
    draw = random.Random(0)
    image, outcomes = read_image(pairs[0].image), Counter()
    for kind in ('png', 'jpeg', 'tiff', 'bmp', 'webp', 'gif', 'ppm', 'jp2'):
        buffer = io.BytesIO(); image.save(buffer, 'jpeg2000' if kind == 'jp2' else kind)
        for trial in range(60):
            content = bytearray(buffer.getvalue())
            if trial < 20: content = content[:draw.randrange(len(content))]
            else:
                for _ in range(draw.choice((1, 4, 30))): content[draw.randrange(min(len(content), draw.choice((60, 10**6))))] = draw.randrange(256)
            (tmp_path/f'x.{kind}').write_bytes(content)
            for read in (read_image, read_mask):
                try: read(tmp_path/f'x.{kind}'); outcomes['read'] += 1
                except InputError as error: outcomes['named'] += 1; assert f'x.{kind}: ' in str(error) and '\n' not in str(error)
    assert outcomes['named'] > 300 and outcomes['read'] > 20


def test_strange_names(pairs, tmp_path):
    names = ['reference::e.png', 'file::http:__x.png', '[a]*?.png', 'a\x1b[31mb.png', 'new\nline.png', '~.png', ' .png', '%41.png', 'é.png', 'x'*250 + '.png', os.fsdecode(b'\xff\xfe.png')]
    place = tmp_path/'strange'; place.mkdir()
    for name in names: shutil.copy(pairs[0].image, place/name)
    os.symlink('/nowhere', place/'gone.png'); os.mkfifo(place/'fifo.png'); (place/'folder.png').mkdir()
    found, broken = list_images(place), []
    for path in found:
        try: assert read_image(path).size == (120, 96)
        except InputError as error: broken.append(path.name); assert path.name in str(error)
    assert {path.name for path in found} == {*names, 'gone.png', 'fifo.png'} and sorted(broken) == ['fifo.png', 'gone.png']


def test_linked_folders(pairs, tmp_path):
    (tmp_path/'all/deep').mkdir(parents=True)
    os.symlink(pairs[0].image.parent, tmp_path/'all/linked'); os.symlink(tmp_path/'all', tmp_path/'all/deep/circle')
    assert len(list_images(tmp_path/'all')) == len(pairs)


def test_strange_names_in_a_data_set(own, pairs):
    "A dangling link, a FIFO and a name that is no text: each is named, and all others are checked."
    pairs[0].image.unlink(); os.symlink('/nowhere', pairs[0].image)
    pairs[1].mask.unlink(); os.mkfifo(pairs[1].mask)
    for path in pairs[2]: path.rename(path.with_name(os.fsdecode(b'\xff\x1b[31m') + path.suffix))
    report = check(own)
    assert [(p.kind, p.file) for p in report.errors] == [('unreadable', pairs[0].image), ('unreadable', pairs[1].mask)]
    assert report.summary['TrainDataset']['pairs'] == len(pairs) - 1, 'masks that could be read'
    with pytest.raises(InputError, match='2 broken of 16 pairs'): PolypDataset(train_pairs(own), 64)


def test_what_is_hashed_is_decoded(pairs, monkeypatch):
    "`load_pair` reads each file once, decodes it once, and hashes nothing; the part's fingerprint costs no second reading."
    reads, decoded = Counter(), Counter()
    read, open_image = loaders.read_bytes, data_images.open_image
    monkeypatch.setattr(loaders, 'read_bytes', lambda path: reads.update([path]) or read(path))
    monkeypatch.setattr(data_images, 'read_bytes', lambda path: pytest.fail(f'{path} is read again'))
    monkeypatch.setattr(data_images, 'open_image', lambda source, name=None: decoded.update([name]) or open_image(source, name))
    dataset = PolypDataset(pairs, 64)
    assert set(reads.values()) == set(decoded.values()) == {1} and len(reads) == len(decoded) == 2*len(pairs)
    monkeypatch.setattr(loaders, 'bytes_hash', lambda content: pytest.fail('load_pair hashes'))
    load_pair(pairs[0], 64)
    monkeypatch.undo()
    assert dataset.fingerprint == fingerprint(pairs[::-1])


def test_the_fingerprint_knows_content_and_nothing_else(pairs, tmp_path):
    moved = [Pair(shutil.copy(pair.image, tmp_path/f'{9 - i}a.png'), pair.mask) for i, pair in enumerate(pairs[:9])]
    assert fingerprint(moved) == fingerprint(pairs[:9])
    assert fingerprint(pairs[:8]) != fingerprint(pairs[:9])
    assert fingerprint([Pair(pairs[0].image, pairs[1].mask), Pair(pairs[1].image, pairs[0].mask)]) != fingerprint(pairs[:2])
    content = bytearray(pairs[0].mask.read_bytes()); content[-1] ^= 1; pairs[0].mask.write_bytes(content)
    assert fingerprint(pairs[:9]) != fingerprint(moved[1:] + [Pair(moved[0].image, pairs[1].mask)])


# Check

def kinds(report): return sorted((p.kind, p.severity) for p in report)


def test_check_finds_leaks(own, pairs):
    tests = test_sets(own)['Synthetic']
    for path in pairs[0]: shutil.copy(path, (tests[0].image if path == pairs[0].image else tests[0].mask))
    read_image(pairs[1].image).resize((160, 128)).save(tests[1].image, 'jpeg', quality=70)
    Image.open(pairs[1].mask).resize((160, 128)).save(tests[1].mask)
    assert kinds(check(own)) == [('duplicate across train and test', 'error'), ('near-duplicate across train and test', 'note')]


def test_check_finds_a_cut_sequence(tmp_path):
    data = make_synthetic(tmp_path, n_train=20, n_test=5, size=(48, 64))
    assert kinds(check(data)) == [], 'two sets that count from 0 share no sequence'
    shutil.rmtree(data/'TestDataset')
    for pair in train_pairs(data)[1::3]:
        for path, kind in zip(pair, ('images', 'masks')):
            (data/'TestDataset/clip'/kind).mkdir(parents=True, exist_ok=True); path.rename(data/'TestDataset/clip'/kind/path.name)
    report = check(data)
    assert kinds(report) == [('sequence across train and test', 'note')] and '7 of 7 frames' in str(report[0])


def test_check_finds_masks_that_are_inverted_or_full(own, pairs):
    for pair in pairs[:2]: grey(~read_mask(pair.mask), pair.mask)
    grey(np.full((96, 120), 255, np.uint8), pairs[2].mask)
    assert kinds(check(own)) == [('full mask', 'note'), ('inverted mask', 'note'), ('inverted mask', 'note')]
    for pair in pairs[3:]: grey(~read_mask(pair.mask), pair.mask)
    report = check(own)
    assert [p.kind for p in report.errors] == ['inverted masks'] and '16 of 16' in str(report[0])
    assert len(report.lines()) < 5 < len(report)


def test_check_finds_orientation_tags(own, pairs):
    exif = Image.Exif(); exif[0x0112] = 3
    read_image(pairs[0].image).save(pairs[0].image, exif=exif)
    assert kinds(check(own)) == [('orientation tags differ', 'note')]
    read_image(pairs[0].image).save(pairs[0].image, exif=exif); Image.open(pairs[0].mask).save(pairs[0].mask, exif=exif)
    assert kinds(check(own)) == []


def test_summary_counts_area_and_empty_frames(own, pairs):
    for pair, rows in zip(pairs, (0, 48, 24)):
        mask = np.zeros((96, 120), np.uint8); mask[:rows] = 255; grey(mask, pair.mask)
    for pair in pairs[3:]: grey(np.pad(np.full((24, 30), 255, np.uint8), ((0, 72), (0, 90))), pair.mask)
    report = check(own)
    assert report.summary['TrainDataset'] == dict(pairs=16, without_polyp=1/16, area_min=6.25, area_median=6.25, area_max=50)
    assert [(p.kind, p.file) for p in report.errors] == [('empty mask', pairs[0].mask)]


@pytest.mark.real
def test_check_of_the_published_data(real_data):
    start = time.process_time()
    report = check(real_data)
    assert time.process_time() - start < 240, 'two minutes on two cores'
    assert report.errors == []
    found = Counter((p.kind, p.file.relative_to(real_data).parts[1]) for p in report)
    assert found['sequence across train and test', 'CVC-ClinicDB'] == 1 and sum(n for (kind, _), n in found.items() if kind.startswith('sequence')) == 1
    assert found['near-duplicate across train and test', 'CVC-ClinicDB'] > 15, 'frames of one video'
    assert not {name for (kind, name) in found if kind.startswith('near') and name != 'CVC-ClinicDB'}
    assert len(report.lines()) < 10
    assert 12 < report.summary['Kvasir']['area_median'] < 12.5 and report.summary['TrainDataset']['pairs'] == 1450


# Convert

def coco_of(pairs, folder, how):
    "A COCO data set of the pairs."
    from pycocotools import mask as coco_mask
    (folder/'img').mkdir(parents=True)
    entries, annotations = [], []
    for i, pair in enumerate(pairs):
        shutil.copy(pair.image, folder/'img'); mask = read_mask(pair.mask); height, width = mask.shape
        entries.append(dict(id=i, file_name=pair.image.name, width=width, height=height))
        runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        if how == 'packed': regions = [dict(runs, counts=runs['counts'].decode())]
        elif how == 'runs':
            flat = np.concatenate([[0], mask.T.ravel(), [2]]); edges = np.flatnonzero(np.diff(flat.astype(int)))
            regions = [dict(size=[height, width], counts=np.diff(np.concatenate([[0], edges])).tolist())]
        else: # a rectangle for every run of a row
            regions = [[[x0, y, x1, y, x1, y + 1, x0, y + 1] for y, row in enumerate(mask) for x0, x1 in np.flatnonzero(np.diff(np.pad(row, 1).astype(int))).reshape(-1, 2).tolist()]]
        annotations += [dict(id=len(annotations), image_id=i, category_id=1, segmentation=region) for region in regions]
    (folder/'instances.json').write_text(json.dumps(dict(images=entries, annotations=annotations, categories=[dict(id=1, name='polyp')])))
    return folder


@pytest.mark.parametrize('how', ['polygons', 'runs', 'packed'])
def test_coco(how, pairs, tmp_path):
    report = convert(coco_of(pairs, tmp_path/'coco', how), tmp_path/'out')
    made = train_pairs(tmp_path/'out')
    assert report == [] and [p.image.read_bytes() for p in made] == [p.image.read_bytes() for p in pairs]
    for old, new in zip(pairs, made):
        assert np.array_equal(read_mask(old.mask), read_mask(new.mask))
        assert set(np.unique(np.asarray(Image.open(new.mask)))) == {0, 255}


def test_coco_entries_that_cannot_be_taken(pairs, tmp_path):
    coco = coco_of(pairs[:8], tmp_path/'coco', 'packed')
    told = json.loads((coco/'instances.json').read_text())
    told['images'][0]['width'] += 1
    told['images'][1]['file_name'] = '../../../etc/passwd'
    told['annotations'][2]['segmentation'] = []
    told['annotations'][3]['segmentation'] = [[0, 0, 3e9, 0, 3e9, 3e9]]
    told['annotations'][4]['segmentation']['counts'] = 'zzz'
    told['annotations'][5]['category_id'] = 2; told['categories'].append(dict(id=2, name='tool'))
    told['images'].append(dict(told['images'][6], id=99))
    (coco/'instances.json').write_text(json.dumps(told))
    report = convert(coco/'instances.json', tmp_path/'out')
    assert sorted(p.detail.split(':')[-1].split(' as ')[0].strip() for p in report) == sorted(['annotated', 'no pictures of that name', 'a box without an outline', 'a polygon far outside of the picture',
                                                                                             'run lengths that do not decode', 'annotated before'])
    assert [p.image.name for p in train_pairs(tmp_path/'out')] == [p.image.name for p in pairs[5:8]]
    assert not read_mask(train_pairs(tmp_path/'out')[0].mask).any(), 'a frame with a tool and no polyp'


@pytest.mark.parametrize('content', ['', '[]', '{}', 'nan', '{"images": 1, "annotations": []}', '{"images": [1], "annotations": []}', '{"images": [{"id": [1], "file_name": 3}], "annotations": [{"image_id": {}, "category_id": []}]}',
                                     '{"images": [], "annotations": []}', '{"images": [], "annotations": [{"image_id": 1, "category_id": 1}], "categories": 5}', '['*100_000])
def test_foreign_json(content, tmp_path):
    (tmp_path/'x.json').write_text(content)
    with pytest.raises(InputError, match='x.json'): convert(tmp_path/'x.json', tmp_path/'out')
    assert os.listdir(tmp_path) == ['x.json']


@pytest.mark.parametrize('image, mask', [('Original/{}', 'Ground Truth/{}'), ('images/{}', 'masks/{}'), ('{}', '{}_mask'), ('segmented-images/images/{}', 'segmented-images/masks/{}')])
def test_layouts_are_converted(image, mask, pairs, tmp_path):
    source = relaid(pairs, tmp_path/'source', image, mask)
    if 'segmented' in image:
        with pytest.raises(InputError, match='a data set is in segmented-images'): convert(source, tmp_path/'out')
        source /= 'segmented-images'
    report = convert(source, tmp_path/'out', test=0.25, seed=1, test_name='held out')
    assert report == [] and {name: part['pairs'] for name, part in report.summary.items()} == {'TrainDataset': 12, 'held out': 4}
    both = train_pairs(tmp_path/'out') + test_sets(tmp_path/'out')['held out']
    assert fingerprint([Pair(p.image, p.image) for p in both]) == fingerprint([Pair(p.image, p.image) for p in pairs]), 'images keep their bytes'
    convert(source, tmp_path/'again', test='0.25', seed=1, test_name='held out')
    assert [p.image.name for p in test_sets(tmp_path/'again')['held out']] == [p.image.name for p in test_sets(tmp_path/'out')['held out']]


def test_convert_overwrites_nothing(pairs, tmp_path):
    source = relaid(pairs, tmp_path/'source')
    before = {path: path.read_bytes() for path in source.rglob('*') if path.is_file()}
    (tmp_path/'full').mkdir(); (tmp_path/'full/x').write_text('mine')
    for out in (source, tmp_path/'full', tmp_path/'full/x'):
        with pytest.raises(InputError, match='not empty'): convert(source, out)
    with pytest.raises(InputError, match='cannot be made'): convert(source, tmp_path/'full/x/y')
    (tmp_path/'empty').mkdir(); convert(source, tmp_path/'empty')
    assert len(train_pairs(tmp_path/'empty')) == len(pairs) and (tmp_path/'full/x').read_text() == 'mine'
    assert before == {path: path.read_bytes() for path in source.rglob('*') if path.is_file()}


def test_convert_says_what_it_left(pairs, tmp_path):
    source = relaid(pairs, tmp_path/'source')
    found = list_pairs(source)
    found[0].mask.unlink()
    found[1].image.write_bytes(found[1].image.read_bytes()[:900])
    coded(read_mask(found[2].mask), '0/1', found[2].mask)
    Image.open(found[3].mask).resize((9, 9)).save(found[3].mask)
    report = convert(source, tmp_path/'out')
    assert {(p.file.stem, p.file.parent.name) for p in report} == {(found[i].image.stem, 'images') for i in range(4)} and all(p.severity == 'note' for p in report)
    assert any('--mask-above 0' in p.detail for p in report) and len(train_pairs(tmp_path/'out')) == len(pairs) - 4
    assert len(convert(source, tmp_path/'two', layout=Layout(mask_above=0))) == 3


def test_a_killed_conversion_leaves_no_data_set(pairs, tmp_path, monkeypatch):
    source = relaid(pairs, tmp_path/'source')
    monkeypatch.setattr('polyp_difom.data.convert._write', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): convert(source, tmp_path/'out')
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != 'own') == ['source']


def changed_coco(folder, **changes):
    "The COCO file of a folder with other entries."
    file = folder/'instances.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file


@pytest.fixture
def coco(pairs, tmp_path): return coco_of(pairs[:4], tmp_path/'coco', 'packed')


@pytest.fixture
def told(coco): return json.loads((coco/'instances.json').read_text())


def test_coco_annotations_of_no_image(coco, told, pairs, tmp_path):
    astray = [dict(a, image_id=a['image_id'] + 3) for a in told['annotations']]
    with pytest.raises(InputError, match='3 of 4 annotations belong to no image'): convert(changed_coco(coco, annotations=astray), tmp_path/'out')
    with pytest.raises(InputError, match='several images of id 1'):
        convert(changed_coco(coco, annotations=told['annotations'], images=told['images'] + [dict(told['images'][1], id=1.0)]), tmp_path/'out')
    convert(changed_coco(coco, images=told['images'], annotations=[dict(a, image_id=float(a['image_id']), category_id=1.0) for a in told['annotations']]), tmp_path/'out')
    for old, new in zip(pairs, train_pairs(tmp_path/'out')): assert np.array_equal(read_mask(old.mask), read_mask(new.mask)), 'pandas writes ids as floats'


@pytest.mark.parametrize('two_files', [False, True])
def test_coco_one_picture_of_two_ids(two_files, coco, told, pairs, tmp_path):
    square = dict(image_id=77, category_id=1, segmentation=[[2, 2, 12, 2, 12, 12, 2, 12]])
    again = dict(told['images'][0], id=77)
    if two_files: (coco/'more.json').write_text(json.dumps(dict(told, images=[again], annotations=[square])))
    else: changed_coco(coco, images=told['images'] + [again], annotations=told['annotations'] + [square])
    report = convert(coco, tmp_path/'out')
    wanted = read_mask(pairs[0].mask); wanted[2:12, 2:12] = True
    assert [p.kind for p in report] == ['joined'] and np.array_equal(read_mask(train_pairs(tmp_path/'out')[0].mask), wanted)


POLYP, TOOL = dict(id=1, name='polyp'), dict(id=2, name='instrument')


@pytest.mark.parametrize('categories, number, said', [
    ([POLYP, TOOL], 2, 'empty'), ([dict(POLYP, name='non-polyp'), dict(TOOL, name='Polyps')], 1, 'empty'), ([dict(POLYP, name='No polyp'), dict(TOOL, name='polyp')], 2, 'full'),
    ([dict(POLYP, name='lesion')], 1, 'full'), ([dict(POLYP, id='1')], 1, 'full'), ([dict(POLYP, name='lesion'), TOOL], 2, '--categories NAME'), ([dict(POLYP, name='non-polyp')], 1, '--categories NAME'),
    ([dict(POLYP, name='polyp'), dict(TOOL, name='polyp, non-adenomatous')], 1, '--categories NAME'), ([dict(POLYP, name='polypectomy'), TOOL], 1, '--categories NAME'),
    ([POLYP, dict(TOOL, id=1)], 1, 'category 1 is both polyp and instrument'), ([POLYP], 0, 'category 0, which is not declared')])
def test_coco_categories(categories, number, said, coco, told, tmp_path):
    file = changed_coco(coco, categories=categories, annotations=[dict(a, category_id=number) for a in told['annotations']])
    if said not in ('empty', 'full'):
        with pytest.raises(InputError) as error: convert(file, tmp_path/'out')
        assert said in str(error.value) and not (tmp_path/'out').exists()
    else:
        convert(file, tmp_path/'out')
        assert [read_mask(pair.mask).any() for pair in train_pairs(tmp_path/'out')] == [said == 'full']*4


def test_coco_outlines_without_a_pixel(coco, told, pairs, tmp_path):
    width, height = told['images'][0]['width'], told['images'][0]['height']
    shares, line, beside = [[0.1, 0.1, 0.9, 0.1, 0.9, 0.9, 0.1, 0.9]], [[5, 5, 20, 5, 5, 5]], [[width + 5, 5, width + 30, 5, width + 30, 30]]
    points = [[[1, 2], [3, 4], [20, 30]]]
    annotations = [dict(a, segmentation=s) for a, s in zip(told['annotations'], (shares, line, beside, points))]
    report = convert(changed_coco(coco, annotations=annotations), tmp_path/'out')
    assert {p.file.name: p.detail for p in report} == dict(zip((p.image.name for p in pairs), ['an outline in 0..1, not in pixels'] + ['an outline without a pixel in the picture']*2))
    flat = dict(annotations[3], segmentation=[[1, 2, 3, 4, 20, 30]])
    convert(changed_coco(coco, annotations=[*told['annotations'][:3], flat]), tmp_path/'flat')
    made, wanted = train_pairs(tmp_path/'out'), train_pairs(tmp_path/'flat')
    assert len(made) == 1 and read_mask(made[0].mask).any() and np.array_equal(read_mask(made[0].mask), read_mask(wanted[3].mask))


def test_many_coco_outlines_take_little_memory():
    import tracemalloc
    from polyp_difom.data.convert import _coco_mask
    tracemalloc.start()
    mask = _coco_mask({}, [dict(segmentation=[[i, i, i + 9, i, i + 9, i + 9, i, i + 9]]) for i in range(100)])(500, 500)
    assert mask.sum() > 1000 and tracemalloc.get_traced_memory()[1] < 10*mask.nbytes
    tracemalloc.stop()


def test_convert_leaves_no_part_empty(pairs, tmp_path):
    source, names = relaid(pairs[:4], tmp_path/'source'), tmp_path/'test.txt'
    for content, said in (('', 'no names in it'), (' \n\n', 'no names in it'), ('\n'.join(p.image.stem for p in pairs[:4]), 'leaves none to train on')):
        names.write_text(content)
        with pytest.raises(InputError, match=said): convert(source, tmp_path/'out', test=names)
    with pytest.raises(InputError, match='leaves none to train on'): convert(source, tmp_path/'out', test=0.999)
    for name in ('.hidden', '..', 'TrainDataset'):
        with pytest.raises(InputError, match='test set'): convert(source, tmp_path/'out', test=0.5, test_name=name)
    names.write_text(pairs[2].image.name, encoding='utf-8-sig')
    broken = list_pairs(source)[2].image; content = broken.read_bytes(); broken.write_bytes(b'')
    with pytest.raises(InputError, match='nothing to take for source'): convert(source, tmp_path/'out', test=names)
    assert not (tmp_path/'out').exists()
    broken.write_bytes(content); convert(source, tmp_path/'out', test=names)
    assert [p.image.name for p in test_sets(tmp_path/'out')['source']] == [pairs[2].image.name] and len(train_pairs(tmp_path/'out')) == 3


def test_convert_removes_what_dead_processes_left(pairs, tmp_path):
    source = relaid(pairs[:2], tmp_path/'source')
    code = ('import os, signal, sys; from polyp_difom.data import convert as c; '
            'c._write = lambda *a: os.kill(os.getpid(), signal.SIGKILL); c.convert(*sys.argv[1:])')
    assert subprocess.run([sys.executable, '-c', code, source, tmp_path/'out'], capture_output=True).returncode == -9
    (left,) = tmp_path.glob('.out.part-*')
    for name in (f'.out.part-{os.getpid()}-x', '.out.part-mine', '.other.part-0'): (tmp_path/name).mkdir()
    convert(source, tmp_path/'out')
    assert not left.exists() and {path.name for path in tmp_path.glob('.*')} == {f'.out.part-{os.getpid()}-x', '.out.part-mine', '.other.part-0'}


def test_import_is_light():
    "Layouts, check and conversion need neither torch nor fastai nor timm."
    code = 'import sys; import polyp_difom.data.convert; print([name for name in ("torch", "fastai", "timm", "matplotlib", "transformers") if name in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


# --- augmentation --------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['paper', 'strong'])
def test_an_augmentation_moves_masks_targets_and_soft_masks_with_their_image(name):
    "All of them show the same blobs: bright in the image, 1 in the mask, above 0.5 in what a teacher says."
    torch.manual_seed(3)
    blobs = (F.interpolate(torch.rand(16, 1, 5, 5), (64, 64), mode='bicubic') > .6).float()
    pooled = lambda side: F.interpolate(blobs, (side, side), mode='area').expand(-1, 3, -1, -1).contiguous()
    image, mask, extras = Augment(64, name, scales=(1.,))(((.1 + .8*blobs).expand(-1, 3, -1, -1).mul(255).byte(), blobs.byte(), dict(low=pooled(8), high=pooled(32), soft=(255*blobs).byte())))
    assert (mask != blobs).float().mean() > .05, 'something has moved'
    like = lambda x, side: torch.corrcoef(torch.stack([x.float().mean(1).flatten(), F.interpolate(mask, (side, side), mode='area').flatten()]))[0, 1]
    assert like(extras['soft'], 64) > .97 and like(extras['high'], 32) > .95 and like(extras['low'], 8) > .9
    assert like(image, 64) > (.99 if name == 'paper' else .8), 'colours, light and spots change the image alone'
    flipped = dict(extras, high=extras['high'].flip(-1))
    assert like(flipped['high'], 32) < .5
