PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test export readme docs clean

# The environment is made once; it is made again when the package's needs change.
install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "polyp_difom needs Python 3.10 or newer: make PYTHON=python3.11 install")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade uv
	$(BIN)/uv pip install --quiet --compile-bytecode --config-settings editable_mode=compat --python $(BIN)/python --editable '.[dev,tensorboard]'
	touch $@

demo: install
	$(BIN)/polyp-difom demo

test: export OMP_NUM_THREADS = 1
test: install
	$(BIN)/nbdev_test --n_workers 2
	$(BIN)/python -m pytest -n 2 --dist loadfile

# For whoever edits notebooks: write the library, clean the notebooks, renew README.md.
export: install
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(MAKE) readme
	$(BIN)/python nbs/llms.py

readme: install
	$(BIN)/python -m nbconvert --log-level ERROR --to markdown --stdout nbs/index.ipynb | sed 's#(\.\./#(#g' > README.md

# The site, in _docs. Quarto is no Python package.
docs: install
	@command -v quarto > /dev/null || { echo 'Quarto is not installed: see https://quarto.org/docs/get-started, then run make docs again'; exit 1; }
	$(BIN)/python nbs/llms.py
	PATH="$$PWD/$(BIN):$$PATH" $(BIN)/nbdev_docs

clean:
	rm -rf .venv build dist *.egg-info _docs _proc
