"A teacher that knows the task: what it says is what was trained, it goes on where it stopped, and no image is judged by who has seen it."
import json
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import timm
import torch.nn.functional as F
from polyp_difom.core import InputError, file_hash
from safetensors.torch import save_file
from polyp_difom.data.images import list_images, read_image, test_sets as sets_of, train_pairs
from polyp_difom.evaluation.metrics import minmax_map, score_map
from polyp_difom.features.extract import extract
from polyp_difom.features.store import FeatureStore
from polyp_difom.model.model import load_model, predict
from polyp_difom.teachers.registry import create_teacher
from polyp_difom.training.adapt import FoldedTeacher, adapt, measure_headroom, threshold_dice
from polyp_difom.training.runs import LATER_SETTINGS, Checkpoint, _settings_digest, train
from polyp_difom.weights import read_tensors, save_tensors

COMMON = dict(size=64, batch_size=4, valid=.25, device='cpu')
BACKBONE = COMMON | dict(backbone='timm/test_efficientnet,pretrained=False,width=8', epochs=2, steps=3)
ALONE = COMMON | dict(student='unet,width=4', epochs=(1, 0, 0), steps=2, schedule='one-cycle')


def ways(features): return dict(backbone=BACKBONE, features=COMMON | dict(features=features, width=8, epochs=2, steps=3))


@pytest.fixture(scope='module')
def adapted(data, tmp_path_factory): return adapt(data, tmp_path_factory.mktemp('adapted')/'run', **BACKBONE)


@pytest.fixture(scope='module')
def stored(data, features, tmp_path_factory): return adapt(data, tmp_path_factory.mktemp('stored')/'decoder', **ways(features)['features'])


@pytest.fixture(scope='module')
def folded(data, tmp_path_factory): return adapt(data, tmp_path_factory.mktemp('folded')/'folds', folds=3, **BACKBONE)


def pixels(image, size=64):
    "A picture as a teacher sees it, (1, 3, size, size)."
    return torch.from_numpy(np.asarray(read_image(image).resize((size, size), 2)).copy()).permute(2, 0, 1)[None]/255


def upsampled(logits, size=64): return F.interpolate(logits, size=(size, size), mode='bilinear', align_corners=False)


@pytest.mark.parametrize('way', ['backbone', 'features'])
def test_what_stopped_goes_on_as_if_it_had_not(way, data, features, adapted, stored, tmp_path, monkeypatch):
    whole, after_epoch = dict(backbone=adapted, features=stored)[way], Checkpoint.after_epoch
    def stop(self):
        after_epoch(self)
        raise KeyboardInterrupt
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, 'after_epoch', stop)
        with pytest.raises(KeyboardInterrupt): adapt(data, tmp_path/'stopped', **ways(features)[way])
    assert len(read_tensors(tmp_path/'stopped/last.safetensors')[1]['rows']) == 1
    with pytest.raises(InputError, match='not finished .1 of 2 epochs'): create_teacher(f'adapted={tmp_path}/stopped')
    adapt(data, tmp_path/'stopped', **ways(features)[way])
    for name in ('last.safetensors', 'best.safetensors'):
        ours, theirs = (read_tensors(run/name)[0] for run in (tmp_path/'stopped', whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize('way', ['backbone', 'features'])
def test_other_settings_and_other_data_are_refused(way, data, features, adapted, stored, tmp_path):
    out, options = dict(backbone=adapted, features=stored)[way], ways(features)[way]
    before = (out/'last.safetensors').read_bytes()
    for change in (dict(lr=.1), dict(seed=1), dict(epochs=3), dict(mask_above=100)):
        with pytest.raises(InputError, match='was adapted otherwise.*then'): adapt(data, out, **options | change)
    other = tmp_path/'other'
    shutil.copytree(data, other)
    pair = train_pairs(other)[0]
    pair.mask.write_bytes(train_pairs(other)[1].mask.read_bytes())
    with pytest.raises(InputError, match='other data|cannot be resumed'): adapt(other, out, **options)
    assert (out/'last.safetensors').read_bytes() == before


@pytest.mark.parametrize('way', ['backbone', 'features'])
def test_one_that_was_adapted_before_a_setting_came_is_gone_on_with(way, data, features, adapted, stored, tmp_path):
    out, options = tmp_path/'before', ways(features)[way]
    shutil.copytree(dict(backbone=adapted, features=stored)[way], out)
    held = json.loads((out/'config.json').read_text())
    for name in LATER_SETTINGS: del held['settings'][name]
    (out/'config.json').write_text(json.dumps(held))
    tensors, kept = read_tensors(out/'last.safetensors')
    save_tensors(tensors, out/'last.safetensors', kept | dict(settings=_settings_digest(out)))
    adapt(data, out, **options)
    with pytest.raises(InputError, match='colour_exchange 0.0 then, 0.5 now'): adapt(data, out, **options | dict(colour_exchange=.5))


def test_logits_are_the_runs_own(adapted, data):
    teacher, model = create_teacher(f'adapted={adapted}'), load_model(adapted)
    for image in list_images(data)[:3]:
        found = teacher(pixels(image))
        assert found.shape == (1, 9, 16, 16) and teacher.provenance['mask_logits'] is True
        torch.testing.assert_close(upsampled(found[:, :1]), model(pixels(image)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('student, size, shape', [('unet,width=4', 64, (9, 16, 16)), ('unet,width=4', 96, (9, 24, 24)), ('unetpp,width=4', 64, None), ('emcadnet,backbone=pvt_v2_b0', 64, None)])
def test_any_run_is_a_teacher(student, size, shape, data, tmp_path):
    run = train(data, tmp_path/'run', student, pretrained=False, epochs=(1, 0, 0), steps=1, **COMMON | dict(size=size, batch_size=2))
    teacher, x = create_teacher(f'adapted={run}'), torch.rand(2, 3, size, size)
    found = teacher(x)
    assert found.shape[0] == 2 and found.shape[1] > 1 and found.shape[2:] == (size//4, size//4)
    if shape: assert found.shape[1:] == shape
    logits = load_model(run)(x)
    ours = found[:, :1] if teacher.head is None else upsampled(found[:, :1], size)
    torch.testing.assert_close(ours, F.avg_pool2d(logits, 4) if teacher.head is None else logits, atol=1e-4, rtol=1e-4)


def test_a_run_that_is_judged_by_what_its_teacher_was_trained_on_says_so(adapted, data, tmp_path):
    extract(data, [f'adapted={adapted}'], tmp_path/'store', device='cpu')
    learned = {*pd.read_csv(adapted/'files.csv').query('part == "train"').image_hash}
    assert {*FeatureStore(tmp_path/'store').array('adapted').attrs['learned_from']} == learned
    options = COMMON | dict(features=tmp_path/'store', epochs=(1, 0, 0), steps=1, soft_on='all', valid=.25)
    for seed in (0, 1):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            run = train(data, tmp_path/f'seed-{seed}', 'unet,width=4', seed=seed, **options)
        valid = {*pd.read_csv(run/'files.csv').query('part == "valid"').image_hash}
        found = [str(w.message) for w in told if 'was trained on' in str(w.message)]
        assert len(found) == (seed == 1) and all(f'{len(valid & learned)} of {len(valid)} validation images' in message for message in found)


def test_a_store_that_did_not_keep_what_its_teacher_was_trained_on_learns_it(adapted, data, tmp_path):
    for round in range(2):
        extract(data, [f'adapted={adapted}'], tmp_path/'store', device='cpu')
        attributes = FeatureStore(tmp_path/'store').array('adapted').attrs
        assert attributes['learned_from'] == create_teacher(f'adapted={adapted}').learned_from != []
        if not round: del attributes['learned_from']


def test_what_a_teacher_was_trained_on_is_known_through_decoders_and_folds(adapted, data, tmp_path):
    inner = {*create_teacher(f'adapted={adapted}').learned_from}
    extract(data, [f'adapted={adapted}'], tmp_path/'store', device='cpu')
    options = COMMON | dict(features=tmp_path/'store', teacher=f'adapted={adapted}', width=8, epochs=1, steps=1, labels=.5, seed=1)
    own = adapt(data, tmp_path/'decoder', **options)
    assert {*create_teacher(f'adapted={own}').learned_from} == inner | {*pd.read_csv(own/'files.csv').query('part == "train"').image_hash}
    assert {*create_teacher(f'adapted={adapt(data, tmp_path/"folded", folds=2, **options)}').learned_from} == inner


def test_frames_without_masks_are_not_what_a_teacher_was_trained_on(adapted, data, tmp_path):
    extract(data, [f'adapted={adapted}'], tmp_path/'store', device='cpu')
    run = train(data, tmp_path/'run', 'unet,width=4', tmp_path/'store', unlabelled='rest', labels=.5, epochs=(1, 1, 0), steps=1, **COMMON)
    files = pd.read_csv(run/'files.csv', keep_default_na=False)
    learned = create_teacher(f'adapted={run}').learned_from
    assert (files['mask'] == 'None').any() and learned == sorted(files.query('part == "train" and mask != "None"').image_hash)


@pytest.mark.parametrize('damage', [lambda f: f.write_text('a,b\n1,2\n'), lambda f: f.write_text(f.read_text().replace('train', 'trian')), lambda f: f.write_text(''.join(f.read_text().splitlines(True)[:-1])), lambda f: f.write_text(f.read_text()[:-9]),
                                    lambda f: f.write_text('part,image,mask,image_hash\n'), lambda f: f.write_bytes(b'\xff\xfe\x00'), lambda f: (f.unlink(), f.mkdir())])
def test_a_damaged_list_of_images_is_refused(damage, adapted, tmp_path):
    shutil.copytree(adapted, tmp_path/'teacher')
    damage(tmp_path/'teacher/files.csv')
    with pytest.raises(InputError, match='files.csv.*put it back'): create_teacher(f'adapted={tmp_path}/teacher')


def test_soft_mask_from_the_store_is_the_models(adapted, data, tmp_path):
    extract(data, [f'adapted={adapted}'], tmp_path/'store', device='cpu', flips=True)
    store, model = FeatureStore(tmp_path/'store'), load_model(adapted)
    for image in list_images(data)[::5]:
        soft = upsampled(torch.from_numpy(store.read('adapted', image)[None, :1]).float()).sigmoid()
        assert np.abs(soft[0, 0].numpy() - predict(model, read_image(image).resize((64, 64), 2), 64)).max() < 5e-3
        turned = upsampled(torch.from_numpy(store.read('adapted', image, 'flip-x')[None, :1]).float())
        torch.testing.assert_close(turned, model(pixels(image).flip(-1)), atol=.02, rtol=.02)


def test_no_member_has_seen_its_fold(folded, data):
    table, hashes = pd.read_csv(folded/'folds.csv'), {file_hash(pair.image).hex() for pair in train_pairs(data)}
    assert set(table.image_hash) == hashes and len(table) == len(hashes) and set(table.fold) == {1, 2, 3}
    for k in (1, 2, 3):
        files = pd.read_csv(folded/f'fold-{k}/files.csv') # training and validation part
        assert set(files.image_hash) == hashes - set(table[table.fold == k].image_hash)
        assert json.loads((folded/f'fold-{k}/config.json').read_text())['settings']['fold'] == [k, 3]


def test_folds_that_were_mixed_up_are_refused(folded, tmp_path):
    for name in ('copied', 'swapped', 'cut'): shutil.copytree(folded, tmp_path/name)
    shutil.rmtree(tmp_path/'copied'/'fold-2'); shutil.copytree(folded/'fold-1', tmp_path/'copied'/'fold-2')
    for one, other in ((1, 2), (2, 1)): shutil.rmtree(tmp_path/'swapped'/f'fold-{one}'); shutil.copytree(folded/f'fold-{other}', tmp_path/'swapped'/f'fold-{one}')
    pd.read_csv(folded/'folds.csv').iloc[:3].to_csv(tmp_path/'cut'/'folds.csv', index=False)
    for name in ('copied', 'swapped', 'cut'):
        with pytest.raises(InputError, match='is not of the fold that'): create_teacher(f'adapted={tmp_path/name}')


def test_other_weights_under_the_same_name_are_refused(data, tmp_path):
    options = {key: value for key, value in BACKBONE.items() if key != 'backbone'} | dict(epochs=1)
    for seed, folder in enumerate(('one', 'two')):
        (tmp_path/folder).mkdir(); torch.manual_seed(seed)
        save_file(timm.create_model('test_efficientnet').state_dict(), tmp_path/folder/'w.safetensors')
    adapt(data, tmp_path/'out', backbone=f'timm/test_efficientnet={tmp_path/"one"/"w.safetensors"}', **options)
    with pytest.raises(InputError, match='are others now'): adapt(data, tmp_path/'out', backbone=f'timm/test_efficientnet={tmp_path/"two"/"w.safetensors"}', **options)


def test_a_labelled_image_is_judged_by_who_has_not_seen_it(folded, data, tmp_path):
    teacher = create_teacher(f'adapted={folded}')
    extract(data, [f'adapted={folded}'], tmp_path/'store', device='cpu', batch_size=5, flips=True)
    table, store = pd.read_csv(folded/'folds.csv').set_index('image_hash').fold, FeatureStore(tmp_path/'store')
    for pair in train_pairs(data)[::4]:
        member = create_teacher(f'adapted={folded}/fold-{table[file_hash(pair.image).hex()]}')
        for view, axes in (('', ()), ('flip-x', (-1,))):
            kept, mean = torch.from_numpy(store.read('adapted', pair.image, view)).float(), teacher(pixels(pair.image).flip(axes))[0]
            own = member(pixels(pair.image).flip(axes))[0]
            torch.testing.assert_close(kept[:1], own[:1], atol=.01, rtol=.01)
            assert (kept[:1] - mean[:1]).abs().max() > .02, 'the members say different things'
            torch.testing.assert_close(kept[1:], mean[1:], atol=.01, rtol=.01)
    frame = sets_of(data)['Synthetic'][0].image
    assert teacher.choose(file_hash(frame)) is teacher
    members = [create_teacher(f'adapted={folded}/fold-{k}')(pixels(frame))[:, :1] for k in (1, 2, 3)]
    torch.testing.assert_close(teacher(pixels(frame))[:, :1], torch.stack(members).mean(0), atol=1e-4, rtol=1e-4)


def test_a_wrong_choice_would_be_seen(folded, data, tmp_path, monkeypatch):
    "The test above fails where an image is given to a member that has seen it."
    choose = FoldedTeacher.choose
    monkeypatch.setattr(FoldedTeacher, 'choose', lambda self, digest: choose(self, next(other for other, fold in self.fold.items() if fold != self.fold.get(digest))))
    with pytest.raises(AssertionError): test_a_labelled_image_is_judged_by_who_has_not_seen_it(folded, data, tmp_path)


def test_frames_of_one_video_are_in_one_fold(data, tmp_path):
    shutil.copytree(data, tmp_path/'data')
    images = [pair.image for pair in train_pairs(tmp_path/'data')]
    pd.DataFrame(dict(image=[image.name for image in images], sequence=[f'video {i//3}' for i in range(16)])).to_csv(tmp_path/'data/sequences.csv', index=False)
    adapt(tmp_path/'data', tmp_path/'out', folds=2, **BACKBONE | dict(epochs=1, steps=1))
    folds = dict(pd.read_csv(tmp_path/'out/folds.csv')[['image', 'fold']].values)
    assert all(len({folds[image.name] for image in images[i:i + 3]}) == 1 for i in range(0, 16, 3))


def test_a_decoder_runs_the_teachers_it_was_trained_on(stored, features, data, tmp_path):
    extract(data, [f'adapted={stored}'], tmp_path/'store', device='cpu')
    teacher, store = create_teacher(f'adapted={stored}'), FeatureStore(tmp_path/'store')
    for image in list_images(data)[:3]:
        maps = torch.from_numpy(FeatureStore(features).read('filterbank', image))[None].float()
        torch.testing.assert_close(torch.from_numpy(store.read('adapted', image))[None].float(), teacher.decoder.decode(maps), atol=.01, rtol=.01)
    shutil.copytree(stored, tmp_path/'changed')
    config = json.loads((tmp_path/'changed/config.json').read_text())
    config['settings']['teachers']['filterbank']['levels'] = 2
    (tmp_path/'changed/config.json').write_text(json.dumps(config))
    with pytest.raises(InputError, match='trained on another filterbank: levels 2 then'): create_teacher(f'adapted={tmp_path}/changed')


def test_several_teachers_are_joined_and_folded(data, tmp_path):
    specs = ['filterbank,size=64', 'filterbank,size=96,levels=2,name=two']
    extract(data, specs, tmp_path/'store', device='cpu')
    out = adapt(data, tmp_path/'out', features=tmp_path/'store', teacher=specs, folds=2, **COMMON | dict(width=8, epochs=1, steps=2))
    teacher, pair = create_teacher(f'adapted={out}'), train_pairs(data)[0]
    found = teacher.choose(file_hash(pair.image))(torch.rand(1, 3, 96, 96))
    assert teacher.size == 96 and found.shape == (1, 9, 16, 16) and [one.name for one in teacher.members[0].teachers] == ['filterbank', 'two']


def test_headroom_is_beside_a_student_that_saw_the_same(data, adapted, tmp_path, capsys):
    same, other = train(data, tmp_path/'same', **ALONE), train(data, tmp_path/'other', seed=1, **ALONE)
    capsys.readouterr()
    adapt(data, adapted, **BACKBONE | dict(student=same))
    assert capsys.readouterr().out.splitlines()[0].startswith('headroom ')
    found = json.loads((adapted/'headroom.json').read_text())
    assert found['images'] == 4 == len(found['scores']) and found['ci95'][0] <= found['headroom'] <= found['ci95'][1]
    assert abs(found['headroom'] - np.mean([row['teacher'] - row['student'] for row in found['scores']])) < 1e-9
    with pytest.raises(InputError, match='in common; train both'): adapt(data, tmp_path/'new', **BACKBONE | dict(student=other))
    with pytest.raises(InputError, match='no run in it'): adapt(data, tmp_path/'new', **BACKBONE | dict(student=tmp_path))
    config = json.loads((same/'config.json').read_text())
    config['settings']['distilled'] = True
    (same/'config.json').write_text(json.dumps(config))
    with pytest.raises(InputError, match='is distilled'): adapt(data, tmp_path/'new', **BACKBONE | dict(student=same))
    assert not (tmp_path/'new').exists()


@pytest.mark.parametrize('change, said', [(dict(backbone='timm/test_efficientnet=missing.safetensors'), 'missing.safetensors: no such file'), (dict(backbone=None), 'give a backbone'),
                                          (dict(backbone='timm/test_eficientnet'), 'nearest: test_efficientnet'), (dict(backbone='unet'), 'give timm/NAME'), (dict(folds=1), 'folds is 1'),
                                          (dict(folds=17), 'fewer folds'), (dict(size=66), 'multiple of 4'), (dict(epochs=0), 'epochs is 0'), (dict(stpes=3), 'nearest: steps')])
def test_mistakes_leave_nothing_behind(change, said, data, tmp_path):
    with pytest.raises(InputError, match=said): adapt(data, tmp_path/'out', **BACKBONE | change)
    assert not (tmp_path/'out').exists()


def test_damage_is_named(folded, stored, tmp_path):
    for name, file, content, said in (('a', 'folds.csv', 'x', 'folds.csv: not a table'), ('d', 'folds.csv', 'fold,image,image_hash\n', 'folds.csv: not a table'), ('b', 'fold-1/config.json', '{', 'config.json: not readable'), ('c', 'fold-2/best.safetensors', 'x', 'corrupt')):
        shutil.copytree(folded, tmp_path/name)
        (tmp_path/name/file).write_text(content)
        with pytest.raises(InputError, match=said): create_teacher(f'adapted={tmp_path}/{name}')
    with pytest.raises(InputError, match='no run in it'): create_teacher(f'adapted={tmp_path}')
    with pytest.raises(InputError, match='adapted=FOLDER'): create_teacher('adapted')


def test_threshold_dice_is_the_benchmarks():
    rng = np.random.default_rng(0)
    for mask in (rng.random((30, 40)) > .7, np.zeros((30, 40), bool), np.ones((30, 40), bool)):
        for map in (rng.random((30, 40)), mask*.5 + .1, np.full((30, 40), .3), np.round(rng.random((30, 40)))):
            map = map.astype(np.float32)
            assert abs(threshold_dice(map, mask) - score_map(minmax_map(map), mask)[0]['mDice']) < 1e-6


def test_an_interval_covers_what_is_true():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(100):
        gain = rng.normal(.03, .1, 60)
        low, high = measure_headroom(gain, np.zeros(60), draws=400)['ci95']
        inside += low < .03 < high
    assert 85 <= inside <= 100


def test_the_registry_finds_it_without_training(adapted):
    code = (f'import sys, polyp_difom.teachers.registry as r; assert "fastai" not in sys.modules and "adapted" in r.list_teachers()\n'
            f'print(r.create_teacher("adapted={adapted},name=mine").name)')
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True).stdout.split() == ['mine']


def test_on_the_command_line(data, tmp_path, polyp_difom, fails):
    words = ['--backbone', 'timm/test_efficientnet,pretrained=False,width=8', '--size', 64, '--epochs', 1, '--steps', 1, '--batch-size', 4, '--valid', .25, '--device', 'cpu']
    done = polyp_difom('adapt', data, *words, '--out', tmp_path/'out')
    assert done.returncode == 0 and 'on 4 validation images' in done.out and 'for the headroom, give the run of a student alone' in done.out and f'--teacher adapted={tmp_path}/out' in done.out.replace('\n', '')
    assert polyp_difom('extract', data, '--teacher', f'adapted={tmp_path}/out', '--out', tmp_path/'store', '--device', 'cpu').returncode == 0
    assert FeatureStore(tmp_path/'store').teachers == ['adapted']
    assert 'give a backbone' in fails('adapt', data, '--out', tmp_path/'new')
