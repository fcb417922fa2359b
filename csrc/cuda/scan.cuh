// What the scans share on the device: element access to tensors of any layout.
#pragma once

#include "deftcore/math.h"
#include "deftcore/ssm.h"
#include "launch.cuh"

namespace deftcore::cuda {
namespace {

template <class T>
__device__ float read_at(const ScanTensor& x, int64_t batch, int64_t time, int64_t channel) {
  return to_float(static_cast<const T*>(x.data)[batch * x.batch + time * x.time + channel * x.channel]);
}

template <class T>
__device__ void write_at(const ScanTensor& x, int64_t batch, int64_t time, int64_t channel, float value) {
  static_cast<T*>(x.data)[batch * x.batch + time * x.time + channel * x.channel] = from_float<T>(value);
}

}  // namespace
}  // namespace deftcore::cuda
