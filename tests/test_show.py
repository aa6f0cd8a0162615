"Figures of awkward input, and a widget that a browser would find"
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from polyp_difom.data.images import Pair, list_pairs
from polyp_difom.show.figures import show_extremes, show_pairs, show_road
from polyp_difom.model.model import PolypDiFoM
from polyp_difom.students.registry import create_student

NOTEBOOK = Path(__file__).parents[1]/'nbs'/'09_show'/'02_widgets.ipynb'


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


def test_the_widget_on_the_page_is_one_that_the_front_end_has():
    "A view names a model; a browser shows it only if the kernel has sent that model and its parts."
    client = NotebookClient(nbformat.read(NOTEBOOK, 4), store_widget_state=True, timeout=300, resources={'metadata': {'path': str(NOTEBOOK.parent)}})
    notebook = client.execute()
    views = [output.data['application/vnd.jupyter.widget-view+json']['model_id'] for cell in notebook.cells for output in cell.get('outputs', [])
             if 'application/vnd.jupyter.widget-view+json' in output.get('data', {})]
    models = notebook.metadata.widgets['application/vnd.jupyter.widget-state+json']['state']
    assert len(views) == 1
    def inside(model): return [models[model]['model_name'], *(name for child in models[model]['state'].get('children', []) for name in inside(child.removeprefix('IPY_MODEL_')))]
    assert sorted(inside(views[0])) == ['DropdownModel', 'DropdownModel', 'FloatSliderModel', 'HBoxModel', 'ImageModel', 'VBoxModel']
