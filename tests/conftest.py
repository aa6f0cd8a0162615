"What the tests share: small synthetic data, and the real images where POLYP_DIFOM_DATA names them."
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from polyp_difom.cli import main
from polyp_difom.features.extract import extract
from polyp_difom.data.synthetic import make_synthetic


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    "Sixteen training frames and three test frames; not to be changed."
    return make_synthetic(tmp_path_factory.mktemp('synthetic'), n_train=16, n_test=3, size=(96, 120))


@pytest.fixture(scope='session')
def features(data, tmp_path_factory):
    "Filter-bank features of `data`; not to be changed."
    store = tmp_path_factory.mktemp('features')/'store'
    extract(data, ['filterbank'], store, device='cpu')
    return store


@pytest.fixture
def real_data():
    "The folder of real polyp images."
    folder = os.environ.get('POLYP_DIFOM_DATA')
    if not folder: pytest.skip('POLYP_DIFOM_DATA is not set: no real images')
    return Path(folder)


@pytest.fixture
def polyp_difom(monkeypatch, capsys):
    "Run the command line in this process; gives exit code and what was printed."
    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['polyp-difom', *map(str, arguments)])
        with pytest.raises(SystemExit) as ended: main()
        return SimpleNamespace(returncode=ended.value.code or 0, **capsys.readouterr()._asdict())
    return run


@pytest.fixture
def fails(polyp_difom):
    "Run a command that must fail with one line on stderr; gives the line."
    def run(*arguments):
        result = polyp_difom(*arguments)
        lines = [line for line in re.split('[\r\n]+', result.err) if line.startswith('error: ')]
        assert result.returncode == 1 and len(lines) == 1, (result.returncode, result.err)
        assert result.err.rstrip().endswith(lines[0]), 'the error is the last thing said'
        return lines[0]
    return run
