"How the command line starts, in a process of its own."
import os
import subprocess
import sys

COMMAND = [sys.executable, '-c', 'from polyp_difom.cli import main; main()']


def test_a_mistake_is_one_line_and_no_traceback():
    result = subprocess.run([*COMMAND, 'check', 'nowhere'], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, 'error: nowhere: no such folder\n')


def test_help_does_not_load_the_library():
    code = 'import sys; from polyp_difom.cli import app; assert "torch" not in sys.modules and "fastai" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)
    for command in ('demo', 'check', 'extract', 'students', 'train', 'import', 'evaluate', 'predict'):
        result = subprocess.run([*COMMAND, command, '--help'], capture_output=True, text=True)
        assert result.returncode == 0 and len(result.stdout) > 300


def test_stdlib_inspect_is_not_shadowed():
    subprocess.run([sys.executable, '-c', 'from polyp_difom.all import *; import inspect; assert inspect.signature'], check=True)


def test_students_are_listed_on_80_columns():
    "Every registered student with its published figures, and nothing heavy is imported for that."
    code = '''import sys; from polyp_difom.cli import app; app(["students"], standalone_mode=False)
from polyp_difom.students.registry import list_students; print(*list_students())
print([m for m in ("timm", "transformers", "segment_anything", "segmentation_models_pytorch", "fastai") if m in sys.modules])'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=60, env=os.environ | dict(COLUMNS='80'))
    *lines, names, heavy = done.stdout.splitlines()
    assert heavy == '[]'
    table = [line for line in lines if not line.endswith('.')] # sentences are left to the terminal to wrap
    assert max(map(len, table)) <= 80
    for name in names.split(): assert sum(line.split()[:1] == [name.replace('smp/', 'smp/…')] for line in table) == 4, name
    assert 'sanet 23.90 11.21 0.904 0.916 0.888 0.753 0.750'.split() in [line.split() for line in table]
