"Every snippet of the front page runs, from an empty folder, with nothing but what stands on the page: small settings take the place of the paper's."
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from polyp_difom.data.synthetic import make_synthetic

ROOT = Path(__file__).parents[1]
PAGE = (ROOT/'README.md').read_text()
SNIPPETS = re.findall(r'^```(\w*)\n(.*?)^```$', PAGE, re.M | re.S)
SMALL = '--size 64 --epochs 1 1 1 --width 4 --batch-size 4 --device cpu'

# What a test cannot afford: the paper's schedule, the hub's weights, checkpoints of others. The left side stands on the page.
CHEAPER = {"train('DATA', 'runs/one', student='unet', features='features')":
               "train('DATA', 'runs/one', student='unet', features='features', size=64, epochs=(1, 1, 1), width=4, batch_size=4, device='cpu')",
           "create_student('unet')": "create_student('unet,width=4')", '352': '64', '(40, 40, 40)': '(1, 1, 1)', 'batch_size=8)': "batch_size=4, device='cpu')",
           '--teacher dinov2 --teacher sam': '--teacher filterbank,size=64 --teacher filterbank,levels=2,name=two',
           'timm/tf_efficientnet_lite0=weights.safetensors': 'timm/mobilenetv2_050=weights.safetensors', '--labels 0.2': '--labels 0.5',
           'timm/mobilenetv2_100=weights.safetensors,pad_type=same,mean=0.502,std=0.502,size=224': 'timm/mobilenetv2_050=weights.safetensors,pad_type=same,mean=0.502,std=0.502,size=64'}
CHANGED = [text for text in CHEAPER if text not in PAGE]


def cheaper(text):
    for costly, cheap in CHEAPER.items(): text = text.replace(costly, cheap)
    return text


def commands(language='', start='polyp-difom'):
    "Command lines of the page, without their comments."
    lines = [line for kind, text in SNIPPETS if kind == language for line in text.splitlines()]
    return [line.split('  #')[0].strip() for line in lines if line.startswith(start)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "What the page takes for granted: DATA, a folder of each other layout, a frame, two checkpoints."
    import timm
    import torch
    from polyp_difom.students.registry import create_student
    from safetensors.torch import save_file
    folder = tmp_path_factory.mktemp('readme')
    data = make_synthetic(folder/'DATA', n_train=12, n_test=3, size=(96, 120))
    (folder/'FOLDER').mkdir(); (folder/'MIXED').mkdir(); (folder/'COCO').mkdir()
    shutil.copytree(data/'TestDataset/Synthetic', data/'TestDataset/Kvasir')
    shutil.copytree(data/'TestDataset/Kvasir/masks', folder/'maps/sanet/Kvasir') # a method's saved maps
    annotations, images = [], []
    for i, path in enumerate(sorted((data/'TrainDataset/images').iterdir())):
        image, mask = Image.open(path), Image.open(data/'TrainDataset/masks'/path.name)
        for name, picture, target in (('frames', image, f'{path.stem}.jpg'), ('labels', mask, f'{path.stem}.png')):
            (folder/'FOLDER'/name).mkdir(exist_ok=True); picture.save(folder/'FOLDER'/name/target)
        image.save(folder/'MIXED'/f'{path.stem}.jpg'); mask.save(folder/'MIXED'/f'{path.stem}_mask.png')
        image.save(folder/'COCO'/f'{path.stem}.jpg')
        left, top, right, bottom = mask.getbbox()
        images.append(dict(id=i, file_name=f'{path.stem}.jpg', width=image.width, height=image.height))
        annotations.append(dict(id=i, image_id=i, category_id=1, iscrowd=0, bbox=[left, top, right - left, bottom - top], area=(right - left)*(bottom - top),
                                segmentation=[[left, top, right, top, right, bottom, left, bottom]]))
    import json
    (folder/'COCO'/'annotations.json').write_text(json.dumps(dict(images=images, annotations=annotations, categories=[dict(id=1, name='polyp')])))
    Image.open(data/'TestDataset/Synthetic/images/00000.png').convert('RGB').save(folder/'frame.jpg')
    torch.manual_seed(0)
    save_file(timm.create_model('mobilenetv2_050', pretrained=False).state_dict(), folder/'weights.safetensors')
    return folder


def test_what_is_made_cheaper_stands_on_the_page(): assert CHANGED == []


def test_the_page_has_the_six_ways_in():
    text = ' '.join(commands()) + ''.join(text for kind, text in SNIPPETS if kind == 'python')
    for way in ('polyp-difom train', 'train(', 'difom_learner(', 'load_predictor(', 'export', '--mask-suffix'): assert way in text


def test_every_command_runs_in_the_order_of_the_page(folder, polyp_difom, monkeypatch):
    monkeypatch.chdir(folder)
    ran = []
    for line in commands():
        words = shlex.split(cheaper(line))[1:]
        if words[0] == 'import': continue # tests/test_parity.py imports checkpoints of these networks
        if words[0] == 'train' and '--resume' not in words: words += SMALL.split()
        if words[0] == 'adapt': words += '--size 64 --epochs 1 --steps 2 --batch-size 4 --device cpu'.split()
        result = polyp_difom(*words)
        assert result.returncode == 0, (line, result.err)
        ran.append(words[0])
    assert set(ran) >= {'check', 'extract', 'train', 'evaluate', 'predict', 'export', 'convert', 'adapt'}
    assert list((folder/'overlays').rglob('*.png')) and (folder/'polyps.onnx').stat().st_size > 1e4


def test_every_python_snippet_runs_in_a_fresh_process(folder):
    snippets = [text for kind, text in SNIPPETS if kind == 'python']
    assert len(snippets) >= 4
    for text in snippets:
        result = subprocess.run([sys.executable, '-c', cheaper(text)], cwd=folder, capture_output=True, text=True)
        assert result.returncode == 0, (text, result.stderr)


def test_links_into_the_project_lead_somewhere():
    links = re.findall(r'\]\(((?!https?:|#)[^)]+)\)', PAGE)
    assert len(links) > 10
    assert [link for link in links if not (ROOT/link).exists()] == []
