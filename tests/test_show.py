"Figures of awkward input, and a widget that a browser would find"
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

from polyp_difom.core import InputError
from polyp_difom.data.images import Pair, list_images, list_pairs
from polyp_difom.show.figures import show_extremes, show_pairs, show_road
from polyp_difom.show.label import label_frames
from polyp_difom.show.widgets import Spectrum, Taught, compare
from polyp_difom.targets.frequency import split_frequency
from polyp_difom.targets.latent import open_targets, target_of
from polyp_difom.training.runs import train
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
