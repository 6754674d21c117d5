"""Teaching a model: the engine, what is learnt, optimisers; objectives and schedules of the methods."""

from . import pretrain
from .align import AlignToTable
from .arbex import ARBEx, with_balance
from .attention_sparsity import AttentionSparsity
from .classify import BinaryCrossEntropy, CrossEntropy
from .collaborate import Collaborate, Students
from .consistency import token_reduction_consistency
from .dcls import Repulsion
from .distill import KD, FeatureMatch
from .elasticvit import ConflictAware, alpha_divergence
from .engine import train
from .ewa import EWA, merged, with_experts
from .ferkd import CropLabels, FerKD, label_crops
from .frd import frd, reverse_modules
from .g2sd import GenericDistillation, SpecificDistillation
from .gpusq import GPUSQ, gpusq
from .heal import FRD, Connectivity, KeepRate, SparsifinerDistillation, TokenReductionConsistency, heal
from .instatune import InstaTune
from .long_tail import DeiTLT, effective_weights, long_tailed
from .merging import Kitchen, MergingRule, merge
from .mpcvit import MPCSearch
from .nkd import NKD, USKD
from .objective import Batch, Now, Objective, Seen, objective
from .opcm import OPCM
from .optimisers import SGD, AdamW, Lion, Optimiser, SGDSaI
from .patch_mixing import PatchMixing, replacement_curve
from .ph_reg import PHReg
from .pleas import PLeaS
from .pretrain import MAE
from .retrieval import retrieval
from .sam import SAM
from .scalekd import ScaleKD
from .schedule import keep_rate, set_keep
from .semantic_proxies import SemanticProxies
from .sharpness import largest_eigenvalue, neighbourhood_loss
from .slimfit import SlimFit
from .sn_net import Stitched
from .soups import GreedySoup, LearnedSoup, UniformSoup
from .sparsifiner import connectivity_loss, predictor_parameters, sparsifiner_distillation
from .vit_resnas import MultiArchitecture
from .zeros import KeepZeros

__all__ = [
    "EWA",
    "FRD",
    "GPUSQ",
    "KD",
    "MAE",
    "NKD",
    "OPCM",
    "SAM",
    "SGD",
    "USKD",
    "ARBEx",
    "AdamW",
    "AlignToTable",
    "AttentionSparsity",
    "Batch",
    "BinaryCrossEntropy",
    "Collaborate",
    "ConflictAware",
    "Connectivity",
    "CropLabels",
    "CrossEntropy",
    "DeiTLT",
    "FeatureMatch",
    "FerKD",
    "GenericDistillation",
    "GreedySoup",
    "InstaTune",
    "KeepRate",
    "KeepZeros",
    "Kitchen",
    "LearnedSoup",
    "Lion",
    "MPCSearch",
    "MergingRule",
    "MultiArchitecture",
    "Now",
    "Objective",
    "Optimiser",
    "PHReg",
    "PLeaS",
    "PatchMixing",
    "Repulsion",
    "SGDSaI",
    "ScaleKD",
    "Seen",
    "SemanticProxies",
    "SlimFit",
    "SparsifinerDistillation",
    "SpecificDistillation",
    "Stitched",
    "Students",
    "TokenReductionConsistency",
    "UniformSoup",
    "alpha_divergence",
    "connectivity_loss",
    "effective_weights",
    "frd",
    "gpusq",
    "heal",
    "keep_rate",
    "label_crops",
    "largest_eigenvalue",
    "long_tailed",
    "merge",
    "merged",
    "neighbourhood_loss",
    "objective",
    "predictor_parameters",
    "pretrain",
    "replacement_curve",
    "retrieval",
    "reverse_modules",
    "set_keep",
    "sparsifiner_distillation",
    "token_reduction_consistency",
    "train",
    "with_balance",
    "with_experts",
]
