"How the command line starts, in a process of its own."
import subprocess
import sys

COMMAND = [sys.executable, '-c', 'from polyp_difom.cli import main; main()']


def test_a_mistake_is_one_line_and_no_traceback():
    result = subprocess.run([*COMMAND, 'check', 'nowhere'], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, 'error: nowhere: no such folder\n')


def test_help_does_not_load_the_library():
    code = 'import sys; from polyp_difom.cli import app; assert "torch" not in sys.modules and "fastai" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)
    for command in ('demo', 'check', 'extract', 'train', 'evaluate', 'predict'):
        result = subprocess.run([*COMMAND, command, '--help'], capture_output=True, text=True)
        assert result.returncode == 0 and len(result.stdout) > 300


def test_stdlib_inspect_is_not_shadowed():
    subprocess.run([sys.executable, '-c', 'from polyp_difom.all import *; import inspect; assert inspect.signature'], check=True)
