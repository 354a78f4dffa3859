"""The operations that a session may use: one table of names, shared by SDK and shards.

The names are public ones of torch and of Python's operator module. What could read files, run code,
hand out memory addresses or change the model is not here. Both ends resolve the names of this table
once; a name that a user sends is only ever looked up in the table.
"""

from __future__ import annotations

import difflib
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OPERATIONS_VERSION = 3
"""Raised with every change of the table; names are added, never removed."""

# Arithmetic, comparison and reduction exist as functions and as methods of a tensor.
_FUNCTIONS_AND_METHODS = """
abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr all allclose amax amin aminmax
angle any arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort asin asinh atan
atan2 atanh baddbmm bernoulli bincount bitwise_and bitwise_left_shift bitwise_not bitwise_or
bitwise_right_shift bitwise_xor bmm broadcast_to ceil cholesky chunk clamp clamp_max clamp_min clip
clone conj copysign corrcoef cos cosh count_nonzero cov cross cummax cummin cumprod cumsum deg2rad
det detach diag diag_embed diagflat diagonal diff digamma dist div divide dot eq equal erf erfc
erfinv exp exp2 expm1 fix flatten flip fliplr flipud float_power floor floor_divide fmax fmin fmod
frac gather ge greater greater_equal gt heaviside histc hypot index_add index_copy index_fill
index_put index_select inner inverse isclose isfinite isinf isnan isneginf isposinf isreal kron
kthvalue le lerp less less_equal lgamma log log10 log1p log2 log_softmax logaddexp logaddexp2
logcumsumexp logdet logical_and logical_not logical_or logical_xor logit logsumexp lt masked_fill
masked_scatter masked_select matmul matrix_power max maximum mean median min minimum mm mode movedim
moveaxis msort mul multinomial multiply mv mvlgamma nan_to_num nanmean nanmedian nanquantile nansum
narrow ne neg negative nextafter nonzero norm not_equal outer permute pinverse pow positive prod
quantile rad2deg ravel reciprocal relu remainder renorm repeat_interleave reshape roll rot90 round
rsqrt scatter scatter_add scatter_reduce select select_scatter sigmoid sign signbit sin sinc sinh
slice_scatter slogdet softmax sort split sqrt square squeeze std sub subtract sum svd swapaxes
swapdims t take take_along_dim tan tanh tensor_split tile topk trace transpose tril triu true_divide
trunc unbind unflatten unique unique_consecutive unsqueeze var where xlogy
"""

_FUNCTIONS = """
atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors cartesian_prod cat cdist chain_matmul
bucketize column_stack combinations complex concat concatenate cosine_similarity
cumulative_trapezoid dropout dsplit dstack einsum empty_like full_like group_norm hsplit hstack
layer_norm meshgrid normal ones_like pairwise_distance polar rand_like randn_like searchsorted stack
std_mean tensordot trapezoid tril_indices triu_indices vander var_mean vsplit vstack zeros_like
rms_norm isin logspace linspace arange zeros ones full eye rand randn randint randperm empty tensor
scalar_tensor
"""

_METHODS = """
bfloat16 bool byte contiguous cpu double expand expand_as float half int item long masked_fill
new_empty new_full new_ones new_zeros repeat reshape_as short sum_to_size to tolist type_as view
view_as unfold dim numel size nelement element_size is_floating_point requires_grad_ abs_ add_
addcdiv_ addcmul_ addmm_ bernoulli_ bitwise_and_ bitwise_not_ bitwise_or_ bitwise_xor_ ceil_ clamp_
clamp_max_ clamp_min_ clip_ copy_ cos_ cumprod_ cumsum_ div_ divide_ eq_ erf_ exp_ expm1_ fill_
fill_diagonal_ floor_ floor_divide_ fmod_ frac_ ge_ gt_ index_add_ index_copy_ index_fill_
index_put_ le_ lerp_ log_ log1p_ logical_and_ logical_not_ logical_or_ logical_xor_ lt_ masked_fill_
masked_scatter_ mul_ multiply_ nan_to_num_ ne_ neg_ normal_ pow_ reciprocal_ relu_ remainder_
renorm_ round_ rsqrt_ scatter_ scatter_add_ scatter_reduce_ sigmoid_ sign_ sin_ sqrt_ square_ sub_
subtract_ tan_ tanh_ tril_ triu_ trunc_ uniform_ zero_ __getitem__ __setitem__ __rsub__ __rpow__
__rdiv__ __rtruediv__ __rfloordiv__ __rmod__ __rmatmul__ __and__ __or__ __xor__ __iand__ __ior__
__ixor__ __lshift__ __rshift__ __ilshift__ __irshift__ __invert__ __neg__ __pos__ __abs__ __eq__
__ne__ __lt__ __le__ __gt__ __ge__ __contains__ __floordiv__ __mod__ __pow__ __ipow__ __ifloordiv__
__imod__ __len__ __rlshift__ __rrshift__ __rand__ __ror__ __rxor__
"""

_PROPERTIES = "T mT H mH real imag shape dtype device ndim"

_NN_FUNCTIONAL = """
adaptive_avg_pool1d adaptive_max_pool1d alpha_dropout avg_pool1d batch_norm binary_cross_entropy
binary_cross_entropy_with_logits celu conv1d cosine_embedding_loss cosine_similarity cross_entropy
dropout elu embedding gaussian_nll_loss gelu glu group_norm gumbel_softmax hardshrink hardsigmoid
hardswish hardtanh hinge_embedding_loss huber_loss instance_norm interpolate kl_div l1_loss
layer_norm leaky_relu linear local_response_norm log_softmax logsigmoid margin_ranking_loss
max_pool1d mish mse_loss multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss
nll_loss normalize one_hot pad pairwise_distance poisson_nll_loss prelu relu relu6 rms_norm
scaled_dot_product_attention selu sigmoid silu smooth_l1_loss soft_margin_loss softmax softmin
softplus softshrink softsign tanh tanhshrink threshold triplet_margin_loss
"""

_LINALG = """
cholesky cond cross det diagonal eig eigh eigvals eigvalsh inv inv_ex lstsq lu matmul matrix_exp
matrix_norm matrix_power matrix_rank multi_dot norm pinv qr slogdet solve solve_triangular svd
svdvals tensorinv tensorsolve vander vecdot vector_norm
"""

_FFT = "fft fft2 fftn fftshift ifft ifft2 ifftn ifftshift irfft irfft2 rfft rfft2"

_SPECIAL = (
    "entr erf erfc erfcx erfinv expit expm1 gammaln log1p log_ndtr log_softmax logit ndtr xlogy"
)


def _names(prefix: str, words: str, suffix: str = "") -> set[str]:
    return {f"{prefix}.{word}{suffix}" for word in words.split()}


FACTORIES = _names("torch", "empty eye full ones rand randint randn randperm zeros")
"""Make tensors of nothing: recorded also where no value of the session is among the arguments."""

RANDOM = (
    _names("torch", "bernoulli multinomial normal rand rand_like randint randn randn_like randperm")
    | _names("torch.Tensor", "bernoulli bernoulli_ multinomial normal_ uniform_")
    | _names("torch.nn.functional", "alpha_dropout dropout gumbel_softmax")
    | _names("torch", "dropout")
)
"""Draw random numbers, from the seed of their trace."""

VARIABLE = "insitu.variable"
"""Gives its argument; `Assign` may later give the result another value."""

SELECT = "insitu.select"
"""Gives its second argument if its first holds, else its third; the other need not be set."""

LAST = "insitu.last"
"""Gives the last of its arguments that is set; the others need not be."""

GETITEM = frozenset({"torch.Tensor.__getitem__", "operator.getitem"})
"""Give a part of their first argument, by their second."""

# Lists and dicts that are built while a session runs. They take copies, so that nothing in them
# changes with the tensor that it was made of.
_CONTAINERS = "list dict append extend set_item len"


OPERATIONS: frozenset[str] = frozenset(
    _names("torch", _FUNCTIONS_AND_METHODS)
    | _names("torch", _FUNCTIONS)
    | _names("torch.Tensor", _FUNCTIONS_AND_METHODS)
    | _names("torch.Tensor", _METHODS)
    | _names("torch.Tensor", _PROPERTIES, ".__get__")
    | _names("torch.nn.functional", _NN_FUNCTIONAL)
    | _names("torch.linalg", _LINALG)
    | _names("torch.fft", _FFT)
    | _names("torch.special", _SPECIAL)
    # Takes an item out of a tuple, list or dict.
    | {"operator.getitem"}
    | {VARIABLE, SELECT, LAST}
    | _names("insitu", _CONTAINERS)
)
"""Every operation, by its public name in torch or the standard library."""

_IN_PLACE_OPERATORS = {
    "__setitem__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__", "__ipow__",
    "__ifloordiv__", "__imod__",
}  # fmt: skip

_CONTAINER_WRITES = {"insitu.append", "insitu.extend", "insitu.set_item"}

_VIEWS = {
    "getitem",
    "__pos__",
    "alpha_dropout",
    "__getitem__", "T", "mT", "H", "mH", "real", "imag", "broadcast_to", "chunk", "conj",
    "contiguous", "detach", "diagonal", "expand", "expand_as", "flatten", "movedim", "moveaxis",
    "narrow", "permute", "positive", "ravel", "reshape", "reshape_as", "select", "split", "squeeze",
    "swapaxes", "swapdims", "t", "tensor_split", "transpose", "unbind", "unflatten", "unfold",
    "unsqueeze", "view", "view_as", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors",
    "dsplit", "hsplit", "vsplit", "to", "type_as", "bfloat16", "bool", "byte", "cpu", "double",
    "float", "half", "int", "long", "short", "dropout", "meshgrid", "requires_grad_",
}  # fmt: skip


@lru_cache(maxsize=4096)
def last_word(name: str) -> str:
    """Gives the word of an operation's name that says what it does, such as "argmax"."""
    return name.removesuffix(".__get__").rpartition(".")[2]


def writes_into_container(name: str) -> bool:
    """Whether the operation changes which items its first argument, a list or dict, has."""
    return name in _CONTAINER_WRITES


@lru_cache(maxsize=4096)
def is_in_place(name: str) -> bool:
    """Whether the operation writes into its first argument."""
    word = last_word(name)
    return (
        writes_into_container(name)
        or word in _IN_PLACE_OPERATORS
        or (word.endswith("_") and not word.endswith("__") and word != "requires_grad_")
    )


_INPLACE_POSITIONS = {
    "alpha_dropout": 3, "celu": 2, "dropout": 3, "elu": 2, "hardsigmoid": 1, "hardswish": 1,
    "hardtanh": 3, "leaky_relu": 2, "mish": 1, "relu": 1, "relu6": 1, "selu": 1, "silu": 1,
    "threshold": 3,
}  # fmt: skip

_WRITING_OPTIONS = {
    # Both write into the tensors that they are given, in these cases.
    "torch.nn.functional.embedding": ("max_norm", 3),
    "torch.nn.functional.batch_norm": ("training", 5),
    "torch.nn.functional.instance_norm": ("running_mean", 1),
}


def writing_option(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> str:
    """Gives the option by which a call would write into its arguments; empty if there is none.

    No such call is part of a session: that an operation writes is to be seen from its name.

    Args:
        name: name of the operation.
        args: its positional arguments; what is false or None is taken as such.
        kwargs: its keyword arguments.
    """
    options = [("out", len(args))]
    if name.startswith("torch.nn.functional."):
        options.append(("inplace", _INPLACE_POSITIONS.get(last_word(name), len(args))))
    if name in _WRITING_OPTIONS:
        options.append(_WRITING_OPTIONS[name])
    for option, position in options:
        value = args[position] if position < len(args) else kwargs.get(option)
        if value is not None and value is not False:
            return option
    return ""


@lru_cache(maxsize=4096)
def may_alias(name: str) -> bool:
    """Whether the operation's result may share memory with its arguments."""
    return is_in_place(name) or last_word(name) in _VIEWS


def nearest(name: str) -> list[str]:
    """Gives at most three names of the table that are like one that is not in it."""
    same_word = sorted(known for known in OPERATIONS if last_word(known) == last_word(name))
    return same_word[:3] or difflib.get_close_matches(name, OPERATIONS, n=3, cutoff=0.5)
