"""Tensor factorization of convolution and dense kernels: pure array functions and chains."""

from cnnjax.factorization.asymmetric import Asymmetric3D, pca_plan
from cnnjax.factorization.budget import Menus, Option, allocate, menus, sensitivity, total_gain
from cnnjax.factorization.chain import (
    Chain,
    ConvSpec,
    basis_chain,
    chain_apply,
    conv_cost,
    convolve,
    cp3_chain,
    cp4_chain,
    dual_basis_chain,
    join_groups,
    scheme1_chain,
    spatial_chain,
    spatial_mix_chain,
    split_groups,
    tucker2_chain,
)
from cnnjax.factorization.choose import choose_ranks
from cnnjax.factorization.circulant import circulant_learn, circulant_reconfigure
from cnnjax.factorization.compact import CompactLayer, compact_maps
from cnnjax.factorization.compose import compose_chain, data_reconstruct
from cnnjax.factorization.constrained import constrain_low_rank
from cnnjax.factorization.cp import cp_als, cp_als_together
from cnnjax.factorization.cp_factors import CPInfo, best_of, compose_cp
from cnnjax.factorization.cp_nls import cp_nls
from cnnjax.factorization.cp_rules import CP, Scheme1
from cnnjax.factorization.cp_tpm import cp_tpm
from cnnjax.factorization.denil import (
    prediction_dictionary,
    smoothness_gate,
    squared_exponential,
)
from cnnjax.factorization.denton import (
    balanced_kmeans,
    bicluster,
    monochromatic_conv,
    unbicluster,
)
from cnnjax.factorization.denton_rules import Biclustered, Monochromatic
from cnnjax.factorization.effects import LayerEffect, layer_effects
from cnnjax.factorization.filter_rules import SeparableFilters, SeparableTransform, Tucker
from cnnjax.factorization.latency import Measured, keep_faster, time_pair
from cnnjax.factorization.layers import Fixed, FixedConv, PredictedLinear, Reorder
from cnnjax.factorization.layerwise import factorize_layerwise
from cnnjax.factorization.matrix import (
    dual_filter_basis,
    energy_rank,
    filter_basis,
    svd_dense,
    tail_norm,
    weighted_svd,
)
from cnnjax.factorization.named import make_rule, parse_rank, rule_names
from cnnjax.factorization.network import LayerPlan, Plan, factorize, plan, report
from cnnjax.factorization.predict_rules import Predicted, with_input_covariances
from cnnjax.factorization.ranks import (
    allocate_ranks,
    break_even_rank,
    greedy_allocation,
    pca_energy_ranks,
)
from cnnjax.factorization.reconstruct import LayerFit, Reconstruction, reconstruct
from cnnjax.factorization.response import (
    LowRankMap,
    nonlinear_response_low_rank,
    response_factors,
    response_low_rank,
)
from cnnjax.factorization.rules import (
    EVBMF,
    Basis,
    Energy,
    MacsRatio,
    Rule,
    Spatial,
    Tucker2,
)
from cnnjax.factorization.sites import Site, find_sites, response_moments
from cnnjax.factorization.spatial import (
    compose_scheme1,
    compose_spatial,
    jaderberg_scheme1,
    spatial_svd,
)
from cnnjax.factorization.tensor_train import (
    compose_tensor_train,
    compose_tt_conv,
    tensor_train,
    tt_conv_cores,
)
from cnnjax.factorization.trains import DualBasis, TensorTrain
from cnnjax.factorization.transforms import (
    dct_matrix,
    haar_matrix,
    learn_separable_filters,
    separable_transform_chain,
)
from cnnjax.factorization.tucker import (
    Tucker2Factors,
    compose_tucker,
    compose_tucker2,
    tucker2,
    tucker_hooi,
)
from cnnjax.factorization.vbmf import VBMFRank, evbmf_rank, tucker2_ranks
from cnnjax.factorization.weighted import entrywise_low_rank, input_moments, loss_weights
from cnnjax.factorization.weighted_rules import Weighted, with_metrics

__all__ = [
    "CP",
    "EVBMF",
    "Asymmetric3D",
    "Basis",
    "Biclustered",
    "CPInfo",
    "Chain",
    "CompactLayer",
    "ConvSpec",
    "DualBasis",
    "Energy",
    "Fixed",
    "FixedConv",
    "LayerEffect",
    "LayerFit",
    "LayerPlan",
    "LowRankMap",
    "MacsRatio",
    "Measured",
    "Menus",
    "Monochromatic",
    "Option",
    "Plan",
    "Predicted",
    "PredictedLinear",
    "Reconstruction",
    "Reorder",
    "Rule",
    "Scheme1",
    "SeparableFilters",
    "SeparableTransform",
    "Site",
    "Spatial",
    "TensorTrain",
    "Tucker",
    "Tucker2",
    "Tucker2Factors",
    "VBMFRank",
    "Weighted",
    "allocate",
    "allocate_ranks",
    "balanced_kmeans",
    "basis_chain",
    "best_of",
    "bicluster",
    "break_even_rank",
    "chain_apply",
    "choose_ranks",
    "circulant_learn",
    "circulant_reconfigure",
    "compact_maps",
    "compose_chain",
    "compose_cp",
    "compose_scheme1",
    "compose_spatial",
    "compose_tensor_train",
    "compose_tt_conv",
    "compose_tucker",
    "compose_tucker2",
    "constrain_low_rank",
    "conv_cost",
    "convolve",
    "cp3_chain",
    "cp4_chain",
    "cp_als",
    "cp_als_together",
    "cp_nls",
    "cp_tpm",
    "data_reconstruct",
    "dct_matrix",
    "dual_basis_chain",
    "dual_filter_basis",
    "energy_rank",
    "entrywise_low_rank",
    "evbmf_rank",
    "factorize",
    "factorize_layerwise",
    "filter_basis",
    "find_sites",
    "greedy_allocation",
    "haar_matrix",
    "input_moments",
    "jaderberg_scheme1",
    "join_groups",
    "keep_faster",
    "layer_effects",
    "learn_separable_filters",
    "loss_weights",
    "make_rule",
    "menus",
    "monochromatic_conv",
    "nonlinear_response_low_rank",
    "parse_rank",
    "pca_energy_ranks",
    "pca_plan",
    "plan",
    "prediction_dictionary",
    "reconstruct",
    "report",
    "response_factors",
    "response_low_rank",
    "response_moments",
    "rule_names",
    "scheme1_chain",
    "sensitivity",
    "separable_transform_chain",
    "smoothness_gate",
    "spatial_chain",
    "spatial_mix_chain",
    "spatial_svd",
    "split_groups",
    "squared_exponential",
    "svd_dense",
    "tail_norm",
    "tensor_train",
    "time_pair",
    "total_gain",
    "tt_conv_cores",
    "tucker2",
    "tucker2_chain",
    "tucker2_ranks",
    "tucker_hooi",
    "unbicluster",
    "weighted_svd",
    "with_input_covariances",
    "with_metrics",
]
