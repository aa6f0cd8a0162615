"`from polyp_difom.all import *` in a notebook: the names one needs there, listed. Programs import from the modules."
from polyp_difom.core import InputError
from polyp_difom.data.check import check
from polyp_difom.data.images import Pair, list_images, list_pairs, read_image, read_mask, test_folders, train_folder
from polyp_difom.data.loaders import PolypDataset, polyp_dataloaders, split_pairs
from polyp_difom.data.synthetic import make_synthetic, synthetic_frame
from polyp_difom.evaluation.benchmark import evaluate
from polyp_difom.features.extract import extract
from polyp_difom.features.store import FeatureStore
from polyp_difom.model.model import PolypDiFoM, load_model, predict
from polyp_difom.students.registry import create_student, list_students
from polyp_difom.targets.frequency import split_frequency
from polyp_difom.targets.latent import build_targets
from polyp_difom.teachers.registry import create_teacher, list_teachers
from polyp_difom.training.runs import train
