"`from polyp_difom.all import *` in a notebook: the names one needs there, listed. Programs import from the modules."
from polyp_difom.core import InputError
from polyp_difom.data.check import check
from polyp_difom.data.convert import convert
from polyp_difom.data.images import Layout, Pair, list_images, list_pairs, read_image, read_mask, test_sets, train_pairs
from polyp_difom.data.loaders import PolypDataset, polyp_dataloaders, split_pairs
from polyp_difom.data.synthetic import make_synthetic, synthetic_frame
from polyp_difom.demo import demo
from polyp_difom.deploy.export import export_onnx
from polyp_difom.deploy.predictor import load_predictor, predict_files, read_run
from polyp_difom.evaluation.benchmark import evaluate
from polyp_difom.evaluation.metrics import SegmentationMetrics, score_folder, score_map
from polyp_difom.evaluation.report import row_from_maps, write_report
from polyp_difom.evaluation.reproduce import list_recipes, reproduce
from polyp_difom.evaluation.statistics import Design, read_results
from polyp_difom.evaluation.verdict import verdict
from polyp_difom.features.extract import extract
from polyp_difom.features.store import FeatureStore
from polyp_difom.model.model import PolypDiFoM, load_model, save_model
from polyp_difom.published import import_published, load_published
from polyp_difom.show.figures import show_frequency, show_log, show_pairs, show_split, show_targets
from polyp_difom.show.flow import show_flow, trace_flow
from polyp_difom.show.label import label_frames
from polyp_difom.show.widgets import compare, inspect_frequency, inspect_predictions, inspect_training
from polyp_difom.students.blocks import Student, register_student
from polyp_difom.students.registry import create_student, list_students
from polyp_difom.targets.frequency import split_frequency
from polyp_difom.targets.latent import TargetConfig, build_targets
from polyp_difom.targets.soft_masks import SoftMasks
from polyp_difom.teachers.base import Teacher, register_teacher
from polyp_difom.teachers.registry import create_teacher, list_teachers
from polyp_difom.training.adapt import adapt
from polyp_difom.training.callbacks import Distillation, EncoderFreeze, EpochSeed, PhaseSchedule, TargetWatch, dice_score
from polyp_difom.training.learner import difom_learner
from polyp_difom.training.losses import latent_losses, losses
from polyp_difom.training.runs import TrainConfig, resume, train

__all__ = ['Design', 'Distillation', 'EncoderFreeze', 'EpochSeed', 'FeatureStore', 'InputError', 'Layout', 'Pair', 'PhaseSchedule', 'PolypDataset',
           'PolypDiFoM', 'SegmentationMetrics', 'SoftMasks', 'Student', 'TargetConfig', 'TargetWatch', 'Teacher', 'TrainConfig', 'adapt', 'build_targets',
           'check', 'compare', 'convert', 'create_student', 'create_teacher', 'demo', 'dice_score', 'difom_learner', 'evaluate', 'export_onnx', 'extract',
           'import_published', 'inspect_frequency', 'inspect_predictions', 'inspect_training', 'label_frames', 'latent_losses', 'list_images', 'list_pairs',
           'list_recipes', 'list_students', 'list_teachers', 'load_model', 'load_predictor', 'load_published', 'losses', 'make_synthetic',
           'polyp_dataloaders', 'predict_files', 'read_image', 'read_mask', 'read_results', 'read_run', 'register_student', 'register_teacher', 'reproduce',
           'resume', 'row_from_maps', 'save_model', 'score_folder', 'score_map', 'show_flow', 'show_frequency', 'show_log', 'show_pairs', 'show_split',
           'show_targets', 'split_frequency', 'split_pairs', 'synthetic_frame', 'test_sets', 'trace_flow', 'train', 'train_pairs', 'verdict', 'write_report']
