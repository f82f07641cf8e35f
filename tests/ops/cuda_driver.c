// Stands for libcuda.so.1 where there is no GPU: a launch is written down, byte by byte, and a TMA map is its fields.
#include "cuda.h"
#include <stdlib.h>
#include <string.h>

static int sizes[1024], count;  // of the parameters of the next launches: a launch itself does not tell
static unsigned char *written;
static size_t length, room;
static long maps, handles = 4096;

void expect_parameters(const int *given, int n) {
  memcpy(sizes, given, n * sizeof(int));
  count = n;
}

long encoded_maps(void) { return maps; }

size_t written_bytes(unsigned char *out) {
  size_t n = length;
  if (out) {
    memcpy(out, written, n);
    length = 0;
  }
  return n;
}

static void write_down(const void *from, size_t n) {
  if (length + n > room) {
    room = 2 * (length + n);
    written = realloc(written, room);
  }
  memcpy(written + length, from, n);
  length += n;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
  unsigned shape[] = {c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                      c->sharedMemBytes, c->numAttrs};
  write_down(shape, sizeof shape);
  write_down(&c->hStream, sizeof c->hStream);
  write_down(&function, sizeof function);
  for (unsigned i = 0; i < c->numAttrs; i++) {
    write_down(&c->attrs[i].id, 4);
    write_down(&c->attrs[i].value, 4);
  }
  for (int i = 0; i < count; i++) write_down(parameters[i], sizes[i]);
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  cuuint64_t fields[16] = {(cuuint64_t)address,
                           type | rank << 8 | interleave << 16 | swizzle << 20 | promotion << 24 | fill << 28};
  for (unsigned i = 0; i < rank && i < 4; i++) {
    fields[2 + i] = dims[i];
    fields[6 + i] = i + 1 < rank ? strides[i] : 0;
    fields[10 + i] = box[i] | (cuuint64_t)steps[i] << 32;
  }
  memcpy(map, fields, sizeof fields);
  maps++;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448 : 65536;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)handles++;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "there is no GPU";
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)handles++, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
