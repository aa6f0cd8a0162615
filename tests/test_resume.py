"A training killed at any moment goes on as if nothing had happened."
import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from polyp_difom.weights import read_tensors

SETTINGS = dict(student='unet,width=4', size=64, batch_size=4, epochs=(2, 2, 2), lr=2e-3, schedule='one-cycle', device='cpu')


def run_python(call): return [sys.executable, '-W', 'ignore', '-c', f'from polyp_difom.training.runs import resume, train; {call}']


def train(data, out, features): return run_python(f'train({str(data)!r}, {str(out)!r}, features={features and str(features)!r}, **{SETTINGS})')


def log(run): return [{k: v for k, v in row.items() if k != 'seconds'} for row in csv.DictReader((run/'log.csv').open())]


@pytest.mark.parametrize('arm', ['distilled', 'undistilled'])
def test_killed_run_ends_with_the_same_losses(arm, data, features, tmp_path):
    store = features if arm == 'distilled' else None
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    subprocess.run(train(data, whole, store), check=True)
    process = subprocess.Popen(train(data, killed, store))
    while not (killed/'log.csv').exists() or len(log(killed)) < 3:
        assert process.poll() is None, 'the run ended before it could be killed'
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL); process.wait()
    finished = len(read_tensors(killed/'last.safetensors')[1]['rows'])
    assert 2 <= finished < 6
    subprocess.run(run_python(f'resume({str(killed)!r}, device="cpu")'), check=True)
    assert log(killed) == log(whole)
    for name in ('last.safetensors', 'best.safetensors'):
        ours, theirs = (read_tensors(run/name)[0] for run in (killed, whole))
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
