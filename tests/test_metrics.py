"Scores against the PraNet toolbox, against numpy written from the protocol's words, and on damaged folders"
import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polyp_difom.core import InputError
from polyp_difom.data.images import read_mask
from polyp_difom.evaluation.metrics import METRICS, SegmentationMetrics, protocol_map, read_map, score_folder, score_map

REFERENCE = Path(os.environ.get('POLYP_DIFOM_REFERENCE') or Path(__file__).parents[2]/'shared'/'reference')
EXACT = {'Sm': 'Sm', 'wFm': 'wFm', 'MAE': 'MAE', 'maxDic': 'max_Dice', 'maxIoU': 'max_IoU', 'maxEm': 'Em_max'}
THRESHOLD_MEANS = {'meanDic': 'mDice', 'meanIoU': 'mIoU', 'meanEm': 'Em_mean'}


@pytest.fixture(scope='module')
def toolbox():
    "What the toolbox says: file name or DATASET -> its columns"
    table = REFERENCE/'metrics'/'pranet_toolbox.csv'
    if not table.is_file():
        pytest.skip(f'no {table}: set POLYP_DIFOM_REFERENCE to the folder that holds metrics/pranet_toolbox.csv')
    with table.open() as f: return {row.pop('name'): {k: float(v) for k, v in row.items()} for row in csv.DictReader(f)}


def ellipse(height=60, width=80, shift=0):
    y, x = np.mgrid[:height, :width]
    return ((y - height * .45) / (height * .25))**2 + ((x - width * .5 - shift) / (width * .2))**2 < 1


def as_map(mask): return mask * np.uint8(255)


def random_map(rng, shape=(40, 50)):
    noise = rng.integers(0, 256, shape, dtype=np.uint8)
    noise[0, :2] = 0, 255
    return noise


@pytest.fixture
def folders(tmp_path):
    "Three maps equal to their masks"
    for kind in ('maps', 'masks'): (tmp_path/kind).mkdir()
    for i in range(3):
        for kind in ('maps', 'masks'): Image.fromarray(as_map(ellipse(shift=i))).save(tmp_path/kind/f'frame{i}.png')
    return tmp_path/'maps', tmp_path/'masks'


def assert_equal_to_toolbox(ours, theirs, name, constant=False):
    """Six decimals, with two known exceptions. wFm of one image: where two polyp pixels are equally near, Octave's distance
    transform and SciPy's name different ones. Threshold means: rounding moves the toolbox's thresholds by 1e-16, which
    matters only where a gray level meets a threshold exactly; a constant map then loses one of its 256 thresholds."""
    one_threshold = {'mDice': ours['max_Dice'] / 256, 'mIoU': ours['max_IoU'] / 256, 'Em_mean': ours['Em_max'] / 256}
    for column, key in EXACT.items():
        tolerance = 2e-5 if key == 'wFm' and name != 'DATASET' else 1e-6
        assert ours[key] == pytest.approx(theirs[column], abs=tolerance), (name, key)
    for column, key in THRESHOLD_MEANS.items():
        tolerance = one_threshold[key] + 1e-6 if constant else 2e-4
        assert ours[key] == pytest.approx(theirs[column], abs=tolerance), (name, key)


@pytest.mark.parametrize('workers', (1, 2))
def test_folder_equals_the_toolbox(toolbox, workers):
    summary, per_image = score_folder(REFERENCE/'metrics'/'pred', REFERENCE/'metrics'/'gt', workers=workers)
    ours = {f'{stem}.png': scores for stem, scores in per_image.items()} | {'DATASET': summary}
    assert ours.keys() == toolbox.keys()
    assert (summary['images'], summary['resized']) == (10, 0)
    for name in toolbox:
        constant = name != 'DATASET' and np.ptp(read_map(REFERENCE/'metrics'/'pred'/name)) == 0
        assert_equal_to_toolbox(ours[name], toolbox[name], name, constant)


def test_accumulator_equals_the_toolbox(toolbox):
    metrics = SegmentationMetrics()
    for name in toolbox.keys() - {'DATASET'}:
        metrics.add(read_map(REFERENCE/'metrics'/'pred'/name), read_mask(REFERENCE/'metrics'/'gt'/name))
    assert_equal_to_toolbox(metrics.summary(), toolbox['DATASET'], 'DATASET')


def test_only_the_thresholds_differ(toolbox):
    "With the thresholds as Octave computes `1:-1/255:0`, mDice agrees to six decimals on every image, the constant map included"
    for name, theirs in toolbox.items():
        if name == 'DATASET': continue
        prediction, gt = read_map(REFERENCE/'metrics'/'pred'/name), read_mask(REFERENCE/'metrics'/'gt'/name)
        dice = dice_by_hand(prediction, gt, 1 - np.arange(256) * (1 / 255))
        assert dice.mean() == pytest.approx(theirs['meanDic'], abs=1e-6), name


def dice_by_hand(prediction, gt, thresholds=np.arange(256) / 255):
    "The protocol's words, one threshold at a time"
    soft = prediction / 255
    if soft.max() > soft.min(): soft = (soft - soft.min()) / (soft.max() - soft.min())
    dice = []
    for threshold in thresholds:
        cut = soft >= threshold
        true_positives = np.sum(cut & gt)
        dice.append(0 if true_positives == 0 else 2 * true_positives / (np.sum(cut) + np.sum(gt)))
    return np.array(dice)


def test_dice_curves_equal_brute_force():
    rng, metrics, by_hand = np.random.default_rng(0), SegmentationMetrics(), []
    for shift in range(5):
        gt, prediction = ellipse(40, 50, shift), random_map(rng)
        own = metrics.add(prediction, gt)
        by_hand.append(dice_by_hand(prediction, gt))
        np.testing.assert_allclose(score_map(prediction, gt)[1][0], by_hand[-1], atol=1e-12)
        assert own['mDice'] == pytest.approx(by_hand[-1].mean(), abs=1e-12)
        assert own['max_Dice'] == pytest.approx(by_hand[-1].max(), abs=1e-12)
    summary, curve = metrics.summary(), np.mean(by_hand, axis=0)
    assert summary['mDice'] == pytest.approx(curve.mean(), abs=1e-12)
    assert summary['max_Dice'] == pytest.approx(curve.max(), abs=1e-12)


def test_protocol_map_is_the_published_script():
    logits = 4 * torch.randn(1, 1, 22, 22, generator=torch.Generator().manual_seed(0))
    res = torch.nn.functional.interpolate(logits, size=(70, 90), mode='bilinear', align_corners=False)
    res = res.sigmoid().numpy().squeeze()
    res = (res - res.min()) / (res.max() - res.min() + 1e-8)
    published = ((res - res.min()) * (255 / (res.max() - res.min())) + .5).astype(np.uint8) # scipy.misc.imsave
    ours = protocol_map(logits[0, 0], (70, 90))
    assert ours.dtype == np.uint8 and ours.shape == (70, 90)
    assert np.abs(ours.astype(int) - published).max() <= 1 and np.mean(ours == published) > .999
    half = protocol_map(logits[0, 0].bfloat16(), (70, 90))
    assert np.abs(half.astype(int) - published).max() <= 4


def test_perfect_map():
    gt = ellipse()
    scores, curves = score_map(as_map(gt), gt)
    for key in ('wFm', 'Sm', 'max_Dice', 'max_IoU', 'Dice_05', 'IoU_05'): assert scores[key] == pytest.approx(1, abs=1e-9), key
    assert scores['Em_max'] == pytest.approx(1, abs=1 / (gt.size - 1) + 1e-9)
    assert scores['MAE'] == 0
    np.testing.assert_allclose(curves[:2, 1:], 1)
    for key in ('mDice', 'mIoU', 'Em_mean'): assert scores[key] == pytest.approx(1, abs=1 / 256), key


def test_inverted_map():
    gt = ellipse()
    scores, curves = score_map(as_map(~gt), gt)
    for key in ('mDice', 'mIoU', 'Em_mean', 'wFm', 'Sm', 'Dice_05', 'IoU_05'): assert scores[key] == pytest.approx(0, abs=.01), key
    assert scores['MAE'] == 1
    np.testing.assert_allclose(curves[:, 1:], 0, atol=1e-9)


def corner(row, column):
    mask = np.zeros((16, 20), bool)
    mask[row, column] = True
    return mask


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('gt', [np.zeros((16, 20), bool), np.ones((16, 20), bool), corner(0, 0), corner(-1, 3), corner(-1, -1), ~corner(5, 5)],
                         ids=['empty', 'full', 'first pixel', 'last row', 'last pixel', 'one hole'])
@pytest.mark.parametrize('gray', [0, 7, 255, None], ids=['black', 'constant', 'white', 'noise'])
def test_every_score_is_finite(gt, gray):
    prediction = random_map(np.random.default_rng(1), gt.shape) if gray is None else np.full(gt.shape, gray, np.uint8)
    metrics = SegmentationMetrics()
    scores, summary = metrics.add(prediction, gt), metrics.summary()
    assert tuple(scores) == tuple(summary) == METRICS
    assert np.isfinite(list(scores.values())).all() and all(type(v) is float for v in summary.values())
    assert summary == pytest.approx(scores)


def test_empty_ground_truth():
    gt = np.zeros((20, 30), bool)
    silent, _ = score_map(np.zeros((20, 30), np.uint8), gt)
    assert (silent['Dice_05'], silent['IoU_05'], silent['mDice'], silent['wFm'], silent['Sm'], silent['MAE']) == (1, 1, 0, 0, 1, 0)
    noise = random_map(np.random.default_rng(0), (20, 30))
    assert score_map(noise, gt)[0]['Dice_05'] == 0
    assert score_map(noise, gt, probability=np.full((20, 30), .01))[0]['Dice_05'] == 1


def test_other_sizes_are_resized_and_counted(folders):
    maps, masks = folders
    Image.open(maps/'frame1.png').resize((160, 120), Image.Resampling.NEAREST).save(maps/'frame1.png')
    summary, per_image = score_folder(maps, masks)
    assert (summary['images'], summary['resized']) == (3, 1)
    assert per_image['frame1']['Dice_05'] > .98 and per_image['frame0']['Dice_05'] == 1


def test_any_gray_8_bit_format_is_read(folders):
    maps, masks = folders
    Image.open(maps/'frame0.png').convert('RGB').save(maps/'frame0.png')
    Image.open(maps/'frame1.png').convert('1').save(maps/'frame1.png')
    Image.open(maps/'frame2.png').convert('P').save(maps/'frame2.png')
    assert score_folder(maps, masks)[0]['Dice_05'] == 1


def test_progress_sees_every_stem_in_order(folders):
    seen = []
    def progress(stems):
        assert len(stems) == 3
        for stem in stems:
            seen.append(stem)
            yield stem
    _, per_image = score_folder(*folders, progress=progress)
    assert seen == list(per_image) and sorted(seen) == ['frame0', 'frame1', 'frame2']


def test_missing_prediction_is_named(folders):
    maps, masks = folders
    (maps/'frame1.png').unlink()
    with pytest.raises(InputError, match=r'1 of 3 .*frame1'): score_folder(maps, masks)


@pytest.mark.parametrize('kind', (0, 1), ids=['map', 'mask'])
@pytest.mark.parametrize('damage', ('text', 'cut short', 'empty file'))
def test_damaged_file_is_named(folders, kind, damage):
    path = folders[kind]/'frame2.png'
    whole = path.read_bytes()
    path.write_bytes({'text': b'not an image', 'cut short': whole[:len(whole) // 2], 'empty file': b''}[damage])
    with pytest.raises(InputError, match='frame2.png') as e: score_folder(*folders)
    assert '\n' not in str(e.value)


def test_16_bit_map_is_refused(folders):
    maps, masks = folders
    Image.fromarray(np.full((60, 80), 4000, np.uint16)).save(maps/'frame0.png')
    with pytest.raises(InputError, match='frame0.png is not an 8-bit image'): score_folder(maps, masks)


@pytest.mark.parametrize('kind', (0, 1), ids=['maps', 'masks'])
def test_missing_and_empty_folders(folders, tmp_path, kind):
    for name, there in (('nowhere', False), ('bare', True)):
        if there: (tmp_path/name).mkdir()
        broken = list(folders)
        broken[kind] = tmp_path/name
        with pytest.raises(InputError, match=name): score_folder(*broken)
