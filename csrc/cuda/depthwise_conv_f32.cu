#include "depthwise_conv.cuh"

namespace vmamba::cuda {
template void conv_forward<float>(const ConvForward&, bool, cudaStream_t);
template void conv_backward<float>(const ConvBackward&, bool, cudaStream_t);
template void conv_gather<float>(const ConvGather&, bool, cudaStream_t);
}  // namespace vmamba::cuda
