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

SETTINGS = ['--size', '64', '--width', '4', '--batch-size', '4', '--epochs', '2', '2', '2', '--lr', '2e-3', '--schedule', 'one-cycle', '--device', 'cpu']


def train(*arguments): return [sys.executable, '-W', 'ignore', '-c', 'from polyp_difom.cli import main; main()', 'train', *map(str, arguments), *SETTINGS]


def log(run): return [{k: v for k, v in row.items() if k != 'seconds'} for row in csv.DictReader((run/'log.csv').open())]


@pytest.mark.parametrize('arm', ['distilled', 'undistilled'])
def test_killed_run_ends_with_the_same_losses(arm, data, features, tmp_path):
    distil = ['--features', features] if arm == 'distilled' else []
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    subprocess.run(train(data, '--out', whole, *distil), check=True)
    process = subprocess.Popen(train(data, '--out', killed, *distil))
    while not (killed/'log.csv').exists() or len(log(killed)) < 3:
        assert process.poll() is None, 'the run ended before it could be killed'
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL); process.wait()
    finished = len(read_tensors(killed/'last.safetensors')[1]['rows'])
    assert 2 <= finished < 6
    subprocess.run(train(data, '--out', killed, '--resume', *distil), check=True)
    assert log(killed) == log(whole)
    for name in ('last.safetensors', 'best.safetensors'):
        ours, theirs = (read_tensors(run/name)[0] for run in (killed, whole))
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
