#include "depthwise_conv.cuh"

namespace vmamba::cuda {
template void conv_forward<__half>(const ConvForward&, bool, cudaStream_t);
template void conv_backward<__half>(const ConvBackward&, bool, cudaStream_t);
template void conv_gather<__half>(const ConvGather&, bool, cudaStream_t);
}  // namespace vmamba::cuda
