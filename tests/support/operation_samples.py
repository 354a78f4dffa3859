"""One sample call of every operation in the table, on values that are made from an activation."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from insitu_wire.operations import OPERATIONS, last_word

Arguments = tuple[Any, ...]
"""Positional arguments; a dict in the last place holds the keyword arguments."""


class Inputs:
    """Arguments of every kind, made by the same calls from an activation or from its proxy."""

    def __init__(self, hidden: Any) -> None:
        self._flat = hidden.clone().flatten()

    @property
    def x(self) -> Any:
        """Floats, [4, 4]."""
        return self._flat[:16].reshape(4, 4)

    @property
    def y(self) -> Any:
        """Other floats, [4, 4]."""
        return self._flat[16:32].clone().reshape(4, 4)

    @property
    def v(self) -> Any:
        """Floats, [4]."""
        return self._flat[32:36]

    @property
    def cube(self) -> Any:
        """Floats, [2, 4, 4]."""
        return self._flat[:32].reshape(2, 4, 4)

    @property
    def image(self) -> Any:
        """Floats, [1, 2, 4, 8]."""
        return self._flat[64:128].reshape(1, 2, 4, 8)

    @property
    def unit(self) -> Any:
        """Floats between 0 and 1, [4, 4]."""
        return self.x.sigmoid()

    @property
    def ints(self) -> Any:
        """Integers of either sign, [4, 4]."""
        return (self.x * 8).long()

    @property
    def counts(self) -> Any:
        """Integers from 0 to 3, [4, 4]."""
        return self.ints % 4

    @property
    def mask(self) -> Any:
        """Booleans, [4, 4]."""
        return self.x > 0

    @property
    def definite(self) -> Any:
        """A symmetric positive definite matrix, [4, 4]."""
        return self.x @ self.x.mT + 4 * torch.eye(4)

    @property
    def complex(self) -> Any:
        """Complex numbers, [4, 4]."""
        return torch.complex(self.x, self.y)


_BY_WORD: dict[str, Callable[[Inputs], Arguments]] = {}
"""Arguments by what an operation does, in whichever of torch's namespaces it is."""


def _add(words: str, arguments: Callable[[Inputs], Arguments]) -> None:
    assert not (known := _BY_WORD.keys() & set(words.split())), known
    _BY_WORD.update(dict.fromkeys(words.split(), arguments))


_add(
    """abs absolute angle arcsinh argmax argmin argsort asinh atan arctan all any amax amin aminmax
    ceil clone conj corrcoef cos cosh count_nonzero cov deg2rad detach diag diagflat diag_embed diff
    erf erfc exp exp2 expm1 fix flatten fliplr flipud floor frac isfinite isinf isnan isneginf
    isposinf isreal logical_not max mean median min mode msort nan_to_num nanmean
    nanmedian nansum neg negative nonzero norm pinverse positive prod rad2deg ravel relu
    round rot90 sigmoid sign signbit sin sinc sinh sort square squeeze std sum svd t tan
    tanh trace tril triu trunc unbind unique unique_consecutive var ones_like zeros_like empty_like
    rand_like randn_like std_mean var_mean atleast_1d atleast_2d atleast_3d bfloat16 bool byte
    contiguous cpu double float half int long short dim numel nelement element_size
    is_floating_point __neg__ __pos__ __abs__ __len__ T mT H mH real shape dtype device
    ndim celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu6
    selu silu softplus softshrink softsign tanhshrink fft fft2 fftn fftshift ifft ifft2 ifftn
    ifftshift rfft rfft2 irfft irfft2 matrix_exp matrix_norm vector_norm cond matrix_rank pinv qr
    svdvals expit erfcx log_ndtr ndtr zero requires_grad_ normalize
    """,
    lambda s: (s.x,),
)
_add("glu softmin diagonal", lambda s: (s.x,))
_add(
    """acos arccos asin arcsin atanh arctanh bernoulli digamma erfinv lgamma log log10 log1p log2
    logit reciprocal rsqrt sqrt entr gammaln""",
    lambda s: (s.unit,),
)
_add("acosh arccosh", lambda s: (s.unit + 1,))
_add(
    """add arctan2 atan2 allclose copysign dist div divide eq equal fmax fmin fmod ge greater
    greater_equal gt heaviside hypot isclose isin kron le less less_equal logaddexp logaddexp2
    logical_and logical_or logical_xor lt matmul maximum minimum mm mul multiply ne nextafter
    not_equal remainder sub subtract true_divide floor_divide __rsub__ __rdiv__ __rtruediv__
    __rfloordiv__ __rmod__ __rmatmul__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __floordiv__
    __mod__ __ifloordiv__ __imod__ expand_as reshape_as type_as view_as copy_ cosine_similarity
    pairwise_distance cdist complex polar l1_loss mse_loss huber_loss smooth_l1_loss kl_div
    poisson_nll_loss soft_margin_loss matmul vecdot block_diag broadcast_tensors
    lstsq cross_entropy inner hinge_embedding_loss""",
    lambda s: (s.x, s.y),
)
_add("pow float_power xlogy __pow__ __ipow__ __rpow__", lambda s: (s.unit, s.y))
_add("lerp", lambda s: (s.x, s.y, 0.25))
_add("addcdiv", lambda s: (s.x, s.y, s.unit, {"value": 2.0}))
_add("addcmul", lambda s: (s.x, s.y, s.unit, {"value": 2.0}))
_add("addmm", lambda s: (s.x, s.y, s.unit))
_add("addmv", lambda s: (s.v, s.x, s.y[0]))
_add("addr", lambda s: (s.x, s.v, s.y[0]))
_add("addbmm", lambda s: (s.x, s.cube, s.cube))
_add("baddbmm", lambda s: (s.cube, s.cube, s.cube + 1))
_add("bmm", lambda s: (s.cube, s.cube + 1))
_add("mv", lambda s: (s.x, s.v))
_add("dot", lambda s: (s.v, s.x[0]))
_add("outer", lambda s: (s.v, s.x[0]))
_add("cross", lambda s: (s.x[:, :3], s.y[:, :3]))
_add("softmax log_softmax cumprod cumsum logcumsumexp cummax cummin logsumexp", lambda s: (s.x, 1))
_add("bincount", lambda s: (s.counts.flatten(),))
_add(
    "bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__ __iand__ __ior__ __ixor__ __rand__"
    " __ror__ __rxor__",
    lambda s: (s.ints, s.counts),
)
_add(
    "bitwise_left_shift bitwise_right_shift __lshift__ __rshift__ __ilshift__ __irshift__"
    " __rlshift__ __rrshift__",
    lambda s: (s.counts, s.counts + 1),
)
_add("bitwise_not __invert__", lambda s: (s.ints,))
_add("broadcast_to expand", lambda s: (s.x, (2, 4, 4)))
_add(
    "cholesky eigh eigvalsh logdet slogdet det inverse inv inv_ex eig eigvals lu",
    lambda s: (s.definite,),
)
_add("chunk tensor_split split", lambda s: (s.x, 2, {"dim": 1}))
_add("clamp clip", lambda s: (s.x, -0.25, 0.5))
_add("clamp_max clamp_min", lambda s: (s.x, 0.1))
_add("flip", lambda s: (s.x, (0, 1)))
_add("roll", lambda s: (s.x, 1, 0))
_add("gather", lambda s: (s.x, 1, s.counts))
_add("take_along_dim", lambda s: (s.x, s.counts, 1))
_add("take", lambda s: (s.x, s.counts))
_add("histc", lambda s: (s.x, {"bins": 5, "min": -1, "max": 1}))
_add("index_add index_copy", lambda s: (s.x, 0, torch.tensor([2, 0]), s.y[:2]))
_add("index_fill", lambda s: (s.x, 0, torch.tensor([2, 0]), 1.5))
_add("index_put", lambda s: (s.x, (torch.tensor([0, 2]), torch.tensor([1, 1])), s.v[:2]))
_add("index_select", lambda s: (s.x, 1, s.counts[0]))
_add("kthvalue", lambda s: (s.x, 2))
_add("masked_fill", lambda s: (s.x, s.mask, 0.5))
_add("masked_scatter", lambda s: (s.x, s.mask, s.y))
_add("masked_select", lambda s: (s.x, s.mask))
_add("matrix_power", lambda s: (s.x, 3))
_add("movedim moveaxis transpose swapaxes swapdims", lambda s: (s.cube, 0, 2))
_add("permute", lambda s: (s.cube, (2, 0, 1)))
_add("multinomial", lambda s: (s.unit, 2))
_add("mvlgamma", lambda s: (s.unit + 1, 2))
_add("quantile nanquantile", lambda s: (s.x, 0.3, {"dim": 1}))
_add("narrow", lambda s: (s.x, 1, 1, 2))
_add("renorm", lambda s: (s.x, 2, 0, 0.5))
_add("repeat_interleave", lambda s: (s.x, 2, {"dim": 0}))
_add("repeat tile", lambda s: (s.x, (2, 1)))
_add("reshape view", lambda s: (s.x, (2, -1)))
_add("scatter", lambda s: (s.x, 1, s.counts, 2.0))
_add("scatter_add", lambda s: (s.x, 1, s.counts, s.y))
_add("scatter_reduce", lambda s: (s.x, 1, s.counts, s.y, "amax"))
_add("select", lambda s: (s.x, 1, 2))
_add("select_scatter", lambda s: (s.x, s.v, 0, 1))
_add("slice_scatter", lambda s: (s.x, s.y[:2], {"start": 1, "end": 3}))
_add("topk", lambda s: (s.x, 2))
_add("unflatten", lambda s: (s.x, 1, (2, 2)))
_add("unsqueeze", lambda s: (s.x, 1))
_add("where", lambda s: (s.mask, s.x, s.y))
_add(
    "cat concat concatenate stack column_stack hstack vstack dstack",
    lambda s: ([s.x, s.y],),
)
_add("hsplit vsplit", lambda s: (s.x, 2))
_add("dsplit", lambda s: (s.cube, 2))
_add("cartesian_prod", lambda s: (s.v, s.x[0]))
_add("meshgrid", lambda s: (s.v, s.x[0], {"indexing": "ij"}))
_add("chain_matmul", lambda s: (s.x, s.y, s.unit))
_add("multi_dot", lambda s: ([s.x, s.y, s.unit],))
_add("bucketize", lambda s: (s.x, torch.tensor([-0.5, 0.0, 0.5])))
_add("searchsorted", lambda s: (torch.tensor([-0.5, 0.0, 0.5]), s.x))
_add("combinations", lambda s: (s.v,))
_add("trapezoid cumulative_trapezoid", lambda s: (s.x,))
_add("dropout", lambda s: (s.x, 0.5, True))
_add("alpha_dropout", lambda s: (s.x, 0.5, True))
_add("einsum", lambda s: ("ij,jk->ik", s.x, s.y))
_add("full_like", lambda s: (s.x, 2.5))
_add("group_norm", lambda s: (s.cube, 2))
_add("layer_norm rms_norm", lambda s: (s.x, (4,)))
_add("empty ones rand randn zeros", lambda s: (2, 3))
_add("eye randperm", lambda s: (4,))
_add("full", lambda s: ((2, 3), 1.5))
_add("randint", lambda s: (9, (2, 3)))
_add("normal", lambda s: (s.x, s.unit))
_add("normal_ uniform_", lambda s: (s.x, 0.0, 1.0))
_add("fill_ fill_diagonal_", lambda s: (s.x, 3.0))
_add("tensordot", lambda s: (s.cube, s.x, {"dims": ([2], [0])}))
_add("item", lambda s: (s.v[1],))
_add("new_empty new_ones new_zeros", lambda s: (s.x, (2, 3)))
_add("new_full", lambda s: (s.x, (2, 3), 1.5))
_add("sum_to_size", lambda s: (s.x, (1, 4)))
_add("to", lambda s: (s.x, torch.float64))
_add("unfold", lambda s: (s.x, 1, 2, 1))
_add("size", lambda s: (s.x, 1))
_add("__getitem__ getitem", lambda s: (s.x, (slice(1, 3), None, torch.tensor([0, 2]))))
_add("__setitem__", lambda s: (s.x, (slice(1, 3), torch.tensor([0, 2])), s.y[:2, :2]))
_add("__contains__", lambda s: (s.x, s.x[0, 0]))
_add("imag", lambda s: (s.complex,))
_add("adaptive_avg_pool1d adaptive_max_pool1d", lambda s: (s.cube, 2))
_add("avg_pool1d max_pool1d", lambda s: (s.cube, 2))
_add("batch_norm", lambda s: (s.x, s.v, s.unit[0]))
_add("instance_norm", lambda s: (s.cube,))
_add("binary_cross_entropy", lambda s: (s.unit, s.mask.float()))
_add("binary_cross_entropy_with_logits", lambda s: (s.x, s.mask.float()))
_add("conv1d", lambda s: (s.cube, s.unit[:, :, None]))
_add("cosine_embedding_loss", lambda s: (s.x, s.y, s.mask.float()[0] * 2 - 1))
_add("margin_ranking_loss", lambda s: (s.x, s.y, s.mask.float() * 2 - 1))
_add("vander", lambda s: (s.v,))
_add("embedding", lambda s: (s.counts, s.x))
_add("gaussian_nll_loss", lambda s: (s.x, s.y, s.unit))
_add("gumbel_softmax", lambda s: (s.x,))
_add("interpolate", lambda s: (s.image, {"scale_factor": 2.0}))
_add("linear", lambda s: (s.x, s.y, s.v))
_add("local_response_norm", lambda s: (s.cube, 2))
_add("multi_margin_loss nll_loss", lambda s: (s.x, s.counts[0]))
_add("multilabel_margin_loss", lambda s: (s.x, s.counts))
_add("multilabel_soft_margin_loss", lambda s: (s.x, s.mask.float()))
_add("one_hot", lambda s: (s.counts, 5))
_add("pad", lambda s: (s.x, (1, 1), "constant", 0.5))
_add("prelu", lambda s: (s.x, s.v))
_add("scaled_dot_product_attention", lambda s: (s.cube, s.cube + 1, s.cube))
_add("threshold", lambda s: (s.x, 0.1, 20.0))
_add("triplet_margin_loss", lambda s: (s.x, s.y, s.unit))
_add("solve", lambda s: (s.definite, s.x))
_add("solve_triangular", lambda s: (s.definite, s.x, {"upper": True}))
_add("tensorinv", lambda s: (s.definite.reshape(2, 2, 4), {"ind": 2}))
_add("tensorsolve", lambda s: (s.definite.reshape(2, 2, 4), s.x[:2, :2]))

_BY_NAME: dict[str, Callable[[Inputs], Arguments]] = {
    "torch.Tensor.where": lambda s: (s.x, s.mask, s.y),
}
"""Arguments where one namespace takes others than the rest."""

_OF_NUMBERS = "arange linspace logspace scalar_tensor tensor tril_indices triu_indices"

NOT_SAMPLED = (
    {f"torch.{name}": "is not recorded: the user has its result" for name in _OF_NUMBERS.split()}
    | {name: "no function of torch" for name in OPERATIONS if name.startswith("insitu.")}
    | {"torch.Tensor.tolist": "gives Python the elements, which are not there while recording"}
)
"""Operations without a sample, and why."""


def function(name: str) -> Callable[..., Any]:
    """Gives the function that an operation's name stands for."""
    found: Callable[..., Any] = operator.attrgetter(name)(
        SimpleNamespace(torch=torch, operator=operator)
    )
    return found


def sample(name: str, hidden: Any) -> tuple[Arguments, dict[str, Any]]:
    """Makes the arguments of an operation's sample call.

    Args:
        name: the operation.
        hidden: an activation of at least 128 elements, or its proxy.
    """
    word = last_word(name)
    without_mark = word if word in _BY_WORD or word.endswith("__") else word.removesuffix("_")
    args = (_BY_NAME.get(name) or _BY_WORD[without_mark])(Inputs(hidden))
    return (args[:-1], args[-1]) if isinstance(args[-1], dict) else (args, {})
