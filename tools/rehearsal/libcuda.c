// A stand-in for NVIDIA's libcuda: launches are recorded, not run, and refused where CUDA refuses.
//
// It has the functions that Triton's driver and launchers call, for one device: an H100 or, by
// stub_begin, another architecture.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"
#undef cuDevicePrimaryCtxRetain
#undef cuCtxGetCurrent

enum { MAX_THREADS = 1024, DEFAULT_SHARED = 48 * 1024, MAX_FUNCTIONS = 1 << 16 };

struct function {
  char name[128];
  int loaded;      // in which order, from 1
  int max_shared;  // bytes of dynamic shared memory that a launch may ask for
};

struct launch {
  int32_t function;  // struct function's loaded
  uint32_t grid[3];
  uint32_t threads;
  uint32_t shared;
};

static int arch = 90, shared_limit = 227 * 1024;
static struct function functions[MAX_FUNCTIONS];
static int function_count;
static struct launch* launches;
static long launch_count, launch_room;
static const char* refusal = "";

void stub_begin(int target, int shared) {
  arch = target;
  shared_limit = shared;
}
long stub_launch_count(void) { return launch_count; }
const struct launch* stub_launches(void) { return launches; }
void stub_forget_launches(void) { launch_count = 0; }
int stub_function_count(void) { return function_count; }
const char* stub_function_name(int loaded) { return functions[loaded - 1].name; }

static CUresult refuse(const char* why) {
  refusal = why;
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult result, const char** text) { *text = refusal; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int index) { *device = 0; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { *value = 1 << 20; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch ((int)attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = arch / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = arch % 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_limit; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = shared_limit + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = MAX_THREADS; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;          // kHz
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 2619000; break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 5120; break;  // bits
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  if (function_count == MAX_FUNCTIONS) return refuse("the stand-in has no room for more kernels");
  struct function* made = &functions[function_count++];
  strncpy(made->name, name, sizeof made->name - 1);
  made->loaded = function_count;
  made->max_shared = DEFAULT_SHARED;
  *function = (CUfunction)made;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  int threads = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
  *value = threads ? MAX_THREADS : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 255 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value > shared_limit) return refuse("more shared memory than a block may have");
    ((struct function*)function)->max_shared = value;
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_INVALID_VALUE;  // no other attribute exists on this device
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function, const CUlaunchConfig* config) {
  *count = 1;
  return CUDA_SUCCESS;
}

// A device knows no pointer of the host; here tensors on the CPU stand for tensors on the device.
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)data = pointer;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(
    unsigned count, CUpointer_attribute* attributes, void** data, CUdeviceptr pointer) {
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
    const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
    const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if ((uintptr_t)address % 16) return refuse("a tensor map's address is no multiple of 16");
  for (cuuint32_t axis = 0; axis + 1 < rank; axis++)
    if (strides[axis] % 16) return refuse("a tensor map's stride is no multiple of 16 bytes");
  return CUDA_SUCCESS;
}

static const char* why_refused(const CUlaunchConfig* config, const struct function* function) {
  unsigned long threads =
      (unsigned long)config->blockDimX * config->blockDimY * config->blockDimZ;
  if (!config->gridDimX || !config->gridDimY || !config->gridDimZ) return "a grid axis is 0";
  if (config->gridDimX > 2147483647u) return "grid axis 0 is longer than 2**31 - 1";
  if (config->gridDimY > 65535u) return "grid axis 1 is longer than 65535";
  if (config->gridDimZ > 65535u) return "grid axis 2 is longer than 65535";
  if (!threads || threads > MAX_THREADS) return "a block has 0 threads, or more than 1024";
  if ((int)config->sharedMemBytes > function->max_shared)
    return "more shared memory than the kernel may have";
  return NULL;
}

CUresult cuLaunchKernelEx(
    const CUlaunchConfig* config, CUfunction handle, void** parameters, void** extra) {
  const struct function* function = (const struct function*)handle;
  const char* why = why_refused(config, function);
  if (why) return refuse(why);
  if (launch_count == launch_room) {
    launch_room = launch_room ? 2 * launch_room : 1024;
    launches = realloc(launches, launch_room * sizeof *launches);
    if (!launches) return CUDA_ERROR_OUT_OF_MEMORY;
  }
  struct launch* made = &launches[launch_count++];
  made->function = function->loaded;
  made->grid[0] = config->gridDimX;
  made->grid[1] = config->gridDimY;
  made->grid[2] = config->gridDimZ;
  made->threads = config->blockDimX;
  made->shared = config->sharedMemBytes;
  return CUDA_SUCCESS;
}
