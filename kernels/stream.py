"""Two LLVM intrinsics: store past the caches, and wait until such stores are visible.

A plain store first reads the cache line that it is about to overwrite. Where an output is larger than the caches and is
read by another core later, that read is waste: rows of 512 bytes were gathered 1.5 to 1.8 times as fast without it.
"""

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_WORDS = 16  # a cache line: parts of lines were slower than plain stores
_X86 = platform.machine() in ("x86_64", "AMD64")


def _stream_words(typing_context: Any, source: Any, start: Any, target: Any, to: Any) -> Any:
    """Copy 16 uint32 from flat element `start` of `source` to `to` of `target`, which must be a cache line."""
    signature = types.void(source, start, target, to)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.IntType(32), _WORDS).as_pointer()
        places = []
        for array, index in ((0, 1), (2, 3)):
            proxy: Any = cgutils.create_struct_proxy(signature.args[array])  # type: ignore[no-untyped-call]
            data = proxy(context, builder, value=args[array]).data
            places.append(builder.bitcast(builder.gep(data, [args[index]]), vector))
        store = builder.store(builder.load(places[0], align=4), places[1], align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return signature, codegen


def _stream_fence(typing_context: Any) -> Any:
    """Make streamed words visible to other threads before anything that this thread writes later."""
    signature = types.void()

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse.sfence"
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])  # type: ignore[no-untyped-call]
        else:
            builder.fence("seq_cst")
        return context.get_dummy_value()

    return signature, codegen


# Numba passes the typing context itself, which a type checker could not know.
stream_words: Any = intrinsic(_stream_words)
stream_fence: Any = intrinsic(_stream_fence)
