"""Reading is free: what teachers cost once, and what their targets cost in training, beside the data path of the authors' notebook.

    python benchmarks/features.py DATA WEIGHTS [--only PART ...]

DATA is a data set in the PraNet layout, WEIGHTS the folder of the two MobileNetV2 files. Parts, in this order:

    real            a store of all images for three teachers: images/s, share of the time outside the teacher, bytes on disk
    memory          peak memory of `polyp-difom extract` on 200 and on 2000 images
    architectures   extraction with the full-size foundation models, their weights drawn: rates and sizes do not depend on weights
    targets         making targets of the training images, and reading them in random order on one core
    authors         the data path of the authors' notebook, written anew from its description, beside ours, on one core
    step            a training step without distillation and in phase II, data loading included in both

Writes benchmarks/results/features.json after every part; --only measures some parts anew and keeps the others. Run it alone.
"""
import argparse
import gc
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers
from common import RESULTS, processor, versions
from fastai.callback.core import Callback
from polyp_difom.core import atomic_path
from polyp_difom.data.images import list_images, list_pairs, train_folder
from polyp_difom.data.loaders import PolypDataset, polyp_dataloaders
from polyp_difom.features.extract import extract_teacher
from polyp_difom.features.store import FeatureStore
from polyp_difom.model.model import PolypDiFoM, amp_dtype
from polyp_difom.published import PublishedUNetPlusPlus
from polyp_difom.students.registry import create_student
from polyp_difom.targets.latent import build_targets
from polyp_difom.targets.projection import resize
from polyp_difom.teachers.registry import create_teacher
from polyp_difom.training.callbacks import Distillation, EncoderFreeze, EpochLog, EpochSeed, PhaseSchedule
from polyp_difom.training.learner import difom_learner
from students import cpu_seconds_of_others
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

GRID, CHANNELS = (22, 22), 256 # latents of U-Net at 352 pixels
BATCH = 6 # the authors'
MOBILENET = 'pad_type=same,mean=0.502,std=0.502,size=352'


def images_of(given):
    "Every image of the data set, training images first."
    return (list_images(given.data) + list_images(given.data/'TestDataset'))[:given.limit]


def spread_out(items, count):
    "So many of them, evenly spaced."
    return [items[i*len(items)//count] for i in range(count)]


def bytes_below(folder): return sum(path.stat().st_size for path in Path(folder).rglob('*') if path.is_file())


def sizes(store, teacher):
    "Of a teacher's maps: shape, and bytes an image in half precision, raw and on disk."
    array = store.array(teacher)
    total = bytes_below(store.path/array.path)
    return dict(map=list(array.shape[1:]), stored=len(store), bytes_on_disk=total, bytes_an_image=round(total/len(store)), raw_bytes_an_image=2*array[0].size)


def on_one_core(function, *arguments):
    "Call in a fresh process that has one core, for all its threads."
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool: return pool.submit(function, *arguments).result()
    finally: os.sched_setaffinity(0, cores)


# real

def real_teachers(weights):
    "What `polyp-difom extract --teacher` takes."
    return [f'timm/mobilenetv2_100={weights}/mobilenetv2_100.imagenet.safetensors,{MOBILENET},name=mobilenet-imagenet',
            f'timm/mobilenetv2_100={weights}/mobilenetv2_100.deeplabv3_voc.safetensors,{MOBILENET},output_stride=16,name=mobilenet-voc', 'filterbank']


def real(given, earlier):
    store, images, rows = FeatureStore(given.features, create=True), images_of(given), dict(earlier.get('teachers', {}))
    for spec in real_teachers(given.weights):
        teacher = create_teacher(spec).to(given.device)
        report = extract_teacher(store, teacher, images)
        measured = report if report['images'] else rows.get(teacher.name, {}) # what is there was measured before
        rows[teacher.name] = measured | dict(size=teacher.size) | sizes(store, teacher.name)
    return dict(images=len(images), distinct_images=len(store), batch=16, teachers=rows)


# memory

PEAK = '''
import atexit
peak = lambda: print('peak', *(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
atexit.register(peak)
from polyp_difom.cli import main
main()
'''


def extraction_peak(images):
    "Peak resident megabytes of `polyp-difom extract` on these images, in a process of its own." # ru_maxrss would count this process, too
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder)/'images').mkdir()
        for i, path in enumerate(images): (Path(folder)/f'images/{i:05d}{path.suffix}').symlink_to(path.resolve())
        command = [sys.executable, '-c', PEAK, 'extract', folder, '--teacher', 'filterbank', '--out', f'{folder}/store']
        done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
        rows = FeatureStore(f'{folder}/store').rows
        index = sys.getsizeof(rows) + sum(sys.getsizeof(h) + sys.getsizeof(i) for h, i in rows.items())
    return dict(images=len(images), peak_MB=round(int(done.stdout.split()[-1])/1024, 1), index_kB=round(index/1024, 1))


def memory(given, earlier):
    most = images_of(given)[:2000]
    runs = [extraction_peak(spread_out(most, count)) for count in (len(most)//10, len(most))*2]
    peaks = {run['images']: min(r['peak_MB'] for r in runs if r['images'] == run['images']) for run in runs}
    return dict(teacher='filterbank', batch=16, runs=runs, difference_MB=round(peaks[len(most)] - peaks[len(most)//10], 1),
                note='difference of the smaller peaks of two runs; the index in memory is a dictionary from 16-byte hash to row, on disk 16 bytes an image')


# architectures

def architectures_of(t):
    "Teacher and configuration, as those of the default checkpoints."
    swin = t.SwinConfig(image_size=384, embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=12,
                        out_features=['stage1', 'stage2', 'stage3', 'stage4'])
    return dict(sam=t.SamConfig(), dinov2=t.Dinov2Config(image_size=518, patch_size=14),
                oneformer=t.OneFormerConfig(backbone_config=swin, num_queries=150), mask2former=t.Mask2FormerConfig(backbone_config=swin, num_queries=200),
                clip=t.CLIPConfig(vision_config=dict(patch_size=16)), owlvit=t.OwlViTConfig(vision_config=dict(patch_size=16)),
                ijepa=t.IJepaConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120, patch_size=14))


def architecture(name, config, images, device):
    "Draw weights, save them, load them as a user's, extract."
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(f'{folder}/{name}')
        teacher = create_teacher(f'{name}={folder}/{name}').to(device)
        with FlopCounterMode(display=False) as counter: teacher(torch.zeros(1, 3, teacher.size, teacher.size, device=device))
        store = FeatureStore(f'{folder}/store', create=True)
        report = extract_teacher(store, teacher, images, batch_size=1)
        parameters = sum(p.numel() for p in teacher.parameters())/1e6
        return report | sizes(store, name) | dict(seconds_an_image=round(report['seconds']/len(images), 3), size=teacher.size, Mparams=round(parameters, 1), GMACs=round(counter.get_total_flops()/2e9, 1))


def architectures(given, earlier):
    images, rows = spread_out(images_of(given), given.images), {}
    for name, config in architectures_of(transformers).items():
        if given.teachers and name not in given.teachers: continue
        rows[name] = architecture(name, config, images, given.device)
        gc.collect()
    return dict(weights='drawn, not trained; rates and raw sizes do not depend on them; bytes on disk do: drawn weights of SAM give almost constant maps', batch=1, transformers=transformers.__version__,
                GMACs='of an image, by torch.utils.flop_counter: matrix products, convolutions and attention; deformable sampling is not counted',
                teachers=earlier.get('teachers', {}) | rows)


# targets

def seconds_a_sample(read, count, batch=1, work=lambda batch: None, passes=1):
    "Median over passes, each in random order: read, collate, and what `work` does with a batch."
    found = []
    for number in range(passes):
        order = random.Random(number).sample(range(count), count)
        start = time.perf_counter()
        for first in range(0, count, batch): work(default_collate([torch.as_tensor(read(i)) for i in order[first:first + batch]]))
        found.append((time.perf_counter() - start)/count)
    return statistics.median(found)


def train_images(given): return [pair.image for pair in list_pairs(train_folder(given.data))][:given.limit]


def read_targets(features, images, batch):
    "Targets/s of one, collated in batches and turned to floats."
    torch.set_num_threads(1)
    targets = build_targets(FeatureStore(features), images, GRID, CHANNELS)
    return 1/seconds_a_sample(targets.__getitem__, len(targets), batch, lambda x: x.float(), passes=4)


def targets(given, earlier):
    store, images = FeatureStore(given.features), train_images(given)
    before, start = set(store.path.glob('targets/*')), time.perf_counter()
    made = build_targets(store, images, GRID, CHANNELS)
    seconds = time.perf_counter() - start
    build = earlier.get('build') if made.path in before else dict(seconds=round(seconds, 1), images_per_s=round(len(images)/seconds, 1))
    rate = on_one_core(read_targets, given.features, images, 1)
    return dict(images=len(images), teachers=store.teachers, target=[list(part.shape) for part in made[0]], build=build, explained_variance=made.settings['explained'],
                read_images_per_s=round(rate, 1), goal=300, MB_an_image=round(bytes_below(made.path/'targets')/len(images)/1e6, 4), raw_MB_an_image=sum(part.nbytes for part in made[0])/1e6,
                note='random order, one core for all threads, files in the page cache, turned to float32; median of four passes')


# authors

MAPS = dict(sam=(9, 256, 256), dinov2=(768, 16, 16), oneformer=(256, 100, 134)) # of a 4:3 frame
STOCK = dict(sam='three soft masks thrice, low-resolution masks of a 1024-pixel side', dinov2='224-pixel crop, patches of 14',
             oneformer='short side 800, so 1066x800 pixels, stride 8, padded to whole windows')


class PublishedDataset:
    "`dataset[i]` -> (1033, 64, 64): three files of one image, each resized."
    def __init__(self, folder): self.folder = folder
    def __getitem__(self, i): return torch.cat([resize(torch.load(f'{self.folder}/{name}/{i}.pt'), (64, 64)) for name in MAPS])

    def write(self, count):
        for name, shape in MAPS.items():
            os.makedirs(f'{self.folder}/{name}')
            for i in range(count): torch.save(torch.rand(shape), f'{self.folder}/{name}/{i}.pt')


def read_published(folder, count):
    "Samples/s of reading, with fusion and transform, and with the fusion's gradient."
    torch.set_num_threads(1)
    dataset, model = PublishedDataset(folder), PublishedUNetPlusPlus()
    deepest = torch.zeros(BATCH, model.channels[-1], *GRID)
    def transform(maps):
        return sum(model.distillation_losses(deepest[:len(maps)], list(maps.split([shape[0] for shape in MAPS.values()], 1))))
    forward = torch.no_grad()(transform)
    works = {'read': lambda maps: None, 'read, fused, transformed': forward, 'read, fused, transformed, with gradient': lambda maps: transform(maps).backward()}
    seconds_a_sample(dataset.__getitem__, count, BATCH) # into the page cache
    return {name: 1/seconds_a_sample(dataset.__getitem__, count, BATCH, work, passes=3) for name, work in works.items()}


def authors(given, earlier):
    count = min(48, given.limit or 48)
    folder = Path(tempfile.mkdtemp(dir=given.out)).resolve()
    try:
        PublishedDataset(folder).write(count)
        theirs, size = on_one_core(read_published, folder, count), bytes_below(folder)
    finally: shutil.rmtree(folder)
    ours = on_one_core(read_targets, given.features, train_images(given), BATCH)
    return dict(what='samples/s on one core, batch 6, from the page cache; ours: read, collated, turned to float32', maps=MAPS, sizes_after=STOCK, images=count,
                MB_an_image=round(size/count/1e6, 2), ours=round(ours, 1), theirs={name: round(rate, 2) for name, rate in theirs.items()},
                ratio={name: round(ours/rate, 1) for name, rate in theirs.items()}, goal=20)


# step

class StepTimer(Callback):
    "Seconds of each training batch, its loading included."
    order = 100
    def __init__(self): self.seconds = []
    def before_train(self): self.start = time.perf_counter()
    def after_batch(self):
        if not self.training: return
        now = time.perf_counter()
        self.seconds.append(now - self.start)
        self.start = now


class Timed:
    "Calls a function, or indexes with it, and keeps the seconds of each call."
    def __init__(self, function, when=lambda: True): self.function, self.when, self.seconds = function, when, []
    def __call__(self, *arguments):
        start = time.perf_counter()
        result = self.function(*arguments)
        if self.when(): self.seconds.append(time.perf_counter() - start)
        return result
    __getitem__ = __call__


def learner(student, distilled, given):
    "As `train` makes it, in phase II, at one scale so that every step is the same."
    pairs = list_pairs(train_folder(given.data))
    torch.manual_seed(0)
    model = PolypDiFoM(create_student(student), 'paper' if distilled else None)
    train_part, valid_part = pairs[:2*given.batch], pairs[2*given.batch:][:1]
    targets = build_targets(FeatureStore(given.features), [pair.image for pair in train_part], model.target_grids(given.size), model.latents.channels) if distilled else None
    dls = polyp_dataloaders(PolypDataset(train_part, given.size, targets), PolypDataset(valid_part, given.size), given.batch, (1.,), torch.device(given.device))
    model.precision = amp_dtype(torch.device(given.device))
    cbs = [EpochSeed(0), PhaseSchedule((0, 1, 0)), EncoderFreeze(given.size)]
    return difom_learner(dls, model, distill=Distillation() if distilled else None, cbs=cbs)


def step_of(student, steps, given):
    "Both arms in turn, two batches at a time; the first turn warms up."
    learners = {name: learner(student, name == 'distilled', given) for name in ('undistilled', 'distilled')}
    timers, learn = {name: StepTimer() for name in learners}, learners['distilled']
    dataset = learn.dls.train.dataset
    dataset.targets = reading = Timed(dataset.targets.__getitem__)
    callbacks = dict(latent_losses=learn.distillation, target_watch=learn.target_watch)
    for callback in callbacks.values(): callback.after_loss = Timed(callback.after_loss, lambda: learn.training)
    for turn in range(1 + -(-steps//2)):
        for name, one in learners.items():
            with one.no_bar(), one.no_logging(): one.fit(1, 1e-4, reset_opt=turn == 0, cbs=[EpochLog(), timers[name]])
    seconds = {name: timer.seconds[2:] for name, timer in timers.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ms = dict(reading=given.batch*statistics.median(reading.seconds)) | {name: statistics.median(c.after_loss.seconds) for name, c in callbacks.items()}
    return dict(precision=learn.model.precision, seconds={name: round(value, 4) for name, value in medians.items()},
                percent_more=round(100*(medians['distilled']/medians['undistilled'] - 1), 2), goal=5,
                ms_a_batch={name: round(1000*value, 2) for name, value in ms.items()},
                all_seconds={name: [round(value, 4) for value in values] for name, values in seconds.items()})


def step(given, earlier):
    rows = {student: step_of(student, steps, given) for student, steps in (('unet', given.steps), ('emcadnet,backbone=pvt_v2_b0,pretrained=False', 4*given.steps))}
    return dict(what='median seconds of a training step: data loading, forward, losses, backward, Adam, and all callbacks of `train`', size=given.size,
                batch=given.batch, students=rows)


PARTS = dict(real=real, memory=memory, architectures=architectures, targets=targets, authors=authors, step=step)


def cpu_seconds_of_strangers():
    "Of all programs but this one and those that it started."
    return cpu_seconds_of_others() - sum(os.times()[2:4])


def main(given):
    "Measure part by part; keep what was measured before."
    given.out.mkdir(parents=True, exist_ok=True)
    given.features = given.out/'features'
    parts = json.loads(given.results.read_text())['parts'] if given.results.exists() else {}
    command = ' '.join(['python', 'benchmarks/features.py', *sys.argv[1:]])
    for name in given.only or PARTS:
        start, others = time.perf_counter(), cpu_seconds_of_strangers()
        found = PARTS[name](given, parts.get(name, {}))
        seconds = time.perf_counter() - start
        others = round(max((cpu_seconds_of_strangers() - others)/seconds, 0), 2)
        parts[name] = dict(command=command, part_seconds=round(seconds, 1), cores_of_others=others, **found)
        result = dict(what='extraction of features, targets read from disk, and what they cost in training',
                      machine=dict(processor=processor(), cores=os.cpu_count(), threads=torch.get_num_threads(), device=given.device), versions=versions(),
                      parts={name: parts[name] for name in PARTS if name in parts})
        with atomic_path(given.results) as path: path.write_text(json.dumps(result, indent=1) + '\n')
        print(json.dumps({name: found}, indent=1))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path)
    parser.add_argument('weights', type=Path)
    parser.add_argument('--out', type=Path, default=Path('runs/features-benchmark'), help='folder of the store; 3 GB')
    parser.add_argument('--only', nargs='+', choices=PARTS, metavar='PART')
    parser.add_argument('--teachers', nargs='+', help='only these of the architectures')
    parser.add_argument('--images', type=int, default=4, help='for each of the architectures')
    parser.add_argument('--batch', type=int, default=8, help='of the training step')
    parser.add_argument('--size', type=int, default=352, help='of the training step, in pixels')
    parser.add_argument('--steps', type=int, default=6, help='of each arm of U-Net; four times as many of the small student')
    parser.add_argument('--limit', type=int, help='take only so many images, to try the script')
    parser.add_argument('--results', type=Path, default=RESULTS/'features.json')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    main(parser.parse_args())
