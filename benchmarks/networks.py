"""Every network of the registry: a smoke run on real images, distilled and undistilled, and what a forward and a training step cost at 352 px.

    python benchmarks/networks.py DATA WEIGHTS [--test DATA2 …] [--out runs/networks] [--only runs | times | table]

DATA is a data set in the PraNet layout, DATA2 a further one to be scored on, WEIGHTS the MobileNetV2 checkpoint of ImageNet in timm's key
names (the teacher). `runs` extracts, trains both arms of each network side by side (a thread each) and scores them on every test set; an
interrupted run goes on. `times` measures each network alone on a quiet machine, as benchmarks/students.py does, with the same loss for all:
BCE + Dice of each output. `table` gathers what is there. Without --only all three. Writes benchmarks/results/networks.json and networks.png.
(The runs and features that precision.json and collapse.json name as runs/students-short were made by an earlier script like this one.)
"""
import argparse
import csv
import json
import os
import shlex
import statistics
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from common import RESULTS, processor, run, versions
from students import Runner, fresh_model, machine, timings

from polyp_difom.core import atomic_path
from polyp_difom.evaluation.report import published
from polyp_difom.students.registry import list_students, student_table

BUDGET = '--preset best --size 128 --epochs 1 1 1 --steps 20 --batch-size 8 --augment paper --scales 1 1 1 --no-pretrained --seed 0'
STUDENTS = [name for name in list_students() if name != 'smp/']
NARROW = dict(unet='unet,width=16', unetpp='unetpp,width=8')
ARMS = ('distilled', 'undistilled')
MODES = dict(fp32='eager', channels_last='channels_last', bf16='bf16')
BATCHES = dict(forward=1, train=2) # CFA-Net learns from no single image
KEYS, DRAWN, MEANT = ('student', 'mode', 'what', 'size'), 'channels_last', 1024 # pixels that SAM-Mamba was made for
BESIDE = dict(sanet=(-9, -3, 'right'), emcadnet=(-6, -13, 'right'), msnet=(0, -17, 'center'), pranet=(-9, -3, 'right'), sam_mamba=(0, 15, 'center'), m2snet=(9, -3, 'left'), pvt_cascade=(-10, -1, 'right'), ctnet=(11, -3, 'left'),
              meganet=(11, -3, 'left'), unet=(8, -3, 'left'), unetpp=(-7, -3, 'right')) # where a name stands beside its point, and to which side
UNSEEN = {'CVC-ColonDB': 380, 'ETIS-LaribPolypDB': 196} # CVC-300 is a part of ColonDB


def commands(data, tests, weights, out):
    "The command lines, step by step; those of one step run at the same time."
    teacher = f'timm/mobilenetv2_100={weights},pad_type=same,mean=0.502,std=0.502'
    steps = [[f'polyp-difom extract {data} --teacher {teacher} --out {out}/features']]
    for name in STUDENTS:
        train = f'polyp-difom train {data} --student {NARROW.get(name, name)} {BUDGET}'
        steps += [[f'{train} --features {out}/features --out {out}/{name}-distilled', f'{train} --out {out}/{name}-undistilled']]
        steps += [[f'polyp-difom evaluate {out}/{name}-{arm} {one} --json {out}/{name}-{arm}-{i}.json --overwrite' for arm in ARMS] for i, one in enumerate([data, *tests])]
    return steps


def missing(steps):
    "Without the evaluations that are there already."
    written = lambda line: '--json' in line and Path(shlex.split(line)[shlex.split(line).index('--json') + 1]).exists()
    return [left for step in steps if (left := [line for line in step if not written(line)])]


def take_time(name, mode, what, size, seconds, device):
    "One row: milliseconds an image, the median of three repeats or more."
    batch = BATCHES[what]
    runner = Runner(fresh_model(name, 'plain', size, device), MODES[mode], batch, size, device)
    runner.model.train(what == 'train')
    warm_up, repeats, others = timings(getattr(runner, what), seconds, device, least=3)
    return dict(student=name, mode=mode, what=what, size=size, batch=batch, ms_an_image=round(1000*statistics.median(repeats)/batch, 1), repeats=len(repeats),
                slowest_ms=round(1000*max(repeats)/batch, 1), cores_of_others=others, warmup_seconds=round(warm_up, 3))


def take_times(out, size, seconds, device):
    "Measure what is missing or was disturbed, network by network, and keep each at once."
    file, settings = out/'times.json', machine(device)
    held = json.loads(file.read_text()) if file.exists() else {}
    rows = {tuple(row[key] for key in KEYS): row for row in held.get('rows', [])} if held.get('settings') == settings else {}
    wanted = [*product(STUDENTS, MODES, BATCHES, [size]), ('sam_mamba', DRAWN, 'forward', MEANT)]
    for key in wanted:
        if (rows.get(key) or {}).get('cores_of_others', 1) <= .2: continue
        rows[key] = take_time(*key, seconds, device)
        print(*key, f'{rows[key]["ms_an_image"]:.0f} ms an image', flush=True)
        with atomic_path(file) as path: path.write_text(json.dumps(dict(settings=settings, rows=list(rows.values())), indent=1))
    disturbed = [' '.join(map(str, key)) for key in wanted if rows[key]['cores_of_others'] > .2]
    if disturbed: print(f'{len(disturbed)} of {len(wanted)} times were taken beside busy programs (cores_of_others > 0.2): {", ".join(disturbed)}; run again when it is quiet')


def smoke(out, tests):
    "What came of the runs that are there."
    rows = {}
    for name, arm in product(STUDENTS, ARMS):
        place = out/f'{name}-{arm}'
        reports = [json.loads(file.read_text()) for i in range(1 + len(tests)) if (file := out/f'{name}-{arm}-{i}.json').exists()]
        if not reports: continue
        log = list(csv.DictReader((place/'log.csv').open()))
        config = json.loads((place/'config.json').read_text())
        sets = {key: value for report in reports for key, value in report['sets'].items()}
        rows.setdefault(name, {})[arm] = dict(
            loss=config['settings']['loss'], precision=config['settings']['precision'], seconds=round(sum(float(row['seconds']) for row in log), 1),
            seg=[round(float(row['seg']), 4) for row in log], **({'l1': [round(float(row['l1']), 4) for row in log], 'l2': [round(float(row['l2']), 4) for row in log]} if 'l1' in log[-1] else {}),
            mDice={key: round(value['mDice'], 4) for key, value in sets.items()}, Dice_05={key: round(value['Dice_05'], 4) for key, value in sets.items()},
            images={key: value['images'] for key, value in sets.items()})
    return rows


def draw(times, path):
    "Published accuracy on unseen hospitals against the time of a forward, measured here."
    rows, cost = {(row['student'], row['size']): row for row in times['rows'] if (row['what'], row['mode']) == ('forward', DRAWN)}, {row['name']: row for row in student_table()}
    figure, axis = plt.subplots(figsize=(8, 5.2), layout='constrained')
    for name in STUDENTS:
        figures = published(name, False)
        if not figures: continue
        (_, size), row = next((key, row) for key, row in sorted(rows.items(), reverse=True) if key[0] == name) # SAM-Mamba at what it was made for
        dice = 100*sum(n*figures[one]['mDice'] for one, n in UNSEEN.items())/sum(UNSEEN.values())
        made_here = dict(facecolor='none', edgecolor='C0', lw=1.2) if name == 'sam_mamba' else dict(color='C0', alpha=.6, lw=0)
        axis.scatter(row['ms_an_image'], dice, s=6*cost[name]['parameters'], **made_here)
        *offset, side = BESIDE.get(name, (0, 9, 'center'))
        axis.annotate(f'{name} at {size} px,\nre-created' if name == 'sam_mamba' else name, (row['ms_an_image'], dice), fontsize=8, ha=side, xytext=offset, textcoords='offset points')
    size, place = min(size for _, size in rows), times['settings']
    axis.set(xscale='log', xlabel=f'one forward at {size} px, measured here, ms ({place["processor"] if place["device"] == "cpu" else place["device"]}, {place["threads"]} threads, float32, channels last)',
             ylabel='published mDice, percent,\nColonDB and ETIS, images counted alike', title='Published accuracy against cost; area: parameters.\nEach network by its authors\' own training, epochs and choice of epoch')
    axis.title.set_size(9)
    axis.margins(.14, .2)
    figure.savefig(path, dpi=90)


def gather(out, data, weights, tests, steps):
    "All runs and times, how they were made, and on what."
    times = json.loads((out/'times.json').read_text()) if (out/'times.json').exists() else None
    result = dict(what=dict(runs='a smoke run, 60 steps of 8 images at 128 px from random weights, one seed, U-Net at width 16 and U-Net++ at width 8. It shows that every network trains, '
                                 'distilled and undistilled, and is scored on real images. It ranks nothing. Of SAM-Mamba 90 M of 104 M parameters are SAM\'s, frozen, and here they are random.',
                            times='ms an image, median, random weights, no latents: forward of one image, training step of two with BCE + Dice of each output (what stands beside the outputs, as CTNet\'s '
                                  'embedding, is computed and not learnt). SAM-Mamba\'s frozen weights have no gradients. Its forward at 1024 px is what the figure shows.',
                            published='mDice as the Polyp-DiFoM paper prints it, of the authors\' own training: epochs, sizes and the choice of the epoch differ, some chose by test images, '
                                      'SANet corrects probabilities, and SAM-Mamba is of code that is not public.'),
                  command=' '.join(['python benchmarks/networks.py', data, weights, *(f'--test {one}' for one in tests)]), commands=[line for step in steps for line in step],
                  machine=dict(processor=processor(), cores=os.cpu_count(), threads_per_run=1), versions=versions(),
                  students={row['name']: {key: row[key] for key in ('parameters', 'gmacs')} for row in student_table() if row['name'] in STUDENTS},
                  published={name: {key: value['mDice'] for key, value in published(name, False).items()} for name in STUDENTS}, runs=smoke(out, tests), times=times)
    RESULTS.mkdir(exist_ok=True)
    with atomic_path(RESULTS/'networks.json') as path: path.write_text(json.dumps(result, indent=1) + '\n')
    if times: draw(times, RESULTS/'networks.png')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data'); parser.add_argument('weights')
    parser.add_argument('--test', action='append', default=[], help='a further data set to be scored on')
    parser.add_argument('--out', type=Path, default=Path('runs/networks'))
    parser.add_argument('--only', choices=('runs', 'times', 'table'))
    parser.add_argument('--size', type=int, default=352, help='of the times, in pixels')
    parser.add_argument('--seconds', type=float, default=3, help='of measuring, for each forward and each training step')
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    steps = commands(given.data, given.test, given.weights, given.out)
    if given.only in (None, 'runs'): run(missing(steps))
    if given.only in (None, 'times'): take_times(given.out, given.size, given.seconds, torch.device('cuda' if torch.cuda.is_available() else 'cpu'))
    gather(given.out, given.data, given.weights, given.test, steps)
