"""One LLVM intrinsic: the index of the lowest set bit, for walking sets that are words."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


def _count_trailing_zeros(typing_context: Any, word: Any) -> Any:
    """Index of the lowest set bit of a uint64, as int64; undefined for 0."""
    signature = types.int64(types.uint64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return signature, codegen


count_trailing_zeros: Any = intrinsic(_count_trailing_zeros)  # Any: callers pass no typing context
