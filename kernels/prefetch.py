"""One LLVM intrinsic: ask for a cache line before it is needed.

Random gathers wait for memory, not for arithmetic; a prefetch a few iterations ahead hides most of the wait.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Hint that flat element `index` of a C-contiguous array is about to be read; any index is harmless."""
    signature = types.void(array, index)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = cgutils.create_struct_proxy(signature.args[0])  # type: ignore[no-untyped-call]
        data = array(context, builder, value=args[0]).data
        offset = builder.sext(args[1], ir.IntType(64)) if args[1].type.width < 64 else args[1]
        pointer = builder.bitcast(builder.gep(data, [offset]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type] + [ir.IntType(32)] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")  # type: ignore[no-untyped-call]
        word = ir.IntType(32)
        builder.call(function, [pointer, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return signature, codegen


prefetch: Any = intrinsic(_prefetch)  # Any: callers pass no typing context
