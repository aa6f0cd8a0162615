"Notebooks and library agree, notebooks are clean, README.md is the front page. Works on a copy: changes nothing here."
import os
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
