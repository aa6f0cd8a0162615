"Our students compute the published networks' functions, with the published key names."
import json
import os
import re
import zlib
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from polyp_difom.core import InputError
from polyp_difom.model.model import PolypDiFoM, load_model, predict
from polyp_difom.published import published_outputs, PublishedUNetPlusPlus, load_published, published_key, published_networks
from polyp_difom.students.registry import create_student

REFERENCE = Path(os.environ.get('POLYP_DIFOM_REFERENCE') or Path(__file__).parents[2]/'shared'/'reference')/'parity'
FILES = ['pranet_w0_s352_x100', 'emcadnet_pvt_v2_b2_w0_s352_x100', 'polypdifom_unetpp_w0_s352_x100', 'meganet_w0_s352_x100', 'meganet_r34_w0_s352_x100',
         'cfanet_w0_s352_x100', 'cfanet_w4_s352_x104']
NETWORKS = list(dict.fromkeys(re.match(r'(.+)_w\d', file)[1] for file in FILES))


def fill(shapes, seed=0):
    "Weights drawn from their key names, as for the reference outputs."
    weights = {}
    for key, shape in shapes.items():
        random = np.random.default_rng(zlib.crc32(key.encode()) + seed)
        if key.endswith('num_batches_tracked'): weights[key] = torch.zeros(shape, dtype=torch.long); continue
        if key.endswith('running_var'): values = random.uniform(.5, 1.5, shape)
        elif key.endswith('running_mean'): values = random.standard_normal(shape)*.1
        elif len(shape) >= 2: values = random.standard_normal(shape)*np.sqrt(1/prod(shape[1:]))
        elif key.endswith('weight'): values = random.uniform(.5, 1.5, shape)
        else: values = random.standard_normal(shape)*.1
        weights[key] = torch.from_numpy(values.astype(np.float32))
    return weights


def published_weights(name, seed=0):
    "A published network's keys, filled."
    if not REFERENCE.is_dir(): pytest.skip(f'{REFERENCE}: no reference outputs; set POLYP_DIFOM_REFERENCE')
    return fill(json.loads((REFERENCE/f'{name}.keys.json').read_text()), seed)


@pytest.fixture(scope='module', params=NETWORKS)
def published(request): return request.param, published_weights(request.param) # not to be changed


@torch.no_grad()
@pytest.mark.parametrize('file', FILES)
def test_outputs_are_those_of_the_published_network(file, tmp_path):
    name, *numbers = re.fullmatch(r'(.+)_w(\d+)_s(\d+)_x(\d+)', file).groups()
    seed, size, image = map(int, numbers)
    torch.save(published_weights(name, seed), tmp_path/'weights.pth')
    reference = np.load(REFERENCE/f'{file}.npz')
    x = torch.from_numpy(np.random.default_rng(image).standard_normal((1, 3, size, size)).astype(np.float32))
    outputs = published_outputs(load_published(name, tmp_path/'weights.pth'), x)
    assert len(outputs) == len(reference.files)
    for i, ours in enumerate(outputs):
        theirs = torch.from_numpy(reference[f'out{i}'])
        ours = (ours[..., ::4, ::4] if ours.ndim == 4 else ours).reshape(theirs.shape)
        assert (ours - theirs).norm()/theirs.norm() < 1e-5


def test_a_file_with_wrong_keys_is_refused_with_their_names(published):
    name, weights = published
    first = next(iter(k for k in weights if k.endswith('weight') and not re.match(r'conv\.|resnet\.fc', k)))
    weights = {'strange.weight' if k == first else k: v for k, v in weights.items()}
    with pytest.raises(InputError) as error: load_published(name, weights)
    assert f'lacks {first}' in str(error.value) and 'unknown strange.weight' in str(error.value) and '\n' not in str(error.value)


def test_leftovers_are_dropped_and_wrappers_opened(published, tmp_path):
    name, weights = published
    torch.save({'state_dict': {f'module.{k}': v for k, v in weights.items()} | {'module.total_ops': torch.zeros(1), 'module.x.total_params': torch.zeros(1)}},
               tmp_path/'wrapped.pth')
    one, other = load_published(name, weights), load_published(name, tmp_path/'wrapped.pth')
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Code:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'ran'),)
    torch.save({'weight': Code()}, tmp_path/'evil.pth')
    with pytest.raises(InputError, match='not a readable checkpoint'): load_published('pranet', tmp_path/'evil.pth')
    assert not (tmp_path/'ran').exists()


def test_unknown_network_and_missing_file(tmp_path):
    with pytest.raises(InputError, match='nearest: pranet'): load_published('prannet', tmp_path/'x.pth')
    with pytest.raises(InputError, match='no such file'): load_published('pranet', tmp_path/'x.pth')


@torch.no_grad()
def test_a_published_checkpoint_becomes_a_run(published, polyp_difom, tmp_path, data):
    "Imported, scored and applied by the commands; what is saved predicts what the published network does."
    name, weights = published
    torch.save(weights, tmp_path/'weights.pth')
    result = polyp_difom('import', name, tmp_path/'weights.pth', '--out', tmp_path/'run', '--size', '64')
    assert result.returncode == 0, result.err
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    expected = PolypDiFoM(load_published(name, weights)).eval()
    np.testing.assert_allclose(predict(load_model(tmp_path/'run'), picture, 64), predict(expected, picture, 64), atol=1e-5)
    settings = json.loads((tmp_path/'run'/'config.json').read_text())['settings']
    assert create_student(settings['student'], **settings['options'], pretrained=False).state_dict().keys() == load_model(tmp_path/'run').student.state_dict().keys()
    result = polyp_difom('evaluate', tmp_path/'run', data, '--json', tmp_path/'scores.json')
    assert result.returncode == 0 and json.loads((tmp_path/'scores.json').read_text())['sets']['Synthetic']['images'] == 3


def test_an_import_overwrites_nothing(fails, tmp_path):
    (tmp_path/'run').mkdir(); (tmp_path/'run'/'mine.txt').write_text('x')
    weights = {published_key(k, published_networks['polypdifom_unetpp'][1]): v for k, v in PublishedUNetPlusPlus().state_dict().items()}
    torch.save(weights, tmp_path/'weights.pth')
    assert 'exists already' in fails('import', 'polypdifom_unetpp', tmp_path/'weights.pth', '--out', tmp_path/'run')
