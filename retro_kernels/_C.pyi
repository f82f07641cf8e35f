# csrc/bindings.cpp as Python sees it. Addresses are integers; the meaning of every argument is in csrc/ops.h.

cuda: bool

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
    ) -> None: ...

def gather_neighbours_cpu(gather: Gather, threads: int, advise: int) -> None: ...
def gather_neighbours_cuda(
    gather: Gather, host_tokens: bool, host_continuation: bool, stream: int
) -> None: ...
