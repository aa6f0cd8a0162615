"""Do bfloat16 and channels_last change scores? Trained runs, scored in every precision and memory layout.

    python benchmarks/precision.py DATA RUN [RUN …] [--set CVC-300]

Writes benchmarks/results/precision.json: mDice and Dice at 0.5 of each run on one test set, and how far each way is from single precision.
"""
import argparse
import json
from pathlib import Path

import torch
from common import RESULTS, processor, versions
from polyp_difom.deploy.predictor import read_run
from polyp_difom.evaluation.benchmark import score_set
from polyp_difom.data.images import test_sets

WAYS = {'fp32, contiguous': ('fp32', torch.contiguous_format), 'fp32, channels_last': ('fp32', torch.channels_last),
        'bf16, channels_last': ('bf16', torch.channels_last)}
SCORES = ('mDice', 'Dice_05')


def score(run, pairs):
    "Scores of a run, by way."
    model, settings = read_run(run)
    scores = {}
    for way, (model.precision, layout) in WAYS.items():
        summary, _ = score_set(model.to(memory_format=layout), pairs, settings['size'])
        scores[way] = {name: round(summary[name], 5) for name in SCORES}
    return scores


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path); parser.add_argument('runs', type=Path, nargs='+'); parser.add_argument('--set', default='CVC-300')
    given = parser.parse_args()
    scores = {run.name: score(run, test_sets(given.data)[given.set]) for run in given.runs}
    first = next(iter(WAYS))
    difference = {way: max(abs(s[way][name] - s[first][name]) for s in scores.values() for name in SCORES) for way in WAYS}
    result = dict(what=f'scores on {given.set} by precision and memory layout', largest_difference=difference, runs=scores,
                  command=f'python benchmarks/precision.py {given.data} ' + ' '.join(map(str, given.runs)) + f' --set {given.set}',
                  machine=processor(), versions=versions())
    (RESULTS/'precision.json').write_text(json.dumps(result, indent=1) + '\n')
    print(json.dumps(difference, indent=1))
