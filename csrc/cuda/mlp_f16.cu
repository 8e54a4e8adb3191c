#include "mlp_kernels.cuh"

namespace vmamba::cuda {
template void mlp_forward_as<__half>(const MlpForward&, int, cudaStream_t);
template void mlp_residual_as<__half>(const MlpResidual&, int, cudaStream_t);
template void mlp_backward_as<__half>(const MlpBackward&, float*, int, cudaStream_t);
}  // namespace vmamba::cuda
