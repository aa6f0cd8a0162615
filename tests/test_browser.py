"What people see: the page of `nbs/apps/inspect.ipynb`, served by Voila and looked at in Chromium."
import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from polyp_difom.training.runs import train

ROOT, CHROMIUM = Path(__file__).parents[1], shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
pytestmark = pytest.mark.skipif(not CHROMIUM, reason='Chromium is not installed (apt-get install chromium)')


def free_port():
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    "The address of pages, and the folder of their notebooks."
    port, log = free_port(), tmp_path_factory.mktemp('voila')/'log'
    notebooks = tmp_path_factory.mktemp('notebooks')
    shutil.copy(ROOT/'nbs'/'apps'/'inspect.ipynb', notebooks)
    command = [sys.executable, '-m', 'voila', notebooks, '--no-browser', f'--port={port}', '--Voila.ip=127.0.0.1', "--VoilaConfiguration.extension_denylist=['jupyterlab-jupytext']"]
    with open(log, 'w') as said:
        process = subprocess.Popen([*map(str, command)], stdout=said, stderr=said, env=os.environ | dict(POLYP_DIFOM_STATIC=''), cwd=ROOT)
        try:
            for _ in range(240):
                try: urllib.request.urlopen(f'http://127.0.0.1:{port}/voila/static/voila.js', timeout=1)
                except urllib.error.HTTPError: break
                except OSError: time.sleep(.25)
                else: break
                assert process.poll() is None, log.read_text()
            yield f'http://127.0.0.1:{port}/voila/render/', notebooks
        finally:
            process.terminate()
            process.wait(20)


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu'])
        yield found
        found.close()


@pytest.fixture
def tab(browser):
    "An empty page, and what its console says."
    page = browser.new_page(viewport=dict(width=1500, height=1100))
    page.faults = []
    page.on('pageerror', lambda error: page.faults.append(str(error)))
    page.on('console', lambda message: page.faults.append(message.text) if message.type == 'error' and not message.text.startswith('Failed to load resource') else None) # fonts and MathJax, where there is no net
    yield page
    page.close()


@pytest.fixture
def page(tab, served):
    "The form."
    tab.goto(f'{served[0]}inspect.ipynb', timeout=120_000)
    tab.get_by_role('button', name='look').wait_for(timeout=120_000)
    return tab


@pytest.fixture(scope='module')
def run(data, features, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp('browser')/'run', student='unet,width=4', features=features, size=64, epochs=(3, 3, 0), steps=6, batch_size=4, lr=5e-3, components=8, device='cpu')


def look(page, **places):
    "Fill the form and press the button."
    for label, place in places.items(): page.get_by_label(label.replace('_', ' '), exact=True).fill(str(place))
    page.get_by_role('button', name='look').click()


def figure(page, title): return page.locator('.polyp-difom figure').filter(has=page.locator('figcaption', has_text=title)).first


def pixels(page, title):
    "What a canvas shows, as one long list."
    return figure(page, title).locator('canvas').evaluate('c => Array.from(c.getContext("2d").getImageData(0, 0, c.width, c.height).data)')


def settled(page, test, seconds=20):
    "Wait until a test of the page holds."
    for _ in range(int(10*seconds)):
        if test(): return True
        page.wait_for_timeout(100)
    return False


def test_the_bar_on_the_spectrum_cuts_the_map(page, data, features, tmp_path):
    look(page, data_set=data, feature_store=features)
    figure(page, 'LFC').wait_for(timeout=60_000)
    assert settled(page, lambda: len(pixels(page, 'LFC')) > 4)
    before, whole = pixels(page, 'LFC'), pixels(page, 'teacher map')
    assert before != whole
    bar = page.get_by_role('slider', name='cut-off, fraction of Nyquist')
    bar.focus()
    page.keyboard.press('End')
    assert settled(page, lambda: pixels(page, 'LFC') == whole), 'at the end of the axis the LFC is the map'
    assert figure(page, 'LFC').locator('.note').inner_text() == '100.0% of the energy'
    box = bar.bounding_box()
    page.mouse.move(box['x'] + box['width']*.9, box['y'] + box['height']/2)
    page.mouse.down()
    page.mouse.move(box['x'] + box['width']*.25, box['y'] + box['height']/2, steps=4)
    page.mouse.up()
    assert settled(page, lambda: pixels(page, 'LFC') != whole) and float(bar.get_attribute('aria-valuenow')) < .5
    page.screenshot(path=tmp_path/'frequency.png', full_page=True)
    assert page.faults == []


def test_threshold_and_curtain_act_on_the_picture(page, run, data, tmp_path):
    look(page, run=run)
    figure(page, 'errors').wait_for(timeout=60_000)
    assert settled(page, lambda: len(pixels(page, 'errors')) > 4)
    before, note = pixels(page, 'errors'), figure(page, 'errors').locator('.note').inner_text()
    assert note.startswith('Dice 0.')
    handle = page.locator('.widget-slider, .jupyter-widgets').filter(has_text='threshold').last.locator('[role=slider], .noUi-handle').first
    handle.focus()
    for _ in range(30): page.keyboard.press('ArrowRight')
    assert settled(page, lambda: figure(page, 'errors').locator('.note').inner_text().endswith('0.80')) and pixels(page, 'errors') != before
    curtain = page.get_by_role('slider', name='curtain between two pictures')
    curtain.focus()
    page.keyboard.press('End')
    frame = figure(page, 'drag the curtain').locator('canvas').evaluate('c => Array.from(c.getContext("2d").getImageData(0, 0, c.width - 4, c.height).data)')
    page.keyboard.press('Home')
    assert settled(page, lambda: curtain.get_attribute('aria-valuenow') == '0.000')
    other = figure(page, 'drag the curtain').locator('canvas').evaluate('c => Array.from(c.getContext("2d").getImageData(4, 0, c.width - 4, c.height).data)')
    assert frame != other and len({*frame}) > 50, 'the frame on one side, the prediction on the other'
    probability = figure(page, 'probability').locator('canvas').evaluate('c => Array.from(c.getContext("2d").getImageData(4, 0, c.width - 4, c.height).data)')
    assert other == probability
    assert figure(page, 'R² on held-out images').locator('polyline').count() >= 2
    page.screenshot(path=tmp_path/'predictions.png', full_page=True)
    assert page.faults == []


def test_a_mistake_is_a_sentence(page, data, tmp_path):
    (tmp_path/'empty').mkdir()
    broken = shutil.copytree(data, tmp_path/'broken')
    min((broken/'TrainDataset'/'images').iterdir()).write_bytes(b'no picture')
    for place, told in ((tmp_path/'empty', 'no images in it'), (tmp_path/'nowhere', 'no such folder'), (broken, 'cannot be decoded')):
        look(page, data_set=place)
        alert = page.get_by_role('alert').filter(has_text=told)
        alert.wait_for(timeout=30_000)
        assert 'Traceback' not in page.content()
    assert page.faults == []


def test_a_click_on_a_dot_shows_its_image(tab, served, run, data):
    import nbformat
    text = f'import os\nos.environ["TQDM_DISABLE"] = "1" # bars that are closed before the page is there\nfrom polyp_difom.all import compare\ncompare(dict(one={str(run)!r}, two={str(run)!r}), {str(data)!r})'
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text)]), served[1]/'compare.ipynb')
    tab.goto(f'{served[0]}compare.ipynb', timeout=120_000)
    figure(tab, '00000.png').wait_for(timeout=120_000)
    assert settled(tab, lambda: len(pixels(tab, '00000.png')) > 4)
    before = pixels(tab, '00000.png')
    tab.locator('.polyp-difom circle').nth(2).click(force=True)
    figure(tab, '00002.png').wait_for(timeout=20_000)
    assert settled(tab, lambda: len(pixels(tab, '00002.png')) > 4 and pixels(tab, '00002.png') != before)
    assert tab.faults == []


def drawn(tab, **panel):
    "A panel, drawn by the view alone."
    code = 'data:text/javascript;base64,' + base64.b64encode((ROOT/'polyp_difom'/'show'/'view.js').read_bytes()).decode()
    state = dict(panels=[panel], images={}, notes={}, threshold=.5, curtain=.5, marker=.3, chosen=0, width=200, letters=[])
    tab.evaluate("""async ([code, state]) => {
        const el = document.body.appendChild(document.createElement('div'));
        (await import(code)).default.render({ el, model: { get: name => state[name], on() {}, set() {}, save_changes() {} } });
    }""", [code, state])
    return tab.locator('.polyp-difom').last


def test_a_loss_that_is_nan_is_a_gap(tab):
    plot = drawn(tab, kind='plot', lines=[dict(name='loss', x=[1, 2, 3, 4, 5, 6, 7], y=[1, 1, None, 9, 9, None, 2])])
    assert plot.locator('polyline').count() == 2 and plot.locator('circle').count() == 1
    plot = drawn(tab, kind='plot', lines=[dict(name='huge', x=[1, 2], y=[1e17, 1e17 + 16])]) # their distance is below what numbers tell apart
    assert plot.locator('polyline').count() == 1 and tab.faults == []


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab, with the quickstart and fewer steps in it."
    root, port, home = tmp_path_factory.mktemp('lab'), free_port(), tmp_path_factory.mktemp('home')
    notebook = json.loads((ROOT/'nbs'/'tutorials'/'quickstart.ipynb').read_text())
    notebook['cells'] = [cell for cell in notebook['cells'] if '#| hide' not in ''.join(cell['source'])] # which asks for what only all steps give
    for cell in notebook['cells']: cell.update({name: empty for name, empty in dict(outputs=[], execution_count=None).items() if name in cell})
    text, fewer = json.dumps(notebook), {'epochs=(4, 8, 0), steps=20': 'epochs=(1, 1, 0), steps=2', 'n_train=60': 'n_train=12'}
    for full, small in fewer.items():
        assert full in text
        text = text.replace(full, small)
    (root/'quickstart.ipynb').write_text(text)
    command = [sys.executable, '-m', 'jupyter', 'lab', '--no-browser', f'--port={port}', '--IdentityProvider.token=', '--ServerApp.ip=127.0.0.1', f'--ServerApp.root_dir={root}', '--allow-root']
    with open(root/'log', 'w') as said:
        environment = os.environ | dict(POLYP_DIFOM_STATIC='', HOME=str(home), JUPYTERLAB_SETTINGS_DIR=str(home/'settings'), JUPYTERLAB_WORKSPACES_DIR=str(home/'workspaces'), TQDM_DISABLE='')
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        try:
            for _ in range(240):
                try: urllib.request.urlopen(f'http://127.0.0.1:{port}/api', timeout=1)
                except OSError: time.sleep(.25)
                else: break
                assert process.poll() is None, (root/'log').read_text()
            yield f'http://127.0.0.1:{port}/lab/tree/quickstart.ipynb', len(notebook['cells']), sum(cell['cell_type'] == 'code' for cell in notebook['cells'])
        finally:
            process.terminate()
            process.wait(20)


def test_the_quickstart_runs_in_jupyterlab_cell_by_cell(browser, lab, tmp_path):
    place, every, code = lab
    page = browser.new_page(viewport=dict(width=1500, height=1000))
    page.goto(place, timeout=120_000)
    cells = page.locator('.jp-Notebook .jp-CodeCell')
    cells.first.wait_for(timeout=120_000)
    page.locator('.jp-Notebook-ExecutionIndicator[data-status=idle]').first.wait_for(timeout=60_000)
    page.locator('.jp-Notebook .jp-Cell').first.click()
    for _ in range(every): # every cell, prose too
        page.keyboard.press('Shift+Enter')
        page.wait_for_timeout(150)
    done = page.locator('.jp-InputPrompt').filter(has_text=f'[{code}]:')
    assert settled(page, lambda: done.count() == 1 or page.get_by_text('Traceback').count(), 240)
    page.screenshot(path=tmp_path/'lab.png')
    assert page.get_by_text('Traceback').count() == 0 and page.get_by_text('Error displaying widget').count() == 0
    figures = page.locator('.jp-OutputArea .polyp-difom figure')
    assert settled(page, lambda: figures.count() >= 5), 'the inspectors are alive'
    bar = page.get_by_role('slider', name='curtain between two pictures').last
    bar.focus()
    value = bar.get_attribute('aria-valuenow')
    page.keyboard.press('ArrowRight')
    assert settled(page, lambda: bar.get_attribute('aria-valuenow') != value), 'JupyterLab leaves the keys to the view'
    page.close()
