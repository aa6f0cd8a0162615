"Grids of runs: made once, gone on with, reported with what the user knows."
import csv, gzip, json, shutil, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from polyp_difom.core import InputError, is_running
from polyp_difom.data.images import Pair, test_sets as list_sets, train_pairs
from polyp_difom.data.synthetic import make_synthetic
from polyp_difom.deploy.predictor import predict_files
from polyp_difom.evaluation.reproduce import Recipe, Sources, _check_same, _configuration, _read_options, _train_options, list_jobs, list_recipes, read_recipe, reproduce
from polyp_difom.training.learner import presets

TINY = Recipe('tiny', 'A tiny grid', seeds=[0, 1], students=['unet,width=4'], twin='undistilled', unlabelled='rest',
              shared=dict(labels=0.5, size=64, epochs=[0, 2, 0], steps=4, batch_size=4, lr=1e-2, schedule='one-cycle', augment='strong', select='last', valid=0.2),
              teacher=dict(labels=0.5, size=64, epochs=1, steps=4, batch_size=4, lr=3e-3, valid=0.2),
              arms={'undistilled': {}, 'all': dict(features='adapted', unlabelled=True, soft_masks=True, lambdas=[1, .1, .1])})
MADE = dict(backbone='timm/mobilenetv2_035,pretrained=False', device='cpu')


@pytest.fixture(scope='module')
def data(tmp_path_factory): return make_synthetic(tmp_path_factory.mktemp('reproduce')/'data', n_train=30, n_test=6, size=(64, 64))


@pytest.fixture(scope='module')
def grid(data, tmp_path_factory):
    "A grid whose first run was made alone, and the rest by two workers."
    out = tmp_path_factory.mktemp('grid')/'grid'
    alone = reproduce(TINY, data, out, seeds=[0], arms=['undistilled'], workers=1, record=out/'early.json', **MADE)
    assert alone == dict(verdict='nothing to compare yet: no other arm has a seed in common with undistilled') and not (out/'early.json').exists()
    first = next(out.rglob('result.json'))
    before = first.stat().st_mtime_ns
    summary = reproduce(TINY, data, out, workers=2, record=out/'record.json', **MADE)
    return out, summary, first.stat().st_mtime_ns == before


@pytest.mark.parametrize('name', list_recipes())
def test_every_arm_of_a_recipe_is_one_that_train_takes(name):
    recipe = read_recipe(name)
    jobs = list_jobs(recipe)
    for job in jobs: _read_options(job)
    assert len({job.place for job in jobs}) == len(jobs) == len(recipe.students)*len(recipe.arms)*len(recipe.seeds)
    if recipe.preset == 'best': assert recipe.twin == 'undistilled'


@pytest.mark.parametrize('name', list_recipes())
def test_what_cannot_be_the_teachers_gain_claims_none(name):
    recipe = read_recipe(name)
    idle = ('undistilled', 'shuffled', 'zero weight', 'random', 'filter bank', 'longer training', 'longest training', 'pretrained', 'labels for all', 'flips alone')
    for arm in recipe.arms: assert recipe.design.claims(arm) == (not any(word in arm for word in idle) or arm == 'all, longer training'), arm


def test_a_recipe_says_what_its_arms_are_and_a_wrong_word_is_refused(tmp_path):
    recipe = replace(TINY, arms={'undistilled': {}, 'all': dict(TINY.arms['all'], beside=['frozen']), 'frozen': dict(freeze=True, role='control')})
    assert (recipe.design.controls, recipe.design.beside, recipe.design.claims('all'), recipe.design.claims('frozen')) == (('frozen',), (('all', 'frozen'),), True, False)
    assert not {'role', 'beside'} & {key for job in list_jobs(recipe) for key in _configuration(job, recipe)}
    for wrong, told in ((dict(role='twin'), 'role twin: choose control, rival, reference'), (dict(beside=['none']), 'beside none: give other arms'), (dict(beside=['undistilled']), 'beside undistilled: give other arms'),
                        (dict(beside='all'), 'beside all: give a list'), (dict(beside=[['all']]), 'give other arms')):
        with pytest.raises(InputError, match=told): replace(TINY, arms={'undistilled': {}, 'all': TINY.arms['all'] | wrong})
    with pytest.raises(InputError, match='undistilled: role is of an arm that is compared with the twin'): replace(TINY, arms={'undistilled': dict(role='control'), 'all': TINY.arms['all']})


def test_a_recipe_that_is_like_another_differs_in_what_it_says(tmp_path):
    known, like = read_recipe('few-labels'), read_recipe('new-hospital')
    assert known.shared | dict(labels=1.) == like.shared and known.teacher | dict(labels=1.) == like.teacher and {name: arm for name, arm in known.arms.items() if name != 'labels for all'} == like.arms
    (tmp_path/'own.toml').write_text('title = "Own"\nlike = "small"\nwithout = ["shuffled targets"]\nseeds = [7]\n[shared]\nsteps = 3\n[arms.all]\nlr = 1e-4\n[arms.more]\nlr = 1e-3\n')
    own, small = read_recipe(tmp_path/'own.toml'), read_recipe('small')
    assert own.arms['all'] == small.arms['all'] | dict(lr=1e-4, beside=['soft masks']) and 'shuffled targets' in small.arms['all']['beside']
    assert (own.seeds, own.shared['steps'], own.shared['size'], [*own.arms]) == ([7], 3, 96, ['undistilled', 'soft masks', 'all', 'more'])
    for wrong, told in (('like = "smal"', 'like smal: nearest: small'), ('like = "small"\nwithout = ["al"]', 'without al: small has no such arm'), ('like = "small"\nwithout = ["undistilled"]', 'the twin undistilled is none of its arms'),
                        ('without = ["all"]', 'without goes with like'), ('like = "small"\nwithout = [["all"]]', 'has no such arm')):
        (tmp_path/'own.toml').write_text(f'title = "Own"\n{wrong}\n')
        with pytest.raises(InputError, match=told): read_recipe(tmp_path/'own.toml')


@pytest.mark.parametrize('name', ['few-labels', 'new-hospital'])
def test_arms_differ_from_their_neighbour_in_the_named_thing(name):
    recipe = read_recipe(name)
    arms = {job.arm: _configuration(job, recipe) for job in list_jobs(recipe, seeds=[0], students=['unet,width=8'])}
    shared = lambda a, b: set(arms[a]) & set(arms[b])
    differ = lambda a, b: {key for key in shared(a, b) if arms[a][key] != arms[b][key]}
    assert differ('all', 'soft masks') == differ('both', 'LFC alone') == differ('both', 'HFC alone') == differ('soft masks, LFC', 'soft masks') == differ('soft masks, HFC', 'soft masks') == {'lambdas'}
    assert differ('all', 'both') == {'soft_masks'} and differ('all', 'shuffled targets') == {'shuffled'}
    assert differ('both', 'published trainable fusion') == {'fusion'}
    assert differ('both', 'filter bank') - {'soft_masks'} == differ('both', 'random-weight teacher') - {'soft_masks'} == {'features'}
    assert differ('soft masks', 'soft masks with zero weight') == {'soft_weight'}
    assert differ('soft masks', 'shuffled soft masks') == {'shuffled'} and differ('soft masks', 'soft masks, 4 labels a step') == differ('undistilled', 'undistilled, 4 labels a step') == {'batch_size'}
    assert differ('soft masks, 4 labels a step', 'soft masks, squared Dice') == {'soft_loss'}
    assert differ('all, longer training', 'all') == differ('undistilled', 'longer training') == {'steps'} and differ('all, longer training', 'longer training') == differ('all', 'undistilled')
    assert arms['longest training']['steps']*8 == arms['all, longer training']['steps']*arms['all, longer training']['batch_size'] == 2*arms['longer training']['steps']*8 # images in all
    assert differ('undistilled', 'pretrained student') == {'student', 'pretrained'} and differ('latents and freeze', 'latents and freeze with zero weight') == {'lambdas'}
    if 'labels for all' in arms: assert differ('undistilled', 'labels for all') == {'labels', 'valid', 'batch_size'} # as many frames are held out, and come beside the labelled ones


@pytest.mark.parametrize('name', list_recipes())
def test_every_run_of_every_recipe_knows_its_configuration(name):
    recipe = read_recipe(name)
    for job in list_jobs(recipe): assert _configuration(job, recipe)['student'] == job.network


def test_a_result_knows_what_its_preset_chose_and_the_defaults(monkeypatch):
    "What was made with other ones does not stand in one table with what is made now."
    recipe = replace(TINY, arms={'undistilled': {}, 'all': dict(features='adapted')})
    twin, job = list_jobs(recipe)[0], next(job for job in list_jobs(recipe) if job.arm == 'all')
    now = _configuration(job, recipe)
    assert (now['lambdas'], now['latents'], now['targets']['split'], 'targets' in _configuration(twin, recipe)) == ([1, .1, .1], 'free', 'hard', False)
    paper = replace(recipe, preset='paper')
    assert _configuration(list_jobs(paper, arms=['all'])[0], paper)['lambdas'] == [.6, .1, .1]
    held = dict(configuration=now, data={})
    _check_same('result.json', held, job, recipe, {})
    monkeypatch.setitem(presets['best'], 'warm_heads', False)
    with pytest.raises(InputError, match='warm_heads True then, False now'): _check_same('result.json', held, job, recipe, {})


@pytest.mark.parametrize('name', ['few-labels', 'new-hospital', 'small'])
def test_an_arm_sees_as_many_labels_in_a_step_as_its_twin_or_says_so(name):
    recipe = read_recipe(name)
    for arm, options in recipe.arms.items():
        batch = (recipe.shared | options)['batch_size']
        labelled = batch - round(batch*options.get('ratio', .5)) if options.get('unlabelled') or arm == 'labels for all' else batch # of the latter half have the true masks of those frames
        half = '4 labels a step' in arm or arm == 'soft masks, squared Dice' # an earlier grid's, which its comment says
        assert labelled == recipe.shared['batch_size']/(2 if half else 1), arm


def test_a_result_knows_the_batch_that_the_preset_chose():
    recipe = Recipe('own', 'Own', [0], ['unet,width=4'], 'undistilled', unlabelled='rest', shared=dict(size=64), teacher=dict(size=64), arms={'undistilled': {}, 'all': dict(features='adapted', unlabelled=True)})
    made = {job.arm: _configuration(job, recipe)['batch_size'] for job in list_jobs(recipe)}
    assert made == {'undistilled': 16, 'all': 32}


def test_a_source_that_a_recipe_does_not_use_is_refused(data, tmp_path):
    for name, given in (('unlabelled', data/'TrainDataset'/'images'), ('features', tmp_path)):
        with pytest.raises(InputError, match=f'nothing in it uses --{name}'): reproduce(TINY, data, tmp_path/'grid', **MADE, **{name: given})
    assert not (tmp_path/'grid').exists()


def test_a_grid_goes_on_where_it_was(grid):
    out, summary, kept = grid
    assert kept and len([*out.rglob('result.json')]) == 4
    assert {(m['arm'], m['seed']) for m in summary['means']} == {(arm, seed) for arm in TINY.arms for seed in TINY.seeds}


def test_the_record_holds_the_difference_of_the_dice_of_each_image(grid):
    out, _, _ = grid
    record, images = json.loads((out/'record.json').read_text()), json.loads(gzip.decompress((out/'record.images.json.gz').read_bytes()))
    assert len(record['commands']) == 1 and record['commands'][0].startswith('polyp-difom reproduce tiny ') and "--arms all --arms undistilled --seeds 0 --seeds 1" in record['commands'][0]
    one = record['differences'][0]
    assert {'arm', 'base', 'set', 'difference', 'ci95', 'headroom', 'seeds'} <= {*one}
    dice = {(run['arm'], run['seed']): run['sets'][one['set']] for run in images}
    by_hand = np.mean([dice[one['arm'], seed][image] - dice[one['base'], seed][image] for seed in TINY.seeds for image in dice[one['arm'], seed]])
    assert one['difference'] == pytest.approx(by_hand, abs=1e-4)


def test_seeds_are_other_runs(grid):
    "Another seed has other validation images and other scores."
    out, _, _ = grid
    for arm in TINY.arms:
        runs = [out/'runs/unet-width=4'/arm/f'seed-{seed}' for seed in TINY.seeds]
        assert [json.loads((run/'config.json').read_text())['settings']['seed'] for run in runs] == TINY.seeds
        parts = [{row['image'] for row in csv.DictReader((run/'files.csv').open()) if row['part'] != 'train'} for run in runs]
        scores = [json.loads((out/'results/unet-width=4'/arm/f'seed-{seed}'/'result.json').read_text())['sets'] for seed in TINY.seeds]
        assert parts[0] and parts[0] != parts[1] and scores[0] != scores[1], arm


def test_a_test_image_of_a_further_data_set_among_the_frames_is_refused(data, tmp_path):
    other = make_synthetic(tmp_path/'other', n_train=4, n_test=2, size=(64, 64), seed=5)
    for test_set in (other/'TestDataset').iterdir(): test_set.rename(test_set.with_name(f'Other-{test_set.name}'))
    frames = tmp_path/'frames'
    shutil.copytree(data/'TrainDataset'/'images', frames)
    for i, image in enumerate(sorted(frames.iterdir())): image.rename(frames/f'frame{i}{image.suffix}') if i > 26 else image.unlink()
    tested = next(iter(list_sets(other).values()))[0].image
    shutil.copy(tested, frames/f'leaked{tested.suffix}')
    recipe = replace(TINY, unlabelled='frames', shared=TINY.shared | dict(labels=1.))
    with pytest.raises(InputError, match='leaked'): reproduce(recipe, data, tmp_path/'grid', tests=[other], unlabelled=frames, arms=['all'], seeds=[0], workers=1, **MADE)
    assert not (tmp_path/'grid').exists(), 'nothing is made before'
    rest = list_jobs(TINY, arms=['all'])[0]
    assert _train_options(rest, TINY, Sources(str(data), (str(other),)), tmp_path)['held_out'] == [str(other)], 'nor are they taken from the rest'


def test_both_arms_see_the_same_student_and_the_same_labelled_images(grid):
    out, _, _ = grid
    twin, ours = ([*csv.DictReader((out/'runs/unet-width=4'/arm/'seed-0/files.csv').open())] for arm in ('undistilled', 'all'))
    assert twin == [row for row in ours if row['mask'] != 'None'] and len(ours) == len(twin) + 15
    settings = [json.loads((out/'runs/unet-width=4'/arm/'seed-0/config.json').read_text())['settings'] for arm in ('undistilled', 'all')]
    assert {key for key in settings[0] if settings[0][key] != settings[1][key]} == {'distilled', 'soft_masks', 'unlabelled', 'frames', 'teachers'}


def test_saved_maps_are_a_row_and_known_sequences_the_groups(grid, data, tmp_path):
    out, _, _ = grid
    name, pairs = next(iter(list_sets(data).items()))
    for set_name, of in list_sets(data).items(): predict_files(out/'runs/unet-width=4/undistilled/seed-0', of[0].image.parent, tmp_path/'Rival'/set_name)
    (tmp_path/'sequences.csv').write_text('image,sequence\n' + ''.join(f'{pair.image.name},{"ab"[i % 2]}\n' for of in list_sets(data).values() for i, pair in enumerate(of)))
    summary = reproduce(TINY, data, out, maps=[tmp_path/'Rival'], sequences=tmp_path/'sequences.csv', workers=1, **MADE)
    assert {e['groups'] for e in summary['differences'] if e['set'] == name} == {2}
    rows = [row for table in ('seen', 'unseen') if (out/'report'/f'{table}.csv').exists() for row in csv.reader((out/'report'/f'{table}.csv').open())]
    assert any(row and row[0] == 'Rival' for row in rows)


@pytest.mark.parametrize('given, told', [
    (dict(maps=['nowhere']), 'nowhere is not a folder'), (dict(sequences='nowhere.csv'), 'nowhere.csv: cannot be read'), (dict(arms=['al']), 'no arm al; nearest: all'),
    (dict(backbone=None), '--backbone'), (dict(students=['unet']), 'no student unet')])
def test_what_is_missing_is_said_before_anything_is_made(given, told, data, tmp_path):
    with pytest.raises(InputError, match=told): reproduce(TINY, data, tmp_path/'grid', **MADE | given)
    assert not (tmp_path/'grid').exists()


def test_a_result_of_other_options_is_refused(grid, data):
    out, _, _ = grid
    with pytest.raises(InputError, match='lr 0.01 then, 0.1 now'): reproduce(replace(TINY, shared=TINY.shared | dict(lr=.1)), data, out, **MADE)


def test_a_damaged_result_is_named(grid, data, tmp_path):
    shutil.copytree(grid[0], tmp_path/'grid')
    file = next((tmp_path/'grid').rglob('result.json'))
    file.write_text(file.read_text()[:100])
    with pytest.raises(InputError, match='result.json'): reproduce(TINY, data, tmp_path/'grid', **MADE)


def test_a_finished_grid_is_not_taken_for_one_of_other_images(grid, tmp_path):
    other = make_synthetic(tmp_path/'other', n_train=30, n_test=6, size=(64, 64), seed=7)
    with pytest.raises(InputError, match='made with other images .*training images'): reproduce(TINY, other, grid[0], **MADE)


def test_what_the_user_knows_of_an_image_is_not_overruled_by_its_looks():
    from polyp_difom.evaluation.reproduce import _alike
    pairs = [Pair(Path(f'{n}.png'), None) for n in range(3)]
    assert _alike({'CVC-300': pairs}, {None: {f'{n}.png': f'patient {n}' for n in range(3)}}) == {}


@pytest.mark.parametrize('change, told', [
    (dict(arms={'undistilled': {}, '..': {}}), "'..' is no name"), (dict(arms={'undistilled': {}, 'a b': {}, 'a-b': {}}), 'would share a folder'), (dict(students=[4]), '4 is no name'),
    (dict(arms={'undistilled': 4}), 'no table'), (dict(shared=dict(seed=5)), 'seed is of the whole recipe'), (dict(arms={'undistilled': dict(preset='paper')}), 'preset is of the whole recipe'),
    (dict(unlabelled=None), 'learns from frames without labels'),
    (dict(teacher=dict(folds=2)), "folds is not the recipe's to choose"), (dict(arms={'undistilled': dict(student=[1])}), 'give text'), (dict(arms={'undistilled': {}, 'a'*101: {}}), 'too long')])
def test_a_recipe_that_would_make_something_else_is_refused(change, told):
    with pytest.raises(InputError, match=told): replace(TINY, **change)


@pytest.mark.parametrize('change, told', [(dict(sets={}), 'no set'), (dict(data=None), 'damaged'), (dict(configuration=[]), 'its configuration is'), (dict(arm='wurst'), 'is of unet,width=4, wurst')])
def test_a_result_that_was_tampered_with_is_refused(change, told, grid, data, tmp_path):
    shutil.copytree(grid[0], tmp_path/'grid')
    file = next((tmp_path/'grid').rglob('result.json'))
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=told): reproduce(TINY, data, tmp_path/'grid', workers=1, **MADE)


def test_a_run_that_was_begun_with_other_options_is_not_gone_on_with(grid, data, tmp_path):
    shutil.copytree(grid[0], tmp_path/'grid')
    for file in (tmp_path/'grid').rglob('result.json'): file.unlink()
    with pytest.raises(InputError, match='lr 0.01 then, 0.1 now'): reproduce(replace(TINY, shared=TINY.shared | dict(lr=.1)), data, tmp_path/'grid', workers=1, **MADE)


def test_a_run_that_another_process_makes_is_told_and_nothing_is_recorded(grid, data, tmp_path):
    shutil.copytree(grid[0], tmp_path/'grid')
    next((tmp_path/'grid').rglob('all/seed-1/result.json')).unlink()
    said = []
    with FileLock(tmp_path/'grid/locks/unet-width=4-all-seed-1.lock'): reproduce(TINY, data, tmp_path/'grid', workers=1, record=tmp_path/'r.json', say=said.append, **MADE)
    assert '1 of 4 runs are being made by another process' in said[-1] and not (tmp_path/'r.json').exists()


def test_what_nobody_asked_for_is_checked_before_it_is_reported(grid, data, tmp_path):
    "A further seed on other images, and a result that a stranger put in."
    shutil.copytree(grid[0], tmp_path/'grid')
    other = make_synthetic(tmp_path/'other', n_train=30, n_test=6, size=(64, 64), seed=7)
    with pytest.raises(InputError, match='made with other images'): reproduce(TINY, other, tmp_path/'grid', seeds=[2], arms=['undistilled'], workers=1, **MADE)
    shutil.copytree(grid[0]/'results', tmp_path/'theirs')
    (tmp_path/'grid'/'results'/'stray').mkdir()
    result = json.loads(next((tmp_path/'theirs').rglob('all/seed-1/result.json')).read_text())
    (tmp_path/'grid'/'results'/'stray'/'result.json').write_text(json.dumps(result | dict(seed=7)))
    with pytest.raises(InputError, match='seed 7, is not in its place'): reproduce(TINY, data, tmp_path/'grid', workers=1, **MADE)


def test_the_teachers_scores_are_of_its_weights_and_of_these_images(grid, data, tmp_path):
    from polyp_difom.evaluation.reproduce import _score_teacher
    shutil.copytree(grid[0], tmp_path/'grid')
    sets, file = list_sets(data), tmp_path/'grid'/'teacher.json'
    kept = json.loads(file.read_text())
    hashes = {name: kept['known'][name] for name in sets}
    file.write_text(json.dumps(kept | dict(cost='mine')))
    assert _score_teacher(tmp_path/'grid', sets, hashes)['cost'] == 'mine' != _score_teacher(tmp_path/'grid', sets, {name: 'changed' for name in sets})['cost']


def test_nothing_else_is_replaced(grid, data, tmp_path):
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'report').write_text('mine')
    with pytest.raises(InputError, match='is a folder of something else'): reproduce(TINY, data, tmp_path/'mine', workers=1, **MADE)
    (tmp_path/'mine.json').write_text('{"a": 1}')
    for record in (tmp_path/'mine.json', next((grid[0]/'results').rglob('result.json'))):
        with pytest.raises(InputError, match='something else than the record of a grid'): reproduce(TINY, data, grid[0], workers=1, record=record, **MADE)


def test_training_images_are_no_test_set(data, tmp_path):
    shutil.copytree(data, tmp_path/'data')
    shutil.copytree(data/'TrainDataset', tmp_path/'data'/'TestDataset'/'NewClinic')
    with pytest.raises(InputError, match='NewClinic: 30 of its 30 images are training images'): reproduce(TINY, tmp_path/'data', tmp_path/'grid', workers=1, **MADE)


def test_training_images_that_were_saved_again_are_no_test_set_either(data, tmp_path):
    place = shutil.copytree(data, tmp_path/'data')/'TestDataset'/'NewClinic'
    for kind in ('images', 'masks'): (place/kind).mkdir(parents=True)
    for pair in train_pairs(data)[:6]:
        Image.open(pair.image).save(place/'images'/f'new-{pair.image.stem}.jpg', quality=90)
        shutil.copy(pair.mask, place/'masks'/f'new-{pair.mask.name}')
    with pytest.raises(InputError, match='NewClinic: 6 of its 6 images are training images, or nearly so'): reproduce(TINY, tmp_path/'data', tmp_path/'grid', workers=1, **MADE)


def test_a_set_under_two_names_is_one(data, tmp_path):
    tests = shutil.copytree(data, tmp_path/'data')/'TestDataset'
    first = next(tests.iterdir())
    shutil.copytree(first/'masks', tests/'Again'/'masks')
    (tests/'Again'/'images').mkdir()
    for path in (first/'images').iterdir(): Image.open(path).save(tests/'Again'/'images'/f'{path.stem}.jpg', quality=90)
    with pytest.raises(InputError, match='Again: 6 of its 6 images are in .*, too; take one of them away'): reproduce(TINY, tmp_path/'data', tmp_path/'grid', workers=1, **MADE)


def test_other_weights_in_a_grid_are_refused(grid, data, tmp_path):
    "Of the backbone by its name and options, of the teacher by its file."
    shutil.copytree(grid[0], tmp_path/'grid')
    for backbone in ('timm/mobilenetv2_050,pretrained=False', 'timm/mobilenetv2_035,pretrained=False,width=8'):
        with pytest.raises(InputError, match='made with other images or weights .backbone'): reproduce(TINY, data, tmp_path/'grid', seeds=[2], arms=['all'], workers=1, **MADE | dict(backbone=backbone))
    from safetensors.torch import load_file, save_file
    from safetensors import safe_open
    file = tmp_path/'grid'/'teacher'/'best.safetensors'
    with safe_open(file, 'pt') as held: about = held.metadata()
    save_file({name: t + .01 if t.is_floating_point() else t for name, t in load_file(file).items()}, file, about)
    with pytest.raises(InputError, match='features/adapted: was made of other weights'): reproduce(TINY, data, tmp_path/'grid', seeds=[2], arms=['all'], workers=1, **MADE)


def test_a_run_in_the_place_of_another_is_refused(grid, data, tmp_path):
    shutil.copytree(grid[0], tmp_path/'grid')
    for folder, name in (('runs', 'seed-{}'), ('begun', 'seed-{}.json')):
        place = tmp_path/'grid'/folder/'unet-width=4'/'all'
        (shutil.copytree if folder == 'runs' else shutil.copy)(place/name.format(1), place/name.format(2))
    with pytest.raises(InputError, match='is the run of unet-width=4/all/seed-1, with seed 1; remove it'): reproduce(TINY, data, tmp_path/'grid', seeds=[2], arms=['all'], workers=1, **MADE)


def test_what_an_earlier_version_made_is_called_that(grid, data, tmp_path):
    shutil.copytree(grid[0], tmp_path/'grid')
    done = tmp_path/'grid'/'features'/'adapted.done'
    done.write_text(done.read_text().split(' of ')[0])
    with pytest.raises(InputError, match='adapted.done: was written by an earlier version'): reproduce(TINY, data, tmp_path/'grid', seeds=[2], arms=['all'], workers=1, **MADE)
    file = next((tmp_path/'grid').rglob('result.json'))
    result = json.loads(file.read_text())
    del result['configuration']['warm_heads']
    file.write_text(json.dumps(result))
    with pytest.raises(InputError, match='earlier version, which did not write down warm_heads; choose another --out'): reproduce(TINY, data, tmp_path/'grid', workers=1, **MADE)


def test_a_pretrained_student_of_another_backbone_is_told_before_its_turn(data, tmp_path):
    arms = {'undistilled': {}, 'rival': dict(student='timm-unet,width=4', pretrained=True)} # its usual backbone is another one than that of MADE
    with pytest.raises(InputError, match='rival: its student begins with the weights of tf_efficientnet_lite0, and --backbone is of mobilenetv2_035'): reproduce(replace(TINY, arms=arms), data, tmp_path/'grid', workers=1, **MADE)


@pytest.mark.parametrize('change, told', [(dict(preset='wurst'), 'recipe tiny: unknown preset wurst; nearest: best'), (dict(arms={'undistilled': {}, 'all': TINY.arms['all'] | dict(unlabelled='no')}), "all: unlabelled 'no': give true or false"),
                                          (dict(arms={'undistilled': dict(ratio=.3), 'all': TINY.arms['all']}), 'arm undistilled: ratio: without features'), (dict(shared=TINY.shared | dict(lrr=1)), 'arm undistilled: unknown option lrr; nearest: lr'),
                                          (dict(seen=[3]), 'seen: 3 fits every set, or is no name'), (dict(seen=['CVC-']), "seen: 'CVC-' fits every set")], ids=str)
def test_a_fault_in_a_recipe_is_told_before_anything_is_made(change, told, data, tmp_path):
    with pytest.raises(InputError, match=told): reproduce(replace(TINY, **change), data, tmp_path/'grid', workers=1, **MADE)
    assert not (tmp_path/'grid').exists()


def test_a_record_that_cannot_be_written_and_maps_of_one_name_are_told_first(data, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(InputError, match='cannot be written .*choose another --json'): reproduce(TINY, data, tmp_path/'grid', record=tmp_path/'file'/'r.json', workers=1, **MADE)
    for folder in ('a', 'b'): (tmp_path/folder/'Own').mkdir(parents=True)
    with pytest.raises(InputError, match='two methods of one name'): reproduce(TINY, data, tmp_path/'grid', maps=[str(tmp_path/'a'/'Own'), str(tmp_path/'b'/'Own')], workers=1, **MADE)
    assert not (tmp_path/'grid').exists()


def test_one_image_is_a_set(data):
    from polyp_difom.evaluation.statistics import group_alike
    assert len(group_alike([next(iter(list_sets(data).values()))[0].image])) == 1


def test_a_worker_ends_with_the_process_that_started_it(tmp_path):
    "A killed grid leaves nobody at work."
    code = ('import os, sys, time, torch, polyp_difom.evaluation.reproduce as r\n'
            'def work(*given, say): print(os.getpid(), flush=True); time.sleep(60)\n'
            'r._work = work\n'
            'if __name__ == "__main__":\n'
            '    other = torch.multiprocessing.get_context("spawn").Process(target=r._start_worker)\n'
            '    other.start(); time.sleep(60)\n')
    (tmp_path/'grid.py').write_text(code)
    with subprocess.Popen([sys.executable, tmp_path/'grid.py'], stdout=subprocess.PIPE, text=True) as started:
        worker = int(started.stdout.readline())
        started.kill()
    end = time.monotonic() + 20
    while is_running(str(worker)) and time.monotonic() < end: time.sleep(.1)
    assert not is_running(str(worker))
