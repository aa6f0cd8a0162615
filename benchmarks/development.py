"""Where does distillation begin to help? Settings compared one change at a time on training frames that are held out for it; no test image is scored.

    python benchmarks/development.py DATA ADAPTED OUT [--arms NAME …]

DATA is a data set in the PraNet layout, ADAPTED a store that holds an adapted teacher's maps of its training frames (`polyp-difom extract`). A fifth of the
masks is known, as in the recipe few-labels. Of the other frames some are learnt from without their masks; the rest, of other video sequences than any
labelled frame, is what is scored. Runs are kept in OUT and gone on with. Writes benchmarks/results/development.json, with the arms that are there by then.
"""
import argparse
import json
import os
from pathlib import Path

import numpy as np
from common import RESULTS, processor, versions
from polyp_difom.data.check import find_test_images
from polyp_difom.data.images import Layout, test_sets, train_pairs
from polyp_difom.data.loaders import take_labels
from polyp_difom.data.sequences import sequence_of
from polyp_difom.deploy.predictor import read_run
from polyp_difom.evaluation.benchmark import score_set
from polyp_difom.evaluation.statistics import bootstrap_means, interval
from polyp_difom.training.learner import TrainConfig
from polyp_difom.training.runs import resume, split_labelled, train

SHARED = dict(student='unet,width=8', size=128, labels=.2, epochs=(1, 14, 0), lr=2e-3, schedule='one-cycle', select='last', freeze=False, augment='strong', device='cpu')
SLOW, FAST = dict(batch_size=16, steps=100), dict(batch_size=8, steps=300)
SOFT, ALL = dict(soft_masks=True, lambdas=(1, 0, 0)), dict(soft_masks=True, lambdas=(1, .1, .1))
SQUARED = dict(soft_loss='bce-dice-squared')
ARMS = { # name -> the arm beside it, what differs, options
    'twin, 1500 steps of 16': ('', 'as few-labels began', SLOW),
    'twin': ('twin, 1500 steps of 16', '4500 steps of 8 images', FAST),
    'soft masks, squared Dice': ('twin', 'soft masks, by a loss of their own', FAST | SOFT | SQUARED),
    'all, squared Dice': ('soft masks, squared Dice', 'LFC and HFC', FAST | ALL | SQUARED),
    'labels for all': ('twin', 'the true masks of the same frames', FAST),
    'soft masks, squared Dice, temperature 0.25': ('soft masks, squared Dice', 'sharper masks', FAST | SOFT | SQUARED | dict(temperature=.25)),
    'soft masks': ('soft masks, squared Dice', 'the loss of labels', FAST | SOFT),
    'soft masks, labels last': ('soft masks', 'the last three epochs learn from labels alone', FAST | SOFT | dict(epochs=(1, 11, 3), supervised_last=True)),
    'soft masks of all frames': ('soft masks', 'soft masks on labelled frames, too', FAST | SOFT | dict(soft_on='all')),
    'soft masks, three quarters': ('soft masks', 'three quarters of a batch without labels', FAST | SOFT | dict(ratio=.75)),
}


def split(data):
    "Labelled pairs, frames to learn from without masks, and pairs to score."
    labelled, rest = take_labels(train_pairs(data), SHARED['labels'])
    sequences = {}
    for pair in rest: sequences.setdefault(sequence_of(pair.image), []).append(pair)
    names = [*sequences]
    np.random.default_rng(0).shuffle(names)
    frames, held = [], []
    for name in names: (frames if len(frames) < 760 else held).extend(sequences[name])
    seen = {sequence_of(pair.image) for pair in labelled}
    held = [pair for pair in held if sequence_of(pair.image) not in seen]
    tests = [pair.image for pairs in test_sets(data).values() for pair in pairs]
    _, valid = split_labelled(data, Layout(), TrainConfig(labels=SHARED['labels']))
    alike = {image for image, *_ in find_test_images([pair.image for pair in frames], [*tests, *(pair.image for pair in valid)])}
    return labelled, [pair for pair in frames if pair.image not in alike], held


def linked(folder, pairs, masks=False):
    "A folder of links to images, or a data set of them and their masks."
    for part, of in (('images', 'image'), ('masks', 'mask'))[:1 + masks]:
        place = folder/'TrainDataset'/part if masks else folder
        place.mkdir(parents=True, exist_ok=True)
        for pair in pairs:
            file = getattr(pair, of)
            if not (place/file.name).exists(): (place/file.name).symlink_to(file.absolute())
    return folder


def place(out, name):
    "The folder of an arm's run."
    return Path(out)/'runs'/name.replace(',', '').replace(' ', '-')


def finished(run):
    "Whether all epochs of a run are done."
    config = json.loads((run/'config.json').read_text()) if (run/'config.json').exists() else {}
    return config.get('finished_epochs', 0) == sum(SHARED['epochs'])


def run_arm(name, given, labelled, frames):
    "The run of an arm, made or gone on with."
    run, options = place(given.out, name), SHARED | ARMS[name][2]
    if finished(run): return run
    if (run/'last.safetensors').exists(): return resume(run)
    if name == 'labels for all': return train(linked(Path(given.out)/'labelled', labelled + frames, masks=True), run, **options | dict(labels=1., valid=.05))
    if 'soft_masks' in options: options |= dict(features=given.adapted, unlabelled=linked(Path(given.out)/'frames', frames))
    return train(given.data, run, **options)


def score(run, pairs):
    "Dice of each image, averaged over thresholds and at 0.5."
    model, settings = read_run(run)
    _, images = score_set(model, pairs, settings['size'])
    return images[['mDice', 'Dice_05']]


def tell(images, base, groups):
    "Means, and the difference from the arm beside it with its interval."
    found = {key: round(float(images[key].mean()), 4) for key in images}
    if base is None: return found
    for key in images:
        gain = (images[key] - base[key]).to_numpy()[None]
        found[f'{key}_difference'], found[f'{key}_ci95'] = round(float(gain.mean()), 4), [round(v, 4) for v in interval(bootstrap_means(gain, groups))]
    return found


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data'); parser.add_argument('adapted'); parser.add_argument('out')
    parser.add_argument('--arms', nargs='*', default=[*ARMS], choices=[*ARMS]); parser.add_argument('--teacher', help='folder of the adapted teacher, to be scored, too')
    given = parser.parse_args()
    labelled, frames, held = split(given.data)
    for name in given.arms: run_arm(name, given, labelled, frames)
    done = {name: run for name in ARMS if finished(run := place(given.out, name))}
    dice, groups = {name: score(run, held) for name, run in done.items()}, [('', sequence_of(pair.image)) for pair in held]
    learnt = split_labelled(given.data, Layout(), TrainConfig(labels=SHARED['labels']))[0]
    fitted = {name: score(run, learnt) for name, run in done.items() if name.startswith('twin')}
    arms = {name: dict(beside=ARMS[name][0], differs=ARMS[name][1]) | tell(dice[name], dice.get(ARMS[name][0]), groups) for name in done}
    for name, images in fitted.items(): arms[name] |= dict(mDice_training_frames=round(float(images.mDice.mean()), 4))
    result = dict(what=f'U-Net width 8, 128 px, {len(labelled)} labelled frames, {len(frames)} without masks, scored on {len(held)} held-out training frames, one seed',
                  command=f'python benchmarks/development.py {given.data} {given.adapted} {given.out}' + (f' --teacher {given.teacher}' if given.teacher else ''),
                  machine=dict(processor=processor(), cores=os.cpu_count()), versions=versions(), teacher=tell(score(given.teacher, held), None, groups) if given.teacher else None, arms=arms)
    (RESULTS/'development.json').write_text(json.dumps(result, indent=1) + '\n')
    for name, arm in arms.items(): print(name, {key: value for key, value in arm.items() if key not in ('beside', 'differs')})
