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
from polyp_difom.students.registry import create_student, student_table
from polyp_difom.published import PublishedUNetPlusPlus, load_published, published_key, published_networks

REFERENCE = Path(os.environ.get('POLYP_DIFOM_REFERENCE') or Path(__file__).parents[2]/'shared'/'reference')/'parity'
NAME = re.compile(r'(?P<network>\w+?)(?P<calibrated>_cal)?_w(?P<seed>\d+)_s(?P<size>\d+)_x(?P<input>\d+)') # of a file of reference outputs
FILES = [name for name in sorted(path.stem for path in REFERENCE.glob('*.npz')) if NAME.fullmatch(name)['network'] in published_networks]


def draw(key, shape, seed, calibrated=False):
    "Weights drawn from their key, as for the reference outputs; `calibrated`: see `networks/m2snet.md` there."
    random = np.random.default_rng(zlib.crc32(key.encode()) + seed)
    if calibrated and (box := re.fullmatch(r'conv_(\d)\.norm\.running_(mean|var)', key)):
        area = int(box[1])**2
        return random.uniform(.5, 1.5, shape)*(32*area if box[2] == 'mean' else (16*area)**2)
    if key.endswith('running_var'): return random.uniform(.5, 1.5, shape)
    if key.endswith('running_mean'): return random.standard_normal(shape)*.1
    if len(shape) >= 2: return random.standard_normal(shape)*np.sqrt(1/prod(shape[1:]))
    if key.endswith('weight'): return random.uniform(.5, 1.5, shape)
    return random.standard_normal(shape)*.1


def fill(network, seed=0, calibrated=False):
    "A checkpoint in the authors' keys."
    shapes = json.loads((REFERENCE/f'{network}.keys.json').read_text())
    return {key: torch.zeros(shape, dtype=torch.long) if key.endswith('num_batches_tracked') else torch.from_numpy(draw(key, shape, seed, calibrated).astype(np.float32)) for key, shape in shapes.items()}


@pytest.fixture(params=published_networks, scope='module')
def published(request):
    "Name and weights of a published network; not to be changed."
    if not REFERENCE.is_dir(): pytest.skip(f'{REFERENCE}: no reference outputs; set POLYP_DIFOM_REFERENCE')
    return request.param, fill(request.param)


def test_every_published_network_has_reference_outputs():
    if not REFERENCE.is_dir(): pytest.skip(f'{REFERENCE}: no reference outputs; set POLYP_DIFOM_REFERENCE')
    assert {NAME.fullmatch(name)['network'] for name in FILES} == set(published_networks)


@pytest.mark.parametrize('file', FILES)
@torch.no_grad()
def test_outputs_are_those_of_the_published_network(file):
    name, reference = NAME.fullmatch(file), np.load(REFERENCE/f'{file}.npz')
    size = int(name['size'])
    x = torch.from_numpy(np.random.default_rng(int(name['input'])).standard_normal((1, 3, size, size)).astype(np.float32))
    outputs = load_published(name['network'], fill(name['network'], int(name['seed']), name['calibrated'])).published_outputs(x)
    assert len(outputs) == len(reference.files)
    for i, ours in enumerate(outputs):
        theirs = torch.from_numpy(reference[f'out{i}'])
        ours = (ours[..., ::4, ::4] if ours.ndim == 4 else ours).reshape(theirs.shape)
        assert (ours - theirs).norm() < 1e-5*theirs.norm()
        if ours.ndim == 4: assert (ours - theirs).norm() < 1e-4*(theirs - theirs.mean()).norm(), 'a large mean hides a map'


@pytest.mark.parametrize('name', ['msnet', 'm2snet'])
@torch.no_grad()
def test_a_size_that_32_does_not_divide_is_not_padded_where_the_authors_do_not_pad_it(name):
    net, x, seen = create_student(name, pretrained=False).eval(), torch.randn(1, 3, 90, 70), []
    with net.head.register_forward_hook(lambda module, given, result: seen.append(result)): ours, = net.published_outputs(x)
    assert seen[0].shape[2:] == (23, 18) and torch.equal(ours, torch.nn.functional.interpolate(seen[0], (90, 70), mode='bilinear'))
    assert net(x).shape == ours.shape and not torch.allclose(net(x), ours)


def test_a_file_with_wrong_keys_is_refused_with_their_names(published):
    name, weights = published[0], dict(published[1])
    first = next(k for k in weights if k.endswith('weight') and not re.search(published_networks[name].unused, k))
    weights['strange.weight'] = weights.pop(first)
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


def test_the_table_of_students_names_what_can_be_loaded():
    names = {published: row['name'] for row in student_table() for published in row['published']}
    assert set(names) == set(published_networks)
    made = {published: network.create.args[0] for published, network in published_networks.items() if network.create is not PublishedUNetPlusPlus}
    assert names == made | dict(polypdifom_unetpp='unetpp')
