// What the kernels use from elsewhere; included before a target is chosen (kernels.h says why).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "quamba/cpu/buffer.h"
#include "quamba/cpu/params.h"
