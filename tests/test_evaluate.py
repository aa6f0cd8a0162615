"An evaluation is whole or absent, its masks are read strictly, and any data set that a layout describes is scored"
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from polyp_difom.core import InputError
from polyp_difom.data.images import Layout
from polyp_difom.evaluation import benchmark
from polyp_difom.evaluation.benchmark import evaluate
from polyp_difom.evaluation.metrics import score_folder
from polyp_difom.evaluation.report import report_markdown, report_note
from polyp_difom.model.model import PolypDiFoM, save_model
from polyp_difom.students.registry import create_student


def make_run(folder, seed=0):
    "The folder of a run that has learnt nothing."
    torch.manual_seed(seed)
    net = create_student('unet', width=2)
    save_model(PolypDiFoM(net), folder/'best.safetensors')
    settings = dict(student='unet', options=net.config['options'], distilled=False, size=32, epochs=[1, 0, 0], seed=seed)
    (folder/'config.json').write_text(json.dumps(dict(settings=settings)))
    return folder


@pytest.fixture
def run(tmp_path):
    (tmp_path/'run').mkdir()
    return make_run(tmp_path/'run')


def save_set(images, masks, names, shape=(40, 50), suffix='', polyp=255):
    "Frames of noise, a polyp in the middle of each."
    for folder in (images, masks): folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        mask = np.zeros(shape, np.uint8)
        mask[shape[0]//4:3*shape[0]//4 + 1, shape[1]//4:shape[1]//2] = polyp
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8)).save(images/f'{name}.png')
        Image.fromarray(mask).save(masks/f'{name}{suffix}.png')


@pytest.fixture
def tests(tmp_path):
    "Two test sets of three frames."
    for name in ('One', 'Two'): save_set(tmp_path/'data/TestDataset'/name/'images', tmp_path/'data/TestDataset'/name/'masks', 'abc')
    return tmp_path/'data'


def files_of(run): return sorted(path.name for path in (run/'evaluation').iterdir())


# --- data sets

@pytest.mark.parametrize('layout, images, masks, suffix', [
    (Layout(), 'images', 'masks', ''), (Layout(images='frames', masks='truth'), 'frames', 'truth', ''), (Layout(mask_suffix='_mask'), '.', '.', '_mask')], ids=['images and masks', 'two folders', 'suffix'])
def test_a_set_without_test_dataset_is_scored_under_its_name(run, tmp_path, layout, images, masks, suffix):
    save_set(tmp_path/'mine'/images, tmp_path/'mine'/masks, 'abcd', suffix=suffix)
    report = evaluate(run, tmp_path/'mine', layout)
    assert {name: scores['images'] for name, scores in report['sets'].items()} == {'mine': 4}
    assert files_of(run) == ['mine.csv', 'mine.png', 'report.json', 'report.md']


def test_layouts_of_one_set_give_one_result(run, tmp_path):
    save_set(tmp_path/'a/images', tmp_path/'a/masks', 'abc')
    save_set(tmp_path/'b', tmp_path/'b', 'abc', suffix='_mask')
    one, other = evaluate(run, tmp_path/'a')['sets']['a'], evaluate(run, tmp_path/'b', Layout(mask_suffix='_mask'))['sets']['b']
    assert one == other


# --- masks

def test_masks_of_0_and_1_are_refused_with_the_option_and_scored_with_it(run, tests):
    expected = evaluate(run, tests)['sets']
    save_set(tests/'TestDataset/Two/images', tests/'TestDataset/Two/masks', 'abc', polyp=1)
    with pytest.raises(InputError, match=r'3 of 6 pairs cannot be scored: .*a\.png.*--mask-above 0'): evaluate(run, tests)
    assert evaluate(run, tests, Layout(mask_above=0))['sets']['Two']['mDice'] == expected['Two']['mDice']


def alpha_mask(mask): return np.dstack([np.zeros((*mask.shape, 3), np.uint8), mask])
def class_mask(mask): return np.where(np.arange(mask.shape[1]) < mask.shape[1]//3, np.minimum(mask, 180), mask)


@pytest.mark.parametrize('change', [alpha_mask, class_mask], ids=['alpha', 'classes'])
def test_masks_that_say_polyp_otherwise_are_refused(run, tests, change):
    path = tests/'TestDataset/One/masks/b.png'
    Image.fromarray(change(np.asarray(Image.open(path)))).save(path)
    with pytest.raises(InputError, match=r'1 of 6 pairs .*b\.png'): evaluate(run, tests)


def test_another_size_is_named_before_anything_is_scored(run, tests, monkeypatch):
    Image.new('L', (20, 10)).save(tests/'TestDataset/Two/masks/c.png')
    monkeypatch.setattr(benchmark, 'predict', lambda *_: pytest.fail('scored'))
    with pytest.raises(InputError, match=r'c\.png: mask 20x10, image 50x40'): evaluate(run, tests)


def test_empty_masks_are_scored_and_counted(run, tests):
    path = tests/'TestDataset/Two/masks/c.png'
    Image.new('L', (50, 40)).save(path)
    report = evaluate(run, tests)
    assert [scores['empty'] for scores in report['sets'].values()] == [0, 1]
    assert '1 of 6 frames hold no polyp' in report_note(report) and report_note(report) in report_markdown(report)
    scores = pd.read_csv(run/'evaluation/Two.csv', index_col='image').loc['c.png']
    assert scores['mDice'] == 0 and scores['Dice_05'] in (0, 1) and (scores['area'], scores['polyps'], scores['found']) == (0, 0, 0)
    assert pd.read_csv(run/'evaluation/Two.csv', index_col='image').loc['a.png', 'polyps'] == 1


# --- results that stay whole

def test_sets_that_are_gone_leave_no_results_and_notes_stay(run, tests):
    evaluate(run, tests)
    (run/'evaluation/notes.txt').write_text('mine')
    shutil.rmtree(tests/'TestDataset/One')
    evaluate(run, tests)
    assert files_of(run) == ['Two.csv', 'Two.png', 'notes.txt', 'report.json', 'report.md']


def kept_of(run):
    "The data and seed of each evaluation that is kept, and the sets whose scores stand beside its report."
    folders = [run/'evaluation', *sorted(path for path in (run/'evaluation').iterdir() if path.is_dir())]
    return [(Path(held['data']).name, held.get('seed'), sorted(path.stem for path in folder.glob('*.csv'))) for folder in folders if (folder/'report.json').is_file() for held in [json.loads((folder/'report.json').read_text())]]


def test_an_evaluation_on_other_data_steps_aside_whole(run, tests, tmp_path):
    for folder in ('a/data', 'b/data'): save_set(tmp_path/folder/'images', tmp_path/folder/'masks', 'abcd')
    evaluate(run, tests)
    first = (run/'evaluation/report.md').read_text()
    evaluate(run, tmp_path/'a/data')
    evaluate(run, tmp_path/'b/data') # of the same name, and its set has the same name
    last, *aside = kept_of(run)
    assert last == ('data', 0, ['data']) and sorted(aside) == [('data', 0, ['One', 'Two']), ('data', 0, ['data'])]
    assert first in [path.read_text() for path in (run/'evaluation').glob('data-*/report.md')]
    shutil.rmtree(tests/'TestDataset/One')
    evaluate(run, tests)
    assert kept_of(run) == [('data', 0, ['Two']), *[('data', 0, ['data'])]*2], 'and comes back'


@pytest.mark.parametrize('again', [lambda folder: f'{folder}/', lambda folder: os.path.relpath(folder), lambda folder: folder/'..'/folder.name])
def test_the_same_data_are_known_however_they_are_written(again, run, tests):
    evaluate(run, tests)
    make_run(run, seed=1)
    evaluate(run, again(tests))
    assert [seed for _, seed, _ in kept_of(run)] == [1], 'no report beside scores of another model'


@pytest.mark.parametrize('content', ['', '[]', '[' * 100_000, '{"data": 3, "files": 4}', '{"data": "x", "files": ["../../config.json", "/etc/passwd"]}'])
def test_a_damaged_report_gives_way_and_nothing_else_does(content, run, tests):
    (run/'evaluation').mkdir()
    (run/'evaluation/report.json').write_text(content)
    (run/'evaluation/report-tests.md').write_text('mine')
    evaluate(run, tests)
    assert (run/'config.json').is_file() and (run/'evaluation/report-tests.md').read_text() == 'mine' and kept_of(run)[0] == (tests.name, 0, ['One', 'Two'])


@pytest.mark.parametrize('moment', range(4))
def test_an_error_at_any_moment_leaves_the_old_evaluation(run, tests, monkeypatch, moment):
    "Scoring of either set, writing of the first and of the last file."
    evaluate(run, tests)
    before = {path.name: path.read_bytes() for path in (run/'evaluation').iterdir()}
    make_run(run, seed=1)
    place, name, fails_at = [(benchmark, 'score_set', 0), (benchmark, 'score_set', 1), (Path, 'write_bytes', 0), (Path, 'write_bytes', 5)][moment]
    original, calls = getattr(place, name), []
    def failing(*args, **kwargs):
        calls.append(0)
        if len(calls) > fails_at: raise OSError(28, 'No space left on device')
        return original(*args, **kwargs)
    monkeypatch.setattr(place, name, failing)
    with pytest.raises((OSError, InputError)): evaluate(run, tests)
    assert {path.name: path.read_bytes() for path in (run/'evaluation').iterdir()} == before


SLOW_EVALUATION = '''
import os, pathlib, sys, time
from polyp_difom.evaluation import benchmark
original = {owner}.{name}
def slow(*args, **kwargs):
    print('step', flush=True); time.sleep(0.5)
    return original(*args, **kwargs)
{owner}.{name} = slow
benchmark.evaluate(*sys.argv[1:])
'''


def tables(run): return {path.name: path.read_bytes() for path in (run/'evaluation').glob('*.csv')}


@pytest.mark.parametrize('owner, name, step', [('benchmark', 'score_set', 2), ('pathlib.Path', 'unlink', 5), ('os', 'replace', 4)], ids=['scoring', 'removing', 'moving'])
def test_a_killed_evaluation_leaves_no_mixture_and_the_next_one_is_whole(run, tests, tmp_path, owner, name, step):
    "Killed while it scores, while it removes old files, while it puts new ones in their place."
    (tmp_path/'other').mkdir()
    evaluate(run, tests)
    evaluate(make_run(tmp_path/'other', seed=1), tests)
    old, new = tables(run), tables(tmp_path/'other')
    assert old != new
    make_run(run, seed=1)
    process = subprocess.Popen([sys.executable, '-c', SLOW_EVALUATION.format(owner=owner, name=name), run, tests], stdout=subprocess.PIPE, text=True)
    for _ in range(step): assert process.stdout.readline() == 'step\n'
    process.kill(); process.wait()
    left = tables(run).items()
    assert left <= old.items() or left <= new.items(), 'scores of two models'
    report = run/'evaluation/report.json'
    if report.exists(): assert left <= old.items() if json.loads(report.read_text())['seed'] == 0 else left == new.items(), 'a report beside other scores'
    evaluate(run, tests)
    assert tables(run) == new
    assert files_of(run) == ['One.csv', 'One.png', 'Two.csv', 'Two.png', 'report.json', 'report.md']


# --- odd pictures and names

def test_a_strip_of_5000_pixels_is_scored_and_the_picture_does_not_stop_it(run, tmp_path):
    save_set(tmp_path/'strip/images', tmp_path/'strip/masks', 'abc', shape=(1, 5000))
    report = evaluate(run, tmp_path/'strip')
    assert report['sets']['strip']['images'] == 3 and len(pd.read_csv(run/'evaluation/strip.csv')) == 3


def test_scores_are_kept_where_no_picture_can_be_drawn(run, tests, monkeypatch):
    monkeypatch.setattr(benchmark, 'show_extremes', lambda *_, **__: 1/0)
    with pytest.warns(UserWarning, match='One: no picture'), pytest.warns(UserWarning, match='Two: no picture'): evaluate(run, tests)
    assert files_of(run) == ['One.csv', 'Two.csv', 'report.json', 'report.md']


NAMES = ['umlaut ä', 'bytes \udcff', 'esc \x1b[31m', 'line\nbreak', 'comma, "quote"', '$\\frac$', '中文', 'x'*240]


@pytest.mark.filterwarnings('error::UserWarning')
def test_names_of_files_and_sets_may_be_anything(run, tmp_path):
    for name in (set_names := [*NAMES, 'a|b']): save_set(tmp_path/'data/TestDataset'/name/'images', tmp_path/'data/TestDataset'/name/'masks', NAMES, shape=(20, 30))
    report = evaluate(run, tmp_path/'data')
    assert len(report['sets']) == len(set_names) and all(name.isprintable() for name in report['sets'])
    held = json.loads((run/'evaluation/report.json').read_text('utf-8'))
    assert held == report and sorted(held['files']) == files_of(run)
    table = pd.read_csv(next((run/'evaluation').glob('umlaut*.csv')))
    assert len(table) == len(NAMES) and {'bytes \\udcff.png', 'comma, "quote".png', 'line\\nbreak.png'} <= set(table['image'])
    assert len({line.count('|') - line.count('\\|') for line in report_markdown(report).splitlines()[2:]}) == 1


# --- what a report keeps

def test_a_report_says_how_to_make_it_again(run, tmp_path):
    save_set(tmp_path/'my set/frames', tmp_path/'my set/gt', 'abc', polyp=1)
    report = evaluate(run, tmp_path/'my set', Layout(images='frames', masks='gt', mask_above=0))
    assert report['command'] == f"polyp-difom evaluate {run} '{tmp_path/'my set'}' --images frames --masks gt --mask-above 0"
    assert report['layout'] == dict(images='frames', masks='gt', mask_suffix=None, mask_above=0)
    assert report['images'] == 3 and report['seconds'] > 0 and report['settings']['student'] == 'unet' and report['data'] == str(tmp_path/'my set')
    assert {'polyp_difom', 'torch', 'pysodmetrics'} <= report['versions'].keys()


def test_a_run_that_cannot_be_written_to_is_named_before_anything_is_scored(run, tests, monkeypatch):
    (run/'evaluation').write_text('in the way')
    monkeypatch.setattr(benchmark, 'predict', lambda *_: pytest.fail('scored'))
    with pytest.raises(InputError, match='evaluation: cannot be written to'): evaluate(run, tests)


def test_a_model_that_predicts_nan_is_not_scored(run, tests, monkeypatch):
    monkeypatch.setattr('polyp_difom.model.model.predict_logits', lambda model, image, size: torch.full((size, size), torch.nan))
    with pytest.raises(InputError, match=r'a\.png: the prediction is NaN'): evaluate(run, tests)
    assert not (run/'evaluation/report.json').exists()


# --- saved maps

@pytest.mark.parametrize('values, told', [
    (np.eye(40, 50, dtype=np.uint8), 'no map has a value above 1'),
    (np.full((40, 50), np.nan, np.float32), 'a.tif is not an 8-bit image'),
    (np.dstack([np.zeros((40, 50, 3), np.uint8), np.eye(40, 50, dtype=np.uint8)*255]), 'a.tif is not gray'),
    (np.dstack([np.eye(40, 50, dtype=np.uint8)*255, np.zeros((40, 50, 2), np.uint8)]), 'a.tif is not gray')], ids=['0 and 1', 'NaN', 'alpha', 'colours'])
def test_saved_maps_that_are_no_maps_are_refused(tmp_path, values, told):
    save_set(tmp_path/'images', tmp_path/'masks', 'a')
    (tmp_path/'maps').mkdir()
    Image.fromarray(values).save(tmp_path/'maps/a.tif')
    with pytest.raises(InputError, match=told): score_folder(tmp_path/'maps', tmp_path/'masks')


def test_a_map_that_predicts_nothing_is_scored(tmp_path):
    "As faint as 1, and as black as 0, beside one that finds the polyp."
    save_set(tmp_path/'images', tmp_path/'masks', 'abc')
    save_set(tmp_path/'images', tmp_path/'maps', 'abc')
    Image.fromarray(np.eye(40, 50, dtype=np.uint8)).save(tmp_path/'maps/a.png')
    Image.new('L', (50, 40)).save(tmp_path/'maps/b.png')
    _, scores = score_folder(tmp_path/'maps', tmp_path/'masks')
    assert [scores[stem]['Dice_05'] for stem in 'abc'] == [0, 0, 1]


def test_masks_of_saved_maps_are_read_strictly(tmp_path):
    save_set(tmp_path/'images', tmp_path/'masks', 'ab', polyp=1)
    save_set(tmp_path/'images', tmp_path/'maps', 'ab')
    with pytest.raises(InputError, match=r'a\.png: largest value 1.*--mask-above 0'): score_folder(tmp_path/'maps', tmp_path/'masks')
    assert score_folder(tmp_path/'maps', tmp_path/'masks', above=0)[0]['Dice_05'] == 1
