"Figures of awkward input, widgets that a browser would find, and inspectors that say what is wrong with what they show"
import errno
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import zarr
from ipywidgets.widgets.widget import _instances
from nbclient import NotebookClient
from PIL import Image

from polyp_difom.core import InputError
from polyp_difom.data import images as images_module
from polyp_difom.data.images import Layout, Pair, list_images, list_pairs, read_decisions
from polyp_difom.deploy.predictor import predict_files
from polyp_difom.features.extract import extract
from polyp_difom.show.figures import Spectrum, show_extremes, show_pairs, show_road
from polyp_difom.show.inspect import inspect, inspect_pairs
from polyp_difom.show.label import label_frames
from polyp_difom.show.view import View, to_png
from polyp_difom.show.widgets import Taught, compare, inspect_frequency, inspect_predictions, inspect_training, predict_pairs
from polyp_difom.targets.frequency import split_frequency
from polyp_difom.targets.latent import open_targets, target_of
from polyp_difom.training.runs import read_log, train
from polyp_difom.weights import read_tensors, save_tensors
from polyp_difom.model.model import PolypDiFoM
from polyp_difom.students.registry import create_student

NOTEBOOKS = Path(__file__).parents[1]/'nbs'/'09_show'


def save_pair(folder, name, shape):
    "A pair of noise, its mask half polyp."
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    mask = np.zeros(shape, np.uint8)
    mask.reshape(-1)[mask.size//2:] = 255
    pair = Pair(folder/f'{name}.png', folder/f'{name}_mask.png')
    for path, values in zip(pair, (noise, mask)): Image.fromarray(values).save(path)
    return pair


@pytest.mark.parametrize('name, shape', [('strip', (1, 5000)), ('pixel', (1, 1)), ('tower', (3000, 2)), (r'$\frac$', (20, 30)), ('bytes\udcff', (20, 30)), ('esc\x1b[31m\n', (20, 30))])
def test_any_picture_under_any_name_is_drawn(tmp_path, name, shape):
    pair = save_pair(tmp_path, name, shape)
    model = PolypDiFoM(create_student('unet', width=2)).eval()
    for figure in (show_pairs([pair]), show_extremes(model, [pair], [0.5], 32, name)): figure.savefig(tmp_path/'figure.png')
    assert all(axis.get_title().isprintable() for axis in figure.axes)


def test_extremes_are_the_extremes(data):
    pairs = list_pairs(data/'TestDataset'/'Synthetic')
    model = PolypDiFoM(create_student('unet', width=2)).eval()
    titles = [axis.get_title() for axis in show_extremes(model, pairs, [0.2, 0.9, 0.5], 32).axes]
    assert [title.split(',')[0] for title in titles] == [f'best: {pairs[1].image.name}', f'median: {pairs[2].image.name}', f'worst: {pairs[0].image.name}']


def test_the_road_shows_five_pictures(data):
    image = Image.open(list_pairs(data/'TrainDataset')[0].image).convert('RGB')
    truth = np.zeros(image.size[::-1], bool)
    truth[10:30, 10:30] = True
    figure = show_road(image, np.random.default_rng(0).standard_normal((9, 12, 15)), truth*0.9, truth)
    assert len(figure.axes) == 5 and len(figure.axes[-1].collections) == 2, 'prediction and truth have an outline each'


INSPECTORS = dict(frequency="inspect_frequency(features, data)", predictions="inspect_predictions(run, data)", comparison="compare(dict(one=run, two=run), data)", training="inspect_training(run, every=0)",
                  frames="label_frames(data + '/TestDataset/Synthetic/images', run, folder + '/decisions.csv')")


@pytest.fixture(scope='module')
def run(data, features, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp('show')/'run', student='unet,width=4', features=features, size=64, epochs=(1, 1, 0), steps=2, batch_size=4, components=4, device='cpu')


def test_what_is_displayed_is_known_to_the_front_end(data, features, run, tmp_path, monkeypatch):
    "A view names a model; a browser shows it only if the kernel has sent that model and its parts."
    monkeypatch.setenv('POLYP_DIFOM_STATIC', '')
    start = f"from polyp_difom.all import *\nfeatures, data, run, folder = {[str(place) for place in (features, data, run, tmp_path)]}"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in (start, *INSPECTORS.values())])
    notebook = NotebookClient(notebook, store_widget_state=True, timeout=300, kernel_name='python3').execute()
    models = notebook.metadata.widgets['application/vnd.jupyter.widget-state+json']['state']
    def inside(model): return [models[model]['model_module'], *(name for child in models[model]['state'].get('children', []) for name in inside(child.removeprefix('IPY_MODEL_')))]
    for name, cell in zip(INSPECTORS, notebook.cells[1:]):
        view = [output.data['application/vnd.jupyter.widget-view+json']['model_id'] for output in cell.outputs if 'application/vnd.jupyter.widget-view+json' in output.get('data', {})][-1] # bars come before
        assert inside(view).count('anywidget') == 1, name


def test_every_inspector_is_displayed_in_its_notebook():
    for notebook, names in {'03_widgets': ('inspect_frequency', 'inspect_predictions', 'compare', 'inspect_training'), '04_label': ('label_frames',)}.items():
        cells = [''.join(cell['source']).strip().splitlines() for cell in json.loads((NOTEBOOKS/f'{notebook}.ipynb').read_text())['cells'] if cell['cell_type'] == 'code']
        shown = [name for lines in cells for line in lines if (found := re.match(rf'(\w+) = ({"|".join(names)})\(', line)) and lines[-1] == found[1] for name in [found[2]]]
        assert sorted(shown) == sorted(names)


@pytest.mark.parametrize('split', ['hard', 'gaussian', 'butterworth', 'dct'])
def test_the_energies_of_the_spectrum_are_those_of_the_parts(split):
    maps = torch.randn(7, 12, 20)
    centred = maps - maps.mean((1, 2), keepdim=True)
    told = Spectrum(maps).shares(.3, split)
    assert told == pytest.approx([(part.square().mean()/centred.square().mean()).item() for part in split_frequency(centred, .3, split)], abs=1e-3)


def test_the_targets_of_an_image_that_was_not_taught_are_made_as_those_that_were(data, features, run):
    taught = Taught(run)
    images = [pair.image for pair in list_pairs(data/'TrainDataset')]
    held = open_targets(taught.store, json.loads((run/'config.json').read_text())['fingerprints']['targets']).of(images[:3])
    for i in range(3):
        for ours, theirs in zip(target_of(taught.store, taught.builder, images[i]), held[i]): assert np.abs(ours.numpy() - theirs).max() < 2e-2
    assert set(taught(images[0], 64)) == {'L1', 'L2'}
    with pytest.raises(InputError, match='no features'): taught(list_pairs(data/'TestDataset'/'Synthetic')[0].image, 64)


def test_decisions_reach_the_training(data, features, run, tmp_path):
    frames = label_frames(data/'TestDataset'/'Synthetic'/'images', run, tmp_path/'decisions.csv')
    frames.buttons[0].click()
    assert list_images(tmp_path/'decisions.csv') == [list_images(data/'TestDataset'/'Synthetic'/'images')[0].absolute()]
    with pytest.raises(InputError, match='1 of 1 frames are test or validation images'):
        train(data, tmp_path/'run', student='unet,width=4', features=features, unlabelled=tmp_path/'decisions.csv', size=64, epochs=(1, 0, 0), device='cpu')
    (tmp_path/'decisions.csv').write_text('a,b\n')
    with pytest.raises(InputError, match='needs the columns frame and decision'): label_frames(data/'TestDataset'/'Synthetic'/'images', run, tmp_path/'decisions.csv')


def test_a_folder_is_the_same_however_its_path_is_written(data, run, tmp_path, monkeypatch):
    folder = data/'TestDataset'/'Synthetic'/'images'
    label_frames(folder, run, tmp_path/'decisions.csv').buttons[0].click()
    monkeypatch.chdir(folder)
    assert label_frames('../images', run, tmp_path/'decisions.csv').shown.at == 1
    (tmp_path/'decisions.csv').write_text('\ufeff' + (tmp_path/'decisions.csv').read_text() + '\n') # as a spreadsheet writes it
    assert len(list_images(tmp_path/'decisions.csv')) == 1


def test_runs_of_one_name_are_refused(data, run, tmp_path):
    with pytest.raises(InputError, match='with different names'): compare([run, run], data)
    with pytest.raises(InputError, match='no run in it'): compare(dict(one=run, two=tmp_path), data)


@pytest.fixture
def own(data, tmp_path):
    "A test set of three images, to be changed."
    return shutil.copytree(data/'TestDataset'/'Synthetic', tmp_path/'own')


def first(folder, kind): return min((folder/kind).iterdir())


def said(inspector): return inspector.children[-2].value


CHANGES = dict(rotated=lambda mask: mask.transpose(Image.Transpose.ROTATE_90), halved=lambda mask: mask.resize((60, 48)))


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_a_mask_of_another_shape_is_never_stretched(own, features, run, change):
    mask = first(own, 'masks')
    change(Image.open(mask)).save(mask)
    extract(own, ['filterbank'], store := own.parent/'store', device='cpu')
    with pytest.raises(InputError, match=r'mask \d+x\d+, image 120x96'): predict_pairs(run, list_pairs(own))
    with pytest.raises(InputError, match=r'mask \d+x\d+, image 120x96'): inspect_pairs(own)
    assert 'image 120x96' in said(frequency := inspect_frequency(store, own)) and frequency.view.panels == []
    predictions = inspect_predictions(run, own)
    assert '1 of 3 images are left out' in said(predictions) and predictions.place.max == 2
    assert 'image 120x96' in (page := inspect(own)).line.value and page.area.children == ()


def test_images_that_a_run_has_learnt_are_named(data, run, own):
    told = 'was trained or selected on 16 of these frames'
    assert told in said(inspect_predictions(run, data/'TrainDataset'))
    assert f'one {told}<br>two {told}' in said(compare(dict(one=run, two=run), data/'TrainDataset')).replace(': scores on them say nothing about new ones', '')
    assert 'trained' not in said(inspect_predictions(run, own))


def test_what_fails_leaves_no_picture_of_before(data, own, features, run, tmp_path):
    sets = tmp_path/'sets'
    for name in ('A', 'B'): shutil.copytree(own, sets/'TestDataset'/name)
    for picture in (sets/'TestDataset'/'B'/'images').iterdir(): picture.write_bytes(b'no picture')
    for inspector, moves in ((inspect_predictions(run, sets), ('place', 'order')), (compare(dict(one=run, two=run), sets), ('x', 'y'))):
        inspector.set.value = 'B'
        for name in moves: setattr(getattr(inspector, name), 'index' if hasattr(getattr(inspector, name), 'index') else 'value', 1)
        assert inspector.view.panels == [] and 'none of 3 images can be shown' in said(inspector)
        with pytest.raises(InputError, match='cannot be decoded'): inspector.figure()
        inspector.set.value = 'A'
        assert inspector.view.panels and 'cannot' not in said(inspector)
    inspector = inspect_frequency(features, data)
    inspector.image.value = 17 # a test image, which has no features
    inspector.shape.value = 'gaussian'
    assert inspector.image.label.endswith('(not in the store)') and inspector.view.panels == [] and 'no features' in said(inspector)
    with pytest.raises(InputError, match='no features'): inspector.figure()


@pytest.mark.parametrize('split', ['hard', 'gaussian', 'butterworth', 'dct'])
def test_the_figure_of_a_split_says_what_the_inspector_says(data, features, split):
    inspector = inspect_frequency(features, data, cutoff=.2)
    inspector.shape.value = split
    titles = lambda: [axis.get_title() for axis in inspector.figure().axes]
    for channel in (-1, 3):
        inspector.channel.value = channel
        assert titles()[-1] == f"LFC: {inspector.view.notes['low']}"
    assert ('in both' in titles()[-1]) == (split in ('gaussian', 'butterworth'))


def test_the_mask_of_an_adapted_teacher_is_no_feature(data, features, tmp_path):
    shutil.copytree(features, tmp_path/'store')
    array = zarr.open_group(str(tmp_path/'store'), mode='r+')['features/filterbank']
    array.attrs['provenance'] = array.attrs['provenance'] | dict(mask_logits=True)
    inspector, whole = inspect_frequency(tmp_path/'store', data), inspect_frequency(features, data)
    assert len(inspector.channel.options) == len(whole.channel.options) - 1
    assert inspector.figure().axes[-1].get_title() == f"LFC: {inspector.view.notes['low']}" != whole.figure().axes[-1].get_title()


def test_a_store_may_grow_while_it_is_looked_at(data, own, tmp_path):
    extract(own, ['filterbank'], tmp_path/'store', device='cpu')
    inspector = inspect_frequency(tmp_path/'store', list_pairs(data/'TrainDataset')[:2] + list_pairs(own))
    assert inspector.image.value == 2, 'the first that the store has'
    inspector.image.value = 0
    assert 'no features' in said(inspector)
    extract(data, ['filterbank'], tmp_path/'store', device='cpu')
    inspector.image.value = 1
    assert said(inspector) == '' and inspector.view.panels


def test_weights_that_diverged_are_not_drawn_as_black(run, own, tmp_path):
    shutil.copytree(run, tmp_path/'run')
    tensors, config = read_tensors(run/'best.safetensors')
    save_tensors({name: tensor*1e30 if tensor.ndim == 4 else tensor for name, tensor in tensors.items()}, tmp_path/'run'/'best.safetensors', config)
    inspector = inspect_predictions(tmp_path/'run', own)
    assert 'the prediction is NaN' in said(inspector) and inspector.view.panels == []
    with pytest.raises(InputError, match=r'0 of 3 pictures predicted; .*\.png: the prediction is NaN'): predict_files(tmp_path/'run', own/'images', tmp_path/'out')
    assert 'the prediction is NaN' in said(label_frames(own/'images', tmp_path/'run', tmp_path/'decisions.csv'))


def test_latents_that_cannot_be_shown_say_why(run, own, tmp_path):
    assert 'L1 and L2 are not shown' in said(inspect_predictions(run, own)), 'their images are not in the store'
    shutil.copytree(run, tmp_path/'run')
    config = json.loads((run/'config.json').read_text()) | dict(features=str(tmp_path/'gone'))
    (tmp_path/'run'/'config.json').write_text(json.dumps(config))
    assert 'gone: no feature store' in said(inspect_predictions(tmp_path/'run', own))


def test_a_broken_picture_does_not_take_the_others_away(run, own):
    first(own, 'images').write_bytes(b'no picture')
    for inspector in (inspect_predictions(run, own), compare(dict(one=run, two=run), own)):
        assert '1 of 3 images are left out' in said(inspector) and inspector.view.panels
        assert inspector.figure() is not None


def test_frames_without_masks_say_why(data, own, tmp_path):
    shutil.copytree(data/'TestDataset', tmp_path/'tests'/'TestDataset')
    assert all(panel['outlines'] for panel in inspect_pairs(tmp_path/'tests').view.panels) and said(inspect_pairs(tmp_path/'tests')) == ''
    first(own, 'masks').unlink()
    inspector = inspect_pairs(own)
    assert 'shown without masks' in said(inspector) and 'image without mask' in said(inspector) and len(inspector.view.panels) == 3
    assert inspector.figure() is not None


def test_masks_of_0_and_1_are_read_as_the_layout_says(own, features, run):
    for mask in (own/'masks').iterdir(): Image.fromarray((np.asarray(Image.open(mask).convert('L')) > 128).astype(np.uint8)).save(mask)
    extract(own, ['filterbank'], store := own.parent/'store', device='cpu')
    assert 'largest value 1' in said(inspect_frequency(store, own))
    assert said(inspect_frequency(store, own, layout=Layout(mask_above=0))) == ''
    page = inspect(own, store, layout=Layout(mask_above=0))
    assert page.line.value == '' and page.fields['options'].value == '--mask-above 0'


# ---------------------------------------------------------------- decisions
@pytest.fixture
def frames(tmp_path):
    "Three frames of noise."
    folder = tmp_path/'frames'
    folder.mkdir()
    for i in range(3): Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder/f'{i}.png')
    return folder


@pytest.fixture
def label(frames, run): return lambda: label_frames(frames, run, frames.parent/'decisions.csv')


def decided(folder): return {frame.name: decision for frame, decision in read_decisions(folder.parent/'decisions.csv').items()}


def test_two_who_decide_at_once_keep_each_others_work(frames, label):
    ours, theirs = label(), label()
    ours.buttons[0].click(); ours.buttons[1].click()
    theirs.shown.step(2)
    theirs.buttons[0].click()
    assert decided(frames) == {'0.png': 'accept', '1.png': 'reject', '2.png': 'accept'}
    (frames.parent/'decisions.csv').write_text('decision,frame,who\naccept ,frames/0.png,Dr A\n,,\n') # by hand, while both are open
    ours.shown.step(-1)
    ours.buttons[2].click()
    assert 'Dr A' in (frames.parent/'decisions.csv').read_text() and decided(frames) == {'0.png': 'accept', '1.png': 'annotate'}


def test_any_name_is_read_back(frames, label):
    for name in ('new\nline', 'cr\rx', 'u2028\u2028x', 'quote"', 'comma,', ' lead', '=1+1', 'bad\udcff'): shutil.copy(frames/'0.png', frames/f'{name}.png')
    inspector = label()
    for _ in inspector.shown.frames: inspector.buttons[0].click()
    assert list_images(frames.parent/'decisions.csv') == list_images(frames)


def test_a_full_disk_is_said(frames, label, monkeypatch):
    inspector = label()
    def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(images_module, '_write_rows', full)
    inspector.buttons[0].click()
    assert 'no space left on the disk' in said(inspector) and inspector.shown.at == 0 and inspector.shown.decided == {}


def test_a_decision_is_about_a_picture(frames, label):
    inspector = label()
    inspector.buttons[0].click()
    shutil.copy(frames/'2.png', frames/'0.png')
    with pytest.raises(InputError, match='1 of 1 accepted frames changed since'): list_images(frames.parent/'decisions.csv')
    again = label()
    assert again.shown.at == 0 and '0 accept' in said(again)
    again.buttons[0].click()
    assert len(list_images(frames.parent/'decisions.csv')) == 1
    (frames/'1.png').write_bytes(b'no picture')
    again = label()
    again.buttons[0].click()
    assert 'is not accepted' in said(again) and decided(frames) == {'0.png': 'accept'}
    again.buttons[1].click()
    assert decided(frames)['1.png'] == 'reject'


def test_frames_of_other_folders_are_counted_apart(frames, label):
    (frames.parent/'decisions.csv').write_text('frame,decision\n' + ''.join(f'elsewhere/{i}.png,accept\n' for i in range(40)))
    assert '0 accept, 0 reject, 0 annotate (and 40 of other folders)' in said(label())


def test_a_key_decides_what_was_on_the_screen(frames, label):
    inspector = label()
    for pressed in ('a 0 1', 'r 0 2', '', 'z 1', 'A 1 3'): inspector.view.pressed = pressed # the second one before the next frame was there
    assert decided(frames) == {'0.png': 'accept'} and inspector.view.chosen == 1
    for pressed in ('r 1 4', 'm 2 5', 'a 2 6', 'a -1 7'): inspector.view.pressed = pressed
    inspector.buttons[0].click()
    assert decided(frames) == {'0.png': 'accept', '1.png': 'reject', '2.png': 'annotate'}
    assert 'all 3 decided' in said(inspector) and 'all 3 decided' in said(label()) and inspector.figure() is not None
    inspector.shown.step(-1)
    inspector.buttons[0].click()
    assert decided(frames)['2.png'] == 'accept'


BAD_FILES = {'frame;decision\n0.png;accept\n': 'with commas, in UTF-8', 'frame,decision\n0.png,yes\n': 'is no decision', 'frame,decision\n,accept\n': 'names no frame',
             f'frame,decision\n{"x"*5000},accept\n': 'are gone', 'frame,decision\n0.png,accept\n./0.png,reject\n': 'of one frame', 'frame,decision\nlink/0.png,accept\nframes/0.png,reject\n': 'of one frame'}


@pytest.mark.parametrize('text', BAD_FILES, ids=lambda text: text[15:30])
def test_a_file_of_decisions_that_says_nothing_clear_is_refused(frames, text):
    (frames.parent/'link').symlink_to(frames)
    (frames.parent/'decisions.CSV').write_text(text)
    with pytest.raises(InputError, match=BAD_FILES[text]): list_images(frames.parent/'decisions.CSV')


def test_places_of_decisions(frames, run, tmp_path):
    with pytest.raises(InputError, match='ends in .csv'): label_frames(frames, run, tmp_path/'decisions.txt')
    with pytest.raises(InputError, match='an address'): label_frames('memory://frames', run, tmp_path/'decisions.csv')
    (tmp_path/'central').mkdir()
    (tmp_path/'central'/'all.csv').touch()
    (tmp_path/'decisions.csv').symlink_to(tmp_path/'central'/'all.csv')
    label_frames(frames, run, tmp_path/'decisions.csv').buttons[0].click()
    assert (tmp_path/'decisions.csv').is_symlink() and list_images(tmp_path/'decisions.csv') == list_images(tmp_path/'central'/'all.csv') == [frames/'0.png']


# ---------------------------------------------------------------- logs, the page, what ends
HEAD = 'epoch,phase,seg,valid_loss,valid_dice\n'


@pytest.mark.parametrize('rows, told', [('1,1,.5,.5,.5\n2', 'phases 1 to 3'), ('1,4,.5,.5,.5\n', 'phases 1 to 3'), ('1.5,1,.5,.5,.5\n', 'whole numbers'), ('1,1,.5,.5,0.5e-\n', 'valid_dice holds what is no number')])
def test_a_log_that_is_cut_or_strange_is_refused(tmp_path, rows, told):
    (tmp_path/'log.csv').write_text(HEAD + rows)
    with pytest.raises(InputError, match=told): read_log(tmp_path)
    assert 'waiting: ' in said(inspect_training(tmp_path, every=0))


def test_a_watch_outlives_a_log_that_is_cut(tmp_path):
    (tmp_path/'log.csv').write_text(HEAD + '1,1,.5,.5,.5\n2')
    inspector = inspect_training(tmp_path, every=.02)
    (tmp_path/'log.csv').write_text(HEAD + '1,1,.5,.5,.5\n2,1,nan,.5,.5\n3,1,.4,.5,.5\n')
    for _ in range(500):
        if inspector.view.panels: break
        time.sleep(.02)
    assert 'NaN in 1 of them, first in epoch 2' in said(inspector)
    assert inspector.view.panels[0]['lines'][0]['y'] == [.5, None, .4]
    inspector.close()


@pytest.mark.parametrize('config', ['[]', 'null', '{"data": 5}', '{"data": ""}', '['*100000])
def test_the_page_says_what_is_wrong_with_a_run(tmp_path, config):
    (tmp_path/'config.json').write_text(config)
    page = inspect(run=tmp_path)
    assert 'role="alert"' in page.line.value and 'config.json' in page.line.value and page.area.children == ()


def test_the_page_never_stays_on_looking(data, monkeypatch):
    page = inspect(data)
    assert page.line.value == '' and len(page.area.children) == 1
    page.fields['data'].value = 's3://b/x\0'
    page.button.click()
    assert 'role="alert"' in page.line.value and page.area.children == ()


@pytest.mark.parametrize('given, kind', [('1', 'text/plain'), ('0', 'application/vnd.jupyter.widget-view+json')])
def test_a_broken_picture_is_a_sentence_where_nothing_is_alive(frames, label, monkeypatch, given, kind):
    (frames/'0.png').write_bytes(b'no picture')
    monkeypatch.setenv('POLYP_DIFOM_STATIC', given)
    bundle = label()._repr_mimebundle_()
    bundle = bundle[0] if isinstance(bundle, tuple) else bundle
    assert kind in bundle and ('cannot be decoded' in bundle.get('text/plain', '')) == (given == '1')


def test_closing_ends_everything(data, run, frames, label, tmp_path):
    count, threads = len(_instances), threading.active_count()
    for inspector in (inspect_predictions(run, data), label(), inspect_training(run, every=.02)): inspector.close()
    for _ in range(500):
        if threading.active_count() == threads: break
        time.sleep(.02)
    assert (len(_instances), threading.active_count()) == (count, threads)
    inspector = label()
    inspector.close()
    inspector.view.pressed = 'a 0 1'
    assert not (frames.parent/'decisions.csv').exists()


WRONG = {'cutoff': lambda f: inspect_frequency(f.features, f.data, cutoff=float('nan')), 'no cutoff': lambda f: inspect_frequency(f.features, f.data, cutoff=None),
         'grids': lambda f: inspect_frequency(f.features, f.data, grids=((0, 0), (88, 88))), 'one grid': lambda f: inspect_frequency(f.features, f.data, grids=((22,), (88, 88))),
         'no pairs': lambda f: inspect_frequency(f.features, []), 'paths': lambda f: inspect_frequency(f.features, [f.run]), 'nothing': lambda f: inspect_frequency(f.features, None),
         'marker': lambda f: setattr(View(), 'marker', 2.), 'every': lambda f: inspect_training(f.run, every=-1), 'a path': lambda f: compare(str(f.run), f.data)}


@pytest.mark.parametrize('call', WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_one_sentence(request, call):
    from types import SimpleNamespace
    with pytest.raises(InputError): call(SimpleNamespace(**{name: request.getfixturevalue(name) for name in ('data', 'features', 'run')}))


def test_compare_takes_any_label_and_any_dot(data, run):
    inspector = compare({1: run, '$x': run}, data)
    for chosen in (-4, 99): inspector.view.chosen = chosen
    inspector.x.value = inspector.y.value = '1'
    inspector.figure().savefig(os.devnull, format='png')
    assert repr(inspector) and said(inspector) == ''


def test_a_large_picture_is_drawn_as_it_is_sent(run, tmp_path):
    for folder in ('images', 'masks'): (tmp_path/folder).mkdir()
    frame = Image.new('RGB', (1500, 1200), 'gray')
    frame.save(tmp_path/'images'/'a.png')
    Image.new('L', (1500, 1200)).save(tmp_path/'masks'/'a.png')
    figure = inspect_predictions(run, tmp_path).figure()
    assert figure.axes[0].images[0].get_array().shape[1] == 1024
    to_png(frame)
    assert frame.size == (1500, 1200)
