"The picture of a student: every network can be traced, nothing that is used is cut off, and no box, arrow or name hides another."
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import nn

from polyp_difom.core import InputError
from polyp_difom.show.flow import page_boxes, readers_of, show_flow, trace_flow
from polyp_difom.students.blocks import student_registry
from polyp_difom.students.registry import create_student

SMALL = {'unet': dict(width=4), 'unetpp': dict(width=4, deep_supervision=True), 'pranet': dict(width=8), 'emcadnet': dict(backbone='pvt_v2_b0'), 'timm-unet': dict(backbone='test_efficientnet', width=8),
         'polyp_pvt': dict(backbone='pvt_v2_b0', width=8), 'pvt_cascade': dict(backbone='pvt_v2_b0'), 'ctnet': dict(backbone='mit_b0', width=8), 'meganet': dict(backbone='resnet18'), 'cfanet': dict(width=8),
         'sam_mamba': dict(variant='tiny', image_size=64, prior_width=4, adapter_width=16)}
SMP = {'smp/Unet-resnet18': ['f1'], 'smp/FPN-mit_b0': ['f1', 'f2'], 'smp/DeepLabV3Plus-resnet18': ['f1', 'f2', 'f4', 'f5'], 'smp/MAnet-resnet18': ['f1'], 'smp/DPT-tu-vit_tiny_patch16_224': []} # maps that smp's decoders leave out
UNUSED = {name: [] for name in student_registry} | SMP


def small(name): return create_student(name, pretrained=False, **SMALL.get(name, {}))


def parts(figure):
    "Boxes as (left, top, right, bottom), their texts likewise, and the points of the arrows, in inches."
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axis, = figure.axes
    boxes = [(p.get_x(), p.get_y(), p.get_x() + p.get_width(), p.get_y() + p.get_height()) for p in axis.patches if isinstance(p, FancyBboxPatch)]
    extents = [text.get_window_extent(canvas.get_renderer()).transformed(axis.transData.inverted()) for text in axis.texts if not text.get_text().startswith('stride')]
    arrows = [p._path_original.vertices for p in axis.patches if isinstance(p, FancyArrowPatch)]
    return boxes, [(e.x0, min(e.y0, e.y1), e.x1, max(e.y0, e.y1)) for e in extents], arrows


def overlap(a, b): return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])
def inside(x, y, box, edge=1e-6): return box[0] + edge < x < box[2] - edge and box[1] + edge < y < box[3] - edge


@pytest.mark.parametrize('name', UNUSED)
def test_every_student_is_traced_and_what_is_used_has_a_reader(name):
    flow = trace_flow(small(name))
    decoders = {name for name, node in flow.items() if node.kind in ('decoder', 'output')}
    unread = [f for f, readers in readers_of(flow).items() if flow[f].kind == 'encoder' and not decoders & set(readers)]
    assert unread == UNUSED[name]
    assert [node for node in flow.values() if node.kind == 'output'], 'there is something to see'
    assert all(node.sources for node in flow.values() if node.kind != 'image')
    ran = list(flow)
    assert all(ran.index(source) < ran.index(node) for node in flow for source in flow[node].sources)


@pytest.mark.parametrize('name', UNUSED)
def test_nothing_hides_anything(name):
    student = small(name)
    figure = show_flow(student)
    boxes, texts, arrows = parts(figure)
    assert len(boxes) == len(page_boxes(trace_flow(student))) == len(texts) <= 30 and figure.get_size_inches()[0] <= 9
    assert not any(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    for text, box in zip(texts, boxes): assert box[0] <= text[0] and box[1] <= text[1] and text[2] <= box[2] and text[3] <= box[3], box
    assert not any(inside(x, y, box) for points in arrows for x, y in points for box in boxes), 'curves lie in the hull of these points, in the gap between two columns'


class Odd(nn.Module):
    "An encoder without gradients; a decoder that works in place, returns tuples, runs a part twice, and has parts that do nothing."
    def __init__(self):
        super().__init__()
        self.stem, self.down, self.conv = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 2, 2), nn.Conv2d(4, 4, 1)
        self.relu, self.same, self.lstm, self.idle = nn.ReLU(inplace=True), nn.Dropout(.5), nn.LSTM(4, 4, batch_first=True), nn.Conv2d(4, 4, 1)

    @torch.no_grad()
    def encode(self, x):
        fine = self.stem(x)
        return fine, self.down(fine)

    def decode(self, maps):
        fine, deep = maps
        x = self.same(self.relu(self.conv(self.conv(deep))))
        tokens, (state, _) = self.lstm(x.flatten(2).mT)
        x = x*state[0][:, :, None, None]
        x[..., 0] = fine[:, :, ::2, 0]
        self.idle(x.detach())
        return x.sum(1, keepdim=True)


def test_what_is_odd_is_followed():
    flow = trace_flow(Odd().train())
    assert {name: node.sources for name, node in flow.items()} == dict(image=[], f1=['image'], f2=['image'], conv=['f2'], **{'conv (2)': ['conv']}, relu=['conv (2)'], lstm=['relu'], idle=[], logits=['f1', 'relu', 'lstm'])
    assert (flow['lstm'].stride, flow['logits'].channels) == (4, 1)
    show_flow(Odd())


def test_a_trace_leaves_a_student_as_it_was():
    student = small('cfanet').train()
    student.encoder.eval()
    modes, weights = [part.training for part in student.modules()], {key: value.clone() for key, value in student.state_dict().items()}
    with torch.no_grad(): first = trace_flow(student)
    assert first == trace_flow(student)
    assert modes == [part.training for part in student.modules()] and all(torch.equal(value, weights[key]) for key, value in student.state_dict().items())
    assert all(p.grad is None for p in student.parameters()) and not any(part._forward_hooks for part in student.modules())


class Failing(nn.Module):
    def encode(self, x): return [x]
    def decode(self, maps): raise RuntimeError('no\nsecond line')


@pytest.mark.parametrize('student, size, said', [(nn.Conv2d(3, 1, 1), 128, 'student Conv2d: has no method encode'), (Failing(), 128, 'student Failing: fails on a 128x128 image (no); mend it, or give another size'),
                                                 (Failing(), 0, 'size is 0'), (Failing(), 'large', "size is 'large'")])
def test_what_cannot_be_drawn_is_told_in_one_line(student, size, said):
    with pytest.raises(InputError) as told: show_flow(student, size)
    assert said in str(told.value) and '\n' not in str(told.value)
