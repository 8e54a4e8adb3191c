#include "depthwise_conv.cuh"

namespace vmamba::cuda {
template void conv_forward<__nv_bfloat16>(const ConvForward&, bool, cudaStream_t);
template void conv_backward<__nv_bfloat16>(const ConvBackward&, bool, cudaStream_t);
template void conv_gather<__nv_bfloat16>(const ConvGather&, bool, cudaStream_t);
}  // namespace vmamba::cuda
