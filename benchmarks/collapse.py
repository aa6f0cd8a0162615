"""Does the distillation target collapse? The same student on the same real features, with the published trainable fusion and with frozen targets.

    python benchmarks/collapse.py DATA FEATURES [--images 288] [--epochs 6 18 6] [--size 128]

DATA is a data set in the PraNet layout, FEATURES a store of `polyp-difom extract`. Writes benchmarks/results/collapse.{json,png}: target spread,
latent losses, the share of the target's variance that L1 and L2 explain (R²), and validation Dice, epoch by epoch. The published arm has the
authors' fusion (1x1 convolution and ReLU over the teachers' maps at 64x64, trained by the distillation losses) and their square window; all
else is as in the other arm, so here its latents reach the decoder.
"""
import argparse
import json
import os

import matplotlib.pyplot as plt
import torch
from common import RESULTS, processor, versions
from fastai.learner import Learner
from polyp_difom.data.images import list_pairs, train_folder
from polyp_difom.data.loaders import PolypDataset, polyp_dataloaders, split_pairs
from polyp_difom.features.store import FeatureStore
from polyp_difom.training.losses import output_loss
from polyp_difom.model.model import PolypDiFoM, amp_dtype
from polyp_difom.students.registry import create_student
from polyp_difom.targets.trainable_fusion import RawMaps, TrainableFusion
from polyp_difom.targets.latent import build_targets
from polyp_difom.training.callbacks import Distillation, EncoderFreeze, EpochLog, EpochSeed, PhaseSchedule, PublishedDistillation, TargetWatch, adam, dice_score

ARMS = {'trainable fusion (published)': 'tab:red', 'frozen targets': 'tab:blue'}


def train(arm, train_pairs, valid_pairs, store, given):
    "One arm; the rows of its log."
    torch.manual_seed(0)
    images, size = [pair.image for pair in train_pairs], given.size
    model = PolypDiFoM(create_student('unet', width=16), 'paper')
    if arm == 'frozen targets':
        targets, distillation = build_targets(store, images, model.target_grids(size), model.latents.channels), Distillation()
    else:
        targets, distillation = RawMaps(store, images), PublishedDistillation()
        model.teacher_fusion = TrainableFusion(len(targets[0][0]), model.latents.channels)
    dls = polyp_dataloaders(PolypDataset(train_pairs, size, targets), PolypDataset(valid_pairs, size), 16, (1.,), torch.device('cpu'))
    model.precision = amp_dtype(torch.device('cpu'))
    learn = Learner(dls, model, output_loss, opt_func=adam, metrics=dice_score,
                    cbs=[EpochSeed(0), PhaseSchedule(given.epochs), distillation, EncoderFreeze(size), EpochLog(), TargetWatch()])
    with learn.no_bar(), learn.no_logging(): learn.fit(sum(given.epochs), 1e-3)
    return learn.epoch_log.rows


def draw(arms, epochs):
    "Spread, losses, R² and Dice of both arms."
    figure, axes = plt.subplots(1, 4, figsize=(12, 2.6), layout='constrained')
    panels = (('target std', ('std_l1', 'std_l2')), ('latent loss', ('l1', 'l2')), ('R² of L1 and L2', ('r2_l1', 'r2_l2')), ('validation Dice', ('valid_dice',)))
    for axis, (title, columns) in zip(axes, panels):
        for arm, colour in ARMS.items():
            for column, style in zip(columns, ('-', '--')):
                axis.plot([row['epoch'] for row in arms[arm]], [row[column] for row in arms[arm]], style, color=colour, label=arm if style == '-' else None)
        for end in (epochs[0] + .5, sum(epochs[:2]) + .5): axis.axvline(end, color='gray', ls=':')
        axis.set(title=title + (', LFC solid, HFC dashed' if len(columns) == 2 and axis is axes[0] else ''), xlabel='epoch')
    axes[2].set_ylim(-1, 1); axes[0].legend(fontsize=7)
    return figure


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data'); parser.add_argument('features')
    parser.add_argument('--images', type=int, default=288); parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--epochs', type=int, nargs=3, default=[6, 18, 6])
    given = parser.parse_args()
    train_pairs, valid_pairs = split_pairs(list_pairs(train_folder(given.data)), 0.1, 0)
    _, some = split_pairs(train_pairs, given.images/len(train_pairs), 0)
    store = FeatureStore(given.features)
    arms = {arm: train(arm, some, valid_pairs, store, given) for arm in ARMS}
    result = dict(what=f'U-Net width 16, {given.size} px, {len(some)} training images, {sum(given.epochs)} epochs, Adam 1e-3, one seed; a small run to watch targets, not scores',
                  command=f'python benchmarks/collapse.py {given.data} {given.features} --images {given.images} --size {given.size} --epochs ' + ' '.join(map(str, given.epochs)),
                  machine=dict(processor=processor(), cores=os.cpu_count()), versions=versions(), teachers=store.teachers, arms=arms)
    (RESULTS/'collapse.json').write_text(json.dumps(result, indent=1) + '\n')
    draw(arms, given.epochs).savefig(RESULTS/'collapse.png', dpi=80)
