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
from cnnjax.factorization.cp import CPInfo, best_of, compose_cp, cp_als, cp_tpm
from cnnjax.factorization.cp_nls import cp_nls
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
    "Tucker2Factors",
    "VBMFRank",
    "allocate_ranks",
    "basis_chain",
    "best_of",
    "break_even_rank",
    "chain_apply",
    "compose_cp",
    "compose_scheme1",
    "compose_spatial",
    "compose_tucker",
    "compose_tucker2",
    "conv_cost",
    "convolve",
    "cp3_chain",
    "cp4_chain",
    "cp_als",
    "cp_nls",
    "cp_tpm",
    "dual_basis_chain",
    "dual_filter_basis",
    "energy_rank",
    "evbmf_rank",
    "filter_basis",
    "jaderberg_scheme1",
    "join_groups",
    "nonlinear_response_low_rank",
    "pca_energy_ranks",
    "response_factors",
    "response_low_rank",
    "scheme1_chain",
    "spatial_chain",
    "spatial_mix_chain",
    "spatial_svd",
    "split_groups",
    "svd_dense",
    "tail_norm",
    "tucker2",
    "tucker2_chain",
    "tucker2_ranks",
    "tucker_hooi",
    "weighted_svd",
]
