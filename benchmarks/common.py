"What the benchmark scripts share: running commands, saying on what machine, and their command line."
import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from polyp_difom import __version__

RESULTS = Path(__file__).parent/'results'


def goes_on(line):
    "A command line; if it trains a run that was begun, the one that goes on with it."
    words = line.split()
    out = Path(words[words.index('--out') + 1]) if words[1] == 'train' else None
    return ['train', '--resume', str(out)] if out and (out/'config.json').exists() else words[1:]


def run(steps):
    "Run `polyp-difom` command lines, step by step; those of one step side by side with a thread each. Training goes on where it was."
    for step in steps:
        environment = os.environ | (dict(OMP_NUM_THREADS='1') if len(step) > 1 else {})
        running = [subprocess.Popen([str(Path(sys.executable).parent/'polyp-difom'), *goes_on(line)], env=environment) for line in step]
        if any([process.wait() for process in running]): sys.exit('a command failed')


def processor():
    "Name of the processor."
    names = [line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')]
    return names[0] if names else platform.processor()


def versions():
    "Of what the numbers depend on."
    return dict(polyp_difom=__version__, torch=torch.__version__, python=platform.python_version())


def main(name, doc, commands, collect):
    "Command line of a script that runs `commands(data, weights, out)` and keeps what `collect(out, steps)` gathers; gives that."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data'); parser.add_argument('weights')
    parser.add_argument('--out', type=Path, default=Path('runs')/name); parser.add_argument('--collect', action='store_true')
    given = parser.parse_args()
    steps = commands(given.data, given.weights, given.out)
    if not given.collect: run(steps)
    result = collect(given.out, steps)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS/f'{name}.json').write_text(json.dumps(result, indent=1) + '\n')
    return result
