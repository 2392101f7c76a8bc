// Rounding to float16 for the emulator in cuda_runtime.h.
#pragma once

using __half = _Float16;
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
inline float __half2float(__half value) { return static_cast<float>(value); }
struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float __low2float(__half2 pair) { return __half2float(pair.x); }
inline float __high2float(__half2 pair) { return __half2float(pair.y); }
