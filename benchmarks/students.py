"""Speed of every student, plain and distilled: forward and training step, run four ways, beside what the machine's matrix products reach.

    python benchmarks/students.py [--students unet unetpp pranet emcadnet] [--size 352] [--threads N] [--budget MINUTES]

Ways: eager (float32, contiguous), channels_last, compile (channels_last, torch.compile), bf16 (channels_last, autocast). Each forward is
also held against eager: `agreement` is the Dice of both masks on eight synthetic frames, 1.0 if they are the same.
Writes benchmarks/results/students-speed.json (--out) after every configuration. A rerun on the same machine, torch, threads and size
measures only what is missing or failed; --again measures anew what it is asked for. Weights are random: speed does not depend on them.
Run it alone: beside busy programs the threads wait for each other and times grow many times over (`cores_of_others` tells).
"""
import argparse
import copy
import json
import math
import os
import statistics
import sys
import time
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch
from common import RESULTS, processor
from polyp_difom import __version__
from polyp_difom.core import InputError, atomic_path
from polyp_difom.training.losses import latent_loss, segmentation_loss
from polyp_difom.model.model import PolypDiFoM, amp_dtype
from polyp_difom.students.registry import create_student
from polyp_difom.data.synthetic import synthetic_frame
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

STUDENTS = ('unet', 'unetpp', 'pranet', 'emcadnet')
VARIANTS = ('plain', 'distilled')
MODES = ('eager', 'channels_last', 'compile', 'bf16')
STEPS = ('forward', 'train')
KEYS = ('student', 'variant', 'batch', 'mode', 'what')


def machine(device):
    "What the times depend on."
    return dict(device=torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu', processor=processor(), cores=os.cpu_count(),
                threads=torch.get_num_threads(), bf16_units=amp_dtype(device) == 'bf16', torch=torch.__version__)


def cpu_seconds_of_others():
    "What all other programs have used so far; nan where there is no /proc/stat."
    path = Path('/proc/stat')
    if not path.exists(): return math.nan
    user, nice, system, idle, waiting, *interrupts_and_stolen = map(int, path.read_text().split()[1:9])
    return (user + nice + system + sum(interrupts_and_stolen))/os.sysconf('SC_CLK_TCK') - time.process_time()


def timings(work, seconds, device, least=1):
    "Seconds of the warm-up; of each repeat (ten, or as many as `seconds` hold, at least `least`); cores that others used meanwhile."
    def once():
        start = time.perf_counter()
        work()
        if device.type == 'cuda': torch.cuda.synchronize(device)
        return time.perf_counter() - start
    warm_up, repeats, others, start = once(), [], cpu_seconds_of_others(), time.perf_counter()
    while len(repeats) < least or (sum(repeats) < seconds and len(repeats) < 10): repeats.append(once())
    others = (cpu_seconds_of_others() - others)/(time.perf_counter() - start)
    return warm_up, repeats, None if math.isnan(others) else round(max(others, 0), 2)


def ceiling(device, seconds=1):
    "Best GFLOP/s of a square matrix product in both number formats; float32 means TF32 on CUDA, as it does to convolutions there."
    before = torch.get_float32_matmul_precision()
    if device.type == 'cuda' and torch.backends.cudnn.allow_tf32: torch.set_float32_matmul_precision('high')
    best = dict(fp32=0, bf16=0)
    for (name, dtype), n in product((('fp32', torch.float32), ('bf16', torch.bfloat16)), (2048, 4096)):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        best[name] = max(best[name], round(2*n**3/min(timings(lambda: a @ b, seconds, device)[1])/1e9, 1))
    torch.set_float32_matmul_precision(before)
    return best


@lru_cache
def frames(size, device): # images (8, 3, size, size) in 0..1, masks (8, 1, size, size) of 0 and 1
    "Eight synthetic frames, always the same."
    images, masks = zip(*(synthetic_frame(seed, (size, size)) for seed in range(8)))
    stack = lambda arrays: torch.stack([torch.from_numpy(a.copy()) for a in arrays]).to(device)
    return stack(images).permute(0, 3, 1, 2).contiguous()/255, stack(masks)[:, None].float()


@lru_cache
def fresh_model(student, variant, size, device):
    "Always the same weights; batch norms know the frames, else the logits of an untrained network hardly differ."
    torch.manual_seed(0)
    model = PolypDiFoM(create_student(student, pretrained=False), 'paper' if variant == 'distilled' else None, precision='fp32').to(device)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms: norm.momentum = 1.0
    with torch.no_grad(): model.train()(frames(size, device)[0][:4])
    for norm in norms: norm.momentum = 0.1
    return model.eval()


class Runner:
    "A copy of a model with frames, run in one mode."
    def __init__(self, model, mode, batch, size, device):
        self.mode, self.device, self.distilled, self.caught = mode, device, model.distilled, dict(latents=None)
        self.layout = torch.contiguous_format if mode == 'eager' else torch.channels_last
        images, masks = (torch.cat([t]*(-(-batch//8)))[:batch] for t in frames(size, device))
        self.images, self.masks = images.contiguous(memory_format=self.layout), masks
        self.model = copy.deepcopy(model).to(memory_format=self.layout)
        self.model.precision = 'bf16' if mode == 'bf16' else 'fp32'
        if self.distilled:
            self.targets = torch.randn(2, batch, self.model.latents.channels, *self.model.target_grids(size)[0], device=device)
            caught = self.caught
            self.model.latents.register_forward_hook(lambda module, inputs, output: caught.update(latents=output))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        if mode == 'compile':
            torch.compiler.reset()
            self.model = torch.compile(self.model, dynamic=False)

    def outputs(self, images): # (B, 1, H, W), in a list
        outputs = self.model(images)
        return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]

    @torch.no_grad()
    def forward(self, images=None): # logits (B, 1, H, W)
        "What is timed as 'forward'."
        return self.outputs(self.images if images is None else images)[-1]

    def train(self):
        "What is timed as 'train': forward, losses of all outputs and latents, backward, Adam."
        loss = sum(segmentation_loss(logits, self.masks) for logits in self.outputs(self.images))
        if self.distilled: loss = loss + sum(latent_loss(latent, target) for latent, target in zip(self.caught['latents'], self.targets))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def logits(self, size): # (8, 1, size, size) float32, on the CPU
        "Of all frames, in batches of this runner's size."
        batches = frames(size, self.device)[0].split(len(self.images))
        return torch.cat([self.forward(b.contiguous(memory_format=self.layout)).float().cpu() for b in batches])


def convolution_backward_flops(grad, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, wanted, **rest):
    "Each gradient costs what the forward did; torch counts depthwise ones as if they were dense, and EMCADNet's step as 23 forwards."
    return 2*math.prod(x if transposed else grad)*math.prod(weight[1:])*sum(wanted[:2])


@lru_cache
def flops(student, variant, size, device):
    "GFLOP of one image: of a forward, and of a training step, which is one of two images, for CFA-Net learns from no single one."
    runner = Runner(fresh_model(student, variant, size, device), 'eager', 2, size, device)
    counted, mapping = {}, {torch.ops.aten.convolution_backward: convolution_backward_flops}
    for what in STEPS:
        runner.model.train(what == 'train')
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter: getattr(runner, what)()
        counted[what] = counter.get_total_flops()/2e9
    return counted


@lru_cache
def reference(student, variant, size, device): # (8, 1, size, size)
    "Logits of eager float32, frame by frame."
    return Runner(fresh_model(student, variant, size, device), 'eager', 1, size, device).logits(size)


def agreement(logits, expected): # both (8, 1, H, W)
    "Dice of the masks above the expected median, and the largest difference in standard deviations."
    mask, expected_mask = logits > expected.median(), expected > expected.median()
    return dict(agreement=round((2*(mask & expected_mask).sum()/(mask.sum() + expected_mask.sum())).item(), 6),
                logit_difference=float(f'{((logits - expected).abs().max()/expected.std()).item():.3g}'))


def measure(key, seconds, size, device):
    "Rows of one configuration: forward and training step, each with its time, or with the reason why there is none."
    student, variant, batch, mode = key
    rows = [dict(zip(KEYS, (*key, what))) for what in STEPS]
    try:
        cost = flops(student, variant, size, device)
        runner = Runner(fresh_model(student, variant, size, device), mode, batch, size, device)
        for row in rows:
            runner.model.train(row['what'] == 'train')
            warm_up, repeats, others = timings(getattr(runner, row['what']), seconds, device)
            median = statistics.median(repeats)
            if row['what'] == 'forward': row |= agreement(runner.logits(size), reference(student, variant, size, device))
            row |= dict(seconds=round(median, 6), fastest_seconds=round(min(repeats), 6), repeats=len(repeats),
                        cores_of_others=others, warmup_seconds=round(warm_up, 3), images_per_s=round(batch/median, 3),
                        gflops=round(batch*cost[row['what']]/median, 2))
    except Exception as error:
        for row in rows:
            if 'seconds' not in row: row['reason'] = f'failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}'
    return rows


def too_slow(rows, key, give_up):
    "Why a larger batch is not worth its time, or None."
    student, variant, batch, mode = key
    small, eager = (rows.get((student, variant, 1, m, 'train'), {}) for m in (mode, 'eager'))
    if batch == 1 or mode == 'eager': return None
    if small.get('reason', '').startswith('failed'): return 'not measured: failed at batch 1'
    if 'seconds' not in small or 'seconds' not in eager: return None
    ratio = small['seconds']/eager['seconds']
    return f'not measured: {ratio:.1f} times slower than eager at batch 1' if ratio > give_up else None


def load(out, settings, again):
    "Rows so far, by key, and the ceiling and command lines; none of them if the settings were others."
    held = json.loads(out.read_text()) if out.exists() else {}
    different = [k for k in settings if held and held['settings'].get(k) != settings[k]]
    if different and not again:
        sys.exit('\n'.join([f'{out} was measured with other settings; choose another --out, or replace it (--again):',
                            *(f'  {k}: {held["settings"].get(k)} then, {settings[k]} now' for k in different)]))
    if different: held = {}
    return {tuple(row[k] for k in KEYS): row for row in held.get('rows', [])}, held.get('ceiling_gflops', {}), held.get('commands', [])


def save(out, settings, top, commands, rows):
    "Write everything; the shares follow the ceiling."
    for row in rows.values():
        if 'gflops' in row: row['share_of_ceiling'] = round(row['gflops']/top['bf16' if row['mode'] == 'bf16' else 'fp32'], 4)
    result = dict(what='median seconds of forward and training step, random weights', settings=settings, version=__version__,
                  commands=commands, ceiling_gflops=top, rows=list(rows.values()))
    with atomic_path(out) as path: path.write_text(json.dumps(result, indent=1) + '\n')


def show(rows, student, batches, modes, console):
    "A table of one student, and what was not measured."
    table = Table(title=f'{student}: ms per image; GFLOP/s and share of the ceiling of the distilled one', title_justify='left', padding=(0, 1))
    table.add_column('mode', no_wrap=True)
    for name in ('batch', 'plain\nforward', '\ntrain', 'distilled\nforward', '\ntrain', 'GFLOP/s\nfwd/train', 'share %\nfwd/train', 'agreement'):
        table.add_column(name, justify='right')
    for batch, mode in product(batches, modes):
        cells = [rows.get((student, variant, batch, mode, what), {}) for variant in VARIANTS for what in STEPS]
        written = lambda field, of, scale=1, digits=0: [f'{scale*c[field]:.{digits}f}' if field in c else '-' for c in of]
        agree = min((c['agreement'] for c in cells if 'agreement' in c), default=None)
        table.add_row(mode, str(batch), *written('seconds', cells, 1000/batch, 1), '/'.join(written('gflops', cells[2:])),
                      '/'.join(written('share_of_ceiling', cells[2:], 100)), '-' if agree is None else f'{agree:.4f}')
    console.print(table)
    without = {}
    for row in rows.values():
        if row['student'] != student or 'reason' not in row: continue
        without.setdefault(row['reason'], []).append('{mode} {batch} {variant} {what}'.format(**row))
    for reason, places in without.items(): console.print(f'{reason}: {", ".join(places)}', highlight=False, markup=False)


def main(given):
    "Measure what is missing, the cheap and important first, and show all."
    if given.threads: torch.set_num_threads(given.threads)
    try:
        for student in given.students: create_student(student, pretrained=False)
    except InputError as error: sys.exit(str(error))
    device, deadline = torch.device(given.device), time.monotonic() + 60*given.budget
    settings = machine(device) | dict(size=given.size)
    rows, top, commands = load(given.out, settings, given.again)
    top = {name: max(value, top.get(name, 0)) for name, value in ceiling(device).items()}
    commands.append(' '.join(['python', 'benchmarks/students.py', *sys.argv[1:]]))
    console = Console(width=100)
    console.print(f'{settings}\nceiling: {top["fp32"]:.0f} GFLOP/s in float32, {top["bf16"]:.0f} in bfloat16', highlight=False)
    for batch, mode, student, variant in product(given.batches, given.modes, given.students, VARIANTS):
        key = student, variant, batch, mode
        if not given.again and all('seconds' in rows.get((*key, what), {}) for what in STEPS): continue
        reason = too_slow(rows, key, given.give_up) or ('not measured: budget' if time.monotonic() > deadline else None)
        skipped = [dict(zip(KEYS, (*key, what)), reason=reason) for what in STEPS]
        for row in skipped if reason else measure(key, given.seconds, given.size, device):
            rows[tuple(row[k] for k in KEYS)] = row
            result = f'{1000*row["seconds"]:10.1f} ms, {row["repeats"]} repeats' if 'seconds' in row else row['reason']
            console.print(f'{student:9} {variant:9} batch {batch}  {mode:13} {row["what"]:7} {result}', highlight=False, markup=False, soft_wrap=True)
        save(given.out, settings, top, commands, rows)
    save(given.out, settings, top, commands, rows)
    disturbed = sum((row.get('cores_of_others') or 0) > 0.2 for row in rows.values())
    if disturbed: console.print(f'{disturbed} rows were measured beside busy programs (cores_of_others > 0.2); measure again when it is quiet')
    for student in given.students: show(rows, student, given.batches, given.modes, console)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--students', nargs='+', default=STUDENTS)
    parser.add_argument('--modes', nargs='+', choices=MODES, default=MODES)
    parser.add_argument('--batches', nargs='+', type=int, default=[1, 8])
    parser.add_argument('--size', type=int, default=352, help='side of the input in pixels')
    parser.add_argument('--seconds', type=float, default=3, help='of measuring, for each forward and each training step')
    parser.add_argument('--give-up', type=float, default=4, help='leave out larger batches of a mode that trains this many times slower than eager')
    parser.add_argument('--budget', type=float, default=float('inf'), help='minutes after which no further configuration is started')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, help='of the CPU; what torch takes if not given')
    parser.add_argument('--out', type=Path, default=RESULTS/'students-speed.json')
    parser.add_argument('--again', action='store_true', help='measure again what is in the file')
    main(parser.parse_args())
