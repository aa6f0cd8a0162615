"""A smoke run of every student on real images: three epochs, distilled and undistilled, from the command line.

    python benchmarks/students_short.py DATA WEIGHTS [--out runs/students-short] [--collect]

DATA is a data set in the PraNet layout, WEIGHTS the MobileNetV2 checkpoint of ImageNet in timm's key names (the teacher). Extracts, trains
both arms of each student side by side (a thread each), evaluates, and writes benchmarks/results/students-short.json. An interrupted run
goes on. --collect only gathers what is there.
"""
import csv
import json
import os

from common import main, processor, versions

BUDGET = '--preset paper --size 128 --epochs 1 1 1 --batch-size 16 --lr 1e-3 --schedule one-cycle --seed 0'
STUDENTS = {'unet': '--width 16', 'unetpp': '--width 8', 'pranet': '--no-pretrained', 'emcadnet': '--no-pretrained'}
ARMS = ('distilled', 'undistilled')


def commands(data, weights, out):
    "The command lines, step by step; those of one step run at the same time."
    teacher = f'timm/mobilenetv2_100={weights},pad_type=same,mean=0.502,std=0.502'
    steps = [[f'polyp-difom extract {data} --teacher {teacher} --out {out}/features']]
    for student, options in STUDENTS.items():
        train = f'polyp-difom train {data} --student {student} {options} {BUDGET}'
        steps += [[f'{train} --features {out}/features --out {out}/{student}-distilled', f'{train} --out {out}/{student}-undistilled'],
                  [f'polyp-difom evaluate {out}/{student}-{arm} {data}' for arm in ARMS]]
    return steps


def collect(out, steps):
    "All reports and logs, how they were made, and on what."
    runs = [f'{student}-{arm}' for student in STUDENTS for arm in ARMS]
    reports = {name: json.loads((out/name/'evaluation/report.json').read_text()) for name in runs}
    logs = {name: [{k: float(v) for k, v in row.items()} for row in csv.DictReader((out/name/'log.csv').open())] for name in runs}
    precision = {name: json.loads((out/name/'config.json').read_text())['settings'].get('precision', 'fp32') for name in runs}
    return dict(what='smoke run: three epochs from scratch at 128 px (one a phase), one seed, U-Net at width 16 and U-Net++ at width 8; it shows that '
                     'every student trains, resumes, loads and is scored on real images, and ranks nothing',
                commands=[line for step in steps for line in step],
                machine=dict(processor=processor(), cores=os.cpu_count(), threads_per_run=1), versions=versions(), precision=precision,
                training_wall_minutes={name: round(sum(row['seconds'] for row in log)/60, 1) for name, log in logs.items()},
                mDice={name: {s: round(scores['mDice'], 3) for s, scores in report['sets'].items()} for name, report in reports.items()},
                logs=logs, reports=reports)


if __name__ == '__main__':
    main('students-short', __doc__, commands, collect)
