"""Tensor factorization of convolution and dense kernels: pure array functions and chains."""

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
from cnnjax.factorization.circulant import circulant_learn, circulant_reconfigure
from cnnjax.factorization.cp import CPInfo, best_of, compose_cp, cp_als, cp_tpm
from cnnjax.factorization.cp_nls import cp_nls
from cnnjax.factorization.denil import (
    PredictedLinear,
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
from cnnjax.factorization.matrix import (
    dual_filter_basis,
    energy_rank,
    filter_basis,
    svd_dense,
    tail_norm,
    weighted_svd,
)
from cnnjax.factorization.ranks import allocate_ranks, break_even_rank, pca_energy_ranks
from cnnjax.factorization.response import (
    LowRankMap,
    nonlinear_response_low_rank,
    response_factors,
    response_low_rank,
)
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

__all__ = [
    "CPInfo",
    "Chain",
    "ConvSpec",
    "LowRankMap",
    "PredictedLinear",
    "Tucker2Factors",
    "VBMFRank",
    "allocate_ranks",
    "balanced_kmeans",
    "basis_chain",
    "best_of",
    "bicluster",
    "break_even_rank",
    "chain_apply",
    "circulant_learn",
    "circulant_reconfigure",
    "compose_cp",
    "compose_scheme1",
    "compose_spatial",
    "compose_tensor_train",
    "compose_tt_conv",
    "compose_tucker",
    "compose_tucker2",
    "conv_cost",
    "convolve",
    "cp3_chain",
    "cp4_chain",
    "cp_als",
    "cp_nls",
    "cp_tpm",
    "dct_matrix",
    "dual_basis_chain",
    "dual_filter_basis",
    "energy_rank",
    "evbmf_rank",
    "filter_basis",
    "haar_matrix",
    "jaderberg_scheme1",
    "join_groups",
    "learn_separable_filters",
    "monochromatic_conv",
    "nonlinear_response_low_rank",
    "pca_energy_ranks",
    "prediction_dictionary",
    "response_factors",
    "response_low_rank",
    "scheme1_chain",
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
    "tt_conv_cores",
    "tucker2",
    "tucker2_chain",
    "tucker2_ranks",
    "tucker_hooi",
    "unbicluster",
    "weighted_svd",
]
