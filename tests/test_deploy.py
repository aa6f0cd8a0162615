"Pictures in, maps out; and whatever may go wrong on the way."
import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from polyp_difom.core import InputError
from polyp_difom.data.images import list_images, read_image
from polyp_difom.data.synthetic import make_synthetic
from polyp_difom.deploy import predictor as deploy
from polyp_difom.deploy.predictor import Predictor, load_predictor, predict_files, read_run
from polyp_difom.model.model import PolypDiFoM, predict, save_model, to_input
from polyp_difom.students.registry import create_student
from polyp_difom.students.unet import UNet
from polyp_difom.weights import save_tensors

SETTINGS = dict(student='unet', options={}, distilled=True, size=64, epochs=[1, 0, 0], seed=0)


def make_run(folder, student, **settings):
    "A run folder of a network as it is."
    torch.manual_seed(0)
    save_model(PolypDiFoM(student, 'paper'), folder/'best.safetensors')
    (folder/'config.json').write_text(json.dumps(dict(settings=SETTINGS | settings)))
    return folder


@pytest.fixture(scope='session')
def run(tmp_path_factory):
    "A run of a small U-Net that has learnt nothing. Not to be changed."
    return make_run(tmp_path_factory.mktemp('deploy')/'', create_student('unet', width=4))


@pytest.fixture
def images(data, tmp_path):
    "Three pictures of one's own."
    return shutil.copytree(data/'TestDataset/Synthetic/images', tmp_path/'images')


def content(folder): return {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


# ---- the predictor

def test_path_array_and_picture_give_the_map_of_predict(run, images):
    path, predictor = sorted(images.iterdir())[0], load_predictor(run, device='cpu')
    picture = read_image(path)
    expected = predict(read_run(run)[0], picture, 64)
    assert expected.shape == picture.size[::-1] and expected.dtype == np.float32 and 0 <= expected.min() <= expected.max() <= 1
    array = np.asarray(picture)
    for given in (path, str(path), picture, array, array/np.float32(255), array/255., picture.convert('RGBA'), Image.open(path)): np.testing.assert_array_equal(predictor(given), expected)


def test_a_list_gives_maps_in_its_order_in_batches(run, data, images, monkeypatch):
    predictor = Predictor(read_run(run)[0], 64, batch_size=2)
    pictures = [read_image(path) for path in list_images(data)[:4]] + [read_image(sorted(images.iterdir())[0]).crop((0, 0, 50, 70))]
    sizes = []
    predictor.model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    maps = predictor(pictures)
    assert sizes == [2, 2, 1] and predictor([]) == []
    for made, picture in zip(maps, pictures, strict=True): np.testing.assert_allclose(made, predict(predictor.model, picture, 64), atol=1e-6)


def test_a_picture_that_was_held_sideways_is_turned_first(run, images, tmp_path):
    picture, predictor = read_image(sorted(images.iterdir())[0]), load_predictor(run, device='cpu')
    exif = Image.Exif(); exif[0x0112] = 6
    picture.save(tmp_path/'sideways.png', exif=exif)
    upright = predictor(picture.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(predictor(tmp_path/'sideways.png'), upright)
    np.testing.assert_array_equal(predictor(Image.open(tmp_path/'sideways.png')), upright)


RGB = np.zeros((8, 9, 3), np.uint8)


@pytest.mark.parametrize('wrong', [RGB[..., 0], RGB[None], RGB.transpose(2, 0, 1), RGB[:0], RGB[..., :2], np.zeros((8, 9, 4), np.uint8), RGB.astype(int), RGB.astype(np.uint16), RGB > 0,
                                   RGB - 1., RGB + 2., RGB*np.nan, None, 3, b'bytes', Image.new('I;16', (4, 4)), Image.new('F', (4, 4)), 'nowhere.png'], ids=lambda value: f'{type(value).__name__}{getattr(value, "shape", "")}')
def test_what_is_no_picture_is_refused_in_one_line(run, wrong):
    predictor = load_predictor(run, device='cpu')
    for given in (wrong, [wrong]):
        with pytest.raises(InputError) as error: predictor(given)
        assert '\n' not in str(error.value)


def test_the_predictor_of_ones_own_student(tmp_path, images):
    run = make_run(tmp_path, UNet(width=2))
    path = sorted(images.iterdir())[0]
    expected = load_predictor(run, student=UNet(width=2))(path)
    written, = predict_files(run, path, tmp_path/'maps', student=UNet(width=2))
    np.testing.assert_array_equal(np.asarray(Image.open(written)), np.round(expected*255).astype(np.uint8))
    with pytest.raises(InputError, match='pass student='): load_predictor(run)
    with pytest.raises(InputError, match='does not fit'): load_predictor(run, student=UNet(width=3))


def test_a_device_that_is_not_there(run):
    for device in ('cuda:99', 'nothing'):
        with pytest.raises(InputError, match=f'device {device}'): load_predictor(run, device=device)


@pytest.mark.parametrize('size', [(160, 128), (352, 288), (64, 64), (300, 40), (1, 1), (900, 1)])
def test_the_order_of_resizing_is_pillows_of_old(size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    expected = np.asarray(picture.resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal((to_input(picture, 64)*255).round().byte().permute(1, 2, 0).numpy(), expected)


@pytest.mark.real
def test_on_real_frames_the_maps_are_those_of_predict(run, real_data):
    paths = [path for path in list_images(real_data)[::200]]
    for made, path in zip(load_predictor(run, device='cpu')(paths), paths): np.testing.assert_allclose(made, predict(read_run(run)[0], read_image(path), 64), atol=1e-5)


# ---- runs

@pytest.mark.parametrize('key, value', [('size', 'large'), ('size', 10**9), ('size', 31), ('size', -64), ('size', 64.), ('size', True), ('size', None), ('student', 3), ('options', []), ('distilled', 'no'),
                                        ('epochs', 3), ('epochs', ['x']), ('seed', 'x'), ('seed', [])])
def test_a_setting_that_cannot_be_is_named(run, tmp_path, key, value):
    own = shutil.copytree(run, tmp_path/'own')
    (own/'config.json').write_text(json.dumps(dict(settings=SETTINGS | {key: value})))
    with pytest.raises(InputError, match=f'config.json: settings: {key} is '): read_run(own)
    (own/'config.json').write_text(json.dumps(dict(settings={k: v for k, v in SETTINGS.items() if k != key})))
    with pytest.raises(InputError, match=f'config.json: settings: {key} is missing'): read_run(own)


@pytest.mark.parametrize('text', [b'', b'{', b'\xff\x00', b'[]', b'3', b'{}', b'{"settings": []}', b'['*100_000, b'{"settings": {"size": ' + b'9'*5000 + b'}}'])
def test_a_configuration_that_is_none_is_named(run, tmp_path, text):
    own = shutil.copytree(run, tmp_path/'own')
    (own/'config.json').write_bytes(text)
    with pytest.raises(InputError, match='config.json: '): read_run(own)


def test_a_configuration_that_is_no_file(run, tmp_path):
    own = shutil.copytree(run, tmp_path/'own')
    (own/'config.json').unlink()
    with pytest.raises(InputError, match='no run in it'): read_run(own)
    os.mkfifo(own/'config.json')
    with pytest.raises(InputError, match='not a regular file'): read_run(own)


def test_a_diverged_run_predicts_nothing(run, images, tmp_path):
    own = shutil.copytree(run, tmp_path/'own')
    model, _ = read_run(own)
    save_tensors({k: v*float('nan') if v.is_floating_point() else v for k, v in model.state_dict().items()}, own/'best.safetensors', model.config)
    with pytest.raises(InputError, match='not finite'): predict_files(own, images, tmp_path/'maps')
    assert not (tmp_path/'maps').exists()


# ---- files

def test_maps_masks_and_overlays_lie_as_the_pictures_do(run, data, tmp_path):
    source = tmp_path/'clinic'
    for place in ('', 'monday', 'monday/morning', 'masks'): shutil.copytree(data/'TestDataset/Synthetic/images', source/place, dirs_exist_ok=True)
    made = {kind: predict_files(run, source, tmp_path/kind, **options) for kind, options in dict(maps={}, masks=dict(threshold=0.5), overlays=dict(overlay=True)).items()}
    for kind, paths in made.items():
        assert sorted(str(path.relative_to(tmp_path/kind)) for path in paths) == sorted(f'{place}{i:05d}.png' for place in ('', 'monday/', 'monday/morning/') for i in range(3))
    predictor = load_predictor(run, device='cpu')
    for path, mask, overlay in zip(*made.values()):
        picture = read_image(source/path.relative_to(tmp_path/'maps'))
        probability = predictor(picture)
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.round(probability*255).astype(np.uint8))
        np.testing.assert_array_equal(np.asarray(Image.open(mask)), (probability >= 0.5)*np.uint8(255))
        drawn, outside = np.asarray(Image.open(overlay)), probability < 0.5
        np.testing.assert_array_equal(drawn[outside], np.asarray(picture)[outside])
        assert outside.all() or (drawn != np.asarray(picture)).any(2)[~outside].all()


def test_the_overlay_tells_inside_from_outline():
    polyp = np.zeros((60, 60), bool); polyp[10:50, 10:50] = True
    drawn = np.asarray(deploy._draw_overlay(Image.new('RGB', (60, 60), (200, 80, 60)), polyp))
    assert tuple(drawn[10, 30]) == (86, 180, 233) and tuple(drawn[0, 0]) == (200, 80, 60)
    np.testing.assert_allclose(drawn[30, 30], np.array((200, 80, 60))*.75 + np.array((86, 180, 233))*.25, atol=.5)


def test_a_threshold_of_the_overlay(run, images, tmp_path):
    whole, none = (predict_files(run, images, tmp_path/name, threshold=threshold, overlay=True) for name, threshold in (('whole', 0), ('none', 1)))
    picture = np.asarray(read_image(images/none[0].name))
    np.testing.assert_array_equal(np.asarray(Image.open(none[0])), picture)
    assert (np.asarray(Image.open(whole[0])) != picture).any(2).mean() > .9


def test_equal_stems_keep_their_suffix(run, images, tmp_path):
    path = sorted(images.iterdir())[0]
    read_image(path).save(path.with_suffix('.jpg')); read_image(path).save(path.with_suffix('.PNG'))
    written = {path.name for path in predict_files(run, images, tmp_path/'maps')}
    assert written == {'00000.jpg.png', '00000.png.png', '00000.PNG.png', '00001.png', '00002.png'}
    read_image(path).save(images/'00000.png.bmp')
    with pytest.raises(InputError, match='00000.png.png: two pictures'): predict_files(run, images, tmp_path/'more')
    assert not (tmp_path/'more').exists()


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize('options', [{}, dict(threshold=0.5), dict(overlay=True)], ids=['map', 'mask', 'overlay'])
def test_no_picture_that_is_read_is_replaced(run, images, tmp_path, options, overwrite):
    (tmp_path/'link').symlink_to(images)
    before, path = content(images), sorted(images.iterdir())[0]
    (tmp_path/'twin').mkdir(); os.link(path, tmp_path/'twin'/path.name)
    for out in (images, f'{images}/', tmp_path/'link', images/'..'/'images', tmp_path/'twin'):
        for source in (images, tmp_path/'link', path):
            with pytest.raises(InputError): predict_files(run, source, out, overwrite=overwrite, **options)
    assert content(images) == before


def test_links_in_the_output_lead_nowhere(run, images, tmp_path):
    out, name = tmp_path/'maps', sorted(path.name for path in images.iterdir())[0]
    (out/'monday').parent.mkdir(); (tmp_path/'elsewhere').mkdir(); (tmp_path/'precious').write_text('precious')
    (out/name).symlink_to(tmp_path/'precious')
    with pytest.raises(InputError, match='1 of 3 outputs are there already'): predict_files(run, images, out)
    predict_files(run, images, out, overwrite=True)
    assert (tmp_path/'precious').read_text() == 'precious' and not (out/name).is_symlink()
    shutil.copytree(images, images/'monday'); (out/'monday').symlink_to(tmp_path/'elsewhere')
    with pytest.raises(InputError, match='a link that leads out of'): predict_files(run, images, out, overwrite=True)
    assert not list((tmp_path/'elsewhere').iterdir())
    (tmp_path/'dangling').symlink_to('nowhere')
    with pytest.raises(InputError, match='dangling'): predict_files(run, images, tmp_path/'dangling')


def test_what_is_there_is_replaced_only_on_request_and_asked_for_first(run, images, tmp_path, monkeypatch):
    written = predict_files(run, images, tmp_path/'maps')
    written[1].unlink(); written[0].write_text('mine')
    with monkeypatch.context() as patched:
        patched.setattr(Predictor, '__call__', lambda *given: pytest.fail('predicted before it was checked'))
        with pytest.raises(InputError, match=r'2 of 3 outputs are there already \(00000.png, 00002.png\).*--overwrite'): predict_files(run, images, tmp_path/'maps')
    assert written[0].read_text() == 'mine'
    predict_files(run, images, tmp_path/'maps', overwrite=True)
    assert Image.open(written[0]).size == (120, 96)


def test_predictions_among_the_pictures_are_not_read(run, images):
    first = predict_files(run, images, images/'maps')
    assert predict_files(run, images, images/'maps', overwrite=True) == first and len(first) == 3
    assert len(predict_files(run, images, images.parent/'all')) == 6, 'another folder: they are pictures like others'
    assert len(predict_files(run, images, images.parent, overwrite=True)) == 6, 'the pictures are in the output folder, not among the outputs'


@pytest.mark.parametrize('threshold', [7, -1, 1.0001, float('nan'), float('inf')])
def test_a_threshold_that_cannot_be(run, images, tmp_path, threshold):
    for overlay in (False, True):
        with pytest.raises(InputError, match='give a probability, 0 to 1'): predict_files(run, images, tmp_path/'masks', threshold=threshold, overlay=overlay)
    assert not (tmp_path/'masks').exists()


def test_the_rest_is_done_first(run, images, tmp_path):
    (images/'broken.jpg').write_bytes(b'not a picture')
    shutil.copy(images/'00000.png', images/('n'*251 + '.png')); Image.new('RGB', (9, 9)).save(images/('m'*250 + '.bmp'))
    shutil.copy(images/'00000.png', images/('o'*251 + '.jpg'))
    os.rename(images/'00001.png', os.fsencode(images) + b'/\xff\xfe.png')
    with pytest.raises(InputError, match=r'6 of 7 pictures predicted; .*broken.jpg: cannot be decoded'): predict_files(run, images, tmp_path/'maps')
    assert len(list((tmp_path/'maps').iterdir())) == 6 and os.path.exists(os.fsencode(tmp_path) + b'/maps/\xff\xfe.png')
    assert not [path for path in (tmp_path/'maps').iterdir() if path.name.startswith('.')]


def test_an_output_name_that_is_too_long_is_named_at_the_end(run, images, tmp_path):
    for suffix in ('.png', '.jpg'): Image.new('RGB', (9, 9)).save(images/('ä'*120 + 'x'*10 + suffix)) # equal stems: the outputs are longer by .png
    with pytest.raises(InputError, match='3 of 5 pictures predicted; .*its output has a name that is too long'): predict_files(run, images, tmp_path/'maps')
    assert len(list((tmp_path/'maps').iterdir())) == 3


def test_a_full_disk_stops_at_once(run, images, tmp_path, monkeypatch):
    saved = []
    def full(self, *given, **options): saved.append(1); raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(Image.Image, 'save', full)
    with pytest.raises(InputError, match='no space left'): predict_files(run, images, tmp_path/'maps')
    assert len(saved) == 1 and not list((tmp_path/'maps').iterdir())


@pytest.mark.parametrize('inside', ['', 'monday'])
def test_a_file_where_a_folder_should_be(run, images, tmp_path, inside):
    shutil.copytree(images, images/'monday')
    (tmp_path/'maps'/inside).parent.mkdir(exist_ok=True); (tmp_path/'maps'/inside).write_text('mine')
    with pytest.raises(InputError, match='maps'): predict_files(run, images, tmp_path/'maps')
    assert (tmp_path/'maps'/inside).read_text() == 'mine'


def test_sources_that_are_none(run, tmp_path):
    (tmp_path/'empty').mkdir(); (tmp_path/'dangling.png').symlink_to('nowhere')
    for source in ('nowhere', 'empty', 'dangling.png'):
        with pytest.raises(InputError, match=source): predict_files(run, tmp_path/source, tmp_path/'maps')
    assert not (tmp_path/'maps').exists()
