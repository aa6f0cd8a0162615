"""Write llms.txt: what this site holds, a line a page, for programs that read. `make export` calls it.

    python nbs/llms.py
"""
import json
from pathlib import Path

import yaml

NBS = Path(__file__).parent


def entries(contents):
    "Pages of a sidebar with the section that each is in."
    section = 'Start'
    for one in contents:
        if isinstance(one, str): yield section, one
        else: yield from ((one['section'], page) for page in one['contents'])


def describe(page):
    "Title of a notebook, and the line below it."
    lines = [line for cell in json.loads((NBS/page).read_text())['cells'] if cell['cell_type'] == 'markdown' for line in ''.join(cell['source']).splitlines()]
    return next(line[2:] for line in lines if line.startswith('# ')), next((line[2:] for line in lines if line.startswith('> ')), '')


def text():
    "The file's content."
    site = yaml.safe_load((NBS.parent/'_quarto.yml').read_text())['website']
    told, last = [f'# {site["title"]}', '', f'> {site["description"]}'], None
    for section, page in entries(site['sidebar']['contents']):
        if section != last: told += ['', f'## {section}', '']
        title, line = describe(page)
        told.append(f'- [{title}]({page.removesuffix(".ipynb")}.html): {line}')
        last = section
    return '\n'.join(told) + '\n'


if __name__ == '__main__': (NBS/'llms.txt').write_text(text())
