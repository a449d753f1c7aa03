// SPARSE_ATTN_INSTRUCTIONS_BEGIN("avx2,fma") ... SPARSE_ATTN_INSTRUCTIONS_END: functions in between may use these.
// Headers of the standard library come before, so that no code of theirs gets instructions that another processor
// lacks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#define SPARSE_ATTN_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SPARSE_ATTN_INSTRUCTIONS_BEGIN(names) \
  SPARSE_ATTN_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define SPARSE_ATTN_INSTRUCTIONS_END _Pragma("clang attribute pop")
#else
#define SPARSE_ATTN_INSTRUCTIONS_BEGIN(names) _Pragma("GCC push_options") SPARSE_ATTN_PRAGMA(GCC target(names))
#define SPARSE_ATTN_INSTRUCTIONS_END _Pragma("GCC pop_options")
#endif
