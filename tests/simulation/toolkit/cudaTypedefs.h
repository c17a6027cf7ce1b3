// Stands for the toolkit's header: the types of the driver's functions.
#pragma once

#include <cuda.h>

using PFN_cuTensorMapEncodeTiled_v12000 = CUresult (*)(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t sides, void* tensor,
    const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
    const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);
using PFN_cuTensorMapEncodeIm2col_v12000 =
    CUresult (*)(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t sides, void* tensor,
                 const cuuint64_t* sizes, const cuuint64_t* strides, const int* first,
                 const int* last, cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* steps,
                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                 CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);
