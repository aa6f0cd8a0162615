"The site without Quarto: entries, links, names in back-ticks, pages as HTML and their figures in a browser."
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from polyp_difom.students.registry import list_students
from polyp_difom.teachers.registry import list_teachers

ROOT = Path(__file__).parents[1]
NBS = ROOT/'nbs'
SITE = yaml.safe_load((ROOT/'_quarto.yml').read_text())['website']
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
spec = importlib.util.spec_from_file_location('llms', NBS/'llms.py')
llms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(llms)
PAGES = [page for _, page in llms.entries(SITE['sidebar']['contents'])]
NOTEBOOKS = sorted(path.relative_to(NBS).as_posix() for path in NBS.rglob('*.ipynb') if not {'.ipynb_checkpoints', '_proc'} & {*path.parts})


def cells(page, kind): return [''.join(cell['source']) for cell in json.loads((NBS/page).read_text())['cells'] if cell['cell_type'] == kind]


def outputs(page):
    for cell in json.loads((NBS/page).read_text())['cells']: yield from cell.get('outputs', [])


def test_the_sidebar_names_every_notebook_once():
    assert sorted(PAGES) == [page for page in NOTEBOOKS if not page.startswith('apps/')]
    assert all((NBS/one['href']).is_file() for one in SITE['navbar']['left'])


def test_llms_txt_is_of_today(): assert (NBS/'llms.txt').read_text() == llms.text(), 'run make export'


def anchors(page):
    "The headings of a page as links name them."
    heads = [line.lstrip('#').strip() for text in cells(page, 'markdown') for line in text.splitlines() if re.match('#+ ', line)]
    return {re.sub(r'[^\w\- ]', '', head.lower()).replace(' ', '-') for head in heads} | {head.replace(' ', '-') for head in heads}


@pytest.mark.parametrize('page', NOTEBOOKS)
def test_links_lead_somewhere(page):
    for text in cells(page, 'markdown'):
        for target in re.findall(r'\]\(([^)\s]+)\)', re.sub(r'```.*?```|`[^`]*`', '', text, flags=re.S)):
            if re.match(r'\w+:', target) or target.startswith('attachment:'): continue
            file, _, anchor = target.partition('#')
            place = (NBS/page).parent/file if file else NBS/page
            if place.suffix == '.html': place = place.with_suffix('.ipynb')
            assert place.exists(), f'{page}: {target}'
            if anchor and place.suffix == '.ipynb': assert anchor in anchors(place.resolve().relative_to(NBS).as_posix()), f'{page}: {target}'


def words():
    "Every name in our code, and what people type."
    code = [path.read_text() for folder in ('polyp_difom', 'tests', 'benchmarks') for path in (ROOT/folder).rglob('*.py')]
    code += [path.read_text() for path in [*(ROOT/'polyp_difom').rglob('*.toml'), *(ROOT/'polyp_difom').rglob('*.js'), ROOT/'pyproject.toml', ROOT/'settings.ini', ROOT/'Makefile']]
    code += [text for page in NOTEBOOKS for text in cells(page, 'code')]
    return {*re.findall(r'\w+', '\n'.join(code)), *list_students(), *list_teachers()}


FOREIGN = {'SaveModelCallback'} # of libraries, named and not used


def test_names_in_back_ticks_are_names():
    known, unknown = words(), []
    for page in NOTEBOOKS:
        for text in cells(page, 'markdown'):
            for name in re.findall(r'(?<!`)`([A-Za-z_][\w.]*)(?:\(\))?`(?!`)', re.sub(r'```.*?```', '', text, flags=re.S)):
                if ('_' in name or re.search('[a-z][A-Z]', name)) and not re.fullmatch(r'[A-Z]_\w+', name) and name not in FOREIGN: # B_k is a quantity of an equation
                    if not {*name.split('.')} <= known: unknown.append(f'{page}: {name}')
    assert unknown == []


@pytest.mark.parametrize('page', [page for page in NOTEBOOKS if page.startswith('tutorials/')])
def test_a_tutorial_can_be_opened_elsewhere_and_says_what_to_try_next(page):
    settings = dict(line.split(' = ', 1) for line in (ROOT/'settings.ini').read_text().splitlines() if ' = ' in line)
    head, last = cells(page, 'markdown')[:2], cells(page, 'markdown')[-1]
    place = f'{settings["user"]}/{settings["repo"]}'
    assert f'https://colab.research.google.com/github/{place}/blob/{settings["branch"]}/nbs/{page}' in '\n'.join(head)
    assert f'https://mybinder.org/v2/gh/{place}/{settings["branch"]}?labpath=nbs/{page}' in '\n'.join(head)
    assert '## What to try next' in last and len(json.loads((NBS/page).read_text())['cells']) <= 41


@pytest.mark.parametrize('page', NOTEBOOKS)
def test_stored_outputs_are_pictures_and_plain_words(page):
    assert 'widgets' not in json.loads((NBS/page).read_text())['metadata'], f'{page}: execute it with store_widget_state=False'
    for output in outputs(page):
        assert output.get('name') != 'stderr' and output['output_type'] != 'error', page
        data = output.get('data', {})
        assert not any('widget' in kind for kind in data), f'{page}: stored with POLYP_DIFOM_STATIC=1 there would be its figure'
        assert all(len(''.join(picture))*3/4 < 200_000 for kind, picture in data.items() if kind.startswith('image/'))
        text = ''.join(output.get('text', '')) + ''.join(data.get('text/plain', ''))
        assert not re.search(r'(/tmp/|/home/|/root/|\x1b\[)', text), f'{page}: {text[:200]}'


def pictures(page): return sum('image/png' in output.get('data', {}) for output in outputs(page))


@pytest.fixture(scope='module')
def rendered(tmp_path_factory):
    "Every page as HTML, as anybody reads it."
    from nbconvert import HTMLExporter
    folder, exporter = tmp_path_factory.mktemp('site'), HTMLExporter(embed_images=True)
    for page in NOTEBOOKS:
        body, _ = exporter.from_filename(str(NBS/page))
        place = folder/page.replace('/', '-').replace('.ipynb', '.html')
        place.write_text(re.sub(r'<script[^>]*src="https?://[^>]*></script>', '', body)) # MathJax, which is elsewhere
    return folder


@pytest.mark.skipif(not CHROMIUM, reason='Chromium is not installed (apt-get install chromium)')
def test_pages_show_their_figures(rendered):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu'])
        page = browser.new_page(viewport=dict(width=1200, height=900))
        for name in NOTEBOOKS:
            page.goto((rendered/name.replace('/', '-').replace('.ipynb', '.html')).as_uri(), wait_until='load')
            shown = page.eval_on_selector_all('.jp-OutputArea img', 'images => images.map(image => image.complete && image.naturalWidth > 20)')
            assert len(shown) >= pictures(name) and all(shown), f'{name}: {len(shown)} of {pictures(name)} figures'
        browser.close()


