/* A CUDA driver without a device: what Triton's launcher needs of one. It runs nothing, and writes down every launch.

   Built as libcuda.so.1 by launcher_checks.py. A parameter's size is not in what a launch gets: whoever loads a kernel
   says it before (`expect_parameters`). */

#include <cuda.h>
#include <stdio.h>
#include <string.h>

#define MOST_FUNCTIONS 256
#define MOST_PARAMETERS 64

typedef struct {
  int count;
  int sizes[MOST_PARAMETERS];
} Parameters;

static Parameters expected, functions[MOST_FUNCTIONS];
static size_t num_functions;
static char launches[1 << 20];
static size_t length;

void expect_parameters(int count, const int *sizes) {
  expected.count = count;
  memcpy(expected.sizes, sizes, count * sizeof(int));
}

/* One line a launch, and forgets them. */
const char *take_launches(void) {
  static char taken[sizeof(launches)];
  memcpy(taken, launches, length);
  taken[length] = 0;
  length = 0;
  return taken;
}

static void note_bytes(const void *bytes, int count) {
  for (int i = 0; i < count; ++i)
    length += sprintf(launches + length, "%02x", ((const unsigned char *)bytes)[i]);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  size_t number = (size_t)function;
  if (number < 1 || number > num_functions || length > sizeof(launches) / 2)
    return CUDA_ERROR_INVALID_HANDLE;
  length += sprintf(launches + length, "function %zu grid %u %u %u block %u %u %u shared %u stream %zu attributes %u:",
                    number, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY,
                    config->blockDimZ, config->sharedMemBytes, (size_t)config->hStream, config->numAttrs);
  Parameters known = functions[number - 1];
  for (int i = 0; i < known.count; ++i) {
    launches[length++] = ' ';
    note_bytes(parameters[i], known.sizes[i]);
  }
  launches[length++] = '\n';
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  if (num_functions == MOST_FUNCTIONS)
    return CUDA_ERROR_OUT_OF_MEMORY;
  functions[num_functions++] = expected;
  *function = (CUfunction)num_functions;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer; /* host memory stands for the device's */
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error of the fake driver";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = 227 << 10; /* of shared memory; other attributes do not matter */
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
