"What the benchmark scripts share: running commands, and saying on what machine."
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from polyp_difom import __version__

RESULTS = Path(__file__).parent/'results'


def run(steps):
    "Run `polyp-difom` command lines, step by step; those of one step side by side with a thread each. Training goes on where it was."
    for step in steps:
        environment = os.environ | (dict(OMP_NUM_THREADS='1') if len(step) > 1 else {})
        resume = ['--resume'] if step[0].startswith('polyp-difom train') else []
        running = [subprocess.Popen([str(Path(sys.executable).parent/'polyp-difom'), *line.split()[1:], *resume], env=environment) for line in step]
        if any(process.wait() for process in running): sys.exit('a command failed')


def processor():
    "Name of the processor."
    names = [line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')]
    return names[0] if names else platform.processor()


def versions():
    "Of what the numbers depend on."
    return dict(polyp_difom=__version__, torch=torch.__version__, python=platform.python_version())
