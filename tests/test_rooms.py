"The house: imports run downwards, private names stay where they are, and what is light loads nothing heavy."
import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT/'polyp_difom'


def exported(notebook):
    "The module that a notebook makes, as `data.images`; None if it makes none."
    for cell in json.loads(notebook.read_text())['cells']:
        first = ''.join(cell['source']).strip()
        if first.startswith('#| default_exp'): return first.split()[2]


NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if p.relative_to(ROOT/'nbs').parts[0][0].isdigit() and not set(p.parts) & {'.ipynb_checkpoints', '_proc'})
FLOORS = {module: floor for floor, module in enumerate(filter(None, map(exported, NOTEBOOKS)))}


def source(module): return PACKAGE.joinpath(*module.split('.')).with_suffix('.py').read_text()


def imports(module):
    "Modules of ours that a module imports, wherever in its text, with the names."
    package = ['polyp_difom', *module.split('.')]
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith('polyp_difom.'): yield name.name.removeprefix('polyp_difom.'), []
        elif isinstance(node, ast.ImportFrom):
            full = '.'.join([*(package[:-node.level] if node.level else []), *([node.module] if node.module else [])])
            if full.startswith('polyp_difom.'): yield full.removeprefix('polyp_difom.'), [name.name for name in node.names]


def test_every_module_has_a_notebook_of_the_same_place():
    for notebook, module in zip(filter(exported, NOTEBOOKS), FLOORS):
        places = [part.split('_', 1)[1] for part in notebook.relative_to(ROOT/'nbs').with_suffix('').parts]
        assert '.'.join(places) == module, f'{notebook.name} exports {module}'
    written = {'.'.join(p.relative_to(PACKAGE).with_suffix('').parts) for p in PACKAGE.rglob('*.py')}
    by_hand = {m for m in written if m.split('.')[-1].startswith('_')} | {'all'}
    assert written - by_hand == set(FLOORS)


@pytest.mark.parametrize('module', FLOORS)
def test_imports_run_downwards(module):
    upwards = [name for name, _ in imports(module) if FLOORS.get(name, -1) >= FLOORS[module]]
    assert upwards == [], f'{module} imports what stands on its own floor or above'


@pytest.mark.parametrize('module', [*FLOORS, 'all'])
def test_no_private_name_crosses_modules(module):
    private = [f'{place}.{name}' for place, names in imports(module) for name in names if name.startswith('_') and not name.startswith('__')]
    assert private == []


HEAVY = ('timm', 'transformers', 'fastai', 'matplotlib', 'segment_anything', 'segmentation_models_pytorch', 'py_sod_metrics', 'ray')


def loaded(statement, names):
    "Which of `names` a fresh Python has loaded after a statement."
    code = f'{statement}\nimport sys; print(*[name for name in {names!r} if name in sys.modules])'
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize('module, allowed', [('core', ()), ('weights', ('torch',)), ('data.images', ()), ('targets.frequency', ('torch',)), ('targets.projection', ('torch',)),
                                             ('training.losses', ('torch',)), ('cli', ())])
def test_light_modules_load_nothing_heavy(module, allowed):
    assert set(loaded(f'import polyp_difom.{module}', (*HEAVY, 'torch'))) <= set(allowed)


def test_reading_a_run_needs_no_metrics(): assert loaded('import polyp_difom.deploy.predictor', ('py_sod_metrics', 'matplotlib.pyplot', 'ipywidgets')) == []


def test_the_notebook_names_are_there_in_a_fresh_python():
    code = 'from polyp_difom.all import *; import polyp_difom.all as a; print(len(a.__all__)); print(*sorted(n for n in a.__all__ if n not in globals()))'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    count, missing = out.stdout.split('\n')[:2]
    assert 20 <= int(count) <= 80 and missing == '' and out.stderr == ''
    from polyp_difom import all
    imported = {name for _, names in imports('all') for name in names}
    assert set(all.__all__) == imported, 'what is imported is listed, and nothing else'
