"""The first run on real images: one U-Net distilled and undistilled, on a small budget.

    python benchmarks/first_real_run.py DATA WEIGHTS [--out runs/first-real-run] [--collect]

DATA is a data set in the PraNet layout, WEIGHTS the MobileNetV2 checkpoint of ImageNet in timm's key names. Extracts, trains both arms
side by side (a thread each), evaluates both, and writes benchmarks/results/first-real-run.{json,png}. An interrupted run goes on.
--collect only gathers what is there.
"""
import csv
import json
import os

import matplotlib.pyplot as plt
from common import RESULTS, main, processor, versions
from polyp_difom.evaluation.report import published

ARMS = ('distilled', 'undistilled')
TRAIN = '--preset paper --student unet --width 16 --size 128 --epochs 6 6 6 --batch-size 16 --lr 2e-3 --schedule one-cycle --seed 0'


def commands(data, weights, out):
    "The command lines, step by step; those of one step run at the same time."
    teacher = f'timm/mobilenetv2_100={weights},pad_type=same,mean=0.502,std=0.502'
    return [[f'polyp-difom extract {data} --teacher {teacher} --out {out}/features'],
            [f'polyp-difom train {data} {TRAIN} --features {out}/features --out {out}/distilled', f'polyp-difom train {data} {TRAIN} --out {out}/undistilled'],
            [f'polyp-difom evaluate {out}/{arm} {data}' for arm in ARMS]]


def collect(out, steps):
    "Both reports, how they were made, and on what."
    reports = {arm: json.loads((out/arm/'evaluation/report.json').read_text()) for arm in ARMS}
    logs = {arm: list(csv.DictReader((out/arm/'log.csv').open())) for arm in ARMS}
    return dict(what='small-budget run at 128 px, 18 epochs, one seed; not the setting of the paper (352 px, 120 epochs)',
                commands=[line for step in steps for line in step], machine=dict(processor=processor(), cores=os.cpu_count(), threads_per_arm=1),
                versions=versions(),
                training_wall_minutes={arm: round(sum(float(row['seconds']) for row in log)/60, 1) for arm, log in logs.items()},
                best_epoch={arm: max(log, key=lambda row: (float(row['valid_dice']), int(row['epoch'])))['epoch'] for arm, log in logs.items()},
                reports=reports)


def draw(result):
    "mDice of both arms on every set, and the paper's, which had another budget."
    sets = list(result['reports']['distilled']['sets'])
    figure, axis = plt.subplots(figsize=(7.5, 2.8), layout='constrained')
    for i, (arm, colour) in enumerate(zip(ARMS, ('tab:blue', 'tab:orange'))):
        places = [x + 0.36*(i - 0.5) for x in range(len(sets))]
        axis.bar(places, [result['reports'][arm]['sets'][name]['mDice'] for name in sets], width=0.34, color=colour, label=f'{arm}, 128 px, 18 epochs')
        paper = [published('unet', arm == 'distilled').get(name, {}).get('mDice') for name in sets]
        axis.plot(places, paper, '_', color='black', markersize=16, label='paper, 352 px, 120 epochs' if i else None)
    axis.set_xticks(range(len(sets)), [f'{name}\n({result["reports"]["distilled"]["sets"][name]["images"]} images)' for name in sets], fontsize=8)
    axis.set(ylabel='mDice', ylim=(0, 1)); axis.legend(fontsize=7, ncols=3, loc='upper center', bbox_to_anchor=(0.5, 1.17), frameon=False)
    return figure


if __name__ == '__main__':
    result = main('first-real-run', __doc__, commands, collect)
    draw(result).savefig(RESULTS/'first-real-run.png', dpi=90)
