"Notebooks and library agree, notebooks are clean, README.md is the front page, texts say what the records say. Works on a copy: changes nothing here."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def renewed(tmp_path_factory):
    "A copy of the project after `nbdev_export` and `nbdev_clean`."
    copy = tmp_path_factory.mktemp('project')
    shutil.copytree(ROOT/'nbs', copy/'nbs', symlinks=True, ignore=shutil.ignore_patterns('.ipynb_checkpoints', '_proc'))
    for name in ('settings.ini', 'pyproject.toml', '_quarto.yml'): shutil.copy(ROOT/name, copy)
    (copy/'polyp_difom').mkdir()
    for name in ('__init__.py', '__main__.py', 'all.py'): shutil.copy(ROOT/'polyp_difom'/name, copy/'polyp_difom') # written by hand
    for command in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([Path(sys.executable).parent/command], cwd=copy, check=True, env=os.environ | dict(HOME=str(copy)))
    return copy


def listing(folder, pattern): return {p.relative_to(folder): p for p in folder.rglob(pattern) if '.ipynb_checkpoints' not in p.parts}


def test_library_is_what_the_notebooks_export(renewed):
    exported, committed = (listing(root/'polyp_difom', '*.py') for root in (renewed, ROOT))
    assert exported.keys() == committed.keys()
    assert [str(p) for p in exported if exported[p].read_text() != committed[p].read_text()] == [], 'run `make export`'


def test_notebooks_are_clean(renewed):
    cleaned, committed = (listing(root/'nbs', '*.ipynb') for root in (renewed, ROOT))
    assert [str(p) for p in cleaned if cleaned[p].read_text() != committed[p].read_text()] == [], 'run `make export`'


def test_readme_is_the_front_page():
    made = subprocess.run([sys.executable, '-m', 'nbconvert', '--log-level', 'ERROR', '--to', 'markdown', '--stdout', ROOT/'nbs'/'index.ipynb'],
                          capture_output=True, text=True, check=True).stdout.replace('(../', '(')
    assert made == (ROOT/'README.md').read_text(), 'run `make readme`'


# --- numbers in texts ----------------------------------------------------------------------------------------------------------------------------

INTERVAL = r'[+-]?\d+\.\d \[-?\d+\.\d, -?\d+\.\d\]|\d+ % \[-?\d+, -?\d+\]'
EARLIER = {'+6.5 [0.8, 11.8]', '+1.7 [-0.7, 4.0]', '+1.9 [0.2, 3.7]'} # of the first three seeds, before two more were run


def cells_of(name, kind): return [cell for cell in json.loads((ROOT/'nbs'/name).read_text())['cells'] if cell['cell_type'] == kind]


def told_by(entry):
    "A comparison either way round, headroom and the share of it, as texts write them."
    for ends in (entry['ci95'], entry['ci_claim'], entry.get('headroom_ci95')):
        value = entry['headroom'] if ends is entry.get('headroom_ci95') else entry['difference']
        for sign in (1, -1) if ends else (): yield '{:+.1f} [{:.1f}, {:.1f}]'.format(100*sign*value, *sorted(100*sign*end for end in ends))
    if entry.get('share_ci95'): yield '{:.0f} % [{:.0f}, {:.0f}]'.format(*(100*share for share in (entry['share_of_headroom'], *entry['share_ci95'])))


@pytest.mark.parametrize('name', ['index.ipynb', 'tutorials/what_helps.ipynb', 'tutorials/honest_benchmark.ipynb'])
def test_intervals_in_texts_are_those_of_the_records(name):
    records = [json.loads(path.read_text()) for path in (ROOT/'benchmarks'/'results').glob('*.json')]
    known = {told for record in records for entry in [*record.get('differences', ()), *record.get('sizes', ())] for told in told_by(entry)}
    shown = {told for page in ('what_helps', 'honest_benchmark') for cell in cells_of(f'tutorials/{page}.ipynb', 'code') for told in re.findall(INTERVAL, json.dumps(cell['outputs']))}
    told = {found if found[0] in '+-' or '%' in found else f'+{found}' for cell in cells_of(name, 'markdown') for found in re.findall(INTERVAL, ''.join(cell['source']))}
    assert len(told) > 10 and sorted(told - known - shown - EARLIER) == []
