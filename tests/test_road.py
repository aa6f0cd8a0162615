"The whole road through the command line, on synthetic and on real images."
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from polyp_difom.data.check import check
from polyp_difom.data.images import list_pairs, read_image, test_folders, train_folder
from polyp_difom.features.store import FeatureStore
from polyp_difom.evaluation.metrics import METRICS
from polyp_difom.teachers.registry import create_teacher

SHORT = ['--size', '64', '--width', '4', '--epochs', '1', '1', '1', '--device', 'cpu']


def test_extract_train_evaluate_predict(polyp_difom, data, tmp_path):
    store, run, maps = tmp_path/'features', tmp_path/'run', tmp_path/'maps'
    for command in (['check', data],
                    ['extract', data, '--teacher', 'filterbank', '--out', store],
                    ['train', data, '--student', 'unet', '--features', store, *SHORT, '--out', run],
                    ['evaluate', run, data, '--json', tmp_path/'report.json'],
                    ['predict', run, data/'TestDataset/Synthetic/images', '--out', maps],
                    ['evaluate', '--predictions', maps, '--masks', data/'TestDataset/Synthetic/masks', '--json', tmp_path/'maps.json']):
        result = polyp_difom(*command)
        assert result.returncode == 0, result.err
    report, from_maps = (json.loads((tmp_path/f'{name}.json').read_text()) for name in ('report', 'maps'))
    scores = report['sets']['Synthetic']
    assert report['distilled'] and set(METRICS) <= set(scores) and set(METRICS) <= set(from_maps)
    for key in ('Dice_05', 'IoU_05'): assert scores[key] == pytest.approx(from_maps[key], abs=0.02)
    assert all((run/'evaluation'/name).exists() for name in ('report.md', 'Synthetic.png', 'Synthetic.csv'))
    image = Image.open(maps/'00000.png')
    assert (image.mode, image.size) == ('L', (120, 96))


def test_one_picture(polyp_difom, data, tmp_path):
    assert polyp_difom('train', data, *SHORT, '--out', tmp_path/'run').returncode == 0
    picture = data/'TestDataset/Synthetic/images/00001.png'
    assert polyp_difom('predict', tmp_path/'run', picture, '--out', tmp_path/'maps', '--threshold', '0.5').returncode == 0
    assert set(np.unique(Image.open(tmp_path/'maps/00001.png'))) <= {0, 255}


@pytest.mark.real
def test_real_data_has_no_errors(real_data):
    problems = check(real_data)
    assert [str(p) for p in problems if p.severity == 'error'] == []
    assert sum('CVC-300' in str(p) for p in problems) > 50, 'CVC-300 is a part of CVC-ColonDB'


@pytest.mark.real
def test_real_teacher_sees_what_its_readme_says(real_data):
    weights = real_data.parents[1]/'weights'/'mobilenetv2_100.imagenet.safetensors'
    if not weights.exists(): pytest.skip(f'no {weights.name} beside the real images')
    teacher = create_teacher(f'timm/mobilenetv2_100={weights},pad_type=same,mean=0.502,std=0.502')
    picture = read_image(list_pairs(train_folder(real_data))[0].image).resize((224, 224))
    maps = teacher(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]/255)
    assert maps.shape == (1, 96 + 320, 14, 14)
    assert maps.isfinite().all() and (maps.std((0, 2, 3)) > 0).all()


@pytest.mark.real
def test_real_images_through_the_road(polyp_difom, real_data, tmp_path):
    "Forty real pairs, and the twenty of ETIS, through every command."
    for folder, source in (('TrainDataset', train_folder(real_data)), ('TestDataset/ETIS-LaribPolypDB', test_folders(real_data)['ETIS-LaribPolypDB'])):
        for kind in ('images', 'masks'): (tmp_path/'data'/folder/kind).mkdir(parents=True)
        for pair in list_pairs(source)[::37 if folder == 'TrainDataset' else 1]:
            os.symlink(pair.image.resolve(), tmp_path/'data'/folder/'images'/pair.image.name)
            os.symlink(pair.mask.resolve(), tmp_path/'data'/folder/'masks'/pair.mask.name)
    data, run = tmp_path/'data', tmp_path/'run'
    for command in (['check', data], ['extract', data, '--teacher', 'filterbank', '--out', tmp_path/'features'],
                    ['train', data, '--features', tmp_path/'features', *SHORT, '--out', run], ['evaluate', run, data]):
        result = polyp_difom(*command)
        assert result.returncode == 0, result.err
    assert len(FeatureStore(tmp_path/'features')) == 40
    scores = json.loads((run/'evaluation/report.json').read_text())['sets']['ETIS-LaribPolypDB']
    assert scores['images'] == 20 and scores['published'] == {} # a narrow U-Net is none that was published
