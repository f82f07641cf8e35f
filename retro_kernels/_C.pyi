# csrc/bindings.cpp as Python sees it. Addresses are integers; the meaning of every argument is in csrc/ops.h.

from collections.abc import Sequence

cuda: bool
cuda_archs: str
attend_cpu_takes_bf16: bool

class Gather:
    def __init__(
        self,
        *,
        tokens: int,
        token_bytes: int,
        row_stride: int,
        num_chunks: int,
        chunk_size: int,
        continuation: int,
        ids: int,
        n: int,
        pad_id: int,
        out: int,
        out_bytes: int,
        lengths: int,
        order: int = 0,
    ) -> None: ...

def gather_neighbours_cpu(gather: Gather, threads: int, advise: int) -> None: ...
def gather_neighbours_cuda(
    gather: Gather, host_tokens: bool, host_continuation: bool, stream: int
) -> None: ...

class Attention:
    def __init__(
        self,
        *,
        query: int,
        query_strides: Sequence[int],
        key: int,
        key_strides: Sequence[int],
        value: int,
        value_strides: Sequence[int],
        table: int,
        columns: int,
        content_bias: int,
        position_bias: int,
        rel_bias: int,
        lengths: int,
        out: int,
        query_shape: Sequence[int],
        key_shape: Sequence[int],
        block: int,
        shift: int,
        repeat: int,
        scale: float,
        bf16: bool = False,
    ) -> None: ...

class Gradients:
    def __init__(
        self,
        *,
        grad_out: int,
        out: int,
        table_rows: int,
        grad_query: int,
        grad_key: int,
        grad_value: int,
        grad_table: int,
        grad_bias: int,
        grad_content: int,
        grad_position: int,
        parts: int,
        wide: int,
    ) -> None: ...

def attend_cpu_works() -> bool: ...
def limit_threads(threads: int) -> bool: ...
def attend_cpu(attention: Attention, threads: int) -> None: ...
def attend_backward_cpu(attention: Attention, gradients: Gradients, threads: int) -> None: ...

class AbsorbedDecode:
    def __init__(
        self,
        *,
        scale_log2: float,
        batch: int,
        tokens: int,
        heads: int,
        width: int,
        neighbours: int,
        keys: int,
        columns: int,
        rel_stride: int,
        splits: int,
        row_bytes: int,
        length_bytes: int,
        bias_bytes: int,
        half: bool,
    ) -> None: ...

    cluster: bool

absorbed_decode_keys: int

def absorbed_decode_rows(of_sequence: int) -> int: ...
def absorbed_decode_clusters(decode: AbsorbedDecode) -> int: ...
def absorbed_decode_takes(width: int, neighbours: int, keys: int, of_sequence: int) -> bool: ...
def absorbed_decode_cuda(decode: AbsorbedDecode, addresses: Sequence[int], stream: int) -> None: ...
