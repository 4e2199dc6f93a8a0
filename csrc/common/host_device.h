// Functions that C++ and CUDA kernels share.
#pragma once

// MOE_DEVICE is for what in CUDA runs on a GPU only, and in C++ is what a test makes of that.
#ifdef __CUDACC__
#define MOE_HOST_DEVICE __host__ __device__
#define MOE_DEVICE __device__
#else
#define MOE_HOST_DEVICE
#define MOE_DEVICE
#endif
