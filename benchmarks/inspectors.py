"""How long does a move of the cut-off take in the kernel? A map of 1280 channels on 64x64 cells, all pictures and energies of `inspect_frequency`.

    python benchmarks/inspectors.py

Writes benchmarks/results/inspectors.json. The goal is below 100 ms on two cores.
"""
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, processor, versions
from polyp_difom.data.images import list_pairs
from polyp_difom.data.synthetic import make_synthetic
from polyp_difom.features.extract import extract
from polyp_difom.features.store import FeatureStore
from polyp_difom.show.widgets import inspect_frequency
from polyp_difom.teachers.base import Teacher, register_teacher


@register_teacher('wide')
class Wide(Teacher):
    "Smooth noise of 1280 channels on 64x64 cells, the same for every image."
    def __init__(self, name='wide', checkpoint=None): super().__init__(name, 512)

    def features(self, x): # (B, 3, 512, 512) -> (B, 1280, 64, 64)
        torch.manual_seed(0)
        return torch.nn.functional.interpolate(torch.randn(len(x), 1280, 24, 24), size=(64, 64), mode='bicubic')


if __name__ == '__main__':
    folder = Path(tempfile.mkdtemp())
    data = make_synthetic(folder/'data', n_train=2, n_test=1, size=(256, 320))
    extract(data, ['wide'], folder/'features', device='cpu')
    start = time.perf_counter()
    inspector = inspect_frequency(FeatureStore(folder/'features'), list_pairs(data/'TrainDataset'))
    opened, moves = time.perf_counter() - start, []
    for shape in inspector.shape.options:
        inspector.shape.value = shape
        for cutoff in np.linspace(.02, 1.4, 40):
            start = time.perf_counter()
            inspector.view.marker = float(cutoff)
            moves.append(time.perf_counter() - start)
    result = dict(what='inspect_frequency, a map of 64x64x1280', command='python benchmarks/inspectors.py', machine=dict(processor=processor(), cores=os.cpu_count()), versions=versions(),
                  open_seconds=round(opened, 3), moves=len(moves), median_ms=round(1000*float(np.median(moves)), 1), worst_ms=round(1000*max(moves), 1), goal_ms=100)
    (RESULTS/'inspectors.json').write_text(json.dumps(result, indent=1) + '\n')
    print(result)
