// Every native op: a plain function over addresses, sizes and, on a GPU, a stream. No torch, no Python.
// An op allocates nothing that outlives it, never synchronises, and throws std::exception with its own name in front.
#pragma once
#include <cstdint>
